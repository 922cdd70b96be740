"""Providers: their forms, their scopes, how constructors say what they need."""

from __future__ import annotations

import contextvars
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import pytest
from dependency_injector import providers
from dependency_injector.wiring import Provide, inject

from durable import Context, DurableError, durable_step, workflow
from durable.app import Durable
from durable.core.errors import DefinitionError
from durable.module import Application, DurableModule, DynamicModule, Inject, injectable, module, provide
from durable.testing.harness import Test

if TYPE_CHECKING:
    from decimal import Decimal as Elsewhere


class Root:
    """The root module; each test says what is in it."""


class Engine:
    pass


class Speaks(Protocol):
    def speak(self) -> str: ...


class Dog:
    def speak(self) -> str:
        return "woof"


@dataclass
class Car:
    engine: Engine
    wheels: int = 4


def app_of(*provided: Any, **options: Any) -> Application:
    return Test.create(DynamicModule(Root, providers=provided, **options))


async def test_by_type() -> None:
    """A constructor's annotations say what it gets; a dataclass's too, and a default stays where nothing is provided."""
    async with app_of(Engine, Car) as app:
        assert app.get(Car).engine is app.get(Engine)
        assert app.get(Car).wheels == 4


async def test_by_token() -> None:
    """`Annotated[T, Inject("token")]` asks for a text."""

    class Database:
        def __init__(self, url: Annotated[str, Inject("db.url")]) -> None:
            self.url = url

    async with app_of(provide("db.url", use_value="sqlite://"), Database) as app:
        assert app.get(Database).url == "sqlite://"


async def test_forms() -> None:
    """Class, value, factory and existing providers; existing is the same instance by another name."""
    car = Car(Engine(), 3)

    class Trike:
        def __init__(self, dog: Speaks, car: Car) -> None:
            self.dog, self.car = dog, car

    def make(engine: Engine) -> int:
        return id(engine)

    async with app_of(
        Engine,
        Trike,
        Dog,
        provide(Car, use_value=car),
        provide(Speaks, use_existing=Dog),
        provide("animal", use_existing=Speaks),
        provide("by annotation", use_factory=make),
        provide("by token", use_factory=lambda a, b: [a, b], inject=["by annotation", "animal"]),
        provide("made", use_class=Car),
    ) as app:
        assert app.get(Trike).car is car
        assert app.get(Trike).dog is app.get(Dog)
        assert app.get("by token") == [id(app.get(Engine)), app.get(Dog)]
        assert app.get("made").engine is app.get(Engine)


async def test_async_factories_and_resources() -> None:
    """A factory may be async; one that yields is closed at stop, after whoever uses it; all others see plain instances."""
    said: list[str] = []

    async def pool() -> list[str]:
        said.append("pool")
        return said

    async def connection(pool: Annotated[list[str], Inject("pool")]) -> AsyncIterator[str]:
        pool.append("open")
        yield "connection"
        pool.append("closed")

    def plain() -> Iterator[int]:
        said.append("plain open")
        yield 7
        said.append("plain closed")

    @injectable(scope="transient")
    class User:
        def __init__(
            self, connection: Annotated[str, Inject("connection")], n: Annotated[int, Inject("plain")]
        ) -> None:
            self.got = (connection, n)

    async with app_of(
        User,
        provide("connection", use_factory=connection),
        provide("pool", use_factory=pool),
        provide("plain", use_factory=plain),
    ) as app:
        assert app.get(User).got == ("connection", 7)
        assert app.get("pool") is said
    assert said == ["pool", "open", "plain open", "plain closed", "closed"]


async def test_scopes() -> None:
    """A singleton is one, a transient a new one for each that asks."""

    @injectable(scope="transient")
    class Fresh:
        pass

    class Holder:
        def __init__(self, fresh: Fresh, make: Callable[[], Fresh]) -> None:
            self.fresh, self.make = fresh, make

    async with app_of(Fresh, Holder, provide("other", use_class=Holder)) as app:
        assert app.get(Holder) is app.get(Holder)
        assert app.get(Holder).fresh is not app.get("other").fresh
        assert app.get(Holder).make() is not app.get(Holder).make()


async def test_run_scope() -> None:
    """`run` is one for each workflow instance and one for each attempt of a step, however often it is asked for there."""
    seen: list[Session] = []

    class Work:
        def __init__(self, session: Callable[[], Session]) -> None:
            self.session = session

        @durable_step("work", retries=1)
        async def work(self) -> bool:
            seen.append(self.session())
            return self.session() is seen[-1]

    @injectable(scope="transient")
    class Helper:
        def __init__(self, session: Session) -> None:
            self.session = session

    @workflow(name="scoped")
    class Scoped:
        def __init__(self, session: Session, helper: Helper) -> None:
            self.same = session is helper.session
            seen.append(session)

        async def run(self, ctx: Context) -> list[bool]:
            return [self.same, await ctx.remote(Work.work), await ctx.remote(Work.work)]

    async with app_of(Session, Work, Helper, Scoped) as app:
        assert await app.start_and_wait(Scoped) == [True, True, True]
        assert await app.start_and_wait(Scoped) == [True, True, True]
        assert len(set(map(id, seen))) == len(seen) == 6
        assert app.get(Session) is not app.get(Session)


