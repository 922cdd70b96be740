"""Group commit. Runs do not talk to the store one by one: what is asked while a call is in flight goes out as the next
call, so batches form by themselves under load and a lone question is never delayed.

Used for commits, starts and sends. A store that cannot be reached is asked again with the very same batch: every item
carries the caller's ids, so a batch that had arrived is answered, not applied twice (S39).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from durable.core.errors import EngineStopped, StoreError, StoreFull, StoreReadOnly, StoreUnavailable

log = logging.getLogger("durable.committer")

Q = TypeVar("Q")
A = TypeVar("A")

RETRY_SECONDS_MIN = 0.01
RETRY_SECONDS_MAX = 1.0


class Group(Generic[Q, A]):
    """Gathers single questions into batched calls; answers each on its own."""

    def __init__(
        self,
        name: str,
        call: Callable[[Sequence[Q]], Awaitable[Sequence[A]]],
        *,
        max_items: int,
        in_flight: int = 1,
        max_bytes: int = 4 << 20,
        size: Callable[[Q], int] = lambda _: 0,
        alone: Callable[[Q], object] | None = None,
    ) -> None:
        """`in_flight`: calls under way at once, more than one only while full ones wait. `alone`: two questions for which it
        gives the same never share a call."""
        self._name = name
        self._call = call
        self._max_items = max_items
        self._in_flight = in_flight
        self._max_bytes = max_bytes
        self._size = size
        self._alone = alone
        self._queue: deque[tuple[Q, Callable[[A | BaseException], None]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = False
        self.trouble: StoreError | None = None
        """Why the store takes nothing right now; None while all is well."""

    def submit(self, item: Q, done: Callable[[A | BaseException], None]) -> None:
        """Queue one question. `done` is called on the loop, with the answer or with why there is none."""
        self._queue.append((item, done))
        under_way = len(self._tasks)
        if (not under_way or (under_way < self._in_flight and len(self._queue) >= self._max_items)) and not self.closed:
            task = asyncio.get_running_loop().create_task(self._run(), name=f"durable-{self._name}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def ask(self, item: Q, also: Callable[[A | BaseException], None] = lambda _: None) -> A:
        """Queue one question and wait for its answer. `also` is told it too, whether or not the caller still waits, and
        before the caller goes on."""
        if self.closed:
            stopped = EngineStopped("The engine has been stopped; start it again before asking it for work.")
            also(stopped)
            raise stopped
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()

        def done(answer: A | BaseException) -> None:
            # First: whatever becomes of `also`, the caller is not left waiting.
            if not future.done():
                if isinstance(answer, BaseException):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
            also(answer)

        self.submit(item, done)
        return await future

    async def flush(self, monotonic: Callable[[], float], seconds: float) -> None:
        """Wait until all that was asked is answered, or for that long; not for a store that takes nothing."""
        deadline = monotonic() + seconds
        while self._tasks and self.trouble is None and monotonic() < deadline:
            await asyncio.wait(self._tasks, timeout=0.05)

    async def close(self) -> None:
        """Wait for what is queued; with the store out of reach, give it up."""
        self.closed = True
        while self._tasks and self.trouble is None:  # it may get into trouble while we wait
            await asyncio.wait(self._tasks, timeout=0.05)
        self.abort()

    def abort(self) -> None:
        """Forget everything queued: this engine may not write any more."""
        self.closed = True
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        while self._queue:
            _, done = self._queue.popleft()
            done(EngineStopped("The engine stopped before the store answered."))

    async def _run(self) -> None:
        me = asyncio.current_task()
        while self._queue:
            batch = self._take()
            await self._answer(batch)
        # At once, not when the loop gets round to telling: what is submitted in between needs a task of its own.
        if me is not None:
            self._tasks.discard(me)

    def _take(self) -> list[tuple[Q, Callable[[A | BaseException], None]]]:
        queue, size, alone = self._queue, self._size, self._alone
        batch: list[tuple[Q, Callable[[A | BaseException], None]]] = []
        names = set()
        left = self._max_bytes
        for asked in islice(queue, self._max_items):
            item = asked[0]
            left -= size(item)
            if left < 0 and batch:
                break
            if alone is not None:
                name = alone(item)
                if name in names:
                    break
                names.add(name)
            batch.append(asked)
        for _ in batch:
            queue.popleft()
        return batch

    async def _answer(self, batch: list[tuple[Q, Callable[[A | BaseException], None]]]) -> None:
        parts = [batch]
        """What has no answer yet, the next one last."""
        while parts:
            part = parts[-1]
            try:
                answers: Sequence[A | BaseException] = await self._patiently([item for item, _ in part])
            except asyncio.CancelledError:
                for part in reversed(parts):
                    self._tell(part, [EngineStopped("The engine stopped before the store answered.")] * len(part))
                raise
            except Exception as error:
                if len(part) > 1:
                    # Somebody's is refused: in halves, until it stands alone and its neighbours are through.
                    half = len(part) // 2
                    parts[-1:] = [part[half:], part[:half]]
                    continue
                log.exception("the store refused one of the %s", self._name)
                answers = [error]
            parts.pop()
            self._tell(part, answers)

    async def _patiently(self, items: Sequence[Q]) -> Sequence[A]:
        """The answers, however long the store is out of reach."""
        delay = RETRY_SECONDS_MIN
        while True:
            try:
                answers = await self._call(items)
            except (StoreUnavailable, StoreFull, StoreReadOnly) as error:
                if self.trouble is None:
                    log.error("the store takes no %s, trying again: %s", self._name, error)
                self.trouble = error
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_SECONDS_MAX)
                continue
            if self.trouble is not None:
                log.warning("the store takes %s again", self._name)
                self.trouble = None
            return answers

    def _tell(
        self, batch: list[tuple[Q, Callable[[A | BaseException], None]]], answers: Sequence[A | BaseException]
    ) -> None:
        for (_, done), answer in zip(batch, answers, strict=True):
            try:
                done(answer)
            except Exception:
                log.exception("an answer from the store could not be taken in")
