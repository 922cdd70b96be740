"""The engine end of the lane: answers, out of a stream of this engine's own.

Nobody else reads it while this engine beats. Answers are deleted once they were taken; those of an engine that is gone are
moved to another's stream, by that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from durable.core.errors import EngineStopped, MessageRefused, PayloadError, TransportError
from durable.protocol import names
from durable.protocol.codec import decode_answer
from durable.protocol.messages import Answer, StepResult
from durable.transports.interface import ResultHandler
from durable.transports.redis.scripts import ADOPT, LOADS, PASS, RETIRE, TAKEN
from durable.transports.redis_link import RedisLink

log = logging.getLogger("durable.transports")

BLOCK_SECONDS = 5.0
"""How long one read waits for something to come. A link that is silent for longer than that and some is dead."""
READ_MOST = 100
SWEEP_MOST = 100
"""Entries at the head of the stream that are looked at again with each sign of life."""
UNTAKEN_MOST = 2_000
"""Answers with the engine at once; the rest stays in Redis."""
MOVE_MOST = 500
RETRY_MIN, RETRY_MAX = 0.05, 5.0
"""Seconds until an answer that was not taken is offered again."""
TRIES = 3
"""So often here; then to another engine, where there is one."""

PutAway = Callable[[str, bytes, str], Awaitable[None]]


class Answers:
    """Hears what comes back, for one engine, from `start` to `close`."""

    def __init__(
        self, url: str, link: RedisLink, *, prefix: str, instance: str, handler: ResultHandler, alive_for: float,
        max_message: int, put_away: PutAway,
    ) -> None:  # fmt: skip
        self._link = link
        self._reader = RedisLink(url, name="durable-lane-answers", prepare=LOADS)
        self._instance = instance
        self._stream = names.lane_results(prefix, instance)
        self._base = names.lane_results(prefix, "")
        self._keys = [names.lane_engines(prefix), names.lane_unclaimed(prefix)]
        self._held = names.lane_held(prefix)
        self._handler = handler
        self._alive_for = alive_for
        self._max_message = max_message
        self._put_away = put_away
        self._last = b"0-0"
        self._known: set[bytes] = set()
        """Entries that are with the engine, or taken and not yet deleted."""
        self._settling: set[asyncio.Task[None]] = set()
        self._taken: list[bytes | str | int] = []
        self._deleting: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._look = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._retiring: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Be known, take over what waits, and listen. Raises TransportError."""
        await self._beat()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._read(), name="durable-lane-answers"),
            loop.create_task(self._beats(), name="durable-lane-engine"),
        ]

    async def close(self, timeout: float) -> None:
        """Hear no more, let the engine finish with what it has, and leave the rest to another."""
        await self._stop()
        if self._settling:
            await asyncio.wait(set(self._settling), timeout=timeout)
        for task in list(self._settling):
            task.cancel()
        if self._deleting is not None:
            await asyncio.wait({self._deleting}, timeout=timeout)
        with contextlib.suppress(TransportError):
            await self._delete()
        if self._retiring is None:
            await self._retire()
        else:
            await self._retiring

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._reader.close()

    async def _retire(self) -> None:
        """Off the list of engines. If Redis is away, the list forgets it by itself, and others take over."""
        with contextlib.suppress(TransportError):
            while not await self._link.one(*RETIRE(self._keys, self._instance, self._base, MOVE_MOST)):
                pass

    def _leave(self) -> None:
        """The engine takes nothing more: whoever else there is shall have it."""
        if self._retiring is None:
            self._retiring = asyncio.get_running_loop().create_task(self._give_up(), name="durable-lane-retire")

    async def _give_up(self) -> None:
        await self._stop()
        await self._retire()

    # -- signs of life

    async def _beats(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._alive_for / 3):
                    await self._look.wait()
            self._look.clear()
            try:
                await self._beat()
                self._delete_soon()
            except TransportError as error:
                log.debug("an engine's sign of life was not sent: %s", error)

    async def _beat(self) -> None:
        """Take over what is nobody's, and look whether anything of our own was passed by: a server's clock may go back."""
        adopt = ADOPT(self._keys, self._instance, int(self._alive_for * 1_000), self._base, MOVE_MOST)
        while not await self._link.one(*adopt):
            pass
        if self._last != b"0-0":
            self._take(await self._link.one("XRANGE", self._stream, "-", self._last, "COUNT", SWEEP_MOST))

    # -- answers

    async def _read(self) -> None:
        pause = RETRY_MIN
        while True:
            try:
                while len(self._known) >= UNTAKEN_MOST:
                    self._room.clear()
                    await self._room.wait()
                read = (
                    "XREAD",
                    "COUNT",
                    READ_MOST,
                    "BLOCK",
                    int(BLOCK_SECONDS * 1_000),
                    "STREAMS",
                    self._stream,
                    self._last,
                )
                got = await self._reader.one(*read, seconds=2 * BLOCK_SECONDS)
                if got:
                    entries = got[0][1]
                    self._last = entries[-1][0]
                    self._take(entries)
                if pause != RETRY_MIN:
                    pause = RETRY_MIN
                    log.warning("answers are heard again")
                    self._look.set()
            except Exception as error:
                if pause == RETRY_MIN or not isinstance(error, TransportError):
                    said = str(error) if isinstance(error, TransportError) else repr(error)
                    log.warning("answers cannot be heard: %s", said)
                pause = min(pause * 2, RETRY_MAX)
                await asyncio.sleep(pause)

    def _take(self, entries: list[Any]) -> None:
        loop = asyncio.get_running_loop()
        for entry, fields in entries:
            if entry not in self._known:
                self._known.add(entry)
                settling = loop.create_task(self._settle(entry, fields[1]))
                self._settling.add(settling)
                settling.add_done_callback(self._settling.discard)

    async def _settle(self, entry: bytes, data: bytes) -> None:
        """Until it was taken, by this engine or another."""
        try:
            answer = decode_answer(data, limit=self._max_message)
        except PayloadError as error:
            await self._refuse(entry, data, str(error))
            return
        delay, tries = RETRY_MIN, 0
        while True:
            try:
                await self._handler(answer)
            except EngineStopped:
                self._leave()
                return
            except MessageRefused as error:
                await self._refuse(entry, data, str(error), answer)
                return
            except Exception as error:
                log.warning("the answer of %s was not taken and is delivered again: %r", answer.id, error)
                tries += 1
                if tries >= TRIES and await self._pass(entry):
                    return
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_MAX)
            else:
                self._done(entry, answer)
                return

    async def _pass(self, entry: bytes) -> bool:
        try:
            passed = bool(await self._link.one(*PASS([self._keys[0], self._stream], self._instance, self._base, entry)))
        except TransportError:
            return False
        if passed:
            self._forget(entry)
        return passed

    async def _refuse(self, entry: bytes, data: bytes, why: str, answer: Answer | None = None) -> None:
        log.warning("an answer is refused and put away: %s", why)
        with contextlib.suppress(TransportError):
            await self._put_away("answer", data, why)
            self._done(entry, answer)
            return
        self._forget(entry)  # it is met again

    def _done(self, entry: bytes, answer: Answer | None) -> None:
        attempt: int | str = ""
        if isinstance(answer, StepResult) and answer.attempt is not None:
            attempt = answer.attempt
        self._taken += [entry, "" if answer is None else answer.id, attempt]
        self._delete_soon()

    def _delete_soon(self) -> None:
        if self._taken and self._deleting is None:
            self._deleting = asyncio.get_running_loop().create_task(self._deletes(), name="durable-lane-taken")

    async def _deletes(self) -> None:
        try:
            while self._taken:
                await self._delete()
        except TransportError as error:
            log.debug("answers that were taken are deleted later: %s", error)
        finally:
            self._deleting = None

    async def _delete(self) -> None:
        """All that were taken meanwhile, at once."""
        taken, self._taken = self._taken, []
        if not taken:
            return
        try:
            await self._link.one(*TAKEN([self._stream, self._held], *taken))
        except BaseException:
            self._taken = taken + self._taken
            raise
        for n in range(0, len(taken), 3):
            self._forget(taken[n])

    def _forget(self, entry: Any) -> None:
        self._known.discard(entry)
        self._room.set()
