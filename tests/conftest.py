"""What every test may ask for: services with their remedies, and a budget for suites that could go on for ever.

Tests under tests/simulation, tests/chaos and tests/bench bear those marks by where they stand, and so do those of brokers and
workers, and those of the service.
"""

from __future__ import annotations

import os
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers.pgbouncer import pooled_url, pooler
from tests.servers.postgres import postgres_server, postgres_url
from tests.servers.rabbitmq import _own_rabbit, amqp_url, rabbit, rabbit_server
from tests.servers.redis import redis_server, redis_url
from tests.servers.services import require
from tests.servers.sqs import sqs_server, sqs_url

__all__ = [  # fixtures for all
    "_own_rabbit",
    "amqp_url",
    "pooled_url",
    "pooler",
    "postgres_server",
    "postgres_url",
    "rabbit",
    "rabbit_server",
    "redis_server",
    "redis_url",
    "sqs_server",
    "sqs_url",
]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(name="require")
def require_fixture() -> Callable[[str], None]:
    """`require("redis")` at the start of a test or a fixture."""
    return require


BROKERS = {
    ROOT / "tests" / path
    for path in (
        "transports",
        "worker",
        "workers",
        *(f"conformance/test_{name}.py" for name in ("bullmq", "db", "rabbitmq", "redis_lane", "sqs")),
    )
}
"""Where tests talk to brokers and workers: a suite of its own, file by file, so that one process starts each server."""

HTTP = {ROOT / "tests" / path for path in ("server", "runners", "client")}
"""Where tests talk to the service over its sockets."""


ENGINE = {ROOT / "tests" / "engine", ROOT / "tests" / "runners"}
"""Each of their tests runs hot and cold, in memory and on SQLite; with --rotate two of the four, in turn by commit."""
IN_TURN = [
    {"TestSqlite", "TestPostgres", "TestDbOnPostgres", "TestSqs"},
    {"TestSqliteInline", "TestPostgresPooled", "TestDbOnPostgresByPollingAlone", "TestSqsFifo"},
]
"""The same suite on the same server in another setting; with --rotate one of each pair."""


class Budget:
    """Time to spend on seeds. Starts elsewhere at each commit, so that many short runs see many seeds."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.start = int(os.environ.get("DURABLE_TEST_SEED", "0")) or zlib.crc32(commit().encode()) % 1_000_000
        self._started = time.monotonic()

    def spent(self) -> bool:
        return self.seconds is not None and time.monotonic() - self._started > self.seconds

    def seeds(self, count: int) -> Iterator[int]:
        """`count` seeds, fewer when the budget ends first, but at least one. DURABLE_TEST_SEED names the first."""
        for n in range(count):
            if n and self.spent():
                return
            yield self.start + n


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> Budget:
    return session_budget(request.config)


def session_budget(config: pytest.Config) -> Budget:
    if not hasattr(config, "_durable_budget"):
        seconds = config.getoption("--budget")
        config._durable_budget = Budget(seconds)  # type: ignore[attr-defined]
    return config._durable_budget  # type: ignore[attr-defined, no-any-return]


def commit() -> str:
    """The commit under test, or nothing outside a repository."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget",
        type=float,
        default=None,
        help="seconds for tests marked simulation, chaos or bench; which come first rotates by commit, the rest is skipped",
    )

    parser.addoption(
        "--rotate",
        action="store_true",
        help="of what runs in several settings, run those whose turn it is: the engine's hot and cold, the stores' and brokers'",
    )


def turned_away(item: pytest.Item, first: int) -> bool:
    """Whether another commit runs this one."""
    suite = getattr(item, "cls", None)
    if suite is not None and (ROOT / "tests" / "conformance") in item.path.parents:
        # Postgres as a control plane has that name too, and no other setting.
        return suite.__name__ in IN_TURN[(first + 1) % 2] and item.path.stem != "test_control_planes"
    if not ENGINE.intersection(item.path.parents) or not hasattr(item, "callspec"):
        return False
    if any("residency" in mark.args[0] for mark in item.iter_markers("parametrize")):
        return False  # it says itself in which it runs
    params = item.callspec.params
    if params.get("store_kind") not in ("memory", "sqlite") or "residency" not in params:
        return False
    return (params["store_kind"] == "memory") == (params["residency"] == ("hot", "cold")[first % 2])


def budgeted(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(mark) for mark in ("simulation", "chaos", "bench"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in ("simulation", "chaos", "bench"):
            if (ROOT / "tests" / mark) in item.path.parents:
                item.add_marker(mark)
        if item.path in BROKERS or any(folder in BROKERS for folder in item.path.parents):
            item.add_marker("broker")
        if any(folder in HTTP for folder in item.path.parents):
            item.add_marker("http")
    if config.getoption("--rotate"):
        first = Budget(None).start
        away = [item for item in items if turned_away(item, first)]
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if not turned_away(item, first)]
    if config.getoption("--budget") is not None:
        outgrowing = [item for item in items if budgeted(item)]
        first = session_budget(config).start % max(1, len(outgrowing))
        rotated = iter(outgrowing[first:] + outgrowing[:first])
        items[:] = [next(rotated) if budgeted(item) else item for item in items]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if budgeted(item) and session_budget(item.config).spent():
        pytest.skip("the budget is spent; `python3 dev.py test --all` runs everything")
