"""The worker end of the lane: tasks, out of one stream for each routing token, shared by a consumer group.

A task that was given out stays in the stream until it is answered. Whoever has it says so every third of the lease; one
that is silent for a lease is taken over by another worker, and given up after so many workers died with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from durable.core.errors import PayloadError, TransportError
from durable.protocol import names
from durable.protocol.codec import decode_any_task, encode
from durable.protocol.messages import Answer, Task
from durable.transports.answers import given_up
from durable.transports.redis.scripts import ANSWER, BACK, GROUP, LEAVE, LOADS, RECLAIM, TAKE
from durable.transports.redis_link import RedisLink, Refused, ReplyError
from durable.transports.serving import Server, Workbench

log = logging.getLogger("durable.transports")

BLOCK_SECONDS = 5.0
"""How long one read waits for something to come. A link that is silent for longer than that and some is dead."""
PAUSE_MIN, PAUSE_MAX = 0.05, 2.0
"""Seconds between two attempts to reach the server."""
GONE_LEASES = 10
"""A worker that has had nothing and asked for nothing for so many leases is forgotten."""

PutAway = Callable[[str, bytes, str], Awaitable[None]]


class Tasks:
    """Takes tasks for one worker end, from `start` to `close`."""

    def __init__(
        self, url: str, link: RedisLink, bench: Workbench, *, prefix: str, instance: str, lease: float, max_deliveries: int,
        max_message: int, put_away: PutAway,
    ) -> None:  # fmt: skip
        self._url = url
        self._link = link
        self._bench = bench
        self._prefix = prefix
        self._instance = instance
        self._lease = lease
        self._max_deliveries = max_deliveries
        self._max_message = max_message
        self._put_away = put_away
        self._engines = names.lane_engines(prefix)
        self._base = names.lane_results(prefix, "")
        self._unclaimed = names.lane_unclaimed(prefix)
        self._reading: list[asyncio.Task[None]] = []
        self._readers: list[RedisLink] = []
        self._keeping: asyncio.Task[None] | None = None
        self._mine: dict[str, dict[bytes, None]] = {}
        """Stream → entries that are under way here."""
        self._closing = False

    def serve(self, server: Server) -> None:
        """Take tasks of a server's groups, from now on."""
        loop = asyncio.get_running_loop()
        streams = [names.lane_tasks(self._prefix, group) for group in server.groups]
        if not streams:
            return
        reader = RedisLink(self._url, name="durable-lane-tasks", prepare=LOADS)
        self._readers.append(reader)
        for stream in streams:
            self._mine.setdefault(stream, {})
        self._reading.append(loop.create_task(self._read(server, streams, reader), name="durable-lane-tasks"))
        self._reading.append(loop.create_task(self._reclaims(server, streams), name="durable-lane-reclaim"))
        if self._keeping is None:
            self._keeping = loop.create_task(self._keeps(), name="durable-lane-keep")

    async def stop(self) -> None:
        """Take nothing more. What is under way goes on."""
        self._closing = True
        for reading in self._reading:
            reading.cancel()
        if self._reading:
            await asyncio.wait(self._reading)
        for reader in self._readers:
            await reader.close()
        self._reading, self._readers = [], []

    async def close(self) -> None:
        """Give back what is still out: what was on its way here when the reading stopped, too."""
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None
        if self._mine:
            with contextlib.suppress(TransportError):
                await self._link.call(*(LEAVE([stream], GROUP, self._instance) for stream in self._mine))
        self._mine = {}

    # -- tasks in

    async def _read(self, server: Server, streams: list[str], reader: RedisLink) -> None:
        pause, grouped = PAUSE_MIN, False
        while True:
            try:
                room = await server.has_room()
                if not grouped:
                    await self._group(streams, reader)
                    grouped = True
                    got = await self._lost(streams, reader)
                else:
                    got = await self._take(streams, room, reader)
                for stream, entries in got or ():
                    for entry, fields in entries:
                        await self._begin(server, stream.decode(), entry, fields or [], 1)
                pause = PAUSE_MIN
            except Exception as error:
                # The groups may be what is missing: of another server, or of this one emptied.
                grouped = False
                known = isinstance(error, TransportError) and (pause > PAUSE_MIN or "NOGROUP" in str(error))
                said = str(error) if isinstance(error, TransportError) else repr(error)
                log.log(logging.DEBUG if known else logging.WARNING, "tasks cannot be taken: %s", said)
                await asyncio.sleep(pause)
                pause = min(pause * 2, PAUSE_MAX)

    async def _lost(self, streams: list[str], reader: RedisLink) -> Any:
        """What was given out to this worker over a link that broke before it came."""
        read = ("XREADGROUP", "GROUP", GROUP, self._instance, "STREAMS", *streams, *(["0"] * len(streams)))
        return await reader.one(*read)

    async def _take(self, streams: list[str], room: int, reader: RedisLink) -> Any:
        """As many as there is room for, waiting for the first."""
        each, spare = divmod(room, len(streams))
        if not each and spare:  # COUNT is for each stream
            got = await reader.one(*TAKE(streams, GROUP, self._instance, room))
            if got:
                return got
            streams.append(streams.pop(0))
        read = (
            "XREADGROUP",
            "GROUP",
            GROUP,
            self._instance,
            "COUNT",
            max(1, each),
            "BLOCK",
            int(BLOCK_SECONDS * 1_000),
        )
        return await reader.one(*read, "STREAMS", *streams, *([">"] * len(streams)), seconds=2 * BLOCK_SECONDS)

    async def _group(self, streams: list[str], reader: RedisLink) -> None:
        """Every stream has its group, from its very beginning."""
        answers = await reader.call(*(("XGROUP", "CREATE", stream, GROUP, "0", "MKSTREAM") for stream in streams))
        for answer in answers:
            if isinstance(answer, ReplyError) and not str(answer).startswith("BUSYGROUP"):
                raise Refused("XGROUP CREATE", answer)

    async def _begin(self, server: Server, stream: str, entry: bytes, fields: list[bytes], deliveries: int) -> None:
        """Work on it, or do what else is to be done with such an entry."""
        if entry in self._mine[stream]:
            return
        if not fields:  # somebody has deleted it
            await self._link.call(("XACK", stream, GROUP, entry))
            return
        told = dict(zip(fields[::2], fields[1::2], strict=False))
        data, engine = told.get(b"t", b""), told.get(b"r", b"")
        try:
            task = decode_any_task(data, limit=self._max_message)
        except PayloadError as error:
            log.warning("something that is no task was found in %s and put away: %s", stream, error)
            with contextlib.suppress(TransportError):
                await self._put_away("task", data, str(error))
                await self._link.call(("XACK", stream, GROUP, entry), ("XDEL", stream, entry))
            return
        if deliveries > self._max_deliveries:
            with contextlib.suppress(TransportError):
                await self._give_up(task, stream, entry, engine, deliveries)
            return
        if not server.room or self._closing:
            with contextlib.suppress(TransportError):
                await self._back(stream, entry)
            return
        self._mine[stream][entry] = None
        self._bench.begin(
            server, task, partial(self._answer, stream, entry, engine, task), partial(self._back, stream, entry)
        )

    async def _answer(self, stream: str, entry: bytes, engine: bytes, task: Task, answer: Answer | None) -> None:
        """Sent and acknowledged as one. Until Redis takes it, it stays under way; without an end of this worker, for ever."""
        if answer is None:
            commands = [("XACK", stream, GROUP, entry), ("XDEL", stream, entry)]
            commands.append(("HDEL", names.lane_held(self._prefix), task.id))
        else:
            data = encode(answer, limit=self._max_message)
            keys = [stream, self._engines]
            commands = [ANSWER(keys, GROUP, entry, data, engine, self._base, self._unclaimed)]
        pause = PAUSE_MIN
        while True:
            try:
                answers = await self._link.call(*commands)
                if not isinstance(answers[0], ReplyError):
                    break
                log.warning("the answer of %s was refused by Redis and is sent again: %s", task.id, answers[0])
            except TransportError as error:
                log.debug("the answer of %s is sent again: %s", task.id, error)
            await asyncio.sleep(pause)
            pause = min(pause * 2, PAUSE_MAX)
        self._mine.get(stream, {}).pop(entry, None)

    async def _back(self, stream: str, entry: bytes) -> None:
        self._mine.get(stream, {}).pop(entry, None)
        await self._link.one(*BACK([stream], GROUP, entry))

    # -- tasks that others left

    async def _keeps(self) -> None:
        """Say of what is under way that it is."""
        while True:
            await asyncio.sleep(self._lease / 3)
            commands: list[tuple[Any, ...]] = [
                ("XCLAIM", stream, GROUP, self._instance, 0, *entries, "JUSTID")
                for stream, entries in self._mine.items()
                if entries
            ]
            if commands:
                with contextlib.suppress(TransportError):
                    await self._link.call(*commands)

    async def _reclaims(self, server: Server, streams: list[str]) -> None:
        silent = int(self._lease * 1_000)
        while True:
            for stream in list(streams):
                with contextlib.suppress(TransportError):
                    if room := server.room:
                        reclaim = RECLAIM([stream], GROUP, self._instance, silent, room, GONE_LEASES * silent)
                        for entry, fields, deliveries in await self._link.one(*reclaim):
                            log.warning("a task of %s is taken over from a worker that is silent", stream)
                            await self._begin(server, stream, entry, fields, deliveries + 1)
            await asyncio.sleep(self._lease / 2)

    async def _give_up(self, task: Task, stream: str, entry: bytes, engine: bytes, deliveries: int) -> None:
        log.warning("task %s is given up: %d workers were lost with it", task.id, deliveries - 1)
        answer = given_up(task, f"it was given out {deliveries - 1} times and never answered")
        await self._answer(stream, entry, engine, task, answer)
