"""The worker end that every broker's transport shares: tasks under way, their bound, their beats, cancels, and the way out.

An adapter brings messages and settles them; in between, a task is here. It asks a `Server` for room, `begin`s what it has
taken, and is told what to do with the message: answer and acknowledge, only acknowledge, or give it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection
from enum import Enum
from math import inf
from typing import Any

from msgspec import Raw

from durable.core.errors import PayloadError, TransportError
from durable.protocol.codec import encode
from durable.protocol.messages import (
    Answer,
    ControlMessage,
    Heartbeat,
    RemoteTask,
    StepResult,
    Task,
    routing_token,
    sanitize,
)
from durable.transports.answers import cancelled, crashed, no_handler, too_large
from durable.transports.cancels import STEP_CANCEL
from durable.transports.interface import Concurrency, TaskHandler

log = logging.getLogger("durable.transports")

REFUSAL_MAX = 1.0
"""Seconds a handler may go on after `drain` has cancelled it. Then it is left behind, and said so."""
ESCAPED = 6
"""Bytes one character of a text may become in JSON."""
FRAME = 1_000
"""Bytes of a result beside its output and its ids, and more than that."""
ROOM_SECONDS = 0.25
"""How often a bound that is a callable is asked again while there is no room."""


class GivenBack(Exception):
    """The task was cut short because this end closes, or was released: give it back to the broker."""


class Server:
    """One `serve`: groups with their handler and their own bound."""

    def __init__(self, groups: Collection[str], handler: TaskHandler, concurrency: Concurrency) -> None:
        self.groups = tuple(dict.fromkeys(map(sanitize, groups)))
        self.handler = handler
        self._concurrency = concurrency
        self.under_way = 0
        self._freed = asyncio.Event()

    @property
    def room(self) -> int:
        """How many more may be taken now."""
        bound = self._concurrency if isinstance(self._concurrency, int) else self._concurrency()
        return max(0, bound - self.under_way)

    def serves(self, task: Task) -> bool:
        """Whether a task that waited in one of the groups is for this handler at all."""
        own = routing_token(task.name)
        return any(group == own or group.startswith(own + "@") for group in self.groups)

    async def has_room(self) -> int:
        """Wait until at least one more may be taken; how many."""
        while not (room := self.room):
            self._freed.clear()
            if isinstance(self._concurrency, int):
                await self._freed.wait()
            else:
                with contextlib.suppress(TimeoutError):  # not wait_for: 3.11's may swallow a cancellation
                    async with asyncio.timeout(ROOM_SECONDS):
                        await self._freed.wait()
        return room

    def leave(self) -> None:
        """One less is under way."""
        self.under_way -= 1
        self._freed.set()


class Cut(Enum):
    """Why a task was cut short, and so what becomes of its message."""

    DROPPED = "dropped"
    """Nobody waits for an answer: acknowledged."""
    RECALLED = "recalled"
    """Its run was cancelled. Whether somebody waits all the same, a clean-up, is not known here: answered as cancelled."""
    RELEASED = "released"
    """The broker takes the message away, or this end closes: it is for somebody else to answer."""


class _Job:
    """A task under way."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.work: asyncio.Task[Any] | None = None
        self.cut: Cut | None = None
        """Why it was cut short, if it was."""


