"""Engines that tell each other: tails, waits, cancels and starts across engines, where nothing but the control plane could be
so quick: stores give no hints here, and polls are half a minute apart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from durable import Context, Durable, RunCancelled, RunFailed, durable_step, workflow
from durable.control_plane.interface import ControlHandler
from durable.control_plane.local import LocalControlPlane
from durable.engine import announce
from durable.engine.announce import Announcer
from durable.protocol.messages import ControlMessage
from durable.transports.event_emitter import EventEmitterTransport
from tests.engine.broker import Broker
from tests.engine.world import Gate, Line, World, eventually

FAR = 30.0
"""Seconds between polls: beyond the patience of any test here."""


@pytest.fixture(autouse=True)
def _deaf_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Line, "listen", lambda self, on_hint: lambda: None)


class Spy(LocalControlPlane):
    """Remembers what was published; may swallow it, or never return."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[ControlMessage] = []
        self.losing = False
        self.hanging = False

    async def publish_control(self, message: ControlMessage) -> None:
        self.said.append(message)
        if self.hanging:
            await asyncio.Event().wait()
        if not self.losing:
            await super().publish_control(message)

    def kinds(self) -> list[str]:
        return [message.kind for message in self.said]

    def events(self, run_id: str) -> list[str]:
        return [m.event["type"] for m in self.said if m.event is not None and m.event["runId"] == run_id]

    def overhear(self, handler: ControlHandler) -> None:
        """As an instance that only listens."""
        self.on_control("observer", handler)


@workflow(name="signalled")
async def signalled(ctx: Context) -> list[object]:
    return [await ctx.wait_for_signal("go"), await ctx.wait_for_signal("go")]


async def pods(world: World, plane: Any, *things: Any, **settings: Any) -> tuple[Durable, Durable]:
    """(one that executes, one that runs nothing)."""
    works = await world.engine(*things, control_plane=plane, poll_every=FAR, **settings)
    looks = await world.engine(*things, control_plane=plane, poll_every=FAR, worker=False)
    return works, looks


# -- which plane


async def test_N9_the_first_member_is_wired_if_it_can_broadcast(world: World) -> None:
    """An emitter that carries tasks carries control too; an explicit plane wins; a transport that cannot leaves it local."""
    emitter, plane = EventEmitterTransport(), LocalControlPlane()
    assert (await world.engine(signalled, transport=emitter)).engine.deps.control_plane is emitter
    assert (await world.engine(signalled, transport=emitter, control_plane=plane)).engine.deps.control_plane is plane
    lone = await world.engine(signalled, transports={"a": Broker().end(), "b": EventEmitterTransport()})
    assert isinstance(lone.engine.deps.control_plane, LocalControlPlane)


async def test_N9_a_transport_that_is_the_control_plane_is_started_and_closed_once(world: World) -> None:
    """Its life is the pool's; a plane apart has its own."""
    calls: list[str] = []

    class Counting(EventEmitterTransport):
        async def start(self) -> None:
            calls.append("start")
            await super().start()

        async def close(self, timeout: float = 10.0) -> None:
            calls.append("close")
            await super().close(timeout)

    app = await world.engine(signalled, transport=Counting())
    world.apps.remove(app)
    await app.close()
    assert calls == ["start", "close"]


# -- N10


async def test_N10_a_pod_that_runs_nothing_tails_a_run_executing_elsewhere(world: World) -> None:
    """Every entry, in order, without gap or repeat, as it is committed: the tail is fed by the store and woken by events."""
    works, looks = await pods(world, LocalControlPlane(), signalled)
    handle = await works.start(signalled)
    seen: list[tuple[int, str]] = []

    async def tail() -> None:
        async for entry in looks.watch(handle.id):
            seen.append((entry.seq, entry.status))

    tailing = asyncio.create_task(tail())
    await eventually(lambda: (1, "started") in seen, "it sees the start")
    for count in (1, 2):
        await handle.signal("go", count)
        await eventually(lambda count=count: [s for _, s in seen].count("received") == count, "it sees each signal")
    async with asyncio.timeout(5):
        await tailing
    assert [seq for seq, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][1] == "completed"


