"""Dropping a run from memory: unwound without a trace, bounded, and never by the garbage collector."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from durable.core import loop as ours
from durable.core.ctx import Context
from durable.core.definition import workflow
from durable.core.errors import Unwound
from durable.core.journal import RUN
from durable.core.replay import PYTHON
from tests.core.driver import Driver


async def body() -> int:
    return 1


heard: list[Any] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    heard.clear()


def dropped(definition: Any) -> Driver:
    """Begin a run and drop it at its first wait."""
    driver = Driver(definition)
    driver.begin()
    driver.machine.drop()
    assert driver.machine.loop.tasks == {}
    return driver


def test_waits_raise_unwound_and_finally_runs_at_once() -> None:
    """A dropped run's `finally` runs during the drop, with Unwound under way, not later."""

    @workflow
    async def wf(ctx: Context) -> None:
        try:
            await ctx.step(body)
        except Exception:
            heard.append("an Exception")
        except BaseException as error:
            heard.append(type(error))
            raise
        finally:
            heard.append("finally")

    dropped(wf)
    assert heard == [Unwound, "finally"]
    gc.collect()
    assert heard == [Unwound, "finally"]


def test_B39_a_handler_cannot_do_steps_while_unwinding() -> None:
    """`except Exception: await ctx.step(clean_up)` neither swallows the drop nor asks for a step in it."""

    @workflow
    async def wf(ctx: Context) -> None:
        try:
            await ctx.step(body)
        except Exception:
            heard.append("swallowed")
            await ctx.step("clean_up", body)

    driver = dropped(wf)
    assert heard == []
    assert list(driver.machine.outstanding) == ["body"]


@pytest.mark.parametrize("call", ["step", "sleep", "log", "now", "uuid", "patched", "signal", "task", "timer"])
def test_S35_every_ctx_call_raises_unwound_in_a_finally(call: str) -> None:
    """In unwinding every ctx call, timer and new task raises Unwound: nothing durable can be done now."""

    @workflow
    async def wf(ctx: Context) -> None:
        try:
            await ctx.step(body)
        finally:
            try:
                match call:
                    case "step":
                        ctx.step("late", body)
                    case "sleep":
                        ctx.sleep(1)
                    case "log":
                        ctx.log.info("late")
                    case "now":
                        ctx.now()
                    case "uuid":
                        ctx.uuid()
                    case "patched":
                        ctx.patched("late")
                    case "signal":
                        ctx.wait_for_signal("late")
                    case "task":
                        asyncio.create_task(body())
                    case "timer":
                        await asyncio.sleep(5)
            except BaseException as error:
                heard.append(type(error))
                raise

    driver = dropped(wf)
    assert heard == [Unwound]
    assert list(driver.machine.outstanding) == ["body"]
    assert driver.machine.next_timer() is None


def test_every_wait_of_a_finally_raises_again() -> None:
    """Each await in nested `finally` blocks raises Unwound in its turn, and the code ends."""

    @workflow
    async def wf(ctx: Context) -> None:
        event = asyncio.Event()
        try:
            try:
                await ctx.step(body)
            finally:
                heard.append("inner")
                await event.wait()
        finally:
            heard.append("outer")
            await event.wait()
            heard.append("never")

    dropped(wf)
    assert heard == ["inner", "outer"]


def test_a_stubborn_coroutine_is_abandoned_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    """A coroutine that catches every Unwound is given up after a bound, named in the log, and never runs again."""

    @workflow
    async def wf(ctx: Context) -> None:
        event = asyncio.Event()
        while True:
            try:
                await event.wait()
            except BaseException:
                heard.append("again")

    driver = Driver(wf)
    abandoned = len(ours._ABANDONED)
    with (
        caplog.at_level(logging.WARNING, "durable.workflow"),
        pytest.raises(Exception, match="nothing that can happen"),
    ):
        driver.begin()
    with caplog.at_level(logging.WARNING, "durable.workflow"):
        driver.machine.drop()
    assert len(heard) == ours.MAX_REFUSALS
    assert "test_drop.py" in caplog.text
    assert "refused to end" in caplog.text
    assert len(ours._ABANDONED) == abandoned + 1
    del driver
    gc.collect()
    assert len(heard) == ours.MAX_REFUSALS


def test_a_loop_around_refused_ctx_calls_ends() -> None:
    """`while True: try: await ctx.sleep(1) except BaseException` raises at the call, without a wait: bounded too."""

    @workflow
    async def wf(ctx: Context) -> None:
        while True:
            try:
                await ctx.sleep(1)
            except BaseException:
                heard.append(1)

    dropped(wf)
    assert ours.MAX_REFUSED_CALLS < len(heard) < ours.MAX_REFUSED_CALLS + 2 * ours.MAX_REFUSALS


