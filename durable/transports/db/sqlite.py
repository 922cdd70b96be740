"""The two tables in an SQLite file. One thread and one connection; calls that wait for it share a transaction.

The clock is the machine's, the same for all who can share the file. Other processes' writes are seen by `data_version`.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

from durable.core.errors import DefinitionError, StoreError, StoreUnavailable, TransportError
from durable.store.sqlite.connection import Location, atomic, connect
from durable.store.sqlite.runner import Pace, Threaded
from durable.store.sqlite.turn import Turn
from durable.transports.db.rows import (
    RESULT_COLUMNS,
    RESULT_EXTRAS,
    TASK_COLUMNS,
    TASK_EXTRAS,
    ClaimedResult,
    ClaimedTask,
    ResultRow,
    Seen,
    TaskRow,
)
from durable.transports.db.tables import DOCUMENTED, NEVER, OURS, RESULTS, TASKS, WAITING_INDEX, Away, News

T = TypeVar("T")

BUSY_SECONDS = 5.0
"""How long a call waits for other processes' transactions."""
LOOK_EVERY_SECONDS = 0.02
"""How often it is seen whether another process has written."""

_TASK_NAMES = TASK_COLUMNS + TASK_EXTRAS
_RESULT_NAMES = RESULT_COLUMNS + RESULT_EXTRAS
_PRIORITY = _TASK_NAMES.index("priority")
_FREE = "refused IS NULL AND (claimed_at IS NULL OR claimed_at < ?)"


