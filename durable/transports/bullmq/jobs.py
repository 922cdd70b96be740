"""BullMQ's queue, as much of it as carries messages: its own scripts and job options, without its worker's loop.

Its worker asks the server twice for each job, tries again after whole seconds, sleeps 15 s after a lost connection and calls
listeners in its own stack. So jobs are taken here as its guide has it for "manually fetching jobs"; what is stored in Redis is
exactly BullMQ's.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from bullmq.job import Job as BullJob  # type: ignore[import-untyped]
from bullmq.redis_connection import SCRIPT_DEFINITIONS, loadScript  # type: ignore[import-untyped]
from bullmq.scripts import Scripts  # type: ignore[import-untyped]

from durable.transports.bullmq.link import Link, Script

BULL = "bull"
"""BullMQ's default prefix, of all its keys."""
PRIORITY_BASE, PRIORITY_MAX = 1_048_576, 2_097_151
FAILED_SECONDS = 24 * 3600
"""How long a failed task stays to be looked at."""
BLOCK_SECONDS = 5.0
"""The longest wait on a queue's marker before it is looked into all the same."""
_MARK_TOLD = """
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'durable:told', ARGV[1]) end
return 1
"""


class LostJob(Exception):
    """The job is somebody else's by now, or gone: its lock ran out, or Redis was emptied."""


class Scriptbook:
    """BullMQ's scripts over a link; what its `Scripts` expects of a connection."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.conn = None
        self.commands = {
            name: Script(link.take if name == "moveToActive" else link.ask, loadScript(file))
            for name, file in SCRIPT_DEFINITIONS.items()
        }


class _Scripts(Scripts):  # type: ignore[misc]
    """A job's data goes out as the bytes it is."""

    def addJobArgs(self, job: Any) -> list[Any]:
        args = super().addJobArgs(job)
        args[1] = job.raw
        return list(args)


class Job:
    """One job in our hands."""

    __slots__ = ("data", "doomed", "id", "queue", "starts", "token")

    def __init__(self, queue: JobQueue, id: str, token: str, fields: dict[bytes, bytes]) -> None:
        self.queue = queue
        self.id = id
        self.token = token
        self.data = fields.get(b"data", b"")
        doomed = fields.get(b"defa")
        self.doomed = None if doomed is None else doomed.decode("utf-8", "replace")
        """Why BullMQ wants it failed instead of run."""
        self.starts = int(fields.get(b"ats") or 1)
        """How often somebody has begun it."""


class JobQueue:
    """One queue."""

    def __init__(self, book: Scriptbook, name: str, *, lock_ms: int = 30_000) -> None:
        self.name = name
        self._link = book.link
        self._scripts = _Scripts(BULL, name, book)
        self._stub = SimpleNamespace(backend=None, qualifiedName=f"{BULL}:{name}", opts={"lockDuration": lock_ms})
        self._lock_ms = lock_ms
        self._marker: str = self._scripts.keys["marker"]

    # -- in

    async def add(self, name: str, data: bytes, *, priority: int | None = None, remove_on_fail: Any = True) -> str:
        """Its id. `data`: a JSON object. Raises TransportError."""
        options = {"removeOnComplete": True, "removeOnFail": remove_on_fail}
        if priority is not None:
            options["priority"] = max(1, min(PRIORITY_MAX, PRIORITY_BASE - priority))
        job = BullJob(self._stub, name, None, options)
        job.raw = data
        return _text(await self._scripts.addJob(job))

    # -- out

    async def take(self) -> tuple[Job | None, float]:
        """The next job, locked; or none, and the moment (epoch seconds, 0: unknown) at which one is due."""
        token = secrets.token_hex(8)
        options = {"lockDuration": self._lock_ms, "limiter": None}
        fields, id, limited, due = await self._scripts.moveToActive(token, options)
        if not fields:
            return None, time.time() + limited / 1000 if limited else float(due or 0) / 1000
        return Job(self, _text(id), token, fields), 0.0

    async def wait(self, seconds: float) -> bool:
        """Whether there may be something to take now. Others that wait are not told then."""
        return await self._link.wait_for(self._marker, max(0.001, min(seconds, BLOCK_SECONDS)))

    async def pass_on(self) -> None:
        """Tell another one that waits."""
        waiting = await self._link.ask("LLEN", self._scripts.keys["wait"])
        if waiting or await self._link.ask("ZCARD", self._scripts.keys["prioritized"]):
            await self._link.ask("ZADD", self._marker, 0, "0")

    async def finish(self, job: Job) -> None:
        """Done: it is removed. Raises LostJob."""
        with _lost():
            keys, args = self._scripts.moveToCompletedArgs(self._bull(job), None, True, job.token, fetchNext=False)
            await self._scripts.moveToFinished(job.id, keys, args)

    async def fail(self, job: Job, reason: str) -> None:
        """Failed for good: kept for a day, with the reason. Raises LostJob."""
        with _lost():
            keys, args = self._scripts.moveToFailedArgs(
                self._bull(job), reason, {"age": FAILED_SECONDS}, job.token, fetchNext=False
            )
            await self._scripts.moveToFinished(job.id, keys, args)

    async def give_back(self, job: Job) -> None:
        """To whoever is next. Raises LostJob."""
        with _lost():
            await self._scripts.retryJob(job.id, True, job.token)

    async def delay(self, job: Job, seconds: float) -> None:
        """To whoever is next, after that time. Raises LostJob."""
        with _lost():
            milliseconds = max(1, int(seconds * 1000))
            await self._scripts.moveToDelayed(job.id, _now_ms(), milliseconds, job.token, {"skipAttempt": True})

    async def remove(self, id: str) -> bool:
        """Take a job out that nobody has begun. False: somebody has."""
        return bool(await self._scripts.remove(id, False))

    async def check_stalled(self, max_count: int, interval_ms: int) -> list[str]:
        """Put back what has lost its worker: who of them it was. Once in an interval, whoever asks."""
        return [_text(id) for id in await self._scripts.moveStalledJobsToWait(max_count, interval_ms) or []]

    # -- looking

    async def ids(self) -> list[str]:
        """All that wait or are under way, seen at one moment."""
        states = ["active", "wait", "paused", "prioritized", "delayed"]
        return [_text(id) for id in await self._scripts.getRanges(states, 0, -1)]

    async def failed(self, most: int) -> list[tuple[str, str]]:
        """The failed ones, newest first: their ids, and when."""
        answer = await self._link.ask("ZREVRANGE", self._scripts.keys["failed"], 0, most - 1, "WITHSCORES")
        return [(_text(id), _text(at)) for id, at in zip(answer[::2], answer[1::2], strict=True)]

    async def fields(self, id: str) -> tuple[bytes, str, str]:
        """A job's data, why it failed, and which of its failures was told of; empty where there is none."""
        data, reason, told = await self._link.ask(
            "HMGET", self._scripts.toKey(id), "data", "failedReason", "durable:told"
        )
        return data or b"", _text(reason or b""), _text(told or b"")

    async def mark_told(self, id: str, at: str) -> None:
        """Somebody has heard of this failure."""
        await self._link.ask("EVAL", _MARK_TOLD, 1, self._scripts.toKey(id), at)

    def _bull(self, job: Job) -> Any:
        return SimpleNamespace(id=job.id, queue=self._stub, attempts=1, attemptsMade=0, opts={})


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """BullMQ says so by a TypeError."""
    try:
        yield
    except TypeError as error:
        raise LostJob(str(error)) from error


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _now_ms() -> int:
    return round(time.time() * 1000)