def test_busy_tasks_are_unwound() -> None:
    """Tasks that have not begun run no code; those that yield without waiting are thrown into as well."""

    @workflow
    async def wf(ctx: Context) -> None:
        async def other() -> None:
            heard.append("begun")

        driver_loop.append(asyncio.get_running_loop())
        asyncio.create_task(other())
        try:
            while True:
                await asyncio.sleep(0)
        finally:
            heard.append("ended")

    driver_loop: list[Any] = []
    driver = Driver(wf)
    driver.machine.loop._max_callbacks = 1
    with pytest.raises(Exception, match="did not end"):
        driver.begin()
    driver.machine.drop()
    assert heard == ["ended"]


def test_async_generators_end_with_the_drop() -> None:
    """A generator that is being iterated, and one left half way, both run their `finally` during the drop."""

    async def numbers(ctx: Context, name: str) -> AsyncIterator[int]:
        try:
            yield 1
            await ctx.step(name, body)
            yield 2
        finally:
            heard.append(name)

    @workflow
    async def wf(ctx: Context) -> None:
        async for _ in numbers(ctx, "left"):
            break
        async for _ in numbers(ctx, "iterated"):
            pass

    driver = Driver(wf)
    driver.begin()
    gc.collect()
    assert heard == [], "held strongly: the collector does not close it"
    driver.machine.drop()
    assert sorted(heard) == ["iterated", "left"]
    gc.collect()
    assert len(heard) == 2


def test_an_async_generator_that_goes_on_is_abandoned() -> None:
    """A generator that answers Unwound with another value is given up after the bound."""

    async def stubborn() -> AsyncIterator[int]:
        while True:
            try:
                yield 1
            except BaseException:
                heard.append(1)

    @workflow
    async def wf(ctx: Context) -> None:
        async for _ in stubborn():
            break
        await ctx.step(body)

    dropped(wf)
    gc.collect()
    assert len(heard) == ours.MAX_REFUSALS


def test_a_task_group_does_not_turn_it_into_a_cancellation() -> None:
    """Unwinding a TaskGroup gives no CancelledError to anybody, and cancel() does nothing meanwhile."""

    @workflow
    async def wf(ctx: Context) -> None:
        async def child(name: str) -> None:
            try:
                await ctx.step(name, body)
            except BaseException as error:
                heard.append(type(error))
                raise

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(child("a"))
                task = group.create_task(child("b"))
        except BaseException as error:
            heard.append(type(error))
            assert not task.cancel()
            raise

    dropped(wf)
    assert heard == [Unwound] * 3


def test_locks_timeouts_and_context_variables_unwind() -> None:
    """`async with` of locks and timeouts, and variables' tokens, leave as they would in any other error."""
    variable = contextvars.ContextVar("variable", default=0)

    @workflow
    async def wf(ctx: Context) -> None:
        lock = asyncio.Lock()
        token = variable.set(1)
        try:
            async with lock, asyncio.timeout(5):
                await ctx.step(body)
        finally:
            variable.reset(token)
            heard.append((lock.locked(), asyncio.current_task() is not None))

    dropped(wf)
    assert heard == [(False, True)]


def test_replay_drops_too() -> None:
    """A machine that replayed, finished or failed can be dropped, twice as well."""

    @workflow
    async def wf(ctx: Context) -> int:
        return await ctx.step(body)

    driver = Driver(wf)
    driver.begin()
    driver.answer("body", 5)
    driver.machine.drop()
    machine, _ = driver.replayed()
    machine.drop()
    machine.drop()
    assert machine.outcome is not None


def test_a_dropped_machine_takes_nothing_more() -> None:
    """Delivering to a dropped machine is an error that says so."""

    @workflow
    async def wf(ctx: Context) -> None:
        await ctx.sleep(1)

    driver = dropped(wf)
    with pytest.raises(Exception, match="left memory"):
        driver.machine.deliver(driver.append(RUN, "cancelling", payload=PYTHON.encode()))


def test_no_task_is_left_to_the_collector(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture) -> None:
    """After a drop the collector finds no pending task, no unretrieved error and no coroutine that never ran."""

    @workflow
    async def wf(ctx: Context) -> None:
        async def fails() -> None:
            raise ValueError("nobody asks")

        asyncio.create_task(fails())
        asyncio.create_task(asyncio.sleep(50))
        await asyncio.gather(ctx.step(body), ctx.step(body), asyncio.sleep(9))

    for _ in range(20):
        dropped(wf)
    gc.collect()
    assert [str(w.message) for w in recwarn] == []
    assert "destroyed" not in caplog.text
    assert "never retrieved" not in caplog.text
