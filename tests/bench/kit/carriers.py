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


TABLES = "CREATE TABLE IF NOT EXISTS raw_{} (id bigserial PRIMARY KEY, k text, d text, claimed_at timestamptz)"
CLAIM = (
    "UPDATE raw_{0} SET claimed_at = clock_timestamp() WHERE id IN"
    " (SELECT id FROM raw_{0} WHERE claimed_at IS NULL ORDER BY id LIMIT 100 FOR UPDATE SKIP LOCKED) RETURNING id, k, d"
)


class Rows:
    """psycopg: one connection that writes and claims, one that hears; what is to be written meanwhile is one statement."""

    def __init__(self, connection: Any, table: str) -> None:
        self._connection, self._table = connection, table
        self._new = asyncio.Event()
        self._new.set()

    @classmethod
    async def open(cls, url: str, table: str) -> Rows:
        from psycopg import AsyncConnection

        connection = await AsyncConnection.connect(url, autocommit=True)
        await connection.execute("SELECT pg_advisory_lock(1)")
        await connection.execute(TABLES.format("tasks") + ";" + TABLES.format("results"))
        await connection.execute("SELECT pg_advisory_unlock(1)")
        rows = cls(connection, table)
        hearing = await AsyncConnection.connect(url, autocommit=True)
        await hearing.execute(f"LISTEN raw_{table}")  # type: ignore[arg-type]
        rows._hearing = asyncio.create_task(rows._hear(hearing))
        return rows

    async def _hear(self, connection: Any) -> None:
        async for _ in connection.notifies():
            self._new.set()

    async def run(self, query: str, values: Any = None) -> list[Any]:
        cursor = await self._connection.execute(query, values)
        return await cursor.fetchall() if cursor.description else []

    async def claim(self) -> list[Any]:
        """The next ones, at most 100, waiting for the first."""
        while True:
            self._new.clear()
            if claimed := await self.run(CLAIM.format(self._table)):
                if len(claimed) == 100:
                    self._new.set()
                return claimed
            await self._new.wait()


async def db_worker(url: str) -> None:
    """A batch is claimed in one statement; its results are written, its tasks deleted and its client told in another."""
    tasks = await Rows.open(url, "tasks")
    answer = (
        "WITH given AS (SELECT * FROM unnest(%b::bigint[], %b::text[], %b::text[]) AS rows (id, k, d)),"
        " done AS (DELETE FROM raw_tasks USING given WHERE raw_tasks.id = given.id),"
        " told AS (INSERT INTO raw_results (k, d) SELECT k, d FROM given) SELECT pg_notify('raw_results', '')"
    )
    while True:
        await tasks.run(answer, list(map(list, zip(*await tasks.claim(), strict=True))))


async def db_client(url: str) -> ROUND:
    """What is sent while a statement is under way goes in the next; results are claimed in batches and deleted in batches."""
    results, sending = await Rows.open(url, "results"), await Rows.open(url, "nothing")
    waiting: dict[str, asyncio.Future[bytes]] = {}
    outgoing: list[tuple[str, str]] = []
    wake = asyncio.Event()
    number = 0

    async def send() -> None:
        while True:
            await wake.wait()
            wake.clear()
            batch, outgoing[:] = list(outgoing), []
            await sending.run(
                "WITH sent AS (INSERT INTO raw_tasks (k, d) SELECT * FROM unnest(%b::text[], %b::text[]))"
                " SELECT pg_notify('raw_tasks', '')",
                list(map(list, zip(*batch, strict=True))),
            )

    async def read() -> None:
        while True:
            claimed = await results.claim()
            for _, key, data in claimed:
                waiting.pop(key).set_result(data.encode())
            await results.run("DELETE FROM raw_results WHERE id = ANY(%b)", [[id for id, _, _ in claimed]])

    kept = [asyncio.create_task(send()), asyncio.create_task(read())]

    async def once(data: bytes) -> bytes:
        nonlocal number
        number += 1
        key = str(number)
        future = waiting[key] = asyncio.get_running_loop().create_future()
        outgoing.append((key, data.decode()))
        wake.set()
        return await future

    once.kept = kept  # type: ignore[attr-defined]
    return once


def rabbitmq(url: str) -> Transport:
    from durable.transports.rabbitmq import RabbitMqTransport

    return RabbitMqTransport(url)


async def rabbitmq_queue(url: str, name: str) -> tuple[Any, Any]:
    """aio-pika: a channel with confirms and a prefetch of 100, a queue that is replicated and kept."""
    from aio_pika import connect_robust

    channel = await (await connect_robust(url)).channel(publisher_confirms=True)
    await channel.set_qos(prefetch_count=100)
    queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
    return channel, queue


async def rabbitmq_worker(url: str) -> None:
    """aio-pika: a task is acknowledged once its answer is confirmed."""
    from aio_pika import DeliveryMode, Message

    channel, tasks = await rabbitmq_queue(url, "raw-tasks")

    async def work(message: Any) -> None:
        answer = Message(message.body, correlation_id=message.correlation_id, delivery_mode=DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(answer, "raw-results")
        await message.ack()

    await tasks.consume(work)
    await asyncio.Event().wait()


async def rabbitmq_client(url: str) -> ROUND:
    """aio-pika: a job is sent once it is confirmed, an answer acknowledged once it was taken."""
    from aio_pika import DeliveryMode, Message

    channel, _ = await rabbitmq_queue(url, "raw-tasks")
    _, results = await rabbitmq_queue(url, "raw-results")
    waiting: dict[str, asyncio.Future[bytes]] = {}
    number = 0

    async def take(message: Any) -> None:
        waiting.pop(message.correlation_id).set_result(message.body)
        await message.ack()

    await results.consume(take)

    async def once(data: bytes) -> bytes:
        nonlocal number
        number += 1
        key = str(number)
        future = waiting[key] = asyncio.get_running_loop().create_future()
        job = Message(data, correlation_id=key, delivery_mode=DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(job, "raw-tasks")
        return await future

    return once


CARRIERS = {
    "lane": Carrier("redis", lane, lane_worker, lane_client),
    "bullmq": Carrier("redis", bullmq, bullmq_worker, bullmq_client),
    "db": Carrier("postgres", db, db_worker, db_client),
    "rabbitmq": Carrier("rabbitmq", rabbitmq, rabbitmq_worker, rabbitmq_client),
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
    rate = done / (time.perf_counter() - begun)
    return {"ms": took, "rate": rate, "rounds": at_once + lone + done}
