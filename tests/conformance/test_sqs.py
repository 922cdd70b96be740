"""The SQS transport passes the suite, on standard queues and on FIFO queues."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import pytest

from durable.testing.suites.transport import TransportSuite
from durable.transports.interface import Transport
from tests.servers.services import require

require("sqs")


class TestSqs(TransportSuite):
    fifo = False

    @pytest.fixture(autouse=True)
    def _server(self, sqs_url: str) -> None:
        self.url = sqs_url

    async def build(self) -> Callable[[], Transport]:
        from durable.transports.sqs import SqsTransport

        prefix = f"suite{uuid4().hex[:8]}"
        return lambda: SqsTransport(
            endpoint_url=self.url, prefix=prefix, fifo=self.fifo, wait=1, visibility=3, timeout=20.0
        )


class TestSqsFifo(TestSqs):
    fifo = True
