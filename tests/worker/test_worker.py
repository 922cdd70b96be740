"""`Worker` in code: what it serves, answers, hands to bodies, and how it ends. Over one in-process transport: its peers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from durable import (
    Context,
    DurableError,
    NonRetryable,
    RetryAfter,
    RetryPolicy,
    StepCancelled,
    StepFailed,
    Worker,
    current_step,
    durable_step,
    remote_workflow,
    workflow,
)
from durable.control_plane.local import LocalControlPlane
from durable.core.errors import DefinitionError
from durable.protocol.messages import Answer, ControlMessage, RemoteTask, StepResult, routing_token, step_id
from durable.testing.facts import eventually
from durable.transports.event_emitter import EventEmitterTransport
from durable.worker.worker import Done
from tests.engine.world import Gate, World, memory_factory


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World(memory_factory(), "memory", False)
    yield made
    await made.close()


def task(name: str, seq: int = 0, attempt: int = 1, input: Any = None, **fields: Any) -> RemoteTask:
    return RemoteTask(
        run_id="r",
        seq=seq,
        step_id=step_id("r", seq),
        name=name,
        group=routing_token(name),
        input=msgspec.Raw(msgspec.json.encode(input)),
        attempt=attempt,
        **fields,
    )


class Engine:
    """An engine's end that remembers what was answered."""

    def __init__(self, transport: EventEmitterTransport) -> None:
        self.transport = transport
        self.answers: list[StepResult] = []

    async def __aenter__(self) -> Engine:
        await self.transport.start()
        self.transport.on_result(self._take)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.transport.close(0)

    async def _take(self, answer: Answer) -> None:
        assert isinstance(answer, StepResult)
        self.answers.append(answer)

    async def send(self, *tasks: RemoteTask) -> None:
        for one in tasks:
            await self.transport.dispatch(one)

    async def answered(self, count: int) -> StepResult:
        await eventually(lambda: len(self.answers) >= count, f"{count} answers came")
        return self.answers[count - 1]


@durable_step("double")
async def double(n: int) -> int:
    return 2 * n


async def test_a_worker_serves_a_workflow_that_runs_elsewhere(world: World) -> None:
    """Steps by name, functions and methods of an object; the engine has none of them."""

    class Shelf:
        def __init__(self, first: int) -> None:
            self.first = first

        @durable_step("shelf.next")
        def next(self, n: int) -> int:
            return self.first + n

    @workflow(name="both")
    async def both(ctx: Context) -> list[Any]:
        return [await ctx.remote("double", 4), await ctx.remote("shelf.next", 1)]

    transport = EventEmitterTransport()
    async with Worker([double, Shelf(40)], transport=transport) as worker:
        app = await world.engine(both, transport=transport.peer())
        assert await (await app.start(both)).result(10) == [8, 41]
        assert sorted(worker.groups) == ["double", "shelf.next"]
        assert worker.counts == {"completed": 2}
        assert worker.under_way == 0
    await worker.close()


async def test_a_worker_hosts_workflows_beside_its_steps(world: World) -> None:
    """Turns and steps come to one worker; the engine has neither code."""

    @workflow(name="hosted")
    async def hosted(ctx: Context, n: int) -> Any:
        return await ctx.remote("double", n)

    transport = EventEmitterTransport()
    async with Worker([double], workflows=[hosted], transport=transport) as worker:
        app = await world.engine(remote_workflow("hosted", turn_timeout="30s"), transport=transport.peer())
        assert await (await app.start("hosted", 21)).result(10) == 42
        assert sorted(worker.groups) == ["double", "hosted"]
        assert worker.counts["completed"] == 3  # two turns and a step


async def test_what_cannot_be_a_worker_is_said() -> None:
    """No transport, two ways to give one, nothing to serve, a method without its object, started twice."""

    class Shelf:
        @durable_step("lone")
        def lone(self) -> None: ...

    emitter = EventEmitterTransport()
    with pytest.raises(DefinitionError, match="A worker needs a transport"):
        Worker([double])
    with pytest.raises(DefinitionError, match="not both"):
        Worker([double], transport=emitter, transports={"a": emitter})
    with pytest.raises(DefinitionError, match="no steps to serve: put @durable_step"):
        await Worker([], transport=emitter).start()
    with pytest.raises(DefinitionError, match="lone are methods that no instance was given for"):
        await Worker([Shelf.lone], transport=emitter).start()
    async with Worker([double], transport=emitter) as worker:
        with pytest.raises(DurableError, match="running already"):
            await worker.start()


async def test_a_worker_of_a_partition_serves_that_group_only() -> None:
    """Its names all bear the partition."""
    worker = Worker([double], transport=EventEmitterTransport(), partition="gpu")
    assert worker.groups == ["double@gpu"]


