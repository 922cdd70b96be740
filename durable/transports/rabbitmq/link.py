"""AMQP's part that breaks: connections and channels that come back by themselves.

A channel is lost with its connection, and alone by any mistake said on it; so each purpose has a channel of its own, set up
anew each time. What was under way when one was lost fails at once: nothing here sends anything twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import (
    AuthenticationError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionClosed,
    InvalidFrameError,
    ProbableAuthenticationError,
)

from durable.core.errors import TransportError

log = logging.getLogger("durable.transports")

PAUSE_MIN, PAUSE_MAX = 0.1, 5.0
"""Seconds between two attempts."""
OPEN_SECONDS = 10.0
"""For one attempt to open something."""
SET_UP_SECONDS = 1.0
"""For the first attempt to set up a channel that was lost, twice as long each time: a broker that has just started may never
answer who asked too soon."""
CLOSE_SECONDS = 1.0
HEARTBEAT_SECONDS = 10
"""A dead link is noticed after three of these. A `heartbeat` in the URL goes first."""


@contextlib.contextmanager
def lost_is_an_error() -> Iterator[None]:
    """Around calls of the driver: a channel that is closed meanwhile may cancel who waits on it, as if he had been meant."""
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionError("The channel was closed meanwhile.") from error


def explained(error: BaseException, url: str) -> TransportError:
    """The same as a sentence that says what to do. It names the broker and never the password."""
    if isinstance(error, TransportError):
        return error
    parts = urlsplit(url)
    broker = f"RabbitMQ at {parts.hostname}:{parts.port or (5671 if parts.scheme == 'amqps' else 5672)}"
    said = str(error) or type(error).__name__
    if isinstance(error, ProbableAuthenticationError | AuthenticationError):
        return TransportError(f"{broker} refuses this user or password: check those of the URL. ({said})")
    if isinstance(error, ConnectionClosed | InvalidFrameError):  # the driver expects anything but a refusal
        host = parts.path[1:].replace("%2F", "/").replace("%2f", "/") or "/"
        return TransportError(
            f"{broker} closed the connection to virtual host {host!r}: check that it exists and that the user may enter it. "
            f"({said})"
        )
    if isinstance(error, ChannelPreconditionFailed) and "timed out" in said:
        return TransportError(
            f"{broker} does not wait that long for a task: raise consumer_timeout in its rabbitmq.conf above the longest step. "
            f"The body goes on; its task is delivered again, which is counted. ({said})"
        )
    if isinstance(error, ChannelPreconditionFailed):
        return TransportError(
            f"{broker} has a queue or exchange of this name with other arguments: use the settings it was declared with, or "
            f"drain and delete it, or take another prefix. ({said})"
        )
    if isinstance(error, ChannelNotFoundEntity):
        return TransportError(f"{broker} has no such queue: declare it, or leave declare=True. ({said})")
    if isinstance(error, TimeoutError):
        return TransportError(f"{broker} did not answer in time: check that it is up and not out of memory or disk.")
    if isinstance(error, OSError):
        return TransportError(f"{broker} cannot be reached: start it, or check the URL. ({said})")
    return TransportError(f"{broker} failed: {error!r}")


class _Lasting:
    """Something that is opened, lasts until it is lost, and is opened again. Belongs to one event loop, and lives once."""

    def __init__(self, url: str, what: str) -> None:
        self._url = url
        self._what = what
        self._up = asyncio.Event()
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pause = PAUSE_MIN
        self._life: asyncio.Task[None] | None = None
        self.error: TransportError | None = None
        """Why it is not open; None: it is, or nothing is known against it."""

    async def start(self) -> None:
        """Open it. Raises TransportError when the first attempt fails; it goes on trying until it is closed."""
        if self._life is None:
            self._life = asyncio.get_running_loop().create_task(self._live(), name=f"durable-amqp {self._what}")
        await asyncio.shield(self._first)

    async def close(self) -> None:
        """For good. Idempotent."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait({self._life})
        if not self._first.done():
            self._first.cancel()

    async def _last(self) -> None:
        """Open, say `_opened`, return or raise when it is lost."""
        raise NotImplementedError

    def _opened(self) -> None:
        self.error = None
        self._pause = PAUSE_MIN
        self._up.set()
        if not self._first.done():
            self._first.set_result(None)

    async def _live(self) -> None:
        while True:
            told = self.error is not None
            try:
                with lost_is_an_error():
                    await self._last()
            except Exception as error:
                self.error = explained(error, self._url)
            else:
                self.error = TransportError(f"RabbitMQ: {self._what} was closed.")
            self._up.clear()
            if not self._first.done():
                self._first.set_exception(self.error)
                self._first.exception()  # whoever waits has it; nobody need
            elif not told:
                log.warning("%s was lost and is opened again: %s", self._what, self.error)
            await asyncio.sleep(self._pause)
            self._pause = min(self._pause * 2, PAUSE_MAX)


