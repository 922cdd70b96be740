"""One Redis: a connection for what is asked, one for what looks for work, and one for each who waits."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from durable.transports.redis_link import RedisLink, Refused

HURRY_SECONDS = 1.0


class Link:
    """Everything of one moment goes out together, and everything has a bound."""

    def __init__(self, url: str, *, timeout: float) -> None:
        """`timeout`: seconds the server has for an answer. Raises DefinitionError for a URL that is none."""
        self.url = url
        self._open = partial(RedisLink, url, timeout=timeout)
        self._asking = self._open(name="durable-bullmq")
        self._taking = self._open(name="durable-bullmq-take")
        self._waiting: set[RedisLink] = set()
        self._rested: list[RedisLink] = []
        """Connections on which nobody waits just now."""

    async def ask(self, *command: Any) -> Any:
        """One command's answer, as the server gave it. Raises TransportError if the server could not be asked, and Refused if
        it does not take it."""
        return await self._asking.one(*command)

    async def take(self, *command: Any) -> Any:
        """As `ask`, beside it: what looks for work does not hold up what is done."""
        return await self._taking.one(*command)

    async def wait_for(self, key: str, seconds: float) -> bool:
        """Whether something was put into a sorted set within that time; it is taken out. Raises TransportError."""
        link = self._rested.pop() if self._rested else self._open(name="durable-bullmq-wait")
        self._waiting.add(link)
        try:
            found = await link.one("BZPOPMIN", key, seconds, seconds=seconds + link.timeout)
        except BaseException:
            await link.close()  # else whoever comes next would wait for this answer first
            raise
        finally:
            self._waiting.discard(link)
        self._rested.append(link)
        return found is not None

    def hurry(self) -> None:
        """On the way out nothing is waited for long."""
        for link in (self._asking, self._taking):
            link.timeout = min(link.timeout, HURRY_SECONDS)

    async def close(self) -> None:
        """Let go."""
        links = [self._asking, self._taking, *self._waiting, *self._rested]
        self._rested = []
        await asyncio.gather(*(link.close() for link in links))


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
        except Refused as error:
            if not error.said.startswith("NOSCRIPT"):
                raise
            return await self._ask("EVAL", self._text, len(keys), *keys, *args)  # a server that was started since
