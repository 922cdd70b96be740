"""Every engine test runs hot and with cold forced at every wait, on every store there is."""

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


@pytest.fixture(params=["hot", "cold"])
def residency(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def world(store_kind: str, residency: str, tmp_path: Path) -> AsyncIterator[World]:
    if store_kind == "memory":
        world = World(memory_factory(), store_kind, residency == "cold")
        yield world
        await world.close()
        return
    # In memory where there is such a place: these tests are not about the disk, and a thousand of them wait for it long.
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    with tempfile.TemporaryDirectory(prefix="durable-", dir=fast) as directory:
        world = World(sqlite_factory(Path(directory) / "durable.db"), store_kind, residency == "cold")
        yield world
        await world.close()
