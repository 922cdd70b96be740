"""What may happen to a call on its way: cancelled, never answered, cut off, refused, in one another's way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

import psycopg
import pytest
from msgspec import structs
from psycopg.conninfo import make_conninfo

from durable.core.errors import DurableError, StoreUnavailable
from durable.store.interface import Store
from durable.store.postgres import PostgresStore, connection
from durable.store.records import (
    ClaimRequest,
    CommitStatus,
    Message,
    NewRun,
    PruneRequest,
    PutMessage,
    RunQuery,
    SendStatus,
    StartStatus,
)
from durable.testing.facts import PATIENCE, PAUSE, eventually
from durable.testing.suites.store.builder import FAR, ROUTE, begin, commit, done, entry, new, read
from tests.store.backends import OTHERS, Proxy
from tests.store.interrupted import interrupt_everywhere

POOL_MAX = 3


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[PostgresStore]:
    """In which the engine `a` lives."""
    store = PostgresStore(postgres_url, pool_max=POOL_MAX)
    await store.open()
    store.beat("a", FAR)
    yield store
    await store.close()


@pytest.fixture
async def watcher(postgres_url: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection beside the store's."""
    async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as watcher:
        yield watcher


async def ask(watcher: psycopg.AsyncConnection[Any], query: str, *parameters: Any) -> list[Any]:
    return await (await watcher.execute(query, parameters)).fetchall()  # type: ignore[arg-type]


async def until(watcher: psycopg.AsyncConnection[Any], query: str, wanted: object, claim: str) -> None:
    """Until the query's only value is the wanted one."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while (found := (await ask(watcher, query))[0][0]) != wanted:
        assert loop.time() < deadline, f"{claim}: {found}"
        await asyncio.sleep(PAUSE)


BUSY = f"SELECT count(*) FROM pg_stat_activity WHERE {OTHERS} AND state <> 'idle'"
LOCK_WAITS = f"SELECT count(*) FROM pg_stat_activity WHERE {OTHERS} AND wait_event_type = 'Lock'"

# ------------------------------------------------------------------ cancelled


CALLS: dict[str, Callable[[PostgresStore, str, str], Coroutine[Any, Any, Any]]] = {
    "start": lambda s, mine, free: s.start([new(f"{mine}-new"), new(free)]),
    "get": lambda s, mine, free: s.get([free, mine]),
    "find": lambda s, mine, free: s.find(RunQuery(limit=1)),
    "commit": lambda s, mine, free: s.commit([commit(mine, effects=(PutMessage(Message(free, "c", "signal")),))]),
    "commit_with": lambda s, mine, free: s.commit_with(lambda cx: cx.execute("SELECT 1"), commit(mine)),
    "requeue": lambda s, mine, free: s.requeue(mine, commit_id="again", entry=entry(0), activity="queued"),
    "claim": lambda s, mine, free: s.claim(ClaimRequest("a", (ROUTE,), 1)),
    "release": lambda s, mine, free: s.release([(mine, 1)]),
    "owned": lambda s, mine, free: s.owned("a"),
    "leave": lambda s, mine, free: s.leave("b"),
    "send": lambda s, mine, free: s.send([Message(free, "m", "signal")]),
    "unread": lambda s, mine, free: s.unread("a"),
    "inbox": lambda s, mine, free: s.inbox([(free, 0)]),
    "load": lambda s, mine, free: s.load([mine, free]),
    "page": lambda s, mine, free: s.page(mine, 0, 10),
    "children": lambda s, mine, free: s.children(free),
    "prune": lambda s, mine, free: s.prune(PruneRequest(10, older_than_us=FAR)),
}


async def test_S41_B35_cancelled_at_every_wait(store: PostgresStore, watcher: psycopg.AsyncConnection[Any]) -> None:
    """Wherever a call is cancelled: no transaction stays open, no connection is lost, the next calls get their own answers."""
    waits = {}
    for name, call in CALLS.items():
        mine, free = f"{name}-mine", f"{name}-free"
        await begin(store, new(mine, owner="a"), new(free))

        async def check(mine: str = mine, free: str = free) -> None:
            await until(watcher, BUSY, 0, "a transaction or a statement outlives its call")
            assert [run and run.id for run in await store.get([mine, free])] == [mine, free]
            # As many at once as the pool has connections: each gets its own answer, none is missing.
            given = list(range(len(waits), len(waits) + POOL_MAX))
            answers = await asyncio.gather(*(store._db.one("SELECT %s, pg_sleep(0.001)", [number]) for number in given))
            assert [answer[0] for answer in answers] == given

        waits[name] = await interrupt_everywhere(partial(call, store, mine, free), check)
    assert all(waits.values()), waits
    [[count]] = await ask(watcher, f"SELECT count(*) FROM pg_stat_activity WHERE {OTHERS}")
    assert count <= POOL_MAX + 1, "more connections than the pool and the heart have"


async def test_S41_cancelled_while_the_server_works(
    store: PostgresStore, watcher: psycopg.AsyncConnection[Any], postgres_url: str
) -> None:
    """A commit that waits for a row is cancelled: the server stops at once, nothing was written, the row is free."""
    await begin(store, new(owner="a"))
    async with await psycopg.AsyncConnection.connect(postgres_url) as holder:
        await holder.execute("SELECT 1 FROM durable.runs WHERE id = 'r' FOR UPDATE")
        task = asyncio.create_task(store.commit([commit("r")]))
        await until(watcher, LOCK_WAITS, 1, "the commit waits for the row")
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await until(watcher, LOCK_WAITS, 0, "the server goes on with a cancelled commit")
        await holder.rollback()
    assert (await read(store)).seq == 0
    await done(store, commit("r"))
    assert [row.seq for row in await store.page("r", 0, 9)] == [1]


# ------------------------------------------------------------------ never answered


async def test_S41_a_call_that_is_never_answered(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a black hole a call ends when its time is over, as unavailable; its connection is never used again."""
    monkeypatch.setattr(connection, "CALL_TIMEOUT_S", 0.3)
    async with Proxy(postgres_url) as proxy:
        store = PostgresStore(proxy.url, notifications=False)
        await store.open()
        await begin(store, new())
        proxy.freeze()
        async with asyncio.timeout(5):
            with pytest.raises(StoreUnavailable, match="may be repeated"):
                await store.get(["r"])
        monkeypatch.undo()
        async with asyncio.timeout(5):
            found = await asyncio.gather(*(store.get(["r"]) for _ in range(20)))
        assert all(runs[0] is not None and runs[0].id == "r" for runs in found)
        await store.close()


