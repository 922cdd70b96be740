"""How fast the service is: events accepted over HTTP, and runs of functions that live in other processes.

    python3 dev.py bench service [--runs 3] [--seconds 5] [--workflows 400] [--store postgres|sqlite] [--profile] [--quick]

floor    a bare Starlette endpoint that does one INSERT: HTTP, one hop, one durable row
events   events that start nothing, one a request on many connections; and a hundred a request (/e/bulk)
starts   events of which each starts a run in the service's own process
connect  five-step functions in a runner that has dialled in;  serve: in one that is called
late     from sending an event to the first step of its run, fifty a second

The service, the runner and the load are processes of their own, on keep-alive connections over loopback. Each measurement
has a fresh database; medians count. docs/benchmarks.md says what the figures mean. The last line of output is one JSON object;
--json leaves the tables out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from os import getloadavg
from pathlib import Path
from sys import executable
from typing import Any

from tests.bench.kit.child import VALUE
from tests.bench.kit.site import Failure, Process, Site, last_line, machine, median, p95, run, say, site, table

STEPS = 5
CONNECTIONS = 64
BULK = 100
BULK_CONNECTIONS = 4
LATE_EVERY = 0.02
WHAT = ("floor", "events", "starts", "connect", "serve")


class Bench:
    """The service on one store, measured."""

    def __init__(self, where: Site, options: argparse.Namespace) -> None:
        self.site, self.options = where, options

    @contextmanager
    def place(self) -> Iterator[str]:
        """A fresh store's URL."""
        if self.options.store == "postgres":
            with self.site.database() as url:
                yield url
        else:
            with tempfile.TemporaryDirectory(prefix="durable-bench-") as folder:
                yield f"sqlite:///{Path(folder) / 'durable.db'}"

    @contextmanager
    def process(self, url: str, role: str, **more: Any) -> Iterator[Process]:
        loop = self.options.loop if role == "service" else "uvloop"
        with Process(executable, "service", url, role=role, loop=loop, **more) as process:
            yield process

    def once(self) -> dict[str, float]:
        """One round of everything that was asked for."""
        found: dict[str, float] = {}
        only = self.options.only
        if "floor" in only:
            found |= self.floor()
        if "events" in only:
            found |= self.events()
        if "starts" in only:
            found |= self.starts()
        for mode in ("connect", "serve"):
            if mode in only:
                found |= self.functions(mode)
        return found

    def floor(self) -> dict[str, float]:
        with self.site.database() as url, self.process(url, "floor") as floor, self.process(url, "load") as load:
            what = {"port": floor.hello["port"], "path": "/insert", "body": event("bench.nothing")}
            load.ask("post", **what, connections=CONNECTIONS, count=CONNECTIONS * 2)
            told = load.ask("post", **what, connections=CONNECTIONS, seconds=self.options.seconds)
        return {"floor_inserts_per_s": told["rate"], "floor_p95_ms": p95(told["ms"])}

    def events(self) -> dict[str, float]:
        """Accepted and durable: the answer comes after the commit."""
        with self.place() as url, self.process(url, "service") as service, self.process(url, "load") as load:
            target = {"port": service.hello["port"], "key": service.hello["key"]}
            one = target | {"path": "/e", "body": event("bench.nothing")}
            load.ask("post", **one, connections=CONNECTIONS, count=CONNECTIONS * 5)
            before = service.cpu(), load.cpu()
            if self.options.profile:
                service.tell("profile", seconds=self.options.seconds * 0.9, top=50)
            told = load.ask("post", **one, connections=CONNECTIONS, seconds=self.options.seconds)
            found = {
                "events_per_s": told["rate"],
                "events_p50_ms": median(told["ms"]),
                "events_p95_ms": p95(told["ms"]),
                "events_service_cpu_us": (service.cpu() - before[0]) * 1e6 / told["count"],
                "events_load_cpu_us": (load.cpu() - before[1]) * 1e6 / told["count"],
            }
            if self.options.profile:
                shown("service, while it accepts events", service.answer())
            bulk = target | {"path": "/e/bulk", "body": events("bench.nothing", BULK)}
            told = load.ask("post", **bulk, connections=BULK_CONNECTIONS, seconds=self.options.seconds)
            return found | {"events_bulk_per_s": told["rate"] * BULK}

    def starts(self) -> dict[str, float]:
        """Each starts a run in the service's process; the rate counts the answers, the runs have to be done too."""
        with self.place() as url, self.process(url, "service", inside=True) as service:
            with self.process(url, "load") as load:
                target = {"port": service.hello["port"], "key": service.hello["key"]}
                what = target | {"path": "/e", "body": event("bench.inside")}
                load.ask("post", **what, connections=4, count=20)
                service.ask("late")
                late = self.late(load, what, service)
                told = load.ask("post", **what, connections=CONNECTIONS, seconds=self.options.seconds)
                begun = time.perf_counter()
                service.ask("ended", workflow="inside")
                seconds = told["count"] / told["rate"] + time.perf_counter() - begun
                return {
                    "starts_per_s": told["rate"],
                    "inside_runs_per_s": told["count"] / seconds,
                    "inside_event_to_first_step_p50_ms": median(late),
                    "inside_event_to_first_step_p95_ms": p95(late),
                }

    def functions(self, mode: str) -> dict[str, float]:
        """Runs of five steps in another process, all asked for at once, until the last of them has ended."""
        count = self.options.workflows
        with ExitStack() as stack:
            enter = stack.enter_context
            url = enter(self.place())
            service, load = enter(self.process(url, "service")), enter(self.process(url, "load"))
            target = {"port": service.hello["port"], "key": service.hello["key"]}
            base = f"http://127.0.0.1:{target['port']}"
            runner = enter(self.process(url, mode, engine=base, key=target["key"]))
            service.ask("connected", mode=mode)
            one = target | {"path": "/e", "body": event(f"bench.{mode}")}
            load.ask("post", **one, connections=4, count=20)
            service.ask("ended", workflow=f"by_{mode}")
            late = self.late(load, one, runner)
            before = service.cpu(), runner.cpu()
            bulk = target | {"path": "/e/bulk", "body": events(f"bench.{mode}", min(BULK, count))}
            begun = time.perf_counter()
            if self.options.profile:
                service.tell("profile", seconds=self.options.seconds, top=50)
                runner.tell("profile", seconds=self.options.seconds, top=25)
            load.ask("post", **bulk, connections=BULK_CONNECTIONS, count=max(1, count // BULK))
            if self.options.profile:
                shown(f"service, while {mode} runs", service.answer())
                shown(f"runner by {mode}", runner.answer())
            service.ask("ended", workflow=f"by_{mode}")
            seconds = time.perf_counter() - begun
            count = max(1, count // BULK) * min(BULK, count)
            used = service.cpu() - before[0], runner.cpu() - before[1]
            return {
                f"{mode}_runs_per_s": count / seconds,
                f"{mode}_steps_per_s": count * STEPS / seconds,
                f"{mode}_service_cpu_us_per_step": used[0] * 1e6 / count / STEPS,
                f"{mode}_runner_cpu_us_per_step": used[1] * 1e6 / count / STEPS,
                f"{mode}_event_to_first_step_p50_ms": median(late),
                f"{mode}_event_to_first_step_p95_ms": p95(late),
            }

    def late(self, load: Process, what: dict[str, Any], where: Process) -> list[float]:
        """Milliseconds from sending an event to the first step, at a pace that keeps nobody busy."""
        where.ask("late")
        count = self.options.lone
        load.ask("post", **what, connections=1, count=count, every=LATE_EVERY)
        found: list[float] = []
        deadline = time.monotonic() + 30
        while len(found) < count:
            if time.monotonic() > deadline:
                raise Failure(f"Of {count} runs only {len(found)} began within 30 s.")
            time.sleep(0.05)
            found += where.ask("late")["ms"]
        return found

    def measure(self) -> dict[str, float]:
        """Medians of the rounds, and what one is of the other."""
        taken = [self.once() for _ in range(self.options.runs)]
        for one in taken:
            if "events_per_s" in one and "floor_inserts_per_s" in one:
                one["events_share_of_floor"] = one["events_per_s"] / one["floor_inserts_per_s"]
        return {key: median([one[key] for one in taken]) for key in taken[0]}


def event(name: str) -> str:
    """As an app sends it: about 150 bytes. NOW is replaced with the time."""
    return json.dumps({"name": name, "data": {**VALUE, "sent": "NOW"}})


def events(name: str, count: int) -> str:
    return json.dumps({"events": [json.loads(event(name))] * count})


def shown(title: str, profile: dict[str, Any]) -> None:
    say(f"\n{title}: {profile['total'] / 1e6:.2f} s of CPU, {profile['samples']} samples; µs")
    table(["function", "own", "through"], [[w, f"{own:,.0f}", f"{all_:,.0f}"] for w, own, all_ in profile["functions"]])


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench service", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--workflows", type=int, default=400, help="runs of five steps, all asked for at once")
    parser.add_argument("--lone", type=int, default=200, help="events of which each is timed")
    parser.add_argument("--store", choices=["postgres", "sqlite"], default="postgres", help="of the service")
    parser.add_argument("--only", type=lambda text: text.split(","), default=WHAT, help=f"of {','.join(WHAT)}")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio", help="of the service")
    parser.add_argument("--profile", action="store_true", help="say where the CPU goes; the figures suffer")
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    parser.add_argument("--quick", action="store_true", help="a glance; the figures mean nothing")
    options = parser.parse_args(args)
    if options.quick:
        options.runs, options.seconds, options.workflows, options.lone = 1, 0.3, 20, 10
    if strange := set(options.only) - set(WHAT):
        parser.error(f"--only takes {','.join(WHAT)}, not {','.join(strange)}")
    with redirect_stdout(StringIO() if options.json else sys.stdout):
        report = measured(options)
    last_line(report)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    with site() as where:
        report: dict[str, Any] = {"machine": machine(where), "store": options.store}
        found = Bench(where, options).measure()
        say()
        table(["figure", "value"], [[key, f"{value:,.2f}"] for key, value in found.items()])
        report |= found
        report["machine"]["load_after"] = getloadavg()[0]
    return report


if __name__ == "__main__":
    run(main)