async def test_N10_a_wait_on_another_pod_ends_with_the_run(world: World) -> None:
    """The outcome is asked for when its event comes, by those who wait for that run."""
    works, looks = await pods(world, LocalControlPlane(), signalled)
    handle, other = await works.start(signalled), await works.start(signalled)
    waiting = asyncio.create_task(looks.run(handle.id).result(10))
    await asyncio.sleep(0.02)
    await handle.signal("go", 1)
    await handle.signal("go", 2)
    assert await waiting == [1, 2]
    await other.cancel()


async def test_N10_a_cancel_from_any_pod_reaches_the_step_body(world: World) -> None:
    """The row is the truth, the message makes it quick: the body is cancelled while it works, once, and says so."""
    gate, plane = Gate(), Spy()

    @workflow(name="long")
    async def long(ctx: Context) -> object:
        return await ctx.step("body", gate)

    works, looks = await pods(world, plane, long)
    handle = await works.start(long)
    await gate.reached()
    await looks.run(handle.id).cancel("enough")
    with pytest.raises(RunCancelled):
        await looks.run(handle.id).result(5)
    assert gate.cancelled == 1
    cancels = [message for message in plane.said if message.kind == "cancel"]
    assert [(m.run_id, m.sender) for m in cancels] == [(handle.id, looks.engine.incarnation)]
    await world.sound(handle.id)


async def test_N10_a_cancel_from_any_pod_reaches_a_remote_step_body(world: World) -> None:
    """Through the engine that owns the run, and the transport that has the task."""
    gate = Gate()

    @durable_step("far-body")
    async def far_body() -> int:
        return await gate()

    @workflow(name="remote-long")
    async def remote_long(ctx: Context) -> object:
        return await ctx.remote(far_body)

    works, looks = await pods(world, LocalControlPlane(), remote_long, far_body)
    handle = await works.start(remote_long)
    await gate.reached()
    await looks.run(handle.id).cancel()
    await eventually(lambda: gate.cancelled == 1, "the body is told")
    with pytest.raises(RunCancelled):
        await looks.run(handle.id).result(5)


async def test_N10_what_a_pod_starts_and_signals_is_run_by_another_at_once(world: World) -> None:
    """Starts and signals of a pod that executes nothing are nudges to those that do."""
    _, looks = await pods(world, LocalControlPlane(), signalled)
    handle = await looks.start(signalled)
    await world.waits(handle.id)
    await handle.signal("go", 1)
    await handle.signal("go", 2)
    assert await handle.result(5) == [1, 2]


async def test_the_emitter_as_control_plane_serves_two_engines(world: World) -> None:
    """Two engines on one emitter hear each other with nothing else configured."""
    emitter = EventEmitterTransport()
    works = await world.engine(signalled, transport=emitter, poll_every=FAR)
    looks = await world.engine(signalled, transport=emitter.peer(), poll_every=FAR, worker=False)
    handle = await works.start(signalled)
    waiting = asyncio.create_task(looks.run(handle.id).result(10))
    await looks.run(handle.id).signal("go", 1)
    await looks.run(handle.id).signal("go", 2)
    assert await waiting == [1, 2]


# -- events


async def test_N9_lifecycle_events_say_what_became_of_a_run(world: World) -> None:
    """Type, run, workflow and time in ms, from the incarnation that executed it; a pod does not hear its own."""
    plane, heard = Spy(), []
    plane.overhear(heard.append)

    @workflow(name="told")
    async def told(ctx: Context) -> object:
        await ctx.step("first", lambda: 1)
        await ctx.wait_for_signal("go")
        return await ctx.step("second", lambda: 2)

    app = await world.engine(told, control_plane=plane)
    own: list[ControlMessage] = []
    plane.on_control(app.engine.incarnation, own.append)
    handle = await app.start(told)
    await eventually(lambda: "step.completed" in plane.events(handle.id), "its progress is told")
    await handle.signal("go")
    await handle.result(5)
    await eventually(lambda: "run.completed" in plane.events(handle.id), "its end is told")
    events = {message.event["type"]: message for message in plane.said if message.event is not None}
    step = events["step.completed"].event
    assert (step["runId"], step["workflow"], step["seq"], step["name"]) == (handle.id, "told", 0, "first")
    assert (
        step["at"]
        == next(e.at for e in await world.journal(handle.id) if e.key == "first" and e.status == "completed") // 1000
    )
    assert {message.sender for message in plane.said} == {app.engine.incarnation}
    await eventually(lambda: len(heard) == len(plane.said), "the observer hears them all")
    assert own == []


