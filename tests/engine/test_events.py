"""Events: what they start, whom they wake, and that neither is lost or doubled, whatever stops in between."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from msgspec import Raw

from durable import Context, Event, Publication, Trigger, WaitTimeout, workflow
from durable.core.errors import DefinitionError, PayloadTooLarge, StepFailed, StoreUnavailable
from durable.core.event import fact_of
from durable.protocol.states import Status
from durable.store.admission import EventQuery, NewEvent, Verdict
from durable.store.records import Message, OpenWaiter
from tests.engine.conftest import on_postgres
from tests.engine.world import World, all_results


@dataclass
class Order:
    id: str
    total: Decimal


@workflow(name="paid", on="order.paid")
async def paid(ctx: Context, event: Event[Order]) -> list[Any]:
    return [event.name, event.data.id, str(event.data.total), event.at.year > 2000]


@workflow(name="ship", on="order.paid")
async def ship(ctx: Context, order: Order) -> str:
    return f"ship {order.id}"


NO_PROBE = "event.data != 'probe'"
"""What `waiters` publishes is nobody's."""


@workflow(name="wait")
async def wait(ctx: Context, count: int) -> list[Any]:
    return [(await ctx.wait_for_event("tick", where=NO_PROBE)).data for _ in range(count)]


@workflow(name="timed")
async def timed(ctx: Context, timeout: float) -> Any:
    try:
        return (await ctx.wait_for_event("tick", where=NO_PROBE, timeout=timeout)).data
    except WaitTimeout:
        return "timeout"


async def waiters(world: World, name: str = "tick") -> int:
    """How many waits for it the store knows: those it shows an event to, of which nobody is told."""
    store = await world.store()
    probe = NewEvent(f"probe-{asyncio.get_running_loop().time()}", name, b'"probe"')
    [outcome] = await store.publish([probe])
    await store.settle_events([probe.id])
    return len(outcome.waiters)


# ------------------------------------------------------------------ what an event starts


async def test_E2_an_event_starts_every_workflow_that_has_it(world: World) -> None:
    """One gets the event, typed; another its data; one of another name nothing. The answer names the runs."""

    @workflow(name="other", on="order.cancelled")
    async def other(ctx: Context) -> None: ...

    app = await world.engine(paid, ship, other)
    answer = await app.send_event("order.paid", Order("A1", Decimal("2.50")))
    runs = {one.workflow: str(one.run_id) for one in answer.admissions}
    assert sorted(runs) == ["paid", "ship"]
    assert await app.run(runs["paid"]).result(5) == ["order.paid", "A1", "2.50", True]
    assert await app.run(runs["ship"]).result(5) == "ship A1"
    wire = answer.wire()
    assert (wire["eventId"], wire["woke"], wire["deduped"]) == (answer.event_id, 0, False)
    assert [(one["workflow"], one["runId"]) for one in wire["triggered"]] == sorted(runs.items())
    [stored] = await app.engine.find_events(EventQuery(name="order.paid"))
    assert (stored.id, stored.admissions) == (answer.event_id, answer.admissions)


async def test_E2_a_trigger_may_ask_for_more_than_a_name(world: World) -> None:
    """`where` is looked at for each event, and an event that meets two triggers of a workflow starts it once."""

    @workflow(
        name="large",
        on=[Trigger("order", where="event.data.total > 100"), Trigger("order", where="event.data.vip == true")],
    )
    async def large(ctx: Context, order: Any) -> None: ...

    app = await world.engine(large)
    orders = [{"total": 10}, {"total": 200}, {"total": 1, "vip": True}, {"total": 300, "vip": True}, "nonsense", None]
    answers = await app.publish([Publication(name="order", data=order) for order in orders])
    assert [len(answer.admissions) for answer in answers] == [0, 1, 1, 1, 0, 0]


