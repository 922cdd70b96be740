"""Events: what they start, whom they wake, and that neither is lost or doubled, whatever stops in between."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from durable import Context, Event, WaitTimeout, workflow
from tests.engine.world import World, all_results, eventually


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


async def test_E2_an_event_starts_every_workflow_that_has_it(world: World) -> None:
    """One gets the event, typed; another its data; a third of another name nothing. The answer names the runs."""

    @workflow(name="other", on="order.cancelled")
    async def other(ctx: Context) -> None: ...

    app = await world.engine(paid, ship, other)
    answer = await app.send_event("order.paid", Order("A1", Decimal("2.50")))
    runs = {one.workflow: one.run_id for one in answer.admissions}
    assert sorted(runs) == ["paid", "ship"]
    assert await app.run(str(runs["paid"])).result(5) == ["order.paid", "A1", "2.50", True]
    assert await app.run(str(runs["ship"])).result(5) == "ship A1"
    wire = answer.wire()
    assert wire["woke"] == 0
    assert wire["eventId"] == answer.event_id
    assert [one["workflow"] for one in wire["triggered"]] == ["paid", "ship"]


async def test_wait(world: World) -> None:
    """x"""

    @workflow(name="wait")
    async def wait(ctx: Context, order: str) -> Any:
        event = await ctx.wait_for_event("order.paid", match={"id": order}, timeout=5)
        return [event.name, event.data]

    app = await world.engine(wait)
    handle = await app.start(wait, "A1")
    await world.waits(handle.id)
    assert (await app.send_event("order.paid", {"id": "B"})).woke == 0
    assert (await app.send_event("order.paid", {"id": "A1", "n": 1})).woke == 1
    assert await handle.result(5) == ["order.paid", {"id": "A1", "n": 1}]
    print(await world.statuses(handle.id))
    await world.sound(handle.id)