class Workbench:
    """All tasks under way at one worker end. `beat` sends a heartbeat; None: this transport's workers do not beat."""

    def __init__(
        self,
        *,
        max_message: int,
        heartbeat_interval: float = 5.0,
        beat: Callable[[Heartbeat], Awaitable[None]] | None = None,
    ) -> None:
        self.servers: list[Server] = []
        self._max_message = max_message
        self._interval = heartbeat_interval
        self._beat = beat
        self._jobs: dict[_Job, None] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self._beating: asyncio.Task[None] | None = None
        self._closing = False

    def add(self, groups: Collection[str], handler: TaskHandler, concurrency: Concurrency) -> Server:
        """What `serve` begins with."""
        server = Server(groups, handler, concurrency)
        self.servers.append(server)
        return server

    @property
    def tasks(self) -> list[Task]:
        """Under way now."""
        return [job.task for job in self._jobs]

    def begin(
        self,
        server: Server,
        task: Task,
        done: Callable[[Answer | None], Awaitable[None]],
        back: Callable[[], Awaitable[None]],
    ) -> None:
        """Work on it in the background. Then `done`: send the answer (None: nobody wants one) and acknowledge the message; or
        `back`, where it was cut short or `done` raised: have it delivered again."""
        server.under_way += 1
        settling = asyncio.get_running_loop().create_task(
            self._settle(server, task, done, back), name=f"step {task.id}"
        )
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)

    def cancel(self, task_id: str, attempt: int | None = None) -> None:
        """Cancel every attempt of a task, or this one and those before it."""
        self._cut(
            lambda task: task.id == task_id and (attempt is None or task.attempt <= attempt),
            Cut.DROPPED,
        )

    def cancel_run(self, run_id: str) -> None:
        """Cancel all tasks of a run. Its steps are answered all the same, as cancelled."""
        self._cut(lambda task: task.run_id == run_id and isinstance(task, RemoteTask), Cut.RECALLED)
        self._cut(lambda task: task.run_id == run_id and not isinstance(task, RemoteTask), Cut.DROPPED)

    def hear(self, message: ControlMessage) -> None:
        """Obey a cancel that came over the broker: of a run, or of one task. All else is passed over."""
        event = message.event or {}
        if message.kind == "cancel" and message.run_id is not None:
            self.cancel_run(message.run_id)
        elif message.kind == "event" and event.get("type") == STEP_CANCEL:
            attempt = event.get("attempt")
            self.cancel(str(event.get("stepId")), attempt if isinstance(attempt, int) else None)

    def cut(self, task: Task, why: Cut) -> None:
        """Cut short this very delivery, as it was given to `begin`: another delivery or attempt of it goes on."""
        self._cut(lambda other: other is task, why)

    async def drain(self, timeout: float) -> None:
        """Wait for what is under way, cancel the rest. The adapter takes nothing more by then."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while (waiting := self._unfinished()) and (left := deadline - loop.time()) > 0:
            await asyncio.wait(waiting, timeout=left)
        self._closing = True
        self._cut(lambda task: True, Cut.RELEASED)
        if waiting := self._unfinished():
            _, refusing = await asyncio.wait(waiting, timeout=REFUSAL_MAX)
            for future in refusing:
                future.cancel()
                log.error("a task went on after it was cancelled; it is left behind")
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
        self._closing = False

    def _unfinished(self) -> set[asyncio.Future[Any]]:
        unfinished: set[asyncio.Future[Any]] = set(self._settling)
        return unfinished | {job.work for job in self._jobs if job.work is not None}

    async def _settle(
        self,
        server: Server,
        task: Task,
        done: Callable[[Answer | None], Awaitable[None]],
        back: Callable[[], Awaitable[None]],
    ) -> None:
        try:
            try:
                answer = await self._work(server, task)
            finally:
                server.leave()
            await self._send(task, answer, done)
        except GivenBack:
            await self._give_back(task, back)
        except Exception as error:
            log.warning("task %s could not be answered and is given back: %r", task.id, error)
            await self._give_back(task, back)

    async def _send(self, task: Task, answer: Answer | None, done: Callable[[Answer | None], Awaitable[None]]) -> None:
        """What no wire carries is no better the next time: the task has failed, and is not given back."""
        try:
            await done(answer)
        except (PayloadError, TransportError) as error:
            why = error if isinstance(error, PayloadError) else error.__cause__
            if not isinstance(why, PayloadError):
                raise
            log.warning("the answer of %s cannot be sent; it is answered as failed: %s", task.name, why)
            await done(crashed(task, why))

    async def _give_back(self, task: Task, back: Callable[[], Awaitable[None]]) -> None:
        try:
            await back()
        except Exception as error:
            log.warning("task %s could not be given back; it comes again by itself: %r", task.id, error)

    async def _work(self, server: Server, task: Task) -> Answer | None:
        if not server.serves(task):
            return no_handler(task)
        if self._closing:
            raise GivenBack
        job = _Job(task)
        self._jobs[job] = None
        self._arm()
        # In this very task: one more for each handler would cost as much as all else here.
        job.work = asyncio.current_task()
        assert job.work is not None
        before = job.work.cancelling()
        try:
            return self._fitting(task, await server.handler(task))
        except asyncio.CancelledError as error:
            if job.cut is Cut.DROPPED:
                return None
            if job.cut is Cut.RELEASED:
                raise GivenBack from None
            if job.cut is Cut.RECALLED and isinstance(task, RemoteTask):
                return cancelled(task)
            if job.work.cancelling() > before:
                raise  # whoever waits for it is going
            return crashed(task, error)
        except Exception as error:
            log.warning("The handler of %s raised; the task is answered as failed", task.name, exc_info=error)
            return crashed(task, error)
        finally:
            del self._jobs[job]
            if job.cut is not None:
                while job.work.cancelling() > before:
                    job.work.uncancel()  # it was the handler that was meant

    def _fitting(self, task: Task, answer: Answer) -> Answer:
        if _at_most(answer) <= self._max_message:
            return answer  # most are far below, and are encoded once, when they are sent
        size = len(encode(answer, limit=1 << 40))
        return answer if size <= self._max_message else too_large(task, size, self._max_message)

    def _cut(self, meant: Callable[[Task], bool], cut: Cut) -> None:
        for job in list(self._jobs):
            if meant(job.task) and job.work is not None:
                # An answer that nobody wants stays unwanted.
                job.cut = job.cut if job.cut is Cut.DROPPED else cut
                job.work.cancel()

    def _arm(self) -> None:
        if self._beat is not None and self._beating is None:
            self._beating = asyncio.get_running_loop().create_task(self._beats(self._beat), name="durable-beats")

    async def _beats(self, beat: Callable[[Heartbeat], Awaitable[None]]) -> None:
        """One task for all; it ends when there are none."""
        try:
            while True:
                await asyncio.sleep(self._interval)
                if not self._jobs:
                    return
                for task in self.tasks:
                    try:
                        await beat(beat_of(task))
                    except Exception as error:
                        log.debug("a heartbeat of %s was not sent: %r", task.id, error)
        finally:
            self._beating = None


def _at_most(answer: Answer) -> float:
    """Bytes that an answer cannot be longer than; no bound where it takes an encoding to tell."""
    if not isinstance(answer, StepResult) or answer.error is not None or answer.events:
        return inf
    if not isinstance(answer.output, Raw):
        return inf
    ids = len(answer.run_id) + len(answer.step_id) + len(answer.token or "")
    return len(bytes(answer.output)) + ESCAPED * ids + FRAME


def beat_of(task: Task) -> Heartbeat:
    """A step's beat names it; a turn's is for its whole run."""
    step = task.step_id if isinstance(task, RemoteTask) else None
    return Heartbeat(run_id=task.run_id, seq=max(task.seq, 0), step_id=step, group=task.group)