async def test_events_of_one_run_are_told_together(world: World) -> None:
    """A hundred steps in a row are a few messages, and the last of them is the end."""
    plane = Spy()
    plane.overhear(lambda message: None)

    @workflow(name="many")
    async def many(ctx: Context) -> int:
        for n in range(100):
            await ctx.step("one", lambda: n)  # noqa: B023
        return 100

    app = await world.engine(many, control_plane=plane)
    handle = await app.start(many)
    assert await handle.result(30) == 100
    await eventually(lambda: "run.completed" in plane.events(handle.id), "its end is told")
    elapsed = (await world.record(handle.id)).finished_at - (await world.journal(handle.id))[0].at  # type: ignore[operator]
    assert len(plane.events(handle.id)) <= 3 + elapsed / 1e6 / announce.PAUSE_SECONDS


async def test_nothing_is_published_where_nobody_listens(world: World) -> None:
    """One engine on a local plane talks to nobody, not even to find that out."""
    plane = Spy()
    app = await world.engine(signalled, control_plane=plane)
    handle = await app.start(signalled)
    await handle.signal("go", 1)
    await handle.signal("go", 2)
    await handle.result(5)
    assert plane.said == []
    assert app.engine._announcer._task is None


async def test_a_plane_that_hangs_delays_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go on at full speed, what is to be told stays bounded, and closing does not wait for it."""
    monkeypatch.setattr(announce, "PUBLISH_SECONDS", 0.05)
    monkeypatch.setattr(announce, "PROGRESS_MAX", 5)
    monkeypatch.setattr(announce, "EVENTS_MAX", 10)
    monkeypatch.setattr(announce, "ENDS_MAX", 10)
    plane = Spy()
    plane.overhear(lambda message: None)
    plane.hanging = True

    @workflow(name="quick")
    async def quick(ctx: Context) -> object:
        return await ctx.step("one", lambda: 1)

    app = await world.engine(quick, control_plane=plane)
    handles = [await app.start(quick) for _ in range(40)]
    assert [await handle.result(5) for handle in handles] == [1] * 40
    announcer = app.engine._announcer
    assert len(announcer._events) + len(announcer._round) <= 20
    world.apps.remove(app)
    async with asyncio.timeout(10):
        await app.close(1.0)


async def test_the_end_of_each_of_many_runs_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """More runs end at once than a round holds: those who wait elsewhere hear of all, round by round, without a poll."""
    monkeypatch.setattr(announce, "EVENTS_MAX", 7)
    plane = Spy()
    heard: set[str] = set()
    plane.overhear(
        lambda m: heard.add(str(m.event["runId"])) if m.event and m.event["type"] == "run.completed" else None
    )

    @workflow(name="quick")
    async def quick(ctx: Context) -> object:
        return await ctx.step("one", lambda: 1)

    app = await world.engine(quick, control_plane=plane)
    handles = [await app.start(quick) for _ in range(60)]
    await eventually(lambda: heard == {handle.id for handle in handles}, "every end was told")


async def test_losing_every_message_costs_time_and_nothing_else(world: World) -> None:
    """With a plane that swallows everything, polls find the start, the signals, the cancel and the outcomes."""
    plane = Spy()
    plane.losing = True
    works = await world.engine(signalled, control_plane=plane, poll_every=0.05)
    looks = await world.engine(signalled, control_plane=plane, poll_every=0.05, worker=False)
    handle, unwanted = await looks.start(signalled), await looks.start(signalled)
    await handle.signal("go", 1)
    await handle.signal("go", 2)
    assert await handle.result(5) == [1, 2]
    await unwanted.cancel()
    with pytest.raises(RunCancelled):
        await unwanted.result(5)
    assert [entry.status async for entry in looks.watch(handle.id)][-1] == "completed"
    assert {"enqueued", "cancel", "event"} <= set(plane.kinds())
    assert works.engine.incarnation != looks.engine.incarnation


async def test_an_engine_born_again_listens_once_under_its_new_name(world: World) -> None:
    """After a lost lease the old incarnation hears nothing more, so that the new one's words are no news to it."""
    plane = Spy()
    app = await world.engine(signalled, control_plane=plane)
    before = app.engine.incarnation
    app.engine._lost("for the test")
    await eventually(lambda: app.engine.incarnation != before, "it has a new name")
    plane.overhear(lambda message: None)
    assert [listener.incarnation for listener in plane._listeners] == [app.engine.incarnation, "observer"]


