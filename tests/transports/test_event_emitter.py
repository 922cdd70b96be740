"""What the event emitter promises beyond the contract: exact counts, fair shares, an order that virtual time fixes."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from durable.core.errors import EngineStopped
from durable.protocol.messages import RemoteTask, StepResult
from durable.testing.facts import eventually
from durable.testing.suites.transport import ECHO, Gate, Results, answer, echo, task
from durable.transports.event_emitter import EventEmitterTransport
from tests.transports.virtual_time import in_virtual_time


async def test_the_same_attempt_while_held_runs_once() -> None:
    """Dispatched again while it waits, while it runs and while its result is not taken, an attempt runs once."""
    emitter, gate, results = EventEmitterTransport(), Gate(), Results()
    taken = asyncio.Event()

    async def take(result: StepResult) -> None:
        await taken.wait()
        await results.take(result)

    emitter.on_result(take)
    await emitter.start()
    await emitter.serve([ECHO], gate.handle, concurrency=1)
    for name in ("first", "second"):
        await emitter.dispatch(task(name))
        await emitter.dispatch(task(name))
    await eventually(lambda: gate.started == ["first:0"])
    await emitter.dispatch(task("first"))
    gate.open()
    await eventually(lambda: len(gate.started) == 2)
    await emitter.dispatch(task("first"))
    taken.set()
    await eventually(lambda: len(results) == 2)
    await emitter.close()
    assert gate.started == ["first:0", "second:0"]
    assert len(results.heard) == 2


async def test_a_newer_attempt_replaces_a_waiting_one() -> None:
    """Of two attempts of one step in the queue only the newer runs."""
    emitter, gate, results = EventEmitterTransport(), Gate(), Results()
    emitter.on_result(results.take)
    await emitter.start()
    await emitter.serve([ECHO], gate.handle, concurrency=1)
    await emitter.dispatch(task("busy"))
    for attempt in (1, 2, 2):
        await emitter.dispatch(task("r", attempt=attempt))
    gate.open()
    await eventually(lambda: len(results) == 2)
    await emitter.close()
    assert [r.attempt for r in results.heard if r.run_id == "r"] == [2]


async def test_a_cancelled_attempt_asked_for_again_runs_again() -> None:
    """An attempt that is still unwinding after its cancel does not swallow a new request for the same attempt."""
    emitter, gate, results = EventEmitterTransport(), Gate(), Results()
    emitter.on_result(results.take)
    await emitter.start()
    await emitter.serve([ECHO], gate.handle)
    await emitter.dispatch(task("r"))
    await eventually(lambda: gate.started)
    await emitter.cancel("r:0")
    await emitter.dispatch(task("r"))
    gate.open()
    await eventually(lambda: "r:0" in results)
    assert gate.cancelled == ["r:0"]
    await eventually(lambda: not emitter._shelf.held)
    await emitter.close()


async def test_higher_priority_goes_first_and_equals_in_order() -> None:
    """Waiting tasks are taken by priority, then by arrival."""
    emitter, gate = EventEmitterTransport(), Gate()
    await emitter.start()
    emitter.on_result(Results().take)
    await emitter.serve([ECHO, "suite.other"], gate.handle, concurrency=1)
    await emitter.dispatch(task("busy"))
    for run, name, priority in (("a", ECHO, None), ("b", "suite.other", None), ("c", ECHO, 5), ("d", "suite.other", 9)):
        one = task(run, name=name)
        await emitter.dispatch(
            RemoteTask(**{f: getattr(one, f) for f in one.__struct_fields__} | {"priority": priority})
        )
    gate.open()
    await eventually(lambda: len(gate.started) == 5)
    await emitter.close()
    assert gate.started == ["busy:0", "d:0", "c:0", "a:0", "b:0"]


async def test_results_take_turns_and_skip_who_refuses() -> None:
    """Two engines on one instance share the results; what one refuses, the other takes at once."""
    emitter, first, second = EventEmitterTransport(), Results(), Results()
    stopped = False

    async def take_or_refuse(result: StepResult) -> None:
        if stopped:
            raise RuntimeError("this engine has stopped")
        await first.take(result)

    emitter.on_result(take_or_refuse)
    emitter.on_result(second.take)
    await emitter.start()
    await emitter.serve([ECHO], echo)
    for n in range(10):
        await emitter.dispatch(task(f"r{n}"))
    await eventually(lambda: len(first) + len(second) == 10)
    assert (len(first), len(second)) == (5, 5)
    stopped = True
    for n in range(10, 20):
        await emitter.dispatch(task(f"r{n}"))
    await eventually(lambda: len(second) == 15)
    await emitter.close()


async def test_the_last_close_of_a_shared_instance_counts() -> None:
    """Engines that share an instance each close it; it works until the last has."""
    emitter, results = EventEmitterTransport(), Results()
    emitter.on_result(results.take)
    await emitter.start()
    await emitter.start()
    await emitter.serve([ECHO], echo)
    await emitter.close()
    await emitter.dispatch(task("r"))
    await eventually(lambda: "r:0" in results)
    await emitter.close()
    assert await emitter.holding(["r:0"]) == []


async def test_what_a_closing_end_gave_up_runs_at_another() -> None:
    """A task cancelled because its worker end closed is worked on by the next end that serves it."""
    engine = EventEmitterTransport()
    first, second, gate, results = engine.peer(), engine.peer(), Gate(), Results()
    engine.on_result(results.take)
    for end in (engine, first, second):
        await end.start()
    await first.serve([ECHO], gate.handle)
    await engine.dispatch(task("r"))
    await eventually(lambda: gate.started)
    await first.close(0)
    assert gate.cancelled == ["r:0"]
    assert await engine.holding(["r:0"]) == ["r:0"]
    await second.serve([ECHO], echo)
    await eventually(lambda: "r:0" in results)
    await second.close()
    await engine.close()


async def test_a_handler_that_cancels_itself_is_a_failure() -> None:
    """CancelledError out of a handler nobody cancelled is answered, not lost."""

    async def handle(task: RemoteTask) -> StepResult:
        raise asyncio.CancelledError

    emitter, results = EventEmitterTransport(), Results()
    emitter.on_result(results.take)
    await emitter.start()
    await emitter.serve([ECHO], handle)
    await emitter.dispatch(task("r"))
    await eventually(lambda: "r:0" in results)
    await emitter.close()
    assert results["r:0"].error
    assert results["r:0"].error.retryable


async def test_too_large_an_output_is_a_final_failure() -> None:
    """An output beyond `max_message` is answered failed with what to do about it, not retryable."""

    async def handle(task: RemoteTask) -> StepResult:
        return answer(task, "x" * 2000)

    emitter, results = EventEmitterTransport(max_message=1000), Results()
    emitter.on_result(results.take)
    await emitter.start()
    await emitter.serve([ECHO], handle)
    await emitter.dispatch(task("r"))
    await eventually(lambda: "r:0" in results)
    await emitter.close()
    error = results["r:0"].error
    assert error
    assert (error.code, error.retryable) == ("payload_too_large", False)


def test_virtual_time_fixes_the_order() -> None:
    """Hours of work with heartbeats and redelivery take no time, and happen in the same order every time."""

    async def story() -> list[tuple[float, str]]:
        loop, lines, refusals = asyncio.get_running_loop(), list[tuple[float, str]](), [3]

        def tell(line: str) -> None:
            lines.append((round(loop.time(), 3), line))

        async def handle(task: RemoteTask) -> StepResult:
            tell(f"begin {task.run_id}")
            await asyncio.sleep(600 * (1 + task.attempt))
            return answer(task)

        async def take(result: StepResult) -> None:
            if refusals[0]:
                refusals[0] -= 1
                raise ConnectionError
            tell(f"result {result.run_id}")

        emitter = EventEmitterTransport(heartbeat_interval=300)
        emitter.on_result(take)
        emitter.on_heartbeat(lambda beat: tell(f"beat {beat.run_id}"))
        await emitter.start()
        await emitter.serve([ECHO], handle, concurrency=2)
        for n in range(5):
            await emitter.dispatch(task(f"r{n}", attempt=n + 1))
        ids = [f"r{n}:0" for n in range(5)]
        while await emitter.holding(ids):
            await asyncio.sleep(60)
        await emitter.close()
        return lines

    told = in_virtual_time(story)
    assert isinstance(told, list)
    assert told == in_virtual_time(story)
    assert told[0] == (0.0, "begin r0")
    assert sum(line.startswith("result") for _, line in told) == 5
    assert told[-1][0] > 3600


async def test_close_is_bounded_although_nobody_takes_the_result() -> None:
    """A result that no engine can make durable does not keep `close` longer than its timeout, and leaves nothing behind."""

    async def refuse(result: StepResult) -> None:
        raise ConnectionError("the store is away")

    emitter = EventEmitterTransport()
    emitter.on_result(refuse)
    await emitter.start()
    await emitter.serve([ECHO], echo)
    await emitter.dispatch(task("r"))
    await emitter.reply(answer(task("by hand")))
    await emitter.close(0.05)
    assert await emitter.holding(["r:0"]) == []
    assert [t for t in asyncio.all_tasks() if t.get_name().startswith(("step", "reply"))] == []


async def test_close_does_not_wait_for_an_engine_that_has_stopped() -> None:
    """A result nobody is left to take ends `close` as soon as the work is done, not at its timeout."""

    async def stopped(result: StepResult) -> None:
        raise EngineStopped("stopped")

    emitter = EventEmitterTransport()
    emitter.on_result(stopped)
    await emitter.start()
    await emitter.serve([ECHO], echo)
    await emitter.dispatch(task("r"))
    await asyncio.wait_for(emitter.close(3600), timeout=30)


async def test_a_handler_that_refuses_to_end_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that swallows its cancellation holds `close` up for a bounded moment, and its name is logged."""
    release = asyncio.Event()

    async def stubborn(task: RemoteTask) -> StepResult:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
        return answer(task)

    emitter, results = EventEmitterTransport(), Results()
    emitter.on_result(results.take)
    await emitter.start()
    await emitter.serve([ECHO], stubborn)
    await emitter.dispatch(task("r"))
    await asyncio.sleep(0)
    await emitter.close(0)
    assert "step r:0 went on after it was cancelled" in caplog.text
    release.set()
    await eventually(lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "step r:0"])
    await emitter.start()
    assert await emitter.holding(["r:0"]) == []
    await emitter.close()


