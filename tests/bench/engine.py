"""How fast the engine is on memory and on SQLite (FULL), each beside the raw rate of the same commits on the same file.

    python3 dev.py bench engine [--workflows 3000] [--runs 3] [--store memory|sqlite|both]

Throughput: five-step workflows, 500 at a time, in one process. Lone step: one run of sequential steps, nothing else going on;
its peer is one INSERT and COMMIT of the same row through sqlite3 on the same kind of file. Rounds of engine and raw
alternate, medians are reported, and the last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import itertools
import json
import pstats
import sqlite3
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from durable import Context, Durable
from durable.core.journal import Entry
from durable.store.interface import Store
from durable.store.memory import MemoryStore
from durable.store.records import Commit, NewRun
from durable.store.sqlite import SqliteStore

STEPS = 5
AT_ONCE = 500
LONE = 300
BATCH = 250


async def add_one(number: int) -> int:
    return number + 1


async def five_steps(ctx: Context, number: int) -> int:
    for _ in range(STEPS):
        number = await ctx.step("add", add_one, number)
    return number


async def timed_steps(ctx: Context, count: int) -> int:
    for number in range(count):
        await ctx.step("add", add_one, number)
    return count


def make_app(store: Store) -> Durable:
    app = Durable(store)
    app.workflow("five_steps")(five_steps)
    app.workflow("timed_steps")(timed_steps)
    return app


async def throughput(app: Durable, workflows: int) -> tuple[float, float]:
    """(steps per second, CPU µs per step) of `workflows` five-step runs, start to result."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with gate:
            handle = await app.start(five_steps, number)
            assert await handle.result() == number + STEPS

    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(workflows)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return workflows * STEPS / wall, cpu / (workflows * STEPS) * 1e6


async def lone_steps(app: Durable) -> list[float]:
    """Seconds between the ends of sequential steps of one run, from its journal."""
    handle = await app.start(timed_steps, LONE)
    await handle.result()
    ends = [entry.at async for entry in handle.watch() if entry.kind == "step" and entry.status == "completed"]
    assert len(ends) == LONE
    return [(after - before) / 1e6 for before, after in itertools.pairwise(ends)]


async def raw_commits(store: Store, commits: int) -> float:
    """Journal rows per second through `Store.commit` alone: batches of one fenced row for each of BATCH runs."""
    runs = [NewRun(f"raw-{time.monotonic_ns()}-{n}", "raw", "1", b"0", owner="bench") for n in range(BATCH)]
    await store.start(runs)
    now = 1
    rounds = max(1, commits // BATCH)
    wall = time.perf_counter()
    for seq in range(rounds):
        entry = Entry(
            seq + 1, now, "step", "completed", "add", seq, "add", 1, "0123456789abcdef", b"12345", None, now, now
        )
        answers = await store.commit([Commit(run.id, 1, seq, f"c{seq}", [entry]) for run in runs])
        assert all(answer.status == "done" for answer in answers)
    return rounds * BATCH / (time.perf_counter() - wall)


def raw_inserts(path: Path) -> list[float]:
    """Seconds of single INSERT + COMMIT of a journal row through sqlite3, WAL, FULL."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS raw (run TEXT, seq INT, at INT, kind TEXT, status TEXT, key TEXT, payload BLOB,"
        " PRIMARY KEY (run, seq)) WITHOUT ROWID"
    )
    run, took = str(time.monotonic_ns()), []
    for seq in range(LONE):
        begun = time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "INSERT INTO raw VALUES (?,?,?,?,?,?,?)", (run, seq, 1, "step", "completed", "add", b"12345")
        )
        connection.execute("COMMIT")
        took.append(time.perf_counter() - begun)
    connection.close()
    return took


async def by_part(app: Durable, workflows: int) -> dict[str, float]:
    """Shares of the CPU by part of the product, from a profiled round."""
    profile = cProfile.Profile()
    profile.enable()
    await throughput(app, workflows)
    profile.disable()
    parts: defaultdict[str, float] = defaultdict(float)
    for (file, _, _), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        place = file.replace("\\", "/")
        if "/durable/" in place:
            part = place.rpartition("/durable/")[2].removesuffix(".py")
            parts["store" if part.startswith("store/") else part] += own
        elif place == "~":
            parts["builtins"] += own
        else:
            parts["asyncio" if "asyncio" in place else "other"] += own
    total = sum(parts.values())
    return {part: own / total for part, own in sorted(parts.items(), key=lambda item: -item[1])}


async def measure(name: str, workflows: int, rounds: int, folder: Path) -> dict[str, Any]:
    steps, cpus, raws, lone, raw_lone, shares = [], [], [], [], [], {}
    for number in range(rounds):
        path = folder / f"{number}.db"
        store: Store = MemoryStore() if name == "memory" else SqliteStore(f"sqlite:///{path}")
        app = make_app(store)
        async with app:
            await throughput(app, AT_ONCE)  # warm
            rate, cpu = await throughput(app, workflows)
            steps.append(rate)
            cpus.append(cpu)
            lone += await lone_steps(app)
            if name == "sqlite":
                raw_lone += raw_inserts(folder / f"raw-{number}.db")
            raws.append(await raw_commits(store, workflows))
            if number == 0:
                shares = await by_part(app, max(AT_ONCE, workflows // 4))
    cuts = statistics.quantiles(lone, n=100)
    result = {
        "steps_per_s": statistics.median(steps),
        "workflows_per_s": statistics.median(steps) / STEPS,
        "cpu_us_per_step": statistics.median(cpus),
        "raw_commits_per_s": statistics.median(raws),
        "lone_step_ms": {"p50": cuts[49] * 1e3, "p95": cuts[94] * 1e3, "p99": cuts[98] * 1e3},
    }
    print(
        f"{name:>7}  {result['workflows_per_s']:>8,.0f} five-step workflows/s  {result['steps_per_s']:>8,.0f} steps/s"
        f"  ({result['cpu_us_per_step']:.0f} µs of CPU a step; raw commits {result['raw_commits_per_s']:,.0f}/s)"
    )
    print(
        f"{'':>7}  lone step p50 {cuts[49] * 1e3:.3f} ms, p95 {cuts[94] * 1e3:.3f} ms, p99 {cuts[98] * 1e3:.3f} ms",
        end="",
    )
    if raw_lone:
        raw = statistics.median(raw_lone)
        result["lone_step_vs_commit"] = cuts[49] / raw
        print(f"; raw INSERT + COMMIT p50 {raw * 1e3:.3f} ms: {cuts[49] / raw:.2f} times")
    else:
        print()
    print(
        f"{'':>7}  CPU a step by part: "
        + ", ".join(f"{part} {share * result['cpu_us_per_step']:.1f} µs" for part, share in list(shares.items())[:12])
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workflows", type=int, default=3000, help="five-step workflows a round (default 3000)")
    parser.add_argument("--runs", type=int, default=3, help="rounds, of which the median counts (default 3)")
    parser.add_argument("--store", choices=["memory", "sqlite", "both"], default="both")
    options = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("memory", "sqlite"):
            if options.store in (name, "both"):
                place = Path(folder) / name
                place.mkdir()
                result = asyncio.run(measure(name, options.workflows, options.runs, place))
                report |= {f"{name}_{key}": value for key, value in result.items()}
    print(json.dumps(report, default=lambda value: round(value, 3)))


if __name__ == "__main__":
    main()
