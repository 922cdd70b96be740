"""Cancelling a run with all it has started: the whole tree ends, whatever was started meanwhile, and what had ended stays."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable import Context, RunCancelled, workflow
from durable.core.errors import RunFinished, RunNotFound
from durable.core.registry import Registry
from durable.protocol.states import Status
from durable.store.records import NewRun, Parent, RunQuery, RunRecord
from tests.engine.world import Gate, World


@workflow(name="leaf")
async def leaf(ctx: Context, ends: bool = False) -> Any:
    return "over" if ends else await ctx.wait_for_signal("never")


@workflow(name="middle")
async def middle(ctx: Context, depth: int) -> Any:
    """Leaves its children to themselves, but for the cancel of a tree."""
    if depth:
        ctx.start_child(middle, depth - 1, on_parent_close="abandon")
    done = ctx.start_child(leaf, True, on_parent_close="abandon")
    ctx.start_child(leaf, False, on_parent_close="abandon")
    await done.result()
    return await ctx.wait_for_signal("never")


@workflow(name="returns")
async def returns(ctx: Context, depth: int) -> str:
    ctx.start_child(middle, depth, on_parent_close="abandon")
    await ctx.step("nothing", lambda: None)
    return "returned"


async def family(world: World, run_id: str) -> list[RunRecord]:
    page = await (await world.store()).find(RunQuery(limit=200))
    return [run for run in page.runs if run.id.startswith(run_id)]


async def grown(world: World, run_id: str, count: int) -> None:
    """Until the tree has so many runs and all of them wait or have ended."""
    while True:
        runs = await family(world, run_id)
        if len(runs) == count and all(run.activity == "waiting" or run.status is not Status.ACTIVE for run in runs):
            return
        await asyncio.sleep(0.01)


async def over(world: World, run_id: str) -> dict[str, int]:
    """Until nothing of the tree is active: how many ended how."""
    async with asyncio.timeout(10):
        while any(run.status is Status.ACTIVE for run in await family(world, run_id)):
            await asyncio.sleep(0.01)
    found: dict[str, int] = {}
    for run in await family(world, run_id):
        found[run.status.value] = found.get(run.status.value, 0) + 1
    return found


async def test_B44_the_whole_tree_ends_and_finished_ones_are_untouched(world: World) -> None:
    """A cancel with children ends children that were to be left to themselves, and theirs; those that had ended keep their
    outcome. Without it they go on."""
    app = await world.engine(leaf, middle)
    handle = await app.start(middle, 2)
    async with asyncio.timeout(10):
        await grown(world, handle.id, 9)
    assert await handle.cancel("all of it", children=True)
    assert await over(world, handle.id) == {"cancelled": 6, "completed": 3}
    alone = await app.start(middle, 0)
    async with asyncio.timeout(10):
        await grown(world, alone.id, 3)
    await alone.cancel()
    with pytest.raises(RunCancelled):
        await alone.result(5)
    assert [run.status for run in await family(world, alone.id) if run.workflow == "leaf"].count(Status.ACTIVE) == 1
    assert await alone.cancel(children=True), "what is open below an ended run is told from outside"
    assert await over(world, alone.id) == {"cancelled": 2, "completed": 1}
    assert not await alone.cancel(children=True)
    with pytest.raises(RunNotFound):
        await app.run("nobody").cancel(children=True)
    await world.sound(*(run.id for run in await family(world, handle.id)))


async def test_B44_the_tree_below_a_run_that_has_returned_ends_too(world: World) -> None:
    """A run that completed has left children: cancelled with children, they end, and it stays completed."""
    app = await world.engine(leaf, middle, returns)
    handle = await app.start(returns, 1)
    assert await handle.result(5) == "returned"
    async with asyncio.timeout(10):
        await grown(world, handle.id, 7)
    assert await handle.cancel(children=True)
    assert await over(world, handle.id) == {"completed": 3, "cancelled": 4}
    with pytest.raises(RunFinished, match="everything it started"):
        await handle.cancel(children=True)


async def test_S23_what_starts_in_the_clean_up_ends_as_well(world: World) -> None:
    """A child that is started after the cancel, while its parent cleans up, is told with the commit that ends the parent."""
    gate = Gate()

    @workflow(name="stubborn")
    async def stubborn(ctx: Context) -> str:
        try:
            await ctx.wait_for_signal("never")
        except asyncio.CancelledError:
            await ctx.step("clean", gate)
            ctx.start_child(middle, 0, on_parent_close="abandon")
            await ctx.step("after", lambda: None)
        return "swallowed"

    app = await world.engine(leaf, middle, stubborn)
    handle = await app.start(stubborn)
    await world.waits(handle.id)
    await handle.cancel(children=True)
    await gate.reached()
    gate.open()
    assert await handle.result(5) == "swallowed"
    ended = await over(world, handle.id)
    assert ended.pop("completed") >= 1
    assert set(ended) <= {"cancelled"}
    assert len(await family(world, handle.id)) >= 2


async def test_S23_the_tree_ends_though_an_engine_dies_over_it(world: World) -> None:
    """The engine is killed as soon as the parent has taken the cancel in; the next one passes it on."""
    app = await world.engine(leaf, middle)
    handle = await app.start(middle, 1)
    async with asyncio.timeout(10):
        await grown(world, handle.id, 6)
    await handle.cancel(children=True)
    await world.until_journal(handle.id, lambda lines: "run cancelling" in lines)
    await world.crash(app)
    await world.engine(leaf, middle)
    assert await over(world, handle.id) == {"cancelled": 4, "completed": 2}


async def test_S23_cancel_and_completion_come_to_one_end(world: World) -> None:
    """A run cancelled as it completes ends once, and whoever cancels learns which it was."""
    gate = Gate()

    @workflow(name="races")
    async def races(ctx: Context) -> int:
        return await ctx.step("body", gate, returns=int)

    app = await world.engine(races)
    handles = [await app.start(races) for _ in range(20)]
    await gate.reached(20)

    async def cancel(run_id: str) -> bool:
        try:
            return await app.run(run_id).cancel(children=True)
        except RunFinished:
            return False

    gate.open()
    told = await asyncio.gather(*(cancel(handle.id) for handle in handles))
    for handle, first in zip(handles, told, strict=True):
        record = await world.until(handle.id, lambda r: r.status is not Status.ACTIVE)
        assert record.status is Status.COMPLETED or first
        assert (await world.statuses(handle.id, "run"))[-1] == record.status.value
    await world.sound(*(handle.id for handle in handles))


async def test_B37_a_child_in_another_workspace_ends_with_the_tree(world: World) -> None:
    """A run that has ended had started one in another app's workspace: it is open still, and told there."""
    app = await world.engine(leaf, returns, middle)
    app.engine.deps.catalog.put("shop.dev", Registry([leaf]))
    parent = await app.start(returns, 0)
    assert await parent.result(5) == "returned"
    child = NewRun(f"{parent.id}.far", "leaf", "1", b"false", "shop.dev", parent=Parent(parent.id, "far", 99))
    await (await world.store()).start([child])
    assert await parent.cancel("all of it", children=True)
    with pytest.raises(RunCancelled):
        await app.engine.result(child.id, 5, workspace="shop.dev")
