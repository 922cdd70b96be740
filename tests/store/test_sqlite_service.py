"""Events, items and lanes in a file: that a migrated file has them, and that no statement walks a table."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from durable.protocol.states import Status
from durable.store.admission import Batch, Debounce, EventQuery, NewEvent, Rate, Singleton, Trigger
from durable.store.items import Fire, ItemKey, ItemQuery, NewItem, Occurrence
from durable.store.records import (
    FreeSlots,
    Lane,
    OpenWaiter,
    PruneRequest,
    PutItem,
    Rule,
    RunQuery,
    SetAttributes,
)
from durable.store.sqlite import SqliteStore
from durable.testing.suites.store.builder import LEASE, begin, claim, claimed_ids, commit, done, new, suspend

VERSION_1 = Path(__file__).parent / "sqlite_version_1.sql"
LIMITED = Lane("limited", (Rule("slots", 1), Rule("pace", 5, "throttle", 1_000_000)))


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


# ------------------------------------------------------------------ migration


async def test_S37_runs_of_an_older_file_are_found_by_tag_and_attribute(path: Path) -> None:
    """Migrating writes down what the runs there are were tagged with, type and value; one with a broken row harms nobody."""
    cx = sqlite3.connect(path)
    cx.executescript(VERSION_1.read_text())
    cx.execute("""UPDATE runs SET tags = '["red"]', attributes = '{"n": 1, "ok": true, "name": "x", "f": 1.5}'""")
    cx.execute(
        "INSERT INTO runs SELECT 2, 'odd', epoch, seq, commit_id, updated_at, inbox_last, inbox_read, recovery_attempts,"
        " status, activity, owner, wake_at, workspace, workflow, version, priority, idempotency_key, input_hash,"
        " parent_run_id, parent_key, parent_ordinal, 'red', '{NaN', created_at, started_at, finished_at, input, output,"
        " error FROM runs"
    )
    cx.commit()
    cx.close()
    async with opened(path) as store:
        for query in (
            RunQuery("default", tag="red"),
            RunQuery("default", attributes={"n": 1}),
            RunQuery(attributes={"ok": True, "name": "x", "f": 1.5}, tag="red"),
        ):
            assert [run.id for run in await found(store, query)] == ["r"]
        for attributes in ({"n": 1.0}, {"n": True}, {"ok": 1}, {"name": "y"}):
            assert await found(store, RunQuery("default", attributes=attributes)) == []


async def found(store: SqliteStore, query: RunQuery) -> list[Any]:
    """Only ids and such: a broken row cannot be read."""
    return list((await store.find(query)).runs)


async def test_S37_a_program_of_version_2_that_has_the_file_open_goes_on(path: Path) -> None:
    """Its statements name no column of version 3: it starts runs, waits for events and takes what is due, and this program
    goes on with them."""
    async with opened(path) as store:
        older = sqlite3.connect(path, isolation_level=None)
        older.execute(
            "INSERT INTO runs (id, workspace, workflow, version, input_hash, priority, epoch, seq, activity, wake_at,"
            " created_at, updated_at, input) VALUES ('old', 'default', 'checkout', '1', '', 0, 0, 0, 'queued', 1, 1, 1, '{}')"
        )
        older.execute("INSERT INTO event_waiters (run_id, id, event) VALUES ('old', 'w', 'paid')")
        due = (
            "SELECT id FROM runs WHERE workspace = 'default' AND workflow = 'checkout' AND version = '1'"
            " AND owner IS NULL AND status = 'active' AND activity NOT IN ('paused', 'blocked') AND wake_at <= 2"
        )
        assert older.execute(due).fetchall() == [("old",)]
        older.close()
        [outcome] = await store.publish([NewEvent("e", "paid", b"{}", probes=("a=1",))])
        assert [(waiter.run_id, waiter.id) for waiter in outcome.waiters] == [("old", "w")]
        assert store.beat("a", LEASE).alive
        assert await claimed_ids(store) == ["old"]


# ------------------------------------------------------------------ plans

ROWS = ("runs", "events", "event_waiters", "slots", "items", "journal", "inbox", "run_marks", "schedule_fires", "ticks")


@contextmanager
def traced(store: SqliteStore, texts: list[str]) -> Iterator[None]:
    for runner in (store._writer, store._reader):
        runner._cx.set_trace_callback(texts.append)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for runner in (store._writer, store._reader):
            runner._cx.set_trace_callback(None)  # type: ignore[attr-defined]


def walks(path: Path, texts: list[str], *, sorts: bool = True) -> list[tuple[str, str]]:
    """The steps of these statements that go through a whole table."""
    cx = sqlite3.connect(path)
    cx.create_function("contains", 2, lambda text, part: part in text)
    bad = []
    for text in texts:
        if text.startswith(("--", "BEGIN", "COMMIT", "SAVEPOINT", "RELEASE", "PRAGMA", "INSERT INTO sqlite_")):
            continue
        names = aliases(text)
        for *_, step in cx.execute("EXPLAIN QUERY PLAN " + text):
            words = step.split()
            if step.startswith("SCAN") and names.get(words[1], words[1]) in ROWS and "INDEX" not in step:
                bad.append((step, text))
    cx.close()
    return bad


def aliases(text: str) -> dict[str, str]:
    words = text.replace("(", " ").replace(",", " ").split()
    return {alias: word for word, alias in zip(words, words[1:], strict=False) if word in ROWS}


async def fill(store: SqliteStore) -> None:
    assert store.beat("a", LEASE).alive
    await begin(store, *(new(f"l{n}", lane=LIMITED) for n in range(3)), *(new(f"r{n}", tags=("t",)) for n in range(3)))
    await done(store, commit((await claim(store, limit=1))[0].run, effects=(OpenWaiter("w", "paid", probe="a=1"),)))


async def publish(store: SqliteStore) -> None:
    triggers = (
        Trigger(new("p1"), rate=Rate("rate", 5, 1_000_000), singleton=Singleton("one", "cancel")),
        Trigger(new("p2"), debounce=Debounce("still", 1_000_000)),
        Trigger(new("p3", input=b'{"data":[1]}'), batch=Batch("many", 3, 1_000_000, b"1")),
    )
    await store.publish([NewEvent("e1", "paid", b"{}", dedupe_id="d", triggers=triggers, probes=("a=1",))])
    again = tuple(Trigger(new(f"q{n}", input=b'{"data":[2]}'), one.rate, one.singleton, one.debounce, one.batch)
        for n, one in enumerate(triggers))  # fmt: skip
    await store.publish([NewEvent("e2", "paid", b"{}", triggers=again), NewEvent("e3", "paid", b"{}", dedupe_id="d")])
    await store.settle_events(["e1"])
    await store.events(EventQuery(name="paid", after=0, since=1))
    await store.events(EventQuery(None, unsettled=True))


async def lanes(store: SqliteStore) -> None:
    for _ in range(2):
        taken = await claim(store, limit=5)
        for one in taken:
            if one.run.lane is not None:
                await done(store, suspend(one.run, 1, effects=(FreeSlots(),)))
    await store.release([(one.run.id, one.run.epoch) for one in taken])
    await claim(store, blocked=True)


async def items(store: SqliteStore) -> None:
    await store.put_items(
        [NewItem("default", "schedule", f"s{n}", b"{}", due_at=n, expires_in=10**9) for n in range(3)]
    )
    await store.get_items([ItemKey("default", "schedule", "s1")])
    await store.list_items(ItemQuery("schedule", due=True))
    await store.list_items(ItemQuery("schedule", "default", after=ItemKey("default", "schedule", "s0")))
    await store.list_items(ItemQuery("schedule", after=ItemKey("default", "schedule", "s0")))
    await store.fire([Fire(NewItem("default", "schedule", "s1", b"{}"), (Occurrence(1, new("fired")),))])
    await store.delete_items([ItemKey("default", "schedule", "s1")])
    [one] = await claim(store, limit=1)
    await done(store, commit(one.run, effects=(PutItem("approval", "a", b"{}"),)))


async def search(store: SqliteStore) -> None:
    await store.find(RunQuery("default", tag="t"))
    await store.find(RunQuery("default", attributes={"n": 1}, tag="t", oldest_first=True, cursor="r0"))
    await store.find(RunQuery(since=1, until=2))


async def retire(store: SqliteStore) -> None:
    for one in await claim(store):
        changes = SetAttributes({"n": 1}, ("u",))
        await done(store, commit(one.run, status=Status.COMPLETED, effects=(changes,)))
    await store.prune(PruneRequest(10, older_than_us=-1))


@pytest.mark.parametrize("work", [publish, lanes, items, search, retire])
async def test_no_statement_walks_a_table(path: Path, work: Callable[[SqliteStore], Awaitable[None]]) -> None:
    """Accepting events, claims with lanes, items, searches and pruning: every table that grows is entered by an index."""
    async with opened(path) as store:
        await fill(store)
        texts: list[str] = []
        with traced(store, texts):
            await work(store)
    assert len(texts) > 5
    assert walks(path, texts) == []


async def test_a_claim_without_lanes_asks_for_no_more_than_before(path: Path) -> None:
    """With no run in any lane a claim is as many statements as it has always been: who lives, what is due, take, read."""
    async with opened(path) as store:
        store.beat("a", LEASE)
        await begin(store, new())
        texts: list[str] = []
        with traced(store, texts):
            assert await claimed_ids(store) == ["r"]
    kinds = [text.split()[0] for text in texts if not text.startswith("--")]
    assert kinds == ["BEGIN", "WITH", "WITH", "UPDATE", "SELECT", "COMMIT"]
