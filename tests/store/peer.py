"""Another process on the same data: `python -m tests.store.peer <verb> <path or URL> …`. Says what it does, line by line."""

from __future__ import annotations

import asyncio
import sys
import time

from durable.core.clock import SECOND
from durable.store.interface import Store
from durable.store.postgres import PostgresStore
from durable.store.records import Commit, Message, NewRun
from durable.store.sqlite import SqliteStore
from durable.testing.suites.store.builder import claimed_ids, commit, entry, new


def say(*words: object) -> None:
    print(*words, flush=True)


async def hammer(store: Store) -> None:
    """Commit batches for ever, and tell of each that was answered."""
    ids = [f"r{n}" for n in range(50)]
    await store.start([NewRun(run_id, "checkout", "1", b"{}", owner="hammer") for run_id in ids])
    seq = 0
    while True:
        await store.commit([commit(run_id, seq=seq, entries=2) for run_id in ids])
        seq += 2
        say(seq)


async def hold(store: Store) -> None:
    """Own a run on a long lease, and stay."""
    store.beat("holder", 3600 * SECOND)
    await store.start([new(owner="holder")])
    say("holding")
    await asyncio.Event().wait()


async def send(store: Store) -> None:
    """Send a message at each line that comes in, and tell when it was committed."""
    say("ready")
    for n in range(1000):
        if not await asyncio.to_thread(sys.stdin.readline):
            return
        await store.send([Message("r", f"m{n}", "signal")])
        say(time.monotonic())


async def take(store: Store, name: str) -> None:
    """Claim until nothing is left, ten at a time, and commit to each once."""
    store.beat(name, 3600 * SECOND)
    say("ready")
    await asyncio.to_thread(sys.stdin.readline)
    while ids := await claimed_ids(store, name, 10):
        outcomes = await store.commit([Commit(run_id, 1, 0, name, [entry(1)]) for run_id in ids])
        say(*(run_id for run_id, outcome in zip(ids, outcomes, strict=True) if outcome.status == "done"))
    say("end")


async def toil(store: Store) -> None:
    """Start, claim, commit and send without a pause, and count."""
    store.beat("toiler", 3600 * SECOND)
    await store.start([NewRun(f"r{n}", "checkout", "1", b"{}", owner="toiler") for n in range(10)])
    say("toiling")
    for n in range(1_000_000):
        await store.commit([commit(f"r{m}", seq=n) for m in range(10)])
        await store.send([Message(f"r{m}", f"t{n}", "signal") for m in range(10)])
        await store.start([NewRun(f"s{n}", "checkout", "1", b"{}")])
        await claimed_ids(store, "toiler", 1)
        say(n)


async def main(verb: str, path: str, *rest: str) -> None:
    store: Store = PostgresStore(path) if "://" in path else SqliteStore(path)
    await store.open()
    await {"hammer": hammer, "hold": hold, "send": send, "take": take, "toil": toil}[verb](store, *rest)  # type: ignore[operator]
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
