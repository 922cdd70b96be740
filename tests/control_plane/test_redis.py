"""The control plane on Redis, beyond what every control plane owes: gaps, deafness, who listens, and who may share one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from durable.control_plane import redis_channel
from durable.control_plane.interface import LOOK_EVERYWHERE
from durable.control_plane.redis import RedisControlPlane
from durable.core.errors import DefinitionError, TransportError
from durable.testing.facts import eventually
from durable.testing.suites.control_plane import Heard, cancel
from tests.servers.redis import RedisServer
from tests.servers.services import require


@pytest.fixture
def server() -> Iterator[RedisServer]:
    require("redis")
    server = RedisServer()
    server.start()
    yield server
    server.close()


@asynccontextmanager
async def plane_of(url: str, **options: Any) -> AsyncIterator[tuple[RedisControlPlane, Heard]]:
    plane, heard = RedisControlPlane(url, **options), Heard()
    await plane.start()
    plane.on_control("ear", heard)
    try:
        yield plane, heard
    finally:
        await plane.close()


async def test_after_a_gap_listeners_are_told_to_look_everywhere(redis_url: str) -> None:
    """What was said while the link was down is lost; that it was down is not (S43)."""
    async with plane_of(redis_url) as (plane, heard), Redis.from_url(redis_url) as other:
        await other.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda: heard == [LOOK_EVERYWHERE], "they were told")
        await plane.publish_control(cancel("b", "r"))
        await eventually(lambda: heard.runs() == [None, "r"], "and hear again")


async def test_a_listener_that_hears_nothing_any_more_is_replaced(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link over which nothing comes, though it is open: found by the probe, mended, and told as a gap (S43, B27)."""
    monkeypatch.setattr(redis_channel, "PATIENCE", 0.2)
    async with plane_of(redis_url, probe_every=0.1) as (plane, heard), Redis.from_url(redis_url) as other:
        await other.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda: heard == [LOOK_EVERYWHERE], "it hears")
        # As behind something that has forgotten the subscription: the connection lives, the server sends it nothing.
        channel: Any = plane._channel
        deaf = next(task for task in asyncio.all_tasks() if task.get_name() == "durable-channel-ear")
        monkeypatch.setattr(channel, "_heard_probe", lambda nonce: None)
        await eventually(lambda: plane.deaf is not None, "it has noticed")
        monkeypatch.undo()
        await eventually(lambda: plane.deaf is None and deaf.done(), "another one listens")
        await plane.publish_control(cancel("b", "r"))
        await eventually(lambda: heard.runs()[-1:] == ["r"] and heard.count(LOOK_EVERYWHERE) >= 2, "and hears")


async def test_nobody_waits_for_a_redis_that_is_away(server: RedisServer) -> None:
    """Killed: publishing returns at once and raises nothing, what was said meanwhile is dropped, and it mends itself (S43,
    B28)."""
    async with plane_of(server.url) as (plane, heard):
        server.kill()
        await eventually(lambda: plane.deaf is not None, "it has noticed")
        began = asyncio.get_running_loop().time()
        for number in range(100):
            await plane.publish_control(cancel("b", f"lost{number}"))
        assert asyncio.get_running_loop().time() - began < 1
        server.start()
        await eventually(lambda: plane.deaf is None, "it hears again")
        await plane.publish_control(cancel("b", "r"))
        await eventually(lambda: heard.runs() == [None, "r"], "only what was said since")


async def test_nobody_waits_for_a_redis_that_stands_still(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, its sockets open: publishing returns at once, and closing does not hang."""
    monkeypatch.setattr(redis_channel, "LAST_WORDS_SECONDS", 0.2)
    async with plane_of(server.url) as (plane, _):
        server.pause()
        async with asyncio.timeout(5):
            for number in range(100):
                await plane.publish_control(cancel("b", f"r{number}"))
            await plane.close()
        server.resume()


async def test_the_audience_is_who_listens(redis_url: str) -> None:
    """One alone has none; another that comes is noticed at once, one that goes by the next count, and two engines on one
    instance are an audience for each other."""
    async with plane_of(redis_url, probe_every=0.05) as (plane, _):
        assert not plane.audience
        async with plane_of(redis_url):
            assert plane.audience
        await eventually(lambda: not plane.audience, "it is alone again")
        stop = plane.on_control("another", Heard())
        assert plane.audience
        stop()
        assert not plane.audience
        async with Redis.from_url(redis_url) as other, other.pubsub() as stranger:
            await stranger.subscribe("durable-control")
            await eventually(lambda: plane.audience, "whoever listens is counted, whatever it is")


async def test_what_is_no_control_message_is_passed_over(redis_url: str) -> None:
    """A stranger's text, a kind of a later version, bytes that are no text."""
    async with plane_of(redis_url) as (_, heard), Redis.from_url(redis_url) as other:
        strange = [b"", b"hello", b"{}", b'{"from": "x", "kind": "of a later version"}', b"\xff\xfe", b'{"from": 1}']
        for said in [*strange, b'{"from": "x", "kind": "cancel", "runId": "r", "later": 1}']:
            await other.publish("durable-control", said)
        await eventually(lambda: heard.runs() == ["r"], "the one that is was heard")


async def test_what_cannot_be_said_is_dropped_and_logged_once(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """It harms no other message, and the caller hears nothing of it."""
    async with plane_of(redis_url) as (plane, heard):
        for said in (cancel("a", "\ud800"), cancel("a", "\ud800"), cancel("a", "r")):
            await plane.publish_control(said)
        await eventually(lambda: heard.runs() == ["r"], "the other one came")
        assert len([r for r in caplog.records if "dropped" in r.getMessage()]) == 1


async def test_engines_that_share_an_instance_share_two_connections(redis_url: str) -> None:
    """Each starts and closes it, at the same time too; the last close counts, and it may be started again."""
    plane = RedisControlPlane(redis_url)
    async with Redis.from_url(redis_url) as other:

        async def connections() -> int:
            return sum(one["name"] == "durable-channel" for one in await other.client_list())

        await asyncio.gather(plane.start(), plane.start())
        assert await connections() == 2
        await plane.close()
        heard = Heard()
        plane.on_control("a", heard)
        await plane.publish_control(cancel("b", "still there"))
        await eventually(lambda: heard.runs() == ["still there"], "it was heard")
        await plane.close()
        await until_none(connections)
        await plane.start()
        assert plane.deaf is None
        await plane.close()
        await until_none(connections)


async def until_none(connections: Any) -> None:
    async with asyncio.timeout(5):
        while await connections():
            await asyncio.sleep(0.01)


async def test_other_names_are_other_planes(redis_url: str) -> None:
    """Two deployments on one server keep apart by the channel."""
    async with (
        plane_of(redis_url, channel="a-control") as (mine, _),
        plane_of(redis_url, channel="a-control") as (_, heard),
        plane_of(redis_url, channel="b-control") as (_, stray),
    ):
        await mine.publish_control(cancel("mine", "r"))
        await eventually(lambda: heard.runs() == ["r"], "its own hear it")
        assert stray == []


async def test_a_server_that_is_not_there_is_said(server: RedisServer) -> None:
    """`start` raises with what to do, and leaves nothing running."""
    server.kill()
    plane = RedisControlPlane(server.url)
    with pytest.raises(TransportError, match="Check the URL"):
        await plane.start()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("durable-")]
    with pytest.raises(DefinitionError):
        RedisControlPlane("http://somewhere")
