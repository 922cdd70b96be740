"""The BullMQ transport passes the suite, on a real Redis."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import pytest

from durable.testing.suites.transport import TransportSuite
from durable.transports.bullmq import BullMQTransport
from durable.transports.interface import Transport


class TestBullMQ(TransportSuite):
    @pytest.fixture(autouse=True)
    def _server(self, redis_url: str) -> None:
        self.url = redis_url

    async def build(self) -> Callable[[], Transport]:
        prefix = f"suite-{secrets.token_hex(4)}"
        return lambda: BullMQTransport(self.url, prefix=prefix, heartbeat_interval=0.02, max_message=2 << 20)
