"""The heartbeat over links that hang: nobody is told, so the store has to notice by itself, within the lease."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest

from durable.core.clock import SECOND
from durable.core.errors import StoreUnavailable
from durable.store.postgres import PostgresStore
from durable.store.postgres.connection import translate
from tests.chaos.proxy import Proxy

LEASE = 3.0
BEATEN = int(LEASE * SECOND)

pytestmark = pytest.mark.service


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[Proxy]:
    with Proxy(postgres_url) as proxy:
        yield proxy


@pytest.fixture
async def store(proxy: Proxy) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(proxy.url, pool_max=3)
    await store.open()
    yield store
    proxy.heal()
    await store.close()


async def test_D7_a_heartbeat_that_is_never_answered(store: PostgresStore, proxy: Proxy) -> None:
    """It fails in time, and the next one, over a new connection, renews the very lease."""
    assert (await asyncio.to_thread(store.beat, "a", BEATEN)).alive
    proxy.stop(new=False)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await asyncio.to_thread(store.beat, "a", BEATEN)
    assert (await asyncio.to_thread(store.beat, "a", BEATEN)).alive
    assert time.monotonic() - began < LEASE


async def test_D7_what_lies_idle_is_not_lent_after_a_silence(store: PostgresStore, proxy: Proxy) -> None:
    """Connections of the time before hang as well: each would hold a call for as long as calls may last."""
    await asyncio.gather(*(store.owned("a") for _ in range(3)))
    await asyncio.to_thread(store.beat, "a", BEATEN)
    proxy.stop(new=False)
    with pytest.raises(StoreUnavailable):
        await asyncio.to_thread(store.beat, "a", BEATEN)
    await asyncio.to_thread(store.beat, "a", BEATEN)
    async with asyncio.timeout(LEASE):
        assert await asyncio.gather(*(store.owned("a") for _ in range(3))) == [[], [], []]


async def test_D7_a_call_under_way_is_cut_with_it(store: PostgresStore, proxy: Proxy) -> None:
    """Once a new connection is answered, a call asked as long ago as the silent heartbeat is told, and may be repeated."""
    await asyncio.to_thread(store.beat, "a", BEATEN)
    await store.owned("a")
    proxy.stop(new=False)
    asked = asyncio.ensure_future(store.leave("nobody"))
    await asyncio.sleep(0)  # it is under way before the heartbeat
    with pytest.raises(StoreUnavailable):
        await asyncio.to_thread(store.beat, "a", BEATEN)
    await asyncio.to_thread(store.beat, "a", BEATEN)
    async with asyncio.timeout(LEASE):
        with pytest.raises(StoreUnavailable):
            await asked


async def test_D7_a_server_that_is_silent_altogether_is_waited_for(store: PostgresStore, proxy: Proxy) -> None:
    """As long as new connections are not answered either, nothing is cut: what is under way may still be done."""
    await asyncio.to_thread(store.beat, "a", BEATEN)
    await store.owned("a")
    proxy.stop()
    asked = asyncio.ensure_future(store.leave("nobody"))
    await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable):
        await asyncio.to_thread(store.beat, "a", BEATEN)
    proxy.heal()
    async with asyncio.timeout(LEASE):
        await asked


async def test_D7_leaving_over_a_dead_link_holds_nobody_up(store: PostgresStore, proxy: Proxy) -> None:
    """While the lock is given back over a link that hangs, the loop turns."""
    await asyncio.to_thread(store.beat, "a", BEATEN)
    proxy.stop(new=False)
    store._db.distrust(0.0)  # the pool knows already; the heart does not
    leaving = asyncio.ensure_future(store.leave("a"))
    longest = 0.0
    while not leaving.done():
        began = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - began)
    await leaving
    assert longest < 0.5


def test_S39_a_query_without_a_result_may_have_been_done() -> None:
    """What the driver says when a connection ends at the wrong moment is unavailable; the server's own inner errors are not."""
    assert isinstance(translate(psycopg.InternalError("got no result from the query")), StoreUnavailable)
    assert not isinstance(translate(psycopg.errors.DataCorrupted("invalid page")), StoreUnavailable)
