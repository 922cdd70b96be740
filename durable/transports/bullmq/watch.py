"""Looks, at every engine end, for tasks that nobody will answer: those BullMQ has failed, and those Redis has lost.

BullMQ's events would tell of a failure at once, and of every other thing that happens to every job; and they tell it once. The
failed jobs themselves stay for a day, so looking at them misses none, over restarts of engines and cuts of the network.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence

import msgspec
from msgspec import Raw, Struct

from durable.core.errors import PayloadError
from durable.protocol import names
from durable.protocol.codec import decode_any_task
from durable.protocol.messages import Answer, RemoteTask, StepResult, Task, step_id
from durable.transports.answers import given_up, worker_failed
from durable.transports.bullmq.jobs import JobQueue
from durable.transports.bullmq.link import Link
from durable.transports.redis_link import Refused
from durable.transports.redis_settings import facts
from durable.transports.trouble import Trouble

log = logging.getLogger("durable.transports")

REMEMBERED = 100_000
"""Tasks sent by this end that it keeps in mind until it hears their answer."""
MARK_EXPIRES = 24 * 3600
"""Seconds without a look after which an end's own mark in Redis goes."""
MOST_FAILED = 1_000
"""Failed jobs of one queue that are looked at."""


class _Ids(Struct, rename="camel"):
    step_id: str | None = None
    task_id: str | None = None


class _Address(Struct, rename="camel"):
    run_id: str
    seq: int
    step_id: str
    attempt: int | None = None


class _Sent(Struct):
    """A task this end has sent, without its input."""

    task: Task
    queue: str
    job: str


