"""LISTEN and NOTIFY: what is said is heard, soon and in few statements; and whoever cannot hear knows it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from durable.store.postgres.channel import PAYLOAD_MAX, Channel, Connection, channel_name, connector
from durable.testing.facts import eventually
from tests.store.backends import Backends, Proxy

NAME = "durable_test"


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[tuple[Channel, list[str | None]]]:
    """A channel that hears itself, and what it has heard on NAME."""
    channel = Channel(connector(url), NAME, **options)
    heard: list[str | None] = []
    channel.on(NAME, heard.append)
    await channel.start()
    try:
        await eventually(lambda: channel.deaf is None, "it hears itself")
        yield channel, heard
    finally:
        await channel.close()


# -- saying and hearing


async def test_what_one_says_all_hear(postgres_url: str) -> None:
    """In order, by the others and by itself, with payloads of any text."""
    said = ["", "one", "zażółć 🦆", '{"a": "\\u0000"}', "'; DROP TABLE runs; --"]
    async with opened(postgres_url) as (a, heard_a), opened(postgres_url) as (_, heard_b):
        for payload in said:
            a.publish(NAME, payload)
        await eventually(lambda: heard_a == heard_b == said, "both heard everything")


async def test_a_stranger_is_heard(postgres_url: str) -> None:
    """A plain NOTIFY of any client of the database counts as much."""
    async with opened(postgres_url) as (_, heard), Backends(postgres_url) as others:
        await others.notify(NAME, "from psql")
        await eventually(lambda: heard == ["from psql"], "it was heard")


async def test_a_burst_of_the_same_is_said_once(postgres_url: str) -> None:
    """Equal pairs that wait to be sent are one; what differs in name or payload is not."""
    async with opened(postgres_url) as (channel, heard):
        before = channel.statements
        for _ in range(1_000):
            channel.publish(NAME, "x")
            channel.publish(NAME, "y")
            channel.publish("durable_elsewhere", "x")
        await eventually(lambda: len(heard) == 2, "both were heard")
        channel.publish(NAME, "fence")
        await eventually(lambda: "fence" in heard, "what came after")
        assert heard == ["x", "y", "fence"]
        assert channel.statements - before == 2


async def test_ten_thousand_publishes_are_a_few_statements(postgres_url: str) -> None:
    """A burst costs a statement for each megabyte, and loses nothing."""
    async with opened(postgres_url) as (channel, heard):
        before = channel.statements
        burst = [str(n) for n in range(10_000)]
        for payload in burst:
            channel.publish(NAME, payload)
        await eventually(lambda: len(heard) == len(burst), "all were heard")
        assert heard == burst
        assert channel.statements - before <= 2


async def test_large_payloads_are_said_in_bounded_statements(postgres_url: str) -> None:
    """No statement grows past about a megabyte."""
    async with opened(postgres_url) as (channel, heard):
        before = channel.statements
        burst = [f"{n:04}".ljust(PAYLOAD_MAX, ".") for n in range(1_000)]
        for payload in burst:
            channel.publish(NAME, payload)
        await eventually(lambda: len(heard) == len(burst), "all were heard")
        assert heard == burst
        assert 7 <= channel.statements - before <= 12


async def test_payloads_are_measured_in_bytes(postgres_url: str) -> None:
    """7,999 go through, whatever they spell; 8,000 are refused here, as the server would."""
    full = ["a" * 7_999, "é" * 3_999 + "a", "🦆" * 1_999 + "abc"]
    async with opened(postgres_url) as (channel, heard), Backends(postgres_url) as others:
        for payload in full:
            assert len(payload.encode()) == PAYLOAD_MAX
            channel.publish(NAME, payload)
            with pytest.raises(ValueError, match="8000"):
                channel.publish(NAME, payload + "a")
        await eventually(lambda: heard == full, "all were heard, whole")
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            await others.notify(NAME, "a" * 8_000)


@pytest.mark.parametrize("payload", ["a\0b", "\ud800"], ids=["nul", "surrogate"])
async def test_what_no_server_takes_is_refused_at_the_call(postgres_url: str, payload: str) -> None:
    """One bad text would be the end of all that travels with it."""
    async with opened(postgres_url) as (channel, _):
        with pytest.raises(ValueError):
            channel.publish(NAME, payload)


async def test_a_raising_handler_harms_nobody(postgres_url: str) -> None:
    """The others hear; and who has stopped listening does not."""

    def broken(payload: str | None) -> None:
        raise RuntimeError("a bug in a handler")

    channel = Channel(connector(postgres_url), NAME)
    stopped: list[str | None] = []
    heard: list[str | None] = []
    stop = channel.on(NAME, stopped.append)
    channel.on(NAME, broken)
    channel.on(NAME, heard.append)
    await channel.start()
    stop()
    stop()
    channel.publish(NAME, "x")
    await eventually(lambda: heard == ["x"], "it was heard")
    assert stopped == []
    await channel.close()


def test_names_are_ours_and_tell_schemas_apart() -> None:
    """Channels belong to a database; so the schema is part of the name, and any schema gives a name."""
    names = {channel_name("work", schema) for schema in ("durable", "other", "Other", "a b", 'x"; --', "é" * 60)}
    assert len(names) == 6
    assert channel_name("work") == "durable_work"
    assert all(len(name) <= 63 for name in names)
    for bad in ("work", "durable_", "durable_Work", 'durable_a"', "durable_" + "a" * 56):
        with pytest.raises(ValueError, match="named durable_"):
            Channel(connector(""), bad)


# -- losing it


async def test_killed_backends_are_replaced_and_the_gap_is_told(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Both connections die: new ones come, handlers get None once, what is said afterwards is heard; one line says so."""
    async with opened(postgres_url) as (channel, heard), Backends(postgres_url) as others:
        assert len(await others.pids()) == 2
        assert len(await others.terminate()) == 2
        await eventually(lambda: channel.deaf is not None, "it knows")
        assert "lost" in str(channel.deaf)
        await eventually(lambda: channel.deaf is None, "it hears again")
        assert heard == [None]
        channel.publish(NAME, "after")
        await eventually(lambda: heard == [None, "after"], "it is heard")
        assert len(await others.pids()) == 2
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [line.split(":")[0] for line in lines if "missed" in line] == [
        "notifications may be missed, work is found by polling"
    ]


