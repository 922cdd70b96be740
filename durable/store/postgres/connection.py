"""Connections: how they are made, lent and given back, and what the driver's errors mean.

Every call is one statement in its own transaction. A connection on which anything but a clean answer or a clean error of
the server's has happened (a cancelled task, a timeout, a lost socket) is closed, never pooled (S41).
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from psycopg import errors, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from psycopg_pool.errors import PoolClosed

from durable.core.errors import (
    DurableError,
    PayloadText,
    PayloadTooLarge,
    StoreError,
    StoreFull,
    StoreReadOnly,
    StoreUnavailable,
)
from durable.store.postgres import packing

STATEMENT_TIMEOUT_S = 30
CALL_TIMEOUT_S = 35.0
"""No answer at all for so long, not even the server's own timeout: the link is dead, whatever the socket says."""
LEND_TIMEOUT_S = 5.0
"""How long a call waits for a connection."""
PLANS_S = 10.0
"""How old a plan may be. One that was made while the tables were small reads all of them when they have grown; planned anew
it does not, since the server looks at their size and not at its statistics alone."""
RECONNECT_S = 1.0
"""The pool doubles its pause between attempts up to this; after it, whoever asks for a connection makes it try at once."""
DEADLOCK_TRIES = 5

_SESSION = {
    "statement_timeout": f"{STATEMENT_TIMEOUT_S}s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "60s",
    "default_transaction_isolation": r"read\ committed",
    "client_min_messages": "warning",
    "timezone": "UTC",
}
_KEEPALIVE = {
    "connect_timeout": "5",
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "application_name": "durable",
}

Row = tuple[Any, ...]
Connection = psycopg.AsyncConnection[Row]


def parse(url: str) -> dict[str, str]:
    """The parts of a URL or conninfo string. Raises StoreError, which quotes nothing of it: it may hold a password."""
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        said = str(error).strip()
        # Other words of the driver's may quote the password.
        why = f" ({said})" if said.startswith(("invalid URI query parameter", "invalid connection option")) else ""
        raise StoreError(
            f"this is no PostgreSQL address{why}; write postgresql://user:password@host:5432/database"
        ) from None
    return {key: str(value) for key, value in given.items() if value is not None}


class Address:
    """Where the database is: a URL or conninfo string, with our defaults for whatever it leaves open."""

    def __init__(self, url: str, *, pooler: bool) -> None:
        self._given = parse(url)
        self.pooler = pooler

    @property
    def conninfo(self) -> str:
        parts = {**_KEEPALIVE, **self._given}
        if not self.pooler:  # a transaction-mode pooler would leave settings on somebody else's session
            mine = " ".join(f"-c {name}={value}" for name, value in _SESSION.items())
            parts["options"] = f"{mine} {self._given.get('options', '')}".strip()
        return make_conninfo("", **parts)

    def __str__(self) -> str:
        """For people: no password in it."""
        host = self._given.get("host") or self._given.get("hostaddr") or "the local socket"
        return f"PostgreSQL database {self._given.get('dbname') or self._given.get('user') or 'default'} on {host}"

    async def connect(self) -> Connection:
        """A connection of the caller's own, in autocommit."""
        try:
            connection = await psycopg.AsyncConnection.connect(self.conninfo, autocommit=True)
        except psycopg.Error as error:
            raise translate(error, str(self)) from error
        self.teach(connection)
        return connection

    def connect_now(self) -> psycopg.Connection[Row]:
        """The same for a thread."""
        try:
            connection = psycopg.connect(self.conninfo, autocommit=True)
        except psycopg.Error as error:
            raise translate(error, str(self)) from error
        connection.prepare_threshold = None if self.pooler else 1
        return connection

    def teach(self, connection: Connection) -> None:
        packing.register(connection.adapters)
        connection.prepare_threshold = None if self.pooler else 1


class _Lost(StoreUnavailable):
    """The connection ended."""


