"""Leaving memory: an author's `except` and `finally` can neither swallow it nor do anything durable (S35)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest

from durable import Context, workflow
from tests.engine.world import World


async def test_S35_except_exception_cannot_swallow_a_suspension(world: World) -> None:
    """A wait wrapped in `except Exception` resumes after eviction and crash as if nothing had been."""

    @workflow(name="catches")
    async def catches(ctx: Context) -> Any:
        while True:
            try:
                return await ctx.wait_for_signal("go")
            except Exception:
                await ctx.step("never", lambda: None)

    app = await world.engine(catches)
    handle = await app.start(catches)
    for _ in range(2):
        await world.waits(handle.id)
        await world.crash(app)
        app = await world.engine(catches)
    await app.run(handle.id).signal("go", "through")
    assert await app.run(handle.id).result(5) == "through"
    assert "step" not in {entry.kind for entry in await world.journal(handle.id)}


async def test_B39_a_clean_up_step_is_not_run_by_a_suspension(world: World) -> None:
    """`except Exception: await ctx.step(cleanup)` and `finally: await ctx.step(...)` while the run is being dropped:
    nothing runs, nothing is journaled."""
    ran: list[str] = []

    @workflow(name="cleans")
    async def cleans(ctx: Context) -> str:
        try:
            await ctx.wait_for_signal("go")
        except BaseException:
            with contextlib.suppress(Exception):
                await ctx.step("cleanup", lambda: ran.append("cleanup"))
            raise
        finally:
            await ctx.step("final", lambda: ran.append("final"))
        return "done"

    app = await world.engine(cleans, hot_for=0.0, beat_every=0.02)
    handle = await app.start(cleans)
    await world.until(handle.id, lambda r: r.owner is None and r.activity == "waiting", "it has left memory")
    assert ran == []
    await handle.signal("go")
    assert await handle.result(5) == "done"
    assert ran == ["final"]
    await world.sound(handle.id)


async def test_S35_a_coroutine_that_refuses_is_abandoned_and_named(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """One that catches everything and waits again, for ever, is given up after a bound; the engine goes on."""
    caplog.set_level(logging.WARNING)

    @workflow(name="refuses")
    async def refuses(ctx: Context) -> Any:
        while True:
            try:
                return await ctx.wait_for_signal("go")
            except BaseException:
                continue

    app = await world.engine(refuses)
    handle = await app.start(refuses)
    await world.waits(handle.id)
    await app.close()
    assert any("test_unwinding.py" in record.getMessage() for record in caplog.records)
    await app.open()
    await app.run(handle.id).signal("go", "later")
    assert await app.run(handle.id).result(5) == "later"


async def test_S35_every_kind_of_wait_survives_being_dropped(world: World) -> None:
    """Groups, shields, locks, queues, events, async generators: dropped in the middle, each goes on after the wake-up."""
    finals: list[str] = []

    async def numbers(ctx: Context) -> Any:
        try:
            for n in range(3):
                await ctx.wait_for_signal("n")
                yield n
        finally:
            finals.append("closed")

    @workflow(name="waits")
    async def waits(ctx: Context) -> list[Any]:
        queue: asyncio.Queue[int] = asyncio.Queue()
        lock, event = asyncio.Lock(), asyncio.Event()

        async def produce() -> None:
            async with lock:
                async for n in numbers(ctx):
                    await queue.put(n)
            event.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            got = [await queue.get() for _ in range(3)]
            await event.wait()
        return [*got, await asyncio.shield(ctx.wait_for_signal("last"))]

    app = await world.engine(waits)
    handle = await app.start(waits)
    for _ in range(3):
        await world.waits(handle.id)
        await world.crash(app)
        app = await world.engine(waits)
        await app.run(handle.id).signal("n")
    await world.waits(handle.id)
    await app.run(handle.id).signal("last", "end")
    assert await app.run(handle.id).result(5) == [0, 1, 2, "end"]
    assert finals
    await world.sound(handle.id)
