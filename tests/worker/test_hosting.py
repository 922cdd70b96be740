"""A worker that hosts workflows, as applications use it: `Worker(workflows=[...])` and a node of role worker."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from durable import Context, Durable, RunCancelled, durable_step, remote_workflow, workflow
from durable.core.errors import DefinitionError
from durable.testing.facts import eventually
from durable.transports.event_emitter import EventEmitterTransport
from durable.worker.worker import Done, Worker

ROOT = Path(__file__).parents[2]


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


async def test_hosted_runs_on_postgres(postgres_url: str) -> None:
    """Turns and their decisions are journal entries like others: on Postgres too, in memory or out of it."""

    @workflow("parent")
    async def parent(ctx: Context, n: int) -> list[Any]:
        local = await ctx.step("local", int, n)
        await ctx.sleep(0.02)
        return [local, await ctx.child("calc", n), await ctx.wait_for_signal("go")]

    transport = EventEmitterTransport()
    for cold in (False, True):
        app = Durable(postgres_url, transport=transport.end(), cold=cold)
        app.register(double, remote_workflow("parent"), remote_workflow("calc"))
        async with app, Worker(workflows=[parent, calc], transport=transport.peer()):
            runs = [await app.start("parent", n) for n in range(10)]
            for run in runs:
                await run.signal("go", "yes")
            assert [await run.result(20) for run in runs] == [[n, 2 * n + 1, "yes"] for n in range(10)]


APP = """
from durable import Durable

app = Durable("memory://")


@app.workflow("alone")
async def alone(ctx, n: int):
    return await ctx.step("local", int, n) + 1
"""


async def test_durable_worker_hosts_workflows_in_a_process_of_its_own(tmp_path: Path) -> None:
    """`durable worker app.py --workflows` says what it hosts, runs turns for an engine elsewhere, and is drained by SIGTERM."""
    (tmp_path / "alone.py").write_text(APP)
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    app = Durable("memory://", transport=url)
    app.register(remote_workflow("alone"))
    async with app:
        command = [
            sys.executable,
            "-m",
            "durable",
            "worker",
            str(tmp_path / "alone.py"),
            "--workflows",
            "--transport",
            url,
        ]
        worker = await asyncio.create_subprocess_exec(
            *command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert await app.start_and_wait("alone", 4, timeout=30) == 5
        finally:
            worker.send_signal(signal.SIGTERM)
            said, _ = await worker.communicate()
    assert worker.returncode == 0
    assert "Steps served: none. Workflows hosted: alone. Waiting at: alone." in said.decode()
