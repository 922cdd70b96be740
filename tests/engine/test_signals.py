"""Signals: kept whenever they come, in order per name, used once each, typed, and refused where they could never arrive."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from durable import Context, WaitTimeout, workflow
from durable.core.errors import PayloadError, PayloadText, RunFinished, RunNotFound
from durable.protocol.states import Activity, Status
from durable.store.records import Message
from tests.engine.world import World


@workflow(name="collect")
async def collect(ctx: Context, count: int) -> list[Any]:
    return [await ctx.wait_for_signal("item") for _ in range(count)]


async def test_S16_an_early_signal_is_kept_until_it_is_waited_for(world: World) -> None:
    """Sent before any wait, before a delayed run has even begun: nothing is lost, the order is kept."""
    app = await world.engine(collect)
    handle = await app.start(collect, 3, delay=0.1)
    for n in range(3):
        assert await handle.signal("item", n)
    assert await handle.result(5) == [0, 1, 2]
    await world.sound(handle.id)


async def test_S16_signals_are_first_in_first_out_per_name(world: World) -> None:
    """Names do not mix; within one, the oldest comes first, whichever wait comes first."""

    @workflow(name="two")
    async def two(ctx: Context) -> list[Any]:
        await ctx.step("settle", lambda: asyncio.sleep(0.05))
        b = [await ctx.wait_for_signal("b"), await ctx.wait_for_signal("b")]
        return [*b, await ctx.wait_for_signal("a"), await ctx.wait_for_signal("a")]

    app = await world.engine(two)
    handle = await app.start(two)
    for name, value in (("a", 1), ("b", 2), ("a", 3), ("b", 4)):
        await handle.signal(name, value)
    assert await handle.result(5) == [2, 4, 1, 3]


async def test_S17_a_signal_is_used_by_one_wait_only(world: World) -> None:
    """Two waits for one name take two signals, the earlier wait the earlier signal; also over crashes."""

    @workflow(name="pair")
    async def pair(ctx: Context) -> list[Any]:
        return list(await asyncio.gather(ctx.wait_for_signal("x"), ctx.wait_for_signal("x")))

    app = await world.engine(pair)
    handle = await app.start(pair)
    await world.waits(handle.id)
    await handle.signal("x", "first")
    await world.until_journal(handle.id, lambda lines: sum("received" in line for line in lines) == 1)
    await world.crash(app)
    app = await world.engine(pair)
    handle = app.run(handle.id)
    await handle.signal("x", "second")
    assert await handle.result(5) == ["first", "second"]
    assert (await world.statuses(handle.id, "signal")) == ["received", "received"]


async def test_S18_a_doubled_signal_counts_once(world: World) -> None:
    """The same id again is no news: False to the sender, and one row."""
    app = await world.engine(collect)
    handle = await app.start(collect, 2)
    assert await handle.signal("item", "a", id="order-1") is True
    assert await handle.signal("item", "a", id="order-1") is False
    answers = await asyncio.gather(*(handle.signal("item", "b", id="order-2") for _ in range(5)))
    assert sorted(answers) == [False, False, False, False, True]
    assert await handle.result(5) == ["a", "b"]


async def test_S18_a_signal_to_a_finished_run_gets_a_definite_answer(world: World) -> None:
    """RunFinished, and nothing is stored; RunNotFound for an id nobody has."""
    app = await world.engine(collect)
    handle = await app.start(collect, 0)
    await handle.result(5)
    with pytest.raises(RunFinished, match="too late") as caught:
        await handle.signal("item", 1)
    assert caught.value.run_id == handle.id
    with pytest.raises(RunNotFound, match="There is no run"):
        await app.run("nobody").signal("item")
    assert (await world.record(handle.id)).inbox_last == 0


async def test_B25_one_id_to_two_runs_is_delivered_to_both(world: World) -> None:
    """A signal's id is unique per recipient, not in the world."""
    app = await world.engine(collect)
    one, two = await app.start(collect, 1), await app.start(collect, 1)
    assert await one.signal("item", 1, id="same")
    assert await two.signal("item", 2, id="same")
    assert await asyncio.gather(one.result(5), two.result(5)) == [[1], [2]]


