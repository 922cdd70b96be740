"""Every transport of the house passes the suite."""

from __future__ import annotations

from collections.abc import Callable

from durable.testing.suites.transport import TransportSuite
from durable.transports.event_emitter import EventEmitterTransport
from durable.transports.interface import Transport


class TestEventEmitter(TransportSuite):
    async def build(self) -> Callable[[], Transport]:
        return EventEmitterTransport(heartbeat_interval=0.02, max_message=2 << 20).peer
