"""LISTEN and NOTIFY: hints between processes on one database. Losing every one of them costs latency and nothing else.

Two connections. The first only listens; its socket is watched by the loop, so that it costs nothing while nothing comes.
The second only speaks, opened when there is something to say. Whether the first hears the second is tried at once and every
`probe_every`: behind a pooler that gives each transaction another session LISTEN succeeds and nothing ever comes, and a
link may die without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import psycopg
from psycopg import Notify, sql
from psycopg.conninfo import make_conninfo

from durable.store.postgres.connection import cut, parse

log = logging.getLogger("durable.channel")

Connection: TypeAlias = "psycopg.AsyncConnection[Any]"
Connect: TypeAlias = Callable[[], Awaitable[Connection]]
"""Opens a connection of its own, each time."""
Handler: TypeAlias = Callable[[str | None], None]
"""Gets the payload; None: something may have been missed."""

PAYLOAD_MAX = 7_999
"""Bytes of one payload: the server refuses 8,000."""
FLUSH_BYTES = 1 << 20
"""What one statement carries, about."""
OUTBOX_BYTES = 16 << 20
"""What may wait to be said; the rest is dropped."""
PAUSE_MIN, PAUSE_MAX = 0.1, 5.0
"""Seconds between two attempts to reach the database."""
CONNECT_SECONDS = 10.0
ROLL_SECONDS = 1.0
"""What those who are there get to say so: until then somebody is supposed to listen; and `start` waits no longer for it."""
LAST_WORDS_SECONDS = 1.0
"""What `close` gives to what has been published before it."""

# A hint that is lost with the server is no loss: its commit need not wait for the disk, and holds the lock that all who
# notify queue for. Local to the transaction, so that a pooled session keeps nothing of it.
_NOTIFY = """SELECT set_config('synchronous_commit', 'off', true), count(pg_notify(name, payload))
FROM unnest(%b::text[], %b::text[]) AS said (name, payload)"""
_NAME = re.compile(r"durable_[a-z0-9_]{1,55}")  # 63 bytes at most, and the same quoted or not
_SETTINGS = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}


def connector(url: str, *, application_name: str = "durable channel") -> Connect:
    """What opens connections for a `Channel`: autocommit, nothing prepared, a dead link noticed within half a minute.
    What the URL says goes first. Raises StoreError for one that is none."""
    settings: dict[str, str | int | None] = {"application_name": application_name, **_SETTINGS, **parse(url)}
    conninfo = make_conninfo("", **settings)

    async def connect() -> Connection:
        return await psycopg.AsyncConnection.connect(conninfo, autocommit=True, prepare_threshold=None)

    return connect


def channel_name(word: str, schema: str = "durable") -> str:
    """The name of a channel for what lives in one schema: channels belong to the whole database. Raises ValueError."""
    if schema == "durable":
        return _checked(f"durable_{word}")
    if re.fullmatch(r"[a-z0-9_]{1,30}", schema):
        return _checked(f"durable_{word}_in_{schema}")
    return _checked(f"durable_{word}_at_{schema.encode().hex()[:40]}")


class Channel:
    """Says and hears hints on named channels of one database. Belongs to one event loop, and lives once."""

    def __init__(self, connect: Connect, *names: str, probe_every: float = 15.0, probe_patience: float = 5.0) -> None:
        """Durations are seconds. Names are `durable_…` in lower case, at most 63 characters. Raises ValueError."""
        self._names = [_checked(name) for name in names]
        self._probe_name = f"durable_probe_{secrets.token_hex(8)}"
        """Its own, so that probes wake nobody else."""
        self._roll_name = f"{self._names[0][:50]}_roll"
        """Where those who listen say that they are there: with each probe, and when somebody new says hello."""
        self._token = secrets.token_hex(6)
        self._others_until = 0.0
        self._greeted = False
        self._tried = asyncio.Event()
        """Whether it has been seen once if it hears itself."""
        self._connect = connect
        self._every = probe_every
        self._patience = probe_patience
        self._handlers: dict[str, list[Handler]] = {name: [] for name in self._names}
        self._outbox = _Outbox(connect, probe_patience)
        self._ear: Connection | None = None
        self._echo: tuple[str, asyncio.Future[None]] | None = None
        self._life: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[Exception | None] | None = None
        """How the first attempt went."""
        self._complained = False
        self._missed = False
        self.deaf: str | None = "It has not been started."
        """Why nothing can be relied on to be heard, as a sentence; None: it has just heard itself."""

    # -- hearing

    def on(self, name: str, handler: Handler) -> Callable[[], None]:
        """Have `handler` called on the loop with each payload, and with None when some may have been missed. Returns the way
        to stop. Raises KeyError for a name that is not listened to."""
        handlers = self._handlers[name]
        heard: Handler = lambda payload: handler(payload)  # noqa: E731 - one of its own, even if registered twice
        handlers.append(heard)

        def stop() -> None:
            if heard in handlers:
                handlers.remove(heard)

        return stop

    # -- saying

    @property
    def others(self) -> bool:
        """Whether anybody else has listened lately: without them there is nothing to say."""
        return asyncio.get_running_loop().time() < self._others_until

    def publish(self, name: str, payload: str = "") -> None:
        """Say it soon, to all who listen, this process included; never waits. The same twice before it was sent is said once.
        Dropped when the database is away, before the start and after `close`. Raises ValueError for what no
        server takes: over `PAYLOAD_MAX` bytes, a NUL, half a surrogate pair, a bad name."""
        size = len(payload.encode())
        if size > PAYLOAD_MAX:
            raise ValueError(f"A notification carries at most {PAYLOAD_MAX} bytes, not {size}.")
        if "\0" in payload:
            raise ValueError("A notification carries no NUL character.")
        if self._life is not None and self._closing is None:
            self._outbox.put(_checked(name), payload, size)

    @property
    def statements(self) -> int:
        """How many statements have been sent to say things, probes included."""
        return self._outbox.statements

    # -- life

    def begin(self) -> None:
        """Connect in the background, for as long as it takes."""
        if self._closing is not None:
            raise RuntimeError("This channel has been closed; make another.")
        if self._life is None:
            loop = asyncio.get_running_loop()
            self._opened = loop.create_future()
            self._life = loop.create_task(self._live(), name="durable-channel")

    async def start(self) -> None:
        """Connect, and return when it hears, or soon after it listens. Raises what connecting raised; it is closed then."""
        self.begin()
        assert self._opened is not None
        try:
            error = await asyncio.shield(self._opened)
            if error is not None:
                raise error
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROLL_SECONDS):
                    await self._tried.wait()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Say what was published before, if that does not take long, and let go of both connections. Idempotent."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close(), name="durable-channel-close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self.deaf = "It has been closed."
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait({self._life})
        await self._outbox.close()
        if self._opened is not None and not self._opened.done():
            self._opened.set_result(RuntimeError("The channel was closed before it was open."))

    async def _live(self) -> None:
        assert self._opened is not None
        pause = PAUSE_MIN
        while True:
            error: Exception
            proved = False
            wait = pause
            try:
                async with self._listening() as lost:
                    if not self._opened.done():
                        self._opened.set_result(None)
                    while True:
                        if await self._probe(lost):
                            proved, pause = True, PAUSE_MIN
                            await _first(lost, self._every)
                        else:
                            await _first(lost, pause)
                            pause = min(pause * 2, PAUSE_MAX)
            except _Unheard as unheard:
                # Never heard itself since it listens: no dead link but a pooler, and haste does not mend that.
                error, wait = unheard, PAUSE_MIN if proved else self._every
            except Exception as failed:
                error, wait = failed, pause
                pause = min(pause * 2, PAUSE_MAX)
            self._missed = True
            self._greeted = False
            self._deafened(error)
            if not self._opened.done():
                self._opened.set_result(error)
            await asyncio.sleep(wait)

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[asyncio.Future[None]]:
        """A connection that listens. Yields what fails when it is lost."""
        conn = await _connected(self._connect)
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[None] = loop.create_future()
        lost.add_done_callback(_retrieve)
        try:
            conn.add_notify_handler(self._heard)  # what comes while a statement runs
            if not conn.autocommit:
                await conn.set_autocommit(True)
            mine = [*self._names, self._roll_name, self._probe_name]
            names = [sql.SQL("LISTEN {}").format(sql.Identifier(name)) for name in mine]
            for listen in names:
                await _execute(conn, listen, (), self._patience)
            self._ear = conn
            socket_number = conn.pgconn.socket
            loop.add_reader(socket_number, self._readable, conn, socket_number, lost)
            try:
                self._readable(conn, socket_number, lost)
                yield lost
            finally:
                if not lost.done():
                    loop.remove_reader(socket_number)
                self._ear = None
        finally:
            await conn.close()

    def _readable(self, conn: Connection, socket_number: int, lost: asyncio.Future[None]) -> None:
        """Something came, or the link is gone."""
        if lost.done():
            return
        try:
            conn.pgconn.consume_input()
            while (said := conn.pgconn.notifies()) is not None:
                self._heard(Notify(said.relname.decode(), said.extra.decode(errors="replace"), said.be_pid))
        except Exception as error:
            # At once: the driver has closed the socket, and the next connection may get its number.
            asyncio.get_running_loop().remove_reader(socket_number)
            lost.set_exception(error)

    def _heard(self, said: Notify) -> None:
        if said.channel == self._probe_name:
            if self._echo is not None and self._echo[0] == said.payload and not self._echo[1].done():
                self._echo[1].set_result(None)
            return
        if said.channel == self._roll_name:
            self._answer_roll(said.payload)
            return
        self._tell(said.channel, said.payload)

    def _answer_roll(self, payload: str) -> None:
        word, _, token = payload.partition(" ")
        if token == self._token:
            return
        self._others_until = asyncio.get_running_loop().time() + 3 * self._every
        if word == "hello":
            self.publish(self._roll_name, f"here {self._token}")

    def _tell(self, name: str, payload: str | None) -> None:
        for handler in list(self._handlers.get(name, ())):
            try:
                handler(payload)
            except Exception:
                log.exception("A handler of %s raised; the hint is dropped", name)

    # -- watching itself

    async def _probe(self, lost: asyncio.Future[None]) -> bool:
        """Whether what the other connection says is heard on this one; False: it could not be said. Raises _Unheard, and what
        `lost` failed with."""
        nonce = secrets.token_hex(8)
        echo: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._echo = nonce, echo
        try:
            word = "here" if self._greeted else "hello"
            error = await self._outbox.send([(self._probe_name, nonce), (self._roll_name, f"{word} {self._token}")])
            if error is not None:
                self._deafened(error)
                return False
            await asyncio.wait({echo, lost}, timeout=self._patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._echo = None
        if lost.done():
            lost.result()
        if not echo.done():
            raise _Unheard(
                f"It does not hear what it says itself within {self._patience:g} s. Does the URL lead to a pooler in "
                "transaction mode? LISTEN needs a session of its own: give the database's own address."
            )
        if not self._greeted:
            self._greeted = True
            self._others_until = max(self._others_until, asyncio.get_running_loop().time() + ROLL_SECONDS)
        self._tried.set()
        self._hears()
        return True

    def _deafened(self, error: Exception) -> None:
        why = f"The connection to the database is lost: {_sentence(error)}"
        self.deaf = str(error) if isinstance(error, _Unheard) else why
        if not self._complained:
            self._complained = True
            log.warning("notifications may be missed, work is found by polling: %s", self.deaf)

    def _hears(self) -> None:
        self.deaf = None
        if self._complained:
            self._complained = False
            log.warning("notifications are heard again")
        if self._missed:
            self._missed = False
            for name in self._names:
                self._tell(name, None)


class _Unheard(Exception):
    """The echo did not come."""


class _Outbox:
    """What is to be said, and the connection it is said through."""

    def __init__(self, connect: Connect, patience: float) -> None:
        self._connect = connect
        self._patience = patience
        self._waiting: dict[tuple[str, str], int] = {}
        """What, and how many bytes; in the order it was first said."""
        self._bytes = 0
        self._conn: Connection | None = None
        self._one = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._quiet_until = 0.0
        """By the loop's clock: until then the database is away, and nothing is kept for it."""
        self._pause = PAUSE_MIN
        self._complained = False
        self.statements = 0

    def put(self, name: str, payload: str, size: int) -> None:
        loop = asyncio.get_running_loop()
        if (name, payload) in self._waiting or loop.time() < self._quiet_until:
            return
        if self._bytes + size > OUTBOX_BYTES:
            self._complain("the database does not take them as fast as they come")
            return
        self._waiting[name, payload] = size
        self._bytes += size
        if self._task is None:
            self._task = loop.create_task(self._flush(), name="durable-channel-flush")

    async def _flush(self) -> None:
        try:
            while self._waiting:
                if await self.send(self._take()) is not None:
                    self._waiting.clear()
                    self._bytes = 0
        finally:
            self._task = None

    def _take(self) -> list[tuple[str, str]]:
        batch: list[tuple[str, str]] = []
        size = 0
        for what, bytes_ in self._waiting.items():
            if batch and size + bytes_ > FLUSH_BYTES:
                break
            batch.append(what)
            size += bytes_ + 64
        for what in batch:
            self._bytes -= self._waiting.pop(what)
        return batch

    async def send(self, batch: Sequence[tuple[str, str]]) -> Exception | None:
        """In one statement, after those before it. Returns why it was not said."""
        names, payloads = [name for name, _ in batch], [payload for _, payload in batch]
        async with self._one:
            while True:
                used = self._conn is not None
                try:
                    if self._conn is None:
                        self._conn = await _connected(self._connect)
                        if not self._conn.autocommit:
                            await self._conn.set_autocommit(True)
                    self.statements += 1
                    await _execute(self._conn, _NOTIFY, (names, payloads), self._patience)
                except Exception as error:
                    await self._discard()
                    if used:
                        continue  # it may have died while nothing was said; said twice is no harm
                    self._quiet_until = asyncio.get_running_loop().time() + self._pause
                    self._pause = min(self._pause * 2, PAUSE_MAX)
                    self._complain(_sentence(error))
                    return error
                except BaseException:
                    await self._discard()
                    raise
                self._quiet_until, self._pause, self._complained = 0.0, PAUSE_MIN, False
                return None

    async def close(self) -> None:
        if self._task is not None:
            task = self._task
            await asyncio.wait({task}, timeout=LAST_WORDS_SECONDS)
            task.cancel()
            await asyncio.wait({task})
        await self._discard()

    async def _discard(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            await conn.close()

    def _complain(self, why: str) -> None:
        if not self._complained:
            self._complained = True
            log.warning("notifications are dropped, others find their work by polling: %s", why)


async def _connected(connect: Connect) -> Connection:
    """A connection, or none at all: where it fails or is cancelled, the error's frames hold what was being opened, and whoever
    keeps the error would keep it open."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await connect()
    except BaseException as error:
        raise error.with_traceback(None) from None


async def _execute(conn: Connection, query: Any, values: Sequence[object], seconds: float) -> None:
    """Run a statement in a task of its own. Out of time (TimeoutError) or cancelled, the link is cut: the driver would ask the
    server to stop, and wait for an answer that a dead link never gives. The connection is of no use then."""
    work = asyncio.ensure_future(conn.execute(query, values, prepare=False))
    work.add_done_callback(_retrieve)
    try:
        await asyncio.wait({work}, timeout=seconds)
    except asyncio.CancelledError:
        if not work.done():
            cut(conn)
            await asyncio.wait({work})
        raise
    if not work.done():
        cut(conn)
        await asyncio.wait({work})
        raise TimeoutError(f"The database did not answer within {seconds:g} s.")
    work.result()


async def _first(lost: asyncio.Future[None], seconds: float) -> None:
    """Wait, but not past the loss of the connection, which is raised."""
    await asyncio.wait({lost}, timeout=seconds)
    if lost.done():
        lost.result()


def _sentence(error: Exception) -> str:
    """Its first line: the driver goes on with guesses."""
    return next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__


def _retrieve(done: asyncio.Future[Any]) -> None:
    """So that asyncio does not complain of an error nobody came to see."""
    if not done.cancelled():
        done.exception()


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"A channel is named durable_… in lower case, at most 63 characters, not {name!r}.")
    return name
