"""Flow control end to end: what the declarations promise, over several engines, hot and cold."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from durable import (
    Batch,
    Concurrency,
    Context,
    Debounce,
    Durable,
    Event,
    Fairness,
    Publication,
    Published,
    RateLimit,
    Singleton,
    Throttle,
    workflow,
)
from durable.protocol.states import Status
from durable.store.admission import Verdict
from tests.engine.conftest import on_postgres
from tests.engine.world import Gate, World, all_results, eventually


class Meter:
    """A step body that knows how many are in it at once, by key."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.order: list[Any] = []
        self.seconds = seconds

    async def __call__(self, key: str, what: Any = None) -> str:
        self.now[key] += 1
        self.most[key] = max(self.most[key], self.now[key])
        self.order.append(what)
        await asyncio.sleep(self.seconds)
        self.now[key] -= 1
        return key


def run_ids(answers: list[Published]) -> list[str]:
    return [str(one.run_id) for answer in answers for one in answer.admissions]


async def results(app: Durable, answers: list[Published]) -> list[Any]:
    return await all_results([app.run(run_id) for run_id in dict.fromkeys(run_ids(answers))])


# ------------------------------------------------------------------ concurrency


async def test_S25_never_more_than_the_limit_over_three_engines(world: World) -> None:
    """Thirty runs, started by events and by hand, on three engines: at most three bodies at any instant, and all end."""
    meter = Meter()

    @workflow(name="limited", on="go", concurrency=3)
    async def limited(ctx: Context, number: int) -> int:
        await ctx.step("work", meter, "all", number)
        await ctx.step("more", meter, "all", number)
        return number

    apps = [await world.engine(limited) for _ in range(3)]
    answers = [await apps[n % 3].send_event("go", n) for n in range(15)]
    handles = [await apps[n % 3].start(limited, n) for n in range(15, 30)]
    assert sorted(await results(apps[0], answers) + await all_results(handles)) == list(range(30))
    assert meter.most["all"] == 3


@on_postgres
async def test_S25_a_key_has_a_limit_of_its_own(world: World) -> None:
    """One for each customer, four in all; a run without the value shares one key with its like."""
    each, total = Meter(), Meter()

    @workflow(name="keyed", on="go", concurrency=[Concurrency(1, key="customer.id"), Concurrency(4)])
    async def keyed(ctx: Context, order: dict[str, Any]) -> None:
        async def both() -> None:
            await asyncio.gather(each(str(order.get("customer"))), total("all"))

        await ctx.step("work", both)

    one, two = await world.engine(keyed), await world.engine(keyed)
    orders: list[dict[str, Any]] = [{"customer": {"id": n % 6}} for n in range(18)] + [{}, {}, {}]
    answers = await one.publish([Publication(name="go", data=order) for order in orders])
    await results(two, answers)
    assert set(each.most.values()) == {1}
    assert len(each.most) == 7
    assert 1 < total.most["all"] <= 4


@on_postgres
async def test_a_waiting_run_holds_no_place(world: World) -> None:
    """With one place, ten runs sleep, wait for a signal, an event and a retry, all at the same time."""
    tries: Counter[str] = Counter()

    def flaky(what: str) -> str:
        tries[what] += 1
        if tries[what] == 1:
            raise ValueError("not yet")
        return what

    @workflow(name="waiting", concurrency=1)
    async def waiting(ctx: Context, number: int) -> list[Any]:
        first = await ctx.step("begin", lambda: number)
        await ctx.sleep(0.3)
        signal = await ctx.wait_for_signal("go")
        event = await ctx.wait_for_event("tick", match={"n": number})
        return [first, signal, event.data["n"], await ctx.step("flaky", flaky, f"{number}")]

    app = await world.engine(waiting)
    handles = [await app.start(waiting, n) for n in range(10)]
    loop = asyncio.get_running_loop()
    began = loop.time()
    for handle in handles:
        await world.until_journal(handle.id, lambda lines: any("timer" in line for line in lines))
    assert loop.time() - began < 2.5, "one after the other they would sleep for three seconds"
    for n, handle in enumerate(handles):
        await handle.signal("go", n)
    for handle in handles:
        await world.until_journal(handle.id, lambda lines: any("opened" in line for line in lines))
    await app.publish([Publication(name="tick", data={"n": n}) for n in range(10)])
    assert await all_results(handles, 20) == [[n, n, n, f"{n}"] for n in range(10)]
    await world.sound(*(handle.id for handle in handles))


