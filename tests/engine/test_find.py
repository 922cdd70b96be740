"""Finding, getting, watching and waiting for runs, from any engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable import Context, RunFailed, workflow
from durable.core.errors import RunNotFound
from durable.core.journal import Entry
from durable.protocol.states import Activity, Status
from durable.store.records import (
    DEFAULT_WORKSPACE,
    Commit,
    CommitStatus,
    Lane,
    Message,
    NewRun,
    Parent,
    PutMessage,
    Rule,
    RunRecord,
    SetAttributes,
)
from tests.engine.world import World


@workflow(name="one")
async def one(ctx: Context, n: int) -> int:
    return n


@workflow(name="waits", tags=["slow"])
async def waits(ctx: Context) -> Any:
    return await ctx.wait_for_signal("go")


async def test_find_filters_pages_and_goes_newest_first(world: World) -> None:
    """By workflow, status, activity, tag, key; pages join up without gap or repeat while new runs come in."""
    app = await world.engine(one, waits)
    done = [await app.start(one, n, key=f"k{n}", tags=["odd"] if n % 2 else []) for n in range(7)]
    for handle in done:
        await handle.result(5)
    waiting = await app.start(waits)
    await world.waits(waiting.id)
    assert [run.id for run in (await app.find(workflow="one")).runs] == [handle.id for handle in reversed(done)]
    assert [run.id for run in (await app.find(status=Status.ACTIVE)).runs] == [waiting.id]
    assert [run.id for run in (await app.find(activity=Activity.WAITING)).runs] == [waiting.id]
    assert len((await app.find(tag="odd")).runs) == 3
    assert [run.id for run in (await app.find(tag="slow")).runs] == [waiting.id]
    assert [run.id for run in (await app.find(idempotency_key="k3")).runs] == [done[3].id]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = await app.find(workflow="one", limit=3, cursor=cursor)
        seen += [run.id for run in page.runs]
        await app.start(one, 99)
        cursor = page.cursor
        if cursor is None:
            break
    assert seen == [handle.id for handle in reversed(done)]


async def test_get_of_an_unknown_run_says_so(world: World) -> None:
    """RunNotFound from get, result, watch and cancel alike."""
    app = await world.engine(one)
    with pytest.raises(RunNotFound):
        await app.get("nobody")
    with pytest.raises(RunNotFound):
        await app.run("nobody").result(1)
    with pytest.raises(RunNotFound):
        await app.run("nobody").cancel()
    with pytest.raises(RunNotFound):
        async for _ in app.watch("nobody"):
            pass


async def test_D5_waiting_works_across_engines_and_times_out_without_harm(world: World) -> None:
    """A run that executes elsewhere is waited for by anybody; a waiter that gives up leaves the run alone."""
    owner = await world.engine(waits)
    handle = await owner.start(waits)
    api = await world.engine(waits, worker=False)
    with pytest.raises(TimeoutError):
        await api.run(handle.id).result(0.02)
    many = [asyncio.ensure_future(api.run(handle.id).result(5)) for _ in range(20)]
    await asyncio.sleep(0.02)
    await owner.run(handle.id).signal("go", "all of you")
    assert await asyncio.gather(*many) == ["all of you"] * 20
    assert await api.run(handle.id).result(5) == "all of you"


async def test_D5_a_failed_run_raises_its_error_for_everybody(world: World) -> None:
    """RunFailed carries the run's id and the error as data."""

    @workflow(name="fails")
    async def fails(ctx: Context) -> None:
        raise LookupError("no such customer")

    app = await world.engine(fails)
    handle = await app.start(fails)
    api = await world.engine(fails, worker=False)
    for handle_ in (handle, api.run(handle.id)):
        with pytest.raises(RunFailed, match="no such customer") as caught:
            await handle_.result(5)
        assert caught.value.run_id == handle.id
        assert caught.value.error is not None
        assert caught.value.error.type == "LookupError"


async def test_R5_watch_replays_tails_and_ends_with_the_run(world: World) -> None:
    """Every row once, in order, from any point, from any engine; it ends when the run does."""
    owner = await world.engine(waits)
    api = await world.engine(waits, worker=False)
    handle = await owner.start(waits)

    async def collect(app: Any, after: int = 0) -> list[int]:
        return [entry.seq async for entry in app.watch(handle.id, after)]

    watchers = [asyncio.ensure_future(collect(app, after)) for app in (owner, api) for after in (0, 1)]
    await world.waits(handle.id)
    await handle.signal("noise")
    await handle.signal("go")
    seen = await asyncio.gather(*watchers)
    last = (await world.record(handle.id)).seq
    assert seen == [list(range(1, last + 1)), list(range(2, last + 1))] * 2
    assert await collect(owner) == list(range(1, last + 1))
    assert await collect(owner, last) == []


