"""A store with a run of every kind, and the command line to ask about them: as a call, and as a process."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from click.testing import CliRunner, Result

from durable import Context, Durable
from durable.cli.main import cli
from durable.core.journal import RUN, Entry
from durable.protocol.states import Status
from durable.store.records import Commit

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


class World:
    """A store's URL, and the runs in it by what they are."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ids: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        return self.ids[name]

    def run(self, *args: str, input: str | None = None) -> Result:
        """One command on this store, without a terminal."""
        return CliRunner(env={"DURABLE_STORE": self.url}).invoke(cli, list(args), input=input, prog_name="durable")

    def json(self, *args: str) -> Any:
        """Its JSON; it must have succeeded."""
        result = self.run(*args, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


def load_app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_app", HERE / "small_app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def eventually(fact: Callable[[], Awaitable[bool]], timeout: float = 20) -> None:
    """Wait for a fact."""
    async with asyncio.timeout(timeout):
        while not await fact():
            await asyncio.sleep(0.01)


async def fill(world: World) -> None:
    small = load_app()
    small.app.store = world.url

    async def old_code(ctx: Context) -> None:
        await ctx.step("first", small.greet, "a")
        await ctx.wait_for_signal("go")

    async def new_code(ctx: Context) -> None:
        await ctx.step("other", small.greet, "a")
        await ctx.wait_for_signal("go")

    async with small.app as app:
        runs = {
            "hello": await app.start(small.hello, "ann", key="hello-1"),
            "broken": await app.start(small.broken, "rain", tags=["wet"]),
            "family": await app.start(small.family, "bob"),
            "evil": await app.start(small.evil, tags=["\u202etag"]),
            "waiting": await app.start(small.approval, 7),
            "cancelled": await app.start(small.approval, 8),
            "dead": await app.start(small.approval, 9),
        }
        await runs["cancelled"].cancel("not needed")
        for name in ("hello", "broken", "family", "evil", "cancelled"):
            await app.engine.wait(runs[name].id, 20)
        world.ids = {name: run.id for name, run in runs.items()}
    async with Durable(world.url) as before:
        before.workflow(name="changed")(old_code)
        changed = await before.start("changed")
        await eventually(lambda: _is(changed, "activity", "waiting"))
        world.ids["blocked"] = changed.id
    async with Durable(world.url) as after:
        after.workflow(name="changed")(new_code)
        await after.run(changed.id).signal("go")
        await eventually(lambda: _is(changed, "activity", "blocked", after))
    await bury(world)


async def bury(world: World) -> None:
    """Declare a run dead, as recovery does after too many crashes."""
    async with Durable(world.url, worker=False) as app:
        store, run = app.engine.deps.store, await app.get(world["dead"])
        entry = Entry(run.seq + 1, app.engine.clock.now(), RUN, "dead", name=run.workflow)
        error = b'{"message":"The engine died 4 times in a row while this run was executing.","code":"run_dead"}'
        commit = Commit(run.id, run.epoch, run.seq, "burial", [entry], status=Status.DEAD, error=error)
        [outcome] = await store.commit([commit])
        assert outcome.status == "done"


async def _is(handle: Any, field: str, value: str, app: Durable | None = None) -> bool:
    run = await (app.get(handle.id) if app else handle.get())
    return bool(getattr(run, field) == value)


def durable(*args: str, cwd: Path, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """The real thing: `durable ...` as a process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | (env or {})
    return subprocess.Popen(
        [sys.executable, "-m", "durable", *args],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