async def test_a_body_under_way_keeps_its_place(world: World) -> None:
    """While its step runs nobody else of the lane begins; and the place is free in the commit after which it only waits."""
    gate = Gate()

    @workflow(name="one", concurrency=1)
    async def one(ctx: Context, what: str) -> str:
        if what == "first":
            await ctx.step("gate", gate)
            await ctx.wait_for_signal("end")
        return what

    app = await world.engine(one)
    first = await app.start(one, "first")
    await gate.reached()
    second = await app.start(one, "second")
    [limit] = [state for state in await app.engine.flow_state("one") if state.kind == "slots"]
    assert (limit.limit, limit.used, limit.queued) == (1, 1, 1)
    await asyncio.sleep(0.1)
    assert (await world.record(second.id)).status == Status.ACTIVE
    gate.open()
    assert await second.result(5) == "second"
    assert (await world.record(first.id)).status == Status.ACTIVE
    await first.signal("end")
    assert await first.result(5) == "first"


async def test_B10_a_dead_holder_frees_its_place(world: World) -> None:
    """kill -9 of the engine that holds the only place: its run goes on elsewhere, then the next one."""
    gate = Gate()

    @workflow(name="one", concurrency=1)
    async def one(ctx: Context, what: str) -> str:
        if what == "first":
            await ctx.step("gate", gate)
        return what

    dying, other = await world.engine(one), await world.engine(one)
    first = await dying.start(one, "first")
    await gate.reached()
    second = await other.start(one, "second")
    if other.engine._executor.residents:
        dying, other = other, dying
    await world.crash(dying)
    gate.open()
    assert await all_results([other.run(first.id), other.run(second.id)]) == ["first", "second"]


async def test_a_remote_task_keeps_its_place(world: World) -> None:
    """A task that is out holds its run's place, though the run is not in memory."""
    from durable import durable_step

    meter = Meter()

    @durable_step("work")
    async def work(number: int) -> int:
        await meter("all", number)
        return number

    @workflow(name="remote", concurrency=2)
    async def remote(ctx: Context, number: int) -> int:
        return await ctx.remote(work, number)

    app = await world.engine(remote, work)
    assert await all_results([await app.start(remote, n) for n in range(8)]) == list(range(8))
    assert meter.most["all"] == 2


async def test_children_stand_in_their_own_workflows_lane(world: World) -> None:
    """A parent starts six children of a limited workflow: two at a time, and the parent gets them all."""
    meter = Meter()

    @workflow(name="part", concurrency=2)
    async def part(ctx: Context, number: int) -> int:
        await ctx.step("work", meter, "all")
        return number

    @workflow(name="whole")
    async def whole(ctx: Context) -> list[int]:
        return list(await asyncio.gather(*(ctx.child(part, n) for n in range(6))))

    app = await world.engine(part, whole)
    handle = await app.start(whole)
    assert await handle.result(10) == list(range(6))
    assert meter.most["all"] == 2


async def test_S29_a_higher_priority_goes_first(world: World) -> None:
    """Among those that wait for one place: by priority, which an expression may say, then by age."""
    gate, meter = Gate(), Meter(0)

    @workflow(name="prio", on="go", concurrency=1, priority="event.data.rank")
    async def prio(ctx: Context, order: dict[str, Any]) -> None:
        if order.get("gate"):
            await ctx.step("gate", gate)
        else:
            await ctx.step("work", meter, "all", order["rank"])

    app = await world.engine(prio)
    first = await app.send_event("go", {"gate": True})
    await gate.reached()
    rest = await app.publish([Publication(name="go", data={"rank": rank}) for rank in (1, 5, 3, 5, 2)])
    gate.open()
    await results(app, [first, *rest])
    assert meter.order == [5, 5, 3, 2, 1]


