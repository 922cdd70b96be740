"""Child runs: started by the commit that asks for them, told of by the commit that ends them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from durable import ChildFailed, Context, Durable, RunCancelled, RunFailed, workflow
from durable.core.errors import UnknownWorkflow
from durable.core.journal import Entry
from durable.engine.children import ChildNote, cancel, to_cancel
from durable.protocol.states import Status
from durable.store.memory import MemoryStore
from tests.engine.world import Gate, World, eventually


@workflow(name="square")
async def square(ctx: Context, n: int) -> int:
    return n * n


@workflow(name="waits")
async def waits(ctx: Context) -> Any:
    return await ctx.wait_for_signal("go")


async def child_of(world: World, parent: str, index: int = 0) -> Any:
    await world.until_journal(
        parent, lambda lines: sum(line.startswith("child") and line.endswith("started") for line in lines) > index
    )
    return (await (await world.store()).children(parent))[index]


async def test_a_child_returns_to_its_parent(world: World) -> None:
    """`ctx.child` waits for the result, typed; ids tell where a child belongs."""

    @workflow(name="sum")
    async def total(ctx: Context) -> int:
        return sum(await asyncio.gather(*(ctx.child(square, n) for n in range(4))))

    app = await world.engine(total, square)
    handle = await app.start(total)
    assert await handle.result(5) == 14
    children = await (await world.store()).children(handle.id)
    assert [child.id for child in children] == [f"{handle.id}.child.{n}" for n in range(4)]
    await world.sound(handle.id, *(child.id for child in children))


async def test_a_started_child_runs_on_its_own(world: World) -> None:
    """`start_child` hands back a handle at once: its id may be passed on, its result awaited later or never."""

    @workflow(name="starter")
    async def starter(ctx: Context) -> list[Any]:
        kept = ctx.start_child(square, 5)
        ctx.start_child(square, 6, on_parent_close="abandon")
        return [kept.run_id, await kept.result()]

    app = await world.engine(starter, square)
    handle = await app.start(starter)
    run_id, result = await handle.result(5)
    assert result == 25
    assert await app.run(run_id).result(5) == 25
    assert await app.run(f"{handle.id}.child.1").result(5) == 36


async def test_B48_a_parent_is_told_of_every_end_in_the_commit_that_makes_it(world: World) -> None:
    """A child that failed, was cancelled or is dead reaches the waiting parent as ChildFailed with its code."""

    @workflow(name="fails")
    async def fails(ctx: Context) -> None:
        raise ValueError("no")

    @workflow(name="parent")
    async def parent(ctx: Context, name: str) -> str:
        try:
            await ctx.child(name)
        except ChildFailed as error:
            return error.error.code if error.error else "?"
        return ""

    app = await world.engine(parent, fails, waits)
    assert await app.start_and_wait(parent, "fails", timeout=5) == "error"
    handle = await app.start(parent, "waits")
    child = await child_of(world, handle.id)
    await world.waits(child.id)
    await app.run(child.id).cancel()
    assert await handle.result(5) == "run_cancelled"
    store = await world.store()
    assert (await store.get([child.id]))[0].finished_at is not None
    row = (await store.inbox([(handle.id, 0)]))[0][-1]
    assert (row.message.kind, row.message.name) == ("child", "cancelled")


async def test_B48_a_dead_child_is_told_of_too(world: World) -> None:
    """A child whose engine dies under it too often is dead, and its parent goes on with that."""
    gate = Gate()

    @workflow(name="poison")
    async def poison(ctx: Context) -> None:
        await ctx.step("poison", gate)

    @workflow(name="parent")
    async def parent(ctx: Context) -> str:
        try:
            await ctx.child(poison)
        except ChildFailed as error:
            return error.error.code if error.error else "?"
        return ""

    app = await world.engine(parent, poison, max_recovery_attempts=1)
    handle = await app.start(parent)
    for round in range(1, 3):
        await gate.reached(round)
        await world.waits(handle.id)
        await world.crash(app)
        app = await world.engine(parent, poison, max_recovery_attempts=1)
    assert await app.run(handle.id).result(5) == "run_dead"
    await world.sound(handle.id)


async def test_B47_a_child_is_started_in_the_commit_that_journals_it(world: World) -> None:
    """Whatever crash: the journal says `started` exactly if the child is in the store."""

    @workflow(name="parent")
    async def parent(ctx: Context) -> Any:
        return await ctx.child(waits)

    app = await world.engine(parent, waits)
    line = world.line(app)
    line.fault_after = lambda name, args: _hang_after_commit(line, name, args)
    handle = await app.start(parent)
    await world.until_journal(handle.id, lambda lines: "child waits started" in lines)
    await world.crash(app)
    child = await child_of(world, handle.id)
    app = await world.engine(parent, waits)
    await app.run(child.id).signal("go", "after all")
    assert await app.run(handle.id).result(5) == "after all"
    assert len(await (await world.store()).children(handle.id)) == 1
    await world.sound(handle.id, child.id)


def _hang_after_commit(line: Any, name: str, args: Any) -> None:
    """The commit that starts the child happens, and its answer never comes."""
    if name == "commit" and any(commit.effects for commit in args[0]):
        line.hold()


async def test_B47_a_crash_before_the_commit_leaves_neither(world: World) -> None:
    """A commit that did not arrive started no child; the next owner asks again, once."""

    @workflow(name="parent")
    async def parent(ctx: Context) -> Any:
        return await ctx.child(square, 3)

    app = await world.engine(parent, square)
    line = world.line(app)

    def fault(name: str, args: Any) -> None:
        if name == "commit" and any(commit.effects for commit in args[0]):
            line.dead = True

    line.fault = fault
    handle = await app.start(parent)
    await eventually(lambda: line.dead)
    assert await (await world.store()).children(handle.id) == []
    await world.crash(app)
    app = await world.engine(parent, square)
    assert await app.run(handle.id).result(5) == 9
    assert len(await (await world.store()).children(handle.id)) == 1


async def test_an_unknown_child_workflow_is_an_error_at_the_await(world: World) -> None:
    """A name nobody registered here fails the command with `unknown_workflow`; nothing is started."""

    @workflow(name="parent")
    async def parent(ctx: Context) -> str:
        try:
            await ctx.child("nobody", 1)
        except ChildFailed as error:
            return error.error.code if error.error else "?"
        return ""

    app = await world.engine(parent)
    handle = await app.start(parent)
    assert await handle.result(5) == UnknownWorkflow.code
    assert await (await world.store()).children(handle.id) == []
    await world.sound(handle.id)


async def test_a_child_outlives_its_parents_engine(world: World) -> None:
    """Parent on one engine, child on another, either dies: the outcome still arrives."""

    @workflow(name="parent")
    async def parent(ctx: Context) -> Any:
        return await ctx.child(waits)

    first = await world.engine(parent, waits)
    second = await world.engine(waits)
    handle = await first.start(parent)
    child = await child_of(world, handle.id)
    await world.waits(child.id)
    await world.crash(first)
    await second.run(child.id).signal("go", 1)
    await second.run(child.id).result(5)
    third = await world.engine(parent)
    assert await third.run(handle.id).result(5) == 1
    await world.sound(handle.id, child.id)


@pytest.mark.parametrize("on_close", ["cancel", "abandon"])
async def test_what_happens_to_an_open_child_when_its_parent_fails(world: World, on_close: str) -> None:
    """`on_parent_close` decides: told to stop, or left alone."""

    @workflow(name="parent")
    async def parent(ctx: Context) -> None:
        ctx.start_child(waits, on_parent_close=on_close)  # type: ignore[arg-type]
        await ctx.sleep(0.01)
        raise ValueError("gives up")

    app = await world.engine(parent, waits)
    handle = await app.start(parent)
    with pytest.raises(RunFailed, match="gives up"):
        await handle.result(5)
    child = await child_of(world, handle.id)
    if on_close == "cancel":
        record = await world.until(child.id, lambda r: r.status is not Status.ACTIVE)
        assert record.status is Status.CANCELLED
    else:
        await app.run(child.id).signal("go", "alone")
        assert await app.run(child.id).result(5) == "alone"


async def test_S23_a_cancel_cascades_to_children(world: World) -> None:
    """Cancelling a parent that waits for its children ends them too, and each has one terminal state."""

    @workflow(name="parent")
    async def parent(ctx: Context) -> None:
        await asyncio.gather(ctx.child(waits), ctx.child(waits))

    app = await world.engine(parent, waits)
    handle = await app.start(parent)
    children = [await child_of(world, handle.id, n) for n in range(2)]
    for child in children:
        await world.waits(child.id)
    await handle.cancel()
    for run_id in (handle.id, *(child.id for child in children)):
        record = await world.until(run_id, lambda r: r.status is not Status.ACTIVE)
        assert record.status is Status.CANCELLED
    await world.sound(handle.id, *(child.id for child in children))


async def test_B23_a_child_started_by_a_run_that_is_being_cancelled_does_not_survive_it(world: World) -> None:
    """A cancel lands while the parent is about to start one more child: when all is over none is left running."""

    @workflow(name="parent")
    async def parent(ctx: Context) -> None:
        try:
            await ctx.wait_for_signal("never")
        finally:
            ctx.start_child(waits)

    app = await world.engine(parent, waits)
    handle = await app.start(parent)
    await world.waits(handle.id)
    await handle.cancel()
    await world.until(handle.id, lambda r: r.status is Status.CANCELLED)
    for child in await (await world.store()).children(handle.id):
        record = await world.until(child.id, lambda r: r.status is not Status.ACTIVE)
        assert record.status is Status.CANCELLED


async def test_a_failed_childs_error_is_data_all_the_way_up(world: World) -> None:
    """Three levels: message, type and code of the cause arrive at the top, live and replayed alike."""

    @workflow(name="leaf")
    async def leaf(ctx: Context) -> None:
        raise ValueError("the cause")

    @workflow(name="middle")
    async def middle(ctx: Context) -> None:
        await ctx.child(leaf)

    @workflow(name="top")
    async def top(ctx: Context) -> str:
        try:
            await ctx.child(middle)
        except ChildFailed as error:
            await ctx.sleep(0.01)
            return str(error)
        return ""

    app = await world.engine(top, middle, leaf)
    assert "the cause" in await app.start_and_wait(top, timeout=5)


@pytest.mark.parametrize("on_close", ["cancel", "abandon"])
async def test_what_happens_to_an_open_child_when_its_parent_dies(world: World, on_close: str) -> None:
    """A dead parent has no machine to ask; the journal says which children end with it. A requeued one begins them anew."""
    gate = Gate()

    @workflow(name="poison-parent")
    async def parent(ctx: Context) -> list[Any]:
        done = await ctx.child(square, 3)
        open_ = ctx.start_child(waits, on_parent_close=on_close)  # type: ignore[arg-type]
        await ctx.step("poison", gate)
        return [done, await open_.result()]

    app = await world.engine(parent, waits, square, max_recovery_attempts=1)
    handle = await app.start(parent)
    child = await child_of(world, handle.id, 1)
    await world.waits(child.id)
    for round in range(1, 3):
        await gate.reached(round)
        await world.crash(app)
        app = await world.engine(parent, waits, square, max_recovery_attempts=1)
    await world.until(handle.id, lambda r: r.status is Status.DEAD)
    if on_close == "abandon":
        assert "child waits cancelled" not in await world.statuses(handle.id)
    else:
        record = await world.until(child.id, lambda r: r.status is not Status.ACTIVE)
        assert record.status is Status.CANCELLED
        assert (await world.statuses(handle.id))[-2:] == ["child waits cancelled", "run dead"]
    gate.open()
    await app.requeue(handle.id)
    newest = child if on_close == "abandon" else await child_of(world, handle.id, 2)
    assert (newest.id == child.id) is (on_close == "abandon")
    await app.run(newest.id).signal("go", "went")
    assert await app.run(handle.id).result(5) == [9, "went"]
    assert len(await (await world.store()).children(handle.id)) == (2 if on_close == "abandon" else 3)
    await world.sound(handle.id)


async def test_a_dead_parent_does_not_give_up_a_child_that_has_ended(world: World) -> None:
    """The child's outcome lies unread in the dead parent's inbox: a requeue goes on with it, and starts no other."""
    gate = Gate()

    @workflow(name="poison-parent")
    async def parent(ctx: Context) -> Any:
        child = ctx.start_child(waits)
        await ctx.step("poison", gate)
        return await child.result()

    app = await world.engine(parent, waits, max_recovery_attempts=1)
    handle = await app.start(parent)
    child = await child_of(world, handle.id)
    await world.waits(child.id)
    await gate.reached()
    await world.crash(app)
    app = await world.engine(parent, waits, max_recovery_attempts=1)
    await gate.reached(2)
    await world.crash(app)
    only = await world.engine(waits)
    await only.run(child.id).signal("go", "went")
    assert await only.run(child.id).result(5) == "went"
    app = await world.engine(parent, waits, max_recovery_attempts=1)
    await world.until(handle.id, lambda r: r.status is Status.DEAD)
    gate.open()
    await app.requeue(handle.id)
    assert await app.run(handle.id).result(5) == "went"
    assert [c.id for c in await (await world.store()).children(handle.id)] == [child.id]


async def test_a_parent_forced_to_fail_in_its_replay_ends_its_children(world: World) -> None:
    """New code does what no workflow may, before the place where the child was started: the child ends with its parent."""

    @workflow(name="mended")
    async def old(ctx: Context) -> None:
        await ctx.step("first", lambda: 1)
        await ctx.child(waits)

    @workflow(name="mended")
    async def new(ctx: Context) -> None:
        await ctx.step("first", lambda: 1)
        await asyncio.to_thread(print)

    app = await world.engine(old, waits)
    handle = await app.start(old)
    child = await child_of(world, handle.id)
    await world.waits(child.id)
    await app.close()
    app = await world.engine(new, waits)
    await app.run(handle.id).cancel()
    await world.until(handle.id, lambda r: r.status is Status.FAILED)
    record = await world.until(child.id, lambda r: r.status is not Status.ACTIVE)
    assert record.status is Status.CANCELLED
    await world.sound(handle.id)


def test_journals_written_before_still_replay() -> None:
    """A `started` entry that says nothing of its parent's end leaves its child alone when the parent dies."""
    old = b'{"run_id":"r.child.0","workflow":"waits","version":"1"}'
    begun = Entry(2, 2, "child", "started", "waits", 0, "waits", payload=old)
    new = Entry(3, 3, "child", "started", "other", 1, "other", payload=old[:-1] + b',"on_parent_close":"cancel"}')
    assert to_cancel([begun, new]) == {"other": (new, "r.child.0", None)}
    assert to_cancel([begun, new, Entry(4, 4, "child", "completed", "other", 1)]) == {}


