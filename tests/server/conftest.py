"""One service for each file of tests, as production has it; and one as development has it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from tests.server.world import Running, running


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(refused_burst=100_000) as found:
        yield found


@pytest.fixture(scope="module")
def key(service: Running) -> str:
    return service.make_app("shop")


@pytest.fixture(scope="module")
def rival(service: Running) -> str:
    """Another tenant's key."""
    return service.make_app("rival")


@pytest.fixture
def client(service: Running, key: str) -> Iterator[httpx2.Client]:
    with service.client(key) as found:
        yield found
