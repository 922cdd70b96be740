"""RabbitMQ passes the suites of a transport and of a control plane."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import pytest

from durable.control_plane.interface import ControlPlane
from durable.testing.suites.control_plane import ControlPlaneSuite
from durable.testing.suites.transport import TransportSuite
from durable.transports.interface import Transport
from durable.transports.rabbitmq import RabbitMqTransport


class _OnRabbitMq:
    url = ""

    @pytest.fixture(autouse=True)
    def _broker(self, amqp_url: str) -> None:
        self.url = amqp_url

    def end(self) -> Callable[[], RabbitMqTransport]:
        prefix = f"t{secrets.token_hex(4)}"
        return lambda: RabbitMqTransport(self.url, prefix=prefix, heartbeat_interval=0.02, max_message=2 << 20)


class TestTransport(_OnRabbitMq, TransportSuite):
    async def build(self) -> Callable[[], Transport]:
        return self.end()


class TestControlPlane(_OnRabbitMq, ControlPlaneSuite):
    async def build(self) -> Callable[[], ControlPlane]:
        return self.end()
