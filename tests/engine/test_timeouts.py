"""Timeouts of steps and of whole runs."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta

import pytest

from durable import ChildFailed, Context, RunTimeout, StepFailed, StepTimeout, workflow
from durable.protocol.states import Status
from tests.engine.world import Gate, World, eventually


async def test_N16_a_step_timeout_cancels_an_async_body(world: World) -> None:
    """The body is cancelled, StepTimeout reaches the workflow, and the attempt counts."""
    gate = Gate()

    @workflow(name="slow")
    async def slow(ctx: Context) -> int:
        try:
            await ctx.step("slow", gate, timeout=0.05, retries=0)
        except StepTimeout as error:
            return error.attempts
        return 0

    app = await world.engine(slow)
    assert await app.start_and_wait(slow, timeout=5) == 1
    assert gate.cancelled == 1


async def test_N16_each_attempt_has_the_whole_timeout(world: World) -> None:
    """A timed out attempt is retried like a failure, with a fresh timeout."""
    from durable import RetryPolicy

    tries: list[int] = []

    async def body() -> str:
        tries.append(1)
        if len(tries) < 3:
            await asyncio.sleep(60)
        return "third"

    @workflow(name="slow")
    async def slow(ctx: Context) -> str:
        result: str = await ctx.step("s", body, timeout=0.05, retries=RetryPolicy(initial_delay=0.01))
        return result

    app = await world.engine(slow)
    assert await app.start_and_wait(slow, timeout=5) == "third"


async def test_N16_a_step_timeout_leaves_a_thread_behind_and_goes_on(world: World) -> None:
    """A thread cannot be cancelled: the workflow goes on at once, and what the thread returns later changes nothing."""
    release, ended = threading.Event(), threading.Event()

    def block() -> str:
        release.wait(5)
        ended.set()
        return "late"

    @workflow(name="thread")
    async def thread(ctx: Context) -> str:
        try:
            await ctx.step("block", block, timeout=0.05, retries=0)
        except StepTimeout:
            return "went on"
        return ""

    app = await world.engine(thread)
    handle = await app.start(thread)
    assert await handle.result(5) == "went on"
    release.set()
    await eventually(ended.is_set)
    await asyncio.sleep(0.02)
    assert (await world.record(handle.id)).output == b'"went on"'
    await world.sound(handle.id)


@pytest.mark.parametrize("raises", [False, True])
async def test_what_a_thread_returns_after_its_timeout_is_recorded(world: World, raises: bool) -> None:
    """While its run is here, the end of a plain body that timed out is journaled as late, under its attempt."""
    release, gate = threading.Event(), Gate()

    def block() -> str:
        release.wait(5)
        if raises:
            raise ValueError("too late")
        return "too late"

    @workflow(name="thread")
    async def thread(ctx: Context) -> str:
        try:
            await ctx.step("block", block, timeout=0.05, retries=0)
        except StepTimeout:
            await ctx.step("hold", gate)
            return "went on"
        return ""

    app = await world.engine(thread)
    handle = await app.start(thread)
    await gate.reached()
    release.set()
    await world.until_journal(handle.id, lambda lines: "step block late" in lines)
    gate.open()
    assert await handle.result(5) == "went on"
    [late] = [entry for entry in await world.journal(handle.id) if entry.status == "late"]
    assert (late.key, late.attempt) == ("block", 1)
    assert b"too late" in (late.payload or b"")
    await world.sound(handle.id)


async def test_a_timeout_error_of_the_bodys_own_is_not_the_steps(world: World) -> None:
    """A TimeoutError that the body raised itself is its failure, not a StepTimeout."""

    @workflow(name="own")
    async def own(ctx: Context) -> str:
        async def body() -> None:
            raise TimeoutError("the socket's")

        try:
            await ctx.step("own", body, timeout=5, retries=0)
        except StepFailed as error:
            return type(error).__name__ + ": " + (error.error.message if error.error else "")
        return ""

    app = await world.engine(own)
    assert await app.start_and_wait(own, timeout=5) == "StepFailed: the socket's"


async def test_N16_a_run_timeout_ends_the_run_and_its_body(world: World) -> None:
    """A run above its timeout is failed with `run_timeout`, its body is cancelled, and waiting raises RunTimeout."""
    gate = Gate()

    @workflow(name="limited", timeout=timedelta(milliseconds=80))
    async def limited(ctx: Context) -> None:
        await ctx.step("slow", gate)

    app = await world.engine(limited)
    handle = await app.start(limited)
    with pytest.raises(RunTimeout) as caught:
        await handle.result(5)
    assert caught.value.error is not None
    assert caught.value.error.code == "run_timeout"
    assert gate.cancelled == 1
    assert (await handle.get()).status is Status.FAILED
    await world.sound(handle.id)


async def test_N16_a_run_timeout_counts_from_the_start_whoever_executes(world: World) -> None:
    """The deadline is the run's, not the engine's: it fires at the next owner's, and no earlier than it should."""

    @workflow(name="limited", timeout=0.25)
    async def limited(ctx: Context) -> None:
        await ctx.wait_for_signal("never")

    app = await world.engine(limited)
    handle = await app.start(limited)
    await world.waits(handle.id)
    await world.crash(app)
    other = await world.engine(limited)
    with pytest.raises(RunTimeout):
        await other.run(handle.id).result(5)
    entries = await world.journal(handle.id)
    timed_out = next(entry for entry in entries if entry.status == "timed_out")
    assert timed_out.at - entries[0].at >= 250_000


