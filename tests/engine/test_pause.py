"""A paused run begins nothing, loses nothing, and goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from durable import Context, RunCancelled, durable_step, workflow
from durable.core.errors import DefinitionError, RunFinished, RunNotFound, WaitTimeout
from durable.core.retry import RetryPolicy
from durable.engine.pause import LOOK_BEATS, Pauser
from durable.store.records import RunRecord
from tests.engine.world import Gate, World, eventually

RETRY = RetryPolicy(max_attempts=3, backoff="fixed", initial_delay=0.3, jitter=0.0)


def paused(record: RunRecord) -> bool:
    """In the store, and nobody's."""
    return record.activity == "paused" and record.owner is None


def ran(names: list[str], name: str) -> Any:
    def body() -> str:
        names.append(name)
        return name

    return body


async def test_a_paused_run_finishes_its_body_and_begins_nothing(world: World) -> None:
    """The body under way finishes and is recorded once; the next one begins only when the run is resumed."""
    gate, names = Gate(), list[str]()

    @workflow(name="two")
    async def two(ctx: Context) -> list[Any]:
        first = await ctx.step("first", gate)
        return [first, await ctx.step("second", ran(names, "second"))]

    app = await world.engine(two)
    handle = await app.start(two)
    await gate.reached()
    assert await handle.pause(by="ann", reason="look at it")
    await world.until(handle.id, lambda r: r.activity == "paused")
    note = await app.engine.paused_by(handle.id)
    assert note is not None
    assert (note.by, note.reason) == ("ann", "look at it")
    gate.open()
    await world.until(handle.id, paused)
    assert names == []
    assert "held" in await world.statuses(handle.id, "step", "first")
    assert "completed" not in await world.statuses(handle.id, "step", "first")
    assert await handle.resume(by="bob")
    assert await handle.result(5) == [1, "second"]
    assert gate.came == 1
    assert await app.engine.paused_by(handle.id) is None
    await world.sound(handle.id)