async def test_a_hint_survives_the_death_of_the_connection_it_goes_out_on(postgres_url: str) -> None:
    """A connection that died while nothing was said costs no hint: it is said again on a new one."""
    async with opened(postgres_url) as (speaker, _), Backends(postgres_url) as others:
        await others.terminate()
        async with opened(postgres_url) as (_, heard):
            speaker.publish(NAME, "x")
            await eventually(lambda: "x" in heard, "it was heard")


async def test_a_session_that_stopped_listening_is_noticed(postgres_url: str) -> None:
    """LISTEN undone on the server: the next probe is not heard, a new connection is made, the gap is told."""
    async with opened(postgres_url, probe_every=0.05, probe_patience=0.2) as (channel, heard):
        ear = channel._ear
        assert ear is not None
        await ear.execute("UNLISTEN *")
        await eventually(lambda: channel.deaf is not None, "it knows")
        assert "does not hear what it says itself" in str(channel.deaf)
        await eventually(lambda: channel.deaf is None, "it hears again")
        assert heard == [None]
        assert channel._ear is not ear


async def test_a_pooler_in_transaction_mode_is_named(postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """LISTEN succeeds and is forgotten with its transaction: said in one sentence, once, however often it is tried."""

    class Pooled(psycopg.AsyncConnection[Any]):
        async def execute(self, query: Any, *args: Any, **options: Any) -> Any:
            cursor = await super().execute(query, *args, **options)
            await super().execute("DISCARD ALL")
            return cursor

    connections = 0

    async def connect() -> Connection:
        nonlocal connections
        connections += 1
        return await Pooled.connect(postgres_url, autocommit=True)

    channel = Channel(connect, NAME, probe_every=0.05, probe_patience=0.05)
    await channel.start()
    await eventually(lambda: connections >= 5, "it has tried again and again")
    assert "pooler" in str(channel.deaf)
    await channel.close()
    assert [r.getMessage().count("pooler") for r in caplog.records if r.levelno >= logging.WARNING] == [1]


async def test_a_half_open_link_is_noticed(postgres_url: str) -> None:
    """Open on both ends and nothing comes through: the probe finds out, on either connection, and others take their place."""
    async with Proxy(postgres_url) as proxy, Backends(postgres_url) as others:
        async with opened(proxy.url, probe_every=0.05, probe_patience=0.2) as (channel, heard):
            proxy.freeze()
            await eventually(lambda: None in heard, "it came back, and told of the gap")
            await eventually(lambda: channel.deaf is None, "it hears")
            await others.notify(NAME, "x")
            await eventually(lambda: "x" in heard, "it was heard")
        await proxy.cut()
        await others.none()


async def test_while_the_database_is_away_hints_are_dropped(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Publishing never raises, never waits, keeps nothing, says so once; when the database is back all is as before."""
    async with Proxy(postgres_url) as proxy, opened(proxy.url) as (channel, heard):
        proxy.refusing = True
        await proxy.cut()
        await eventually(lambda: channel.deaf is not None, "it knows")
        tries = proxy.accepted
        while proxy.accepted < tries + 6:
            channel.publish(NAME, "lost")
            await asyncio.sleep(0)
        proxy.refusing = False
        await eventually(lambda: channel.deaf is None, "it is back")
        channel.publish(NAME, "kept")
        await eventually(lambda: "kept" in heard, "it was heard")
        assert None in heard
    assert len([r for r in caplog.records if "are dropped" in r.getMessage()]) == 1
    assert len([r for r in caplog.records if "may be missed" in r.getMessage()]) == 1


# -- beginning and ending


async def test_start_raises_what_connecting_raised() -> None:
    """A wrong address is the caller's to know; and nothing goes on trying behind his back."""
    channel = Channel(connector("postgresql://nobody@127.0.0.1:1/nothing"), NAME)
    with pytest.raises(psycopg.OperationalError):
        await channel.start()
    assert channel.deaf == "It has been closed."
    assert not [task for task in asyncio.all_tasks() if "durable-channel" in task.get_name()]
    with pytest.raises(RuntimeError, match="closed"):
        channel.begin()


async def test_begin_waits_for_the_database_in_the_background(postgres_url: str) -> None:
    """It comes later: then handlers are told that there was a gap."""
    async with Proxy(postgres_url) as proxy:
        proxy.refusing = True
        channel = Channel(connector(proxy.url), NAME)
        heard: list[str | None] = []
        channel.on(NAME, heard.append)
        channel.begin()
        await eventually(lambda: proxy.accepted > 1, "it has tried more than once")
        proxy.refusing = False
        await eventually(lambda: channel.deaf is None, "it hears")
        assert heard == [None]
        await channel.close()


async def test_close_says_what_was_said_before_it(postgres_url: str) -> None:
    """The last words of an engine go out; after it nothing does, and a second close is harmless."""
    async with opened(postgres_url) as (_, heard), opened(postgres_url) as (channel, _):
        channel.publish(NAME, "last words")
        await asyncio.gather(channel.close(), channel.close())
        await channel.close()
        channel.publish(NAME, "nothing")
        await eventually(lambda: heard == ["last words"], "they were heard")


async def test_close_while_connecting(postgres_url: str) -> None:
    """A server that accepts and says nothing does not hold it."""
    async with Proxy(postgres_url) as proxy:
        proxy.mute = True
        channel = Channel(connector(proxy.url), NAME)
        starting = asyncio.create_task(channel.start())
        await eventually(lambda: proxy.accepted, "it connects")
        async with asyncio.timeout(2):
            await channel.close()
            with pytest.raises(RuntimeError, match="closed before"):
                await starting


async def cancelled_after(steps: int, work: Callable[[], Any]) -> bool:
    """Cancel after so many turns of the loop; whether it was still at it."""
    task = asyncio.ensure_future(work())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    return task.cancelled()


async def test_a_start_cancelled_anywhere_leaves_no_connection(postgres_url: str) -> None:
    """At each of its awaits: afterwards the server knows nobody."""
    async with Backends(postgres_url) as others:
        steps, cut = 0, 0
        while True:
            channel = Channel(connector(postgres_url), NAME)
            was_cut = await cancelled_after(steps, channel.start)
            if not was_cut:
                await channel.close()
                break
            steps, cut = steps + 1, cut + 1
        await others.none()
        assert cut > 5


async def test_a_close_anywhere_leaves_no_connection(postgres_url: str) -> None:
    """While it connects, listens, probes, says something, is killed: two connections at most, and none after."""
    async with Backends(postgres_url) as others:
        for steps in range(60):
            channel = Channel(connector(postgres_url), NAME, probe_every=0.001)
            channel.begin()
            for step in range(steps):
                channel.publish(NAME, str(step))
                await asyncio.sleep(0)
                if step == 40:
                    await others.terminate()
            await cancelled_after(steps % 3, channel.close)
            await channel.close()
        await others.none()
        assert not [task for task in asyncio.all_tasks() if "durable-channel" in task.get_name()]


async def test_an_idle_channel_says_nothing_between_probes(postgres_url: str) -> None:
    """One statement for each probe, and no more."""
    async with opened(postgres_url, probe_every=0.1) as (channel, _), opened(postgres_url) as (still, _):
        before = channel.statements
        await eventually(lambda: channel.statements == before + 3, "it has tried itself three times")
        assert still.statements == 1
