"""A transport that behaves badly on purpose: it loses, doubles, delays and reorders tasks and results, by a seed.

Wrap the real one and the promise under test stays the same: what the engine asks for again is done, and counts once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from random import Random

from msgspec import Struct

from durable.protocol.messages import Answer, Heartbeat, Task
from durable.transports.interface import (
    Capabilities,
    Concurrency,
    HeartbeatHandler,
    ResultHandler,
    TaskHandler,
    Transport,
)


class Faults(Struct, frozen=True):
    """Shares from 0 to 1, of tasks and of results alike."""

    lost: float = 0.0
    doubled: float = 0.0
    late: float = 0.0
    """Held back, so that others overtake it."""
    latest: float = 0.05
    """Seconds a late message is held back at most."""


class FaultyTransport:
    """Another transport with faults on the way there and the way back."""

    def __init__(self, inner: Transport, faults: Faults, *, seed: int | str) -> None:
        self.inner = inner
        self.faults = faults
        self._random = Random(seed)
        self._late: set[asyncio.Task[None]] = set()

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    async def start(self) -> None:
        await self.inner.start()

    async def close(self, timeout: float = 10.0) -> None:
        for late in self._late:
            late.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)
        await self.inner.close(timeout)

    async def dispatch(self, task: Task) -> None:
        await self._send(lambda: self.inner.dispatch(task))

    async def cancel(self, task_id: str) -> None:
        await self.inner.cancel(task_id)

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        return await self.inner.holding(task_ids)

    def on_result(self, handler: ResultHandler) -> None:
        async def hear(result: Answer) -> None:
            await self._send(lambda: handler(result))

        self.inner.on_result(hear)

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        self.inner.on_heartbeat(handler)

    async def serve(self, groups: Collection[str], handler: TaskHandler, *, concurrency: Concurrency = 16) -> None:
        await self.inner.serve(groups, handler, concurrency=concurrency)

    async def reply(self, answer: Answer) -> None:
        await self.inner.reply(answer)

    async def heartbeat(self, beat: Heartbeat) -> None:
        await self.inner.heartbeat(beat)

    async def _send(self, message: Callable[[], Awaitable[None]]) -> None:
        draw, faults = self._random, self.faults
        if draw.random() < faults.lost:
            return
        for _ in range(2 if draw.random() < faults.doubled else 1):
            if draw.random() < faults.late:
                self._later(message, draw.random() * faults.latest)
            else:
                await message()

    def _later(self, message: Callable[[], Awaitable[None]], delay: float) -> None:
        async def send() -> None:
            await asyncio.sleep(delay)
            await message()

        late = asyncio.get_running_loop().create_task(send())
        self._late.add(late)
        late.add_done_callback(self._late.discard)
