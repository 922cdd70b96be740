"""Every store of the house passes the suite."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from durable.testing.suites.store import StoreBuilder, StoreSuite
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
