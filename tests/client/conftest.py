"""One service for each file of tests, with the small workflows in a workspace of its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.server.world import Running, running


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(refused_burst=100_000) as found:
        yield found


@pytest.fixture(scope="module")
def key(service: Running) -> str:
    return service.make_app("shop")


@pytest.fixture
def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
