"""Workflows, steps and dead-letter methods of providers are found, with their instances."""

from __future__ import annotations

from durable import Context, workflow
from durable.core.dead_letter import DeadLetter, dead_letter
from durable.core.definition import durable_step
from durable.module import Application, DurableModule, DynamicModule, provide
from durable.testing.harness import Test
from tests.module.shop import Checkout, FakeGateway, Gateway, Order, Payments, ShopModule, greet


async def test_everything_is_registered() -> None:
    """Workflow classes and functions, and step methods of any module's providers, are in the Durable's registry."""
    async with Test.create(ShopModule) as app:
        registry = app.durable.registry
        assert [flow.name for flow in registry.workflows()] == ["checkout", "greet"]
        assert registry.step("payments.charge").instance is app.get(Payments)


async def test_a_fresh_instance_per_run() -> None:
    """A workflow class is made anew for each run, with its constructor injected."""
    made: list[object] = []

    @workflow(name="fresh")
    class Fresh:
        def __init__(self, payments: Payments) -> None:
            made.append(self)
            self.payments = payments
            self.count = 0

        async def run(self, ctx: Context, order: Order) -> int:
            self.count += 1
            await ctx.step(self.payments.charge, order)
            return self.count

    fake = FakeGateway()
    async with Test.create(DynamicModule(Root, (), [Gateway, Payments, Fresh])).override(Gateway, fake) as app:
        for number in ("a", "b"):
            assert await app.start_and_wait(Fresh, Order(number, 1)) == 1
    assert fake.moved == ["a", "b"]
    assert len(set(map(id, made))) == len(made) >= 2


class Root:
    pass


async def test_by_reference_and_by_name() -> None:
    """A step is called by reference or by name; both end at the injected instance."""

    @workflow(name="both")
    async def both(ctx: Context, order: Order) -> list[str]:
        return [
            await ctx.remote(Payments.charge, order),
            await ctx.remote("payments.charge", order, returns=str),
        ]

    root = DynamicModule(Root, (), [Gateway, Payments, both])
    async with Test.create(root).override(Gateway, FakeGateway()) as app:
        assert await app.start_and_wait(both, Order("1", 5)) == ["paid 5", "paid 5"]


async def test_steps_of_values_and_factories() -> None:
    """Steps are found on whatever instance a value or a factory gives."""

    class ByFactory:
        @durable_step("by.factory")
        async def work(self) -> str:
            return "factory"

    class ByValue:
        @durable_step("by.value")
        async def work(self) -> str:
            return "value"

    async def make() -> ByFactory:
        return ByFactory()

    @workflow(name="uses")
    async def uses(ctx: Context) -> str:
        return await ctx.remote(ByFactory.work) + await ctx.remote(ByValue.work)

    provided = [provide("f", use_factory=make), provide("v", use_value=ByValue()), uses]
    async with Test.create(DynamicModule(Root, (), provided)) as app:
        assert await app.start_and_wait(uses) == "factoryvalue"


async def test_dead_letter_methods() -> None:
    """A `@dead_letter` method of a provider is registered with its instance; for_root passes the default workflow on."""

    class Undertaker:
        @dead_letter
        async def bury(self, letter: DeadLetter) -> None: ...

    @workflow(name="graveyard")
    async def graveyard(ctx: Context, letter: DeadLetter) -> None: ...

    root = DynamicModule(Root, [DurableModule.for_root("memory://", dead_letter=graveyard)], [Undertaker, graveyard])
    async with Application(root) as app:
        [found] = app.durable.registry.dead_letters()
        assert found.instance is app.get(Undertaker)
        assert app.durable.settings.dead_letter_workflow == "graveyard"


async def test_a_function_workflow() -> None:
    """Function workflows are listed beside classes, and started by reference or name."""
    async with Test.create(ShopModule) as app:
        assert await app.start_and_wait(greet, "you") == "hello you"
        assert await app.start_and_wait("greet", "you") == "hello you"


async def test_the_whole_shop() -> None:
    """A run charges, sleeps a month and charges again, in an instant."""
    fake = FakeGateway()
    async with Test.create(ShopModule).override(Gateway, fake) as app:
        assert await app.start_and_wait(Checkout, Order("1", 5)) == "paid 5, paid 5"
    assert fake.moved == ["1", "1"]
