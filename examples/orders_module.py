"""The order demo as an app of modules: the very workflow of orders.py, its remote step now a method of a provider that
gets the shop injected.

    durable modules examples/orders_module.py    what it is made of
    durable dev examples/orders_module.py        serve, as orders.py does
    python examples/orders_module.py             one order, and out
"""

import asyncio
from collections.abc import Iterator
from decimal import Decimal

from orders import HOME, Order, fulfil
from shop import Ledger, Shop

from durable import current_step, durable_step
from durable.module import Application, DurableModule, module, provide


class Payments:
    def __init__(self, shop: Shop) -> None:
        self.shop = shop

    # The name is what the workflow of orders.py calls; where its body lives is not the workflow's business.
    @durable_step("payments.charge", retries=5, timeout="10s")
    async def charge(self, order: Order) -> str:
        return await self.shop.charge(order.id, order.total, key=current_step().idempotency_key)


def open_shop() -> Iterator[Shop]:
    HOME.mkdir(parents=True, exist_ok=True)
    print("the shop opens")
    yield Shop(Ledger(HOME / "ledger.db"))
    print("the shop is closed")


@module(providers=[provide(Shop, use_factory=open_shop), Payments], exports=[Payments])
class PaymentsModule:
    pass


@module(
    imports=[DurableModule.for_root(f"sqlite:///{HOME / 'orders.db'}", lease="2s"), PaymentsModule],
    providers=[fulfil],
)
class AppModule:
    pass


async def main() -> None:
    async with Application(AppModule) as app:
        run = await app.start(fulfil, Order("m-1", "Ada", "kettle", 1, Decimal("42.00")), key="order-m-1")
        receipt = await run.result(timeout=60)
        print(f"order {receipt.order}: {receipt.paid} paid as {receipt.charge}, sent as {receipt.parcel}")


if __name__ == "__main__":
    asyncio.run(main())
