"""The bare store: rows a second through `commit`, and a lone commit beside a raw INSERT + COMMIT.

    python3 -m tests.bench.store [--batch 200] [--rounds 100] [--busy]

`--busy` keeps the event loop occupied while batches are under way, as an engine full of work does.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

from durable.core.journal import Entry
from durable.store.interface import Store
from durable.store.memory import MemoryStore
from durable.store.records import Commit, NewRun
from durable.store.sqlite import SqliteStore

PAYLOAD = b'{"result": 123456, "ok": true}'


def row(seq: int) -> Entry:
    return Entry(
        seq, 1_700_000_000_000_000 + seq, "step", "completed", "charge:1", seq, "payments.charge", 1, "abcdef", PAYLOAD
    )


def batches(ids: list[str], rounds: int, first: int = 0) -> list[list[Commit]]:
    return [
        [Commit(run_id, 1, seq, f"c{seq}", [row(seq + 1)], progressed=True) for run_id in ids]
        for seq in range(first, first + rounds)
    ]


async def occupied(stop: asyncio.Event) -> None:
    """A millisecond of work at a time, for ever."""
    while not stop.is_set():
        until = time.perf_counter() + 0.001
        while time.perf_counter() < until:
            pass
        await asyncio.sleep(0)


async def rows_a_second(store: Store, batch: int, rounds: int, busy: bool) -> float:
    ids = [f"00000000-0000-7000-8000-{n:012d}" for n in range(batch)]
    await store.start([NewRun(run_id, "bench", "1", b"{}", owner="me") for run_id in ids])
    work = batches(ids, rounds)
    stop = asyncio.Event()
    burner = asyncio.ensure_future(occupied(stop)) if busy else None
    began = time.perf_counter()
    for one in work:
        outcomes = await store.commit(one)
        assert outcomes[-1].status == "done"
    took = time.perf_counter() - began
    stop.set()
    if burner is not None:
        await burner
    return batch * rounds / took


async def lone_ms(store: Store, rounds: int) -> float:
    await store.start([NewRun("lone", "bench", "1", b"{}", owner="me")])
    times = []
    for one in batches(["lone"], rounds):
        began = time.perf_counter()
        await store.commit(one)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def raw_ms(path: Path, rounds: int) -> float:
    cx = sqlite3.connect(path, isolation_level=None)
    cx.execute("PRAGMA journal_mode = WAL")
    cx.execute("PRAGMA synchronous = FULL")
    cx.execute(
        "CREATE TABLE t (run_id TEXT, seq INTEGER, at INTEGER, name TEXT, payload BLOB, PRIMARY KEY (run_id, seq))"
    )
    times = []
    for seq in range(rounds):
        began = time.perf_counter()
        cx.execute("BEGIN IMMEDIATE")
        cx.execute("INSERT INTO t VALUES (?, ?, ?, ?, ?)", ("lone", seq, seq, "payments.charge", PAYLOAD))
        cx.execute("COMMIT")
        times.append(time.perf_counter() - began)
    cx.close()
    return statistics.median(times) * 1000


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--busy", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for name, store in (
            ("memory", MemoryStore()),
            ("sqlite", SqliteStore(Path(folder) / "a.db")),
            ("sqlite inline", SqliteStore(Path(folder) / "b.db", inline=True)),
        ):
            await store.open()
            lone = await lone_ms(store, 300)
            rate = await rows_a_second(store, given.batch, given.rounds, given.busy)
            print(f"{name:14} {rate:10,.0f} rows/s in batches of {given.batch}   lone commit {lone:.3f} ms")
            await store.close()
        print(f"raw INSERT + COMMIT {raw_ms(Path(folder) / 'raw.db', 300):.3f} ms")


if __name__ == "__main__":
    asyncio.run(main())