async def test_lanes_are_served_by_weight(world: World) -> None:
    """One customer floods, another has few: by turns, three to one where the weights say so."""
    gate, meter = Gate(), Meter(0)

    @workflow(name="fair", on="go", concurrency=1, weight=Fairness("who", {"big": 3}))
    async def fair(ctx: Context, order: dict[str, Any]) -> None:
        if order.get("gate"):
            await ctx.step("gate", gate)
        else:
            await ctx.step("work", meter, "all", order["who"])

    app = await world.engine(fair)
    first = await app.send_event("go", {"gate": True, "who": "x"})
    await gate.reached()
    whos = ["big"] * 12 + ["small"] * 4
    rest = await app.publish([Publication(name="go", data={"who": who}) for who in whos])
    gate.open()
    await results(app, [first, *rest])
    assert Counter(meter.order[:8]) == {"big": 6, "small": 2}
    assert len(meter.order) == 16


# ------------------------------------------------------------------ throttle and rate limit


@on_postgres
async def test_E5_a_throttle_spaces_and_drops_nothing(world: World) -> None:
    """Two within any 0.4 s, on two engines: of six runs no three begin closer together, and all come."""

    @workflow(name="spaced", on="go", throttle=Throttle(2, 0.4))
    async def spaced(ctx: Context, number: int) -> int:
        return number

    one, two = await world.engine(spaced), await world.engine(spaced)
    answers = await one.publish([Publication(name="go", data=n) for n in range(6)])
    assert {admission.verdict for answer in answers for admission in answer.admissions} == {Verdict.STARTED}
    assert sorted(await results(two, answers)) == list(range(6))
    times = sorted([(await world.record(run_id)).started_at or 0 for run_id in run_ids(answers)])
    assert all(later - sooner >= 400_000 for sooner, later in zip(times, times[2:], strict=False)), times


async def test_E5_a_rate_limit_drops_what_is_above(world: World) -> None:
    """Two an hour for each key: the third is dropped and says so, another key's is not."""

    @workflow(name="rated", on="go", rate_limit=RateLimit(2, "1h", key="who"))
    async def rated(ctx: Context, order: dict[str, str]) -> str:
        return order["who"]

    app = await world.engine(rated)
    answers = await app.publish([Publication(name="go", data={"who": who}) for who in "aaaba"])
    verdicts = [answer.admissions[0].verdict for answer in answers]
    assert verdicts == ["started", "started", "dropped", "started", "dropped"]
    dropped = answers[2].wire()
    assert (dropped["dropped"], dropped.get("runId")) == (True, None)
    assert len((await app.find()).runs) == 3


# ------------------------------------------------------------------ debounce and batch


@on_postgres
async def test_S28_a_debounced_run_gets_the_last_event(world: World) -> None:
    """Each arrival resets the timer; one run, of the last; the next event opens another."""

    @workflow(name="bounced", on="go", debounce=Debounce(0.15, key="doc"))
    async def bounced(ctx: Context, event: Event[dict[str, Any]]) -> int:
        return int(event.data["n"])

    app = await world.engine(bounced)
    answers = []
    for n in range(4):
        answers.append(await app.send_event("go", {"doc": 1, "n": n}))
        await asyncio.sleep(0.03)
    other = await app.send_event("go", {"doc": 2, "n": 9})
    assert len(set(run_ids(answers))) == 1
    assert [answer.wire()["debounced"] for answer in answers] == [True] * 4
    assert await results(app, [answers[0], other]) == [3, 9]
    again = await app.send_event("go", {"doc": 1, "n": 10})
    assert await results(app, [again]) == [10]


async def test_S28_max_wait_is_the_longest_a_debounce_waits(world: World) -> None:
    """Events without end: the first run begins `max_wait` after the first event, and the rest opens the next."""

    @workflow(name="bounced", on="go", debounce=Debounce(0.2, max_wait=0.4))
    async def bounced(ctx: Context, number: int) -> int:
        return number

    app = await world.engine(bounced)
    answers = []
    for n in range(25):
        answers.append(await app.send_event("go", n))
        await asyncio.sleep(0.03)
    runs = run_ids(answers)
    assert len(set(runs)) > 1
    last = {run_id: n for n, run_id in enumerate(runs)}
    assert await all_results([app.run(run_id) for run_id in last]) == list(last.values())