async def test_S41_unanswered_calls_leave_other_sockets_alone(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight calls into a black hole end one by one while new connections are made: none of those is harmed."""
    monkeypatch.setattr(connection, "CALL_TIMEOUT_S", 0.3)
    async with Proxy(postgres_url) as proxy:
        store = PostgresStore(proxy.url, notifications=False)
        await store.open()
        await begin(store, new())
        await asyncio.gather(*(store._db.one("SELECT pg_sleep(0.05)") for _ in range(8)))
        proxy.freeze()
        lost = [asyncio.create_task(store.get(["r"])) for _ in range(8)]
        async with PostgresStoreOpen(postgres_url) as other:
            while not all(task.done() for task in lost):
                assert (await other.get(["r"]))[0] is not None
                await asyncio.sleep(PAUSE)
        for task in lost:
            assert isinstance(task.exception(), StoreUnavailable)
        await store.close()


class PostgresStoreOpen(PostgresStore):
    """For `async with`."""

    async def __aenter__(self) -> PostgresStore:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


async def test_S41_when_all_connections_are_busy(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many callers share one connection; who has to wait for too long is told so; nobody waits for ever."""
    monkeypatch.setattr(connection, "LEND_TIMEOUT_S", 1.0)
    async with PostgresStoreOpen(postgres_url, pool_max=1) as store:
        await begin(store, new(owner="a"))
        assert len(await asyncio.gather(*(store.get(["r"]) for _ in range(200)))) == 200

        async def work(_: Any) -> None:
            await store.get(["r"])  # has no connection to wait for: the only one is lent to it

        async with asyncio.timeout(15):
            with pytest.raises(StoreUnavailable, match="all connections are busy"):
                await store.commit_with(work, commit("r"))
            assert (await read(store)).seq == 0
            await done(store, commit("r"))


# ------------------------------------------------------------------ cut off


async def test_S39_cut_off_before_the_commit(
    store: PostgresStore, watcher: psycopg.AsyncConnection[Any], postgres_url: str
) -> None:
    """The connection ends while the commit waits for a row: unavailable, nothing is there, and the same call does it once."""
    await begin(store, new(owner="a"))
    change = commit("r", entries=2)
    async with await psycopg.AsyncConnection.connect(postgres_url) as holder:
        await holder.execute("SELECT 1 FROM durable.runs WHERE id = 'r' FOR UPDATE")
        task = asyncio.create_task(store.commit([change]))
        await until(watcher, LOCK_WAITS, 1, "the commit waits for the row")
        await watcher.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OTHERS} AND wait_event_type = 'Lock'"
        )
        with pytest.raises(StoreUnavailable, match="may be repeated"):
            await task
        await holder.rollback()
    assert (await read(store)).seq == 0
    for _ in range(2):
        [outcome] = await store.commit([change])
        assert outcome.status is CommitStatus.DONE
    assert [row.seq for row in await store.page("r", 0, 9)] == [1, 2]


