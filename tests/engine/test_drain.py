"""Stopping without loss: finish or hand over within the grace, claim nothing more, and nothing counts as a crash."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable import Context, workflow
from durable.core.errors import EngineStopped
from durable.protocol.states import Status
from tests.engine.world import Gate, World, all_results


async def test_S38_a_body_under_way_may_finish(world: World) -> None:
    """Drain waits for bodies within its time; their results are committed before the engine leaves."""
    gate = Gate()

    @workflow(name="works")
    async def works(ctx: Context) -> str:
        await ctx.step("body", gate)
        await ctx.wait_for_signal("go")
        return "done"

    app = await world.engine(works)
    handle = await app.start(works)
    await gate.reached()
    closing = asyncio.ensure_future(app.close(5.0))
    await asyncio.sleep(0.03)
    assert not closing.done()
    gate.open()
    await closing
    assert "step body completed" in await world.statuses(handle.id)
    record = await world.record(handle.id)
    assert (record.owner, record.recovery_attempts) == (None, 0)
    other = await world.engine(works)
    await other.run(handle.id).signal("go")
    assert await other.run(handle.id).result(5) == "done"
    assert gate.came == 1
    await world.sound(handle.id)


async def test_S38_what_does_not_finish_is_handed_over_and_counts_as_no_crash(world: World) -> None:
    """When the time is up, bodies are cancelled and runs released under their epoch: the next engine takes them at once."""
    gate = Gate()

    @workflow(name="slow")
    async def slow(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    app = await world.engine(slow)
    handles = [await app.start(slow) for _ in range(3)]
    await gate.reached(3)
    await app.close(0.05)
    assert gate.cancelled == 3
    for handle in handles:
        record = await world.record(handle.id)
        assert (record.owner, record.recovery_attempts, record.status) == (None, 0, Status.ACTIVE)
    other = await world.engine(slow, max_recovery_attempts=0)
    await gate.reached(6)
    gate.open()
    assert sorted(await all_results([other.run(handle.id) for handle in handles])) == [4, 5, 6]


async def test_S38_a_draining_engine_claims_and_starts_nothing(world: World) -> None:
    """From the first moment of a drain no run is begun here; asking for one raises EngineStopped."""
    gate = Gate()

    @workflow(name="slow")
    async def slow(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    app = await world.engine(slow)
    await app.start(slow)
    await gate.reached()
    engine = app.engine
    closing = asyncio.ensure_future(app.close(5.0))
    await asyncio.sleep(0.02)
    api = await world.engine(slow, worker=False)
    late = await api.start(slow)
    with pytest.raises(EngineStopped):
        await engine.start_run(slow)
    await asyncio.sleep(0.05)
    assert gate.came == 1
    gate.open()
    await closing
    await world.engine(slow)
    assert await api.run(late.id).result(5) == 2


async def test_S38_a_drain_under_load_loses_nothing(world: World) -> None:
    """Engines come and go while a hundred runs are under way: each completes once, nothing counted as a crash."""

    @workflow(name="load")
    async def load(ctx: Context, n: int) -> int:
        total = 0
        for m in range(3):
            total += await ctx.step("add", asyncio.sleep, 0.005, n + m)
        await ctx.sleep(0.01)
        return total

    app = await world.engine(load)
    handles = await asyncio.gather(*(app.start(load, n) for n in range(100)))
    for _ in range(3):
        other = await world.engine(load)
        await app.close(0.02)
        world.apps.remove(app)
        app = other
    assert await all_results([app.run(handle.id) for handle in handles]) == [3 * n + 3 for n in range(100)]
    records = await (await world.store()).get([handle.id for handle in handles])
    assert {record.recovery_attempts for record in records} == {0}
    await world.sound(*(handle.id for handle in handles[:10]))


async def test_closing_twice_and_closing_before_opening_is_harmless(world: World) -> None:
    """close() is idempotent."""

    @workflow(name="noop")
    async def noop(ctx: Context) -> None: ...

    app = await world.engine(noop)
    await app.close()
    await app.close()
    await app.open()
    await app.start_and_wait(noop, timeout=5)


async def test_whoever_waits_for_a_run_is_told_that_the_engine_stopped(world: World) -> None:
    """A waiter on a stopping engine is not left hanging."""

    @workflow(name="waits")
    async def waits(ctx: Context) -> Any:
        return await ctx.wait_for_signal("go")

    app = await world.engine(waits)
    handle = await app.start(waits)
    waiting = asyncio.ensure_future(handle.result())
    await world.waits(handle.id)
    await asyncio.sleep(0.02)
    await app.close()
    done, _ = await asyncio.wait({waiting}, timeout=5)
    assert done
    assert waiting.cancelled() or isinstance(waiting.exception(), EngineStopped)