def test_B37_a_journal_says_where_a_child_lives() -> None:
    """A parent that dies with no code to ask tells a child in another app's workspace there, and no other run of that id."""
    note = ChildNote("r.child.0", "waits", "1", "cancel", "shop.dev")
    begun = Entry(2, 2, "child", "started", "far", 0, "waits", payload=msgspec.json.encode(note))
    [(key, child)] = to_cancel([begun]).items()
    run = SimpleNamespace(run_id="r", workspace="default", tree_cancelled=False)
    told: Any = cancel(cast(Any, run), key, child.run_id, child.workspace).message
    assert (told.run_id, told.kind, told.workspace) == ("r.child.0", "cancel", "shop.dev")


async def test_a_parent_whose_last_commit_the_store_refuses_ends_its_children() -> None:
    """The commit that gave the child up is never stored; the one that fails the parent in its place tells the child."""

    @workflow(name="parent")
    async def parent(ctx: Context) -> None:
        ctx.start_child(waits)
        await ctx.sleep(0.01)
        ctx.log("x" * 20_000)
        raise ValueError("gives up")

    async with Durable(MemoryStore(max_payload=10_000)) as app:
        app.register(parent, waits)
        handle = await app.start(parent)
        with pytest.raises(RunFailed, match=r"20,0\d\d bytes"):
            await handle.result(5)
        with pytest.raises(RunCancelled):
            await app.run(f"{handle.id}.child.0").result(5)
