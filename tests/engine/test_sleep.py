"""Durable timers: never early, never lost, fired once, and nothing stored for them until they fire."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from durable import Context, DurableError, workflow
from durable.core.clock import SystemClock
from durable.core.errors import DefinitionError
from durable.protocol.states import Activity
from tests.engine.world import World, all_results


@workflow(name="nap")
async def nap(ctx: Context, seconds: float) -> list[float]:
    before = ctx.now()
    await ctx.sleep(seconds)
    return [before.timestamp(), ctx.now().timestamp()]


async def test_S21_a_timer_is_never_early_and_fires_once(world: World) -> None:
    """By the store's clock, for many delays, with engines changing: never before its time, one `fired` entry each."""
    app = await world.engine(nap)
    delays = [0.01 + 0.007 * n for n in range(20)]
    handles = [await app.start(nap, delay) for delay in delays]
    for handle, delay in zip(handles, delays, strict=True):
        before, after = await handle.result(5)
        assert after - before >= delay - 1e-6
        assert await world.statuses(handle.id, "timer") == ["fired"]
    await world.sound(*(handle.id for handle in handles))


async def test_S21_a_timer_that_came_due_while_nobody_ran_fires_at_once(world: World) -> None:
    """Down over the deadline: the next engine fires it, once, and says so in the journal's order."""
    app = await world.engine(nap)
    handle = await app.start(nap, 0.1)
    await world.until(handle.id, lambda r: r.activity == Activity.SLEEPING)
    await world.crash(app)
    await asyncio.sleep(0.15)
    app = await world.engine(nap)
    before, after = await app.run(handle.id).result(5)
    assert after - before >= 0.1
    assert await world.statuses(handle.id, "timer") == ["fired"]


async def test_S21_a_long_sleep_leaves_memory_and_its_wake_time_is_stored(world: World) -> None:
    """A run that sleeps for days holds nothing: no memory, no owner, a wake time on the row, no journal entry."""
    app = await world.engine(nap)
    handle = await app.start(nap, 30 * 86_400.0)
    record = await world.until(handle.id, lambda r: r.owner is None and r.activity == Activity.SLEEPING)
    assert app.engine._executor.residents == {}
    assert record.wake_at is not None
    assert record.wake_at - (await world.journal(handle.id))[0].at == 30 * 86_400 * 10**6
    assert await world.statuses(handle.id) == ["run started"]


async def test_asyncio_sleep_is_a_durable_timer(world: World) -> None:
    """Plain `asyncio.sleep` in a workflow survives its engine."""

    @workflow(name="plain")
    async def plain(ctx: Context) -> str:
        await asyncio.sleep(0.15)
        return "slept"

    app = await world.engine(plain)
    handle = await app.start(plain)
    await world.waits(handle.id)
    await world.crash(app)
    app = await world.engine(plain)
    assert await app.run(handle.id).result(5) == "slept"
    assert (await world.statuses(handle.id, "timer")) == ["fired"]


async def test_sleep_until_and_its_errors(world: World) -> None:
    """A moment with a zone; one in the past is no wait; one without a zone, a negative or an absurd delay is refused."""

    @workflow(name="until")
    async def until(ctx: Context) -> list[str]:
        await ctx.sleep_until(ctx.now() + timedelta(milliseconds=20))
        await ctx.sleep_until(datetime(2000, 1, 1, tzinfo=UTC))
        await ctx.sleep(0)
        refused = []
        for bad in (
            lambda: ctx.sleep_until(datetime(2030, 1, 1)),
            lambda: ctx.sleep(-1),
            lambda: ctx.sleep(float("nan")),
            lambda: ctx.sleep(10.0**18),
        ):
            try:
                await bad()
            except DefinitionError as error:
                refused.append(error.code)
        return refused

    app = await world.engine(until)
    assert await app.start_and_wait(until, timeout=5) == ["bad_definition"] * 4


async def test_timers_due_together_fire_in_order_of_their_deadlines(world: World) -> None:
    """After a downtime over several deadlines, the workflow sees them in the order they were due."""

    @workflow(name="order")
    async def order(ctx: Context) -> list[int]:
        seen: list[int] = []

        async def one(n: int, delay: float) -> None:
            await ctx.sleep(delay)
            seen.append(n)

        async with asyncio.TaskGroup() as group:
            for n, delay in enumerate((0.12, 0.06, 0.09)):
                group.create_task(one(n, delay))
        return seen

    app = await world.engine(order)
    handle = await app.start(order)
    await world.waits(handle.id)
    await world.crash(app)
    await asyncio.sleep(0.15)
    app = await world.engine(order)
    assert await app.run(handle.id).result(5) == [1, 2, 0]


