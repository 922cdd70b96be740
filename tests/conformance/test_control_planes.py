"""Every control plane of the house passes the suite."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from durable.control_plane.interface import ControlPlane
from durable.control_plane.local import LocalControlPlane
from durable.testing.suites.control_plane import ControlPlaneSuite
from durable.transports.event_emitter import EventEmitterTransport


class TestLocalControlPlane(ControlPlaneSuite):
    async def build(self) -> Callable[[], ControlPlane]:
        return LocalControlPlane().peer


class TestEventEmitterAsControlPlane(ControlPlaneSuite):
    async def build(self) -> Callable[[], ControlPlane]:
        return EventEmitterTransport().peer


class TestPostgres(ControlPlaneSuite):
    url = ""

    @pytest.fixture(autouse=True)
    def _database(self, postgres_url: str) -> None:
        self.url = postgres_url

    async def build(self) -> Callable[[], ControlPlane]:
        from durable.control_plane.postgres import PostgresControlPlane

        return lambda: PostgresControlPlane(self.url)


class TestRedis(ControlPlaneSuite):
    url = ""

    @pytest.fixture(autouse=True)
    def _server(self, redis_url: str) -> None:
        self.url = redis_url

    async def build(self) -> Callable[[], ControlPlane]:
        from durable.control_plane.redis import RedisControlPlane

        return lambda: RedisControlPlane(self.url)


class TestRedisLaneAsControlPlane(TestRedis):
    async def build(self) -> Callable[[], ControlPlane]:
        from durable.transports.redis import RedisTransport

        return lambda: RedisTransport(self.url)
