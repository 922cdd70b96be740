"""The two tables on Postgres. Every call is one statement, so a pooler in transaction mode may stand in between.

The clock is the server's. Rows are locked by claims only, with SKIP LOCKED, so nobody waits for anybody's lock for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import psycopg
from psycopg import errors, pq

from durable.core.errors import DefinitionError, DurableError, StoreError, StoreUnavailable, TransportError
from durable.store.postgres.channel import PAYLOAD_MAX, Channel, connector
from durable.store.postgres.connection import cut, translate
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
from durable.transports.db.tables import CANCELS, DOCUMENTED, NEVER, OURS, RESULTS, TASKS, WAITING_INDEX, Away, News

Row: TypeAlias = tuple[Any, ...]
Connection: TypeAlias = "psycopg.AsyncConnection[Any]"

CONNECTIONS = 2
"""Beside the channel's two. One statement is under way on each, and whoever comes third waits."""
CALL_SECONDS = 5.0
"""No answer for so long: the link is cut, whatever the socket says."""
CONNECT_SECONDS = 5.0
SPARE = 48
"""Rows a claim looks at beyond those it wants."""
TRIES = 5
"""Of a statement that lost a deadlock, of which nothing remains."""

_NOW = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
_TYPES = {"seq": "int", "attempt": "int", "priority": "int", "started_at": "bigint"}


