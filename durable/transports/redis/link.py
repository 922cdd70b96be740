"""One connection to Redis on which nobody waits for anybody: what is asked in one turn of the loop is written at once, and
answers are matched by their order.

The driver connects, with all that a URL can say; its parser reads. In between it would take turns: one command, or one
pipeline, at a time. A broken link fails what is under way, and the next call opens another.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import hiredis
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from durable.core.errors import DefinitionError, TransportError

Command = tuple[Any, ...]
"""Its words: texts, bytes and whole numbers."""
ReplyError = hiredis.ReplyError
"""What the server says of a command it does not take; an answer like any other, and not raised here."""

CONNECT_SECONDS = 5.0
WAIT_SECONDS = 5.0
"""The longest an answer may take."""


class _Call:
    """So many commands, and who waits for their answers."""

    __slots__ = ("answers", "count", "deadline", "waiter")

    def __init__(self, count: int, deadline: float, waiter: asyncio.Future[list[Any]]) -> None:
        self.count = count
        self.deadline = deadline
        self.waiter = waiter
        self.answers: list[Any] = []


class _Wire(asyncio.Protocol):
    """One connection, from its opening to its end."""

    def __init__(self, keep: Any, transport: asyncio.Transport) -> None:
        self._keep = keep  # the driver's stream closes the socket when it is forgotten
        self._transport = transport
        self._reader = hiredis.Reader()
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._calls: deque[_Call] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.broken: Exception | None = None
        transport.set_protocol(self)

    def ask(self, commands: Sequence[Command], seconds: float) -> asyncio.Future[list[Any]]:
        waiter: asyncio.Future[list[Any]] = self._loop.create_future()
        deadline = self._loop.time() + seconds
        self._calls.append(_Call(len(commands), deadline, waiter))
        if not self._out:
            self._loop.call_soon(self._write)
        self._out += [hiredis.pack_command(command) for command in commands]
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._ring)
        return waiter

    def _write(self) -> None:
        out, self._out = self._out, []
        if self.broken is None:
            self._transport.write(b"".join(out))

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (answer := self._reader.gets()) is not False:
                call = self._calls[0]
                call.answers.append(answer)
                if len(call.answers) == call.count:
                    self._calls.popleft()
                    if not call.waiter.done():
                        call.waiter.set_result(call.answers)
        except Exception as error:  # what came is no answer
            self.fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(exc or ConnectionError("the server has closed the connection"))

    def fail(self, error: Exception) -> None:
        """No more of it."""
        if self.broken is not None:
            return
        self.broken = error
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        for call in self._calls:
            if not call.waiter.done():
                call.waiter.set_exception(TransportError(f"The connection to Redis is lost: {error}"))
                call.waiter.exception()  # whoever waited for it may have gone
        self._calls.clear()

    def _ring(self) -> None:
        """Answers come in order, so the first that is overdue holds up all."""
        self._timer = None
        if not self._calls:
            return
        late = min(call.deadline for call in self._calls)
        if late <= self._loop.time():
            self.fail(TimeoutError("the server did not answer in time"))
        else:
            self._timer = self._loop.call_at(late, self._ring)


class RedisLink:
    """A connection that is opened when it is needed, and again after it was lost."""

    def __init__(self, url: str, *, name: str, prepare: Sequence[Command] = ()) -> None:
        """`name`: as `CLIENT LIST` shows it. `prepare`: asked first on each connection, whatever is answered. Raises
        DefinitionError for a URL that is none."""
        self._prepare = prepare
        try:
            self._pool: Any = ConnectionPool.from_url(
                url,
                client_name=name,
                protocol=2,
                socket_connect_timeout=CONNECT_SECONDS,
                socket_timeout=CONNECT_SECONDS,
                socket_keepalive=True,
                retry=Retry(NoBackoff(), 0),
            )
        except (ValueError, TypeError) as error:
            raise DefinitionError(f"This is no URL of a Redis: {error}") from error
        self._wire: _Wire | None = None
        self._opening: asyncio.Task[_Wire] | None = None

    @property
    def open(self) -> bool:
        """Whether there is a connection now."""
        return self._wire is not None and self._wire.broken is None

    async def call(self, *commands: Command, seconds: float = WAIT_SECONDS) -> list[Any]:
        """Ask, and wait for all answers; a ReplyError among them is what the server did not take. Raises TransportError."""
        wire = self._wire
        if wire is None or wire.broken is not None:
            wire = await self._opened()
        return await wire.ask(commands, seconds)

    async def one(self, *words: Any, seconds: float = WAIT_SECONDS) -> Any:
        """One command's answer. Raises TransportError, also for what the server does not take."""
        (answer,) = await self.call(words, seconds=seconds)
        if isinstance(answer, ReplyError):
            raise TransportError(f"Redis refused {words[0]}: {answer}")
        return answer

    async def close(self) -> None:
        """Let go. The next call would open it again."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait({self._opening})
        if self._wire is not None:
            self._wire.fail(ConnectionError("it was closed"))
            self._wire = None

    async def _opened(self) -> _Wire:
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open(), name="durable-redis-connect")
        opening = self._opening
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            if opening.cancelled():
                raise TransportError("The connection to Redis was closed.") from None
            raise

    async def _open(self) -> _Wire:
        try:
            connection = self._pool.make_connection()
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await connection.connect()
            except Exception as error:
                with contextlib.suppress(Exception):
                    await connection.disconnect(nowait=True)
                why = str(error).rstrip(".") or type(error).__name__
                raise TransportError(f"Redis cannot be reached: {why}. Check the URL, and that it is up.") from None
            writer, connection._reader, connection._writer = connection._writer, None, None
            self._wire = _Wire(writer, writer.transport)
            if self._prepare:
                self._wire.ask(self._prepare, WAIT_SECONDS)
            return self._wire
        finally:
            self._opening = None
