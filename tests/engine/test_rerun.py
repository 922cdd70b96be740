"""Running a run again: earlier steps are kept, what is asked again is asked once more, and the new run knows where it is from."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import pytest

from durable import Context, RunFailed, workflow
from durable.core.errors import (
    DefinitionError,
    ForkRefused,
    IdempotencyConflict,
    PayloadError,
    RunActive,
    RunNotFound,
    StoreUnavailable,
)
from durable.core.origin import origin_of
from tests.engine.world import Gate, World, eventually


@dataclass
class Order:
    id: str
    total: int


@dataclass
class Charge:
    order: str
    cents: int


class Shop:
    """A workflow of three steps, and which of their bodies have run."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.broken = False
        shop = self

        def reserve(order: Order, run_id: str) -> str:
            shop.ran.append("reserve")
            return f"{order.id} for {run_id}"

        def charge(order: Order) -> Charge:
            shop.ran.append("charge")
            if shop.broken:
                raise ValueError("declined")
            return Charge(order.id, order.total)

        def ship(what: str, charge: Charge) -> str:
            shop.ran.append("ship")
            return f"{what}: {charge.cents}"

        @workflow(name="checkout")
        async def checkout(ctx: Context, order: Order) -> str:
            # The run's id is in the arguments: a copy has another, and its steps are kept all the same.
            where = await ctx.step("reserve", reserve, order, ctx.run_id)
            assert ctx.random() >= 0
            ctx.log("reserved", where=where)
            paid = await ctx.step("charge", charge, order, retries=0)
            return await ctx.step("ship", ship, where, paid)

        self.workflow = checkout


ORDER = Order("o1", 7)


async def finished(world: World) -> tuple[Shop, Any, Any]:
    shop = Shop()
    app = await world.engine(shop.workflow)
    handle = await app.start(shop.workflow, ORDER)
    assert await handle.result(5) == f"o1 for {handle.id}: 7"
    return shop, app, handle


async def test_a_rerun_from_the_beginning_does_all_again(world: World) -> None:
    """A new run with the same input; the old one stays as it is; the new one names it."""
    shop, app, handle = await finished(world)
    journal = await world.journal(handle.id)
    again = await app.engine.rerun(handle.id)
    assert again.id != handle.id
    assert await again.result(5) == f"o1 for {again.id}: 7"
    assert shop.ran == ["reserve", "charge", "ship"] * 2
    assert await world.journal(handle.id) == journal
    origin = origin_of((await world.record(again.id)).meta)
    assert (origin.trigger_kind, origin.replay_of, origin.from_step) == ("rerun", handle.id, None)
    await world.sound(handle.id, again.id)


async def test_a_rerun_from_a_step_keeps_what_was_before(world: World) -> None:
    """Steps before the chosen one keep their results; it and all behind it run again, under the same version."""
    shop, app, handle = await finished(world)
    shop.ran.clear()
    again = await app.engine.rerun(handle.id, from_step="charge")
    assert await again.result(5) == f"o1 for {handle.id}: 7"
    assert shop.ran == ["charge", "ship"]
    origin = origin_of((await world.record(again.id)).meta)
    assert (origin.trigger_kind, origin.replay_of, origin.from_step) == ("rerun", handle.id, "charge")
    lines = [entry for entry in await world.journal(again.id) if entry.kind == "log"]
    assert len(lines) == 1, "a line is there once"
    await world.sound(handle.id, again.id)


async def test_a_failed_run_is_rerun_from_what_failed_it(world: World) -> None:
    """The mended step runs again with what came before it; a rerun of a rerun works too."""
    shop = Shop()
    shop.broken = True
    app = await world.engine(shop.workflow)
    handle = await app.start(shop.workflow, ORDER)
    with pytest.raises(RunFailed):
        await handle.result(5)
    second = await app.engine.rerun(handle.id, from_step="charge")
    with pytest.raises(RunFailed):
        await second.result(5)
    shop.broken = False
    third = await app.engine.rerun(second.id, from_step="charge")
    assert await third.result(5) == f"o1 for {handle.id}: 7"
    assert shop.ran == ["reserve", "charge", "charge", "charge", "ship"]
    await world.sound(handle.id, second.id, third.id)


async def test_a_requeued_run_can_be_rerun(world: World) -> None:
    """What a requeue has passed over is not in the copy."""
    shop = Shop()
    shop.broken = True
    app = await world.engine(shop.workflow)
    handle = await app.start(shop.workflow, ORDER)
    with pytest.raises(RunFailed):
        await handle.result(5)
    shop.broken = False
    await app.requeue(handle.id)
    await handle.result(5)
    shop.ran.clear()
    again = await app.engine.rerun(handle.id, from_step="ship")
    assert await again.result(5) == f"o1 for {handle.id}: 7"
    assert shop.ran == ["ship"]
    await world.sound(again.id)


