"""The worker end that all brokers' transports share: who is meant by a cancel, and what becomes of the message then."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from durable.protocol.messages import Answer, Task
from durable.testing.facts import eventually
from durable.testing.suites.transport import ECHO, Gate, answer, task
from durable.transports.serving import Workbench


class Message:
    """One delivery, and what was done with it."""

    def __init__(self) -> None:
        self.fate: list[Any] = []

    async def done(self, result: Answer | None) -> None:
        await asyncio.sleep(0)  # a cancel that is still about would strike here
        self.fate.append(result)

    async def back(self) -> None:
        await asyncio.sleep(0)
        self.fate.append("back")


def begun(handler: Callable[[Task], Awaitable[Answer]]) -> tuple[Workbench, Message]:
    bench, message = Workbench(max_message=1 << 20), Message()
    bench.begin(bench.add([ECHO], handler, 1), task("r"), message.done, message.back)
    return bench, message


async def test_a_cancelled_task_is_acknowledged_and_not_answered() -> None:
    """Nobody waits for an answer; the message is done with."""
    gate = Gate()
    bench, message = begun(gate.handle)
    await eventually(lambda: gate.started, "it is under way")
    bench.cancel("another:0")
    bench.cancel("r:0")
    await eventually(lambda: message.fate == [None], "acknowledged without an answer")
    assert gate.cancelled == ["r:0"]
    assert bench.servers[0].room == 1


async def test_a_handler_that_answers_although_it_was_cancelled_is_heard() -> None:
    """It may have cleaned up and know better; its answer is sent like any other."""
    under_way = asyncio.Event()

    async def stubborn(given: Task) -> Answer:
        under_way.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return answer(given, "after all")

    bench, message = begun(stubborn)
    await under_way.wait()
    bench.cancel_run("r")
    await eventually(lambda: message.fate, "it was answered")
    assert message.fate == [answer(task("r"), "after all")]


async def test_a_handler_that_cancels_itself_has_failed() -> None:
    """A cancellation that nobody asked for is a failure like any other, retryable."""

    async def confused(given: Task) -> Answer:
        raise asyncio.CancelledError("by my own hand")

    _, message = begun(confused)
    await eventually(lambda: message.fate, "it was answered")
    assert message.fate[0].status == "failed"
    assert message.fate[0].error.retryable


async def test_what_is_cut_short_by_closing_is_given_back() -> None:
    """After its time is up the handler is cancelled, and the message goes back; one that ends in time is answered."""
    gate = Gate()
    bench, message = begun(gate.handle)
    await eventually(lambda: gate.started, "it is under way")
    await bench.drain(0.02)
    assert (gate.cancelled, message.fate) == (["r:0"], ["back"])
    gate = Gate()
    bench, message = begun(gate.handle)
    await eventually(lambda: gate.started, "it is under way")
    asyncio.get_running_loop().call_later(0.02, gate.open)
    await bench.drain(5)
    assert message.fate == [answer(task("r"))]


async def test_work_that_is_called_for_is_cancelled_and_its_caller_is_not() -> None:
    """An adapter whose client calls back goes on after a cancel; a client that gives up takes the handler with it."""
    gate = Gate()
    bench = Workbench(max_message=1 << 20)
    server = bench.add([ECHO], gate.handle, 1)
    caller = asyncio.create_task(bench.work(server, task("r")))
    await eventually(lambda: gate.started, "it is under way")
    bench.cancel("r:0")
    assert await caller is None
    caller = asyncio.create_task(bench.work(server, task("s")))
    await eventually(lambda: len(gate.started) == 2, "the next one is under way")
    caller.cancel()
    await asyncio.wait({caller})
    assert caller.cancelled()
    assert gate.cancelled == ["r:0", "s:0"]