async def test_an_event_starts_the_latest_version_only(world: World) -> None:
    """Two versions are there, one run is started: of the later, whose triggers count."""

    @workflow(name="v", version="1", on=["a", "b"])
    async def first(ctx: Context) -> int:
        return 1

    @workflow(name="v", version="2", on="a")
    async def second(ctx: Context) -> int:
        return 2

    app = await world.engine(first, second)
    a, b = await app.publish([Publication(name="a"), Publication(name="b")])
    assert len(a.admissions) == 1
    assert await app.run(str(a.admissions[0].run_id)).result(5) == 2
    assert b.admissions == ()


async def test_data_that_does_not_fit_fails_its_run_visibly(world: World) -> None:
    """Every event is accounted for: the run is there, failed, and says which field."""
    app = await world.engine(ship)
    answer = await app.send_event("order.paid", {"id": 5})
    run_id = str(answer.admissions[0].run_id)
    record = await world.until(run_id, lambda r: r.status == Status.FAILED)
    assert b"total" in (record.error or b"") or b"id" in (record.error or b"")


async def test_S18_the_same_id_again_is_answered_and_starts_nothing(world: World) -> None:
    """Once, also when five send it at the same moment: one event, one run, and the same answer for all."""
    app = await world.engine(ship)
    order = {"id": "A1", "total": "1"}
    answers = await asyncio.gather(*(app.send_event("order.paid", order, id="evt-1") for _ in range(5)))
    assert len({answer.event_id for answer in answers}) == 1
    assert sorted(answer.duplicate for answer in answers) == [False, True, True, True, True]
    assert len({answer.admissions for answer in answers}) == 1
    assert len((await app.find()).runs) == 1
    assert answers[1].wire()["deduped"] or answers[0].wire()["deduped"]


@on_postgres
async def test_S39_a_lost_reply_doubles_nothing(world: World) -> None:
    """The store has the event and the answer was lost: published again, it is the same event, and those who wait are told."""
    app = await world.engine(ship, wait)
    handle = await app.start(wait, 1)
    await world.waits(handle.id)
    lost: list[str] = []

    def lose(name: str, args: Any) -> Any:
        if name == "publish" and len(lost) < 3:
            lost.append(name)
            return StoreUnavailable("the answer is lost")
        return None

    world.line(app).fault_after = lose
    started = await app.send_event("order.paid", {"id": "A", "total": "1"})
    told = await app.send_event("tick", 7)
    assert len(lost) == 3
    assert (started.duplicate, told.duplicate, told.woke) == (False, False, 1)
    assert await handle.result(5) == [7]
    assert len((await app.find(workflow="ship")).runs) == 1


async def test_names_and_data_are_refused_before_anything_is_stored(world: World) -> None:
    """One bad event in a bulk refuses the whole: nothing of it is there."""
    app = await world.engine(ship)
    with pytest.raises(DefinitionError, match="event name"):
        await app.publish([Publication(name="order.paid", data={"id": "A", "total": "1"}), Publication(name="")])
    with pytest.raises(PayloadTooLarge, match="the data of event"):
        await app.send_event("x", "a" * (2 << 20))
    with pytest.raises(Exception, match="NUL"):
        await app.send_event("x", Raw(b'"\\u0000"'))
    assert await app.engine.find_events(EventQuery()) == []
    assert (await app.find()).runs == []


async def test_an_api_node_publishes_and_an_engine_elsewhere_runs(world: World) -> None:
    """A node that executes nothing starts runs by events, and wakes those that wait."""
    app = await world.engine(ship, wait)
    api = await world.engine(ship, role="api")
    handle = await app.start(wait, 1)
    await world.waits(handle.id)
    answer = await api.send_event("order.paid", {"id": "A1", "total": "1"})
    assert await api.run(str(answer.admissions[0].run_id)).result(5) == "ship A1"
    assert (await api.send_event("tick", 1)).woke == 1
    assert await handle.result(5) == [1]


# ------------------------------------------------------------------ waits


