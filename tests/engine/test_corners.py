"""Corners in which something was once lost, wedged or told wrongly."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable import Context, Durable, RunTimeout, StartRequest, durable_step, workflow
from durable.core.errors import EngineStopped, StoreUnavailable
from durable.protocol.states import Activity, Status
from durable.store.memory import MemoryStore
from durable.transports.event_emitter import EventEmitterTransport
from tests.engine.world import SHORT, Gate, World, all_results, eventually


async def test_starting_many_at_once_keeps_the_bound(world: World) -> None:
    """Of many runs started in one breath no more begin here than `max_running` allows; the others follow."""
    gate = Gate()

    @workflow("held")
    async def held(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    app = await world.engine(held, max_running=5)
    handles = await app.start_many([StartRequest(workflow=held) for _ in range(40)])
    await gate.reached(5)
    await world.until(handles[-1].id, lambda run: run.activity == Activity.QUEUED)  # type: ignore[union-attr]
    assert gate.came == 5
    gate.open()
    for handle in handles:
        await handle.result(15)  # type: ignore[union-attr]


async def test_a_scheduled_run_begins_no_sooner_for_a_signal(world: World) -> None:
    """A signal to a run that is to begin later waits for it; the run does not begin because of it."""

    @workflow("later")
    async def later(ctx: Context) -> int:
        number: int = await ctx.wait_for_signal("n", type=int)
        return number

    app = await world.engine(later)
    handle = await app.start(later, delay=3600)
    await handle.signal("n", 7)
    await asyncio.sleep(0)
    record = await world.record(handle.id)
    assert (record.activity, record.seq, record.inbox_last) == (Activity.SCHEDULED, 0, 1)


async def test_a_run_that_times_out_and_cleans_up_too_long_failed_by_timeout(world: World) -> None:
    """Its clean-up is cut off after the grace, and what it ended with is the timeout, so it can be requeued."""

    @workflow("slow", timeout=0.1)
    async def slow(ctx: Context) -> None:
        try:
            await ctx.sleep(100)
        finally:
            await ctx.sleep(100)

    app = await world.engine(slow, cancel_grace=0.1)
    handle = await app.start(slow)
    with pytest.raises(RunTimeout):
        await handle.result(10)
    assert (await world.record(handle.id)).status is Status.FAILED
    await app.requeue(handle.id)


async def test_lines_of_a_cut_stretch_do_not_swallow_those_that_follow(world: World) -> None:
    """After a requeue the run takes another way, and every line of it is written."""
    mended: list[bool] = []

    async def body() -> None:
        if not mended:
            raise ValueError("no")

    @workflow("told")
    async def told(ctx: Context) -> None:
        ctx.log("begin")
        try:
            await ctx.step("s", body, retries=0)
        except Exception:
            ctx.log("it failed")
            ctx.log("sorry")
            raise
        ctx.log("it worked")
        ctx.log("paid")

    app = await world.engine(told)
    handle = await app.start(told)
    await world.until(handle.id, lambda run: run.status is Status.FAILED)
    mended.append(True)
    await app.requeue(handle.id)
    await world.until(handle.id, lambda run: run.status is Status.COMPLETED)
    lines = [entry.payload or b"" for entry in await world.journal(handle.id) if entry.kind == "log"]
    for text in (b"begin", b"it failed", b"sorry", b"it worked", b"paid"):
        assert sum(text in line for line in lines) == 1, text


async def test_an_app_with_dead_letter_handlers_may_be_opened_again() -> None:
    """Opening, closing and opening once more registers the handlers' workflow once."""
    app = Durable(MemoryStore())

    @app.on_dead
    async def told(letter: Any) -> None: ...

    for _ in range(2):
        async with app:
            assert [d.name for d in app.workflows()] == ["__dead_letter"]


async def test_who_waits_is_told_when_the_engine_stops(world: World) -> None:
    """`result()` raises EngineStopped when its engine is closed: the waiting task itself is not cancelled."""

    @workflow("waits")
    async def waits(ctx: Context) -> None:
        await ctx.wait_for_signal("never")

    app = await world.engine(waits)
    handle = await app.start(waits)
    await world.waits(handle.id)
    waiting = asyncio.ensure_future(handle.result())
    await asyncio.sleep(0)
    world.apps.remove(app)
    await app.close(1)
    with pytest.raises(EngineStopped):
        await waiting


