"""Lanes, events and items on one PostgreSQL: many connections at once, what it costs, and tables of version 1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import psycopg
import pytest

from durable.core.clock import SECOND
from durable.core.errors import PayloadText
from durable.protocol.states import Status
from durable.store.admission import Batch, Debounce, EventQuery, NewEvent, Rate, Singleton, Trigger
from durable.store.items import NewItem
from durable.store.postgres import PostgresStore, connection, migrate
from durable.store.records import (
    ClaimRequest,
    FreeSlots,
    Lane,
    OpenWaiter,
    PruneRequest,
    Route,
    Rule,
    RunQuery,
    RunRecord,
)
from durable.testing.facts import PATIENCE, PAUSE
from durable.testing.suites.store.builder import FAR, ROUTE, begin, claim, claimed_ids, commit, done, new, read

NOBODY = Route("nobody", "1")


@pytest.fixture
async def stores(postgres_url: str) -> AsyncIterator[list[PostgresStore]]:
    """Eight, each with an engine `e0` to `e7` of its own."""
    async with AsyncExitStack() as stack:
        opened = []
        for n in range(8):
            store = PostgresStore(postgres_url, pool_max=2)
            await store.open()
            stack.push_async_callback(store.close)
            store.beat(f"e{n}", FAR)
            opened.append(store)
        yield opened


@pytest.fixture
async def store(stores: list[PostgresStore]) -> PostgresStore:
    return stores[0]


async def sql(url: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as cx:
        cursor = await cx.execute(statement, parameters or None)
        return await cursor.fetchall() if cursor.description else []


def laned(run_id: str, *rules: Rule, key: str = "k", **fields: Any) -> Any:
    return new(run_id, lane=Lane(key, rules), **fields)


def event(event_id: str, *triggers: Trigger, **fields: Any) -> NewEvent:
    return NewEvent(**{"id": event_id, "name": "order", "data": b"{}", "triggers": triggers, **fields})


# ------------------------------------------------------------------ lanes


async def test_B32_eight_connections_claim_one_limited_lane(stores: list[PostgresStore], postgres_url: str) -> None:
    """B32, S25: eight engines claim, work and end runs of a lane of three as fast as they can; whoever looks, whenever, sees
    three at most, and each run is done once."""
    await begin(stores[0], *(laned(f"r{n:03}", Rule("key", 3)) for n in range(120)))
    ended: list[str] = []
    most = 0

    async def work(store: PostgresStore, incarnation: str) -> None:
        while len(ended) < 120:
            for one in (await store.claim(ClaimRequest(incarnation, (ROUTE,), 5))).runs:
                await done(store, commit(one.run))
                await done(store, commit(await read(store, one.run.id), status=Status.COMPLETED))
                ended.append(one.run.id)

    async def watch() -> None:
        nonlocal most
        async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as cx:
            while len(ended) < 120:
                cursor = await cx.execute("SELECT count(*) FROM durable.runs WHERE owner IS NOT NULL")
                [[running]] = await cursor.fetchall()
                most = max(most, running)

    async with asyncio.timeout(60):
        await asyncio.gather(watch(), *(work(store, f"e{n}") for n, store in enumerate(stores)))
    assert sorted(ended) == [f"r{n:03}" for n in range(120)]
    assert 1 <= most <= 3
    assert await sql(postgres_url, "SELECT count(*) FROM durable.slots") == [(0,)]


async def test_S25_workflows_that_share_keys_claim_at_once(stores: list[PostgresStore], postgres_url: str) -> None:
    """S25: lanes of two workflows stand under the same two keys, named in opposite orders; claimed by eight at once, no more
    than the limits are ever taken, nobody fails, and what a throttle counts is right."""
    rules = (Rule("a", 4), Rule("b", 6), Rule("pace", 9, "throttle", FAR))
    await begin(stores[0], *(laned(f"x{n}", *rules) for n in range(20)))
    await begin(stores[0], *(laned(f"y{n}", *reversed(rules), workflow="other") for n in range(20)))
    routes = (ROUTE, Route("other", "1"))

    async def all_claim(*of: tuple[Route, ...]) -> list[RunRecord]:
        claims = [s.claim(ClaimRequest(f"e{n}", of[n % len(of)], 10)) for n, s in enumerate(stores)]
        return [one.run for answer in await asyncio.gather(*claims) for one in answer.runs]

    for taken in (4, 4, 1, 0):
        found = await all_claim(*[(route,) for route in routes])
        found += await all_claim(routes)  # who was second at a key has passed its lane over
        assert len(found) == taken
        for run in found:
            await done(stores[0], commit(run, status=Status.COMPLETED))
    [(moments,)] = await sql(postgres_url, "SELECT array_agg(number ORDER BY number) FROM durable.moments")
    assert moments == list(range(1, 10))


async def test_claims_of_other_workflows_do_not_wait(stores: list[PostgresStore], postgres_url: str) -> None:
    """While somebody is in the midst of a claim of one workflow's lanes, claims of another's, and of runs without a lane, are
    answered; one of the same workflow waits, and gets what is left."""
    await begin(stores[0], *(laned(f"x{n}", Rule("a", 2)) for n in range(3)))
    await begin(stores[0], laned("y", Rule("b", 1), workflow="other"), new("z", workflow="plain"))
    async with await psycopg.AsyncConnection.connect(postgres_url) as slow:
        await slow.execute("SELECT * FROM durable.claim_runs('e0', '{default}', '{checkout}', '{1}', 1, false, '', 1)")
        for number, workflow in ((1, "other"), (2, "plain")):
            async with asyncio.timeout(10):
                answer = await stores[number].claim(ClaimRequest(f"e{number}", (Route(workflow, "1"),), 5))
            assert len(answer.runs) == 1
        waiting = asyncio.create_task(stores[3].claim(ClaimRequest("e3", (ROUTE,), 5)))
        locks = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
        await until(postgres_url, locks, 1)
        await slow.commit()
        assert [one.run.id for one in (await waiting).runs] == ["x1"]


async def until(url: str, statement: str, value: int) -> None:
    """Wait for this answer."""
    async with asyncio.timeout(PATIENCE):
        while await sql(url, statement) != [(value,)]:
            await asyncio.sleep(PAUSE)


async def test_freed_slots_are_news_to_others(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run that held a slot is told to engines elsewhere, and so is FreeSlots: one of them may have room for the
    next. The end of a run without a lane is not."""
    told: list[str] = []
    await begin(store, *(laned(f"r{n}", Rule("key", 2)) for n in range(2)), new("plain"))
    runs = {one.run.id: one.run for one in await claim(store, "e0")}
    monkeypatch.setattr(store._hints, "abroad", lambda: told.append("abroad"))
    await done(store, commit(runs["plain"], status=Status.COMPLETED))
    assert told == []
    await done(store, commit(runs["r0"], status=Status.COMPLETED))
    assert told == ["abroad"]
    freed = await done(store, commit(runs["r1"], effects=(FreeSlots(),)))
    assert told == ["abroad", "abroad"]
    await done(store, commit(freed, status=Status.COMPLETED))
    assert told == ["abroad", "abroad"]