async def test_a_rerun_from_a_step_that_ran_beside_others(world: World) -> None:
    """What had been answered before the step began is kept; what was asked before it and answered later is asked again."""
    gates = {name: Gate() for name in ("a", "b", "c")}

    @workflow(name="beside")
    async def beside(ctx: Context) -> list[int]:
        async def branch() -> list[int]:
            return [await ctx.step("a", gates["a"]), await ctx.step("c", gates["c"])]

        both = await asyncio.gather(branch(), ctx.step("b", gates["b"]))
        return [*both[0], both[1]]

    app = await world.engine(beside)
    handle = await app.start(beside)
    for name in "acb":
        await gates[name].reached()
        gates[name].open()
    assert await handle.result(5) == [1, 1, 1]
    again = await app.engine.rerun(handle.id, from_step="c")
    assert await again.result(5) == [1, 2, 2], "a was answered before c began, b was not"
    await world.sound(again.id)


async def test_the_time_in_between_does_not_count(world: World) -> None:
    """A step that runs again under a timeout has the time it had: neither that timeout nor the run's own has passed while the
    old run lay there; and a step that was given up at its timeout is asked again."""
    slow = [True]

    async def body() -> str:
        if slow:
            await asyncio.sleep(30)
        return "done"

    @workflow(name="timed", timeout=1.0)
    async def timed(ctx: Context) -> str:
        await ctx.step("first", lambda: None)
        async with asyncio.timeout(0.4):
            return await ctx.step("body", body)

    app = await world.engine(timed)
    handle = await app.start(timed)
    with pytest.raises(RunFailed, match="TimeoutError"):
        await handle.result(5)
    begun = time.monotonic()
    await eventually(lambda: time.monotonic() > begun + 1.2, "the run's timeout is long past")
    slow.clear()
    again = await app.engine.rerun(handle.id, from_step="body")
    assert await again.result(5) == "done"
    await world.sound(again.id)


async def test_a_child_is_started_anew_or_its_result_kept(world: World) -> None:
    """A rerun from a child starts another one; from behind it, it keeps the first one's result."""

    @workflow(name="child")
    async def child(ctx: Context) -> str:
        return ctx.run_id

    @workflow(name="parent")
    async def parent(ctx: Context) -> list[str]:
        below = await ctx.child(child)
        return [below, await ctx.step("behind", lambda: "behind", returns=str)]

    app = await world.engine(parent, child)
    handle = await app.start(parent)
    first = await handle.result(5)
    assert first[0].startswith(handle.id)
    kept = await app.engine.rerun(handle.id, from_step="behind")
    assert await kept.result(5) == first
    anew = await app.engine.rerun(handle.id, from_step="child")
    assert (await anew.result(5))[0].startswith(anew.id)
    await world.sound(kept.id, anew.id)


async def test_the_same_key_finds_the_same_rerun(world: World) -> None:
    """Asked twice with one key there is one new run, whatever happened to the first answer; another wish under it is a
    conflict; another run's rerun is not."""
    shop, app, handle = await finished(world)
    lost = [1]
    world.line(app).fault_after = lambda name, args: StoreUnavailable("lost") if name == "start" and lost else None
    asking = asyncio.ensure_future(app.engine.rerun(handle.id, from_step="ship", idempotency_key="k"))
    await eventually(lambda: world.line(app).calls.get("start", 0) >= 2, "it has been tried again")
    lost.clear()
    again = await asking
    assert (await app.engine.rerun(handle.id, from_step="ship", idempotency_key="k")).id == again.id
    with pytest.raises(IdempotencyConflict):
        await app.engine.rerun(handle.id, from_step="charge", idempotency_key="k")
    await again.result(5)
    other = await app.engine.rerun(again.id, from_step="ship", idempotency_key="k")
    assert other.id not in (handle.id, again.id)
    await other.result(5)
    assert shop.ran.count("ship") == 3


