"""The worker end that all brokers' transports share: who is meant by a cancel, and what becomes of the message then."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from durable.protocol.messages import Answer, ControlMessage, StepResult, Task, WorkflowTask
from durable.testing.facts import eventually
from durable.testing.suites.transport import ECHO, TURN, Gate, answer, task
from durable.transports.answers import given_up
from durable.transports.serving import Cut, Workbench


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


async def test_a_cancel_of_one_attempt_spares_the_next() -> None:
    """`step.cancel` with an attempt means that one and those before it: the next attempt, under way already, goes on."""
    gate = Gate()
    bench, messages = Workbench(max_message=1 << 20), [Message(), Message()]
    server = bench.add([ECHO], gate.handle, 2)
    for number, message in enumerate(messages, 1):
        bench.begin(server, task("r", attempt=number), message.done, message.back)
    await eventually(lambda: len(gate.started) == 2, "both are under way")
    event = {"type": "step.cancel", "runId": "r", "stepId": "r:0", "attempt": 1, "at": 0}
    bench.hear(ControlMessage(sender="engine", kind="event", event=event))
    await eventually(lambda: messages[0].fate == [None], "the first is over")
    gate.open()
    await eventually(lambda: messages[1].fate != [], "the second is answered")
    assert gate.cancelled == ["r:0"]
    assert isinstance(messages[1].fate[0], StepResult)


@pytest.mark.parametrize(("why", "fate"), [(Cut.DROPPED, None), (Cut.RELEASED, "back")])
async def test_one_delivery_is_cut_short_alone(why: Cut, fate: str | None) -> None:
    """Another delivery of the same task goes on; what becomes of the message is said by whoever cuts."""
    gate = Gate()
    bench, messages, tasks = Workbench(max_message=1 << 20), [Message(), Message()], [task("r"), task("r")]
    server = bench.add([ECHO], gate.handle, 2)
    for given, message in zip(tasks, messages, strict=True):
        bench.begin(server, given, message.done, message.back)
    await eventually(lambda: len(gate.started) == 2, "both are under way")
    bench.cut(tasks[0], why)
    await eventually(lambda: messages[0].fate == [fate], "the first is over")
    assert messages[1].fate == []
    gate.open()
    await eventually(lambda: messages[1].fate != [], "the second is answered")


@pytest.mark.parametrize("given", [task("r"), msgspec.json.decode(TURN, type=WorkflowTask)], ids=["step", "turn"])
def test_a_task_that_is_given_up_is_answered_whatever_it_is(given: Task) -> None:
    """A step's task and a hosted workflow's turn both get `worker_failed`, retryable: another attempt may do better."""
    answered = given_up(given, "it died")
    assert answered.error is not None
    assert (answered.id, answered.error.code, answered.error.retryable) == (given.id, "worker_failed", True)
