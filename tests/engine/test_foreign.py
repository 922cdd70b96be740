"""Workflows that break the rules: each gets an error that teaches, the engine and its neighbours go on, and a loop that is
blocked gives its runs away."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from durable import Context, RunFailed, workflow
from tests.engine.world import World

ROOT = Path(__file__).resolve().parents[2]


async def _socket() -> None:
    await asyncio.open_connection("127.0.0.1", 9)


async def _thread() -> None:
    await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0)


async def _to_thread() -> None:
    await asyncio.to_thread(time.sleep, 0)


async def _subprocess() -> None:
    await asyncio.create_subprocess_exec("true")


async def _callback_from_a_thread() -> None:
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    errors: list[BaseException] = []

    def other() -> None:
        try:
            loop.call_soon_threadsafe(future.set_result, None)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    await future


class Driver:
    """Awaits the way a driver does that was made on the application's loop."""

    def __init__(self) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __call__(self) -> None:
        await self.future


async def _never() -> None:
    await asyncio.get_running_loop().create_future()


FOREIGN: dict[str, Any] = {
    "socket": _socket,
    "run_in_executor": _thread,
    "to_thread": _to_thread,
    "subprocess": _subprocess,
    "call_soon_threadsafe": _callback_from_a_thread,
    "driver": None,
}


@pytest.mark.parametrize("kind", FOREIGN)
async def test_what_does_not_belong_in_a_workflow_fails_it_with_a_sentence(world: World, kind: str) -> None:
    """A socket, a driver's future, a thread, a subprocess: `foreign_await`, which says that it belongs in a step; even where
    the workflow catches it."""
    drivers = [Driver(), Driver()]

    @workflow(name="foreign")
    async def foreign(ctx: Context, catch: bool) -> str:
        try:
            await (FOREIGN[kind] or drivers[catch])()
        except Exception:
            if not catch:
                raise
        return "got away with it"

    @workflow(name="neighbour")
    async def neighbour(ctx: Context) -> str:
        await ctx.sleep(0.01)
        return "fine"

    app = await world.engine(foreign, neighbour)
    beside = await app.start(neighbour)
    for catch in (False, True):
        with pytest.raises(RunFailed) as caught:
            await app.start_and_wait(foreign, catch, timeout=5)
        assert caught.value.error is not None
        assert caught.value.error.code == "foreign_await"
        assert "step" in caught.value.error.message
    assert await beside.result(5) == "fine"


async def test_a_workflow_that_waits_for_nothing_that_can_come_is_stalled(world: World) -> None:
    """Nothing outstanding and not finished: it fails at once, naming the line, instead of waiting for ever."""

    @workflow(name="stalled")
    async def stalled(ctx: Context) -> None:
        await _never()

    app = await world.engine(stalled)
    with pytest.raises(RunFailed, match=r"test_foreign\.py") as caught:
        await app.start_and_wait(stalled, timeout=5)
    assert caught.value.error is not None
    assert caught.value.error.code == "stalled"


async def test_a_turn_without_an_end_is_cut(world: World) -> None:
    """Callbacks that breed callbacks, with every one yielding: the turn has a bound, the run fails, the engine goes on."""

    @workflow(name="endless")
    async def endless(ctx: Context) -> None:
        while True:
            await asyncio.sleep(0)

    app = await world.engine(endless)
    with pytest.raises(RunFailed) as caught:
        await app.start_and_wait(endless, timeout=20)
    assert caught.value.error is not None
    assert caught.value.error.code == "stalled"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_as_completed_over_bare_coroutines_is_refused_and_over_steps_works(world: World) -> None:
    """Bare coroutines start in the order of their addresses: refused with what to write instead; steps are fine."""

    @workflow(name="as-completed")
    async def as_completed(ctx: Context, bare: bool) -> list[int]:
        async def one(n: int) -> int:
            number: int = await ctx.step("one", lambda: n)
            return number

        things: Any = [one(n) for n in range(3)] if bare else [ctx.step("one", lambda n=n: n) for n in range(3)]
        return [await done for done in asyncio.as_completed(things)]

    app = await world.engine(as_completed)
    assert sorted(await app.start_and_wait(as_completed, False, timeout=5)) == [0, 1, 2]
    with pytest.raises(RunFailed, match="as_completed"):
        await app.start_and_wait(as_completed, True, timeout=5)


# Blocked loops: real processes, since the loop that is blocked would be this test's.

BLOCKER = """
import asyncio, logging, sys, time
from durable import Context, Durable, workflow

logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
store, role, kind = sys.argv[1:4]

@workflow(name="blocks")
async def blocks(ctx: Context) -> str:
    if role == "first" and kind == "workflow":
        print("blocking", flush=True)
        time.sleep(60)
    async def body() -> str:
        if role == "first":
            print("blocking", flush=True)
            time.sleep(60)
        return role
    return await ctx.step("body", body)

async def main() -> None:
    async with Durable(store, workflows=[blocks], lease=0.6, poll_every=0.1) as app:
        if role == "first":
            await app.start(blocks, key="the one")
            await asyncio.sleep(60)
        handle = await app.start(blocks, key="the one")
        print("started", handle.id, flush=True)
        print("result", await handle.result(20), flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["workflow", "step"])
def test_a_blocked_loop_is_named_and_its_run_is_taken_over(tmp_path: Path, kind: str) -> None:
    """A workflow that loops without awaiting, or a step that blocks the loop: the watchdog says which run, heartbeats stop
    although the thread could go on, and another engine finishes the run."""
    script = tmp_path / "blocker.py"
    script.write_text(BLOCKER)
    store = f"sqlite:///{tmp_path / 'durable.db'}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), store]
    first = subprocess.Popen(
        [*command, "first", kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline().strip() == "blocking"
        second = subprocess.run(
            [*command, "second", kind], capture_output=True, text=True, env=environment, timeout=25, check=False
        )
        assert "result second" in second.stdout, second.stderr
        run_id = second.stdout.split()[1]
    finally:
        first.send_signal(signal.SIGKILL)
        _, said = first.communicate()
    assert "the event loop has been blocked" in said
    if kind == "workflow":
        assert run_id in said, "the run is named"