async def test_B44_a_run_timeout_ends_the_whole_tree_and_leaves_the_finished_alone(world: World) -> None:
    """Children and grandchildren of a run that timed out end too; a child that had completed keeps its outcome."""

    @workflow(name="leaf")
    async def leaf(ctx: Context, wait: bool) -> str:
        if wait:
            await ctx.wait_for_signal("never")
        return "leaf"

    @workflow(name="middle")
    async def middle(ctx: Context) -> None:
        await ctx.child(leaf, True)

    @workflow(name="root", timeout=0.2)
    async def root(ctx: Context) -> None:
        await ctx.child(leaf, False)
        await asyncio.gather(ctx.child(middle), ctx.child(leaf, True))

    app = await world.engine(root, middle, leaf)
    handle = await app.start(root)
    with pytest.raises(RunTimeout):
        await handle.result(5)
    store = await world.store()

    async def tree(run_id: str) -> list[str]:
        found = []
        for child in await store.children(run_id):
            found.append(child.id)
            found.extend(await tree(child.id))
        return found

    ids = await tree(handle.id)
    assert len(ids) == 4
    for run_id in ids:
        await world.until(run_id, lambda r: r.status is not Status.ACTIVE, "the tree has ended")
    outcomes = sorted([(await world.record(run_id)).status for run_id in ids])
    assert outcomes == ["cancelled", "cancelled", "cancelled", "completed"]
    await world.sound(handle.id, *ids)


async def test_a_parent_may_catch_its_childs_timeout(world: World) -> None:
    """A child's own timeout reaches its parent as ChildFailed with code `run_timeout`."""

    @workflow(name="child", timeout=0.05)
    async def child(ctx: Context) -> None:
        await ctx.wait_for_signal("never")

    @workflow(name="parent")
    async def parent(ctx: Context) -> str:
        try:
            await ctx.child(child)
        except ChildFailed as error:
            return error.error.code if error.error else ""
        return ""

    app = await world.engine(parent, child)
    assert await app.start_and_wait(parent, timeout=5) == "run_timeout"


async def test_asyncio_timeout_in_a_workflow_is_durable(world: World) -> None:
    """`asyncio.timeout` around a step cancels it: journaled, the body told, the workflow goes on at once, after a crash too."""
    gate = Gate()

    @workflow(name="asyncio")
    async def limited(ctx: Context) -> str:
        try:
            async with asyncio.timeout(0.05):
                await ctx.step("slow", gate)
        except TimeoutError:
            await ctx.wait_for_signal("go")
            return "timed out"
        return ""

    app = await world.engine(limited)
    handle = await app.start(limited)
    await world.until_journal(handle.id, lambda lines: "step slow cancelled" in lines)
    assert gate.cancelled == 1
    await world.waits(handle.id)
    await world.crash(app)
    other = await world.engine(limited)
    await other.run(handle.id).signal("go")
    assert await other.run(handle.id).result(5) == "timed out"
    assert gate.came == 1
    await world.sound(handle.id)
