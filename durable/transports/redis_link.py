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

WAIT_SECONDS = 5.0
"""The longest that connecting, and an answer, may take."""
LOADING_SECONDS = 0.05
"""Between two questions whether it is ready."""


class Refused(TransportError):
    """The server was asked, and does not take the command. `said`: its own words."""

    def __init__(self, command: object, said: object) -> None:
        super().__init__(f"Redis did not take {command}: {said}")
        self.said = str(said)


class _Call:
    """So many commands, and who waits for their answers."""

    __slots__ = ("answers", "count", "deadline", "seconds", "waiter")

    def __init__(self, count: int, seconds: float, deadline: float, waiter: asyncio.Future[list[Any]]) -> None:
        self.count = count
        self.seconds = seconds
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
        if self.broken is not None:  # between its opening and this question: nobody would ever answer
            _lose(waiter, self.broken)
            return waiter
        deadline = self._loop.time() + seconds
        self._calls.append(_Call(len(commands), seconds, deadline, waiter))
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
            _lose(call.waiter, error)
        self._calls.clear()

    def _ring(self) -> None:
        """Answers come in order, so the first that is overdue holds up all."""
        self._timer = None
        if not self._calls:
            return
        late = min(self._calls, key=lambda call: call.deadline)
        if late.deadline <= self._loop.time():
            self.fail(_silent(late.seconds))
        else:
            self._timer = self._loop.call_at(late.deadline, self._ring)


def _lose(waiter: asyncio.Future[list[Any]], error: Exception) -> None:
    if not waiter.done():
        lost = error if isinstance(error, TransportError) else f"The connection to Redis is lost: {error}"
        waiter.set_exception(TransportError(str(lost)))
        waiter.exception()  # whoever waited for it may have gone


def _silent(seconds: float) -> TransportError:
    return TransportError(f"Redis did not answer within {seconds:g} s. Is it up, and reachable from here?")


class RedisLink:
    """A connection that is opened when it is needed, and again after it was lost."""

    def __init__(self, url: str, *, name: str, prepare: Sequence[Command] = (), timeout: float = WAIT_SECONDS) -> None:
        """`name`: as `CLIENT LIST` shows it. `prepare`: asked first on each connection, whatever is answered. `timeout`: seconds
        that connecting may take, and an answer. Raises DefinitionError for a URL that is none."""
        self.timeout = timeout
        self._prepare = prepare
        try:
            self._pool: Any = ConnectionPool.from_url(
                url,
                client_name=name,
                socket_connect_timeout=timeout,
                socket_timeout=timeout,
                socket_keepalive=True,
                retry=Retry(NoBackoff(), 0),
            )
        except (ValueError, TypeError) as error:
            raise DefinitionError(f"That is no URL of a Redis, like redis://localhost:6379/0: {error}") from error
        self._pool.connection_kwargs["protocol"] = 2  # whatever the URL says: answers are read here
        self._wire: _Wire | None = None
        self._opening: asyncio.Task[_Wire] | None = None

    @property
    def open(self) -> bool:
        """Whether there is a connection now."""
        return self._wire is not None and self._wire.broken is None

    async def call(self, *commands: Command, seconds: float | None = None) -> list[Any]:
        """Ask, and wait for all answers; a ReplyError among them is what the server did not take. Raises TransportError."""
        wire = self._wire
        if wire is None or wire.broken is not None:
            wire = await self._opened()
        return await wire.ask(commands, self.timeout if seconds is None else seconds)

    async def one(self, *words: Any, seconds: float | None = None) -> Any:
        """One command's answer. Raises TransportError, and Refused for what the server does not take."""
        (answer,) = await self.call(words, seconds=seconds)
        if isinstance(answer, ReplyError):
            raise Refused(words[0], answer)
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

    async def _loaded(self, wire: _Wire) -> None:
        """A server that was started again refuses everything until it has read its file: that is waited for. Raises
        TransportError."""
        until = asyncio.get_running_loop().time() + self.timeout
        while True:
            (answer,) = await wire.ask([("PING",)], self.timeout)
            if not (isinstance(answer, ReplyError) and str(answer).startswith("LOADING")):
                return
            if asyncio.get_running_loop().time() > until:
                raise TransportError("Redis is up and still reads its file: it takes nothing yet.")
            await asyncio.sleep(LOADING_SECONDS)

    async def _open(self) -> _Wire:
        try:
            connection = self._pool.make_connection()
            try:
                async with asyncio.timeout(self.timeout):
                    await connection.connect()
            except Exception as error:
                with contextlib.suppress(Exception):
                    await connection.disconnect(nowait=True)
                if isinstance(error, TimeoutError):
                    raise _silent(self.timeout) from None
                why = str(error).rstrip(".") or type(error).__name__
                raise TransportError(f"Redis cannot be reached: {why}. Check the URL, and that it is up.") from None
            writer, connection._reader, connection._writer = connection._writer, None, None
            wire = _Wire(writer, writer.transport)
            try:
                await self._loaded(wire)
            except BaseException:
                wire.fail(ConnectionError("it was not ready"))
                raise
            self._wire = wire
            if self._prepare:
                wire.ask(self._prepare, self.timeout)
            return wire
        finally:
            self._opening = None