async def test_B11_a_signal_that_lands_while_the_run_goes_to_sleep_wakes_it(world: World) -> None:
    """Between "the inbox is empty" and "it is parked": delivered once, with no poll to heal it."""
    app = await world.engine(collect, poll_every=30, hot_for=0.0, beat_every=0.01)
    store = await world.store()
    sent: list[int] = []
    original = world.line(app).commit

    async def commit(batch: Any) -> Any:
        # The signal is in the store before this commit is, and after the run last looked.
        for one in batch:
            if one.suspend and len(sent) < 20:
                sent.append(len(sent))
                await store.send([Message(one.run_id, f"s{len(sent)}", "signal", "item", b"%d" % sent[-1])])
        return await original(batch)

    app.engine._executor.commits._call = commit
    handle = await app.start(collect, 20)
    assert await handle.result(10) == list(range(20))
    await world.sound(handle.id)


async def test_B11_a_storm_of_signals_loses_none(world: World) -> None:
    """Fifty signals from five senders while the run parks and wakes: each is delivered once, each sender's in its order."""
    app = await world.engine(collect, hot_for=0.0)
    handle = await app.start(collect, 50)

    async def sender(name: str) -> None:
        for n in range(10):
            await app.run(handle.id).signal("item", f"{name}{n}")
            await asyncio.sleep(0.001)

    await asyncio.gather(*(sender(name) for name in "abcde"))
    result = await handle.result(10)
    assert len(set(result)) == 50
    for name in "abcde":
        assert [value for value in result if value.startswith(name)] == [f"{name}{n}" for n in range(10)]
    await world.sound(handle.id)


async def test_B01_one_outcome_when_one_engine_takes_the_signal_and_another_the_timeout(world: World) -> None:
    """A paused owner wakes with the signal in hand while the next owner has timed the wait out: one outcome, and the
    message is there for the next wait."""

    @workflow(name="race")
    async def race(ctx: Context) -> list[Any]:
        first = await ctx.wait_for_signal("x", timeout=0.3, default="timeout")
        if first != "timeout":
            return [first]
        return [first, await ctx.wait_for_signal("x")]

    app = await world.engine(race, lease=0.2)
    handle = await app.start(race)
    await world.waits(handle.id)
    world.pause(app)
    other = await world.engine(race)
    await world.until_journal(handle.id, lambda lines: any("timer" in line for line in lines))
    await other.run(handle.id).signal("x", "late")
    world.resume(app)
    assert await other.run(handle.id).result(5) == ["timeout", "late"]
    await world.sound(handle.id)


async def test_a_wait_may_time_out_as_a_value_or_as_an_error(world: World) -> None:
    """With `default` the wait returns it; without, it raises WaitTimeout, which is a TimeoutError too."""

    @workflow(name="impatient")
    async def impatient(ctx: Context) -> list[Any]:
        value = await ctx.wait_for_signal("x", timeout=0.02, default="nothing")
        try:
            await ctx.wait_for_signal("x", timeout="20ms")
        except WaitTimeout as error:
            return [value, isinstance(error, TimeoutError), error.code]
        return []

    app = await world.engine(impatient)
    handle = await app.start(impatient)
    assert await handle.result(5) == ["nothing", True, "wait_timeout"]
    await world.sound(handle.id)


async def test_a_signal_after_its_waits_timeout_is_for_the_next_wait(world: World) -> None:
    """A wait that timed out takes nothing along with it."""

    @workflow(name="again")
    async def again(ctx: Context) -> list[Any]:
        first = await ctx.wait_for_signal("x", timeout=0.02, default=None)
        return [first, await ctx.wait_for_signal("x")]

    app = await world.engine(again)
    handle = await app.start(again)
    await world.until_journal(handle.id, lambda lines: any("timer" in line for line in lines))
    await handle.signal("x", "second")
    assert await handle.result(5) == [None, "second"]


@dataclass
class Decision:
    by: str
    amount: Decimal