async def test_S28_B38_each_event_is_in_exactly_one_batch(world: World) -> None:
    """Three engines publish at once, batches fill and time out: every event is in one run, and the answer says which."""

    @workflow(name="batched", on="go", batch=Batch(7, 0.1, key="k"))
    async def batched(ctx: Context, orders: list[dict[str, int]]) -> list[int]:
        return [order["n"] for order in orders]

    apps = [await world.engine(batched) for _ in range(3)]
    answers = await asyncio.gather(*(apps[n % 3].send_event("go", {"k": n % 2, "n": n}) for n in range(60)))
    runs = list(dict.fromkeys(run_ids(list(answers))))
    batches = dict(zip(runs, await all_results([apps[0].run(run_id) for run_id in runs]), strict=True))
    assert sorted(n for batch in batches.values() for n in batch) == list(range(60))
    assert all(len(batch) <= 7 for batch in batches.values())
    for n, answer in enumerate(answers):
        assert n in batches[str(answer.admissions[0].run_id)]


async def test_a_batch_as_an_event_has_the_list_as_its_data(world: World) -> None:
    """`Event[list[int]]`: one event, whose data is what all of them brought; a start by hand gives the list itself."""

    @workflow(name="whole", on="go", batch=Batch(3, "1h"))
    async def whole(ctx: Context, event: Event[list[int]]) -> list[Any]:
        return [event.name, event.data]

    @workflow(name="plain", on="go", batch=Batch(2, "1h"))
    async def plain(ctx: Context, numbers: list[int]) -> int:
        return sum(numbers)

    app = await world.engine(whole, plain)
    answers = await app.publish([Publication(name="go", data=n) for n in (1, 2, 3)])
    run = {one.workflow: str(one.run_id) for one in answers[0].admissions}
    assert await app.run(run["whole"]).result(5) == ["go", [1, 2, 3]]
    assert await app.run(run["plain"]).result(5) == 3
    assert await (await app.start(plain, [4, 5])).result(5) == 9
    record = await world.record(run["plain"])
    assert record.input.endswith(b"[1,2]}")


# ------------------------------------------------------------------ singleton


@on_postgres
async def test_E5_a_singleton_skips_replaces_or_queues(world: World) -> None:
    """One unfinished run: the second event is skipped, or asks the first to stop, or waits for it."""
    gate = Gate()
    seen: list[str] = []

    async def hold(ctx: Context, what: str) -> str:
        seen.append(what)
        await ctx.wait_for_signal("end", timeout=30) if what == "first" else None
        return what

    @workflow(name="skips", on="go", singleton=True)
    async def skips(ctx: Context, what: str) -> str:
        return await hold(ctx, what)

    @workflow(name="cancels", on="go", singleton="cancel")
    async def cancels(ctx: Context, what: str) -> str:
        return await hold(ctx, what)

    @workflow(name="queues", on="go", singleton=Singleton(mode="queue"))
    async def queues(ctx: Context, what: str) -> str:
        await ctx.step("hold", gate) if what == "first" else None
        return what

    app = await world.engine(skips, cancels, queues)
    first = await app.send_event("go", "first")
    await gate.reached()
    await eventually(lambda: len(set(seen)) == 1, "both of the others have begun")
    second = await app.send_event("go", "second")
    one = {admission.workflow: admission for admission in first.admissions}
    two = {admission.workflow: admission for admission in second.admissions}
    assert (two["skips"].verdict, two["skips"].run_id) == (Verdict.SKIPPED, one["skips"].run_id)
    assert (two["cancels"].verdict, two["cancels"].cancelled) == (Verdict.STARTED, one["cancels"].run_id)
    assert two["queues"].verdict == Verdict.STARTED
    await world.until(str(one["cancels"].run_id), lambda r: r.status == Status.CANCELLED)
    assert await app.run(str(two["cancels"].run_id)).result(5) == "second"
    assert (await world.record(str(two["queues"].run_id))).status == Status.ACTIVE
    gate.open()
    assert await app.run(str(two["queues"].run_id)).result(5) == "second"