async def test_S39_cut_off_after_the_commit(postgres_url: str) -> None:
    """The commit happened and its answer is lost: unavailable, and the same calls say what they would have said."""
    async with Proxy(postgres_url) as proxy, PostgresStoreOpen(proxy.url, notifications=False) as store:
        await begin(store, new("r", owner="a"), new("free"))
        calls = {
            "commit": lambda: store.commit([commit("r")]),
            "start": lambda: store.start([new("again")]),
            "send": lambda: store.send([Message("free", "m", "signal")]),
        }
        async with PostgresStoreOpen(postgres_url) as other:
            for name, call in calls.items():
                before = await state(other)
                proxy.freeze_answers()
                task = asyncio.create_task(call())  # type: ignore[no-untyped-call]
                while await state(other) == before:
                    await asyncio.sleep(PAUSE)
                await proxy.cut()
                with pytest.raises(StoreUnavailable):
                    await task
                after = await state(other)
                [outcome] = await call()  # type: ignore[no-untyped-call]
                assert outcome.status in (CommitStatus.DONE, StartStatus.EXISTING, SendStatus.DUPLICATE), name
                assert await state(other) == after, f"{name} was done twice"


async def state(store: Store) -> Any:
    """Everything that is stored of the three runs."""
    ids = ["r", "free", "again"]
    return await store.get(ids), await store.inbox([(i, 0) for i in ids]), await store.load(ids)


# ------------------------------------------------------------------ in one another's way