async def test_R5_a_watcher_outlives_the_runs_engine(world: World) -> None:
    """The owner dies and another goes on: the watcher sees one sequence without gap or repeat."""
    owner = await world.engine(waits)
    api = await world.engine(waits, worker=False, poll_every=0.05)
    handle = await owner.start(waits)
    seen: list[int] = []

    async def tail() -> None:
        async for entry in api.watch(handle.id):
            seen.append(entry.seq)

    watcher = asyncio.ensure_future(tail())
    await world.waits(handle.id)
    await world.crash(owner)
    other = await world.engine(waits)
    await other.run(handle.id).signal("go")
    await other.run(handle.id).result(5)
    await asyncio.wait_for(watcher, 5)
    assert seen == list(range(1, len(seen) + 1))


async def test_B52_no_field_of_a_record_is_silently_dropped(world: World) -> None:
    """Every field of a run, an entry and a message that is set comes back, on every store."""
    store = await world.store()
    store.beat("me", 60_000_000)
    filled = {"input_hash": "h", "idempotency_key": "k", "priority": 7, "tags": ("a", "b"), "wake_at": None}
    first = Entry(1, 5, "run", "started", "key", 3, "name", 2, "print", b"1", 10, 11, 12)
    new = NewRun(
        "full",
        "w",
        "v",
        b'{"in":1}',
        DEFAULT_WORKSPACE,
        attributes={"s": "x", "i": 1, "f": 1.5, "b": True},
        parent=Parent("p", "pk", 4),
        owner="me",
        entries=(first,),
        meta=b'{"app":"shop"}',
        **filled,  # type: ignore[arg-type]
    )
    assert set(NewRun.__struct_fields__) == {
        "id",
        "workflow",
        "version",
        "input",
        "workspace",
        "input_hash",
        "idempotency_key",
        "priority",
        "tags",
        "attributes",
        "parent",
        "owner",
        "entries",
        "wake_at",
        "lane",
        "meta",
    }, "a new field: add it here, so that no store forgets it"
    await store.start([new])
    await store.start([NewRun("other", "w", "v", b"null", lane=Lane("customer 7", (Rule("slots", 1),)))])
    second = Entry(2, 6, "step", "completed", "k2", 1, "n2", 1, "f2", b'"x"', 1, 2, 3)
    message = Message("other", "m", "result", "completed", b"2", "mk", 9, 3, DEFAULT_WORKSPACE)
    commit = Commit(
        "full",
        1,
        1,
        "c1",
        [second],
        (PutMessage(message), SetAttributes({"i": None, "new": 2}, ("z",))),
        activity=Activity.RETRYING,
        suspend=True,
        wake_at=77,
    )
    assert [outcome.status for outcome in await store.commit([commit])] == [CommitStatus.DONE]
    record = (await store.get(["full"]))[0]
    assert isinstance(record, RunRecord)
    expected = {
        "id": "full",
        "workspace": DEFAULT_WORKSPACE,
        "workflow": "w",
        "version": "v",
        "status": Status.ACTIVE,
        "activity": Activity.RETRYING,
        "input": b'{"in":1}',
        "output": None,
        "error": None,
        "priority": 7,
        "tags": ("z",),
        "attributes": {"s": "x", "f": 1.5, "b": True, "new": 2},
        "parent": Parent("p", "pk", 4),
        "idempotency_key": "k",
        "input_hash": "h",
        "wake_at": 77,
        "inbox_last": 0,
        "inbox_read": 0,
        "owner": None,
        "epoch": 1,
        "seq": 2,
        "commit_id": "c1",
        "recovery_attempts": 0,
        "finished_at": None,
        "lane": None,
        "meta": b'{"app":"shop"}',
    }
    stamps = {"created_at", "started_at", "updated_at"}
    assert set(RunRecord.__struct_fields__) == set(expected) | stamps
    assert {name: getattr(record, name) for name in expected} == expected
    assert all(getattr(record, name) for name in stamps)
    [other] = await store.get(["other"])
    assert other is not None
    assert other.lane == "customer 7"
    assert await store.page("full", 0, 10) == [first, second]
    rows = (await store.inbox([("other", 0)]))[0]
    assert [row.message for row in rows] == [message]


async def test_D10_workflows_are_listed_by_tag_and_category_and_start_with_their_tags_input(world: World) -> None:
    """A listing by tag or category, in order of name; a start without input takes the default of the workflow's tag."""

    @workflow("report.daily", tags=["report"], category="finance")
    async def daily(ctx: Context, day: str) -> str:
        return day

    @workflow("report.late", tags=["urgent", "report"])
    async def late(ctx: Context, day: str) -> str:
        return day

    @workflow("plain", category="finance")
    async def plain(ctx: Context) -> int:
        return 1

    app = await world.engine(daily, late, plain)
    assert [definition.name for definition in app.workflows(tag="report")] == ["report.daily", "report.late"]
    assert [definition.name for definition in app.workflows(category="finance")] == ["plain", "report.daily"]
    app.default_input("report", "today")
    app.default_input("urgent", "at once")
    assert await app.start_and_wait("report.daily", timeout=5) == "today"
    assert await app.start_and_wait("report.late", timeout=5) == "at once"
    assert await app.start_and_wait("report.daily", "monday", timeout=5) == "monday"
    assert await app.start_and_wait("plain", timeout=5) == 1