# -- the announcer alone


async def test_hints_go_before_events_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody waits for a hint; doubles are one, and what does not fit is dropped."""
    monkeypatch.setattr(announce, "HINTS_MAX", 3)
    plane = Spy()
    await plane.start()
    stops: list[Callable[[], None]] = [plane.on_control(name, lambda message: None) for name in ("me", "you")]
    announcer = Announcer(plane, lambda: "me")
    for run_id in ("r1", "r1", "r2", "r3", "r4"):
        announcer.hint("enqueued", run_id)
    announcer.hint("cancel", "r1")
    await announcer.close()
    assert [(message.kind, message.run_id) for message in plane.said] == [
        ("enqueued", "r1"),
        ("enqueued", "r2"),
        ("enqueued", "r3"),
    ]
    for stop in stops:
        stop()


# -- workers


@workflow(name="remote-calls")
async def remote_calls(ctx: Context, timeout: float | None) -> object:
    return await asyncio.gather(*(ctx.remote("far", n, timeout=timeout, retries=0) for n in range(2)))


async def test_N10_workers_hear_of_cancelled_tasks_where_the_transport_is_not_the_control_plane(world: World) -> None:
    """The run's cancel goes out once, each task's by its id and attempt: a transport that cannot cancel needs them."""
    broker, plane = Broker(), Spy()
    plane.overhear(lambda message: None)
    app = await world.engine(remote_calls, transport=broker.end(), control_plane=plane)
    run = await app.start(remote_calls, None)
    await broker.sent(2)
    await world.until_journal(run.id, lambda found: found.count("remote far published") == 1)
    await run.cancel()
    with pytest.raises(RunCancelled):
        await run.result(5)
    await eventually(lambda: len(told(plane)) == 2, "both tasks are told of")
    assert [(event["stepId"], event["attempt"]) for event in told(plane)] == [(f"{run.id}:{n}", 1) for n in range(2)]
    assert {event["runId"] for event in told(plane)} == {run.id}
    mine = [m for m in plane.said if m.kind == "cancel" and m.sender == app.engine.incarnation]
    assert {message.run_id for message in mine} == {run.id}
    assert len(mine) <= 2  # one more where the run had left memory: its inbox was told of


async def test_N10_a_task_that_took_too_long_is_told_of_too(world: World) -> None:
    """Nobody waits for that attempt any more; the run goes on, and is not cancelled."""
    broker, plane = Broker(), Spy()
    plane.overhear(lambda message: None)
    app = await world.engine(remote_calls, transport=broker.end(), control_plane=plane)
    run = await app.start(remote_calls, 0.05)
    with pytest.raises(RunFailed, match="No result within"):
        await run.result(5)
    await eventually(lambda: told(plane), "it is told")
    assert "cancel" not in plane.kinds()


async def test_tasks_inside_this_process_are_nobody_elses_business(world: World) -> None:
    """The in-process transport tells its bodies itself: nothing of it is broadcast."""
    gate, plane = Gate(), Spy()
    plane.overhear(lambda message: None)

    @durable_step("near")
    async def near(_: int) -> int:
        return await gate()

    @workflow(name="near-calls")
    async def near_calls(ctx: Context) -> object:
        return await ctx.remote(near, 1)

    app = await world.engine(near_calls, near, control_plane=plane)
    run = await app.start(near_calls)
    await gate.reached()
    await run.cancel()
    with pytest.raises(RunCancelled):
        await run.result(5)
    await eventually(lambda: gate.cancelled == 1, "the body is told")
    assert told(plane) == []
    assert "cancel" not in plane.kinds()


def told(plane: Spy) -> list[dict[str, Any]]:
    return [m.event for m in plane.said if m.event is not None and m.event["type"] == "step.cancel"]
