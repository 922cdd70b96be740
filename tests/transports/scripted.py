"""A transport that behaves as it is told: it takes tasks, fails, hangs or lies, and the test is its worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from durable.core.errors import TransportError
from durable.protocol.messages import Heartbeat, RemoteTask, StepResult
from durable.testing.suites.transport import answer
from durable.transports.interface import Capabilities, HeartbeatHandler, ResultHandler, TaskHandler

BLANK = Capabilities(name="scripted", shared=True, holds=True, broadcast=False, heartbeats=True, max_message=1 << 20)


class Scripted:
    """`mood`: "well", "fails", "hangs" (until the caller gives up), "ambiguous" (takes the task and fails), "slow" (by
    `delays`), "stubborn" (takes the task once it is told to give up)."""

    def __init__(self, mood: str = "well", **capabilities: Any) -> None:
        self.capabilities = msgspec.structs.replace(BLANK, **capabilities)
        self.mood = mood
        self.error: Exception = TransportError("the line is dead")
        self.start_error: Exception | None = None
        self.asked: list[RemoteTask] = []
        """Every dispatch there was."""
        self.tasks: list[RemoteTask] = []
        """Those it took."""
        self.held: dict[str, RemoteTask] = {}
        self.delays: dict[str, float] = {}
        self.cancelled: list[str] = []
        self.replies: list[StepResult] = []
        self.beats: list[Heartbeat] = []
        self.starts = 0
        self.closes = 0
        self.results: ResultHandler | None = None
        self.hears: HeartbeatHandler | None = None
        self.handler: TaskHandler | None = None
        self.concurrency = 0

    async def start(self) -> None:
        self.starts += 1
        if self.start_error is not None:
            raise self.start_error

    async def close(self, timeout: float = 10.0) -> None:
        self.closes += 1

    async def dispatch(self, task: RemoteTask) -> None:
        self.asked.append(task)
        if self.mood == "hangs":
            await asyncio.Event().wait()
        if self.mood == "slow":
            await asyncio.sleep(self.delays[task.step_id])
        if self.mood == "stubborn":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        if self.mood not in ("fails", "hangs"):
            self.tasks.append(task)
            self.held[task.step_id] = task
        if self.mood in ("fails", "ambiguous"):
            raise self.error

    async def cancel(self, step_id: str) -> None:
        if self.mood == "fails":
            raise self.error
        self.cancelled.append(step_id)
        self.held.pop(step_id, None)

    async def holding(self, step_ids: Sequence[str]) -> Collection[str]:
        if self.mood == "fails":
            raise self.error
        return [step_id for step_id in step_ids if step_id in self.held]

    def on_result(self, handler: ResultHandler) -> None:
        self.results = handler

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        self.hears = handler

    async def serve(self, steps: Collection[str], handler: TaskHandler, *, concurrency: int = 16) -> None:
        self.handler = handler
        self.concurrency = concurrency

    async def reply(self, result: StepResult) -> None:
        if self.mood == "fails":
            raise self.error
        self.replies.append(result)

    async def heartbeat(self, beat: Heartbeat) -> None:
        if self.mood == "fails":
            raise self.error
        self.beats.append(beat)

    # -- the test's side

    async def answers(self, task: RemoteTask, output: object = None) -> None:
        """A worker behind this transport has answered; raises what the engine's handler raises."""
        assert self.results is not None
        await self.results(answer(task, output))
        self.held.pop(task.step_id, None)

    async def works(self, task: RemoteTask) -> None:
        """A task comes to the worker end here, and is answered as a transport does."""
        assert self.handler is not None
        await self.reply(await self.handler(task))
