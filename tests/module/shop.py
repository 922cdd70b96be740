"""A small shop in modules, for tests: payments behind a gateway, a workflow that charges, sleeps and ships."""

from __future__ import annotations

from dataclasses import dataclass

from durable import Context, durable_step, workflow
from durable.module import module


@dataclass
class Order:
    id: str
    total: int


class Gateway:
    """The world outside. No test gets as far."""

    async def move(self, order: Order) -> str:
        raise AssertionError("the real gateway was called")


class Payments:
    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    @durable_step("payments.charge", retries=3)
    async def charge(self, order: Order) -> str:
        return await self.gateway.move(order)


@module(providers=[Gateway, Payments], exports=[Payments])
class PaymentsModule:
    pass


@workflow(name="checkout", version="1")
class Checkout:
    def __init__(self, payments: Payments) -> None:
        self.payments = payments

    async def run(self, ctx: Context, order: Order) -> str:
        paid = await ctx.remote(Payments.charge, order)
        await ctx.sleep("30d")
        again = await ctx.step(self.payments.charge, order)
        return f"{paid}, {again}"


@workflow
async def greet(ctx: Context, name: str) -> str:
    return f"hello {name}"


@module(imports=[PaymentsModule], providers=[Checkout, greet])
class ShopModule:
    pass


class FakeGateway(Gateway):
    def __init__(self) -> None:
        self.moved: list[str] = []

    async def move(self, order: Order) -> str:
        self.moved.append(order.id)
        return f"paid {order.total}"