class PostgresTables:
    """The tables of one prefix in one schema."""

    def __init__(
        self, url: str, tasks: str, results: str, *, schema: str | None, lease: float, notifications: bool
    ) -> None:
        """`lease`: seconds. Raises DefinitionError."""
        try:
            self._connect = connector(url, application_name="durable transport")
        except StoreError as error:
            raise DefinitionError(f"This transport cannot be: {error}") from None
        for table in (tasks, results):
            if len(table.encode()) > 63:
                raise DefinitionError(f"Postgres cuts names after 63 bytes, {table} is longer: take a shorter prefix.")
        self.name = "postgres"
        self._schema = schema
        self._names = {TASKS: tasks, RESULTS: results}
        self._lease_ms = int(lease * 1000)
        self._sql = _Statements(_qualified(schema, tasks), _qualified(schema, results))
        self._idle: list[Connection] = []
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._open = False
        self._channel: Channel | None = None
        self._notifications = notifications
        word = hashlib.sha256(f"{schema or ''}.{tasks}".encode()).hexdigest()[:16]
        self._channels = {what: f"durable_{what}_{word}" for what in (TASKS, RESULTS, CANCELS)}
        self.statements = 0
        """How many have been sent, the channel's not counted."""

    # -- life

    async def open(self, create: bool, news: News) -> None:
        self._open = True
        try:
            await self._see_to_tables(create)
            if self._notifications:
                await self._listen(news)
        except BaseException:
            await self.close()
            raise

    async def _listen(self, news: News) -> None:
        try:
            self._channel = self._listening(news)
            await self._channel.start()  # until it hears: what is said before is heard by nobody
        except (psycopg.Error, OSError, TimeoutError):
            self._channel = self._listening(news)
            self._channel.begin()  # it tells of its trouble and goes on trying; polling does meanwhile

    def _listening(self, news: News) -> Channel:
        channel = Channel(self._connect, *self._channels.values())
        for what, name in self._channels.items():
            channel.on(name, lambda payload, what=what: news(what, payload or None))  # type: ignore[misc]
        return channel

    async def close(self) -> None:
        self._open = False
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()
        idle, self._idle = self._idle, []
        for cx in idle:
            await cx.close()

    def tell(self, what: str, which: str = "") -> None:
        if self._channel is not None:
            fits = len(which.encode()) <= PAYLOAD_MAX and "\0" not in which
            self._channel.publish(self._channels[what], which if fits else "")

    async def _see_to_tables(self, create: bool) -> None:
        lacking = await self._lacking()
        if lacking and create:
            with contextlib.suppress(_Exists):
                await self._run(self._sql.create(self._schema, self._names), None)
            lacking = await self._lacking()
        if lacking:
            raise TransportError(
                f"The database lacks {', '.join(lacking)}. Give create_tables=True to a user who may create them, or create them "
                "as docs/transports/db.md shows."
            )

    async def _lacking(self) -> list[str]:
        lacking = []
        for which, table in self._names.items():
            rows = await self._run(
                "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
                [_qualified(self._schema, table)],
            )
            there = {name for (name,) in rows}
            wanted = [name for name, _ in DOCUMENTED[which] + OURS[which]]
            if not there:
                lacking.append(f"the table {table}")
            lacking += [f"the column {name} of {table}" for name in wanted if there and name not in there]
        return lacking

    # -- asking

    async def _run(self, query: str, values: Sequence[Any] | None) -> list[Row]:
        """One statement, its own transaction. Raises TransportError."""
        if not self._open:
            raise TransportError("The transport is not open: call start() first, and nothing after close().")
        tries = TRIES
        loop = asyncio.get_running_loop()
        while True:
            async with self._slots:
                began = loop.time()
                used = bool(self._idle)
                cx = self._idle.pop() if used else await self._connected()
                try:
                    return await self._ask(cx, query, values)
                except (errors.DeadlockDetected, errors.SerializationFailure) as error:
                    tries -= 1
                    if not tries:
                        raise Away(str(translate(error))) from error
                except (errors.UniqueViolation, errors.DuplicateTable, errors.DuplicateObject) as error:
                    raise _Exists(str(error)) from error
                except psycopg.Error as error:
                    if used and cx.closed and loop.time() - began < CALL_SECONDS:
                        await self._forget()  # it may have ended long ago, and the others with it
                        continue
                    raise _translated(error) from error

    async def _connected(self) -> Connection:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await self._connect()
        except TimeoutError:
            raise Away(f"The database did not take a connection within {CONNECT_SECONDS:g} s.") from None
        except psycopg.Error as error:
            raise _translated(error) from error

    async def _ask(self, cx: Connection, query: str, values: Sequence[Any] | None) -> list[Row]:
        # Cut, not cancelled: the driver would ask the server to stop, over a link that may be dead.
        watchdog = asyncio.get_running_loop().call_later(CALL_SECONDS, cut, cx)
        self.statements += 1
        try:
            cursor = await cx.execute(query, values, prepare=False)
            return await cursor.fetchall() if cursor.description else []
        except asyncio.CancelledError:
            cut(cx)
            raise
        finally:
            watchdog.cancel()
            if not self._open or cx.closed or cx.info.transaction_status != pq.TransactionStatus.IDLE:
                await cx.close()
            else:
                self._idle.append(cx)

    async def _forget(self) -> None:
        idle, self._idle = self._idle, []
        for cx in idle:
            await cx.close()

    # -- tasks

    async def put(self, rows: Sequence[TaskRow]) -> None:
        await self._run(self._sql.put, _columns(rows))

    async def claim_tasks(self, groups: Sequence[str], most: int, claim: str) -> list[ClaimedTask]:
        rows = await self._run(self._sql.claim_tasks, [list(groups), self._lease_ms, most, self._lease_ms, most, claim])
        return [ClaimedTask(TaskRow(*row[:-3]), claim, row[-3] or 0, row[-2] is not None) for row in rows]

    async def renew(self, claims: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bool]:
        rows = await self._run(self._sql.renew, _pairs(claims))
        return {(step, claim): cancelled for step, claim, cancelled in rows}

    async def touch(self, step_id: str) -> None:
        await self._run(self._sql.touch, [step_id])

    async def finish(self, rows: Sequence[ResultRow]) -> None:
        await self._run(self._sql.finish, _columns(rows))

    async def drop(self, claims: Sequence[tuple[str, str]]) -> None:
        await self._run(self._sql.drop, _pairs(claims))

    async def give_back(self, claims: Sequence[tuple[str, str]]) -> None:
        await self._run(self._sql.give_back, _pairs(claims))

    async def refuse_task(self, step_id: str, claim: str, key: str, reason: str) -> None:
        await self._run(self._sql.refuse_task, [key, reason, step_id, claim])

    async def cancel(self, step_id: str) -> bool:
        return bool(await self._run(self._sql.cancel, [step_id, self._lease_ms, step_id, self._lease_ms]))

    async def look(self, step_ids: Sequence[str]) -> list[Seen]:
        rows = await self._run(self._sql.look, [list(step_ids)])
        return [Seen(TaskRow(*row[:-4]), row[-4], row[-3], row[-2] or 0, bool(row[-1])) for row in rows]

    # -- results

    async def answered(self, step_ids: Sequence[str]) -> Collection[str]:
        return {step for (step,) in await self._run(self._sql.answered, [list(step_ids)])}

    async def claim_results(self, most: int, claim: str) -> list[ClaimedResult]:
        rows = await self._run(self._sql.claim_results, [self._lease_ms, most, claim])
        return [ClaimedResult(ResultRow(*row[:-1]), claim) for row in rows]

    async def settle(self, claims: Sequence[tuple[str, str]]) -> None:
        await self._run(self._sql.settle, _pairs(claims))

    async def release(self, claims: Sequence[tuple[str, str]], seconds: float) -> None:
        await self._run(self._sql.release, [int(seconds * 1000) - self._lease_ms, *_pairs(claims)])

    async def refuse_result(self, step_id: str, claim: str, key: str, reason: str) -> None:
        await self._run(self._sql.refuse_result, [key, reason, step_id, claim])


