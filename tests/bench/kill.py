"""How long runs stand still when their process is killed, and how much is done twice: Durable and DBOS.

    python3 dev.py bench kill [--workflows 500] [--steps 5] [--step-seconds 1] [--runs 1] [--skip-peers] [--quick]

Runs of five steps of one second each, all in flight at once. When half of all step bodies have begun, a process is killed
with -9. Once one of two engines, which share the runs; once the only one, another being started at once. DBOS recovers what
its own executor left when it starts again (without its separate control plane nothing else takes over), so it has the second.
Bodies write a line to a file when they begin; what is there twice ran twice. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from msgspec import Struct

from tests.bench.kit.site import Failure, Process, Site, last_line, machine, median, peers_python, run, say, site, table


class Outcome(Struct):
    """Of one kill."""

    seconds: float
    """From the first start until all runs were done."""
    after_kill: float
    in_flight: int
    """Runs that had not begun their last step when the process died."""
    twice: int
    """Step bodies that ran more than once."""


class Ledger:
    """What the bodies wrote down: run, step, process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def begun(self) -> Counter[tuple[str, int]]:
        """How often each step of each run has begun."""
        lines = [line.split() for line in self.path.read_text().splitlines()]
        return Counter((run, int(step)) for run, step, _ in lines)


def kill(where: Site, python: str, module: str, engines: int, options: argparse.Namespace) -> Outcome:
    """Start all runs, shared among the engines; kill one at half time; wait for all."""
    client = "api" if module == "ours" else "client"
    with where.database() as url, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ledger = Ledger(Path(folder) / "ledger")

        def engine() -> Process:
            return stack.enter_context(Process(python, module, url, ledger=str(ledger.path)))

        running = [engine() for _ in range(engines)]
        watcher = stack.enter_context(Process(python, module, url, role=client))
        begun = time.monotonic()
        for one in running:
            one.tell("load", count=options.workflows // engines, steps=options.steps, seconds=options.step_seconds)
        ids = [id for one in running for id in one.answer()["ids"]]
        watcher.tell("await_all", ids=ids)
        while sum(ledger.begun().values()) < len(ids) * options.steps / 2:
            time.sleep(0.02)
        running[0].kill()
        killed = time.monotonic()
        last = {run for run, step in ledger.begun() if step == options.steps - 1}
        if engines == 1:
            engine()
        watcher.answer(timeout=600)
        done = time.monotonic()
        began = ledger.begun()
        if len(began) != len(ids) * options.steps:
            raise Failure(
                f"{len(ids) * options.steps} steps were to be done, and {len(began)} are known to the ledger."
            )
        return Outcome(done - begun, done - killed, len(ids) - len(last), sum(began.values()) - len(began))


def main(args: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workflows", type=int, default=500, help="runs in flight (default 500)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=1, help="rounds, of which the median counts (default 1)")
    parser.add_argument("--skip-peers", action="store_true", help="Durable alone: nothing is installed")
    parser.add_argument("--quick", action="store_true", help="a glance: 20 runs of short steps")
    options = parser.parse_args(args)
    if options.quick:
        options.workflows, options.step_seconds, options.runs = 20, 0.2, 1
    cases = [("durable, one of two", "ours", 2), ("durable, restarted", "ours", 1)]
    peers = ""
    if not options.skip_peers:
        cases.append(("dbos, restarted", "peer_dbos", 1))
        peers = peers_python()
    report: dict[str, Any] = {}
    rows = []
    with site() as where:
        facts = machine(where)
        found: dict[str, list[Outcome]] = {name: [] for name, _, _ in cases}
        for _ in range(options.runs):
            for name, module, engines in cases:
                found[name].append(kill(where, sys.executable if module == "ours" else peers, module, engines, options))
        facts["load_after"] = os.getloadavg()[0]
    for name, outcomes in found.items():
        middle = Outcome(*(median([getattr(one, field) for one in outcomes]) for field in Outcome.__struct_fields__))
        key = name.replace(", ", "_").replace(" ", "_")
        report[f"{key}_s"], report[f"{key}_after_kill_s"] = middle.seconds, middle.after_kill
        report[f"{key}_in_flight"], report[f"{key}_twice"] = middle.in_flight, middle.twice
        rows.append(
            [
                name,
                f"{middle.seconds:.1f}",
                f"{middle.after_kill:.1f}",
                f"{middle.in_flight:,.0f}",
                f"{middle.twice:,.0f}",
            ]
        )
    ideal = options.steps * options.step_seconds
    shape = f"{options.workflows} runs of {options.steps} steps of {options.step_seconds:g} s"
    say(f"\nkill -9: {shape}; {ideal:g} s if nothing happens")
    table(["", "s until all done", "s after the kill", "in flight", "bodies run twice"], rows)
    last_line({**report, "ideal_s": ideal, "machine": facts})
    return report


if __name__ == "__main__":
    run(main)
