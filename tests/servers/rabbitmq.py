"""A RabbitMQ for tests: one broker for the whole run; each test takes a prefix of its own.

Started from Debian's package or from PATH, as whoever runs the tests, in a folder of its own, with an epmd of its own (the
daemon by which Erlang's programs find each other), so that nothing stays behind. AMQP_URL names a broker to use instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.process import ServerProcess, free_port
from tests.servers.services import require, service

REMEDY = "apt install rabbitmq-server, or name a broker as AMQP_URL"
FOLDER = Path("/usr/lib/rabbitmq/bin")
"""Where Debian keeps the programs themselves; those on PATH insist on root."""


def program(name: str) -> str | None:
    """A program of the broker's, or None."""
    return str(FOLDER / name) if (FOLDER / name).exists() else shutil.which(name)


def at_hand() -> bool:
    own = program("rabbitmq-server") is not None and shutil.which("epmd") is not None
    return bool(os.environ.get("AMQP_URL")) or own


service("rabbitmq", at_hand, REMEDY)


class RabbitServer(ServerProcess):
    """A broker of one's own. Killed and started again, it has what was durable."""

    def __init__(self) -> None:
        port, distribution, registry = free_port(), free_port(), free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="durable-rabbit-"))
        (self.folder / "enabled_plugins").write_text("[].\n")
        self.node = f"durable{port}@localhost"
        env = {
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            # The program in this very process, not below a shell that a kill would leave it without.
            "RABBITMQ_ALLOW_INPUT": "true",
            "RABBITMQ_SERVER_START_ARGS": "-noinput -start_epmd false",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none",
            "RABBITMQ_CTL_ERL_ARGS": "+S 1:1 -start_epmd false",
            "HOME": str(self.folder),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(registry),
        }
        found, epmd = program("rabbitmq-server"), shutil.which("epmd")
        assert found is not None
        assert epmd is not None
        self._epmd = ServerProcess([epmd, "-port", str(registry)], registry, env=env)
        self._epmd.start()
        super().__init__([found], port, env=env)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def control(self, *words: str) -> str:
        """`rabbitmqctl`, on this node."""
        found = program("rabbitmqctl")
        assert found is not None
        done = subprocess.run(
            [found, "-n", self.node, *words], env=self._env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def wrote(self, queue: str) -> bool:
        """Whether its list of quorum queues on disk has this one."""
        return any(queue.encode() in listed.read_bytes() for listed in self.folder.glob("data/*/quorum/*/names.dets"))

    def close(self) -> None:
        super().close()
        self._epmd.close()
        for _ in range(20):  # what it has started goes a moment later
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(0.1)


@pytest.fixture(scope="session")
def _own_rabbit() -> Iterator[RabbitServer]:
    require("rabbitmq")
    server = RabbitServer()
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def rabbit_server(request: pytest.FixtureRequest) -> str:
    """The URL of a running broker."""
    given = os.environ.get("AMQP_URL")
    if given:
        return given
    own: RabbitServer = request.getfixturevalue("_own_rabbit")
    return own.url


@pytest.fixture
def amqp_url(rabbit_server: str) -> str:
    """The URL of a running broker. Use a prefix of your own: queues stay."""
    return rabbit_server


@pytest.fixture
def rabbit(_own_rabbit: RabbitServer) -> RabbitServer:
    """The broker itself, to be harmed, and to be left as it was found: the others have the same."""
    return _own_rabbit