async def test_D3_crossing_batches_all_succeed(postgres_url: str) -> None:
    """Two stores commit batches that send to each other's runs and send in opposite orders: none fails, all mail arrives."""
    rounds, runs = 150, 8
    async with PostgresStoreOpen(postgres_url) as first, PostgresStoreOpen(postgres_url) as second:
        await begin(first, *(new(f"{side}{n}", owner=side) for side in "ab" for n in range(runs)))

        async def committing(store: Store, side: str, to: str) -> None:
            for round_ in range(rounds):
                batch = [
                    commit(
                        f"{side}{n}",
                        seq=round_,
                        effects=(PutMessage(Message(f"{to}{runs - 1 - n}", f"c{round_}", "signal")),),
                    )
                    for n in range(runs)
                ]
                batch = batch if side == "a" else batch[::-1]
                assert {o.status for o in await store.commit(batch)} == {CommitStatus.DONE}

        async def sending(store: Store, order: int) -> None:
            ids = [f"{side}{n}" for side in "ab" for n in range(runs)][::order]
            for round_ in range(rounds):
                outcomes = await store.send([Message(run_id, f"s{round_}{order}", "signal") for run_id in ids])
                assert {o.status for o in outcomes} == {SendStatus.ACCEPTED}

        await asyncio.gather(
            committing(first, "a", "b"), committing(second, "b", "a"), sending(first, 1), sending(second, -1)
        )
        for run in await first.get([f"{side}{n}" for side in "ab" for n in range(runs)]):
            assert run is not None
            assert (run.seq, run.inbox_last) == (rounds, 3 * rounds)
        [deadlocks] = await first._db.one("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        assert deadlocks == 0, f"{deadlocks} deadlocks in {4 * rounds} calls"


async def test_B24_concurrent_starts_with_one_key(postgres_url: str) -> None:
    """Fifty starts with one key over two stores: one run, and every caller is told which."""
    async with PostgresStoreOpen(postgres_url) as first, PostgresStoreOpen(postgres_url) as second:
        calls = [
            (first, second)[n % 2].start([NewRun(f"r{n}", "checkout", "1", b"{}", idempotency_key="k")])
            for n in range(50)
        ]
        outcomes = [outcome for [outcome] in await asyncio.gather(*calls)]
        assert [o.status for o in outcomes].count(StartStatus.STARTED) == 1
        assert len({o.run_id for o in outcomes}) == 1
        assert len((await first.find(RunQuery(idempotency_key="k"))).runs) == 1


async def test_starts_in_opposite_order(postgres_url: str) -> None:
    """Two callers start the same runs in opposite orders: each run is there once, and neither fails."""
    async with PostgresStoreOpen(postgres_url) as first, PostgresStoreOpen(postgres_url) as second:
        for round_ in range(5):
            runs = [new(f"r{round_}-{n:03}", idempotency_key=f"{round_}-{n}") for n in range(100)]
            one, two = await asyncio.gather(first.start(runs), second.start(runs[::-1]))
            started = [o.run_id for o in (*one, *two) if o.status is StartStatus.STARTED]
            assert sorted(started) == sorted(run.id for run in runs)


async def test_B32_eight_stores_claim_each_run_once(postgres_url: str) -> None:
    """Eight engines on connections of their own claim 2,000 runs at once: each run goes to exactly one of them."""
    stores = [PostgresStore(postgres_url, pool_max=2) for _ in range(8)]
    try:
        for store in stores:
            await store.open()
        await begin(stores[0], *(new(f"r{n}") for n in range(2000)))
        taken: list[tuple[str, int]] = []

        async def claiming(store: PostgresStore, name: str) -> None:
            store.beat(name, FAR)
            while found := (await store.claim(ClaimRequest(name, (ROUTE,), 50))).runs:
                taken.extend((one.run.id, one.run.epoch) for one in found)

        await asyncio.gather(*(claiming(store, f"e{n}") for n, store in enumerate(stores)))
        assert sorted(taken) == sorted((f"r{n}", 1) for n in range(2000))
        owned = await asyncio.gather(*(stores[0].owned(f"e{n}") for n in range(8)))
        assert sorted(one for of in owned for one in of) == sorted(taken)
    finally:
        for store in stores:
            await store.close()


async def test_S5_a_fence_that_cannot_be_had(postgres_url: str) -> None:
    """Work is not begun when its run's row is locked for too long: unavailable, as a plain commit, and later it is done."""
    worked = []

    async def work(_: Any) -> None:
        worked.append("once")

    url = make_conninfo(postgres_url, options="-c lock_timeout=100ms")
    async with PostgresStoreOpen(url) as store:
        await begin(store, new(owner="a"))
        async with await psycopg.AsyncConnection.connect(postgres_url) as holder:
            await holder.execute("SELECT 1 FROM durable.runs WHERE id = 'r' FOR UPDATE")
            for call in (store.commit_with(work, commit("r")), store.commit([commit("r")])):
                with pytest.raises(StoreUnavailable, match="may be repeated"):
                    await call
            await holder.rollback()
        assert worked == []
        for _ in range(2):
            assert (await store.commit_with(work, commit("r"))).status is CommitStatus.DONE
        assert worked == ["once"]


async def test_S48_a_store_that_was_closed_amid_a_hint_says_hints_again(postgres_url: str) -> None:
    """Closed right after it had said something and opened again, a store tells others of new work, as before."""
    store, other = PostgresStore(postgres_url), PostgresStore(postgres_url)
    heard = asyncio.Event()
    await other.open()
    other.listen(heard.set)
    for round_ in range(2):
        await store.open()
        store.listen(lambda: None)
        await eventually(lambda: store._hints._channel is not None and store._hints._channel.others, "they have met")
        heard.clear()
        await begin(store, new(f"r{round_}"))
        await eventually(heard.is_set, "the other was told")
        await begin(store, new(f"s{round_}"))
        await store.close()
    await other.close()


@pytest.mark.parametrize(
    "broken", [{"key": "a\0b"}, {"key": "\ud800"}, {"attempt": 2**40}, {"ordinal": 2**31}], ids=str
)
async def test_S5_commit_with_says_what_is_wrong_with_a_commit_as_commit_does(
    store: PostgresStore, broken: dict[str, Any]
) -> None:
    """A commit that no store takes is answered, not raised in the driver's words; the work is not done, nothing is written."""
    await begin(store, new(owner="a"))
    bad = commit("r")
    bad.entries = [structs.replace(entry(1), **broken)]

    async def work(connection: Any) -> None:
        raise AssertionError("not to be done")

    [said] = await store.commit([bad])
    outcome = await store.commit_with(work, bad)
    assert outcome.status is CommitStatus.FENCED
    assert isinstance(outcome.failure, DurableError)
    assert type(outcome.failure) is type(said.failure)
    assert (await read(store)).seq == 0