class SqliteTables:
    """The tables of one prefix in one file."""

    def __init__(self, url: str, tasks: str, results: str, *, lease: float) -> None:
        """`lease`: seconds. Raises DefinitionError."""
        try:
            self._location = Location(url)
        except StoreError as error:
            raise DefinitionError(f"This transport cannot be: {error}") from error
        if self._location.path is None:
            raise DefinitionError(":memory: lives in one connection, and nobody else could see its tasks; give a file.")
        self.name = "sqlite"
        self._names = {TASKS: tasks, RESULTS: results}
        self._lease_ms = int(lease * 1000)
        self._tasks, self._results = _quoted(tasks), _quoted(results)
        self._runner: Threaded | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: News = lambda what, which: None
        self._pace = Pace(LOOK_EVERY_SECONDS)
        self._version: int | None = None

    # -- life

    async def open(self, create: bool, news: News) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = news
        self._version = None
        cx = await self._opened()
        turn = Turn(self._location.beside, BUSY_SECONDS)
        self._runner = Threaded(
            cx, self._location, "durable-db-transport", folds=True, turn=turn, busy_timeout_s=BUSY_SECONDS, idle=self._look_abroad
        )  # fmt: skip
        try:
            await self._see_to_tables(create)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.close()

    def tell(self, what: str, which: str = "") -> None:
        """They see it by themselves."""

    async def _opened(self) -> sqlite3.Connection:
        try:
            # What is lost with the machine here is in the engine's store: weak durability is no reason to refuse.
            return await asyncio.to_thread(connect, self._location, BUSY_SECONDS, True)
        except StoreError as error:
            raise _translated(error) from error

    async def _see_to_tables(self, create: bool) -> None:
        lacking = await self._run(self._lacking)
        if lacking and create:
            await self._run(self._create)
            lacking = await self._run(self._lacking)
        if lacking:
            raise TransportError(
                f"{self._location} lacks {', '.join(lacking)}. Give create_tables=True, or create them as "
                "docs/transports/db.md shows."
            )

    def _lacking(self, cx: sqlite3.Connection) -> list[str]:
        lacking = []
        for which, table in self._names.items():
            there = {name for (name,) in cx.execute("SELECT name FROM pragma_table_info(?)", [table])}
            if not there:
                lacking.append(f"the table {table}")
            wanted = [name for name, _ in DOCUMENTED[which] + OURS[which]]
            lacking += [f"the column {name} of {table}" for name in wanted if there and name not in there]
        return lacking

    def _create(self, cx: sqlite3.Connection) -> None:
        with atomic(cx):
            for which, table in self._names.items():
                whole = ", ".join(f"{name} {kind}" for name, kind in DOCUMENTED[which] + OURS[which])
                cx.execute(f"CREATE TABLE IF NOT EXISTS {_quoted(table)} ({whole})")
                there = {name for (name,) in cx.execute("SELECT name FROM pragma_table_info(?)", [table])}
                for name, kind in OURS[which]:
                    if name not in there:
                        cx.execute(f"ALTER TABLE {_quoted(table)} ADD COLUMN {name} {kind}")
            index = _quoted(f"{self._names[TASKS]}_waiting")
            cx.execute(f"CREATE INDEX IF NOT EXISTS {index} ON {self._tasks} {WAITING_INDEX}")

    def _look_abroad(self, cx: sqlite3.Connection) -> float | None:
        """In the thread. The connection's own commits do not move the number; whoever made them knows of them."""
        left = self._pace.left()
        if left:
            return left
        version = int(cx.execute("PRAGMA data_version").fetchone()[0])
        if self._version is not None and version != self._version and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._news, "", None)
            except RuntimeError:
                return None  # that loop is closed: nobody waits any more
        self._version = version
        return LOOK_EVERY_SECONDS

    async def _run(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        if self._runner is None:
            raise TransportError("The transport is not open: call start() first, and nothing after close().")
        try:
            return await self._runner.call(operation)
        except StoreError as error:
            raise _translated(error) from error

    async def _write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        def whole(cx: sqlite3.Connection) -> T:
            with atomic(cx):
                return operation(cx)

        return await self._run(whole)

    # -- tasks

    async def put(self, rows: Sequence[TaskRow]) -> None:
        stale = f"""DELETE FROM {self._results} WHERE step_id = ? AND
(attempt < ? OR (attempt IS NULL AND claimed_at IS NOT NULL))"""
        insert = f"""{_insert(self._tasks, _TASK_NAMES)}
ON CONFLICT (step_id) DO UPDATE SET {_overwriting(_TASK_NAMES)}, created_at = excluded.created_at,
claimed_by = NULL, claimed_at = NULL, deliveries = NULL, cancelled_at = NULL, refused = NULL
WHERE attempt < excluded.attempt OR cancelled_at IS NOT NULL"""

        def write(cx: sqlite3.Connection) -> None:
            now = _now()
            cx.executemany(stale, [(row.step_id, row.attempt) for row in rows])
            cx.executemany(insert, [(*row, now) for row in rows])

        await self._write(write)

    async def claim_tasks(self, groups: Sequence[str], most: int, claim: str) -> list[ClaimedTask]:
        where = f"grp = ? AND {_FREE} ORDER BY coalesce(priority, 0) DESC, created_at, step_id LIMIT ?"
        names = ", ".join(_TASK_NAMES)

        def waiting(cx: sqlite3.Connection, what: str, limit: int) -> list[tuple[Any, ...]]:
            """Of each group the first, as the index has them."""
            expired = self._expired()
            query = f"SELECT {what} FROM {self._tasks} WHERE {where}"
            return [row for group in groups for row in cx.execute(query, [group, expired, limit])]

        def look_and_claim(cx: sqlite3.Connection) -> list[ClaimedTask]:
            if not waiting(cx, "1", 1):  # looked at without the write lock: most of the time there is nothing
                return []
            with atomic(cx):
                rows = waiting(cx, f"{names}, deliveries, cancelled_at, created_at", most)
                rows.sort(key=lambda row: (-_number(row[_PRIORITY]), _number(row[-1]), str(row[0])))
                del rows[most:]
                cx.executemany(
                    f"UPDATE {self._tasks} SET claimed_by = ?, claimed_at = ?, deliveries = coalesce(deliveries, 0) + 1"
                    " WHERE step_id = ?",
                    [(claim, _now(), row[0]) for row in rows],
                )
            return [ClaimedTask(TaskRow(*row[:-3]), claim, _number(row[-3]) + 1, row[-2] is not None) for row in rows]

        return await self._run(look_and_claim)

    async def renew(self, claims: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bool]:
        def write(cx: sqlite3.Connection) -> dict[tuple[str, str], bool]:
            now, held = _now(), {}
            for claim in claims:
                row = cx.execute(
                    f"SELECT cancelled_at IS NOT NULL FROM {self._tasks} WHERE step_id = ? AND claimed_by = ?", claim
                ).fetchone()
                if row is not None:
                    cx.execute(f"UPDATE {self._tasks} SET claimed_at = ? WHERE step_id = ?", [now, claim[0]])
                    held[claim] = bool(row[0])
            return held

        return await self._write(write)

    async def touch(self, step_id: str) -> None:
        query = f"UPDATE {self._tasks} SET claimed_at = ? WHERE step_id = ? AND claimed_at IS NOT NULL"
        await self._write(lambda cx: cx.execute(query, [_now(), step_id]))

    async def finish(self, rows: Sequence[ResultRow]) -> None:
        insert = f"""{_insert(self._results, _RESULT_NAMES)}
ON CONFLICT (step_id) DO UPDATE SET {_overwriting(_RESULT_NAMES)}, created_at = excluded.created_at,
claimed_by = NULL, claimed_at = NULL, refused = NULL
WHERE attempt < excluded.attempt OR (attempt IS NULL AND claimed_at IS NOT NULL)"""

        def write(cx: sqlite3.Connection) -> None:
            now = _now()
            cx.executemany(insert, [(*row, now) for row in rows])
            cx.executemany(
                f"DELETE FROM {self._tasks} WHERE step_id = ? AND coalesce(attempt, 1) = ?",
                [(row.step_id, row.attempt) for row in rows],
            )

        await self._write(write)

    async def drop(self, claims: Sequence[tuple[str, str]]) -> None:
        await self._many(f"DELETE FROM {self._tasks} WHERE step_id = ? AND claimed_by = ?", claims)

    async def give_back(self, claims: Sequence[tuple[str, str]]) -> None:
        changes = "claimed_by = NULL, claimed_at = NULL, deliveries = deliveries - 1"
        await self._many(f"UPDATE {self._tasks} SET {changes} WHERE step_id = ? AND claimed_by = ?", claims)

    async def refuse_task(self, step_id: str, claim: str, key: str, reason: str) -> None:
        await self._many(_refuse(self._tasks), [(key, reason, step_id, claim)])

    async def cancel(self, step_id: str) -> bool:
        def write(cx: sqlite3.Connection) -> bool:
            expired = self._expired()
            cx.execute(f"DELETE FROM {self._tasks} WHERE step_id = ? AND {_FREE}", [step_id, expired])
            marked = cx.execute(
                f"UPDATE {self._tasks} SET cancelled_at = ? WHERE step_id = ? AND claimed_at >= ?",
                [_now(), step_id, expired],
            )
            return marked.rowcount > 0

        return await self._write(write)

    async def look(self, step_ids: Sequence[str]) -> list[Seen]:
        names = ", ".join("NULL" if name in ("input", "extra") else name for name in _TASK_NAMES)
        query = f"""SELECT {names}, claimed_by, claimed_at, deliveries, cancelled_at IS NOT NULL FROM {self._tasks}
WHERE step_id IN (SELECT value FROM json_each(?))"""
        rows = await self._run(lambda cx: cx.execute(query, [json.dumps(list(step_ids))]).fetchall())
        return [Seen(TaskRow(*row[:-4]), row[-4], row[-3], _number(row[-2]), bool(row[-1])) for row in rows]

    # -- results

    async def answered(self, step_ids: Sequence[str]) -> Collection[str]:
        query = f"SELECT step_id FROM {self._results} WHERE step_id IN (SELECT value FROM json_each(?))"
        return {
            step for (step,) in await self._run(lambda cx: cx.execute(query, [json.dumps(list(step_ids))]).fetchall())
        }

    async def claim_results(self, most: int, claim: str) -> list[ClaimedResult]:
        names = ", ".join(_RESULT_NAMES)

        def look_and_claim(cx: sqlite3.Connection) -> list[ClaimedResult]:
            looking = f"SELECT 1 FROM {self._results} WHERE {_FREE} LIMIT 1"
            if cx.execute(looking, [self._expired()]).fetchone() is None:
                return []
            with atomic(cx):
                rows = cx.execute(
                    f"SELECT {names} FROM {self._results} WHERE {_FREE} ORDER BY created_at, rowid LIMIT ?",
                    [self._expired(), most],
                ).fetchall()
                cx.executemany(
                    f"UPDATE {self._results} SET claimed_by = ?, claimed_at = ? WHERE step_id = ?",
                    [(claim, _now(), row[0]) for row in rows],
                )
            return [ClaimedResult(ResultRow(*row), claim) for row in rows]

        return await self._run(look_and_claim)

    async def settle(self, claims: Sequence[tuple[str, str]]) -> None:
        await self._many(f"DELETE FROM {self._results} WHERE step_id = ? AND claimed_by = ?", claims)

    async def release(self, claims: Sequence[tuple[str, str]], seconds: float) -> None:
        free_at = _now() - self._lease_ms + int(seconds * 1000)
        query = f"UPDATE {self._results} SET claimed_by = NULL, claimed_at = ? WHERE step_id = ? AND claimed_by = ?"
        await self._many(query, [(free_at, *claim) for claim in claims])

    async def refuse_result(self, step_id: str, claim: str, key: str, reason: str) -> None:
        await self._many(_refuse(self._results), [(key, reason, step_id, claim)])

    async def _many(self, query: str, values: Iterable[tuple[Any, ...]]) -> None:
        given = list(values)
        await self._write(lambda cx: cx.executemany(query, given))

    def _expired(self) -> int:
        """A claim made before this is nobody's."""
        return _now() - self._lease_ms


def _translated(error: StoreError) -> TransportError:
    return Away(str(error)) if isinstance(error, StoreUnavailable) else TransportError(str(error))


def _number(value: object) -> int:
    """Strangers may write anything into any column here."""
    return value if isinstance(value, int) else 0


def _now() -> int:
    return int(time.time() * 1000)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _insert(table: str, names: Sequence[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(names)}, created_at) VALUES ({', '.join('?' * (len(names) + 1))})"


def _overwriting(names: Sequence[str]) -> str:
    return ", ".join(f"{name} = excluded.{name}" for name in names if name != "step_id")


def _refuse(table: str) -> str:
    return f"""UPDATE {table} SET step_id = ?, refused = ?, claimed_by = NULL, claimed_at = {NEVER}
WHERE step_id = ? AND claimed_by = ?"""