class _Loss:
    """What the driver calls when something is closed, in one of several ways."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._error: BaseException | None = None

    def __call__(self, sender: object, error: object = None) -> None:
        if isinstance(error, Exception) and self._error is None:
            self._error = error
        self._event.set()

    async def wait(self) -> None:
        """Raises what it was closed with."""
        await self._event.wait()
        if self._error is not None:
            raise self._error


class Link(_Lasting):
    """A connection that comes back."""

    def __init__(self, url: str, name: str) -> None:
        """Raises TransportError for what is no AMQP URL."""
        try:
            parts = urlsplit(url)
            broken = parts.scheme not in ("amqp", "amqps") or not parts.hostname or parts.port == 0
        except ValueError:
            broken = True
        if broken:
            raise TransportError("A RabbitMQ is named by amqp://user:password@host:5672/vhost, or amqps://.")
        super().__init__(url, f"connection {name}")
        own = {} if "heartbeat" in parse_qs(parts.query) else {"heartbeat": HEARTBEAT_SECONDS}
        self._settings: dict[str, Any] = {**own, "client_properties": {"connection_name": f"durable {name}"}}
        self._connection: AbstractConnection | None = None

    async def connection(self) -> AbstractConnection:
        """It, once it is there."""
        while self._connection is None:
            await self._up.wait()
        return self._connection

    async def unblocked(self) -> None:
        """Wait while the broker takes no messages, being out of memory or disk."""
        connection = await self.connection()
        if connection.transport is not None:
            await connection.transport.ready()

    async def _last(self) -> None:
        lost = _Loss()
        async with asyncio.timeout(OPEN_SECONDS):
            connection = await aio_pika.connect(self._url, **self._settings)
        try:
            connection.close_callbacks.add(lost)
            if connection.connected.is_set():
                self._connection = connection
                self._opened()
                await lost.wait()
        finally:
            self._connection = None
            await _closed(connection)


class Line(_Lasting):
    """A channel that comes back, set up each time before anybody gets it."""

    def __init__(
        self,
        link: Link,
        what: str,
        set_up: Callable[[AbstractChannel], Awaitable[None]],
        *,
        confirms: bool = False,
    ) -> None:
        """`confirms`: what is published on it is confirmed, and what leads nowhere raises PublishError."""
        super().__init__(link._url, what)
        self._link = link
        self._set_up = set_up
        self._confirms = confirms
        self._patience = OPEN_SECONDS
        self.current: AbstractChannel | None = None

    async def channel(self) -> AbstractChannel:
        """It, once it is there."""
        while self.current is None:
            await self._up.wait()
        return self.current

    async def _last(self) -> None:
        lost = _Loss()
        connection = await self._link.connection()
        async with asyncio.timeout(OPEN_SECONDS):
            channel = await connection.channel(publisher_confirms=self._confirms, on_return_raises=self._confirms)
        try:
            channel.close_callbacks.add(lost)
            connection.close_callbacks.add(lost)
            (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(lost)  # its queue was deleted
            patience, self._patience = self._patience, min(self._patience * 2, OPEN_SECONDS)
            async with asyncio.timeout(patience):
                await self._set_up(channel)
            self._patience = SET_UP_SECONDS
            if not channel.is_closed:
                self.current = channel
                self._opened()
                await lost.wait()
        finally:
            self.current = None
            connection.close_callbacks.discard(lost)
            await _closed(channel)


async def _closed(it: AbstractConnection | AbstractChannel) -> None:
    with contextlib.suppress(Exception), lost_is_an_error():
        async with asyncio.timeout(CLOSE_SECONDS):
            await it.close()


async def acknowledge(message: AbstractIncomingMessage) -> None:
    """Where its channel is gone this is moot: it is delivered again, and its answer counts once."""
    try:
        with lost_is_an_error():
            await message.ack()
    except Exception as error:
        log.debug("a message is delivered again, its channel being gone: %r", error)


async def refuse(message: AbstractIncomingMessage) -> None:
    """Have it delivered again, which is counted."""
    try:
        with lost_is_an_error():
            await message.nack(requeue=True)
    except Exception as error:
        log.debug("a message is delivered again by itself, its channel being gone: %r", error)


async def all_of(works: Iterable[Awaitable[object]]) -> None:
    """All of them at once; the first error when all are done."""
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