async def test_what_cannot_be_rerun_says_so(world: World) -> None:
    """An active run, an unknown run and an unknown step are refused with a word on what to do."""
    gate = Gate()

    @workflow(name="one")
    async def one(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    app = await world.engine(one)
    handle = await app.start(one)
    await gate.reached()
    with pytest.raises(RunActive, match="Cancel it first"):
        await app.engine.rerun(handle.id)
    gate.open()
    await handle.result(5)
    with pytest.raises(ForkRefused, match="It has body"):
        await app.engine.rerun(handle.id, from_step="nobody")
    with pytest.raises(RunNotFound):
        await app.engine.rerun("nobody")
    with pytest.raises(RunNotFound):
        await app.engine.rerun(handle.id, workspace="other.dev")


async def test_replay_takes_another_input(world: World) -> None:
    """From the beginning, with another input of the right type; a wrong one is refused at the call."""
    shop, app, handle = await finished(world)
    again = await app.engine.replay(handle.id, Order("o2", 9))
    assert await again.result(5) == f"o2 for {again.id}: 9"
    assert origin_of((await world.record(again.id)).meta).trigger_kind == "replay"
    with pytest.raises(PayloadError, match="total"):
        await app.engine.replay(handle.id, {"id": "o2"})
    assert shop.ran == ["reserve", "charge", "ship"] * 2


async def test_a_fork_goes_on_with_another_result(world: World) -> None:
    """Behind the edited step everything runs with the new result, read as the step's type; the step itself does not run."""
    shop, app, handle = await finished(world)
    shop.ran.clear()
    fork = await app.engine.fork(handle.id, {"step": "charge", "result": {"order": "o1", "cents": 99}})
    assert await fork.result(5) == f"o1 for {handle.id}: 99"
    assert shop.ran == ["ship"]
    origin = origin_of((await world.record(fork.id)).meta)
    assert (origin.trigger_kind, origin.replay_of, origin.from_step) == ("fork", handle.id, "charge")
    with pytest.raises(PayloadError, match="cents"):
        await app.engine.fork(handle.id, {"step": "charge", "result": {"order": "o1", "cents": "many"}})
    await world.sound(fork.id)


async def test_a_fork_may_mend_a_failed_step_or_one_under_way(world: World) -> None:
    """A step that failed, or has not answered yet, can be given a result; the active run goes on as it is."""
    gate = Gate()

    @workflow(name="one")
    async def one(ctx: Context) -> int:
        number: int = await ctx.step("body", gate, returns=int)
        return number

    shop = Shop()
    shop.broken = True
    app = await world.engine(one, shop.workflow)
    active = await app.start(one)
    await gate.reached()
    await world.until_journal(active.id, lambda lines: "step body started" in lines)
    fork = await app.engine.fork(active.id, {"step": "body", "result": 42})
    assert await fork.result(5) == 42
    gate.open()
    assert await active.result(5) == 1
    failed = await app.start(shop.workflow, ORDER)
    with pytest.raises(RunFailed):
        await failed.result(5)
    mended = await app.engine.fork(failed.id, {"step": "charge", "result": Charge("o1", 5)})
    assert await mended.result(5) == f"o1 for {failed.id}: 5"
    await world.sound(fork.id, mended.id)


async def test_a_fork_with_another_input_keeps_earlier_results(world: World) -> None:
    """From a step on with another input; where the code would not get there with it, the fork is refused and nothing starts."""

    @workflow(name="ways")
    async def ways(ctx: Context, way: str) -> str:
        first = await ctx.step("first", lambda: "first", returns=str)
        if way != "short":
            first += await ctx.step("long", lambda: "long", returns=str)
        return first + way

    app = await world.engine(ways)
    handle = await app.start(ways, "far")
    assert await handle.result(5) == "firstlongfar"
    fork = await app.engine.fork(handle.id, {"input": "farther", "from_step": "long"})
    assert await fork.result(5) == "firstlongfarther"
    with pytest.raises(ForkRefused, match="does not ask for step 'long'"):
        await app.engine.fork(handle.id, {"input": "short", "from_step": "long"})
    assert len((await app.find(workflow="ways")).runs) == 2


@pytest.mark.parametrize(
    ("edits", "match"),
    [
        ({}, "no edit"),
        ({"steps": 1}, "no 'steps'"),
        ({"step": "a"}, "needs both"),
        ({"step": "a", "result": 1, "from_step": "b"}, "leave 'from_step' out"),
    ],
)
async def test_edits_that_make_no_sense_teach(world: World, edits: dict[str, Any], match: str) -> None:
    """What is no edit is refused with what there is."""
    _, app, handle = await finished(world)
    with pytest.raises(DefinitionError, match=match):
        await app.engine.fork(handle.id, edits)


async def test_a_rerun_survives_a_crash_anywhere(world: World) -> None:
    """The engine dies while the new run executes: another goes on with it, and the kept step never runs."""
    gate, ran = Gate(), list[str]()

    @workflow(name="two")
    async def two(ctx: Context) -> int:
        await ctx.step("kept", lambda: ran.append("kept"))
        return await ctx.step("body", gate, returns=int)

    app = await world.engine(two)
    handle = await app.start(two)
    await gate.reached()
    await handle.cancel()
    await world.until(handle.id, lambda r: r.status == "cancelled")
    again = await app.engine.rerun(handle.id, from_step="body")
    await gate.reached(2)
    await world.crash(app)
    app = await world.engine(two)
    gate.open()
    assert await app.run(again.id).result(5) == 3
    assert ran == ["kept"]
    await world.sound(again.id)


async def test_without_the_code_at_hand_a_rerun_works_too(world: World) -> None:
    """A node that knows no workflow makes the copy; whoever has the code goes on with it."""
    shop, app, handle = await finished(world)
    shop.ran.clear()
    api = await world.engine(worker=False)
    again = await api.engine.rerun(handle.id, from_step="ship")
    assert await app.run(again.id).result(5) == f"o1 for {handle.id}: 7"
    fork = await api.engine.fork(handle.id, {"step": "charge", "result": {"order": "o1", "cents": 1}})
    assert await app.run(fork.id).result(5) == f"o1 for {handle.id}: 1"
    assert shop.ran == ["ship", "ship"]
