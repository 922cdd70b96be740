"""Every engine test runs hot and with cold forced at every wait, on every store there is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from durable.app import open_store
from tests.engine.world import World, memory_factory

STORES = ["memory", "sqlite"]


def sqlite_factory(path: Path) -> Callable[[], Any]:
    """Handles on one database file."""
    try:
        open_store(f"sqlite:///{path}")
    except ImportError:
        pytest.skip("the SQLite store is not there yet")
    return lambda: open_store(f"sqlite:///{path}")


@pytest.fixture(params=STORES)
def store_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(params=["hot", "cold"])
def residency(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def world(store_kind: str, residency: str, tmp_path: Path) -> AsyncIterator[World]:
    factory = memory_factory() if store_kind == "memory" else sqlite_factory(tmp_path / "durable.db")
    world = World(factory, store_kind, residency == "cold")
    yield world
    await world.close()
