"""Several processes on one file: hints, deaths, races."""
# ruff: noqa: ASYNC240

from __future__ import annotations

import asyncio
import signal
import sqlite3
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from durable.core.clock import SECOND
from durable.store.sqlite import SqliteStore
from durable.testing.facts import eventually
from durable.testing.suites.store.builder import begin, claim, claimed_ids, commit, done, new, read
from tests.conftest import ROOT
from tests.store.processes import Peer, heard, running, tell


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def peer(path: Path) -> AsyncIterator[Peer]:
    """Starts a peer; every peer is gone at the end."""
    async with AsyncExitStack() as stack:

        async def start(verb: str, *rest: str) -> Process:
            return await stack.enter_async_context(running(verb, str(path), *rest))

        yield start


async def test_kill_in_mid_commit_loses_nothing(store: SqliteStore, path: Path, peer: Peer) -> None:
    """Killed among its commits, a process leaves every answered row, dense journals, and a file without a scratch."""
    hammer = await peer("hammer")
    acked = 0
    while acked < 40:
        acked = int(await heard(hammer))
    hammer.kill()
    await hammer.wait()
    ids = [f"r{n}" for n in range(50)]
    runs = [run for run in await store.get(ids) if run]
    assert len({run.seq for run in runs}) == 1, "a batch is there whole or not at all"
    assert runs[0].seq >= acked
    for journal in await store.load(ids):
        assert [row.seq for row in journal.entries] == list(range(1, runs[0].seq + 1))
    cx = sqlite3.connect(path)
    assert cx.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    cx.close()


async def test_D7_a_killed_engine_is_gone_long_before_its_lease(store: SqliteStore, path: Path, peer: Peer) -> None:
    """The lock it held is free: its run is taken over now, not in an hour, and its file is cleaned away."""
    holder = await peer("hold")
    assert await heard(holder) == "holding"
    store.beat("me", 3600 * SECOND)
    for _ in range(6):
        assert await claimed_ids(store, "me") == []
        await asyncio.sleep(0.05)
    holder.kill()
    await holder.wait()
    taken = []
    killed = time.monotonic()
    while not taken:
        assert time.monotonic() - killed < 20
        taken = await claim(store, "me")
        await asyncio.sleep(0.02)
    assert (taken[0].run.id, taken[0].run.epoch, taken[0].crashed) == ("r", 2, True)
    assert [file.name for file in Path(f"{path}.engines").glob("[!.]*")] == ["me"]


async def test_D7_a_paused_engine_is_not_gone(store: SqliteStore, peer: Peer) -> None:
    """A stopped process keeps its lock; only its lease can end."""
    holder = await peer("hold")
    assert await heard(holder) == "holding"
    holder.send_signal(signal.SIGSTOP)
    store.beat("me", 3600 * SECOND)
    for _ in range(6):
        assert await claimed_ids(store, "me") == []
        await asyncio.sleep(0.05)
    holder.send_signal(signal.SIGCONT)


async def test_D7_without_the_file_the_lease_decides(store: SqliteStore, path: Path, peer: Peer) -> None:
    """A lock file that somebody removed tells nothing: no takeover before the lease ends."""
    holder = await peer("hold")
    assert await heard(holder) == "holding"
    Path(f"{path}.engines", "holder").unlink()
    holder.kill()
    await holder.wait()
    store.beat("me", 3600 * SECOND)
    for _ in range(6):
        assert await claimed_ids(store, "me") == []
        await asyncio.sleep(0.05)


async def test_D7_engines_that_share_a_store_are_both_there(store: SqliteStore, path: Path) -> None:
    """Locks are per engine, also within one process; leaving takes the file along."""
    store.beat("one", 3600 * SECOND)
    store.beat("two", 3600 * SECOND)
    await begin(store, new(owner="one"))
    for _ in range(6):
        assert await claimed_ids(store, "two") == []
        await asyncio.sleep(0.05)
    await store.leave("one")
    assert [file.name for file in Path(f"{path}.engines").glob("[!.]*")] == ["two"]
    assert await claimed_ids(store, "two") == ["r"]


async def test_S43_a_message_from_another_process_is_hinted_soon(store: SqliteStore, peer: Peer) -> None:
    """Another process's commit is heard of in tens of milliseconds; the store's own commits are no news."""
    await begin(store, new(owner="a"))
    arrivals: list[float] = []
    stop = store.listen(lambda: arrivals.append(time.monotonic()))
    sender = await peer("send")
    assert await heard(sender) == "ready"
    await asyncio.sleep(0.1)
    arrivals.clear()
    run = await read(store)
    for _ in range(5):
        run = await done(store, commit(run))
    await asyncio.sleep(0.1)
    assert arrivals == [], "its own"
    delays = []
    for _ in range(20):
        arrivals.clear()
        tell(sender)
        sent = float(await heard(sender))
        await eventually(lambda: arrivals, "the hint came")
        delays.append(arrivals[0] - sent)
    stop()
    assert statistics.median(delays) < 0.2, delays


async def test_S1_three_processes_share_the_work(store: SqliteStore, peer: Peer) -> None:
    """Every run is claimed by exactly one of them, and its one commit counts."""
    await begin(store, *(new(f"r{n}") for n in range(300)))
    takers = [await peer("take", f"p{n}") for n in range(3)]
    for taker in takers:
        assert await heard(taker) == "ready"
    for taker in takers:
        tell(taker)

    async def taken_by(taker: Process) -> list[str]:
        ids: list[str] = []
        while (line := await heard(taker)) != "end":
            ids += line.split()
        return ids

    lists = await asyncio.gather(*map(taken_by, takers))
    assert sorted(run_id for ids in lists for run_id in ids) == sorted(f"r{n}" for n in range(300))
    assert all(run.seq == 1 for run in await store.get([f"r{n}" for n in range(300)]) if run)


async def test_S3_heartbeats_get_through_under_load(store: SqliteStore, peer: Peer) -> None:
    """While another process and this one write without pause, a beat comes through within its bound."""
    hammer = await peer("hammer")
    await heard(hammer)
    await begin(store, *(new(f"mine{n}", owner="a") for n in range(50)))
    stopping = asyncio.Event()

    async def load() -> None:
        seq = 0
        while not stopping.is_set():
            await store.commit([commit(f"mine{n}", seq=seq, entries=1) for n in range(50)])
            seq += 1

    loading = asyncio.ensure_future(load())
    took = []
    for _ in range(20):
        began = time.monotonic()
        assert (await asyncio.to_thread(store.beat, "a", 10 * SECOND)).alive
        took.append(time.monotonic() - began)
    stopping.set()
    await loading
    assert max(took) < 2.0, took


async def test_an_idle_listener_costs_next_to_nothing(path: Path) -> None:
    """Watching the file for others' writes takes a few thousandths of a core; a loop gone wild would take all of one."""
    program = (
        "import asyncio, sys, time\n"
        "from durable.store.sqlite import SqliteStore\n"
        "async def main():\n"
        "    store = SqliteStore(sys.argv[1])\n"
        "    await store.open()\n"
        "    stop = store.listen(lambda: None)\n"
        "    before = time.process_time()\n"
        "    await asyncio.sleep(1.0)\n"
        "    print(time.process_time() - before)\n"
        "    stop()\n"
        "    await store.close()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(path), stdout=PIPE, cwd=ROOT)
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert float(output) < 0.25
