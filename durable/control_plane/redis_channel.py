"""Redis pub/sub with a watchdog: hints between processes on one server. Losing every one of them costs latency and nothing else.

Two connections. The first only listens. The second only speaks, and what is said in one turn of the loop goes out together.
Whether the first hears the second is tried at once and every `probe_every`: a link may die without a word, and a listener
that hears nothing any more is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

log = logging.getLogger("durable.channel")


Handler: TypeAlias = Callable[[bytes | None], None]
"""Gets what was said; None: something may have been missed."""

OUTBOX_BYTES = 16 << 20
"""What may wait to be said; the rest is dropped."""
PAUSE_MIN, PAUSE_MAX = 0.1, 5.0
"""Seconds between two attempts to reach the server."""
PATIENCE = 5.0
"""Seconds that anything asked of the server may take."""
LAST_WORDS_SECONDS = 1.0
"""What `close` gives to what has been published before it."""


def client(url: str, *, name: str) -> Redis:
    """A client that tries each thing once: what to do about a failure is decided here, not in the driver. Raises ValueError for
    a URL that is none."""
    return Redis.from_url(
        url,
        client_name=name,
        protocol=2,
        socket_connect_timeout=PATIENCE,
        socket_timeout=None,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )


class RedisChannel:
    """Says and hears on named channels of one server. Handlers run in the loop, one after the other."""

    def __init__(self, url: str, *, name: str, counted: str | None = None, probe_every: float = 15.0) -> None:
        """`name`: the channel whose listeners are counted, and from which the probe's own is called. `counted`: another one
        whose listeners are counted in its place, and which is not listened to. Raises ValueError."""
        self._client = client(url, name="durable-channel")
        self._name = name
        self._counted = name if counted is None else counted
        self._elsewhere = None if counted is None else f"{counted}-probe".encode()
        """Where those who are counted are heard to begin."""
        self._probe_name = f"{name}-probe"
        self._every = probe_every
        self._token = secrets.token_hex(8)
        self._handlers: dict[bytes, list[Handler]] = {}
        self._outbox = _Outbox(self._client)
        self._echo: tuple[bytes, asyncio.Future[None]] | None = None
        self._life: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[Exception | None] | None = None
        self._missed = self._complained = False
        self._came = False
        """Somebody else was heard since the listeners were counted."""
        self.others = True
        """Whether anybody else listens on the channel that is counted, as far as is known."""
        self.deaf: str | None = "It has not been started."
        """Why nothing can be relied on to be heard, as a sentence; None: it hears."""

    def on(self, name: str, handler: Handler) -> None:
        """Hear a channel, from the start on; and None after a gap. Before `start`."""
        self._handlers.setdefault(name.encode(), []).append(handler)

    def publish(self, name: str, data: bytes) -> None:
        """Say it, soon. Dropped while the server is away, before the start and after `close`."""
        if self._life is not None:
            self._outbox.put(name, data)

    # -- life

    async def start(self) -> None:
        """Connect, and return when it hears itself. Raises what connecting raised; it is closed then."""
        loop = asyncio.get_running_loop()
        self._opened = loop.create_future()
        self._life = loop.create_task(self._live(self._opened), name="durable-channel")
        try:
            error = await asyncio.shield(self._opened)
            if error is not None:
                raise error
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Say what was published before, if that does not take long, and let go of both connections. Idempotent."""
        life, self._life = self._life, None
        self.deaf = "It has been closed."
        if life is not None:
            life.cancel()
            await asyncio.wait({life})
        await self._outbox.close()
        await _let_go(self._client)

    async def _live(self, opened: asyncio.Future[Exception | None]) -> None:
        pause = PAUSE_MIN
        while True:
            try:
                async with self._listening() as lost:
                    while True:
                        await self._probe(lost)
                        pause = PAUSE_MIN
                        if not opened.done():
                            opened.set_result(None)
                        await _first(lost, self._every)
            except Exception as error:
                self._deafened(error)
                if not opened.done():
                    opened.set_result(error)
            await asyncio.sleep(pause)
            pause = min(pause * 2, PAUSE_MAX)

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[asyncio.Task[None]]:
        """A connection that listens. Yields what fails when it is lost."""
        pubsub = self._client.pubsub(ignore_subscribe_messages=True)
        hearing: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(PATIENCE):
                await pubsub.subscribe(self._probe_name, self._name, *self._handlers)
                if self._elsewhere is not None:
                    await pubsub.subscribe(self._elsewhere)
            hearing = asyncio.get_running_loop().create_task(self._hear(pubsub), name="durable-channel-ear")
            yield hearing
        finally:
            if hearing is not None:
                hearing.cancel()
                await asyncio.wait({hearing})
            await _let_go(pubsub)

    async def _hear(self, pubsub: PubSub) -> None:
        probe = self._probe_name.encode()
        while True:
            message: dict[str, Any] | None = await pubsub.get_message(timeout=None)
            if message is None or message["type"] != "message":
                continue
            if message["channel"] == probe:
                self._heard_probe(message["data"])
            elif message["channel"] == self._elsewhere:
                self.others = self._came = True
            else:
                self._tell(message["channel"], message["data"])

    def _tell(self, name: bytes, data: bytes | None) -> None:
        for handler in self._handlers.get(name, ()):
            try:
                handler(data)
            except Exception:
                log.exception("A handler of %s raised; the hint is dropped", name.decode())

    # -- watching itself

    async def _probe(self, lost: asyncio.Task[None]) -> None:
        """Have what the other connection says heard on this one. Raises what went wrong."""
        nonce = f"{self._token} {secrets.token_hex(8)}".encode()
        echo: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._echo = nonce, echo
        try:
            self._came = False
            _, count = await self._outbox.ask(
                [("PUBLISH", self._probe_name, nonce), ("PUBSUB", "NUMSUB", self._counted)]
            )
            own = 1 if self._elsewhere is None else 0
            self.others = self._came or int(count[1]) > own
            await asyncio.wait({echo, lost}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._echo = None
        if lost.done():
            lost.result()
        if not echo.done():
            raise TimeoutError(f"It does not hear what it says itself within {PATIENCE:g} s.")
        self._hears()

    def _heard_probe(self, nonce: bytes) -> None:
        if not nonce.startswith(self._token.encode()):
            if self._elsewhere is None:
                self.others = self._came = True
        elif self._echo is not None and self._echo[0] == nonce and not self._echo[1].done():
            self._echo[1].set_result(None)

    def _deafened(self, error: Exception) -> None:
        self.deaf = f"The connection to Redis is lost: {error or type(error).__name__}"
        self._missed = self.others = True
        if not self._complained:
            self._complained = True
            log.warning("messages may be missed, work is found by polling: %s", self.deaf)

    def _hears(self) -> None:
        self.deaf = None
        if self._complained:
            self._complained = False
            log.warning("messages of others are heard again")
        if self._missed:
            self._missed = False
            for name in self._handlers:
                self._tell(name, None)


class _Outbox:
    """What is to be said, and the connection it is said through."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._waiting: list[tuple[Any, ...]] = []
        self._bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._quiet_until = 0.0
        """By the loop's clock: until then the server is away, and nothing is kept for it."""
        self._pause = PAUSE_MIN
        self._complained = False

    def put(self, name: str, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._quiet_until:
            return
        if self._bytes + len(data) > OUTBOX_BYTES:
            self._complain("the server does not take them as fast as they come")
            return
        self._waiting.append(("PUBLISH", name, data))
        self._bytes += len(data)
        if self._task is None:
            self._task = loop.create_task(self._flush(), name="durable-channel-flush")

    async def _flush(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting, self._bytes = self._waiting, [], 0
                try:
                    await self.ask(batch)
                except Exception as error:
                    self._complain(str(error) or type(error).__name__)
                    self._waiting, self._bytes = [], 0
        finally:
            self._task = None

    async def ask(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """In one round trip. Raises what went wrong; then it is quiet for a while."""
        try:
            async with asyncio.timeout(PATIENCE), self._client.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                answers: list[Any] = await pipe.execute()
        except TimeoutError as error:
            self._away()
            raise TimeoutError(f"Redis did not answer within {PATIENCE:g} s.") from error
        except Exception:
            self._away()
            raise
        self._quiet_until, self._pause, self._complained = 0.0, PAUSE_MIN, False
        return answers

    def _away(self) -> None:
        self._quiet_until = asyncio.get_running_loop().time() + self._pause
        self._pause = min(self._pause * 2, PAUSE_MAX)

    async def close(self) -> None:
        if self._task is not None:
            task = self._task
            await asyncio.wait({task}, timeout=LAST_WORDS_SECONDS)
            task.cancel()
            await asyncio.wait({task})

    def _complain(self, why: str) -> None:
        if not self._complained:
            self._complained = True
            log.warning("messages to others are dropped, they find their work by polling: %s", why)


async def _let_go(thing: Redis | PubSub) -> None:
    """Close it, however the link to the server is."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            await thing.aclose()


async def _first(lost: asyncio.Task[None], seconds: float) -> None:
    """Wait, but not past the loss of the connection, which is raised."""
    await asyncio.wait({lost}, timeout=seconds)
    if lost.done():
        lost.result()