async def test_E3_a_wait_takes_the_event_that_matches(world: World) -> None:
    """A part of the data, or an expression; what does not match wakes nobody. The data comes typed."""

    @workflow(name="both")
    async def both(ctx: Context, order: str) -> list[Any]:
        one = await ctx.wait_for_event("paid", type=Order, match={"id": order})
        two = await ctx.wait_for_event("sent", where=f"event.data.id == '{order}' and event.data.boxes >= 2")
        return [one.data.total, one.name, two.data["boxes"]]

    app = await world.engine(both)
    handle = await app.start(both, "A")
    await world.waits(handle.id)
    assert (await app.send_event("paid", {"id": "B", "total": "9"})).woke == 0
    assert (await app.send_event("paid", {"id": "A", "total": "9.50"})).woke == 1
    await world.until_journal(handle.id, lambda lines: any("event:sent" in line for line in lines))
    assert (await app.send_event("sent", {"id": "A", "boxes": 1})).woke == 0
    assert (await app.send_event("sent", {"id": "A", "boxes": 2})).woke == 1
    assert await handle.result(5) == ["9.50", "paid", 2]
    assert await world.statuses(handle.id, "event") == ["received", "received"]
    await world.sound(handle.id)


async def test_E3_exactly_one_of_event_and_timeout(world: World) -> None:
    """No event: WaitTimeout, or the default; and no waiter is left behind."""

    @workflow(name="defaulted")
    async def defaulted(ctx: Context) -> Any:
        return await ctx.wait_for_event("tick", timeout=0.05, default=None)

    app = await world.engine(timed, defaulted)
    one, two = await app.start(timed, 0.05), await app.start(defaulted)
    assert await all_results([one, two]) == ["timeout", None]
    assert await waiters(world) == 0
    three = await app.start(timed, 30)
    await world.waits(three.id)
    await app.send_event("tick", 1)
    assert await three.result(5) == 1
    assert await waiters(world) == 0
    await world.sound(one.id, two.id, three.id)


async def test_S17_an_event_goes_to_a_run_once_and_to_all_its_open_waits(world: World) -> None:
    """Two waits that are open together both get it; a wait that opens later does not get it again."""

    @workflow(name="pair")
    async def pair(ctx: Context) -> list[Any]:
        two = await asyncio.gather(ctx.wait_for_event("tick"), ctx.wait_for_event("tick", match={"n": 1}))
        later = await ctx.wait_for_event("tick", timeout=0.1, default=None)
        return [event.data["n"] for event in two] + [later]

    app = await world.engine(pair)
    handle = await app.start(pair)
    await world.waits(handle.id)
    await app.send_event("tick", {"n": 1})
    assert await handle.result(5) == [1, 1, None]


async def test_many_runs_wait_for_one_event(world: World) -> None:
    """All of them get it, on whatever engine they are; the answer says how many."""
    apps = [await world.engine(wait) for _ in range(3)]
    handles = [await app.start(wait, 1) for app in apps for _ in range(4)]
    for handle in handles:
        await world.waits(handle.id)
    assert (await apps[0].send_event("tick", "x")).woke == 12
    assert await all_results(handles) == [["x"]] * 12


@on_postgres
async def test_B12_an_event_before_the_wait_is_taken(world: World) -> None:
    """Published once the run has begun, before its wait is there: the wait takes it at once, oldest first, in order."""
    app = await world.engine(wait)
    handle = await app.start(wait, 5, delay=0.1)
    for number in range(4):
        await app.send_event("tick", number)
    await world.until_journal(handle.id, lambda lines: sum("received" in line for line in lines) == 4)
    await app.send_event("tick", 4)
    assert await handle.result(5) == [0, 1, 2, 3, 4]
    await world.sound(handle.id)


@on_postgres
async def test_B12_a_stream_of_events_is_heard_in_order_and_whole(world: World) -> None:
    """One run waits again and again while others publish: nothing is skipped, nothing is doubled, the order stays."""
    app = await world.engine(wait)
    other = await world.engine(wait)
    handle = await app.start(wait, 30)

    async def publish() -> None:
        for number in range(30):
            await (app if number % 2 else other).send_event("tick", number)

    await publish()
    assert await handle.result(10) == list(range(30))


