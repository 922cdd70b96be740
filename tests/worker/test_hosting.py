"""A worker that hosts workflows, as applications use it: `Worker(workflows=[...])` and a node of role worker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from durable import Context, Durable, RunCancelled, durable_step, remote_workflow, workflow
from durable.core.errors import DefinitionError
from durable.testing.facts import eventually
from durable.transports.event_emitter import EventEmitterTransport
from durable.worker.worker import Done, Worker


@durable_step("double")
async def double(n: int) -> int:
    return 2 * n


@workflow("calc")
async def calc(ctx: Context, n: int) -> int:
    doubled: int = await ctx.remote(double, n)
    return await ctx.step("local", int, doubled) + 1


async def test_one_worker_serves_steps_and_hosts_workflows() -> None:
    """Both come over the same transport and share its bound; what is done is told of both."""
    transport, done = EventEmitterTransport(), list[Done]()
    app = Durable("memory://", transport=transport.end())
    app.register(remote_workflow("calc"))
    worker = Worker([double], workflows=[calc], transport=transport.peer(), on_done=done.append)
    assert worker.groups == ["double", "calc"]
    async with worker, app:
        assert await app.start_and_wait("calc", 4, timeout=10) == 9
    assert worker.counts == {"completed": 3}
    assert sorted({one.task.name for one in done}) == ["calc", "double"]


async def test_a_worker_may_host_and_serve_no_step() -> None:
    """Workflows alone are something to serve; nothing at all is not."""
    transport = EventEmitterTransport()
    app = Durable("memory://", transport=transport.end())
    app.register(double, remote_workflow("calc"))
    async with app, Worker(workflows=[calc], transport=transport.peer()):
        assert await app.start_and_wait("calc", 1, timeout=10) == 3
    with pytest.raises(DefinitionError, match="no steps to serve"):
        await Worker(transport=transport.peer()).start()


async def test_a_cancelled_run_stops_its_turn() -> None:
    """The worker hears of the cancel and gives the turn's step up; the run is cancelled, whatever it answers."""
    began, ended = asyncio.Event(), asyncio.Event()

    async def long() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    @workflow("long")
    async def longer(ctx: Context) -> None:
        await ctx.step("long", long)

    transport = EventEmitterTransport()
    app = Durable("memory://", transport=transport.end())
    app.register(remote_workflow("long"))
    async with app, Worker(workflows=[longer], transport=transport.peer()):
        run: Any = await app.start("long")
        await began.wait()
        await run.cancel()
        with pytest.raises(RunCancelled):
            await run.result(10)
        await eventually(ended.is_set, "the step is given up")


async def test_a_node_of_role_worker_hosts_when_it_is_told_to(tmp_path: Path) -> None:
    """`durable worker --workflows` makes an app host its own workflows, over a transport that reaches the engine."""
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    hosting = Durable("memory://", transport=url)
    hosting.register(double, calc)
    hosting.as_worker(hosts=True)
    app = Durable("memory://", transport=url)
    app.register(remote_workflow("calc"))
    async with hosting, app:
        assert hosting.worker.groups == ["double", "calc"]
        assert await app.start_and_wait("calc", 4, timeout=20) == 9