async def test_cancelling_a_waiting_task_takes_it_back() -> None:
    """A task cancelled before anybody began it never runs, and is no longer held."""
    emitter, gate, results = EventEmitterTransport(), Gate(), Results()
    emitter.on_result(results.take)
    await emitter.start()
    await emitter.serve([ECHO], gate.handle, concurrency=1)
    for name in ("busy", "unwanted", "next"):
        await emitter.dispatch(task(name))
    await emitter.cancel("unwanted:0")
    assert await emitter.holding(["unwanted:0"]) == []
    gate.open()
    await eventually(lambda: len(results) == 2)
    await emitter.close()
    assert gate.started == ["busy:0", "next:0"]


def test_a_loop_that_is_torn_down_begins_no_body_again() -> None:
    """What nobody closed is cancelled by the end of its loop: not begun once more, and neither is what waited."""
    gate = Gate()

    async def killed() -> None:
        emitter = EventEmitterTransport()
        await emitter.start()
        await emitter.serve([ECHO], gate.handle, concurrency=1)
        await emitter.dispatch(task("first"))
        await emitter.dispatch(task("second"))
        await eventually(lambda: gate.started)

    asyncio.run(killed())
    assert gate.started == gate.cancelled == ["first:0"]


async def test_a_body_that_cancels_its_own_task_holds_up_nobody() -> None:
    """The loop goes on, so what waited behind it gets its turn, and it itself is tried again."""
    emitter, results, tried = EventEmitterTransport(), Results(), []

    async def handle(one: RemoteTask) -> StepResult:
        tried.append(one.run_id)
        current = asyncio.current_task()
        if tried == ["odd"] and current is not None:
            current.cancel()
            await asyncio.sleep(0)
        return answer(one)

    emitter.on_result(results.take)
    await emitter.start()
    await emitter.serve([ECHO], handle, concurrency=1)
    await emitter.dispatch(task("odd"))
    await emitter.dispatch(task("next"))
    await eventually(lambda: len(results) == 2)
    await emitter.close()
    assert sorted(tried) == ["next", "odd", "odd"]


async def test_one_instance_has_an_end_for_each_engine() -> None:
    """Closing an engine's end takes its handlers and servers along, and what is under way there; the others go on."""
    emitter, first, second, gate = EventEmitterTransport(), Results(), Results(), Gate()
    ends = emitter.end(), emitter.end()
    assert ends[0] is emitter
    assert ends[1] is not emitter
    for end, results, handle in ((ends[0], first, gate.handle), (ends[1], second, echo)):
        end.on_result(results.take)
        end.on_heartbeat(lambda beat: None)
        await end.start()
        await end.serve([ECHO], handle)
    await ends[0].close()
    shelf = emitter._shelf
    assert [end for end, _ in shelf.listeners] == [end for end, _ in shelf.heartbeat_listeners] == [ends[1]]
    assert [server.end for server in shelf.servers] == [ends[1]]
    for n in range(4):
        await ends[1].dispatch(task(f"r{n}"))
    await eventually(lambda: len(second) == 4)
    await ends[1].close()
    assert not shelf.listeners
    assert emitter.end() is emitter