async def test_S20_early_says_how_far_back_a_wait_looks(world: World) -> None:
    """`early=False` takes nothing that was accepted before the wait; a duration, nothing older; and what came before the run
    began never counts, nor the event that has started it."""

    @workflow(name="looks", on="go")
    async def looks(ctx: Context, event: Event[Any]) -> list[Any]:
        await ctx.wait_for_signal("now")
        fresh = await ctx.wait_for_event("tick", early=False, timeout=0.05, default=None)
        young = await ctx.wait_for_event("tick", early="1h", match={"n": 0}, timeout=0.05, default=None)
        own = await ctx.wait_for_event("tick", match={"n": 1}, timeout=0.05, default=None)
        go = await ctx.wait_for_event("go", timeout=0.05, default=None)
        return [event and getattr(event, "data", event) for event in (fresh, young, own, go)]

    app = await world.engine(looks)
    await app.send_event("tick", {"n": 0})
    await asyncio.sleep(0.01)
    answer = await app.send_event("go", "start")
    handle = app.run(str(answer.admissions[0].run_id))
    await world.waits(handle.id)
    await app.send_event("tick", {"n": 1})
    await asyncio.sleep(0.01)
    await handle.signal("now")
    assert await handle.result(5) == [None, {"n": 0}, {"n": 1}, None]


async def test_B14_an_event_told_of_again_is_not_news_to_a_newer_wait(world: World) -> None:
    """Told of a second time, by another message, after its wait has had it and while a new one is open: passed over."""
    app = await world.engine(wait)
    handle = await app.start(wait, 2)
    await world.waits(handle.id)
    answer = await app.send_event("tick", "a")
    await world.until_journal(handle.id, lambda lines: any("event:tick:1 opened" in line for line in lines))
    [stored] = await app.engine.find_events(EventQuery(name="tick"))
    fact = fact_of(stored.id, stored.name, stored.received_at, stored.number, stored.data)
    store = await world.store()
    [sent] = await store.send([Message(handle.id, f"event:{answer.event_id}", "event", "tick", fact)])
    assert sent.status == "duplicate"
    await app.send_event("tick", "b")
    assert await handle.result(5) == ["a", "b"]


@on_postgres
async def test_S19_an_event_before_the_deadline_wins_though_nobody_has_told_of_it(world: World) -> None:
    """Accepted in time, its publisher dead before it told the run: when the time is up the run looks, and takes it."""
    app = await world.engine(timed, beat_every=30)
    handle = await app.start(timed, 0.3)
    await world.waits(handle.id)
    store = await world.store()
    await store.publish([NewEvent("e1", "tick", b'"in time"')])
    assert await handle.result(5) == "in time"
    assert await waiters(world) == 0


async def test_S19_an_event_after_the_deadline_loses_though_it_is_told_of_first(world: World) -> None:
    """The run stands still over its deadline; an event of after it comes with its mail. The timeout counts, by the store's
    clock."""
    app = await world.engine(timed)
    handle = await app.start(timed, 0.2)
    await world.waits(handle.id)
    world.pause(app)
    await asyncio.sleep(0.3)
    store = await world.store()
    [outcome] = await store.publish([NewEvent("late", "tick", b'"late"')])
    event = outcome.event
    fact = fact_of(event.id, event.name, event.received_at, event.number, event.data)
    await store.send([Message(handle.id, "event:late", "event", "tick", fact)])
    world.resume(app)
    assert await handle.result(5) == "timeout"


async def test_B13_the_timeout_holds_after_a_crash(world: World) -> None:
    """Waiter and deadline are one commit: whoever takes the run over times it out."""
    app = await world.engine(timed)
    handle = await app.start(timed, 0.3)
    await world.waits(handle.id)
    await world.crash(app)
    app = await world.engine(timed)
    assert await app.run(handle.id).result(5) == "timeout"
    await world.sound(handle.id)


@on_postgres
async def test_B16_events_whose_publisher_has_died_are_told_of_by_the_sweep(world: World) -> None:
    """No hint, no message: the event is stored, and that is all. Any engine's next look tells those who wait."""
    app = await world.engine(wait, poll_every=30, beat_every=0.05)
    handle = await app.start(wait, 1)
    await world.waits(handle.id)
    store = await world.store()
    [outcome] = await store.publish([NewEvent("orphan", "tick", b'"found"')])
    assert len(outcome.waiters) == 1
    assert await handle.result(10) == ["found"]
    async with asyncio.timeout(10):
        while await store.events(EventQuery(None, unsettled=True)):  # the run is told first
            await asyncio.sleep(0.005)


