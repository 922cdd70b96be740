"""One Redis. What is asked in the same moment goes out in one round trip, and everything has a bound.

The drivers' own patience is switched off: BullMQ's client would try for minutes while Redis is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from durable.core.errors import DefinitionError, TransportError

BATCH = 256
"""Commands in one round trip."""
BATCH_BYTES = 4 << 20
PAUSE_MIN, PAUSE_MAX = 0.05, 5.0
"""Seconds between two attempts to reach the server."""
CONNECT_SECONDS = 3.0
HURRY_SECONDS = 1.0


class Link:
    """Connections for what is asked, each in its own order, and others for what waits."""

    def __init__(self, url: str, *, timeout: float) -> None:
        """`timeout`: seconds the server has for an answer. Raises DefinitionError for a URL that is none."""
        self.url = url
        self._timeout = timeout
        try:
            self._waiting = _client(url)
            self._telling = _Lane(_client(url), self)
            self._taking = _Lane(_client(url), self)
        except ValueError as error:
            raise DefinitionError(f"That is no URL of a Redis, like redis://localhost:6379/0: {error}") from error

    @property
    def timeout(self) -> float:
        return self._timeout

    async def ask(self, *command: Any) -> Any:
        """One command's answer, as the server gave it. Raises TransportError if the server could not be asked, and the
        server's own ResponseError if it refused."""
        return await self._telling.ask(command)

    async def take(self, *command: Any) -> Any:
        """As `ask`, beside it: what looks for work does not hold up what is done."""
        return await self._taking.ask(command)

    async def wait_for(self, key: str, seconds: float) -> bool:
        """Whether something was put into a sorted set within that time; it is taken out. Raises TransportError."""
        try:
            async with asyncio.timeout(seconds + self._timeout):
                return await self._waiting.bzpopmin(key, timeout=seconds) is not None
        except (RedisError, OSError, TimeoutError) as error:
            raise self.away(error) from error

    def hurry(self) -> None:
        """On the way out nothing is waited for long."""
        self._timeout = min(self._timeout, HURRY_SECONDS)

    async def close(self) -> None:
        """Say what has been asked, and let go."""
        await asyncio.gather(self._telling.close(), self._taking.close(), _let_go(self._waiting))

    def away(self, error: BaseException) -> TransportError:
        """What to do about a server that could not be asked."""
        if isinstance(error, TimeoutError):
            return TransportError(
                f"Redis did not answer within {self._timeout:g} s. Is it up, and reachable from here?"
            )
        why = str(error).rstrip(".") or type(error).__name__
        return TransportError(f"Redis cannot be reached: {why}. Check the URL, and that it is up.")


class _Lane:
    """One connection: what comes while it waits for an answer goes out together after that."""

    def __init__(self, client: Redis, link: Link) -> None:
        self._client = client
        self._link = link
        self._queue: list[tuple[tuple[Any, ...], int, asyncio.Future[Any]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def ask(self, command: tuple[Any, ...]) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        size = sum(len(word) for word in command if isinstance(word, bytes | str))
        self._queue.append((command, size, answer))
        if self._sending is None:
            self._sending = asyncio.get_running_loop().create_task(self._send_all(), name="durable-bullmq-link")
        return await answer

    async def close(self) -> None:
        if self._sending is not None:
            await asyncio.wait({self._sending}, timeout=self._link.timeout)
        await _let_go(self._client)

    async def _send_all(self) -> None:
        try:
            while self._queue:
                await self._send(self._next())
        finally:
            self._sending = None

    def _next(self) -> list[tuple[tuple[Any, ...], int, asyncio.Future[Any]]]:
        count = size = 0
        while count < min(len(self._queue), BATCH) and (not count or size + self._queue[count][1] <= BATCH_BYTES):
            size += self._queue[count][1]
            count += 1
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch

    async def _send(self, batch: list[tuple[tuple[Any, ...], int, asyncio.Future[Any]]]) -> None:
        try:
            async with asyncio.timeout(self._link.timeout), self._client.pipeline(transaction=False) as pipe:
                for command, _, _ in batch:
                    pipe.execute_command(*command)
                answers = await pipe.execute(raise_on_error=False)
        except (Exception, asyncio.CancelledError) as error:
            for _, _, answer in batch:
                if not answer.done():
                    answer.set_exception(self._link.away(error))
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        for (_, _, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, ResponseError):
                future.set_exception(answer)
            elif isinstance(answer, Exception):
                future.set_exception(self._link.away(answer))
            else:
                future.set_result(answer)


def _client(url: str) -> Redis:
    client = Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_SECONDS,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )
    # Whatever the URL says: a wait takes as long as it takes, and has its bound here.
    client.connection_pool.connection_kwargs |= {"protocol": 2, "socket_timeout": None}
    return client


async def _let_go(client: Redis) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(HURRY_SECONDS):
            await client.aclose()


class Script:
    """One of BullMQ's Lua scripts, called as its own classes call them."""

    def __init__(self, ask: Callable[..., Awaitable[Any]], text: str) -> None:
        self._ask = ask
        self._text = text
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, keys: Any = None, args: Any = None, client: Any = None) -> Any:
        keys, args = keys or [], args or []
        try:
            return await self._ask("EVALSHA", self._sha, len(keys), *keys, *args)
        except NoScriptError:  # a server that was started since
            return await self._ask("EVAL", self._text, len(keys), *keys, *args)
