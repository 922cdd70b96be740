"""Events: named facts that start runs. Every workflow that has asked for one gets a run of it, in the event's own transaction.

python examples/events.py
"""

import asyncio
from dataclasses import dataclass

from durable import Context, Durable, Event, Trigger

app = Durable("sqlite:///.durable/examples.db")


@dataclass
class Order:
    id: str
    total: int


@app.workflow(on="order.placed")
async def confirm(ctx: Context, order: Order) -> str:
    await ctx.send_event("order.confirmed", {"id": order.id})  # once, however often the run is replayed
    return f"{order.id} is confirmed"


@app.workflow(on=Trigger(event="order.placed", where="event.data.total >= 1000"))
async def check(ctx: Context, order: Order) -> str:
    return f"{order.id} is checked by hand"


@app.workflow(on=["order.confirmed", "order.shipped"])
async def tell(ctx: Context, event: Event[dict[str, str]]) -> str:  # whole, not only its data
    return f"{event.name}: {event.data['id']}"


async def main() -> None:
    async with app:
        for order in (Order("o-1", 20), Order("o-2", 5000)):
            answer = await app.send_event("order.placed", order, id=order.id)
            for one in answer.admissions:
                print(f"{one.workflow}: {await app.run(one.run_id or '').result(timeout=10)}")
        again = await app.send_event("order.placed", Order("o-2", 5000), id="o-2")
        print("sent again, a duplicate:", again.duplicate, "- runs:", len((await app.find(workflow="confirm")).runs))
        while len(told := (await app.find(workflow="tell", status="completed")).runs) < 2:
            await asyncio.sleep(0.02)
        print("told:", sorted([await app.run(run.id).result() for run in told]))


if __name__ == "__main__":
    asyncio.run(main())