async def test_a_store_that_is_down_is_looked_at_now_and_then(world: World) -> None:
    """With a run overdue and the store out of reach, the scheduler looks at its own pace, not two hundred times a second."""

    @workflow("sleeps")
    async def sleeps(ctx: Context) -> None:
        await ctx.sleep(0.2)

    app = await world.engine(sleeps, cold=True, poll_every=0.5)
    handle = await app.start(sleeps)
    await world.waits(handle.id)
    looks = 0

    def fault(name: str, args: tuple[Any, ...]) -> BaseException | None:
        nonlocal looks
        if name not in ("unread", "claim"):
            return None
        looks += 1
        return StoreUnavailable("down")

    world.line(app).fault = fault
    loop = asyncio.get_running_loop()
    until = loop.time() + 1.2
    while loop.time() < until:
        await asyncio.sleep(0.05)
    world.line(app).fault = None
    assert 1 <= looks <= 12
    await handle.result(10)


async def test_a_start_nobody_waits_for_any_more_is_driven_all_the_same(world: World) -> None:
    """The caller of `start` is cancelled while the run is being stored: a run born claimed is not left unattended."""
    gate = Gate()

    @workflow("held")
    async def held(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    app = await world.engine(held)
    for _ in range(20):
        starting = asyncio.ensure_future(app.start(held))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait({starting})
    stored = (await app.find()).runs
    await gate.reached(len(stored))
    gate.open()
    for run in stored:
        await app.run(run.id).result(10)


async def test_a_close_that_is_cancelled_leaves_no_lease_behind(world: World) -> None:
    """A bound around `close()` that runs out still gives the lease back, so that another engine goes on at once."""
    gate = Gate()

    @workflow("held")
    async def held(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    app = await world.engine(held)
    handle = await app.start(held)
    await gate.reached(1)
    world.apps.remove(app)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await app.close(10)
    gate.open()
    other = await world.engine(held)
    assert await other.run(handle.id).result(10) == 2


async def test_workspaces_on_one_store_do_not_run_each_others_runs(world: World) -> None:
    """Two applications with a workflow of the same name: due runs, and those of a dead engine, stay in their workspace."""

    def app_of(name: str) -> Any:
        @workflow("same")
        async def same(ctx: Context, hold: bool) -> str:
            if hold:
                await ctx.step("hold", gate)
            return name

        return same

    gate = Gate()
    one = await world.engine(app_of("one"), workspace="one", lease=SHORT)
    two = await world.engine(app_of("two"), workspace="two", lease=SHORT)
    due = [await app.start("same", False, delay=0.01) for _ in range(5) for app in (one, two)]
    assert await all_results(due) == ["one", "two"] * 5
    orphan = await one.start("same", True)
    await gate.reached()
    await world.crash(one)
    gate.open()
    # What the other engine claims after this it has asked for with the orphan there to be taken.
    assert await (await two.start("same", False, delay=0.01)).result(5) == "two"
    record = await world.record(orphan.id)
    assert (record.epoch, record.recovery_attempts) == (1, 0)
    one = await world.engine(app_of("one"), workspace="one")
    assert await one.run(orphan.id).result(5) == "one"


async def test_a_full_engine_claims_when_a_run_comes_to_rest(world: World) -> None:
    """At `max_running` work is left in the store; a run that goes idle makes room at once, poll or not."""
    gate = Gate()

    @workflow("rests")
    async def rests(ctx: Context) -> object:
        await ctx.step("body", gate)
        return await ctx.wait_for_signal("never")

    @workflow("next")
    async def following(ctx: Context) -> int:
        number: int = await ctx.step("body", lambda: 7)
        return number

    app = await world.engine(rests, following, max_running=1, poll_every=3600, hot_for=3600)
    first = await app.start(rests)
    await gate.reached()
    second = await app.start(following)
    await eventually(lambda: app.engine._executor.full)
    gate.open()
    assert await second.result(5) == 7
    await world.waits(first.id)


async def test_an_emitter_given_to_several_engines_forgets_those_that_close(world: World) -> None:
    """Each has an end of its own, which leaves with its handlers; also where the emitter is named as the control plane."""
    emitter = EventEmitterTransport()

    @durable_step("who")
    def who() -> int:
        return 7

    @workflow("asks")
    async def asks(ctx: Context) -> int:
        number: int = await ctx.remote(who)
        return number

    apps = [
        await world.engine(asks, who, transport=emitter),
        await world.engine(asks, who, transport=emitter),
        await world.engine(asks, who, transport=emitter, control_plane=emitter),
    ]
    shelf = emitter._shelf
    while len(apps) > 1:
        closing = apps.pop(0)
        world.apps.remove(closing)
        await closing.close()
        alive = [app.engine.deps.transport.member("default") for app in apps]
        for pairs in (shelf.listeners, shelf.heartbeat_listeners):
            assert [end for end, _ in pairs] == alive
        assert [server.end for server in shelf.servers] == alive
        assert await all_results([await apps[0].start(asks) for _ in range(4)]) == [7] * 4
    assert apps[0].engine.deps.control_plane is apps[0].engine.deps.transport.member("default")


async def test_an_inbox_that_cannot_be_read_for_any_reason_is_read_again(world: World) -> None:
    """Not only what a store is to raise: after anything else, too, mail reaches a run that is here, poll or not."""

    @workflow("waits")
    async def waits(ctx: Context) -> object:
        return await ctx.wait_for_signal("go")

    app = await world.engine(waits, hot_for=3600)
    handle = await app.start(waits)
    await world.waits(handle.id)
    broken = [RuntimeError("a bug in a driver")]

    def fault(name: str, args: tuple[Any, ...]) -> BaseException | None:
        return broken.pop() if name in ("inbox", "load") and broken else None

    world.line(app).fault = fault
    await handle.signal("go", 7)
    assert await handle.result(5) == 7
    assert not broken


async def test_mail_for_a_dropped_run_does_not_hide_its_later_life(world: World) -> None:
    """Somebody still holds a run that has left memory and asks for its mail: the run as it is here now gets its own."""
    if world.cold:
        pytest.skip("a run that waits is not in memory")

    @workflow("waits")
    async def waits(ctx: Context) -> object:
        return await ctx.wait_for_signal("go")

    app = await world.engine(waits, hot_for=3600)
    handle = await app.start(waits)
    await world.waits(handle.id)
    executor = app.engine._executor
    before = executor.residents[handle.id]
    executor.forsake(before)
    await world.until(handle.id, lambda run: run.epoch > before.epoch)
    await eventually(lambda: executor.residents.get(handle.id) not in (None, before))
    now = executor.residents[handle.id]
    app.engine._resume.mail(now)
    app.engine._resume.mail(before)
    await eventually(lambda: not now.fetching)
    await handle.signal("go", 7)
    assert await handle.result(5) == 7


async def test_a_run_that_cannot_be_taken_in_does_not_leave_its_starter_hanging(world: World) -> None:
    """Whatever goes wrong between the insert and the first turn, the caller is answered, and the run is not lost."""

    @workflow("plain")
    async def plain(ctx: Context) -> int:
        return 7

    app = await world.engine(plain, lease=SHORT)
    starter = app.engine._starter
    begin, failed = starter._begin, []

    def fails_once(new: Any, definition: Any) -> None:
        if not failed:
            failed.append(new.id)
            raise RuntimeError("no memory")
        begin(new, definition)

    starter._begin = fails_once  # type: ignore[method-assign]
    async with asyncio.timeout(5):
        handle = await app.start(plain)
    assert failed == [handle.id]
    assert await handle.result(5) == 7


async def test_a_transport_has_time_to_say_goodbye(world: World) -> None:
    """Bodies that use up the whole drain leave the transport a second to hand over what it holds."""
    given: list[float] = []

    class Watched(EventEmitterTransport):
        async def close(self, timeout: float = 10.0) -> None:
            given.append(timeout)
            await super().close(timeout)

    gate = Gate()

    @workflow("held")
    async def held(ctx: Context) -> None:
        await ctx.step("body", gate)

    app = await world.engine(held, transport=Watched())
    await app.start(held)
    await gate.reached()
    world.apps.remove(app)
    await app.close(0.0)
    assert given == [1.0]