async def test_N16_what_a_body_raises_decides_what_is_tried_again(world: World) -> None:
    """NonRetryable ends it, RetryAfter says when, a step's own timeout fails the attempt: from a worker as from here."""
    tries: list[str] = []
    times: list[float] = []

    @durable_step("final")
    async def final() -> None:
        tries.append("final")
        raise NonRetryable("no such account")

    @durable_step("later")
    async def later() -> int:
        tries.append("later")
        times.append(asyncio.get_running_loop().time())
        if len(times) == 1:
            raise RetryAfter("busy", seconds=0.2)
        return current_step().attempt

    @durable_step("slow", timeout=0.05)
    async def slow() -> None:
        tries.append("slow")
        await asyncio.Event().wait()

    patient = RetryPolicy(max_attempts=3, initial_delay=0.0, jitter=0.0)

    @workflow(name="tries")
    async def tried(ctx: Context) -> list[Any]:
        found: list[Any] = []
        for name in ("final", "slow"):
            try:
                await ctx.remote(name, None, retries=patient if name == "final" else 0)
            except StepFailed as error:
                assert error.error is not None
                found.append((error.error.code, error.error.retryable))
        return [*found, await ctx.remote("later", None, retries=patient)]

    transport = EventEmitterTransport()
    async with Worker([final, later, slow], transport=transport) as worker:
        app = await world.engine(tried, transport=transport.peer())
        assert await (await app.start(tried)).result(10) == [["non_retryable", False], ["step_timeout", True], 2]
        assert tries == ["final", "slow", "later", "later"]
        assert times[1] - times[0] >= 0.2
        assert worker.counts == {"failed": 3, "completed": 1}


async def test_a_body_is_handed_what_came_with_its_task() -> None:
    """Idempotency key, attempt, trace and context."""

    @durable_step("look")
    async def look() -> list[Any]:
        step = current_step()
        return [step.idempotency_key, step.attempt, step.traceparent, step.context]

    transport = EventEmitterTransport()
    async with Engine(transport) as engine, Worker([look], transport=transport.peer()):
        await engine.send(task("look", attempt=3, traceparent="00-a-b-01", context={"tenant": "t"}))
        answer = await engine.answered(1)
        assert isinstance(answer.output, msgspec.Raw)
        assert msgspec.json.decode(answer.output) == ["r:0", 3, "00-a-b-01", {"tenant": "t"}]


# -- S11


async def test_S11_an_attempt_that_comes_again_is_answered_and_not_run_again() -> None:
    """(S11) Its answer got lost: the same one is given; another attempt runs. With `dedupe=0` the body runs each time."""
    runs: list[int] = []

    @durable_step("count")
    async def count() -> int:
        runs.append(current_step().attempt)
        return len(runs)

    done: list[Done] = []
    transport = EventEmitterTransport()
    async with Engine(transport) as engine:
        async with Worker([count], transport=transport.peer(), on_done=done.append) as worker:
            for number, attempt in enumerate((1, 1, 2), 1):
                await engine.send(task("count", attempt=attempt))
                await engine.answered(number)
            assert [bytes(answer.output) for answer in engine.answers] == [b"1", b"1", b"2"]  # type: ignore[arg-type]
            assert (runs, worker.counts) == ([1, 2], {"completed": 2, "repeated": 1})
            assert [one.outcome for one in done] == ["completed", "repeated", "completed"]
        async with Worker([count], transport=transport.peer(), dedupe=0):
            for number in (4, 5):
                await engine.send(task("count", attempt=2))
                await engine.answered(number)
            assert runs == [1, 2, 2, 2]


async def test_S11_a_second_delivery_waits_for_the_first() -> None:
    """(S11) The same attempt over two transports at once: one body, two answers."""
    gate = Gate()

    @durable_step("once")
    async def once() -> int:
        return await gate()

    a, b = EventEmitterTransport(name="a"), EventEmitterTransport(name="b")
    worker = Worker([once], transports={"a": a.peer(), "b": b.peer()})
    async with Engine(a) as over_a, Engine(b) as over_b, worker:
        await over_a.send(task("once"))
        await gate.reached()
        await over_b.send(task("once"))
        await asyncio.sleep(0)
        gate.open()
        assert (await over_a.answered(1)).output == (await over_b.answered(1)).output
        assert (gate.came, worker.counts) == (1, {"completed": 1, "repeated": 1})


async def test_S11_the_second_delivery_runs_when_the_first_was_cut_short() -> None:
    """(S11) Cancelled by its transport, the first gives no answer; who waits for it does the work."""
    gate = Gate()

    @durable_step("once")
    async def once() -> int:
        return await gate()

    a, b = EventEmitterTransport(name="a"), EventEmitterTransport(name="b")
    worker = Worker([once], transports={"a": a.peer(), "b": b.peer()})
    async with Engine(a) as over_a, Engine(b) as over_b, worker:
        await over_a.send(task("once"))
        await gate.reached()
        await over_b.send(task("once"))
        await over_a.transport.cancel("r:0")
        await eventually(lambda: gate.came == 2, "it runs for the second")
        gate.open()
        assert (await over_b.answered(1)).status == "completed"
        assert over_a.answers == []


# -- cancels


