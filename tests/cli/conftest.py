"""A store with a run of every kind: shared, or one's own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.cli.world import World, fill


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Shared and only looked at; a test that changes runs takes `own_world`."""
    made = World(f"sqlite:///{tmp_path_factory.mktemp('world')}/runs.db")
    asyncio.run(fill(made))
    return made


@pytest.fixture
def own_world(tmp_path: Path) -> World:
    made = World(f"sqlite:///{tmp_path}/runs.db")
    asyncio.run(fill(made))
    return made
