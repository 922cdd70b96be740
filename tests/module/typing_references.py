"""What a type checker sees of modules and references; tests/module/test_typing.py runs mypy over it. Never imported."""

from __future__ import annotations

from asyncio import Future
from dataclasses import dataclass
from typing import Any, assert_type

from durable import Context, RunHandle, durable_step, workflow
from durable.module import Application, create, module
from durable.testing.harness import Test


@dataclass
class Order:
    id: str


@dataclass
class Charge:
    id: str


class Payments:
    @durable_step("payments.charge", retries=3)
    async def charge(self, order: Order) -> Charge:
        return Charge(order.id)

    @durable_step
    async def ping(self) -> bool:
        return True

    @durable_step
    def plain(self, order: Order) -> Charge:
        return Charge(order.id)


@durable_step("audit")
async def audit(order: Order) -> int:
    return 1


@workflow(name="checkout", version="1")
class Checkout:
    def __init__(self, payments: Payments) -> None:
        self.payments = payments

    async def run(self, ctx: Context, order: Order) -> Charge:
        assert_type(ctx.remote(Payments.charge, order), Future[Charge])
        assert_type(ctx.remote(self.payments.charge, order), Future[Charge])
        assert_type(ctx.remote(Payments.ping), Future[bool])
        assert_type(ctx.remote(Payments.plain, order), Future[Charge])
        assert_type(ctx.remote(audit, order), Future[int])
        ctx.remote(Payments.charge, "an id")  # type: ignore[arg-type]
        assert_type(ctx.remote("payments.charge", order, returns=Charge), Future[Charge])
        assert_type(ctx.step(self.payments.charge, order), Future[Charge])
        assert_type(ctx.step(self.payments.plain, order), Future[Charge])
        return await ctx.remote(Payments.charge, order)


@workflow
async def small(ctx: Context, order: Order) -> int:
    return assert_type(await ctx.remote(audit, order), int)


@workflow
class Nightly:
    async def run(self, ctx: Context) -> int:
        return 1


@module(providers=[Payments, Checkout, small])
class AppModule:
    pass


async def main() -> None:
    assert_type(await create(AppModule), Application)
    async with Application(AppModule) as app:
        assert_type(app.get(Payments), Payments)
        assert_type(await app.start(Checkout, Order("1")), RunHandle[Charge])
        assert_type(await app.start(small, Order("1"), key="k"), RunHandle[int])
        assert_type(await app.start(Nightly), RunHandle[int])
        assert_type(await app.durable.start(Nightly), RunHandle[int])
        assert_type(await app.start("checkout", Order("1")), RunHandle[Any])
        await app.start(Checkout, "an id")  # type: ignore[misc]
        await app.durable.start(Checkout, "an id")  # type: ignore[misc]
        assert_type(await app.durable.start(Checkout, Order("1")), RunHandle[Charge])
        assert_type(await (await app.start(small, Order("1"))).result(), int)
    async with Test.create(AppModule).override(Payments, Payments()) as test:
        assert_type(test, Test)