# ------------------------------------------------------------------ cost


@pytest.mark.parametrize("idle", [True, False])
async def test_claims_without_lanes_cost_what_they_did(
    store: PostgresStore, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim is one statement, and one more to read what it took, however many runs with lanes there are beside."""
    await begin(store, *(laned(f"l{n}", Rule("key", 1), workflow="other") for n in range(50)))
    if not idle:
        await begin(store, *(new(f"r{n}") for n in range(5)))
    asked: list[str] = []
    ask = connection.ask

    async def counting(cx: Any, query: str, parameters: Sequence[Any] = ()) -> Any:
        asked.append(query)
        return await ask(cx, query, parameters)

    monkeypatch.setattr(connection, "ask", counting)
    assert len(await claimed_ids(store, "e0")) == (0 if idle else 5)
    assert len([query for query in asked if "pg_notify" not in query]) == (1 if idle else 2)


LOOKS = """
SELECT sum(coalesce(seq_tup_read, 0)), sum(coalesce(idx_tup_fetch, 0)),
       (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE schemaname = 'durable')
FROM pg_stat_user_tables WHERE schemaname = 'durable'"""

BACKLOG = """
INSERT INTO durable.lanes (workspace, workflow, key, rules, weight, touched_at)
SELECT 'default', 'checkout', 'k' || n, ('[{"key": "k' || n || '", "limit": 2, "kind": "slots", "period_us": 0}]')::jsonb, 1, 0
FROM generate_series(0, 9) n;
INSERT INTO durable.runs (id, workspace, workflow, version, input, input_hash, priority, epoch, seq, activity, wake_at,
                          created_at, updated_at, lane, started_at, tags, attributes)
SELECT 'r' || n, 'default', 'checkout', '1', '{}', '', n % 3, 0, 0, 'queued',
       CASE WHEN n % 2 = 0 THEN 0 ELSE 9000000000000000 END, n * 1000000::bigint, 0, 'k' || n % 10,
       CASE WHEN n % 4 = 1 THEN 1 END, CASE WHEN n = 777 THEN '{rare}'::text[] END,
       CASE WHEN n = 778 THEN '{"customer": 7}'::jsonb END
FROM generate_series(1, 40000) n;
INSERT INTO durable.events (number, received_at, settled, id, workspace, name, admissions, data)
SELECT n, n * 1000000::bigint, true, 'e' || n, 'default', 'order', '[]', '' FROM generate_series(1, 40000) n;
"""


@pytest.fixture
async def single(postgres_url: str) -> AsyncIterator[PostgresStore]:
    """In which the engine `a` lives, with one connection, so that its statistics are those of all calls."""
    store = PostgresStore(postgres_url, pool_max=1)
    await store.open()
    store.beat("a", FAR)
    yield store
    await store.close()


async def test_D8_no_call_of_the_service_grows_with_what_is_stored(single: PostgresStore, postgres_url: str) -> None:
    """With 40,000 runs in ten lanes, half of them asleep, and as many events, each call reads a few rows by an index."""
    store = single
    await sql(postgres_url, BACKLOG)
    await sql(postgres_url, "VACUUM ANALYZE")  # who plans `find` and `events` looks at statistics
    second = 1_000_000

    async def looks() -> list[int]:
        async with store._db.lend() as cx:
            await cx.execute("SELECT pg_stat_force_next_flush()")
            await cx.execute("SELECT pg_stat_clear_snapshot()")
            return [int(x) for x in (await (await cx.execute(LOOKS)).fetchall())[0]]

    calls: dict[str, tuple[int, Any]] = {
        "claim": (4000, lambda: claim(store, "a", 10)),
        "claim of full lanes": (4000, lambda: claim(store, "a", 100)),
        "claim of others": (50, lambda: store.claim(ClaimRequest("a", (NOBODY,), 10))),
        "publish": (300, lambda: store.publish([event("x", Trigger(new("x", workflow="nobody")))])),
        "find by time": (900, lambda: store.find(RunQuery("default", since=30_000 * second, until=30_020 * second))),
        "find by tag": (100, lambda: store.find(RunQuery("default", tag="rare"))),
        "find by attribute": (100, lambda: store.find(RunQuery("default", attributes={"customer": 7}))),
        "events since": (900, lambda: store.events(EventQuery(name="order", since=39_000 * second, limit=5))),
        "events after": (300, lambda: store.events(EventQuery(after=20_000, limit=5))),
        "unsettled": (100, lambda: store.events(EventQuery(None, unsettled=True))),
        "prune": (300, lambda: store.prune(PruneRequest(5, older_than_us=10**16))),
    }
    wrong = []
    for name, (most, call) in calls.items():
        counted = []
        for _ in range(2):
            before = await looks()
            await call()
            counted.append([after - b for after, b in zip(await looks(), before, strict=True)])
        scanned, fetched, index = min(counted)
        if fetched > most or index > most or scanned > 200:  # tables of a page or two may be scanned
            wrong.append(f"{name}: {scanned} rows by scanning, {fetched} fetched and {index} read by an index")
    assert not wrong, "\n".join(wrong)


async def test_find_by_time_is_exact(store: PostgresStore, postgres_url: str) -> None:
    """Bounds found by halving leave out no run, at whatever time and order they were created."""
    await begin(store, *(new(f"r{n:03}") for n in range(100)))
    # As if a statement had taken half a minute: neighbours are out of order.
    await sql(
        postgres_url, "UPDATE durable.runs SET created_at = (substr(id, 2)::int * 20 + (number * 7 % 29)) * 1000000"
    )
    made = {run.id: run.created_at for run in (await store.find(RunQuery(limit=200))).runs}
    for since in range(0, 2100 * SECOND, 97 * SECOND):
        found = {run.id for run in (await store.find(RunQuery("default", since=since, limit=200))).runs}
        assert found == {run_id for run_id, at in made.items() if at >= since}
        found = {run.id for run in (await store.find(RunQuery("default", until=since, limit=200))).runs}
        assert found == {run_id for run_id, at in made.items() if at < since}


# ------------------------------------------------------------------ events


async def test_publishers_that_cross_do_not_deadlock(stores: list[PostgresStore], postgres_url: str) -> None:
    """Eight publish batches over the same policies, dedupe ids and runs, in opposite orders, again and again: all are
    answered, each event once, without one deadlock."""

    def batch(who: int, turn: int) -> list[NewEvent]:
        order = range(12) if who % 2 else reversed(range(12))
        return [
            event(
                f"e{who}.{turn}.{n}",
                Trigger(new(f"a{who}.{turn}.{n}"), rate=Rate(f"k{n}", 5, FAR), singleton=Singleton(f"s{n}", "cancel")),
                Trigger(new(f"b{who}.{turn}.{n}"), debounce=Debounce(f"d{n}", FAR)),
                Trigger(new(f"c{who}.{turn}.{n}", input=b'{"e":[1]}'), batch=Batch(f"b{n}", 9, FAR, b"1")),
                dedupe_id=f"{turn}.{n}",
            )
            for n in order
        ]

    async def publish(who: int) -> int:
        fresh = 0
        for turn in range(6):
            fresh += sum(not outcome.duplicate for outcome in await stores[who].publish(batch(who, turn)))
        return fresh

    assert sum(await asyncio.gather(*(publish(who) for who in range(8)))) == 6 * 12
    members = await sql(postgres_url, "SELECT sum(length(input) - 7) FROM durable.runs WHERE id LIKE 'c%'")
    assert members == [(6 * 12 * 2,)]
    await sql(postgres_url, "SELECT pg_stat_force_next_flush()")
    assert await sql(postgres_url, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [
        (0,)
    ]


PUBLISH = (
    "SELECT number FROM durable.publish('{e}', '{default}', '{order}', '{NULL}', ARRAY['{}'::bytea], '{NULL}', '{[]}', '[null]',"
    " NULL, NULL, 1000)"
)


async def test_B12_a_wait_that_opens_in_the_midst_of_a_publication(store: PostgresStore, postgres_url: str) -> None:
    """B12: who publishes has looked for waiters, and has not committed; a wait for that event opens only after, and looking back
    from there the event is seen. The other way round the publisher finds the wait. A wait for another event does not wait."""
    await begin(store, new("r", owner="e0"), new("other", owner="e0"))
    async with await psycopg.AsyncConnection.connect(postgres_url) as publisher:
        await publisher.execute(PUBLISH)
        async with asyncio.timeout(10):
            await done(store, commit("other", effects=(OpenWaiter("w", "something else"),)))
        opening = asyncio.create_task(store.commit([commit("r", effects=(OpenWaiter("w", "order"),))]))
        await until(postgres_url, "SELECT count(*) FROM pg_locks WHERE NOT granted", 1)
        assert not opening.done()
        await publisher.commit()
        await opening
    assert [one.id for one in await store.events(EventQuery())] == ["e"]
    [outcome] = await store.publish([event("e2")])
    assert [waiter.run_id for waiter in outcome.waiters] == ["r"]


@pytest.mark.parametrize("where", ["name", "dedupe_id", "id", "run"])
async def test_B33_text_that_cannot_be_kept_is_a_typed_error(store: PostgresStore, where: str) -> None:
    """A NUL in a name is told as that, nothing of its call is stored, and the next call works."""
    bad = (
        event("bad", Trigger(new("a\0", workflow="x")))
        if where == "run"
        else event(event_id="bad", **{where: "\0"})
        if where != "id"
        else event("\0")
    )
    with pytest.raises(PayloadText):
        await store.publish([event("good"), bad])
    assert await store.events(EventQuery()) == []
    [outcome] = await store.publish([event("good")])
    assert not outcome.duplicate
    with pytest.raises(PayloadText):
        await store.put_items([NewItem("w", "node", "\0", b"")])


async def test_B33_a_probe_with_a_nul_still_finds_its_wait(store: PostgresStore) -> None:
    """What an event holds may be any text: payload and probes with NUL and lone surrogates are taken, and found again."""
    probe = "name=\0\ud800"
    await begin(store, new("r", owner="e0"))
    await done(store, commit("r", effects=(OpenWaiter("w", "order", b"\0", probe=probe),)))
    [hit, miss] = await store.publish([event("e1", data=b"\0", probes=(probe,)), event("e2", probes=("name=x",))])
    assert [(waiter.id, waiter.match) for waiter in hit.waiters] == [("w", b"\0")]
    assert miss.waiters == ()


# ------------------------------------------------------------------ version 1


async def test_S37_tables_of_version_1_with_data(postgres_url: str) -> None:
    """A database of version 1, with runs in every state, waits and slots, is brought up to date as it is; and what engines of
    version 1 call there afterwards does what it did."""
    async with await PostgresStore(postgres_url).connect() as cx:
        await migrate.migrate(cx, "durable", "here", migrate.known()[:1])
    await sql(postgres_url, OF_VERSION_1)
    store = PostgresStore(postgres_url)
    await store.open()
    try:
        store.beat("a", FAR)
        assert [run.id for run in (await store.find(RunQuery(oldest_first=True))).runs] == [
            "due",
            "late",
            "held",
            "over",
        ]
        assert await claimed_ids(store) == ["due"]
        [outcome] = await store.publish([event("e")])
        assert [(waiter.run_id, waiter.id) for waiter in outcome.waiters] == [("held", "w")]
        await begin(store, laned("r", Rule("key", 1)))

        # An engine of version 1, by the words it uses.
        await sql(postgres_url, "SELECT durable.start_runs(%s::jsonb)", STARTED.replace("NAME", "old"))
        [(ids,)] = await sql(
            postgres_url,
            "SELECT ids FROM durable.claim_runs('a', '{default}', '{checkout}', '{1}', 9, false, '', 300000)",
        )
        assert sorted(ids) == ["old", "r"]
        await sql(postgres_url, "SELECT durable.apply_effects(%s::jsonb, '{old}')", EFFECTS)
        [outcome] = await store.publish([event("e2")])
        assert sorted(waiter.run_id for waiter in outcome.waiters) == ["held", "old"]
        assert await sql(postgres_url, "SELECT durable.release_runs('{r}', '{1}')") == [(1,)]
        assert await claimed_ids(store) == ["r"]
    finally:
        await store.close()


STARTED = (
    '[{"id": "NAME", "workspace": "default", "workflow": "checkout", "version": "1", "input": "e30=", "input_hash": "",'
    ' "idempotency_key": null, "priority": 0, "tags": null, "attributes": null, "parent": null, "owner": null, "seq": 0,'
    ' "wake_at": null, "entries": []}]'
)
EFFECTS = (
    '{"starts": [], "fires": [], "messages": [], "closed": [], "attributes": [], "freed": [{"of": "old", "keys": null}],'
    ' "opened": [{"of": "old", "id": "w", "event": "order", "match": null, "expires_at": null}]}'
)
OF_VERSION_1 = f"""
SELECT durable.start_runs('{STARTED.replace("NAME", "due")}');
SELECT durable.start_runs('{STARTED.replace("NAME", "late").replace('"wake_at": null', '"wake_at": 9000000000000000')}');
SELECT durable.start_runs('{STARTED.replace("NAME", "held").replace('"owner": null', '"owner": "a"')}');
SELECT durable.start_runs('{STARTED.replace("NAME", "over").replace('"owner": null', '"owner": "a"')}');
UPDATE durable.runs SET status = 'completed', owner = NULL, finished_at = 1 WHERE id = 'over';
INSERT INTO durable.event_waiters (run_id, id, event) VALUES ('held', 'w', 'order');
INSERT INTO durable.slots (key, number, run_id, epoch) VALUES ('old', 1, 'held', 1);
"""


UNDER_WAY = "SELECT durable.publish(%s, '{default}', '{order}', %s, %s, ARRAY[NULL::bytea], '{\"[]\"}', '[null]', NULL, NULL, 99)"


async def test_B42_a_number_that_is_committed_late_is_waited_for(
    stores: list[PostgresStore], postgres_url: str
) -> None:
    """B42: whoever pages by number is shown nothing above an event that has its number and is not committed yet; it comes in its
    place once it is, and is never waited for once its publisher has given up. Who looks for one event sees all there are."""

    async def whole(after: int | None = None) -> list[str]:
        return [one.id for one in await stores[1].events(EventQuery(after=after, whole=True))]

    await stores[0].publish([event("e1")])
    async with (
        await psycopg.AsyncConnection.connect(postgres_url) as slow,
        await psycopg.AsyncConnection.connect(postgres_url) as dies,
    ):
        await slow.execute(UNDER_WAY, (["slow"], [None], [b"1"]))
        await stores[0].publish([event("e3")])
        await dies.execute(UNDER_WAY, (["dies"], [None], [b"1"]))
        await stores[0].publish([event("e5")])
        assert await whole() == ["e1"]
        assert await whole(1) == []
        assert [one.id for one in await stores[1].events(EventQuery(after=1))] == ["e3", "e5"]
        await slow.commit()
        assert await whole(1) == ["slow", "e3"]
        await dies.rollback()
        assert await whole(3) == ["e5"]


async def test_a_call_that_lets_no_run_go_lets_go_what_has_expired(store: PostgresStore, postgres_url: str) -> None:
    """Without a rule for runs nonces and the like would stay for ever."""
    await begin(store, new(owner="a"))
    await done(store, commit("r", status=Status.COMPLETED))
    await store.put_items([NewItem("default", "nonce", "n", b"", expires_in=0)])
    assert await store.prune(PruneRequest(5)) == 0
    async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as cx:
        rows = await (await cx.execute("SELECT count(*) FROM durable.items")).fetchone()
    assert rows == (0,)
    assert await store.get(["r"]) != [None]
