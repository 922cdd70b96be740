"""Reopening what ended badly: a fresh budget, and nothing recorded as failed is replayed by accident."""

from __future__ import annotations

from typing import Any

import pytest

from durable import ChildFailed, Context, RunDead, RunFailed, RunTimeout, workflow
from durable.core.errors import RunFinished, RunNotFound
from durable.protocol.states import Status
from tests.engine.world import Gate, World


async def test_B20_a_requeued_dead_run_has_a_fresh_budget_and_may_die_again(world: World) -> None:
    """Poison, dead, requeued: it is tried as often as the first time; still poison, it is dead again."""
    gate = Gate()

    @workflow(name="poison")
    async def poison(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    app = await world.engine(poison, max_recovery_attempts=1)
    handle = await app.start(poison)
    came = 0
    for _ in range(2):
        for _ in range(2):
            came += 1
            await gate.reached(came)
            await world.until(handle.id, lambda r: r.activity == "executing")
            await world.crash(app)
            app = await world.engine(poison, max_recovery_attempts=1)
        with pytest.raises(RunDead):
            await app.run(handle.id).result(5)
        await app.requeue(handle.id)
        assert (await world.record(handle.id)).recovery_attempts == 0
    gate.open()
    assert await app.run(handle.id).result(5) == 5
    await world.sound(handle.id)


async def test_B53_a_requeued_run_asks_again_for_the_step_that_failed(world: World) -> None:
    """What had succeeded is kept, what failed runs again; repeated, if need be."""
    ran: list[str] = []
    broken = [True, True]

    @workflow(name="mends")
    async def mends(ctx: Context) -> str:
        await ctx.step("first", lambda: ran.append("first"))

        def second() -> str:
            ran.append("second")
            if broken:
                broken.pop()
                raise ValueError("not yet")
            return "mended"

        result: str = await ctx.step("second", second, retries=0)
        return result

    app = await world.engine(mends)
    handle = await app.start(mends)
    for _ in range(2):
        with pytest.raises(RunFailed, match="not yet"):
            await handle.result(5)
        await app.requeue(handle.id)
    assert await handle.result(5) == "mended"
    assert ran == ["first", "second", "second", "second"]
    await world.sound(handle.id)


async def test_B53_a_requeued_run_whose_child_failed_starts_another_child(world: World) -> None:
    """The failed child's recorded outcome is not replayed: a new child, with an id of its own, is asked for."""
    broken = [True]

    @workflow(name="child")
    async def child(ctx: Context) -> str:
        if broken:
            broken.pop()
            raise ValueError("broken child")
        return "whole"

    @workflow(name="parent")
    async def parent(ctx: Context) -> str:
        result: str = await ctx.child(child)
        return result

    app = await world.engine(parent, child)
    handle = await app.start(parent)
    with pytest.raises(RunFailed, match="broken child"):
        await handle.result(5)
    await app.requeue(handle.id)
    assert await handle.result(5) == "whole"
    children = await (await world.store()).children(handle.id)
    assert sorted(c.status for c in children) == ["completed", "failed"]
    assert len({c.id for c in children}) == 2
    await world.sound(handle.id)


async def test_B53_a_failure_the_workflow_had_handled_stays_handled(world: World) -> None:
    """Only what ended the run is asked again: a step whose failure was caught keeps its recorded failure."""
    ran: list[str] = []
    broken = [True]

    @workflow(name="handled")
    async def handled(ctx: Context) -> list[str]:
        def fails() -> None:
            ran.append("fails")
            raise ValueError("expected")

        def ends() -> str:
            ran.append("ends")
            if broken:
                broken.pop()
                raise ValueError("unexpected")
            return "ended"

        try:
            await ctx.step("fails", fails, retries=0)
            caught = "nothing"
        except Exception:
            caught = "caught"
        return [caught, await ctx.step("ends", ends, retries=0)]

    app = await world.engine(handled)
    handle = await app.start(handled)
    with pytest.raises(RunFailed, match="unexpected"):
        await handle.result(5)
    await app.requeue(handle.id)
    assert await handle.result(5) == ["caught", "ended"]
    assert ran == ["fails", "ends", "ends"]


async def test_signals_survive_a_requeue(world: World) -> None:
    """A signal that came after the failed step had begun, and one that was used before it, are both still there."""
    broken = [True]

    @workflow(name="signalled")
    async def signalled(ctx: Context) -> list[Any]:
        first = await ctx.wait_for_signal("x")

        async def body() -> None:
            if broken:
                broken.pop()
                raise ValueError("no")

        await ctx.step("body", body, retries=0)
        return [first, await ctx.wait_for_signal("x")]

    app = await world.engine(signalled)
    handle = await app.start(signalled)
    await handle.signal("x", 1)
    with pytest.raises(RunFailed):
        await handle.result(5)
    await app.requeue(handle.id)
    await handle.signal("x", 2)
    assert await handle.result(5) == [1, 2]
    await world.sound(handle.id)


async def test_a_timed_out_run_gets_its_whole_timeout_again(world: World) -> None:
    """Requeued after a run timeout, it counts from the requeue."""

    @workflow(name="limited", timeout=0.15)
    async def limited(ctx: Context) -> Any:
        return await ctx.wait_for_signal("x")

    app = await world.engine(limited)
    handle = await app.start(limited)
    with pytest.raises(RunTimeout):
        await handle.result(5)
    await app.requeue(handle.id)
    await handle.signal("x", "in time")
    assert await handle.result(5) == "in time"


async def test_what_cannot_be_requeued_says_so(world: World) -> None:
    """Completed and cancelled runs stay so: RunFinished; an unknown id is RunNotFound; an active run is left alone."""

    @workflow(name="plain")
    async def plain(ctx: Context, wait: bool) -> None:
        if wait:
            await ctx.wait_for_signal("x")

    app = await world.engine(plain)
    done = await app.start(plain, False)
    await done.result(5)
    with pytest.raises(RunFinished, match="completed"):
        await app.requeue(done.id)
    with pytest.raises(RunNotFound):
        await app.requeue("nobody")
    active = await app.start(plain, True)
    await world.waits(active.id)
    before = await world.record(active.id)
    await app.requeue(active.id)
    assert (await world.record(active.id)).seq == before.seq
    assert (await world.record(done.id)).status is Status.COMPLETED


async def test_a_parent_that_waits_is_not_told_twice_of_a_requeued_child(world: World) -> None:
    """The child failed, its parent went on with that; requeued by itself it completes, and the parent stays as it is."""
    broken = [True]

    @workflow(name="child")
    async def child(ctx: Context) -> str:
        async def body() -> str:
            if broken:
                broken.pop()
                raise ValueError("no")
            return "fine"

        result: str = await ctx.step("body", body, retries=0)
        return result

    @workflow(name="parent")
    async def parent(ctx: Context) -> str:
        try:
            await ctx.child(child)
        except ChildFailed:
            await ctx.wait_for_signal("x")
            return "went on"
        return ""

    app = await world.engine(parent, child)
    handle = await app.start(parent)
    await world.until_journal(handle.id, lambda lines: "child child failed" in lines)
    child_id = (await (await world.store()).children(handle.id))[0].id
    await app.requeue(child_id)
    assert await app.run(child_id).result(5) == "fine"
    await handle.signal("x")
    assert await handle.result(5) == "went on"
    await world.sound(handle.id, child_id)
