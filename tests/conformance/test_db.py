"""The DB transport passes the suite, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from durable.testing.suites.transport import TransportSuite
from durable.transports.db import DbTransport
from durable.transports.interface import Transport


class TestDbOnSqlite(TransportSuite):
    url = ""

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.url = f"sqlite:///{tmp_path / 'queue.db'}"

    async def build(self) -> Callable[[], Transport]:
        return lambda: DbTransport(self.url, heartbeat_interval=0.02, max_message=2 << 20)


class TestDbOnPostgres(TransportSuite):
    url = ""

    @pytest.fixture(autouse=True)
    def _database(self, postgres_url: str) -> None:
        self.url = postgres_url

    async def build(self) -> Callable[[], Transport]:
        return lambda: DbTransport(self.url, heartbeat_interval=0.02, max_message=2 << 20)


class TestDbOnPostgresByPollingAlone(TransportSuite):
    """Notifications off, as behind a pooler."""

    url = ""

    @pytest.fixture(autouse=True)
    def _database(self, postgres_url: str) -> None:
        self.url = postgres_url

    async def build(self) -> Callable[[], Transport]:
        return lambda: DbTransport(
            self.url, heartbeat_interval=0.02, max_message=2 << 20, notifications=False, poll=0.05
        )
