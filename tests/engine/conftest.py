"""Every engine test runs hot and with cold forced at every wait, in memory and on SQLite; some on Postgres too."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from durable.opening import open_store
from tests.engine.world import World, memory_factory

STORES = ["memory", "sqlite"]


def sqlite_factory(path: Path) -> Callable[[], Any]:
    """Handles on one database file."""
    return lambda: open_store(f"sqlite:///{path}")


@pytest.fixture(params=STORES)
def store_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


on_postgres = pytest.mark.parametrize("store_kind", [*STORES, "postgres"])
"""For tests of which the store's own part is large."""


once = pytest.mark.parametrize(("store_kind", "residency"), [("memory", "hot")])
"""For tests in which neither store nor residency has a part."""


@pytest.fixture
def database_url(request: pytest.FixtureRequest, store_kind: str) -> str:
    """Of an empty Postgres, for the tests that run there."""
    return str(request.getfixturevalue("postgres_url")) if store_kind == "postgres" else ""


@pytest.fixture(params=["hot", "cold"])
def residency(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def world(store_kind: str, residency: str, tmp_path: Path, database_url: str) -> AsyncIterator[World]:
    if store_kind in ("memory", "postgres"):
        factory = memory_factory() if store_kind == "memory" else lambda: open_store(database_url)
        world = World(factory, store_kind, residency == "cold")
        yield world
        await world.close()
        return
    # In memory where there is such a place: these tests are not about the disk, and a thousand of them wait for it long.
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    with tempfile.TemporaryDirectory(prefix="durable-", dir=fast) as directory:
        world = World(sqlite_factory(Path(directory) / "durable.db"), store_kind, residency == "cold")
        yield world
        await world.close()