async def test_many_timers_in_one_moment_all_fire(world: World) -> None:
    """Three hundred runs due together: every one goes on."""
    app = await world.engine(nap)
    handles = await asyncio.gather(*(app.start(nap, 0.2) for _ in range(300)))
    results = await all_results(handles)
    assert len(results) == 300
    assert all(after - before >= 0.2 - 1e-6 for before, after in results)


class Skewed(SystemClock):
    """A machine whose wall clock is wrong."""

    def __init__(self, minutes: float) -> None:
        self._off = int(minutes * 60 * 10**6)

    def now(self) -> int:
        return super().now() + self._off


@pytest.mark.parametrize("minutes", [-10.0, 10.0], ids=["behind", "ahead"])
async def test_S31_ten_minutes_of_skew_change_nothing(world: World, minutes: float) -> None:
    """An engine whose wall clock is wrong sleeps as long, stamps as the store would, and is not taken for dead."""
    right = await world.engine(nap, worker=False)
    wrong = await world.engine(nap, clock=Skewed(minutes))
    handle = await right.start(nap, 0.05)
    before, after = await handle.result(5)
    now = SystemClock().now() / 1e6
    assert abs(before - now) < 30
    assert 0.05 - 1e-6 <= after - before < 5
    assert wrong.engine.incarnation
    later = await wrong.start(nap, 0.01, delay=0.05)
    record = await later.get()
    assert record.wake_at is not None
    assert abs(record.wake_at / 1e6 - now) < 30
    await later.result(5)
    await world.sound(handle.id, later.id)


async def test_now_uuid_and_random_are_the_same_on_every_replay(world: World) -> None:
    """They cost no rows, and a run that changes engines sees the same values again."""
    seen: list[list[str]] = []

    @workflow(name="values")
    async def values(ctx: Context) -> list[str]:
        drawn = [ctx.now().isoformat(), str(ctx.uuid()), str(ctx.random()), str(ctx.uuid())]
        seen.append(drawn)
        await ctx.wait_for_signal("go")
        return [*drawn, str(ctx.uuid()), str(ctx.random())]

    app = await world.engine(values)
    handle = await app.start(values)
    await world.waits(handle.id)
    await world.crash(app)
    app = await world.engine(values)
    await app.run(handle.id).signal("go")
    result = await app.run(handle.id).result(5)
    assert len(seen) >= 2
    assert all(drawn == seen[0] for drawn in seen)
    assert result[:4] == seen[0]
    assert len(set(result)) == 6
    assert [entry.kind for entry in await world.journal(handle.id)] == ["run", "signal", "run"]


async def test_side_effect_is_drawn_once(world: World) -> None:
    """What `side_effect` returned is journaled; no replay calls it again."""
    calls: list[int] = []

    @workflow(name="draws")
    async def draws(ctx: Context) -> int:
        def draw() -> int:
            calls.append(1)
            return len(calls)

        number = await ctx.side_effect(draw)
        await ctx.wait_for_signal("go")
        return number

    app = await world.engine(draws)
    handle = await app.start(draws)
    await world.waits(handle.id)
    await handle.signal("go")
    assert await handle.result(5) == 1
    assert calls == [1]


async def test_gather_modes(world: World) -> None:
    """all, settled and first: the rest of `first` is cancelled, and a race has the same winner on every replay."""

    @workflow(name="modes")
    async def modes(ctx: Context) -> list[object]:
        async def fail() -> None:
            raise ValueError("one of them")

        both = await ctx.gather(ctx.step("a", lambda: 1), ctx.step("b", lambda: 2))
        settled = await ctx.gather(ctx.step("c", lambda: 3), ctx.step("d", fail, retries=0), mode="settled")
        first = await ctx.gather(ctx.wait_for_signal("never"), ctx.step("e", lambda: 5), mode="first")
        await ctx.wait_for_signal("go")
        return [both, settled[0], type(settled[1]).__name__, first]

    app = await world.engine(modes)
    handle = await app.start(modes)
    await world.waits(handle.id)
    await handle.signal("go")
    assert await handle.result(5) == [[1, 2], 3, "StepFailed", 5]


async def test_ctx_after_the_run_is_refused(world: World) -> None:
    """A ctx that was smuggled out cannot be used from anywhere else."""
    smuggled: list[Context] = []

    @workflow(name="smuggles")
    async def smuggles(ctx: Context) -> None:
        smuggled.append(ctx)

    app = await world.engine(smuggles)
    await app.start_and_wait(smuggles, timeout=5)
    with pytest.raises(DurableError, match="ctx"):
        smuggled[0].step("late", lambda: 1)
