"""Events: what they start, how a run waits for one, and how many runs go at once.

python examples/events.py
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from durable import Concurrency, Context, Durable, Event, Trigger


@dataclass
class Order:
    id: str
    customer: str
    euros: int


app = Durable(store="memory://")


@app.workflow("fulfil", on="order.placed", concurrency=[Concurrency(10), Concurrency(1, key="customer")])
async def fulfil(ctx: Context, event: Event[Order]) -> str:
    """Started by each order: ten at once, one for each customer."""
    order = event.data
    paid = await ctx.wait_for_event("order.paid", match={"id": order.id}, timeout="3d", default=None)
    if paid is None:
        return f"{order.id}: given up"
    await ctx.send_event("order.shipped", {"id": order.id})
    return f"{order.id}: shipped"


@app.workflow("thank", on=Trigger("order.placed", where="event.data.euros >= 1000"))
async def thank(ctx: Context, order: Order) -> str:
    """Started by large orders only."""
    return f"{order.customer} gets a card"


async def main() -> None:
    async with app:
        placed = await app.send_event("order.placed", Order("A1", "ann", 1500), id="placed-A1")
        runs = {one.workflow: str(one.run_id) for one in placed.admissions}
        again = await app.send_event("order.placed", Order("A1", "ann", 1500), id="placed-A1")
        print("the same id again:", again.duplicate)
        await app.send_event("order.paid", {"id": "A1"})
        for name in ("fulfil", "thank"):
            print(name, "→", await app.run(runs[name]).result(10))


if __name__ == "__main__":
    asyncio.run(main())
