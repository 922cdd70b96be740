"""What `bench remote` can be told to carry steps over: for each, how a transport is built, and the same broker used without
one. Another transport is another entry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct

from durable.transports.event_emitter import EventEmitterTransport
from durable.transports.interface import Transport

GROUP = "raw"
ROUND = Callable[[bytes], Awaitable[bytes]]


class Carrier(Struct, frozen=True):
    """`server`: what runs while it is measured: redis, rabbitmq, postgres (the state's own), or nothing."""

    server: str | None
    build: Callable[[str], Transport]
    """With the server's URL."""
    raw_worker: Callable[[str], Awaitable[None]] | None = None
    """Answers jobs with what they carry, for ever, through the broker's client alone."""
    raw_client: Callable[[str], Awaitable[ROUND]] | None = None
    """What makes one round trip of a job and its answer."""


def lane(url: str) -> Transport:
    from durable.transports.redis import RedisTransport

    return RedisTransport(url)


async def lane_worker(url: str) -> None:
    """redis-py: as many as there are at once, all answers of a batch in one pipeline."""
    from redis.asyncio import Redis

    client, replies = Redis.from_url(url, protocol=2), Redis.from_url(url, protocol=2)
    await client.delete("raw-tasks", "raw-results")
    await client.xgroup_create("raw-tasks", GROUP, "0", mkstream=True)
    while True:
        for _, entries in await client.xreadgroup(GROUP, "one", {"raw-tasks": ">"}, count=100, block=0):
            async with replies.pipeline(transaction=False) as pipe:
                for entry, fields in entries:
                    pipe.xadd("raw-results", fields)
                    pipe.xack("raw-tasks", GROUP, entry)
                    pipe.xdel("raw-tasks", entry)
                await pipe.execute()


async def lane_client(url: str) -> ROUND:
    """redis-py: jobs of one turn in one pipeline, answers read in batches and deleted in batches."""
    from redis.asyncio import Redis

    sender, reader = Redis.from_url(url, protocol=2), Redis.from_url(url, protocol=2)
    waiting: dict[bytes, asyncio.Future[bytes]] = {}
    outgoing: list[tuple[bytes, bytes]] = []
    wake = asyncio.Event()

    async def send() -> None:
        while True:
            await wake.wait()
            wake.clear()
            batch, outgoing[:] = list(outgoing), []
            async with sender.pipeline(transaction=False) as pipe:
                for key, data in batch:
                    pipe.xadd("raw-tasks", {b"k": key, b"d": data})
                await pipe.execute()

    async def read() -> None:
        last: Any = "0"
        while True:
            for _, entries in await reader.xread({"raw-results": last}, count=100, block=0):
                for last, fields in entries:  # noqa: B007 - the last one is where the next read begins
                    waiting.pop(fields[b"k"]).set_result(fields[b"d"])
                await reader.xdel("raw-results", *(entry for entry, _ in entries))

    kept = [asyncio.create_task(send()), asyncio.create_task(read())]
    number = 0

    async def once(data: bytes) -> bytes:
        nonlocal number
        number += 1
        key = b"%d" % number
        waiting[key] = asyncio.get_running_loop().create_future()
        outgoing.append((key, data))
        wake.set()
        return await waiting[key]

    once.kept = kept  # type: ignore[attr-defined]
    return once


def bullmq(url: str) -> Transport:
    from durable.transports.bullmq import BullMQTransport

    return BullMQTransport(url)


async def bullmq_worker(url: str) -> None:
    """The package's own Worker and Queue, as its guide has them."""
    from bullmq import Queue, Worker  # type: ignore[import-untyped]

    results = Queue("raw-results", {"connection": url})

    async def process(job: Any, token: str) -> None:
        await results.add("result", job.data, {"removeOnComplete": True, "removeOnFail": True})

    Worker("raw-tasks", process, {"connection": url, "concurrency": 100})
    await asyncio.Event().wait()


async def bullmq_client(url: str) -> ROUND:
    from bullmq import Queue, Worker

    tasks, waiting, number = Queue("raw-tasks", {"connection": url}), {}, 0

    async def process(job: Any, token: str) -> None:
        waiting.pop(job.data["k"]).set_result(job.data["d"].encode())

    worker = Worker("raw-results", process, {"connection": url, "concurrency": 100})

    async def once(data: bytes) -> bytes:
        nonlocal number
        number += 1
        key = f"{id(worker)}-{number}"
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        waiting[key] = future
        await tasks.add("task", {"k": key, "d": data.decode()}, {"removeOnComplete": True, "removeOnFail": True})
        return await future

    return once


def db(url: str) -> Transport:
    from durable.transports.db import DbTransport

    return DbTransport(url)


def rabbitmq(url: str) -> Transport:
    from durable.transports.rabbitmq import RabbitMqTransport

    return RabbitMqTransport(url)


CARRIERS = {
    "lane": Carrier("redis", lane, lane_worker, lane_client),
    "bullmq": Carrier("redis", bullmq, bullmq_worker, bullmq_client),
    "db": Carrier("postgres", db),
    "rabbitmq": Carrier("rabbitmq", rabbitmq),
    "emitter": Carrier(None, lambda url: EventEmitterTransport()),
}


async def rounds(once: Callable[[], Awaitable[Any]], lone: int, seconds: float, at_once: int) -> dict[str, Any]:
    """Milliseconds of `lone` round trips one after another, and how many a second with many at once."""
    await asyncio.gather(*(once() for _ in range(at_once)))
    took = []
    for _ in range(lone):
        begun = time.perf_counter()
        await once()
        took.append((time.perf_counter() - begun) * 1e3)
    done, begun = 0, time.perf_counter()

    async def loop() -> None:
        nonlocal done
        while time.perf_counter() - begun < seconds:
            await once()
            done += 1

    await asyncio.gather(*(loop() for _ in range(at_once)))
    return {"ms": took, "rate": done / (time.perf_counter() - begun)}
