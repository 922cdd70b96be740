"""`durable worker` as real processes over a real Redis: drained, forced, killed, told to cancel, heard while they work."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from durable import Durable, RunCancelled, RunFailed, RunHandle
from durable.testing.facts import PATIENCE
from tests.worker.engine_node import relay

ROOT = Path(__file__).resolve().parents[2]
APP = str(Path(__file__).parent / "steps_app.py")
LEASE = "1s"
"""Of tasks: how long the death of a worker goes unnoticed."""

pytestmark = [pytest.mark.service, pytest.mark.broker]


class Process:
    """A process, its lines, and its end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            return (await self.process.stdout.readline()).decode().strip()

    async def said(self, **fields: Any) -> dict[str, Any]:
        """The next JSON line with these fields."""
        while text := await self.line():
            if text.startswith("{") and (row := json.loads(text)).items() >= fields.items():
                found: dict[str, Any] = row
                return found
        raise AssertionError(f"it ended without saying {fields}: {await self.errors()}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE):
            return await self.process.wait()

    async def errors(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


@asynccontextmanager
async def started(*command: str, cwd: Path, **variables: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | variables,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Process(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        # Its pipes are closed by the loop, which must get a turn for that.
        process._transport.close()  # type: ignore[attr-defined]


@asynccontextmanager
async def worker(url: str, cwd: Path, *options: str) -> AsyncIterator[Process]:
    """A worker process that is up."""
    command = ("-m", "durable", "worker", APP, "--json", "--transport", f"{url}?lease={LEASE}", *options)
    async with started(*command, cwd=cwd) as process:
        await process.said(kind="started")
        yield process


@pytest.fixture
async def app(redis_url: str, tmp_path: Path) -> AsyncIterator[Durable]:
    """An engine that has no step of its own."""
    transport = f"{redis_url}?lease={LEASE}"
    async with Durable(f"sqlite:///{tmp_path}/runs.db", workflows=[relay], transport=transport) as engine:
        yield engine


async def begun(app: Durable, run: RunHandle[Any], count: int = 1) -> None:
    """Until bodies have said so many lines."""
    async with asyncio.timeout(PATIENCE):
        async for entry in app.watch(run.id):
            count -= entry.kind == "log"
            if count <= 0:
                return


async def test_E11_sigterm_drains_a_worker(app: Durable, redis_url: str, tmp_path: Path) -> None:
    """(E11) The task under way is finished and answered, exit 0; a task sent meanwhile is another worker's."""
    async with worker(redis_url, tmp_path) as first:
        run = await app.start(relay, ["sleep", 0.5])
        await begun(app, run)
        first.signal(signal.SIGTERM)
        later = await app.start(relay, ["greet", "ann"])
        assert await run.result(PATIENCE) == 1
        assert await first.ended() == 0
        assert (await first.said(kind="task"))["outcome"] == "completed"
    async with worker(redis_url, tmp_path):
        assert await later.result(PATIENCE) == "hello ann"


async def test_E11_what_does_not_finish_in_time_is_given_back(app: Durable, redis_url: str, tmp_path: Path) -> None:
    """(E11) The drain has a bound: the body is cancelled, another worker takes the task, under the same attempt; exit 0."""
    async with worker(redis_url, tmp_path, "--drain-timeout", "100ms") as first:
        run = await app.start(relay, ["first_hangs", str(tmp_path / "marker")])
        await begun(app, run)
        first.signal(signal.SIGINT)
        assert await first.ended() == 0
        assert (await first.said(kind="task"))["outcome"] == "given_back"
    async with worker(redis_url, tmp_path) as second:
        assert await run.result(PATIENCE) == "done"
        assert (await second.said(kind="task"))["attempt"] == 1


async def test_E11_a_second_signal_ends_it_at_once(app: Durable, redis_url: str, tmp_path: Path) -> None:
    """(E11) Exit 130 without waiting for the body; nothing is lost, it runs again elsewhere."""
    async with worker(redis_url, tmp_path, "--drain-timeout", "10m") as first:
        run = await app.start(relay, ["first_hangs", str(tmp_path / "marker")])
        await begun(app, run)
        first.signal(signal.SIGTERM)
        first.signal(signal.SIGINT)  # two of one kind may arrive as one
        assert await first.ended() == 130
        assert "Stopped at once" in await first.errors()
    async with worker(redis_url, tmp_path):
        assert await run.result(PATIENCE) == "done"


async def test_S14_a_killed_workers_task_is_run_by_another(app: Durable, redis_url: str, tmp_path: Path) -> None:
    """(S14) kill -9 in the middle of a step: the transport's lease runs out, and the worker that is left takes it."""
    async with worker(redis_url, tmp_path) as first:
        run = await app.start(relay, ["first_hangs", str(tmp_path / "marker")])
        await begun(app, run)
        async with worker(redis_url, tmp_path) as second:
            first.signal(signal.SIGKILL)
            assert await first.ended() == -signal.SIGKILL
            assert await run.result(PATIENCE) == "done"
            assert (await second.said(kind="task"))["outcome"] == "completed"


async def test_N10_a_cancel_reaches_bodies_in_worker_processes(app: Durable, redis_url: str, tmp_path: Path) -> None:
    """(N10) An async body is cancelled, a plain one sees that it is; the worker goes on serving."""
    async with worker(redis_url, tmp_path) as process:
        asleep, spinning = await app.start(relay, ["sleep", 600.0]), await app.start(relay, ["spin", None])
        for run in (asleep, spinning):
            await begun(app, run)
            await run.cancel()
            with pytest.raises(RunCancelled):
                await run.result(PATIENCE)
        assert [(await process.said(kind="task"))["outcome"] for _ in range(2)] == ["cancelled"] * 2
        assert await (await app.start(relay, ["greet", "bob"])).result(PATIENCE) == "hello bob"


async def test_X8_progress_is_seen_live_by_a_watcher_in_another_process(redis_url: str, tmp_path: Path) -> None:
    """(X8) Worker, engine and watcher are three processes: the line is there while the body works, once."""
    store, transport = f"sqlite:///{tmp_path}/runs.db", f"{redis_url}?lease={LEASE}"
    node = ("-m", "tests.worker.engine_node", store, transport)
    async with started(*node, cwd=tmp_path) as engine, worker(redis_url, tmp_path):
        assert await engine.line() == "up"
        async with Durable(store, workflows=[relay], transport=transport, worker=False) as looker:
            run = await looker.start(relay, ["sleep", 1.5])
            seen: list[str] = []
            async with asyncio.timeout(PATIENCE):
                async for entry in looker.watch(run.id):
                    if entry.kind == "log":
                        seen.append(msgspec.json.decode(entry.payload or b"")["message"])
                        if len(seen) == 1:
                            assert (await run.get()).status == "active"
                    elif entry.kind == "remote":
                        seen.append(entry.status)
            assert seen[-1] == "completed"
            assert [word for word in seen if "%" in word] == ["0%", "100%"]
            assert seen.index("0%") < seen.index("completed")


async def test_what_a_body_raises_comes_back_from_another_process(app: Durable, redis_url: str, tmp_path: Path) -> None:
    """A failure's class and text are known to the run, and shown by the worker."""
    async with worker(redis_url, tmp_path) as process:
        run = await app.start(relay, ["broken", None])
        with pytest.raises(RunFailed, match="cannot bear it"):
            await run.result(PATIENCE)
        line = await process.said(kind="task")
        assert (line["outcome"], line["error"]["message"]) == ("failed", "cannot bear it")


async def test_N16_a_worker_process_says_whether_and_when_to_try_again(
    app: Durable, redis_url: str, tmp_path: Path
) -> None:
    """(N16) NonRetryable ends the step at its first attempt; RetryAfter is waited for."""
    async with worker(redis_url, tmp_path):
        never, later = await app.start(relay, ["picky", "never"]), await app.start(relay, ["picky", "later"])
        with pytest.raises(RunFailed, match="not with me"):
            await never.result(PATIENCE)
        assert await later.result(PATIENCE) == 2
        entries = [entry async for entry in app.watch(never.id)]
        assert {entry.attempt for entry in entries if entry.kind == "remote"} == {1}
        entries = [entry async for entry in app.watch(later.id)]
        failed, again = (e.at for e in entries if e.status == "retrying" or (e.status, e.attempt) == ("dispatched", 2))
        assert again - failed >= 300_000


async def test_the_example_runs_in_two_processes(redis_url: str, tmp_path: Path) -> None:
    """What its first lines say: the steps here, the workflow there, the same file."""
    example = str(ROOT / "examples" / "worker_steps.py")
    command = ("-m", "durable", "worker", example, "--json", "--transport", redis_url)
    async with started(*command, cwd=tmp_path) as process:
        assert (await process.said(kind="started"))["steps"] == ["text.count", "text.shout"]
        async with started(example, cwd=tmp_path, EXAMPLE_TRANSPORT=redis_url) as workflow:
            assert await workflow.line() == "result: 10 WORDS"
            assert await workflow.ended() == 0
