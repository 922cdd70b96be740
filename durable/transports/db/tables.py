"""What both databases do for the transport, and the two tables' shape. One call is one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from durable.core.errors import TransportError
from durable.transports.db.rows import ClaimedResult, ClaimedTask, ResultRow, Seen, TaskRow

TASKS, RESULTS, CANCELS = "tasks", "results", "cancels"
"""What there is news of."""
News = Callable[[str, str | None], None]
"""Told which of these, and which group or task; None: any, something may have been missed."""

DOCUMENTED = {
    TASKS: (
        ("step_id", "text NOT NULL PRIMARY KEY"),
        ("run_id", "text NOT NULL"),
        ("seq", "integer NOT NULL"),
        ("name", "text NOT NULL"),
        ("grp", "text NOT NULL"),
        ("input", "text"),
        ("attempt", "integer NOT NULL"),
        ("status", "text NOT NULL"),
        ("claimed_by", "text"),
        ("claimed_at", "bigint"),
        ("created_at", "bigint NOT NULL"),
    ),
    RESULTS: (
        ("step_id", "text NOT NULL PRIMARY KEY"),
        ("run_id", "text NOT NULL"),
        ("seq", "integer NOT NULL"),
        ("status", "text NOT NULL"),
        ("output", "text"),
        ("error", "text"),
        ("started_at", "bigint"),
        ("claimed_by", "text"),
        ("claimed_at", "bigint"),
        ("created_at", "bigint NOT NULL"),
    ),
}
"""The columns every language knows. Times are epoch ms."""
OURS = {
    TASKS: (
        ("priority", "integer"),
        ("token", "text"),
        ("kind", "text"),
        ("extra", "text"),
        ("deliveries", "integer"),
        ("cancelled_at", "bigint"),
        ("refused", "text"),
    ),
    RESULTS: (
        ("attempt", "integer"),
        ("token", "text"),
        ("kind", "text"),
        ("extra", "text"),
        ("refused", "text"),
    ),
}
"""Columns of ours, added to tables that others have made; all may be null."""

WAITING_INDEX = "(grp, coalesce(priority, 0) DESC, created_at, step_id)"
"""Of the tasks: the order in which a group's are claimed."""
KEY_MAX = 191
"""Characters of what we write into key columns by ourselves: others make them varchar(191)."""

NEVER = 2**53 - 1
"""`claimed_at` of a row that was put away: those who know only the documented columns leave it alone too."""


class Away(TransportError):
    """The database did not answer: whoever asked may ask again."""


class Tables(Protocol):
    """The two tables. Everything raises TransportError, Away where it may be tried again. A claim is named by a text of its
    own in `claimed_by`; whatever is done with a claimed row is done only while that still stands there."""

    name: str

    async def open(self, create: bool, news: News) -> None:
        """Connect, see that the tables are there, and tell of news from now on."""
        ...

    async def close(self) -> None:
        """Idempotent."""
        ...

    def tell(self, what: str, which: str = "") -> None:
        """Tell other processes that there is something; costs nothing to call often."""
        ...

    # -- tasks
    async def put(self, rows: Sequence[TaskRow]) -> None:
        """Write tasks, each step once. A newer attempt replaces the row, and so does any attempt of a cancelled task; results
        of attempts before it, and those an engine has in its hands, make room for what will come of this one."""
        ...

    async def claim_tasks(self, groups: Sequence[str], most: int, claim: str) -> list[ClaimedTask]:
        """The first by priority, then by age. Rows that were given up on count as well, and cancelled ones."""
        ...

    async def renew(self, claims: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bool]:
        """Extend the leases of these (step id, claim). Those still held, and whether each is cancelled."""
        ...

    async def touch(self, step_id: str) -> None:
        """A sign of life of a claimed task, whoever has it."""
        ...

    async def finish(self, rows: Sequence[ResultRow]) -> None:
        """Write results and delete the tasks of the same attempt. Of two of one attempt the first stays; an older attempt's
        makes room. Where the row has no attempt no task is deleted."""
        ...

    async def drop(self, claims: Sequence[tuple[str, str]]) -> None:
        """Delete tasks that nobody wants answered."""
        ...

    async def give_back(self, claims: Sequence[tuple[str, str]]) -> None:
        """Let others claim them at once, as if they had not been delivered."""
        ...

    async def refuse_task(self, step_id: str, claim: str, key: str, reason: str) -> None:
        """Put a row away, under a key of its own."""
        ...

    async def cancel(self, step_id: str) -> bool:
        """Delete a task that waits; mark one that is claimed. Whether it was marked."""
        ...

    async def look(self, step_ids: Sequence[str]) -> list[Seen]:
        """How these tasks stand; those that are there."""
        ...

    # -- results
    async def answered(self, step_ids: Sequence[str]) -> Collection[str]:
        """Which of these have a result that lies there."""
        ...

    async def claim_results(self, most: int, claim: str) -> list[ClaimedResult]:
        """The oldest first."""
        ...

    async def settle(self, claims: Sequence[tuple[str, str]]) -> None:
        """Delete results that were taken."""
        ...

    async def release(self, claims: Sequence[tuple[str, str]], seconds: float) -> None:
        """Let them be claimed again, not before `seconds` have passed."""
        ...

    async def refuse_result(self, step_id: str, claim: str, key: str, reason: str) -> None:
        """Put a row away, under a key of its own."""
        ...


T = TypeVar("T")


class Fold(Generic[T]):
    """Calls that come while one is under way go together in the next: many callers, one transaction. Items of one key never
    share a call, and keep their order."""

    def __init__(
        self, send: Callable[[Sequence[T]], Awaitable[None]], key: Callable[[T], Hashable], most: int = 200
    ) -> None:
        self._send = send
        self._key = key
        self._most = most
        self._waiting: list[tuple[T, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def __call__(self, item: T) -> None:
        """Raises what sending raised. Cancelled before it is sent it is not sent."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._waiting.append((item, done))
        if self._flushing is None:
            self._flushing = loop.create_task(self._flush(), name="durable-db-fold")
        await done

    async def _flush(self) -> None:
        try:
            while self._waiting:
                await self._round(self._take())
        finally:
            self._flushing = None
            for _, done in self._waiting:  # only if the loop is being torn down
                done.cancel()
            self._waiting.clear()

    def _take(self) -> list[tuple[T, asyncio.Future[None]]]:
        batch: dict[Hashable, tuple[T, asyncio.Future[None]]] = {}
        left = []
        for item, done in self._waiting:
            if done.done():
                continue
            if len(batch) < self._most and self._key(item) not in batch:
                batch[self._key(item)] = item, done
            else:
                left.append((item, done))
        self._waiting = left
        return list(batch.values())

    async def _round(self, batch: list[tuple[T, asyncio.Future[None]]]) -> None:
        if not batch:
            return
        try:
            await self._send([item for item, _ in batch])
        except asyncio.CancelledError:
            for _, done in batch:
                done.cancel()
            raise
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, Away):
                for one in batch:  # one of them is to blame; the others shall not suffer
                    await self._round([one])
                return
            for _, done in batch:
                if not done.done():
                    done.set_exception(error)
            return
        for _, done in batch:
            if not done.done():
                done.set_result(None)