class Watch:
    """`tell` hands an answer to the engine: True once it has been taken."""

    def __init__(
        self,
        link: Link,
        prefix: str,
        queue: Callable[[str], JobQueue],
        tell: Callable[[Answer], Awaitable[bool]],
        *,
        every: float,
        limit: int,
    ) -> None:
        self._link = link
        self._prefix = prefix
        self._queue = queue
        self._tell = tell
        self._every = every
        self._limit = limit
        self._groups: set[str] = set()
        self._sent: OrderedDict[str, _Sent] = OrderedDict()
        self._known: dict[str, set[tuple[str, str]]] = {}
        """Failures that were told of, by queue."""
        self._id = secrets.token_hex(8)
        self._server: str | None = None
        """Which start of the server this is, as it says; None: not asked yet."""
        self._task: asyncio.Task[None] | None = None
        self._scan: asyncio.Task[set[str]] | None = None
        self._next_scan: asyncio.Task[set[str]] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._go_on(), name="durable-bullmq-watch")

    async def close(self) -> None:
        tasks = {task for task in (self._task, self._scan, self._next_scan) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # -- what was sent

    async def announce(self, group: str) -> None:
        """Before the first task of a group: engines to come look there too."""
        if group not in self._groups:
            await self._link.ask("SADD", names.groups(self._prefix), group)
            self._groups.add(group)

    def sent(self, task: Task, queue: str, job: str) -> None:
        """It waits there. Of a task that is sent again the newest counts."""
        slim = msgspec.structs.replace(task, input=Raw(b"null"))
        if not isinstance(slim, RemoteTask):
            slim = msgspec.structs.replace(slim, history=[], pending_signals=None)
        self._sent[task.id] = _Sent(slim, queue, job)
        self._sent.move_to_end(task.id)
        if len(self._sent) > REMEMBERED:
            self._sent.popitem(last=False)

    def answered(self, task_id: str) -> None:
        """Nothing is owed for it any more."""
        self._sent.pop(task_id, None)

    async def take_back(self, task_id: str) -> None:
        """Take it out of its queue, if this end has sent it and nobody has begun it."""
        sent = self._sent.get(task_id)
        if sent is not None and await self._queue(sent.queue).remove(sent.job):
            self._sent.pop(task_id, None)

    # -- what is there

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        """Which of these wait, are under way, or have an answer that waits. One look answers all who ask meanwhile."""
        if self._next_scan is None:
            self._next_scan = asyncio.get_running_loop().create_task(self._scan_after(self._scan))
        held = await asyncio.shield(self._next_scan)
        return [task_id for task_id in task_ids if task_id in held]

    async def _scan_after(self, other: asyncio.Task[set[str]] | None) -> set[str]:
        """A look that began before the question may have missed something."""
        if other is not None:
            await asyncio.wait({other})
        self._scan, self._next_scan = self._next_scan, None
        # A task leaves its queue after its answer stands in the other: so tasks first.
        groups = await self._known_groups()
        tasks = [self._queue(names.tasks(self._prefix, group)) for group in groups]
        answers = [self._queue(name) for name in (names.results(self._prefix), names.decisions(self._prefix))]
        held = set().union(
            *await asyncio.gather(*(self._waiting(queue) for queue in tasks), *(self._untold(queue) for queue in tasks))
        )
        return held.union(*await asyncio.gather(*(self._waiting(queue) for queue in answers)))

    async def _waiting(self, queue: JobQueue) -> set[str]:
        found = await asyncio.gather(*(queue.fields(job) for job in await queue.ids()))
        return {id for data, _, _ in found if (id := _id_of(data)) is not None}

    async def _untold(self, queue: JobQueue) -> set[str]:
        listed = await queue.failed(MOST_FAILED)
        found = await asyncio.gather(*(queue.fields(job) for job, _ in listed))
        return {
            id
            for (_, at), (data, _, told) in zip(listed, found, strict=True)
            if told != at and (id := _id_of(data)) is not None
        }

    async def _known_groups(self) -> set[str]:
        said = await self._link.ask("SMEMBERS", names.groups(self._prefix))
        return self._groups | {group.decode("utf-8", "replace") for group in said}

    # -- looking again and again

    async def _go_on(self) -> None:
        trouble = Trouble("what workers have failed at cannot be seen", "what workers have failed at is seen again")
        while True:
            try:
                await self._look()
                trouble.over()
            except Exception as error:
                trouble.tell(error)
            await asyncio.sleep(self._every)

    async def _look(self) -> None:
        if await self._has_lost():
            await self._report_lost()
        queues = [self._queue(names.tasks(self._prefix, group)) for group in await self._known_groups()]
        await asyncio.gather(*(self._look_at(queue) for queue in queues))

    async def _look_at(self, queue: JobQueue) -> None:
        listed = set(await queue.failed(MOST_FAILED))
        known = self._known.get(queue.name, set()) & listed
        self._known[queue.name] = known
        for job, at in listed - known:
            data, reason, told = await queue.fields(job)
            if told == at or await self._tell_failed(queue, data, reason):
                await queue.mark_told(job, at)
                known.add((job, at))

    async def _tell_failed(self, queue: JobQueue, data: bytes, reason: str) -> bool:
        """Whether it was heard."""
        answer = _failed(data, reason or "no reason was given", self._limit)
        if answer is None:
            log.error("a job that failed in %s is no task, so nobody is told of it: %s", queue.name, reason)
            return True
        return await self._tell(answer)

    async def _has_lost(self) -> bool:
        """Whether Redis was emptied, or is another one, or has been started anew, since the last look."""
        try:
            server = facts(await self._link.ask("INFO", "server")).get("run_id", "")
        except Refused:
            server = ""  # it does not say
        mine = names.engine(self._prefix, self._id)
        there = await self._link.ask("SET", mine, "1", "EX", MARK_EXPIRES, "GET")
        if self._groups:
            await self._link.ask("SADD", names.groups(self._prefix), *sorted(self._groups))
        before, self._server = self._server, server
        return before is not None and (there is None or before != server)

    async def _report_lost(self) -> None:
        suspects = dict(self._sent)
        held = set(await self.holding(list(suspects)))
        gone = [sent for id, sent in suspects.items() if id not in held and self._sent.get(id) is sent]
        if gone:
            log.error("Redis was restarted or emptied: %d tasks are no longer there, and count as failed", len(gone))
        for sent in gone:
            if await self._tell(given_up(sent.task, "Redis no longer has the task")):
                self.answered(sent.task.id)


def _failed(data: bytes, reason: str, limit: int) -> Answer | None:
    """What the engine is told; None: it is nobody's."""
    try:
        return given_up(decode_any_task(data, limit=limit), reason)
    except PayloadError:
        pass
    try:
        address = msgspec.json.decode(data, type=_Address)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if address.seq < 0 or address.step_id != step_id(address.run_id, address.seq):
        return None
    return StepResult(
        run_id=address.run_id,
        seq=address.seq,
        step_id=address.step_id,
        attempt=address.attempt,
        status="failed",
        error=worker_failed("step", reason),
    )


def _id_of(data: bytes) -> str | None:
    try:
        ids = msgspec.json.decode(data, type=_Ids)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return ids.step_id or ids.task_id