class _Exists(TransportError):
    """Somebody else has just made it."""


class _Statements:
    """The texts, for two tables by their quoted names."""

    def __init__(self, tasks: str, results: str) -> None:
        t, r = tasks.replace("%", "%%"), results.replace("%", "%%")  # the driver's own sign
        task_names, result_names = TASK_COLUMNS + TASK_EXTRAS, RESULT_COLUMNS + RESULT_EXTRAS
        pairs = "unnest(%s::text[], %s::text[]) AS given (id, claim)"
        free = f"refused IS NULL AND (claimed_at IS NULL OR claimed_at < {_NOW} - %s)"
        self.put = f"""
WITH given AS (SELECT * FROM unnest({_arrays(task_names)}) AS rows ({", ".join(task_names)})),
stale AS (
  DELETE FROM {r} AS old USING given WHERE old.step_id = given.step_id
  AND (old.attempt < given.attempt OR (old.attempt IS NULL AND old.claimed_at IS NOT NULL))
)
INSERT INTO {t} AS there ({", ".join(task_names)}, created_at) SELECT *, {_NOW} FROM given
ON CONFLICT (step_id) DO UPDATE SET {_overwriting(task_names)}, created_at = excluded.created_at,
  claimed_by = NULL, claimed_at = NULL, deliveries = NULL, cancelled_at = NULL, refused = NULL
WHERE there.attempt < excluded.attempt OR there.cancelled_at IS NOT NULL"""
        # The first of each group by the index, and only then sorted and locked: a long queue costs no more than a short one.
        # More than are wanted, since what others are just claiming is skipped. By place, which needs no statistics to be fast.
        self.claim_tasks = f"""
WITH mine AS (
  SELECT task.step_id FROM unnest(%s::text[]) AS served (grp) CROSS JOIN LATERAL (
    SELECT ctid AS place FROM {t} WHERE grp = served.grp AND {free}
    ORDER BY coalesce(priority, 0) DESC, created_at, step_id LIMIT %s + {SPARE}
  ) AS first JOIN {t} AS task ON task.ctid = first.place AND {free}
  ORDER BY coalesce(task.priority, 0) DESC, task.created_at, task.step_id LIMIT %s FOR UPDATE OF task SKIP LOCKED
), stamped AS (
  UPDATE {t} AS task SET claimed_by = %s, claimed_at = {_NOW}, deliveries = coalesce(deliveries, 0) + 1
  FROM mine WHERE task.step_id = mine.step_id
  RETURNING {", ".join(f"task.{name}" for name in task_names)}, deliveries, cancelled_at, created_at
)
SELECT * FROM stamped ORDER BY coalesce(priority, 0) DESC, created_at, step_id"""
        self.renew = f"""
UPDATE {t} AS task SET claimed_at = {_NOW} FROM {pairs}
WHERE step_id = given.id AND claimed_by = given.claim
RETURNING given.id, given.claim, cancelled_at IS NOT NULL"""
        self.touch = f"UPDATE {t} SET claimed_at = {_NOW} WHERE step_id = %s AND claimed_at IS NOT NULL"
        self.finish = f"""
WITH given AS (SELECT * FROM unnest({_arrays(result_names)}) AS rows ({", ".join(result_names)})),
done AS (DELETE FROM {t} AS task USING given WHERE task.step_id = given.step_id AND coalesce(task.attempt, 1) = given.attempt)
INSERT INTO {r} AS there ({", ".join(result_names)}, created_at) SELECT *, {_NOW} FROM given
ON CONFLICT (step_id) DO UPDATE SET {_overwriting(result_names)}, created_at = excluded.created_at,
  claimed_by = NULL, claimed_at = NULL, refused = NULL
WHERE there.attempt < excluded.attempt OR (there.attempt IS NULL AND there.claimed_at IS NOT NULL)"""
        self.drop = f"DELETE FROM {t} USING {pairs} WHERE step_id = given.id AND claimed_by = given.claim"
        self.give_back = f"""
UPDATE {t} SET claimed_by = NULL, claimed_at = NULL, deliveries = deliveries - 1 FROM {pairs}
WHERE step_id = given.id AND claimed_by = given.claim"""
        refuse = f"SET step_id = %s, refused = %s, claimed_by = NULL, claimed_at = {NEVER} WHERE step_id = %s AND claimed_by = %s"
        self.refuse_task = f"UPDATE {t} {refuse}"
        self.refuse_result = f"UPDATE {r} {refuse}"
        self.cancel = f"""
WITH gone AS (DELETE FROM {t} WHERE step_id = %s AND {free})
UPDATE {t} SET cancelled_at = {_NOW} WHERE step_id = %s AND claimed_at >= {_NOW} - %s RETURNING step_id"""
        seen = ", ".join("NULL" if name in ("input", "extra") else name for name in task_names)
        self.look = f"""
SELECT {seen}, claimed_by, claimed_at, deliveries, cancelled_at IS NOT NULL FROM {t} WHERE step_id = ANY(%s)"""
        self.answered = f"SELECT step_id FROM {r} WHERE step_id = ANY(%s)"
        self.claim_results = f"""
WITH mine AS (
  SELECT step_id FROM {r} WHERE {free} ORDER BY created_at, step_id LIMIT %s FOR UPDATE SKIP LOCKED
), stamped AS (
  UPDATE {r} AS result SET claimed_by = %s, claimed_at = {_NOW} FROM mine WHERE result.step_id = mine.step_id
  RETURNING {", ".join(f"result.{name}" for name in result_names)}, created_at
)
SELECT * FROM stamped ORDER BY created_at, step_id"""
        self.settle = f"DELETE FROM {r} USING {pairs} WHERE step_id = given.id AND claimed_by = given.claim"
        self.release = f"""
UPDATE {r} SET claimed_by = NULL, claimed_at = {_NOW} + %s FROM {pairs}
WHERE step_id = given.id AND claimed_by = given.claim"""
        self._tasks, self._results = tasks, results

    def create(self, schema: str | None, names: dict[str, str]) -> str:
        """Several statements in one message: one transaction, and one process at a time."""
        parts = ["SELECT pg_advisory_xact_lock(hashtext('durable transport'))"]
        if schema is not None:
            parts.append(f"CREATE SCHEMA IF NOT EXISTS {_quoted(schema)}")
        for which, table in ((TASKS, self._tasks), (RESULTS, self._results)):
            whole = ", ".join(f"{name} {kind}" for name, kind in DOCUMENTED[which] + OURS[which])
            parts.append(f"CREATE TABLE IF NOT EXISTS {table} ({whole})")
            added = ", ".join(f"ADD COLUMN IF NOT EXISTS {name} {kind}" for name, kind in OURS[which])
            parts.append(f"ALTER TABLE {table} {added}")
        index = _quoted(f"{names[TASKS]}_waiting"[:63])
        parts.append(f"CREATE INDEX IF NOT EXISTS {index} ON {self._tasks} {WAITING_INDEX}")
        return "; ".join(parts)


def _translated(error: psycopg.Error) -> TransportError:
    ours: DurableError = translate(error, "The transport's database")
    kind = Away if isinstance(ours, StoreUnavailable) else TransportError
    return kind(str(ours))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _qualified(schema: str | None, table: str) -> str:
    return _quoted(table) if schema is None else f"{_quoted(schema)}.{_quoted(table)}"


def _arrays(names: Sequence[str]) -> str:
    return ", ".join(f"%s::{_TYPES.get(name, 'text')}[]" for name in names)


def _overwriting(names: Sequence[str]) -> str:
    return ", ".join(f"{name} = excluded.{name}" for name in names if name != "step_id")


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """One array for each column. In one order everywhere, so that two batches never wait for each other in a circle."""
    return [list(column) for column in zip(*sorted(rows, key=lambda row: str(row[0])), strict=True)]


def _pairs(claims: Sequence[tuple[str, str]]) -> list[list[str]]:
    return _columns(claims)
