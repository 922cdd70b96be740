"""Cancelling: a request in the inbox, a cancel() in the workflow, a bound on cleaning up, and one terminal state ever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable import Context, RunCancelled, durable_step, workflow
from durable.core.errors import RunFinished
from durable.protocol.states import Activity, Status
from tests.engine.broker import Broker
from tests.engine.world import Gate, World, eventually


@workflow(name="waits")
async def waits(ctx: Context) -> Any:
    return await ctx.wait_for_signal("go")


async def test_S23_the_first_commit_wins_and_both_callers_learn_it(world: World) -> None:
    """Cancel against complete, many times: one terminal state each, and the canceller's answer agrees with it."""

    @workflow(name="soon")
    async def soon(ctx: Context, n: int) -> int:
        await ctx.step("a", asyncio.sleep, 0.0005 * n)
        return n

    app = await world.engine(soon)
    handles = [await app.start(soon, n) for n in range(30)]

    async def cancel(handle: Any) -> str:
        try:
            await handle.cancel("race")
        except RunFinished:
            return "too late"
        return "asked"

    answers = await asyncio.gather(*(cancel(handle) for handle in handles))
    results = await asyncio.gather(*(handle.result(5) for handle in handles), return_exceptions=True)
    for handle, answer, result in zip(handles, answers, results, strict=True):
        record = await handle.get()
        if record.status is Status.COMPLETED:
            assert isinstance(result, int)
        else:
            assert (record.status, answer) == (Status.CANCELLED, "asked")
            assert isinstance(result, RunCancelled)
        if answer == "too late":
            assert record.status is Status.COMPLETED
    await world.sound(*(handle.id for handle in handles))


async def test_a_waiting_run_is_cancelled_and_says_so(world: World) -> None:
    """The workflow gets CancelledError at its wait; waiting for it raises RunCancelled; the journal tells it."""
    app = await world.engine(waits)
    handle = await app.start(waits)
    await world.waits(handle.id)
    assert await handle.cancel("no longer needed") is True
    with pytest.raises(RunCancelled) as caught:
        await handle.result(5)
    assert caught.value.run_id == handle.id
    assert await world.statuses(handle.id, "run") == ["started", "cancelling", "cancelled"]
    assert await handle.cancel() is False, "it had been asked before"


async def test_cancelling_a_finished_run_gets_a_definite_answer(world: World) -> None:
    """A run that ended by itself cannot be cancelled any more: RunFinished."""

    @workflow(name="done")
    async def done(ctx: Context) -> None: ...

    app = await world.engine(done)
    handle = await app.start(done)
    await handle.result(5)
    with pytest.raises(RunFinished, match="too late"):
        await handle.cancel()


async def test_a_second_request_changes_nothing(world: World) -> None:
    """False to the second canceller; one `cancelling` entry."""
    gate = Gate()

    @workflow(name="slow")
    async def slow(ctx: Context) -> None:
        try:
            await ctx.wait_for_signal("never")
        finally:
            await ctx.step("clean", gate)

    app = await world.engine(slow)
    handle = await app.start(slow)
    await world.waits(handle.id)
    assert await handle.cancel() is True
    await gate.reached()
    assert await handle.cancel() is False
    gate.open()
    with pytest.raises(RunCancelled):
        await handle.result(5)
    assert (await world.statuses(handle.id, "run")).count("cancelling") == 1


async def test_a_cancel_reaches_a_running_async_body(world: World) -> None:
    """The body gets CancelledError, its step is journaled cancelled, the run ends cancelled."""
    gate = Gate()

    @workflow(name="body")
    async def body(ctx: Context) -> None:
        await ctx.step("long", gate)

    app = await world.engine(body)
    handle = await app.start(body)
    await gate.reached()
    await handle.cancel()
    with pytest.raises(RunCancelled):
        await handle.result(5)
    assert gate.cancelled == 1
    assert "cancelled" in await world.statuses(handle.id, "step")


async def test_N10_a_cancel_from_another_engine_reaches_the_body(world: World) -> None:
    """Any node may cancel; the body on the owner stops."""
    gate = Gate()

    @workflow(name="body")
    async def body(ctx: Context) -> None:
        await ctx.step("long", gate)

    owner = await world.engine(body)
    handle = await owner.start(body)
    await gate.reached()
    api = await world.engine(body, worker=False)
    await api.run(handle.id).cancel()
    with pytest.raises(RunCancelled):
        await api.run(handle.id).result(5)
    assert gate.cancelled == 1


async def test_a_cancel_reaches_a_remote_body(world: World) -> None:
    """In this process the body is cancelled; over a broker its worker is told."""
    gate, broker = Gate(), Broker()

    @durable_step("long")
    async def long() -> int:
        return await gate()

    @workflow(name="remote")
    async def remote(ctx: Context) -> Any:
        return await ctx.remote("long")

    app = await world.engine(remote, long)
    handle = await app.start(remote)
    await gate.reached()
    await handle.cancel()
    with pytest.raises(RunCancelled):
        await handle.result(5)
    await eventually(lambda: gate.cancelled == 1)

    @workflow(name="brokered")
    async def brokered(ctx: Context) -> Any:
        return await ctx.remote("long")

    app = await world.engine(brokered, transport=broker.end())
    handle = await app.start(brokered)
    task = await broker.sent()
    await handle.cancel()
    with pytest.raises(RunCancelled):
        await handle.result(5)
    await eventually(lambda: task.step_id in broker.cancelled)


