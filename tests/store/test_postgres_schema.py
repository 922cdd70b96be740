"""Opening: what is there already, what is not ours, what is too new, who else is at it, and what the server is like."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from durable.core.errors import StoreError, StoreReadOnly, StoreTooNew, StoreUnavailable, WeakDurability
from durable.protocol.states import Status
from durable.store.postgres import PostgresStore, migrate
from durable.store.records import Commit, Message, PruneRequest
from durable.testing.facts import PATIENCE, PAUSE
from durable.testing.suites.store.builder import FAR, begin, claimed_ids, commit, done, entry, new, read
from tests.servers.postgres import PostgresServer
from tests.store.backends import MINE, OTHERS
from tests.store.processes import heard, running


def run_sql(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as cx:
        for statement in statements:
            cx.execute(statement)  # type: ignore[call-overload]


def meta(url: str, schema: str = "durable") -> dict[str, str]:
    with psycopg.connect(url) as cx:
        return dict(cx.execute(f"SELECT name, value FROM {schema}.meta").fetchall())  # type: ignore[call-overload]


def with_(url: str, **parts: Any) -> str:
    """The same address with some parts changed."""
    return make_conninfo("", **{**conninfo_to_dict(url), **parts})


@asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(url, **settings)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def refused(url: str, error: type[StoreError], **settings: Any) -> str:
    """Opening fails with this error; its message is one line and holds no password."""
    store = PostgresStore(url, **settings)
    with pytest.raises(error) as caught:
        await store.open()
    await store.close()
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message
    return message


# ------------------------------------------------------------------ migrations


async def test_S37_opened_twice(postgres_url: str) -> None:
    """The first opening makes the tables, the second finds them: the same store, nothing lost."""
    async with opened(postgres_url) as store:
        await begin(store, new())
    before = meta(postgres_url)
    async with opened(postgres_url) as store:
        await store.open()  # open already: nothing happens
        assert (await read(store)).id == "r"
    assert meta(postgres_url) == before
    assert before["schema_version"] == str(migrate.known()[-1][0])


async def test_S37_eight_processes_open_at_once(postgres_url: str) -> None:
    """One of them makes the tables, all eight work."""
    async with AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(running("take", postgres_url, f"e{n}")) for n in range(8)]
        assert [await heard(peer) for peer in peers] == ["ready"] * 8
    assert meta(postgres_url)["schema_version"] == str(migrate.known()[-1][0])


MIGRATING = f"SELECT count(*) FROM pg_stat_activity WHERE {OTHERS} AND wait_event_type = 'Lock'"


async def until_waiting(cx: psycopg.AsyncConnection[Any], count: int) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while (await (await cx.execute(MIGRATING)).fetchall())[0][0] != count:  # type: ignore[call-overload]
        assert loop.time() < deadline, f"never {count} waiting"
        await asyncio.sleep(PAUSE)


async def test_S37_B36_a_process_dies_in_the_migration(postgres_url: str) -> None:
    """Killed in the middle of making the tables, with the migration's lock in its hands, it keeps nobody else from it."""
    async with await psycopg.AsyncConnection.connect(postgres_url) as holder:
        # Whoever makes the schema now waits for this transaction to decide about its name.
        await holder.execute("CREATE SCHEMA durable")
        async with running("take", postgres_url, "e") as dying:
            async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as watcher:
                await until_waiting(watcher, 1)
                [[locks]] = await (
                    await watcher.execute(
                        f"SELECT count(*) FROM pg_locks WHERE {MINE} AND locktype = 'advisory' AND granted"
                    )
                ).fetchall()
                assert locks == 1, "it holds the migration's lock"
                store = PostgresStore(postgres_url)
                opening = asyncio.create_task(store.open())
                await until_waiting(watcher, 2)
                dying.send_signal(signal.SIGKILL)
                await dying.wait()
                await holder.rollback()
                async with asyncio.timeout(migrate.LOCK_TIMEOUT_S):
                    await opening
        await begin(store, new())
        await store.close()