@on_postgres
async def test_B11_an_event_between_the_wait_and_its_waiter_is_found(world: World) -> None:
    """Each wait's event is published just before the commit that opens its waiter, so nobody is told; none is lost, and no poll
    heals it."""
    app = await world.engine(wait, poll_every=30, beat_every=30)
    store = await world.store()
    sent: list[int] = []
    original = world.line(app).commit

    async def commit(batch: Any) -> Any:
        for one in batch:
            if any(isinstance(effect, OpenWaiter) for effect in one.effects) and len(sent) < 10:
                sent.append(len(sent))
                [outcome] = await store.publish([NewEvent(f"e{len(sent)}", "tick", b"%d" % sent[-1])])
                assert len(sent) > 1 or outcome.waiters == ()
        return await original(batch)

    app.engine._executor.commits._call = commit
    handle = await app.start(wait, 10)
    assert await handle.result(10) == list(range(10))


async def test_B11_a_crash_between_the_waiter_and_the_look_back_loses_nothing(world: World) -> None:
    """The waiter is stored, the engine dies before it has looked at what came before: the next owner looks."""
    app = await world.engine(wait)
    store = await world.store()

    async def never(query: Any) -> Any:
        await asyncio.Event().wait()

    world.line(app).events = never  # type: ignore[attr-defined]
    handle = await app.start(wait, 1, delay=0.05)
    await store.publish([NewEvent("early", "tick", b'"early"')])
    await world.until_journal(handle.id, lambda lines: any("opened" in line for line in lines))
    await world.crash(app)
    app = await world.engine(wait, poll_every=30)
    assert await app.run(handle.id).result(5) == ["early"]


async def test_B11_a_look_back_under_way_does_not_count_for_a_wait_that_opens_meanwhile(world: World) -> None:
    """One wait's look at what came before is slow; a second wait is asked for; its event is published after the first look has
    passed and before the second's waiter is stored. Both are had, and no poll heals it."""

    @workflow(name="both")
    async def both(ctx: Context) -> list[Any]:
        first = ctx.wait_for_event("first")
        await ctx.step("between", lambda: asyncio.sleep(0.05))
        second = ctx.wait_for_event("second")
        return [(await second).data, (await first).data]

    app = await world.engine(both, poll_every=30, beat_every=30)
    store = await world.store()
    line: Any = world.line(app)
    slow, published = asyncio.Event(), asyncio.Event()
    read, write = line.events, app.engine._executor.commits._call

    async def events(query: EventQuery) -> Any:
        found = await read(query)
        if query.name == "first" and not published.is_set():
            slow.set()
            await asyncio.sleep(0.1)
        return found

    async def commit(batch: Any) -> Any:
        for one in batch:
            if any(isinstance(effect, OpenWaiter) and effect.event == "second" for effect in one.effects):
                # Long enough for any look that does not wait for this commit.
                await asyncio.sleep(0.3)
                await store.publish([NewEvent("e2", "second", b'"two"')])
                published.set()
        return await write(batch)

    line.events = events
    app.engine._executor.commits._call = commit
    handle = await app.start(both)
    await asyncio.wait_for(slow.wait(), 5)
    await asyncio.wait_for(published.wait(), 5)
    await app.send_event("first", "one")
    assert await handle.result(5) == ["two", "one"]


async def test_B15_the_wait_that_loses_a_race_is_torn_down(world: World) -> None:
    """A step wins over a wait for an event: the run ends at once, without waiter or timer, and the event finds nobody."""

    @workflow(name="race")
    async def race(ctx: Context) -> Any:
        winner = await ctx.gather(
            ctx.wait_for_event("tick", timeout="30d"), ctx.step("quick", lambda: "step"), mode="first"
        )
        await ctx.wait_for_signal("end")
        return winner

    app = await world.engine(race)
    handle = await app.start(race)
    await world.until_journal(handle.id, lambda lines: any("cancelled" in line for line in lines))
    assert await waiters(world) == 0
    assert (await app.send_event("tick")).woke == 0
    await handle.signal("end")
    assert await handle.result(5) == "step"
    assert await world.statuses(handle.id, "wait") in (["opened", "cancelled"], ["opened", "looked", "cancelled"])
    await world.sound(handle.id)


