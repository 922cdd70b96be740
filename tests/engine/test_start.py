"""Starting runs: durable when `start` returns, each on its own, and refused at the edge with a typed error."""

from __future__ import annotations

import asyncio

import pytest

from durable import Context, Durable, StartRequest, workflow
from durable.core.errors import (
    DuplicateDefinition,
    EngineStopped,
    IdempotencyConflict,
    NotRegistered,
    PayloadError,
    PayloadText,
    PayloadTooLarge,
    UnknownVersion,
    UnknownWorkflow,
)
from durable.protocol.states import Activity, Status
from tests.engine.world import Gate, World, all_results


@workflow(name="double")
async def double(ctx: Context, number: int) -> int:
    return number * 2


@workflow(name="echo")
async def echo(ctx: Context, value: object) -> object:
    return value


async def test_a_run_is_durable_when_start_returns(world: World) -> None:
    """The row and its first journal entry are in the store before the caller has a handle."""
    app = await world.engine(double)
    handle = await app.start(double, 21)
    assert (await world.record(handle.id)).workflow == "double"
    assert await handle.result(5) == 42
    assert await world.statuses(handle.id) == ["run started", "run completed"]
    await world.sound(handle.id)


async def test_a_class_is_a_workflow(world: World) -> None:
    """A class with `run` is a workflow as a function is."""

    @workflow(name="shout", version="3")
    class Shout:
        async def run(self, ctx: Context, word: str) -> str:
            return word.upper()

    app = await world.engine(Shout)
    assert await app.start_and_wait(Shout, "now", timeout=5) == "NOW"


async def test_a_workflow_by_name_starts_its_latest_version(world: World) -> None:
    """A name alone means the latest version registered; a version means exactly that one."""

    @workflow(name="greet", version="1.9")
    async def old(ctx: Context) -> str:
        return "old"

    @workflow(name="greet", version="1.10")
    async def new(ctx: Context) -> str:
        return "new"

    app = await world.engine(old, new)
    assert await app.start_and_wait("greet", timeout=5) == "new"
    assert await app.start_and_wait("greet", version="1.9", timeout=5) == "old"
    assert await app.start_and_wait(old, timeout=5) == "old"


async def test_unknown_workflow_and_version_are_refused_by_name(world: World) -> None:
    """What is not registered is refused before anything is stored, with what there is instead."""
    app = await world.engine(double)
    with pytest.raises(UnknownWorkflow, match="Did you mean double"):
        await app.start("doubel", 1)
    with pytest.raises(UnknownVersion, match="no version 7"):
        await app.start(double, 1, version="7")
    assert issubclass(UnknownVersion, NotRegistered)
    assert (await app.find()).runs == []


async def test_a_duplicate_registration_names_both_places(world: World) -> None:
    """Two functions under one name and version are an error when registering, not a surprise when running."""

    @workflow(name="double")
    async def another(ctx: Context, number: int) -> int:
        return number

    app = Durable("memory://")
    app.register(double, double)  # the same again is no duplicate
    with pytest.raises(DuplicateDefinition, match=r"test_start\.py:\d+ and at .*test_start\.py:\d+"):
        app.register(another)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (object(), PayloadError),
        ({"at": float("nan")}, PayloadError),
        ("a\0b", PayloadText),
        ("half \ud83d", PayloadText),
        ("x" * (2 << 20), PayloadTooLarge),
    ],
    ids=["object", "nan", "nul", "surrogate", "oversize"],
)
async def test_S36_an_input_that_cannot_be_kept_is_refused_at_the_call(
    world: World, value: object, error: type[Exception]
) -> None:
    """A bad input raises at `start`, says where, and stores nothing."""
    app = await world.engine(echo)
    with pytest.raises(error, match="the input of"):
        await app.start(echo, value)
    assert (await app.find()).runs == []


async def test_an_input_of_the_wrong_type_is_refused_at_the_call(world: World) -> None:
    """The workflow's annotation decides what its input may be, before the run exists."""
    app = await world.engine(double)
    with pytest.raises(PayloadError, match="not an int"):
        await app.start("double", "twelve")
    assert (await app.find()).runs == []


