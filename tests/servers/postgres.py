"""A Postgres for tests: one server for the whole run, shared by its workers, and a fresh database for each test.

The private server (durable/store/postgres/embedded.py), or the one of DURABLE_TEST_POSTGRES_URL, a superuser's URL of a
server that tests may make databases on.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

import pytest

from durable.core.errors import StoreError
from durable.store.postgres.binaries import REMEDY, find_binaries
from durable.store.postgres.embedded import EmbeddedPostgres
from tests.servers.services import require, service

SETTINGS = {"shared_buffers": "128MB", "max_connections": "200"}


class PostgresServer(Protocol):
    """What the fixture gives. A test that stops a server makes an EmbeddedPostgres of its own."""

    @property
    def url(self) -> str: ...
    def start(self) -> str: ...
    def stop(self) -> None: ...


class GivenServer:
    """Somebody's server: used, never started or stopped."""

    def __init__(self, url: str) -> None:
        self.url = url

    def start(self) -> str:
        return self.url

    def stop(self) -> None:
        pass


def programs_at_hand() -> bool:
    try:
        find_binaries()
    except StoreError:
        return False
    return os.name != "nt"


def at_hand() -> bool:
    return bool(os.environ.get("DURABLE_TEST_POSTGRES_URL")) or programs_at_hand()


service("embedded-postgres", programs_at_hand, REMEDY)
service("postgres", at_hand, f"{REMEDY}, or name a server's URL as DURABLE_TEST_POSTGRES_URL")


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A running server. With several workers it is one for all: the folder is the same, and the last to leave stops it."""
    require("postgres")
    given = os.environ.get("DURABLE_TEST_POSTGRES_URL")
    if given:
        yield GivenServer(given)
        return
    base = tmp_path_factory.getbasetemp()
    shared: Path = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with EmbeddedPostgres(shared / "postgres", settings=SETTINGS) as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database, gone after the test."""
    with fresh_database(postgres_server.url) as url:
        yield url


@contextmanager
def fresh_database(server_url: str) -> Iterator[str]:
    """A database of its own on a server; dropped at the end, whoever is still connected."""
    import psycopg

    name = f"test_{uuid.uuid4().hex[:16]}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    try:
        yield database_url(server_url, name)
    finally:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def database_url(server_url: str, name: str) -> str:
    """The same server, another database."""
    return urlunsplit(urlsplit(server_url)._replace(path=f"/{name}"))
