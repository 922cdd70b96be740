"""A pooler for tests: pgbouncer in transaction mode, in front of the test server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from durable.store.postgres.binaries import account
from tests.servers.postgres import PostgresServer
from tests.servers.services import require, service

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

service("pgbouncer", lambda: PROGRAM is not None, "apt install pgbouncer, or brew install pgbouncer", optional=True)


class Pooler:
    """Gives each transaction whichever server session is free, and to every session its turn."""

    def __init__(self, server_url: str, folder: Path) -> None:
        target = conninfo_to_dict(server_url)
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        (folder / "users").write_text(f'"{target["user"]}" "{target.get("password") or ""}"\n')
        (folder / "pgbouncer.ini").write_text(
            f"""[databases]
* = host={target["host"]} port={target.get("port", 5432)}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self._port}
unix_socket_dir =
auth_type = trust
auth_file = {folder / "users"}
pool_mode = transaction
default_pool_size = 4
server_round_robin = 1
max_client_conn = 200
logfile = {folder / "log"}
"""
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert PROGRAM is not None
        who = account(os.geteuid(), os.getegid())  # it refuses to be root, as Postgres does
        if who.user is not None:
            for path in (self._folder, *self._folder.iterdir()):
                os.chown(path, who.user, who.group)
        command = who.command(Path(PROGRAM), "-q", str(self._folder / "pgbouncer.ini"))
        self._process = subprocess.Popen(command, **who.options())
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "log").read_text()
                assert time.monotonic() < deadline, "pgbouncer does not listen"
                time.sleep(0.01)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def url(self, database_url: str) -> str:
        """The same database, by way of the pooler."""
        there = conninfo_to_dict(database_url)
        return make_conninfo("", host="127.0.0.1", port=self._port, dbname=there["dbname"], user=there["user"])


@pytest.fixture(scope="session")
def pooler(postgres_server: PostgresServer) -> Iterator[Pooler]:
    require("pgbouncer")
    # Not pytest's own folder: the user it runs as may not look into that.
    with tempfile.TemporaryDirectory(prefix="pooler") as folder:
        pooler = Pooler(postgres_server.url, Path(folder))
        pooler.start()
        yield pooler
        pooler.stop()


@pytest.fixture
def pooled_url(pooler: Pooler, postgres_url: str) -> Iterator[str]:
    """The URL of an empty database, by way of the pooler."""
    yield pooler.url(postgres_url)
    with psycopg.connect(postgres_url, autocommit=True) as cx:  # or it keeps the database from being dropped
        cx.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
            [cx.info.dbname],
        )
