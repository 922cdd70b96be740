"""The Redis lane passes the suite."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from durable.testing.suites.transport import TransportSuite
from durable.transports.interface import Transport


class TestRedisLane(TransportSuite):
    url = ""

    @pytest.fixture(autouse=True)
    def _server(self, redis_url: str) -> None:
        self.url = redis_url

    async def build(self) -> Callable[[], Transport]:
        from durable.transports.redis import RedisTransport

        return lambda: RedisTransport(self.url, heartbeat_interval=0.02)
