"""What bodies on workers tell of themselves: seen live, written once (R6), bounded, and nobody else's word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from durable import Context, Durable, RetryPolicy, Worker, current_step, durable_step, workflow
from durable.control_plane.local import LocalControlPlane
from durable.core.errors import ErrorData, PayloadError
from durable.core.journal import LOG, Entry
from durable.protocol.codec import MAX_EVENTS
from durable.protocol.messages import ControlMessage, RemoteTask, StepEvent, StepResult
from durable.testing.facts import eventually
from durable.transports.event_emitter import EventEmitterTransport
from durable.worker import lines as worker_lines
from durable.worker.lines import Lines, step_progress
from tests.engine.broker import Broker
from tests.engine.test_control_plane import Spy
from tests.engine.world import Gate, World, memory_factory


@pytest.fixture(params=["hot", "cold"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """Cold: the run leaves memory as soon as its task is out."""
    made = World(memory_factory(), "memory", request.param == "cold")
    yield made
    await made.close()


@pytest.fixture
async def hot_world() -> AsyncIterator[World]:
    """The run stays where it is."""
    made = World(memory_factory(), "memory", False)
    yield made
    await made.close()


def told(entries: list[Entry]) -> list[tuple[str | None, int, int | None, str, dict[str, Any]]]:
    """Lines: key, attempt, index, text, fields."""
    return [
        (entry.key, entry.attempt, entry.ordinal, payload["message"], payload["fields"])
        for entry in entries
        if entry.kind == LOG and (payload := msgspec.json.decode(entry.payload or b""))
    ]


@workflow(name="asks")
async def asks(ctx: Context) -> Any:
    return await ctx.remote("talks", None, retries=RetryPolicy(max_attempts=2, initial_delay=0.0, jitter=0.0))


async def test_X8_lines_of_a_body_under_way_are_seen_by_watchers_of_another_engine(world: World) -> None:
    """Live, before the step has ended, in order and as rows; with the result nothing is written twice."""
    gate = Gate()

    @durable_step("talks")
    async def talks() -> str:
        step = current_step()
        step.log("begun", n=1)
        step.progress(0.5, who="me")
        await gate()
        step.log("nearly done", level="warning")
        return "done"

    transport, plane = EventEmitterTransport(), LocalControlPlane()
    async with Worker([talks], transport=transport, control_plane=plane.peer()):
        app = await world.engine(asks, transport=transport.peer(), control_plane=plane.peer())
        looker = await world.engine(asks, control_plane=plane.peer(), worker=False, poll_every=30)
        run = await app.start(asks)
        seen: list[Entry] = []

        async def watch() -> None:
            async for entry in looker.watch(run.id):
                seen.append(entry)

        watching = asyncio.create_task(watch())
        live = [("talks", 1, 0, "begun", {"n": 1}), ("talks", 1, 1, "50%", {"progress": 0.5, "who": "me"})]
        await eventually(lambda: told(seen) == live, "both lines are seen while the body works")
        assert gate.came == 1
        gate.open()
        assert await run.result(10) == "done"
        async with asyncio.timeout(10):
            await watching
        assert told(seen) == [*live, ("talks", 1, 2, "nearly done", {})]
        assert [entry.seq for entry in seen] == list(range(1, len(seen) + 1))
    await world.sound(run.id)


async def test_X8_lines_of_a_remote_step_served_beside_the_engine_are_seen_live_too(world: World) -> None:
    """No worker, no other engine: `ctx.remote` over the default transport. A body that is quick tells with its result."""
    gate = Gate()

    @durable_step("talks")
    async def talks() -> None:
        current_step().log("begun")
        await gate()

    app = await world.engine(asks, talks)
    run = await app.start(asks)
    await until_told(world, run.id, 1)
    gate.open()
    await run.result(10)
    assert [line[:4] for line in told(await world.journal(run.id))] == [("talks", 1, 0, "begun")]
    await world.sound(run.id)


async def test_R6_lines_told_live_are_not_written_again_by_the_next_owner(world: World) -> None:
    """The run changes owner between a live line and the result: the journal says which lines are there."""
    broker, plane = Broker(), LocalControlPlane()
    stranger = plane.peer()
    await stranger.start()
    settings: dict[str, Any] = {"control_plane": plane, "ask_every": 600}
    first = await world.engine(asks, transport=broker.end(), **settings)
    stranger.on_control("worker", lambda message: None)
    run = await first.start(asks)
    task = await broker.sent()
    events = [StepEvent(at=n, level="info", message=f"line {n}", data={"n": n}, index=n) for n in range(4)]
    for event in events[:3]:
        await tell(stranger, task, event)
    await until_told(world, run.id, 3)
    await world.crash(first)
    second = await world.engine(asks, transport=broker.end(), **settings)
    await eventually(lambda: broker.ends[-1].results is not None, "the next owner listens")
    result = StepResult(
        run_id=task.run_id,
        seq=task.seq,
        step_id=task.step_id,
        status="completed",
        output=msgspec.Raw(b"1"),
        attempt=1,
        events=events,
    )
    await broker.ends[-1].results(result)  # type: ignore[misc]
    assert await second.run(run.id).result(10) == 1
    assert [line[2] for line in told(await world.journal(run.id))] == [0, 1, 2, 3]
    await stranger.close()
    await world.sound(run.id)


async def test_R6_each_attempt_has_lines_of_its_own(world: World) -> None:
    """Line 0 of the second attempt is not line 0 of the first; a result that comes twice writes nothing more."""
    broker = Broker()
    app = await world.engine(asks, transport=broker.end(), ask_every=600)
    run = await app.start(asks)
    for attempt in (1, 2):
        task = await broker.sent(attempt)
        result = StepResult(
            run_id=task.run_id,
            seq=task.seq,
            step_id=task.step_id,
            status="failed" if attempt == 1 else "completed",
            output=msgspec.Raw(b"7"),
            error=ErrorData(message="again") if attempt == 1 else None,
            attempt=attempt,
            events=[StepEvent(at=5, level="info", message=f"of {attempt}", index=0)],
        )
        for _ in range(2):
            await broker.ends[0].results(result)  # type: ignore[misc]
    assert await run.result(10) == 7
    assert [line[:4] for line in told(await world.journal(run.id))] == [
        ("talks", 1, 0, "of 1"),
        ("talks", 2, 0, "of 2"),
    ]
    await world.sound(run.id)


async def test_A44_a_strangers_line_is_taken_only_for_a_task_that_is_out(world: World) -> None:
    """(A44) Forged, broken, huge, of another attempt, of nobody: passed over. What is taken is cleaned and bounded."""
    broker, plane = Broker(), LocalControlPlane()
    stranger = plane.peer()
    await stranger.start()
    app = await world.engine(asks, transport=broker.end(), control_plane=plane, ask_every=600)
    stranger.on_control("worker", lambda message: None)
    run = await app.start(asks)
    task = await broker.sent()
    fine = StepEvent(at=1, level="info", message="fine", index=0)
    good = step_progress(task, fine)
    for wrong in (
        {"attempt": 2},
        {"runId": "another"},
        {"seq": 4},
        {"stepId": "x:0"},
        {"seq": "zero"},
        {"event": {"level": "loud", "message": "x", "at": 1}},
        {"event": None},
        {"event": msgspec.to_builtins(StepEvent(at=1, level="info", message="big", data="x" * 100_000, index=1))},
    ):
        await say(stranger, good | wrong)
    hostile = StepEvent(at=1, level="info", message="nul \0, half \ud800, " + "x" * 10_000, index=2)
    await say(stranger, step_progress(task, hostile))
    await say(stranger, good)
    await say(stranger, good)
    await until_told(world, run.id, 2)
    lines = {line[2]: line[3] for line in told(await world.journal(run.id))}
    assert lines[0] == "fine"
    assert "\0" not in lines[2]
    assert len(lines[2]) < 4_100
    await broker.answer(task, 1)
    assert await run.result(10) == 1
    await say(stranger, step_progress(task, StepEvent(at=1, level="info", message="too late", index=3)))
    await asyncio.sleep(0.05)
    assert len(told(await world.journal(run.id))) == 2
    await stranger.close()
    await world.sound(run.id)


async def test_a_worker_that_does_not_count_its_lines_has_each_written_once(hot_world: World) -> None:
    """Workers of other makes send no index, step id or attempt: a line is known by its time and text, to the engine that
    heard it."""
    world = hot_world
    broker, plane = Broker(), LocalControlPlane()
    stranger = plane.peer()
    await stranger.start()
    app = await world.engine(asks, transport=broker.end(), control_plane=plane, ask_every=600)
    stranger.on_control("worker", lambda message: None)
    run = await app.start(asks)
    task = await broker.sent()
    event = {"at": 7, "level": "info", "message": "counting is hard"}
    await say(
        stranger,
        {"type": "step.progress", "runId": run.id, "seq": 0, "name": "talks", "event": event, "at": 7},
    )
    await until_told(world, run.id, 1)
    result = StepResult(
        run_id=task.run_id,
        seq=0,
        step_id=task.step_id,
        status="completed",
        output=msgspec.Raw(b"1"),
        events=[msgspec.convert(event, StepEvent), StepEvent(at=8, level="info", message="done")],
    )
    await broker.ends[0].results(result)  # type: ignore[misc]
    assert await run.result(10) == 1
    assert [line[3] for line in told(await world.journal(run.id))] == ["counting is hard", "done"]
    await stranger.close()


async def tell(plane: LocalControlPlane, task: RemoteTask, event: StepEvent) -> None:
    await say(plane, step_progress(task, event))


async def say(plane: LocalControlPlane, event: dict[str, Any]) -> None:
    await plane.publish_control(ControlMessage(sender="worker", kind="event", event=event))


async def until_told(world: World, run_id: str, count: int) -> None:
    async with asyncio.timeout(10):
        while len(told(await world.journal(run_id))) < count:
            await asyncio.sleep(0.01)


# -- what it costs


TASK = RemoteTask(run_id="r", seq=0, step_id="r:0", name="talks", group="talks", input=msgspec.Raw(b"null"), attempt=1)


def fresh() -> Lines:
    return Lines(TASK, lambda: 1, lambda: None)


def test_progress_that_was_not_told_gives_way_to_the_next() -> None:
    """A body that says how far it is a thousand times between two rounds costs one line; log lines are all kept."""
    lines = fresh()
    for n in range(1_000):
        lines.write("info", "", {"progress": n}, True)
    lines.write("info", "a line", {}, False)
    lines.write("info", "", {"progress": "end"}, True)
    assert [event.data for event in lines.take(10)] == [{"progress": 999}, None, {"progress": "end"}]
    lines.write("info", "", {"progress": "told is told"}, True)
    assert [event.index for event in lines.close() or ()] == [0, 1, 2, 3]


def test_lines_are_bounded_and_say_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many lines, so many bytes; the last line says how many more there were; what comes after the end is nothing."""
    lines = fresh()
    for n in range(3_000):
        lines.write("debug", f"line {n}", {}, False)
    kept = lines.close() or []
    assert len(kept) == MAX_EVENTS
    assert "2001 more lines were left out" in kept[-1].message
    lines.write("info", "late", {}, False)
    assert lines.close() == kept
    monkeypatch.setattr(worker_lines, "LINES_BYTES_MAX", 2_000)
    lines = fresh()
    for _ in range(10):
        lines.write("info", "x" * 500, {}, False)
    kept = lines.close() or []
    assert (len(kept), kept[-1].message[:2]) == (4, "7 ")