async def test_a_signal_is_what_its_wait_says_it_is(world: World) -> None:
    """With `type` the payload comes back as that type; one that does not fit is a PayloadError at the wait."""

    @workflow(name="typed")
    async def typed(ctx: Context) -> list[str]:
        decision = await ctx.wait_for_signal("decide", type=Decision)
        assert isinstance(decision, Decision)
        try:
            await ctx.wait_for_signal("decide", type=Decision)
        except PayloadError as error:
            return [decision.by, str(decision.amount), error.code]
        return []

    app = await world.engine(typed)
    handle = await app.start(typed)
    await handle.signal("decide", Decision("kim", Decimal("12.50")))
    await handle.signal("decide", {"by": "kim"})
    assert await handle.result(5) == ["kim", "12.50", "payload_type"]


@pytest.mark.parametrize(
    ("value", "error"),
    [(object(), PayloadError), ("a\0b", PayloadText), ("\ud800", PayloadText), (float("nan"), PayloadError)],
    ids=["object", "nul", "surrogate", "nan"],
)
async def test_a_bad_payload_is_refused_at_the_sender(world: World, value: Any, error: type[Exception]) -> None:
    """What cannot be kept raises at `signal`; the run is not touched."""
    app = await world.engine(collect)
    handle = await app.start(collect, 1)
    with pytest.raises(error, match="payload of signal 'item'"):
        await handle.signal("item", value)
    assert (await world.record(handle.id)).inbox_last == 0
    await handle.signal("item", "good")
    assert await handle.result(5) == ["good"]


async def test_an_unused_signal_does_not_hold_a_run_back(world: World) -> None:
    """A run that nothing waits in may end with signals left over; they are journaled, and nothing is wrong."""

    @workflow(name="deaf")
    async def deaf(ctx: Context) -> str:
        await ctx.wait_for_signal("go")
        return "done"

    app = await world.engine(deaf)
    handle = await app.start(deaf)
    await handle.signal("noise", 1)
    await handle.signal("go")
    assert await handle.result(5) == "done"
    await world.sound(handle.id)


async def test_a_signal_from_another_engine_wakes_the_owner(world: World) -> None:
    """Sender and owner need not be the same engine; hints make it fast, the poll makes it certain."""
    owner = await world.engine(collect)
    handle = await owner.start(collect, 1)
    await world.waits(handle.id)
    api = await world.engine(collect, worker=False)
    await api.run(handle.id).signal("item", "from afar")
    assert await api.run(handle.id).result(5) == ["from afar"]


async def test_B16_with_every_hint_lost_the_poll_delivers(world: World) -> None:
    """Control plane and store hints silenced: the signal still arrives within the poll."""
    owner = await world.engine(collect, poll_every=0.1)
    handle = await owner.start(collect, 1)
    await world.waits(handle.id)
    for unlisten in owner.engine._unlisten:
        unlisten()
    owner.engine._unlisten.clear()
    api = await world.engine(collect, worker=False, poll_every=0.1)
    await api.run(handle.id).signal("item", "in the end")
    assert await api.run(handle.id).result(5) == ["in the end"]


async def test_S18_a_signal_of_another_workspace_is_refused(world: World) -> None:
    """A run of another workspace does not exist here: not for signals, not for cancels, not for looking."""
    app = await world.engine(collect)
    handle = await app.start(collect, 1)
    stranger = await world.engine(collect, workspace="other", worker=False)
    for attempt in (stranger.run(handle.id).signal("item"), stranger.run(handle.id).cancel(), stranger.get(handle.id)):
        with pytest.raises(RunNotFound):
            await attempt
    with pytest.raises(RunNotFound):
        await stranger.run(handle.id).result(1)
    assert (await world.record(handle.id)).inbox_last == 0


async def test_B07_every_suspended_run_has_a_wake_time(world: World) -> None:
    """Waiting for a signal without a timeout: the row says when it is looked at again at the latest."""
    app = await world.engine(collect, hot_for=0.0, lease=0.3)
    handle = await app.start(collect, 1)
    if not world.cold:
        app.engine._executor.settler.evict()
    record = await world.waits(handle.id)
    if record.owner is None:
        assert record.wake_at is not None
        assert record.wake_at > record.updated_at
    await world.crash(app)
    app = await world.engine(collect)
    record = await world.until(handle.id, lambda r: r.activity is Activity.WAITING)
    assert record.status is Status.ACTIVE
    assert record.owner is not None or record.wake_at is not None
    await app.run(handle.id).signal("item", 1)
    assert await app.run(handle.id).result(5) == [1]
