"""Engines in two processes that reach each other through Redis alone: their store gives no hints."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from redis.asyncio import Redis

from durable import Durable, RunCancelled
from durable.control_plane.redis import RedisControlPlane
from durable.core.errors import DefinitionError
from durable.core.journal import Entry
from durable.store.postgres import PostgresStore
from durable.testing.facts import eventually
from durable.testing.suites.control_plane import Heard
from tests.engine.far_node import far
from tests.engine.test_control_plane import FAR
from tests.engine.test_control_plane_postgres import far_node
from tests.servers.redis import RedisServer
from tests.servers.services import require


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A Redis of the test's own, to be killed."""
    require("redis")
    server = RedisServer()
    server.start()
    yield server
    server.close()


def looker(url: str, redis: str, poll_every: float) -> Durable:
    """A pod that executes nothing, whose store is deaf."""
    store = PostgresStore(url, notifications=False)
    return Durable(store, workflows=[far], control_plane=redis, poll_every=poll_every, worker=False)


async def all_of(app: Durable, run_id: str) -> list[Entry]:
    return [entry async for entry in app.watch(run_id)]


@pytest.mark.parametrize("killing", [False, True], ids=["calm", "killed"])
async def test_N10_a_pod_without_work_tails_and_cancels_over_redis(
    postgres_url: str, redis_url: str, killing: bool
) -> None:
    """Two processes, nothing but Redis between them: the tail is whole and the body sees the cancel long before any poll;
    also while all that either listens on is killed (S43, B28)."""
    looks = looker(postgres_url, redis_url, FAR)
    async with looks, far_node(postgres_url, redis_url, str(FAR)) as hears, Redis.from_url(redis_url) as other:
        await hears("ready")
        handle = await looks.start(far)
        tail = asyncio.create_task(all_of(looks, handle.id))
        await hears("began")
        if killing:
            await other.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        asked = asyncio.get_running_loop().time()
        assert await looks.run(handle.id).cancel()
        await hears("cancelled")
        with pytest.raises(RunCancelled):
            await looks.run(handle.id).result(10)
        seen = await tail
        assert asyncio.get_running_loop().time() - asked < FAR / 3
        assert [entry.seq for entry in seen] == list(range(1, len(seen) + 1))
        assert seen[-1].status == "cancelled"


async def test_N10_without_redis_work_goes_on_by_polling_and_with_it_by_pushes(
    postgres_url: str, server: RedisServer
) -> None:
    """Killed under both processes: a cancel still arrives, by the poll. Started again: both hear each other again (S43,
    B28)."""
    looks = looker(postgres_url, server.url, 0.5)
    async with looks, far_node(postgres_url, server.url, "0.5") as hears:
        await hears("ready")
        server.kill()
        handle = await looks.start(far)
        await hears("began")
        assert await looks.run(handle.id).cancel()
        await hears("cancelled")
        with pytest.raises(RunCancelled):
            await looks.run(handle.id).result(10)
        server.start()
        async with Redis.from_url(server.url) as other:
            await until_two_listen(other)
        plane = looks.engine.deps.control_plane
        assert isinstance(plane, RedisControlPlane)
        heard = Heard()
        plane.on_control("ear", heard)
        handle = await looks.start(far)
        await hears("began")
        await looks.run(handle.id).cancel()
        await hears("cancelled")
        ends = {"type": "run.cancelled", "runId": handle.id}
        await eventually(
            lambda: any(message.event is not None and ends.items() <= message.event.items() for message in heard),
            "the other process has told of the run's end",
        )


async def until_two_listen(other: Redis) -> None:
    async with asyncio.timeout(20):
        while dict(await other.pubsub_numsub("durable-control")).get(b"durable-control") != 2:
            await asyncio.sleep(0.02)


async def test_N9_a_redis_url_is_a_control_plane(redis_url: str) -> None:
    """`redis://` and `rediss://` are understood; what no driver could read is refused before anything is opened."""
    async with Durable("memory://", control_plane=redis_url) as app:
        assert isinstance(app.engine.deps.control_plane, RedisControlPlane)
    with pytest.raises(DefinitionError, match="control plane cannot be"):
        async with Durable("memory://", control_plane="rediss://host/0?socket_timeout=soon"):
            pass