async def test_start_many_with_some_bad_starts_the_others(world: World) -> None:
    """Each request stands alone: a handle, or the error it would have raised by itself, in the order asked."""
    app = await world.engine(double)
    answers = await app.start_many(
        [
            StartRequest(workflow=double, input=1, key="one"),
            StartRequest(workflow="nobody", input=1),
            StartRequest(workflow=double, input=2),
            StartRequest(workflow=double, input="two"),
            StartRequest(workflow=double, input=3, version="9"),
            StartRequest(workflow=double, input=4, key="one"),
        ]
    )
    kinds = [answer if isinstance(answer, Exception) else None for answer in answers]
    assert [type(kind) for kind in kinds if kind] == [
        UnknownWorkflow,
        PayloadError,
        UnknownVersion,
        IdempotencyConflict,
    ]
    good = [answer for answer in answers if not isinstance(answer, Exception)]
    assert await all_results(good) == [2, 4]
    assert len((await app.find()).runs) == 2


async def test_a_delayed_start_waits_and_says_so(world: World) -> None:
    """With a delay the run is `scheduled`, takes no memory, and begins no earlier than its time by the store's clock."""
    app = await world.engine(double)
    handle = await app.start(double, 4, delay=0.15)
    record = await handle.get()
    assert (record.status, record.activity, record.owner) == (Status.ACTIVE, Activity.SCHEDULED, None)
    assert await handle.result(5) == 8
    first = (await world.journal(handle.id))[0]
    assert record.wake_at is not None
    assert first.at >= record.wake_at


async def test_priority_and_tags_are_kept(world: World) -> None:
    """What is said at the start is on the row, the workflow's own where nothing is said."""

    @workflow(name="tagged", tags=["a", "b"], priority=3)
    async def tagged(ctx: Context) -> None: ...

    app = await world.engine(tagged)
    own = await (await app.start(tagged)).get()
    said = await (await app.start(tagged, tags=["c"], priority=-1)).get()
    assert (own.tags, own.priority, said.tags, said.priority) == (("a", "b"), 3, ("c",), -1)


async def test_an_api_node_starts_and_inspects_and_never_executes(world: World) -> None:
    """With `worker=False` runs are started, signalled, waited for and listed here, and executed by others only (D7)."""
    gate = Gate()

    @workflow(name="work")
    async def work(ctx: Context) -> list[object]:
        return [await ctx.step("work", gate), await ctx.wait_for_signal("go")]

    api = await world.engine(work, worker=False)
    handle = await api.start(work)
    record = await handle.get()
    assert (record.owner, record.activity) == (None, Activity.QUEUED)
    await asyncio.sleep(0.05)
    assert gate.came == 0
    assert [run.id for run in (await api.find(workflow="work")).runs] == [handle.id]
    await world.engine(work)
    await gate.reached()
    assert api.engine._executor.residents == {}
    await handle.signal("go", 7)
    gate.open()
    assert await handle.result(5) == [1, 7]
    assert [entry.kind async for entry in handle.watch()][-1] == "run"


async def test_an_app_that_is_not_running_says_so() -> None:
    """Asking an app for work before `async with` or after it raises EngineStopped with what to do."""
    app = Durable("memory://", workflows=[double])
    with pytest.raises(EngineStopped, match="async with app"):
        await app.start(double, 1)
    async with app:
        engine = app.engine
    with pytest.raises(EngineStopped):
        await app.start(double, 1)
    with pytest.raises(EngineStopped):
        await engine.start_run(double, 1)


async def test_more_runs_than_max_running_are_left_for_later_and_all_finish(world: World) -> None:
    """An engine that is full starts runs unclaimed; they are taken as room comes, here or elsewhere."""
    app = await world.engine(double, max_running=3)
    handles = await asyncio.gather(*(app.start(double, n) for n in range(30)))
    assert await all_results(handles) == [n * 2 for n in range(30)]
