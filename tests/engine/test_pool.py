"""Remote steps over several transports: failed over, pinned, asked after where they went, and counted once whoever answers."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from durable import Context, Durable, DurableError, RetryPolicy, RunFailed, durable_step, workflow
from durable.engine.attempts import RetryNote
from durable.protocol.states import Activity
from durable.transports.event_emitter import EventEmitterTransport
from tests.engine.broker import Broker
from tests.engine.world import Gate, World, eventually

QUICK = RetryPolicy(max_attempts=3, initial_delay=0.01, jitter=0.0)


@workflow(name="far")
async def far(ctx: Context) -> object:
    return await ctx.remote("far", {"n": 1}, retries=QUICK)


async def went(world: World, run_id: str) -> list[str]:
    """Ids of the members that accepted the run's tasks, from its journal."""
    notes = [entry.payload for entry in await world.journal(run_id) if entry.status == "published"]
    return [msgspec.json.decode(note or b"")["transport"] for note in notes]


async def test_N8_a_task_fails_over_and_the_journal_says_where_it_went(world: World) -> None:
    """The first member refuses, the second takes it under its stamp, and its answer is heard."""
    one, two = Broker(), Broker()
    one.refusing = "maintenance"
    app = await world.engine(far, transports={"one": one.end(), "two": two.end()})
    handle = await app.start(far)
    task = await two.sent()
    assert (task.transport, task.attempt) == ("two", 1)
    await two.answer(task, "done")
    assert await handle.result(5) == "done"
    assert await world.statuses(handle.id, "remote") == ["dispatched", "published", "completed"]
    assert await went(world, handle.id) == ["two"]
    await world.sound(handle.id)


async def test_N8_when_no_member_takes_it_the_attempt_fails_with_every_cause(world: World) -> None:
    """The journaled error names each member; the attempt is retried, and goes where there is room by then."""
    one, two = Broker(), Broker()
    one.refusing, two.refusing = "maintenance", "queue full"
    app = await world.engine(far, transports={"one": one.end(), "two": two.end()})
    handle = await app.start(far)
    await world.until_journal(handle.id, lambda lines: "remote far retrying" in lines)
    entry = next(entry for entry in await world.journal(handle.id) if entry.status == "retrying")
    error = msgspec.json.decode(entry.payload or b"", type=RetryNote).error
    assert error.code == "all_transports_failed"
    assert "one: maintenance; two: queue full" in error.message
    two.refusing = None
    await two.answer(await two.sent(), "at last")
    assert await handle.result(5) == "at last"


async def test_N8_a_step_goes_where_it_is_pinned(world: World) -> None:
    """By its own option, or by the call's, which comes first; where the pinned one refuses, the others do."""
    one, two, three = Broker(), Broker(), Broker()

    @durable_step("render", transport="two")
    async def render() -> int: ...

    @workflow(name="pinned")
    async def pinned(ctx: Context) -> list[object]:
        return [await ctx.remote(render), await ctx.remote(render, transport="three"), await ctx.remote("plain")]

    app = await world.engine(pinned, render, transports={"one": one.end(), "two": two.end(), "three": three.end()})
    handle = await app.start(pinned)
    await two.answer(await two.sent(), 1)
    await three.answer(await three.sent(), 2)
    await one.answer(await one.sent(), 3)
    assert await handle.result(5) == [1, 2, 3]
    assert await went(world, handle.id) == ["two", "three", "one"]
    two.refusing = "gone fishing"
    again = await app.start(pinned)
    assert (await one.sent(2)).transport == "one"
    await again.cancel()


async def test_N8_a_pin_to_an_unknown_member_fails_the_step_at_once(world: World) -> None:
    """No attempt more, and the message names the members there are."""

    @workflow(name="lost")
    async def lost(ctx: Context) -> object:
        return await ctx.remote("far", transport="kafka", retries=QUICK)

    broker = Broker()
    app = await world.engine(lost, transports={"one": broker.end()})
    handle = await app.start(lost)
    with pytest.raises(RunFailed, match="no transport 'kafka' here: the pool has 'one'"):
        await handle.result(5)
    assert broker.tasks == []
    assert (await world.statuses(handle.id, "remote")) == ["dispatched", "failed"]