async def test_a_cancelled_run_leaves_no_waiter(world: World) -> None:
    """Cancelled while it waits, it ends at once, and the store shows its wait to nobody."""
    app = await world.engine(wait)
    handle = await app.start(wait, 1)
    await world.waits(handle.id)
    assert await waiters(world) == 1
    await handle.cancel()
    await world.until(handle.id, lambda r: r.status == Status.CANCELLED)
    assert await waiters(world) == 0


async def test_a_crash_while_waiting_keeps_what_has_come(world: World) -> None:
    """Over three crashes, each event once and in order."""
    app = await world.engine(wait)
    handle = await app.start(wait, 4)

    async def opened(count: int) -> None:
        def so_many(lines: list[str]) -> bool:
            return sum("opened" in line for line in lines) == count

        await world.until_journal(handle.id, so_many)

    for number in range(3):
        await opened(number + 1)
        await app.send_event("tick", number)
        await opened(number + 2)
        await world.crash(app)
        app = await world.engine(wait)
    await app.send_event("tick", 3)
    assert await app.run(handle.id).result(5) == [0, 1, 2, 3]
    await world.sound(handle.id)


async def test_a_reopened_run_waits_again(world: World) -> None:
    """Two waits, the second's end failed the run: requeued from there, its waiter is opened anew, the first one's event stands,
    and an event comes through."""
    fails = [True]

    @workflow(name="again")
    async def again(ctx: Context) -> Any:
        first = await ctx.wait_for_event("first")
        second = ctx.wait_for_event("second")
        await ctx.step("fragile", fragile, retries=0)
        return [first.data, (await second).data]

    def fragile() -> None:
        if fails:
            raise ValueError("broken")

    app = await world.engine(again)
    handle = await app.start(again)
    await world.waits(handle.id)
    await app.send_event("first", 1)
    await world.until(handle.id, lambda r: r.status == Status.FAILED)
    fails.clear()
    await app.requeue(handle.id)
    await world.until_journal(handle.id, lambda lines: any("step fragile completed" in line for line in lines))
    assert (await app.send_event("second", 2)).woke == 1
    assert await handle.result(5) == [1, 2]


@on_postgres
async def test_a_hundred_runs_wait_each_for_its_own(world: World) -> None:
    """Each event wakes the one run it is for: the store is asked by what the wait names, and shows no other."""

    @workflow(name="mine")
    async def mine(ctx: Context, number: int) -> Any:
        return (await ctx.wait_for_event("done", match={"job": number})).data["job"]

    app = await world.engine(mine)
    handles = [await app.start(mine, number) for number in range(100)]
    for handle in handles:
        await world.until_journal(handle.id, lambda lines: any("opened" in line for line in lines))
    answers = await app.publish([Publication(name="done", data={"job": number}) for number in range(100)])
    assert [answer.woke for answer in answers] == [1] * 100
    assert await all_results(handles) == list(range(100))


async def test_an_engine_that_stops_tells_who_waits_first(world: World) -> None:
    """An event is stored in the moment the engine is drained: the run that waits elsewhere hears of it, with no sweep."""
    leaving, staying = await world.engine(wait), await world.engine(wait, beat_every=30)
    handle = await staying.start(wait, 1)
    await world.waits(handle.id)
    publishing = asyncio.create_task(leaving.send_event("tick", "last words"))
    await asyncio.sleep(0)
    await leaving.close()
    assert (await publishing).woke == 1
    world.apps.remove(leaving)
    assert await handle.result(5) == ["last words"]


# ------------------------------------------------------------------ events of runs