def test_a_line_that_cannot_be_kept_is_an_error_at_the_call() -> None:
    """Fields that are no JSON, or too large; a level nobody knows is info, half a surrogate pair is spelled."""
    lines = fresh()
    for fields in ({"a": object()}, {"a": "x" * 40_000}):
        with pytest.raises(PayloadError):
            lines.write("info", "bad", fields, False)
    lines.write("loud", "half \ud800", {}, False)
    [event] = lines.close() or ()
    assert (event.level, event.message) == ("info", "half \\ud800")


async def test_a_chatty_body_sends_few_messages(world: World) -> None:
    """Two thousand lines in a burst: the control plane carries a few, the result the rest, and nothing waits for it."""
    gate = Gate()

    @durable_step("talks")
    async def talks() -> None:
        for n in range(900):
            current_step().log(f"line {n}")
        await gate()

    transport, plane = EventEmitterTransport(), Spy()
    plane.overhear(lambda message: None)
    async with Worker([talks], transport=transport, control_plane=plane):
        app = await world.engine(asks, transport=transport.peer(), control_plane=plane)
        run = await app.start(asks)
        await gate.reached()
        await eventually(lambda: live(plane) >= 2 * worker_lines.ROUND_LINES, "two rounds are told")
        gate.open()
        await run.result(10)
        assert live(plane) < 300
    assert [line[2] for line in told(await world.journal(run.id))] == list(range(900))