async def test_a_control_plane_reaches_bodies_where_the_transport_cannot() -> None:
    """`cancel` of a run and `step.cancel` of one task: an async body gets CancelledError, a plain one sees it, and the task
    is answered as failed, retryable: who still waits for it is not left alone. Other runs and later attempts go on."""
    gate, seen = Gate(), threading.Event()
    looping = threading.Event()

    @durable_step("waits")
    async def waits() -> int:
        return await gate()

    @durable_step("loops")
    def loops() -> None:
        step = current_step()
        looping.set()
        while not step.cancelled:
            seen.wait(0.001)
        try:
            step.raise_if_cancelled()
        except StepCancelled:
            seen.set()
            raise

    def say(**event: Any) -> ControlMessage:
        return ControlMessage(sender="engine", kind="event", event={"type": "step.cancel", "runId": "r", **event})

    transport, plane = EventEmitterTransport(), LocalControlPlane()
    engine_plane = plane.peer()
    await engine_plane.start()
    async with Engine(transport) as engine:
        async with Worker([waits, loops], transport=transport.peer(), control_plane=plane) as worker:
            await engine.send(task("waits", 0, attempt=2), task("loops", 1))
            await eventually(lambda: gate.came == 1 and looping.is_set(), "both are under way")
            for message in (
                ControlMessage(sender="engine", kind="cancel", run_id="another"),
                say(stepId="r:0", attempt=1, at=1),
                say(stepId="r:7", at=1),
            ):
                await engine_plane.publish_control(message)
            await engine_plane.publish_control(say(stepId="r:1", attempt=1, at=1))
            first = await engine.answered(1)
            assert first.error is not None
            assert (first.step_id, first.error.code, first.error.retryable) == ("r:1", "step_cancelled", True)
            await eventually(seen.is_set, "the thread has seen it")
            assert (gate.cancelled, worker.under_way) == (0, 1)
            await engine_plane.publish_control(ControlMessage(sender="engine", kind="cancel", run_id="r"))
            assert (await engine.answered(2)).step_id == "r:0"
            assert (gate.cancelled, worker.counts) == (1, {"cancelled": 2})
            # It was not an answer to remember: an engine that asks again has it run again.
            await engine.send(task("waits", 0, attempt=2))
            await eventually(lambda: gate.came == 2, "it runs again")
            gate.open()
            assert (await engine.answered(3)).status == "completed"
    await engine_plane.close()


async def test_a_plain_body_sees_its_timeout_and_the_end_of_its_worker() -> None:
    """`current_step().cancelled` is set when nobody waits for a thread any more, whatever the reason."""
    ends: list[str] = []

    def until_cancelled() -> None:
        step = current_step()
        while not step.cancelled:
            threading.Event().wait(0.001)
        ends.append(step.name)

    timed = durable_step("timed", timeout=0.02)(lambda: until_cancelled())
    drained = durable_step("drained")(lambda: until_cancelled())
    transport = EventEmitterTransport()
    async with Engine(transport) as engine:
        worker = Worker([timed, drained], transport=transport.peer(), drain_timeout=0.01)
        async with worker:
            await engine.send(task("timed", 0), task("drained", 1))
            assert (await engine.answered(1)).error.code == "step_timeout"  # type: ignore[union-attr]
            await eventually(lambda: ends == ["timed"], "it has seen its timeout")
        await eventually(lambda: ends == ["timed", "drained"], "it has seen the drain")
        assert worker.counts == {"failed": 1, "given_back": 1}


# -- the end


async def test_a_drain_finishes_what_is_under_way_and_gives_the_rest_back() -> None:
    """What ends within the time is answered, what does not is taken by another worker, under the same attempt."""
    quick, never = Gate(), Gate()

    @durable_step("quick")
    async def quickly() -> int:
        return await quick()

    @durable_step("never")
    async def never_ends() -> int:
        return await never()

    transport = EventEmitterTransport()
    async with Engine(transport) as engine:
        worker = Worker([quickly, never_ends], transport=transport.peer(), drain_timeout=0.3)
        await worker.start()
        await engine.send(task("quick", 0), task("never", 1))
        await eventually(lambda: quick.came + never.came == 2, "both are under way")
        closing = asyncio.create_task(worker.close())
        await eventually(lambda: not transport._shelf.servers, "it takes nothing more")
        await engine.send(task("quick", 2))
        quick.open()
        await closing
        assert [answer.step_id for answer in engine.answers] == ["r:0"]
        assert worker.counts == {"completed": 1, "given_back": 1}
        async with Worker([quickly, never_ends], transport=transport.peer()):
            never.open()
            await engine.answered(3)
            assert sorted(answer.step_id for answer in engine.answers) == ["r:0", "r:1", "r:2"]
            assert {answer.attempt for answer in engine.answers} == {1}


async def test_a_worker_may_run_again_after_it_was_closed() -> None:
    """`start` after `close` serves anew."""
    transport = EventEmitterTransport()
    worker = Worker([double], transport=transport.peer())
    async with Engine(transport) as engine:
        for number in (1, 2):
            async with worker:
                await engine.send(task("double", number, input=number))
                await engine.answered(number)