async def test_D3_a_run_sends_an_event_once(world: World) -> None:
    """It reaches who subscribes and who waits; the call answers with the event's id; `emit` is the same."""

    @workflow(name="sender")
    async def sender(ctx: Context) -> list[str]:
        return [await ctx.send_event("order.paid", Order("A1", Decimal(3))), await ctx.emit("tick", 1)]

    app = await world.engine(sender, ship, wait)
    waiting = await app.start(wait, 1)
    await world.waits(waiting.id)
    handle = await app.start(sender)
    ids = await handle.result(5)
    stored = await app.engine.find_events(EventQuery())
    assert [event.id for event in stored] == ids
    assert [one.verdict for event in stored for one in event.admissions] == [Verdict.STARTED]
    assert await app.run(str(stored[0].admissions[0].run_id)).result(5) == "ship A1"
    assert await waiting.result(5) == [1]
    await world.sound(handle.id)


async def test_D3_a_crash_after_the_publish_sends_no_second_event(world: World) -> None:
    """The event is stored, the engine dies before it hears so: the next owner publishes it again, and it is the same."""
    app = await world.engine(ship)

    @workflow(name="sender")
    async def sender(ctx: Context) -> str:
        return await ctx.send_event("order.paid", {"id": "A", "total": "1"})

    app.register(sender)
    line = world.line(app)
    seen = asyncio.Event()
    original = line.publish

    async def publish(events: Any) -> Any:
        await original(events)
        seen.set()
        await asyncio.Event().wait()

    app.engine._events._publish = publish  # type: ignore[method-assign]
    app.engine._events._group._call = publish
    handle = await app.start(sender)
    await asyncio.wait_for(seen.wait(), 5)
    await world.crash(app)
    app = await world.engine(ship, sender)
    event_id = await app.run(handle.id).result(5)
    stored = await app.engine.find_events(EventQuery())
    assert [event.id for event in stored] == [event_id]
    assert len((await app.find(workflow="ship")).runs) == 1


async def test_a_senders_own_key_finds_the_event_there_is(world: World) -> None:
    """`id=` is a key of the author's: a second run with the same key is answered with the first one's event."""

    @workflow(name="sender")
    async def sender(ctx: Context) -> str:
        return await ctx.send_event("tick", 1, id="daily")

    app = await world.engine(sender)
    handles = [await app.start(sender) for _ in range(3)]
    ids = await all_results(handles)
    assert len(set(ids)) == 1
    assert len(await app.engine.find_events(EventQuery())) == 1


async def test_an_event_that_is_too_large_fails_the_call(world: World) -> None:
    """Refused at the call; and where only the store is too narrow for it, a failed call with a typed error. The run goes on."""

    @workflow(name="sender")
    async def sender(ctx: Context, size: int) -> str:
        try:
            await ctx.send_event("tick", "x" * size)
        except PayloadTooLarge:
            return "at the call"
        except StepFailed as error:
            return str(getattr(error.error, "code", None))
        return "sent"

    app = await world.engine(sender)
    app.engine._events._limit = 5_000
    handles = [await app.start(sender, size) for size in (2 << 20, 6_000, 4_000)]
    assert await all_results(handles) == ["at the call", "payload_too_large", "sent"]
    assert len(await app.engine.find_events(EventQuery())) == 1


async def test_two_runs_talk_by_events(world: World) -> None:
    """Ping and pong over two engines, twenty times, each waiting for the other's."""

    @workflow(name="ping")
    async def ping(ctx: Context, rounds: int) -> int:
        for number in range(rounds):
            await ctx.send_event("ping", {"n": number})
            await ctx.wait_for_event("pong", match={"n": number}, timeout=10)
        return rounds

    @workflow(name="pong")
    async def pong(ctx: Context, rounds: int) -> int:
        for number in range(rounds):
            await ctx.wait_for_event("ping", match={"n": number}, timeout=10)
            await ctx.send_event("pong", {"n": number})
        return rounds

    one, two = await world.engine(ping, pong), await world.engine(ping, pong)
    handles = [await one.start(pong, 10), await two.start(ping, 10)]
    assert await all_results(handles) == [10, 10]
    await world.sound(*(handle.id for handle in handles))
