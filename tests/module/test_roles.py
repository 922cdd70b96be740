"""One AppModule, nodes of three roles: engine, api, worker."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from durable import Context, DurableError, durable_step, workflow
from durable.core.errors import DefinitionError
from durable.module import Application, DurableModule, DurableOptions, DynamicModule, module
from durable.store.memory import MemoryStore
from durable.testing.facts import eventually
from durable.testing.harness import Test
from durable.transports.event_emitter import EventEmitterTransport


class Where:
    def __init__(self) -> None:
        self.calls = 0

    @durable_step("where")
    async def where(self) -> int:
        self.calls += 1
        return self.calls


@workflow(name="asks")
async def asks(ctx: Context) -> int:
    return await ctx.remote(Where.where)


def node(role: str, store: MemoryStore, transport: Any) -> Application:
    @module(
        imports=[DurableModule.for_root(store.another(), transport=transport, poll_every=0.05)], providers=[Where, asks]
    )
    class AppModule:
        pass

    return Application(AppModule, role=role)


async def test_an_api_node_starts_and_never_executes() -> None:
    """A run started at an API node waits for an engine, and its result is seen at both."""
    store, transport = MemoryStore(), EventEmitterTransport()
    async with node("api", store, transport) as api:
        run = await api.start(asks)
        assert (await run.get()).status == "active"
        async with node("engine", store, transport.peer()) as engine:
            assert await run.result(10) == 1
            assert engine.get(Where).calls == 1
        assert api.get(Where).calls == 0


async def test_a_worker_serves_steps_and_claims_nothing() -> None:
    """A worker opens no store and has no engine; a task that reaches its transport is served by its instance."""
    store, transport = MemoryStore(), EventEmitterTransport()
    async with node("worker", store, transport) as worker:
        with pytest.raises(DurableError, match="is a worker: it serves steps and has no engine"):
            worker.durable.engine
        async with node("engine", store, transport.peer()) as engine:
            for _ in range(6):
                await (await engine.start(asks)).result(10)
            await eventually(lambda: engine.get(Where).calls + worker.get(Where).calls == 6, "each ran once")
            assert worker.get(Where).calls > 0


async def test_a_worker_needs_a_transport() -> None:
    """The default transport reaches nobody, so a worker without another refuses to start."""
    app = Application(DynamicModule(Where, [DurableModule.for_root("memory://")], [asks]), role="worker")
    with pytest.raises(DefinitionError, match="A worker needs a transport"):
        await app.open()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"role": "boss"}, "engine, api, worker"), ({"role": "engine", "worker": False}, "Leave one")],
)
async def test_roles_are_checked(options: dict[str, Any], words: str) -> None:
    """A role there is not, or two that disagree, are refused."""
    with pytest.raises(DefinitionError, match=words):
        await Application(DynamicModule(Where, [DurableModule.for_root("memory://", **options)])).open()


async def test_worker_false_is_the_role_api() -> None:
    """`for_root(worker=False)` makes an API node, unless who runs the app says otherwise."""
    root = DynamicModule(Where, [DurableModule.for_root("memory://", worker=False)])
    async with Application(root) as app:
        assert app.durable.role == "api"


async def test_options_may_be_overridden() -> None:
    """An override of the options holds, with the role of who runs the app; in a test the outside world stays out."""
    root = DynamicModule(Where, [DurableModule.for_root("sqlite:///never.db")], [asks])
    given = DurableOptions("memory://", max_recovery_attempts=9)
    for app in (
        Application(root, role="api").override(DurableOptions, given),
        Application(root, role="api").override(DurableOptions, use_factory=lambda: given),
    ):
        async with app:
            assert (app.durable.role, app.durable.settings.max_recovery_attempts) == ("api", 9)
    async with Test.create(root).override(DurableOptions, given) as test:
        assert (test.durable.role, test.durable.settings.max_recovery_attempts) == ("engine", 9)


async def test_transports_are_given_by_url_too() -> None:
    """`for_root(transport="…")`, and several by id."""
    for options in ({"transport": "event-emitter://"}, {"transports": {"default": "event-emitter://"}}):
        root = DynamicModule(Where, [DurableModule.for_root("memory://", **options)], [asks])  # type: ignore[arg-type]
        async with Application(root) as app:
            assert await app.start_and_wait(asks) == 1


async def test_serve_runs_until_it_is_told_to_stop() -> None:
    """`serve` is the main of a process: SIGTERM drains it, and the signals are the caller's again."""
    app = Application(DynamicModule(Where, [DurableModule.for_root("memory://")], [asks]))
    serving = asyncio.create_task(app.serve())
    await eventually(lambda: app._state == "running", "it runs")
    os.kill(os.getpid(), signal.SIGTERM)
    await serving
    assert app._state == "closed"
    assert not asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
