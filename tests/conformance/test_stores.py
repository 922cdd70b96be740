"""Every store of the house passes the suite."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from durable import Context, Durable, workflow
from durable.store.interface import Store
from durable.store.postgres import PostgresStore
from durable.testing.suites.store import StoreBuilder, StoreSuite
from durable.testing.suites.store.builder import begin, claimed_ids, new
from tests.store.builders import MemoryBuilder, PostgresBuilder, SqliteBuilder


class TestMemory(StoreSuite):
    @pytest.fixture
    async def builder(self) -> AsyncIterator[StoreBuilder]:
        builder = MemoryBuilder()
        yield builder
        await builder.close()


class TestSqlite(StoreSuite):
    @pytest.fixture
    async def builder(self, tmp_path: Path) -> AsyncIterator[StoreBuilder]:
        builder = SqliteBuilder(tmp_path / "runs.db")
        yield builder
        await builder.close()


class TestSqliteInline(StoreSuite):
    @pytest.fixture
    async def builder(self, tmp_path: Path) -> AsyncIterator[StoreBuilder]:
        builder = SqliteBuilder(tmp_path / "runs.db", inline=True)
        yield builder
        await builder.close()


class TestPostgres(StoreSuite):
    @pytest.fixture
    async def builder(self, postgres_url: str) -> AsyncIterator[StoreBuilder]:
        builder = PostgresBuilder(postgres_url)
        yield builder
        await builder.close()


class TestPostgresPooled(StoreSuite):
    """Through a pooler that gives each transaction another session."""

    @pytest.fixture
    async def builder(self, postgres_url: str, pooled_url: str) -> AsyncIterator[StoreBuilder]:
        builder = PostgresBuilder(postgres_url, pooled_url)
        yield builder
        await builder.close()

    async def test_S43_another_connection_is_hinted(self, store: Store, other: Store) -> None:
        """Nothing is said through a pooler: the work is there for whoever asks."""
        stop = other.listen(lambda: None)
        await begin(store, new())
        assert await claimed_ids(other) == ["r"]
        stop()

    # Nor of anything else: what others are told there is no test of.
    test_S43_a_freed_slot_is_hinted = None  # type: ignore[assignment]
    test_S43_an_events_run_is_hinted = None  # type: ignore[assignment]


async def test_a_workflow_through_a_pooler(pooled_url: str) -> None:
    """An engine behind a transaction-mode pooler starts, sleeps, hears a signal and finishes; another takes part."""

    @workflow(name="pooled")
    async def pooled(ctx: Context) -> Any:
        first = await ctx.step("first", one)
        await asyncio.sleep(0.05)
        return [first, await ctx.wait_for_signal("go")]

    stores = [PostgresStore(pooled_url, notifications=False) for _ in range(2)]
    async with Durable(stores[0], workflows=[pooled], poll_every=0.05) as works:
        async with Durable(stores[1], workflows=[pooled], poll_every=0.05, worker=False) as looks:
            handles = [await looks.start(pooled) for _ in range(10)]
            for handle in handles:
                await handle.signal("go", "on")
            async with asyncio.timeout(20):
                assert [await works.run(handle.id).result() for handle in handles] == [[1, "on"]] * 10


async def one() -> int:
    return 1
