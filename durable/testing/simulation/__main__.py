"""Simulate many seeds, or look at one.

python -m durable.testing.simulation --seeds 2000             totals by kind; a zero fails
python -m durable.testing.simulation --seed 17 --trace        every write, by whom, and what became of it
python -m durable.testing.simulation --seed 17 --shrink       the same failure with less around it
python -m durable.testing.simulation --case '{"seed": 17 …}'  a line of tests/simulation/regressions.txt
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import msgspec

from durable.testing.simulation.faults import Swarm
from durable.testing.simulation.runner import Case, Verdict, environment, judge, quiet, run_many, shrink, work

ENOUGH = 500
"""Seeds from which on a kind that never happened is a failure."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "durable.testing.simulation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first")
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--processes", type=int, help="default: one for each core")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--case", help="this one alone, shrunk: a JSON object")
    parser.add_argument("--trace", action="store_true", help="tell every write")
    parser.add_argument("--shrink", action="store_true", help="make the failure smaller")
    parser.add_argument("--cases", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, "-m", "durable.testing.simulation", *argv], environment())
    if options.worker:
        first, end, step = map(int, options.worker.split(":"))
        work(range(first, end, step), options.until, lambda line: say(line))
        return 0
    if options.cases:
        quiet()
        for line in sys.stdin:
            say(msgspec.json.encode(judge(msgspec.json.decode(line, type=Case).swarm()).found).decode())
        return 0
    if options.case is not None:
        return one(msgspec.json.decode(options.case, type=Case).swarm(), options)
    if options.seed is not None:
        return one(Swarm.draw(options.seed), options)
    return many(options)


def one(swarm: Swarm, options: argparse.Namespace) -> int:
    """Look at one seed."""
    if options.shrink:
        swarm, found = shrink(swarm, tell=say)
        say(Case.of(swarm).text())
    else:
        say(str(swarm))
        found = judge(swarm, trace=say if options.trace else None).found
    for what in found:
        say(f"VIOLATION {what}")
    return 1 if found else 0


def many(options: argparse.Namespace) -> int:
    """Many seeds, and what they come to."""
    began = time.monotonic()
    done = 0

    def told(verdict: Verdict) -> None:
        nonlocal done
        done += 1
        for what in verdict.found[:5]:
            say(f"\nseed {verdict.seed}: {what}")
        if verdict.found:
            say(f"    python -m durable.testing.simulation --seed {verdict.seed} --shrink")
        elif done % 100 == 0:
            say(f"{done:>7,} seeds, {done / (time.monotonic() - began):.1f} a second")

    totals = run_many(
        options.first, options.seeds, processes=options.processes, seconds=options.seconds, on_verdict=told
    )
    for line in totals.lines():
        say(line)
    took = time.monotonic() - began
    say(f"{totals.seeds / took:.1f} seeds a second, {took:.0f} s")
    bad = False
    if totals.failed:
        say(f"FAILED: seeds {sorted(verdict.seed for verdict in totals.failed)[:30]}")
        bad = True
    if totals.seeds >= ENOUGH and totals.zeros():
        say(f"NEVER HAPPENED: {', '.join(totals.zeros())}")
        bad = True
    return 1 if bad else 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
