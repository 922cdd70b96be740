"""Every transport of the house passes the suite."""

from __future__ import annotations

from collections.abc import Callable

from durable.core.errors import TransportError
from durable.protocol.messages import RemoteTask, StepResult
from durable.testing.suites.transport import TransportSuite
from durable.transports.event_emitter import EventEmitterTransport
from durable.transports.interface import Transport
from durable.transports.pool import TransportPool


class TestEventEmitter(TransportSuite):
    async def build(self) -> Callable[[], Transport]:
        return EventEmitterTransport(heartbeat_interval=0.02, max_message=2 << 20).peer


def _emitter() -> EventEmitterTransport:
    return EventEmitterTransport(heartbeat_interval=0.02, max_message=2 << 20)


class _Refusing(EventEmitterTransport):
    """Takes nothing."""

    async def dispatch(self, task: RemoteTask) -> None:
        raise TransportError("the first one takes nothing")

    async def reply(self, result: StepResult) -> None:
        raise TransportError("the first one takes nothing")


class TestPoolOfOne(TransportSuite):
    async def build(self) -> Callable[[], Transport]:
        only = _emitter()
        return lambda: TransportPool({"default": only.peer()})


class TestPool(TransportSuite):
    async def build(self) -> Callable[[], Transport]:
        first, second = _emitter(), _emitter()
        return lambda: TransportPool({"default": first.peer(), "spare": second.peer()})


class TestPoolWhoseFirstMemberFails(TransportSuite):
    async def build(self) -> Callable[[], Transport]:
        second = _emitter()
        return lambda: TransportPool({"broken": _Refusing(), "default": second.peer()})
