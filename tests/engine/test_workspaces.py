"""Workspaces: one engine drives the runs of several, and none sees another's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable import Durable, workflow
from durable.core.ctx import Context
from durable.core.errors import RunNotFound, UnknownWorkflow
from durable.core.registry import Registry
from durable.store.memory import MemoryStore
from durable.store.records import RunQuery
from durable.testing.facts import eventually


def greeter(greeting: str) -> Any:
    @workflow("greet")
    async def greet(ctx: Context, name: str) -> str:
        await ctx.sleep(0.01)
        return f"{greeting}, {name}"

    return greet


async def test_one_name_means_what_its_workspace_has() -> None:
    """The same workflow name and version in two workspaces is two definitions, and each run gets its own."""
    async with Durable(MemoryStore(), workflows=[greeter("Hello")]) as app:
        app.engine.deps.catalog.put("shop.dev", Registry([greeter("Moin")]))
        ours = await app.engine.start_run("greet", "Ada")
        theirs = await app.engine.start_run("greet", "Ada", workspace="shop.dev")
        assert await ours.result(10) == "Hello, Ada"
        assert await theirs.result(10) == "Moin, Ada"
        with pytest.raises(UnknownWorkflow):
            await app.engine.start_run("greet", "Ada", workspace="none.dev")


async def test_a_run_of_another_workspace_is_not_found() -> None:
    """Every verb refuses a run of another workspace as it refuses one that is not there, also while it is in memory."""

    @workflow
    async def waits(ctx: Context) -> str:
        return str(await ctx.wait_for_signal("go"))

    async with Durable(MemoryStore(), workflows=[waits]) as app:
        engine = app.engine
        engine.deps.catalog.put("shop.dev", Registry([waits]))
        run = (await engine.start_run("waits", workspace="shop.dev")).id
        for ask in (
            lambda: engine.get(run),
            lambda: engine.wait(run, 5),
            lambda: engine.signal(run, "go", 1),
            lambda: engine.cancel(run),
            lambda: engine.requeue(run),
            lambda: anext(engine.watch(run)),
        ):
            with pytest.raises(RunNotFound):
                await ask()
        assert (await engine.find(RunQuery())).runs == []
        assert [r.id for r in (await engine.find(RunQuery(), workspace="shop.dev")).runs] == [run]
        assert await engine.signal(run, "go", "on", workspace="shop.dev")
        assert await engine.result(run, 10, workspace="shop.dev") == "on"


async def test_what_cannot_be_executed_now_waits() -> None:
    """Runs of a definition that is not ready are stored and wait; they go on when it is."""
    ready = False
    async with Durable(MemoryStore(), workflows=[greeter("Hello")]) as app:
        catalog = app.engine.deps.catalog
        catalog.ready = lambda workspace, definition: ready
        run = await app.engine.start_run("greet", "Ada")
        await asyncio.sleep(0.05)
        assert (await run.get()).owner is None
        ready = True
        catalog.changed()
        assert await run.result(10) == "Hello, Ada"


async def test_children_stay_in_their_parents_workspace() -> None:
    """A child is looked up in its parent's workspace and runs there."""

    @workflow("parent")
    async def parent(ctx: Context) -> str:
        return str(await ctx.child("greet", "child"))

    async with Durable(MemoryStore(), workflows=[greeter("Hello")]) as app:
        app.engine.deps.catalog.put("shop.dev", Registry([greeter("Moin"), parent]))
        run = await app.engine.start_run("parent", workspace="shop.dev")
        assert await run.result(10) == "Moin, child"
        children = await app.engine.deps.store.children(run.id)
        await eventually(lambda: [child.workspace for child in children] == ["shop.dev"], "the child is there")