async def test_S37_B36_another_holds_the_lock_for_too_long(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening waits for a bounded time and then says who is in its way; afterwards it works."""
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_S", 0.2)
    async with await psycopg.AsyncConnection.connect(postgres_url) as holder:
        await holder.execute("SELECT pg_advisory_xact_lock(hashtextextended('durable:durable', 1))")
        said = await refused(postgres_url, StoreUnavailable)
        assert "another process has been changing the tables" in said
    async with opened(postgres_url):
        pass


@pytest.mark.parametrize("needs", [99, 1])
async def test_S37_a_store_from_the_future(postgres_url: str, needs: int) -> None:
    """A store that asks for newer programs is refused with the remedy; one that only has additions works."""
    async with opened(postgres_url):
        pass
    run_sql(
        postgres_url,
        "UPDATE durable.meta SET value = '99' WHERE name = 'schema_version'",
        f"UPDATE durable.meta SET value = '{needs}' WHERE name = 'min_engine_version'",
    )
    if needs == 99:
        said = await refused(postgres_url, StoreTooNew)
        assert "upgrade durable" in said
        return
    async with opened(postgres_url) as store:
        await begin(store, new(owner="a"))
        await done(store, commit("r"))
    assert meta(postgres_url)["schema_version"] == "99", "an older program sets nothing back"


ADDITION = """
ALTER TABLE @schema@.runs ADD COLUMN mood text NOT NULL DEFAULT 'calm';
ALTER TABLE @schema@.journal ADD COLUMN weight integer;
CREATE TABLE @schema@.added (name text PRIMARY KEY);
CREATE INDEX runs_mood ON @schema@.runs (mood);
"""


async def test_S37_two_versions_side_by_side(postgres_url: str) -> None:
    """An additive migration runs while an older engine commits; both go on, and what is opened next by either works."""
    known = migrate.known()
    newest = known[-1][0]
    async with opened(postgres_url) as old:
        old.beat("a", FAR)
        await begin(old, *(new(f"r{n}", owner="a") for n in range(20)))
        migrated = asyncio.Event()
        rounds = 0

        async def committing() -> None:
            nonlocal rounds
            left = 10
            while left:
                left -= migrated.is_set()
                await old.commit([commit(f"r{n}", seq=rounds) for n in range(20)])
                rounds += 1

        work = asyncio.create_task(committing())
        for _ in range(2):
            async with await PostgresStore(postgres_url).connect() as cx:
                await migrate.migrate(cx, "durable", "here", [*known, (newest + 1, ADDITION)])
        migrated.set()
        await work
        assert meta(postgres_url)["schema_version"] == str(newest + 1)
        for run in await old.get([f"r{n}" for n in range(20)]):
            assert run is not None
            assert run.seq == rounds
        await old.send([Message("r1", "m", "signal")])
        await old.release([("r1", 1)])
        assert await claimed_ids(old) == ["r1"]
    async with opened(postgres_url) as older:
        assert (await read(older, "r1")).seq == rounds
        await begin(older, new("late"))
    assert meta(postgres_url)["schema_version"] == str(newest + 1)


# ------------------------------------------------------------------ schemas


async def test_two_schemas_do_not_see_each_other(postgres_url: str) -> None:
    """Stores in two schemas of one database share nothing: not runs, not engines, not presence."""
    async with opened(postgres_url) as one, opened(postgres_url, schema="other_app") as two:
        one.beat("a", FAR)
        two.beat("a", FAR)
        await begin(one, new(owner="a"))
        assert await two.get(["r"]) == [None]
        await begin(two, new("r"))
        assert await claimed_ids(two) == ["r"]
        await two.leave("a")
        two.beat("b", FAR)
        one.beat("b", FAR)
        assert await claimed_ids(two, "b") == ["r"]
        assert await claimed_ids(one, "b") == []
        assert (await read(one)).owner == "a"
    assert meta(postgres_url)["store_id"] != meta(postgres_url, "other_app")["store_id"]


async def test_a_column_that_is_gone(postgres_url: str) -> None:
    """Tables that were changed behind the store's back are named as that."""
    async with opened(postgres_url) as store:
        run_sql(postgres_url, "ALTER TABLE durable.runs RENAME COLUMN workflow TO flow")
        with pytest.raises(StoreError, match="changed or removed by others"):
            await store.get(["r"])


@pytest.mark.parametrize(
    "name", ["", "Durable", "my-app", "1st", "x" * 52, "pg_mine", 'a"; DROP TABLE runs; --', "naïve", "a\n"]
)
def test_a_schema_named_badly_is_refused(name: str) -> None:
    """A name that would need quoting is refused before anything is asked."""
    with pytest.raises(StoreError, match="small letters, digits and underscores"):
        PostgresStore("postgresql://localhost/x", schema=name)


@pytest.mark.parametrize(
    "table",
    [
        "meta (id integer PRIMARY KEY, note text)",
        "meta (name text, value text)",
        "meta AS SELECT 'schema_version' AS name, 'v3-beta' AS value",
    ],
)
async def test_a_table_meta_of_a_stranger(postgres_url: str, table: str) -> None:
    """A schema that belongs to something else is left alone, and the remedy is named."""
    run_sql(postgres_url, "CREATE SCHEMA durable", f"CREATE TABLE durable.{table}")
    said = await refused(postgres_url, StoreError)
    assert "not ours; give another schema=" in said
    async with opened(postgres_url, schema="ours"):
        pass


# ------------------------------------------------------------------ what the server is like


@pytest.mark.parametrize("way", ["url", "database"])
async def test_S42_weak_durability(postgres_url: str, way: str) -> None:
    """A server that answers before its log is on disk is refused with the remedy, or accepted knowingly and says so."""
    url = postgres_url
    if way == "url":
        url = with_(postgres_url, options="-c synchronous_commit=off")
    else:
        name = conninfo_to_dict(postgres_url)["dbname"]
        run_sql(postgres_url, f"ALTER DATABASE {name} SET synchronous_commit = off")
    said = await refused(url, WeakDurability)
    assert "synchronous_commit = off" in said
    assert "allow_weak_durability=True" in said
    async with opened(url, allow_weak_durability=True) as store:
        assert not store.capabilities.durable
        assert "may be lost" in store.capabilities.durability
        await begin(store, new())


@pytest.mark.parametrize("made_before", [False, True])
async def test_S42_a_database_that_takes_no_writes(postgres_url: str, made_before: bool) -> None:
    """Where every transaction is read-only, opening says so, with or without tables."""
    if made_before:
        async with opened(postgres_url):
            pass
    name = conninfo_to_dict(postgres_url)["dbname"]
    run_sql(postgres_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    assert "takes no writes" in await refused(postgres_url, StoreReadOnly)


async def test_one_sentence_for_an_address_that_is_wrong(postgres_url: str, postgres_server: PostgresServer) -> None:
    """Host, port, database: each error says in one line what to do, and never the password."""
    url = with_(postgres_url, password="secret-word")
    assert "createdb" in await refused(with_(url, dbname="nowhere"), StoreError)
    for parts in ({"host": "127.0.0.1", "port": "1"}, {"host": "/nowhere"}):
        assert "cannot be reached" in await refused(with_(url, **parts), StoreUnavailable)
    assert "refuses the login" in await refused(with_(url, user="stranger"), StoreError)
    for broken in ("postgresql://user:secret-word@host/x?nonsense=1", "postgres:/user:secret-word@host", "secret-word"):
        with pytest.raises(StoreError, match="is no PostgreSQL address") as caught:
            PostgresStore(broken)
        assert "secret" not in str(caught.value)


async def test_a_right_that_is_missing(postgres_url: str) -> None:
    """A user who may not make a schema is told so; in a schema that an administrator made for him he works."""
    user = "limited_" + re.sub(r"\W", "", conninfo_to_dict(postgres_url)["dbname"])[-12:]  # type: ignore[arg-type]
    run_sql(postgres_url, f"CREATE ROLE {user} LOGIN PASSWORD 'secret-word'")
    url = with_(postgres_url, user=user, password="secret-word")
    try:
        assert "a right is missing" in await refused(url, StoreError)
        run_sql(postgres_url, f"CREATE SCHEMA durable AUTHORIZATION {user}")
        async with opened(url) as store:
            await begin(store, new())
            run_sql(postgres_url, f"REVOKE INSERT ON durable.runs FROM {user}")
            with pytest.raises(StoreError, match="a right is missing"):
                await store.start([new("s")])
    finally:
        run_sql(postgres_url, f"DROP OWNED BY {user}", f"DROP ROLE {user}")


# ------------------------------------------------------------------ views


async def test_views_decode_payloads(postgres_url: str) -> None:
    """Operators read payloads as text; sealed ones show their size and break nothing."""
    sealed = b"\xff\x00\x01sealed"
    async with opened(postgres_url) as store:
        await begin(
            store, new("plain", owner="a", input=b'{"total": "4 \xe2\x82\xac"}'), new("sealed", owner="a", input=sealed)
        )
        await done(store, commit("plain", output=b'"ok"', status=Status.COMPLETED))
        await done(store, Commit("sealed", 1, 0, "c", [entry(1, sealed)]))
    with psycopg.connect(postgres_url) as cx:
        runs = cx.execute(
            "SELECT id, input, output, finished_at > created_at FROM durable.runs_text ORDER BY id"
        ).fetchall()
        rows = cx.execute("SELECT run_id, payload FROM durable.journal_text ORDER BY run_id").fetchall()
    mark = "(9 bytes, sealed or packed)"
    assert runs == [("plain", '{"total": "4 €"}', '"ok"', True), ("sealed", mark, None, None)]
    assert rows == [("plain", "1"), ("sealed", mark)]


@pytest.mark.parametrize("schema", ["order", "user", "between"])
async def test_a_word_of_sql_is_no_schema(postgres_url: str, schema: str) -> None:
    """A schema that would need quoting, or that the server keeps for itself, is refused with a sentence that says so."""
    assert "give another schema=" in await refused(postgres_url, StoreError, schema=schema)


async def test_another_isolation_level_of_the_database_changes_nothing(postgres_url: str) -> None:
    """In a database whose default is SERIALIZABLE, forty senders to one run at once all succeed: the functions count on a fresh
    look after waiting for a row."""
    run_sql(
        postgres_url,
        f"ALTER DATABASE {conninfo_to_dict(postgres_url)['dbname']} SET default_transaction_isolation = 'serializable'",
    )
    async with opened(postgres_url) as store:
        await begin(store, new())
        await asyncio.gather(*(store.send([Message("r", f"m{n}", "signal")]) for n in range(40)))
        assert (await read(store)).inbox_last == 40


# ------------------------------------------------------------------ the journal's months


def months(url: str) -> list[str]:
    with psycopg.connect(url) as cx:
        rows = cx.execute(
            r"SELECT tablename FROM pg_tables WHERE schemaname = 'durable' AND tablename ~ '^journal_\d' ORDER BY 1"
        ).fetchall()
    return [name for (name,) in rows]


async def test_S37_engines_that_start_together_in_a_new_month_all_open(postgres_url: str) -> None:
    """Partitions for the coming months are missing: six stores open at once, each succeeds, and the partitions are there."""
    async with opened(postgres_url):
        expected = months(postgres_url)
    assert len(expected) == 3
    for _ in range(3):
        run_sql(postgres_url, *(f"DROP TABLE durable.{name}" for name in expected))
        async with AsyncExitStack() as stack:
            await asyncio.gather(*(stack.enter_async_context(opened(postgres_url)) for _ in range(6)))
        assert months(postgres_url) == expected


async def test_S37_opening_waits_shortly_for_a_reader_of_the_journal(postgres_url: str) -> None:
    """A long reader, as of a dump, keeps new partitions from being made: the store opens all the same, and soon, so that other
    readers do not queue behind it; also where a pooler keeps our settings away."""
    async with opened(postgres_url):
        expected = months(postgres_url)
    run_sql(postgres_url, *(f"DROP TABLE durable.{name}" for name in expected))
    with psycopg.connect(postgres_url) as reader:
        reader.execute("SELECT count(*) FROM durable.journal")
        async with asyncio.timeout(5), opened(postgres_url, notifications=False):
            assert months(postgres_url) == []


async def test_B69_months_are_made_and_dropped_while_engines_run(postgres_url: str) -> None:
    """Whoever prunes makes the coming months' partitions too, and drops those of months that are over once no run is left in
    them, with side by side calls that all succeed."""
    async with opened(postgres_url) as store, opened(postgres_url) as other:
        expected = months(postgres_url)
        run_sql(
            postgres_url,
            *(f"DROP TABLE durable.{name}" for name in expected),
            "SELECT durable.make_partitions('2025-01-15', 1)",
        )
        old = "0194ab00-0000-7000-8000-000000000001"  # of January
        await begin(store, new(old))
        request = PruneRequest(10, older_than_us=1)
        assert await asyncio.gather(store.prune(request), other.prune(request)) == [0, 0]
        assert months(postgres_url) == ["journal_2025_01", *expected]
