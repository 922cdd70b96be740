"""`commit_with`: the author's SQL and one commit in one transaction.

A connection of its own takes the write lock and tries the fence; then the author's coroutine has it on the event loop,
while the writer thread waits, for a bounded time, holding everybody else's writes back.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from durable.core.clock import Clock
from durable.core.errors import StoreError, StoreUnavailable
from durable.store.records import Commit, CommitOutcome, CommitStatus
from durable.store.sqlite import commits
from durable.store.sqlite.connection import atomic
from durable.store.sqlite.runner import Runner

WORK_MAX_S = 30.0


class _Undo(Exception):
    """The author's work failed: take everything back."""


class _Late(Exception):
    """The author's work took too long."""


class Lender:
    """Lends one connection, to one caller at a time."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._cx: sqlite3.Connection | None = None

    async def commit_with(
        self, writer: Runner, work: Callable[[Any], Awaitable[None]], commit: Commit, clock: Clock
    ) -> CommitOutcome:
        loop = asyncio.get_running_loop()
        lent: asyncio.Future[sqlite3.Connection] = loop.create_future()
        finished = threading.Event()
        succeeded = False

        def operation(_: sqlite3.Connection) -> CommitOutcome:
            cx = self._cx = self._cx or self._connect()
            try:
                with atomic(cx):
                    done_before = _done_before(cx, commit)
                    if done_before is not None:
                        return done_before
                    [outcome] = commits.commit(cx, [commit], clock.now())
                    if outcome.status is CommitStatus.DONE:
                        loop.call_soon_threadsafe(_lend, lent, cx)
                        self._await(finished, cx)
                        if not succeeded:
                            raise _Undo
                    return outcome
            except _Late:
                cx.close()  # or what the work does next would be written outside any transaction
                self._cx = None
                raise StoreUnavailable(
                    f"the work of a transaction took more than {WORK_MAX_S:.0f} s; it was undone"
                ) from None

        answer = asyncio.ensure_future(writer.call(operation, alone=True))
        waiting: set[asyncio.Future[Any]] = {lent, answer}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if lent.done():
                await work(lent.result())
                succeeded = True
        except BaseException:
            finished.set()
            await asyncio.wait({answer})
            answer.exception()  # undone, as it should be; the work's own error is the one to raise
            raise
        finished.set()
        return await answer

    @staticmethod
    def _await(finished: threading.Event, cx: sqlite3.Connection) -> None:
        if not finished.wait(WORK_MAX_S):
            raise _Late
        if not cx.in_transaction:
            raise StoreError("the work ended the transaction it was lent; it must not commit or roll back by itself")

    def close(self) -> None:
        if self._cx is not None:
            self._cx.close()


def _done_before(cx: sqlite3.Connection, commit: Commit) -> CommitOutcome | None:
    """The answer to a commit that had succeeded, its reply lost: its work is in the same transaction, and done too."""
    row = cx.execute("SELECT inbox_last FROM runs WHERE id = ? AND commit_id = ?", (commit.run_id, commit.commit_id))
    found = row.fetchone()
    return None if found is None else CommitOutcome(CommitStatus.DONE, found[0])


def _lend(lent: asyncio.Future[sqlite3.Connection], cx: sqlite3.Connection) -> None:
    if not lent.done():
        lent.set_result(cx)