async def test_a_run_resumed_while_its_body_is_under_way_keeps_it(world: World) -> None:
    """Resumed before the body has finished, the run takes its result; the body runs once."""
    gate = Gate()

    @workflow(name="one")
    async def one(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    app = await world.engine(one)
    handle = await app.start(one)
    await gate.reached()
    await handle.pause()
    await world.until(handle.id, lambda r: r.activity == "paused")
    assert await handle.resume()
    await world.until(handle.id, lambda r: r.activity == "executing")
    gate.open()
    assert await handle.result(5) == 1
    assert gate.came == 1
    await world.sound(handle.id)


async def test_pausing_and_resuming_twice_changes_nothing(world: World) -> None:
    """The second pause and the second resume answer False and write nothing; a new pause is a new one."""

    @workflow(name="waits")
    async def waits(ctx: Context) -> Any:
        return await ctx.wait_for_signal("go")

    app = await world.engine(waits)
    handle = await app.start(waits)
    await world.waits(handle.id)
    assert not await handle.resume()
    for round in (1, 2):
        assert await handle.pause()
        await handle.pause()
        await world.until(handle.id, paused)
        assert not await handle.pause()
        assert (await world.statuses(handle.id, "run")).count("paused") == round
        assert await handle.resume()
        await world.until(handle.id, lambda r: r.activity == "waiting")
        assert not await handle.resume()
        assert (await world.statuses(handle.id, "run")).count("resumed") == round
    await handle.signal("go", 7)
    assert await handle.result(5) == 7
    with pytest.raises(RunFinished):
        await handle.pause()
    with pytest.raises(RunNotFound):
        await app.run("nobody").pause()
    await world.sound(handle.id)


async def test_what_comes_for_a_paused_run_waits_for_it(world: World) -> None:
    """Signals sent to a paused run are taken in, in order, when it goes on; nothing is delivered before."""
    names: list[str] = []

    @workflow(name="waits")
    async def waits(ctx: Context) -> list[Any]:
        got = [await ctx.wait_for_signal("go")]
        await ctx.step("mark", ran(names, "mark"))
        return [*got, await ctx.wait_for_signal("go")]

    app = await world.engine(waits)
    handle = await app.start(waits)
    await world.waits(handle.id)
    await handle.pause()
    await world.until(handle.id, paused)
    await handle.signal("go", 1)
    await handle.signal("go", 2)
    record = await world.record(handle.id)
    assert paused(record)
    assert record.inbox_last == record.inbox_read + 2
    assert names == []
    await handle.resume()
    assert await handle.result(5) == [1, 2]
    await world.sound(handle.id)


@pytest.mark.parametrize("timers", ["run", "hold"])
async def test_timers_of_a_paused_run_by_rule(world: World, timers: Any) -> None:
    """With "run" a deadline that passed during the pause is due at once; with "hold" it is later by the pause's length, and
    a signal sent during the pause still comes in time."""

    @workflow(name="waits")
    async def waits(ctx: Context) -> str:
        try:
            await ctx.wait_for_signal("go", timeout=0.4)
        except WaitTimeout:
            return "late"
        return "in time"

    app = await world.engine(waits)
    handle = await app.start(waits)
    await world.waits(handle.id)
    await handle.pause()
    record = await world.until(handle.id, paused)
    begun = time.monotonic()
    await eventually(lambda: time.monotonic() > begun + 0.6, "the deadline has passed")
    assert paused(await world.record(handle.id)), "no timer wakes a paused run"
    await handle.signal("go")
    await handle.resume(timers=timers)
    assert await handle.result(5) == ("in time" if timers == "hold" else "late")
    held = [entry.held for entry in await world.journal(handle.id) if entry.status == "resumed"]
    assert held == [0] if timers == "run" else held[0] >= 500_000
    assert record.wake_at is None
    await world.sound(handle.id)


async def test_held_timers_ring_later_by_the_pause_and_replay_the_same(world: World) -> None:
    """A sleep held over a pause takes its whole time, retry delays and the run's own timeout too; an engine that takes the
    run over afterwards comes to the same."""
    tries: list[float] = []

    def flaky() -> str:
        tries.append(time.monotonic())
        if len(tries) == 1:
            raise ValueError("not yet")
        return "ok"

    @workflow(name="sleeps", timeout=1.0)
    async def sleeps(ctx: Context) -> Any:
        nap, step = asyncio.ensure_future(asyncio.sleep(0.5)), ctx.step("flaky", flaky, retries=RETRY)
        await nap
        return await step

    app = await world.engine(sleeps)
    handle = await app.start(sleeps)
    await eventually(lambda: len(tries) == 1, "it has failed once")
    await handle.pause()
    await world.until(handle.id, paused)
    begun = time.monotonic()
    await eventually(lambda: time.monotonic() > begun + 1.0, "the run's timeout has passed")
    await handle.resume(timers="hold")
    await world.until(handle.id, lambda r: r.activity != "paused")
    await world.crash(app)
    app = await world.engine(sleeps)
    assert await app.run(handle.id).result(5) == "ok"
    assert tries[1] - tries[0] > 1.0
    await world.sound(handle.id)


async def test_a_paused_run_survives_its_engine(world: World) -> None:
    """It stays paused over a restart, and a body that was cut down with the engine runs again only after the resume."""
    gate = Gate()

    @workflow(name="one")
    async def one(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    app = await world.engine(one)
    handle = await app.start(one)
    await gate.reached()
    await handle.pause()
    await world.until(handle.id, lambda r: r.activity == "paused")
    await world.crash(app)
    app = await world.engine(one)
    await world.until(handle.id, paused)
    assert gate.came == 1
    gate.open()
    await app.close()
    world.apps.remove(app)
    app = await world.engine(one)
    assert paused(await world.record(handle.id))
    assert await app.run(handle.id).resume()
    assert await app.run(handle.id).result(5) == 2
    assert (await world.record(handle.id)).recovery_attempts == 0
    await world.sound(handle.id)


async def test_a_crash_after_the_resume_delivers_what_was_held(world: World) -> None:
    """The recorded end of a body is delivered by whoever has the run when it goes on, and the body does not run again."""
    gate, second = Gate(), Gate()

    @workflow(name="two")
    async def two(ctx: Context) -> list[int]:
        return [await ctx.step("first", gate), await ctx.step("second", second)]

    app = await world.engine(two)
    handle = await app.start(two)
    await gate.reached()
    await handle.pause()
    await world.until(handle.id, lambda r: r.activity == "paused")
    gate.open()
    await world.until(handle.id, paused)
    await handle.resume()
    await second.reached()
    await world.crash(app)
    app = await world.engine(two)
    second.open()
    assert await app.run(handle.id).result(5) == [1, 2]
    assert gate.came == 1
    await world.sound(handle.id)


async def test_a_held_failure_is_retried_when_the_run_goes_on(world: World) -> None:
    """A body that fails while its run is paused is tried again after the resume, by its policy."""
    gate, tries = Gate(), list[int]()

    async def flaky() -> int:
        tries.append(1)
        await gate()
        if len(tries) == 1:
            raise ValueError("not yet")
        return len(tries)

    @workflow(name="one")
    async def one(ctx: Context) -> Any:
        return await ctx.step("flaky", flaky, retries=RETRY)

    app = await world.engine(one)
    handle = await app.start(one)
    await gate.reached()
    await handle.pause()
    await world.until(handle.id, lambda r: r.activity == "paused")
    gate.open()
    await world.until(handle.id, paused)
    assert len(tries) == 1
    await handle.resume()
    assert await handle.result(5) == 2
    assert (await world.statuses(handle.id, "step"))[-1] == "completed"
    await world.sound(handle.id)


async def test_a_remote_result_waits_in_the_inbox_of_a_paused_run(world: World) -> None:
    """A task under way when its run is paused is answered once: the result is there when the run goes on."""
    gate = Gate()

    @durable_step("remote")
    async def remote() -> int:
        return await gate()

    @workflow(name="one")
    async def one(ctx: Context) -> int:
        return await ctx.remote(remote)

    app = await world.engine(one, remote)
    handle = await app.start(one)
    await gate.reached()
    await handle.pause()
    await world.until(handle.id, lambda r: r.activity == "paused")
    gate.open()
    await world.until(handle.id, paused)
    assert "completed" not in await world.statuses(handle.id, "remote")
    await handle.resume()
    assert await handle.result(5) == 1
    assert gate.came == 1
    await world.sound(handle.id)


async def test_cancelling_a_paused_run_works(world: World) -> None:
    """A paused run that is cancelled goes on to clean up, and ends."""
    names: list[str] = []

    @workflow(name="waits")
    async def waits(ctx: Context) -> Any:
        try:
            return await ctx.wait_for_signal("go")
        finally:
            await ctx.step("clean", ran(names, "clean"))

    app = await world.engine(waits)
    handle = await app.start(waits)
    await world.waits(handle.id)
    await handle.pause()
    await world.until(handle.id, paused)
    assert await handle.cancel("enough")
    with pytest.raises(RunCancelled):
        await handle.result(5)
    assert names == ["clean"]
    await world.sound(handle.id)


async def test_a_paused_child_ends_with_its_cancelled_parent(world: World) -> None:
    """The parent's word reaches a child that stands still."""

    @workflow(name="child")
    async def child(ctx: Context) -> Any:
        return await ctx.wait_for_signal("go")

    @workflow(name="parent")
    async def parent(ctx: Context) -> Any:
        return await ctx.child(child)

    app = await world.engine(parent, child)
    handle = await app.start(parent)
    below = f"{handle.id}.child.0"
    await eventually_there(world, below)
    await world.waits(below)
    await app.run(below).pause()
    await world.until(below, paused)
    await handle.cancel()
    await world.until(below, lambda r: r.status == "cancelled")
    await world.sound(handle.id, below)


async def test_a_word_that_roused_nobody_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever cancels may die between leaving the word and waking the run: an engine's look finds such a run."""

    @workflow(name="waits")
    async def waits(ctx: Context) -> Any:
        return await ctx.wait_for_signal("go")

    app = await world.engine(waits)
    handle = await app.start(waits)
    await world.waits(handle.id)
    await handle.pause()
    await world.until(handle.id, paused)

    async def dies(self: Pauser, run_id: str) -> bool:
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Pauser, "rouse", dies)
        await handle.cancel()
    assert paused(await world.record(handle.id))
    for _ in range(LOOK_BEATS):
        app.engine._pauser.beaten()
    with pytest.raises(RunCancelled):
        await handle.result(5)
    await world.sound(handle.id)


async def test_a_run_paused_before_it_begins_begins_nothing(world: World) -> None:
    """A run that no engine has taken yet stands still from its first turn on."""
    names: list[str] = []

    @workflow(name="one")
    async def one(ctx: Context) -> Any:
        return await ctx.step("body", ran(names, "body"))

    api = await world.engine(one, worker=False)
    handle = await api.start(one)
    assert await handle.pause()
    app = await world.engine(one)
    await world.until(handle.id, paused)
    assert names == []
    await app.run(handle.id).resume()
    assert await app.run(handle.id).result(5) == "body"
    await world.sound(handle.id)


async def test_an_unknown_rule_for_timers_teaches(world: World) -> None:
    """A rule that is none is refused with the two there are."""

    @workflow(name="waits")
    async def waits(ctx: Context) -> Any:
        return await ctx.wait_for_signal("go")

    app = await world.engine(waits)
    handle = await app.start(waits)
    with pytest.raises(DefinitionError, match=r"'run'.*'hold'"):
        await handle.resume(timers="stop")  # type: ignore[arg-type]
    await handle.cancel()


async def eventually_there(world: World, run_id: str) -> None:
    deadline = time.monotonic() + 5
    while (await (await world.store()).get([run_id]))[0] is None:
        assert time.monotonic() < deadline, f"{run_id} was never started"
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("timers", ["run", "hold"])
async def test_a_wait_for_an_event_is_held_too(world: World, timers: Any) -> None:
    """An event that comes after the deadline, in a pause or behind it, is in time where timers are held, and too late where
    they run; one that came before the pause's end is found whichever engine goes on."""

    @workflow(name="awaits")
    async def awaits(ctx: Context) -> Any:
        try:
            return await ctx.wait_for_event("paid", timeout=0.4)
        except WaitTimeout:
            return None

    app = await world.engine(awaits)
    inside, behind = await app.start(awaits), await app.start(awaits)
    for handle in (inside, behind):
        await world.waits(handle.id)
        await handle.pause()
        await world.until(handle.id, paused)
    begun = time.monotonic()
    await eventually(lambda: time.monotonic() > begun + 0.6, "the deadline has passed")
    await behind.resume(timers=timers)
    if timers == "hold":
        await world.waits(behind.id)
    else:
        assert await behind.result(5) is None
    await app.engine.send_event("paid", 7)
    await inside.resume(timers=timers)
    for handle in (inside, behind):
        got = await handle.result(5)
        assert (got is None) == (timers == "run")
    await world.sound(inside.id, behind.id)


async def test_an_event_behind_a_deadline_that_is_held_is_had_at_once(world: World) -> None:
    """It came in the pause, after the deadline as it stood then, so nobody was told of it; the run that goes on looks for it
    at once, and not when its time is up."""

    @workflow(name="awaits")
    async def awaits(ctx: Context) -> Any:
        return await ctx.wait_for_event("paid", timeout=1.2)

    app = await world.engine(awaits)
    handle = await app.start(awaits)
    await world.waits(handle.id)
    await world.until(handle.id, lambda r: r.inbox_read == r.inbox_last)
    await handle.pause()
    await world.until(handle.id, paused)
    begun = time.monotonic()
    await eventually(lambda: time.monotonic() > begun + 1.3, "the deadline has passed")
    await app.engine.send_event("paid", 7)
    await handle.resume(timers="hold")
    resumed = time.monotonic()
    assert (await handle.result(5))["data"] == 7
    assert time.monotonic() - resumed < 0.8
    await world.sound(handle.id)


async def test_a_paused_run_holds_up_nobody(world: World) -> None:
    """A paused run gives its slot back, and takes one again when it goes on."""
    gate, names = Gate(), list[str]()

    @workflow(name="alone", concurrency=1)
    async def alone(ctx: Context, name: str) -> str:
        if name == "first":
            await ctx.step("body", gate)
        await ctx.step("mark", ran(names, name))
        return name

    app = await world.engine(alone)
    first = await app.start(alone, "first")
    await gate.reached()
    second = await app.start(alone, "second")
    await first.pause()
    await world.until(first.id, lambda r: r.activity == "paused")
    assert names == []
    gate.open()
    assert await second.result(5) == "second"
    assert paused(await world.record(first.id))
    await first.resume()
    assert await first.result(5) == "first"
    assert names == ["second", "first"]
    await world.sound(first.id, second.id)
