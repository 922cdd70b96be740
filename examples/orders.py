"""An order, from the shelf to the receipt: reserve, charge, wait, ship, receipt. `python3 dev.py demo` runs it and kills it;
by itself it serves orders that others start:

    durable dev examples/orders.py
"""

import asyncio
import os
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from shop import Ledger, Shop

from durable import Context, Durable, current_step

HOME = Path(os.environ.get("ORDERS_HOME", ".durable/demo"))
STORE = f"sqlite:///{HOME / 'orders.db'}"

app = Durable(STORE, lease="2s")
shop = Shop(Ledger(HOME / "ledger.db"))


@dataclass
class Order:
    id: str
    customer: str
    item: str
    quantity: int
    total: Decimal


@dataclass
class Receipt:
    order: str
    customer: str
    paid: Decimal
    charge: str
    parcel: str


async def reserve(order: Order) -> str:
    return await shop.work("reserve", order.id, seconds=0.2)


@app.step("payments.charge", retries=5, timeout="10s")
async def charge(order: Order) -> str:
    # A body may run twice when its engine dies. The key is the same then, and the gateway can tell.
    return await shop.charge(order.id, order.total, key=current_step().idempotency_key)


async def ship(order: Order) -> str:
    return await shop.work("ship", order.id, seconds=0.2)


async def receipt(order: Order, payment: str, parcel: str) -> Receipt:
    await shop.work("receipt", order.id, seconds=0.05)
    return Receipt(order.id, order.customer, order.total, payment, parcel)


@app.workflow(name="order", version="1")
async def fulfil(ctx: Context, order: Order) -> Receipt:
    await ctx.step(reserve, order)
    payment = await ctx.remote(charge, order)
    ctx.log("paid", payment=payment, total=order.total)
    await ctx.sleep("3s")  # time to change one's mind
    parcel = await ctx.step(ship, order)
    done: Receipt = await ctx.step(receipt, order, payment, parcel)
    return done


async def serve() -> None:
    async with app:
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