class Database:
    """A pool of connections, and the one way to ask."""

    def __init__(self, address: Address, pool_max: int) -> None:
        self.address = address
        self._pool_max = pool_max
        self._pool: AsyncConnectionPool[Connection] | None = None
        self._made: WeakKeyDictionary[Connection, float] = WeakKeyDictionary()
        self._plans_until: WeakKeyDictionary[Connection, float] = WeakKeyDictionary()
        self._lent: dict[Connection, float] = {}
        """Since when."""
        self._trusted_from = 0.0
        """Connections made before are not lent again."""

    async def open(self) -> None:
        pool = AsyncConnectionPool(
            self.address.conninfo,
            min_size=min(2, self._pool_max),
            max_size=self._pool_max,
            open=False,
            configure=self._configure,
            kwargs={"autocommit": True},
            name="durable",
            timeout=LEND_TIMEOUT_S,
            max_lifetime=3600,
            reconnect_timeout=RECONNECT_S,
        )
        await pool.open()
        self._pool = pool

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close(timeout=5)

    async def _configure(self, connection: Connection) -> None:
        self.address.teach(connection)
        self._made[connection] = now = asyncio.get_running_loop().time()
        self._plans_until[connection] = now + PLANS_S

    def distrust(self, patience: float) -> None:
        """The server has been silent for this many seconds on a connection beside these, which may hang as well: nobody is
        told when a link is half-open. Those asked for as long are cut, the idle ones never lent again."""
        now = self._trusted_from = asyncio.get_running_loop().time()
        for connection, since in self._lent.items():
            if now - since >= patience:
                cut(connection)

    async def _borrow(self, pool: AsyncConnectionPool[Connection]) -> Connection:
        while True:
            connection = await pool.getconn()
            if self._made.get(connection, 0.0) >= self._trusted_from:
                return connection
            connection.pgconn.finish()
            await pool.putconn(connection)

    async def one(self, query: str, parameters: Sequence[Any] = ()) -> Row:
        """The only row of an answer that has one."""
        [row] = await self.all(query, parameters)
        return row

    async def all(self, query: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """All rows. Raises StoreError; StoreUnavailable when it is not known whether it was done. A deadlock, of which
        nothing remains, is tried again here."""
        tries = DEADLOCK_TRIES
        while True:
            connection: Connection | None = None
            try:
                async with self.lend() as connection:
                    return await ask(connection, query, parameters)
            except (errors.DeadlockDetected, errors.SerializationFailure) as error:
                tries -= 1
                if not tries:
                    raise translate(error, str(self.address)) from error
            except psycopg.Error as error:
                if is_culprit(error):
                    raise
                translated = translate(error, str(self.address))
                if connection is not None and connection.closed and isinstance(translated, StoreUnavailable):
                    raise _Lost(str(translated)) from error
                raise translated from error

    async def read(self, query: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """The same for what changes nothing: where the connection had ended, perhaps long ago, another is asked at once."""
        asked_at = asyncio.get_running_loop().time()
        try:
            return await self.all(query, parameters)
        except _Lost:
            if asyncio.get_running_loop().time() - asked_at >= CALL_TIMEOUT_S:
                raise  # it was cut for its silence: another would be as silent
            return await self.all(query, parameters)

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[Connection]:
        """A connection. It goes back only if it is idle and whole."""
        pool = self._pool
        if pool is None:
            raise StoreError(f"{self.address} is not open; await store.open() first")
        try:
            connection = await self._borrow(pool)
        except (PoolTimeout, PoolClosed) as error:
            raise StoreUnavailable(f"{self.address} cannot be reached, or all connections are busy ({error})") from None
        loop = asyncio.get_running_loop()
        self._lent[connection] = loop.time()
        watchdog = loop.call_later(CALL_TIMEOUT_S, self.distrust, CALL_TIMEOUT_S)
        try:
            if loop.time() > self._plans_until[connection]:
                self._plans_until[connection] = loop.time() + PLANS_S
                await connection.execute("DISCARD PLANS", prepare=False)
            yield connection
        except psycopg.Error:
            if connection.closed:
                # It may have ended long ago, with all the others: one call hears of it, not one for each of them.
                self._trusted_from = loop.time()
            raise
        except BaseException:
            # Cancelled, or worse: nobody knows what is still under way on this connection.
            connection.pgconn.finish()
            raise
        finally:
            watchdog.cancel()
            del self._lent[connection]
            if not connection.closed and connection.info.transaction_status != pq.TransactionStatus.IDLE:
                connection.pgconn.finish()
            await pool.putconn(connection)


def cut(connection: psycopg.AsyncConnection[Any] | psycopg.Connection[Any]) -> None:
    """End the link for both sides. Whoever waits on it hears of it at once, and closes it itself: closed from here, its
    descriptor could be another connection's by the time the waiter looks."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.pgconn.socket)) as link:
        link.shutdown(socket.SHUT_RDWR)


async def ask(connection: Connection, query: str, parameters: Sequence[Any] = ()) -> list[Row]:
    """One statement on one connection, binary answers."""
    async with connection.cursor(binary=True) as cursor:
        await cursor.execute(query, parameters)
        return await cursor.fetchall()


def is_culprit(error: psycopg.Error) -> bool:
    """Whether one row is to blame rather than the server, the disk or a neighbour."""
    state = error.sqlstate or ""
    return state[:2] in ("22", "23", "54") or isinstance(error, psycopg.DataError)


_LOGIN = re.compile(
    r'FATAL: +(\S+ authentication failed|no pg_hba\.conf entry|role ".*" does not exist)|no password supplied'
)


def _state_of(said: str) -> str:
    """The driver keeps no code of a connection that was refused, only the words."""
    if re.search(r'FATAL: +database ".*" does not exist', said):
        return "3D000"
    return "28000" if _LOGIN.search(said) else ""


def translate(error: BaseException, place: str = "PostgreSQL") -> DurableError:
    """The driver's error as ours."""
    if isinstance(error, UnicodeEncodeError):
        return PayloadText(f"text that PostgreSQL cannot keep ({error.reason}): replace NUL and lone surrogates")
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    state = (error.sqlstate if isinstance(error, psycopg.Error) else None) or _state_of(said)
    match state:
        case "53100":
            return StoreFull(f"{place}: the disk is full; nothing was written. Free some space, then repeat ({said})")
        case "25006":
            return StoreReadOnly(f"{place} takes no writes: it is a standby or in recovery ({said})")
        case "54000" | "22023":
            return PayloadTooLarge(f"a value is above what PostgreSQL takes ({said})")
        case "22021" | "22P05":
            return PayloadText(f"text that PostgreSQL cannot keep: replace NUL and lone surrogates ({said})")
        case "28P01" | "28000":
            return StoreError(f"{place} refuses the login ({said}); check user and password in the URL")
        case "3D000":
            return StoreError(f"{place} does not exist ({said}); create it: createdb NAME")
        case "42501":
            return StoreError(f"{place}: a right is missing ({said}); grant it, or give a user who may")
        case "42P01" | "42703" | "42883" | "3F000":
            return StoreError(f"{place}: the tables have been changed or removed by others ({said})")
    if isinstance(error, psycopg.DataError) and not state and "NUL" in said:  # the driver's own, before it asked
        return PayloadText("text that PostgreSQL cannot keep: replace NUL")
    # Without a state it is the driver that speaks: InternalError is its word for a connection that ended under a query.
    lost = isinstance(error, psycopg.InternalError) and not state
    if lost or isinstance(error, psycopg.errors.OperationalError) or state[:2] in ("08", "40", "53", "55", "57", "58"):
        return StoreUnavailable(f"{place} cannot be reached or did not finish ({said}); the call may be repeated")
    return StoreError(f"{place}: {said}")


def close_quietly(connection: psycopg.Connection[Row] | None) -> None:
    if connection is not None:
        with suppress(psycopg.Error):
            connection.close()
