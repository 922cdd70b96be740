"""Takes jobs of one queue for as long as there is room for them: more at a time the more there are, none while there is no
room, and again by itself when Redis was away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from durable.transports.bullmq.jobs import BLOCK_SECONDS, Job, JobQueue
from durable.transports.serving import Server
from durable.transports.trouble import Trouble

log = logging.getLogger("durable.transports")

MOST = 64
"""Jobs taken in one round trip."""


class Intake:
    """A loop over one queue. `begin` gets each job, and has counted it with the server when it returns."""

    def __init__(self, queue: JobQueue, server: Server, begin: Callable[[Job], None]) -> None:
        self.queue = queue
        self._server = server
        self._begin = begin
        self._stopping = False
        self._idle = False
        """It may be cancelled without a job in its hands."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"durable-bullmq-{self.queue.name}")

    def halt(self) -> None:
        """Take no more. What is taken in this very moment is still handed to `begin`."""
        self._stopping = True
        if self._idle and self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """`halt`, and return when nothing more comes."""
        self.halt()
        task, self._task = self._task, None
        if task is None:
            return
        await asyncio.wait({task})
        try:
            await self.queue.pass_on()  # the wait that was cut may have been told of a job
        except Exception as error:
            log.debug("others could not be told that %s has jobs: %s", self.queue.name, error)

    async def _run(self) -> None:
        want = 1
        trouble = Trouble(f"queue {self.queue.name} cannot be read", f"queue {self.queue.name} is read again")
        while not self._stopping:
            try:
                taken, asked, due = await self._take(want)
                if taken < asked and not self._stopping:
                    await self._wait(due)
                want = min(want * 2, MOST) if taken == asked else max(1, taken)
                trouble.over()
            except Exception as error:
                await self._rest(trouble.wait(error))

    async def _rest(self, wait: Awaitable[Any]) -> Any:
        self._idle = True
        try:
            return await wait
        finally:
            self._idle = False

    async def _take(self, want: int) -> tuple[int, int, float]:
        """How many were taken, of how many asked for, and when the next is due."""
        server = self._server
        count = min(await self._rest(server.has_room()), want)
        server.under_way += count
        answers = await asyncio.gather(*(self.queue.take() for _ in range(count)), return_exceptions=True)
        for _ in range(count):
            server.leave()  # nobody sees it free: what was taken is counted before anybody else runs
        taken, due, broken = 0, 0.0, None
        for answer in answers:
            if isinstance(answer, BaseException):
                broken = answer
            elif answer[0] is None:
                due = answer[1]
            else:
                taken += 1
                self._begin(answer[0])
        if broken is not None:
            raise broken
        return taken, count, due

    async def _wait(self, due: float) -> None:
        seconds = BLOCK_SECONDS if not due else due - time.time()
        came = await self._rest(self.queue.wait(seconds))
        if came and not self._server.room:
            await self.queue.pass_on()