async def test_a_cancelled_run_may_clean_up_with_steps(world: World) -> None:
    """ctx works while it unwinds: steps in `finally` and `except` are journaled like any other, over a crash too."""
    gate = Gate()

    @workflow(name="cleans")
    async def cleans(ctx: Context) -> None:
        try:
            await ctx.wait_for_signal("never")
        except asyncio.CancelledError:
            await ctx.step("release", gate)
            raise

    app = await world.engine(cleans)
    handle = await app.start(cleans)
    await world.waits(handle.id)
    await handle.cancel()
    await gate.reached()
    await world.until_journal(handle.id, lambda lines: "step release started" in lines)
    await world.crash(app)
    app = await world.engine(cleans)
    await gate.reached(2)
    gate.open()
    with pytest.raises(RunCancelled):
        await app.run(handle.id).result(5)
    assert "step release completed" in await world.statuses(handle.id)
    await world.sound(handle.id)


async def test_clean_up_has_a_bound(world: World) -> None:
    """After `cancel_grace` the run is cancelled, whatever it still does; its body is cancelled with it."""
    gate = Gate()

    @workflow(name="never-ends")
    async def never_ends(ctx: Context) -> None:
        try:
            await ctx.wait_for_signal("never")
        finally:
            await ctx.step("for ever", gate)

    app = await world.engine(never_ends, cancel_grace=0.1)
    handle = await app.start(never_ends)
    await world.waits(handle.id)
    await handle.cancel()
    with pytest.raises(RunCancelled, match="clean-up"):
        await handle.result(5)
    await eventually(lambda: gate.cancelled == 1)
    await world.sound(handle.id)


async def test_a_run_that_swallows_its_cancellation_completes(world: World) -> None:
    """It was asked, not killed: returning a value is completing."""

    @workflow(name="stubborn")
    async def stubborn(ctx: Context) -> str:
        try:
            await ctx.wait_for_signal("never")
        except asyncio.CancelledError:
            return "finished anyway"
        return ""

    app = await world.engine(stubborn)
    handle = await app.start(stubborn)
    await world.waits(handle.id)
    await handle.cancel()
    assert await handle.result(5) == "finished anyway"


async def test_a_run_nobody_has_begun_can_be_cancelled(world: World) -> None:
    """Scheduled for tomorrow, cancelled today: it ends now."""
    app = await world.engine(waits)
    handle = await app.start(waits, delay="1d")
    await handle.cancel()
    with pytest.raises(RunCancelled):
        await handle.result(5)
    await world.sound(handle.id)


async def test_a_cancelling_run_shows_it(world: World) -> None:
    """While it cleans up without a body, the activity is `cancelling`."""

    @workflow(name="lingers")
    async def lingers(ctx: Context) -> None:
        try:
            await ctx.wait_for_signal("never")
        finally:
            await ctx.wait_for_signal("let go")

    app = await world.engine(lingers)
    handle = await app.start(lingers)
    await world.waits(handle.id)
    await handle.cancel()
    await world.until(handle.id, lambda r: r.activity == Activity.CANCELLING)
    await handle.signal("let go")
    with pytest.raises(RunCancelled):
        await handle.result(5)


async def test_cancelling_what_a_run_awaits_itself_goes_on_at_once(world: World) -> None:
    """A task cancelled inside the workflow: its step is journaled cancelled, the body told, and a late result never seen."""
    gate = Gate()

    @workflow(name="inner")
    async def inner(ctx: Context) -> str:
        task = asyncio.ensure_future(ctx.step("long", gate))
        await ctx.sleep(0.03)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled it"
        return ""

    app = await world.engine(inner)
    handle = await app.start(inner)
    assert await handle.result(5) == "cancelled it"
    assert gate.cancelled == 1
    assert await world.statuses(handle.id, "step") in (["started", "cancelled"], ["cancelled"])


async def test_B22_nothing_is_written_after_the_end(world: World) -> None:
    """A body that insists on finishing after the cancel changes neither the row nor the journal."""
    release = asyncio.Event()
    ended: list[str] = []

    async def insists() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await release.wait()
            ended.append("insisted")
            return "late"
        return ""

    @workflow(name="insistent")
    async def insistent(ctx: Context) -> None:
        await ctx.step("insists", insists)

    app = await world.engine(insistent)
    handle = await app.start(insistent)
    await world.until_journal(handle.id, lambda lines: "step insists started" in lines)
    await handle.cancel()
    with pytest.raises(RunCancelled):
        await handle.result(5)
    before = (await world.record(handle.id), await world.journal(handle.id))
    release.set()
    await eventually(lambda: ended)
    await asyncio.sleep(0.05)
    assert (await world.record(handle.id), await world.journal(handle.id)) == before
