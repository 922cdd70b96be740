"""Each private thing of asyncio that the workflow loop relies on, on every Python at hand.

If one of these breaks, so does replay.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from asyncio import events, tasks
from typing import Any

import pytest

from durable.core import loop as ours
from durable.core.errors import ForeignAwait


class Bare(asyncio.AbstractEventLoop):
    """Remembers what is scheduled."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def get_debug(self) -> bool:
        return False

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        self.calls.append((callback, args))

    def step(self) -> None:
        """Run the oldest call with this loop as the running one."""
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            callback, args = self.calls.pop(0)
            callback(*args)
        finally:
            events._set_running_loop(before)


def silent(coro: Any, loop: Any) -> Any:
    task: Any = asyncio.Task(coro, loop=loop)
    task._log_destroy_pending = False
    return task


async def nap() -> None:
    await asyncio.sleep(0)


async def wait(future: Any) -> Any:
    return await future


def test_tasks_are_the_ones_in_c() -> None:
    """`asyncio.Task` is the C one: the Python one schedules its steps differently."""
    assert asyncio.Task.__module__ == "_asyncio"
    assert asyncio.Future.__module__ == "_asyncio"


def test_a_step_is_a_wrapper_of_one_class() -> None:
    """Tasks schedule their steps as instances of one class, which holds the task and no exception."""
    loop = Bare()
    task = silent(nap(), loop)
    step, args = loop.calls[0]
    assert type(step) is ours._StepWrapper
    assert args == ()
    held = [one for one in gc.get_referents(step) if not isinstance(one, type)]
    assert held == [task]
    loop.step()
    assert type(loop.calls[0][0]) is ours._StepWrapper, "sleep(0) schedules the next one"
    assert ours._refusal_in(loop.calls[0][0]) is None
    loop.step()
    assert task.done()


def test_a_refusal_is_a_step_that_holds_an_exception() -> None:
    """When a task awaits a future of another loop, its next step holds the RuntimeError that will be thrown."""
    loop = Bare()
    task = silent(wait(asyncio.Future(loop=Bare())), loop)
    loop.step()
    refusal = ours._refusal_in(loop.calls[0][0])
    assert isinstance(refusal, RuntimeError)
    assert "different loop" in str(refusal)
    loop.step()
    assert isinstance(task.exception(), RuntimeError)


def test_a_bad_yield_is_a_refusal_too() -> None:
    """What yields neither None nor a future (trio, curio) is refused in the same way."""

    class Trap:
        def __await__(self) -> Any:
            yield "trap"

    loop = Bare()
    task = silent(wait(Trap()), loop)
    loop.step()
    assert isinstance(ours._refusal_in(loop.calls[0][0]), RuntimeError)
    loop.step()
    assert task.exception()


def test_cancelling_is_no_refusal() -> None:
    """A cancelled task's next step carries no RuntimeError."""
    loop = Bare()
    future = asyncio.Future(loop=loop)
    task = silent(wait(future), loop)
    loop.step()
    task.cancel()
    assert ours._refusal_in(loop.calls[0][0]) is None
    loop.step()
    assert task.cancelled()


def test_cancel_of_a_subclass_is_called() -> None:
    """Task.cancel() calls the `cancel` of what the task waits for, also where that is a subclass's."""
    heard = []

    class Loud(asyncio.Future[Any]):
        def cancel(self, msg: Any = None) -> bool:
            heard.append(self)
            return super().cancel(msg)

    loop = Bare()
    future = Loud(loop=loop)
    task = silent(wait(future), loop)
    loop.step()
    task.cancel()
    assert heard == [future]


def test_running_loop_can_be_switched() -> None:
    """`_set_running_loop` and `_get_running_loop` exist, and asyncio believes them."""
    loop = Bare()
    assert events._get_running_loop() is None
    events._set_running_loop(loop)
    try:
        assert asyncio.get_running_loop() is loop
    finally:
        events._set_running_loop(None)


def test_current_task_can_be_entered() -> None:
    """`_enter_task` and `_leave_task` set the current task while a coroutine is unwound by hand."""
    loop = Bare()
    task = silent(nap(), loop)
    events._set_running_loop(loop)
    try:
        tasks._enter_task(loop, task)
        assert asyncio.current_task() is task
        tasks._leave_task(loop, task)
        assert asyncio.current_task() is None
    finally:
        events._set_running_loop(None)
    task.get_coro().close()


@pytest.mark.skipif(sys.version_info < (3, 14), reason="one current task per thread only from 3.14 on")
async def test_current_task_can_be_swapped() -> None:
    """`_swap_current_task` takes the outer task away and puts it back."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert tasks._swap_current_task(loop, None) is task
    tasks._swap_current_task(loop, task)
    assert asyncio.current_task() is task


def test_unretrieved_errors_can_be_asked_for() -> None:
    """`_log_traceback` says whether anybody has asked for an error, and can be cleared."""
    loop = Bare()
    future: Any = asyncio.Future(loop=loop)
    future.set_exception(ValueError())
    assert future._log_traceback is True
    future._log_traceback = False
    assert future._log_traceback is False
    task: Any = asyncio.Task(wait(future), loop=loop)
    loop.step()
    assert task._log_traceback is True
    task.exception()
    assert task._log_traceback is False


def test_handles_have_the_slots_we_fill() -> None:
    """Handle and TimerHandle keep callback, arguments, context and cancellation under these names."""
    slots = {*asyncio.Handle.__slots__, *asyncio.TimerHandle.__slots__}
    assert {"_callback", "_args", "_context", "_cancelled"} <= slots


def test_as_completed_makes_its_tasks_by_ensure_future() -> None:
    """as_completed over coroutines reaches create_task by ensure_future, from a frame we recognise."""
    run = ours.Loop()
    caught: list[BaseException] = []

    async def main() -> None:
        coro = nap()
        try:
            for soon in asyncio.as_completed([coro]):
                await soon
        except Exception as error:
            caught.append(error)

    def begin() -> None:
        run.create_task(main())

    run.turn(begin)
    assert "address" in str(caught[0])
    run.drop()


def test_every_other_method_of_a_loop_is_refused() -> None:
    """Whatever a loop can do and ours does not define raises ForeignAwait, also what a newer Python adds."""
    for name in dir(asyncio.AbstractEventLoop):
        if name.startswith("_") or ours.Loop.__dict__[name].__name__ != name or name in OURS:
            continue
        run = ours.Loop()
        with pytest.raises(ForeignAwait, match=name):
            getattr(run, name)()


OURS = {
    "call_soon", "call_later", "call_at", "time", "create_future", "create_task", "get_debug", "is_running", "is_closed",
    "call_exception_handler",
}  # fmt: skip