@injectable(scope="run")
class Session:
    pass


async def test_optional() -> None:
    """`T | None` gets None where nothing provides T, and T where something does."""

    class Garage:
        def __init__(self, engine: Engine | None) -> None:
            self.engine = engine

    async with app_of(Garage) as empty, app_of(Garage, Engine) as full:
        assert empty.get(Garage).engine is None
        assert full.get(Garage).engine is full.get(Engine)


async def test_names_only_a_type_checker_knows() -> None:
    """A name from `if TYPE_CHECKING` is the provider that is called so."""

    class Elsewhere:
        pass

    async with app_of(Elsewhere, Late) as app:
        assert isinstance(app.get(Late).it, Elsewhere)


class Late:
    def __init__(self, it: Elsewhere) -> None:
        self.it = it


async def test_a_user_wires_and_inspects_the_container() -> None:
    """The container is dependency-injector's own: `Provide` markers, attributes and `override` work on it."""

    @module(providers=[Engine, Car], exports=[Car])
    class CarModule:
        pass

    app = Test.create(DynamicModule(Root, imports=[CarModule]))
    assert isinstance(app.container.car_module.car, providers.Singleton)
    special = Engine()
    app.container.car_module.engine.override(providers.Object(special))
    app.container.wire(modules=[__name__])
    async with app:
        assert drive().engine is special
        assert app.get(Car) is drive()
    app.container.unwire()


@inject
def drive(car: Car = Provide["car_module.car"]) -> Car:
    return car


async def test_durable_may_be_asked_for() -> None:
    """The Durable is a provider like any other, and global; a hook may start a run as soon as the engine is up."""

    @workflow(name="hello")
    async def hello(ctx: Context) -> str:
        return "hello"

    class Starter:
        def __init__(self, durable: Durable) -> None:
            self.durable = durable
            self.said = ""

        async def on_ready(self) -> None:
            self.said = await (await self.durable.start(hello)).result()

    async with app_of(Starter, hello) as app:
        assert app.get(Starter).said == "hello"
        assert app.get(Durable) is app.durable


async def test_for_root_async() -> None:
    """Options come from a factory that may be async and gets other providers; a dict will do."""

    class Config:
        attempts = 7

    @module(providers=[Config], exports=[Config])
    class ConfigModule:
        pass

    async def options(config: Config) -> dict[str, Any]:
        return {"store": "memory://", "max_recovery_attempts": config.attempts}

    by_annotation = DurableModule.for_root_async(use_factory=options, imports=[ConfigModule])
    by_token = DurableModule.for_root_async(use_factory=options, inject=[Config], imports=[ConfigModule])
    for dynamic in (by_annotation, by_token):
        async with Application(DynamicModule(Root, imports=[dynamic]), role="api") as app:
            assert app.durable.settings.max_recovery_attempts == 7
            assert app.durable.role == "api"


def test_for_root_knows_its_options() -> None:
    """An option there is not is refused at once, with the one that was meant."""
    with pytest.raises(DefinitionError, match=r"no option 'max_recovery_attempt'. Did you mean max_recovery_attempts"):
        DurableModule.for_root("memory://", max_recovery_attempt=3)


async def test_get_says_what_to_do() -> None:
    """Asking for what nobody provides, or several do, or before the start, is an error with a remedy."""

    @module(providers=[Engine])
    class One:
        pass

    @module(providers=[Engine])
    class Two:
        pass

    app = Test.create(DynamicModule(Root, imports=[One, Two]))
    with pytest.raises(DurableError, match="has not started"):
        app.durable
    async with app:
        with pytest.raises(DefinitionError, match="Nothing provides Car"):
            app.get(Car)
        with pytest.raises(DefinitionError, match=r"provided by One and by Two. Say whose: get\(Engine, module=One\)"):
            app.get(Engine)
        assert app.get(Engine, module=One) is not app.get(Engine, module=Two)
    with pytest.raises(DurableError, match="Make another"):
        await app.open()


def test_nothing_leaks_into_the_context() -> None:
    """Making a container sets no context variable here."""
    before = dict(contextvars.copy_context())
    app_of(Session).container
    assert dict(contextvars.copy_context()) == before