async def test_S15_a_task_on_two_members_counts_once(world: World) -> None:
    """The first took it and said it had not: both are worked on, both answer, the first answer there is counts."""
    one, two, seen = Broker(), Broker(), []

    @workflow(name="twice")
    async def twice(ctx: Context) -> object:
        seen.append(await ctx.remote("far"))
        await ctx.wait_for_signal("go")
        return seen[-1]

    one.doubting = True
    app = await world.engine(twice, transports={"one": one.end(), "two": two.end()})
    handle = await app.start(twice)
    a, b = await one.sent(), await two.sent()
    assert (a.step_id, a.attempt, a.transport) == (b.step_id, b.attempt, "one")
    await world.until_journal(handle.id, lambda lines: "remote far published" in lines)
    await one.answer(a, "late from one")
    await two.answer(b, "from two")
    await two.answer(b, "from two")
    await handle.signal("go")
    assert await handle.result(5) == "late from one"
    assert set(seen) == {"late from one"}
    assert (await world.statuses(handle.id, "remote")).count("completed") == 1
    await world.sound(handle.id)


async def test_S15_a_member_that_hangs_is_passed_over(world: World) -> None:
    """After `dispatch_timeout` the next one has the task; what comes after it does not wait at all."""
    one, two = Broker(), Broker()
    one.hanging = True
    app = await world.engine(
        far, transports={"one": one.end(), "two": two.end()}, dispatch_timeout=0.05, cool_down=60.0
    )
    handle = await app.start(far)
    await two.answer(await two.sent(), 1)
    assert await handle.result(5) == 1
    assert "did not answer within 0.05 s" in app.engine.deps.transport.sick["one"]
    again = await app.start(far)
    await two.answer(await two.sent(2), 2)
    assert await again.result(5) == 2


async def test_S15_a_member_that_accepts_and_loses_costs_an_attempt_and_the_next_goes_over_another(
    world: World,
) -> None:
    """(S9, S15) Only the step's timeout can tell. The next attempt goes to the other member under the same step id and is
    answered; what turns up later is recorded as late."""
    one, two = Broker(), Broker()

    @workflow(name="patient")
    async def patient(ctx: Context) -> object:
        result = await ctx.remote("far", timeout=0.1, retries=QUICK)
        await ctx.wait_for_signal("go")
        return result

    app = await world.engine(patient, transports={"one": one.end(), "two": two.end()})
    handle = await app.start(patient)
    lost, second = await one.sent(), await two.sent()
    assert (lost.attempt, second.attempt, second.step_id, second.transport) == (1, 2, lost.step_id, "two")
    await two.answer(second, "second")
    await one.answer(lost, "found again")
    await handle.signal("go")
    assert await handle.result(5) == "second"
    await world.until_journal(handle.id, lambda lines: any(line.endswith(" late") for line in lines))
    await world.sound(handle.id)


async def test_a_cancelled_step_is_told_to_the_member_that_has_it(world: World) -> None:
    """Nobody else is bothered with it."""
    one, two = Broker(), Broker()
    one.refusing = "maintenance"
    app = await world.engine(far, transports={"one": one.end(), "two": two.end()})
    handle = await app.start(far)
    task = await two.sent()
    await world.until_journal(handle.id, lambda lines: "remote far published" in lines)
    await handle.cancel()
    await eventually(lambda: two.cancelled == [task.step_id], "its worker is told")
    assert one.cancelled == []


async def test_D9_a_new_owner_asks_the_member_that_accepted(world: World) -> None:
    """The journal knows which: while that one holds the task it is not sent again, though others know nothing of it; once
    it has lost it, it is sent again under the same id."""
    if world.cold:
        pytest.skip("a run that has left memory is not taken over")
    one, two = Broker(), Broker()
    one.refusing = "maintenance"
    app = await world.engine(far, transports={"one": one.end(), "two": two.end()})
    handle = await app.start(far)
    task = await two.sent()
    await world.until_journal(handle.id, lambda lines: "remote far published" in lines)
    await world.crash(app)
    asked: list[str] = []
    ends = {"one": one.end(), "two": two.end()}
    for id, end in ends.items():

        async def holding(step_ids: list[str], id: str = id, holding: object = end.holding) -> object:
            asked.append(id)
            return await holding(step_ids)  # type: ignore[operator]

        end.holding = holding  # type: ignore[method-assign, assignment]
    one.refusing = None
    app = await world.engine(far, transports=ends)
    await eventually(lambda: asked, "it is asked after")
    assert (asked, one.tasks, len(two.tasks)) == (["two"], [], 1)
    await world.crash(app)
    two.held.clear()
    app = await world.engine(far, transports={"one": one.end(), "two": two.end()})
    again = await one.sent()
    assert (again.step_id, again.attempt) == (task.step_id, task.attempt)
    await one.answer(again, "again")
    assert await app.run(handle.id).result(5) == "again"
    assert await went(world, handle.id) in (["two", "one"], ["two"])  # the second mark may come after the answer
    await world.sound(handle.id)


