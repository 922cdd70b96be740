"""Starting in the order of needs, stopping in reverse, whatever fails on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from durable import Context, durable_step, workflow
from durable.app import Durable
from durable.module import Application, DurableModule, DynamicModule, create, module, provide
from durable.testing.harness import Test


class Base:
    said: list[str]

    def on_start(self) -> None:
        self.said.append(f"start {type(self).__name__}")

    async def on_ready(self) -> None:
        self.said.append(f"ready {type(self).__name__}")

    async def on_stop(self) -> None:
        self.said.append(f"stop {type(self).__name__}")


@pytest.fixture
def said() -> list[str]:
    Base.said = []
    return Base.said


class Database(Base):
    pass


class Store(Base):
    def __init__(self, database: Database) -> None: ...


class Shop(Base):
    def __init__(self, store: Store) -> None: ...


@module(providers=[Store, Database], exports=[Store])
class StoreModule(Base):
    pass


async def test_order(said: list[str]) -> None:
    """Each starts after all it needs, whatever the order of listing; a module class is the last of its module; stop is the
    reverse."""
    names = ["Database", "Store", "StoreModule", "Shop"]
    async with Test.create(DynamicModule(Durable, [StoreModule], [Shop])):
        assert said == [f"start {n}" for n in names] + [f"ready {n}" for n in names]
        said.clear()
    assert said == [f"stop {n}" for n in reversed(names)]


async def test_the_engine_is_up_between(said: list[str]) -> None:
    """Providers start before the engine and stop after it is drained: a step under way still has all it needs."""
    alive: list[bool] = []

    class Worker(Base):
        @durable_step("work")
        async def work(self) -> None:
            alive.append("stop Worker" not in said)

        def on_stop(self) -> None:
            said.append("stop Worker")

    @workflow(name="works")
    async def works(ctx: Context) -> None:
        await ctx.remote(Worker.work)

    async with Test.create(DynamicModule(Durable, (), [Worker, works])) as app:
        run = await app.start(works)
        await run.result()
    assert alive == [True]


async def test_a_failed_start_stops_what_was_started(said: list[str]) -> None:
    """When one cannot start, those before it are stopped in reverse, and the error says whose it is."""

    class Broken(Base):
        def __init__(self, store: Store) -> None:
            raise ValueError("no disk")

    async def resource() -> AsyncIterator[int]:
        said.append("open")
        yield 1
        said.append("closed")

    app = Test.create(DynamicModule(Durable, (), [provide("r", use_factory=resource), Database, Store, Broken]))
    with pytest.raises(ValueError, match="no disk") as caught:
        await app.open()
    assert "while starting Durable.Broken" in caught.value.__notes__[0]
    assert said == ["open", "start Database", "start Store", "stop Store", "stop Database", "closed"]


async def test_a_failed_on_ready_takes_the_app_down(said: list[str]) -> None:
    """The engine is drained and everything stopped when a hook fails after it is up."""

    class Late(Base):
        def on_ready(self) -> Any:
            raise ValueError("not ready")

    with pytest.raises(ValueError, match="not ready"):
        await create(DynamicModule(Durable, [DurableModule.for_root("memory://")], [Late]))
    assert said == ["start Late", "stop Late"]


async def test_a_failed_stop_does_not_keep_others_running(said: list[str]) -> None:
    """All are stopped; one failure is raised as it is, several together."""

    class Stubborn(Base):
        def __init__(self, store: Store) -> None: ...

        async def on_stop(self) -> None:
            raise ValueError("never")

    class More(Stubborn):
        pass

    app = Test.create(DynamicModule(Durable, (), [Database, Store, Stubborn]))
    await app.open()
    with pytest.raises(ValueError, match="never"):
        await app.close()
    assert said[-2:] == ["stop Store", "stop Database"]
    await app.close()
    app = Test.create(DynamicModule(Durable, (), [Database, Store, Stubborn, More]))
    await app.open()
    with pytest.raises(ExceptionGroup, match="could not be stopped"):
        await app.close()


async def test_a_value_is_its_makers(said: list[str]) -> None:
    """Hooks of a value are not called; its steps are found all the same."""
    async with Application(
        DynamicModule(Durable, [DurableModule.for_root("memory://")], [provide("v", use_value=Database())])
    ):
        pass
    assert said == []
