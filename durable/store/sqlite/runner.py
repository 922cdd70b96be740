"""Who runs an operation: a thread fed by a queue, or the caller itself.

The writer folds what waits in its queue into one transaction, so that many callers share one fsync; each keeps its own
answer, and its own failure. All answers of a round reach the event loop in one call.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from durable.core.errors import StoreError, StoreUnavailable
from durable.store.sqlite.connection import Location, atomic, translate
from durable.store.sqlite.turn import Turn

log = logging.getLogger("durable.sqlite")

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

_NUDGE, _CLOSE = "nudge", "close"

FOLD_MAX = 32
"""Operations in one transaction."""

AT_ONCE_SECONDS_MAX = 0.001
"""A small write is done on the caller's own thread while such writes take less than this: two thread switches would cost a
third as much again, and the loop is held for no longer than a turn may hold it. A slower disk is left to the writer."""


class Runner(Protocol):
    """Runs operations, in the order they come."""

    async def call(self, operation: Operation[T], *, alone: bool = False, small: bool = False) -> T: ...

    async def close(self) -> None: ...


class Inline:
    """The caller runs it, at once. The lock is for `beat`, which comes from another thread."""

    def __init__(self, cx: sqlite3.Connection, location: Location, turn: Turn | None = None) -> None:
        self._cx: sqlite3.Connection | None = cx
        self._location = location
        self._turn = turn or Turn(None, 0)
        self._lock = threading.RLock()

    async def call(self, operation: Operation[T], *, alone: bool = False, small: bool = False) -> T:
        return self.run(operation)

    def run(self, operation: Operation[T]) -> T:
        with self._lock:
            if self._cx is None:
                raise StoreError(f"{self._location} is closed")
            try:
                with self._turn:
                    return operation(self._cx)
            except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
                raise translate(error, self._location) from error

    async def close(self) -> None:
        self.end()

    def end(self) -> None:
        with self._lock:
            if self._cx is not None:
                self._cx.close()
                self._cx = None
                self._turn.close()


class _Job:
    __slots__ = ("alone", "answer", "error", "future", "loop", "operation")

    def __init__(self, operation: Operation[Any], loop: asyncio.AbstractEventLoop, alone: bool) -> None:
        self.operation = operation
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.alone = alone
        self.answer: Any = None
        self.error: BaseException | None = None


class Threaded:
    """One thread, one connection. `idle` is called between rounds and says in how many seconds it wants to be called
    again at the latest, None: not before the next round."""

    def __init__(
        self,
        cx: sqlite3.Connection,
        location: Location,
        name: str,
        *,
        folds: bool,
        turn: Turn | None = None,
        busy_timeout_s: float = 0.0,
        idle: Callable[[sqlite3.Connection], float | None] = lambda cx: None,
    ) -> None:
        self._cx = cx
        self._location = location
        self._folds = folds
        self._turn = turn or Turn(None, 0)
        self._idle = idle
        self._busy_timeout_ms = int(busy_timeout_s * 1000)
        self._queue: queue.SimpleQueue[_Job | str] = queue.SimpleQueue()
        self._closed = False
        self._using = threading.Lock()
        """Held while the connection is used, by the thread or by a caller."""
        self._usual_seconds = 0.0
        """What a round of one operation takes, of late."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def call(self, operation: Operation[T], *, alone: bool = False, small: bool = False) -> T:
        """`small`: it may be done at once, on the caller's thread, if nothing else wants the connection or the file."""
        if self._closed:
            raise StoreError(f"{self._location} is closed")
        job = _Job(operation, asyncio.get_running_loop(), alone)
        if small and self._at_once(job):
            _settle([job])
        else:
            self._queue.put(job)
        answer: T = await job.future
        return answer

    def _at_once(self, job: _Job) -> bool:
        """Do it here and now. False: not done, it would have had to wait."""
        if self._usual_seconds > AT_ONCE_SECONDS_MAX or not self._using.acquire(blocking=False):
            return False
        try:
            if not self._queue.empty() or not self._turn.take_at_once():
                return False
            began = time.monotonic()
            try:
                self._cx.execute("PRAGMA busy_timeout = 0")
                self._attempt(job)
            finally:
                self._cx.execute(f"PRAGMA busy_timeout = {self._busy_timeout_ms}")
                self._turn.give_back()
                self._note(time.monotonic() - began)
        finally:
            self._using.release()
        # Another process has the file, so nothing was done: the thread can wait for it, the loop cannot.
        return not isinstance(job.error, StoreUnavailable)

    def _note(self, seconds: float) -> None:
        self._usual_seconds += (seconds - self._usual_seconds) * 0.2

    def nudge(self) -> None:
        """Ask `idle` again."""
        self._queue.put(_NUDGE)

    async def close(self) -> None:
        """After everything that was accepted."""
        if not self._closed:
            self._closed = True
            self._queue.put(_CLOSE)
        await asyncio.to_thread(self._thread.join)

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        while (first := self._next()) is not _CLOSE:
            if isinstance(first, _Job):
                jobs, after = self._gather(first)
                self._round(jobs)
                if isinstance(after, _Job):
                    self._round([after])
                elif after is _CLOSE:
                    break
        self._cx.close()
        self._turn.close()

    def _next(self) -> _Job | str:
        while True:
            try:
                with self._using:
                    pause = self._idle(self._cx)
            except Exception:  # or the thread would die, and every write hang from then on
                log.exception("%s: looking for other processes' writes failed", self._location)
                pause = 1.0
            try:
                return self._queue.get(timeout=pause)
            except queue.Empty:
                continue

    def _gather(self, first: _Job) -> tuple[list[_Job], _Job | str | None]:
        """What may share a transaction with `first`, and the thing met that may not."""
        jobs = [first]
        while self._folds and not first.alone and len(jobs) < FOLD_MAX:
            try:
                more = self._queue.get_nowait()
            except queue.Empty:
                break
            if isinstance(more, str) or more.alone:
                return jobs, more
            jobs.append(more)
        return jobs, None

    def _round(self, jobs: list[_Job]) -> None:
        began = time.monotonic()
        try:
            with self._using, self._turn:
                self._perform(jobs)
        except StoreUnavailable as error:
            for job in jobs:
                job.error = error
        if len(jobs) == 1 and not jobs[0].alone:
            self._note(time.monotonic() - began)
        _deliver(jobs)

    def _perform(self, jobs: list[_Job]) -> None:
        if len(jobs) > 1:
            try:
                with atomic(self._cx):
                    for job in jobs:
                        self._attempt(job)
                        if not self._cx.in_transaction:
                            raise _FoldLost
                return
            except (_FoldLost, sqlite3.Error):
                pass  # all of it was rolled back: each by itself, then
        for job in jobs:
            self._attempt(job)

    def _attempt(self, job: _Job) -> None:
        job.answer = job.error = None
        try:
            job.answer = job.operation(self._cx)
        except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
            job.error = translate(error, self._location)
            job.error.__cause__ = error
        except BaseException as error:
            job.error = error


class _FoldLost(Exception):
    """SQLite rolled the whole transaction back under one operation (a full disk does that)."""


def _deliver(jobs: list[_Job]) -> None:
    loops = {job.loop for job in jobs}
    for loop in loops:
        try:
            loop.call_soon_threadsafe(_settle, [job for job in jobs if job.loop is loop])
        except RuntimeError:  # that loop is closed: nobody waits any more
            continue


def _settle(jobs: list[_Job]) -> None:
    for job in jobs:
        if job.future.done():  # its caller was cancelled; what was done stays done
            continue
        if job.error is not None:
            job.future.set_exception(job.error)
        else:
            job.future.set_result(job.answer)


class Pace:
    """Lets something happen at most every so often."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def left(self) -> float:
        """Seconds until it may; 0 starts the next period."""
        now = time.monotonic()
        if now < self._next:
            return self._next - now
        self._next = now + self._seconds
        return 0.0