async def test_a_task_with_a_member_that_is_gone_is_sent_again_over_what_there_is(world: World) -> None:
    """After a deploy without that transport nobody could ask it or hear it; the same task goes to the others."""
    if world.cold:
        pytest.skip("a run that has left memory is not taken over")
    old, new = Broker(), Broker()
    app = await world.engine(far, transports={"old": old.end()})
    handle = await app.start(far)
    task = await old.sent()
    await world.until_journal(handle.id, lambda lines: "remote far published" in lines)
    await world.crash(app)
    app = await world.engine(far, transports={"new": new.end()})
    again = await new.sent()
    assert (again.step_id, again.attempt, again.transport) == (task.step_id, task.attempt, "new")
    await new.answer(again, "moved")
    assert await app.run(handle.id).result(5) == "moved"


async def test_whether_a_run_may_leave_memory_is_up_to_the_member_that_has_its_task(world: World) -> None:
    """A task at a broker lets its run go, one in this process keeps it: in the same pool, side by side."""
    broker, gate = Broker(), Gate()

    @durable_step("near")
    async def near() -> int:
        return await gate()

    @workflow(name="near")
    async def near_by(ctx: Context) -> object:
        return await ctx.remote(near, transport="local")

    app = await world.engine(
        far, near_by, near, transports={"broker": broker.end(), "local": EventEmitterTransport()}, hot_for=0.0
    )
    leaves, stays = await app.start(far), await app.start(near_by)
    await gate.reached()
    await broker.sent()
    for handle in (leaves, stays):
        await world.until_journal(handle.id, lambda lines: any("published" in line for line in lines))
    app.engine._executor.settler.evict()
    await world.until(leaves.id, lambda r: r.owner is None and r.activity == Activity.WAITING, "it has left")
    app.engine._executor.settler.evict()
    assert (await world.record(stays.id)).owner is not None
    gate.open()
    await broker.answer(broker.tasks[0], "far")
    assert await asyncio.gather(leaves.result(5), stays.result(5)) == ["far", 1]


async def test_a_step_served_here_runs_here_when_the_broker_is_away(world: World) -> None:
    """The engine serves its steps on every member, so the in-process one stands in, and the workflow need not know."""

    @durable_step("double")
    async def double(n: int) -> int:
        return 2 * n

    @workflow(name="doubling")
    async def doubling(ctx: Context) -> int:
        result: int = await ctx.remote(double, 4)
        return result

    broker = Broker()
    broker.refusing = "down"
    end = broker.end()
    app = await world.engine(doubling, double, transports={"broker": end, "local": EventEmitterTransport()})
    assert await app.start_and_wait(doubling, timeout=5) == 8
    assert end.served == ["double"]


async def test_one_way_to_say_it() -> None:
    """`transport` and `transports` together are refused; one transport is a pool of one, called `default`."""
    with pytest.raises(DurableError, match="not both"):
        Durable("memory://", transport=EventEmitterTransport(), transports={"a": EventEmitterTransport()})
    async with Durable("memory://") as app:
        assert list(app.engine.deps.transport.members) == ["default"]


async def test_B18_what_a_member_has_lost_goes_over_another(world: World) -> None:
    """A member that no longer holds a task it took is passed over when the task is sent again."""
    one, two = Broker(), Broker()
    app = await world.engine(
        far, transports={"one": one.end(), "two": two.end()}, ask_every=0.1, lease=0.3, poll_every=0.05
    )
    handle = await app.start(far)
    lost = await one.sent()
    one.held.clear()
    task = await two.sent()
    assert (task.step_id, task.attempt) == (lost.step_id, 1)
    await two.answer(task, "done")
    assert await handle.result(5) == "done"