def live(plane: Spy) -> int:
    return sum(1 for message in plane.said if message.event is not None and message.event["type"] == "step.progress")


async def test_many_chatty_bodies_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round has room for so many lines of all bodies together, and the next begins with those that had none."""
    monkeypatch.setattr(worker_lines, "ROUND_MAX", 4)
    monkeypatch.setattr(worker_lines, "ROUND_LINES", 2)
    monkeypatch.setattr(worker_lines, "ROUND_SECONDS", 0.0)
    said: list[tuple[str, int]] = []

    async def tell(event: dict[str, Any]) -> None:
        said.append((event["name"], event["event"]["index"]))

    teller = worker_lines.Teller(tell, lambda: True)
    bodies = [Lines(msgspec.structs.replace(TASK, name=name), lambda: 1, teller.wake) for name in "abc"]
    for lines in bodies:
        teller.follow(lines)
        for _ in range(3):
            lines.write("info", "x", {}, False)
    await eventually(lambda: len(said) == 9, "all are told")
    assert [name for name, _ in said] == [*"aabbccabc"]
    assert [index for name, index in said if name == "c"] == [0, 1, 2]
    teller.stop()


async def test_a_plane_that_hangs_delays_no_body(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are sent and forgotten; the step is as quick as ever, and its lines are there."""
    monkeypatch.setattr(worker_lines, "PUBLISH_SECONDS", 0.05)

    @durable_step("talks")
    async def talks() -> int:
        current_step().log("one")
        return 1

    transport, plane = EventEmitterTransport(), Spy()
    plane.overhear(lambda message: None)
    plane.hanging = True
    async with Worker([talks], transport=transport, control_plane=plane):
        app = await world.engine(asks, transport=transport.peer(), control_plane=LocalControlPlane())
        run = await app.start(asks)
        assert await run.result(5) == 1
        assert [line[3] for line in told(await world.journal(run.id))] == ["one"]


async def test_a_local_body_tells_its_progress_at_a_bearable_pace(world: World) -> None:
    """`progress` in `ctx.step`: the first is written at once, those that follow too soon are passed over."""

    @workflow(name="local")
    async def local(ctx: Context) -> None:
        async def body() -> None:
            for n in range(500):
                current_step().progress(n)

        await ctx.step("body", body)

    app: Durable = await world.engine(local)
    run = await app.start(local)
    await run.result(10)
    lines = told(await world.journal(run.id))
    assert lines[0][3:] == ("progress", {"progress": 0})
    assert len(lines) < 20
