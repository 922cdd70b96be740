"""`durable dev`, `durable serve` and `durable worker --pure` as processes: one port, data kept, drains in order."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from durable.cli.main import cli
from tests.cli.world import HERE, durable

ADMIN = "an-admin-token-for-tests"
APP = str(HERE / "small_app.py")


@contextmanager
def process(*arguments: str, cwd: Path, **environment: str) -> Iterator[Popen[str]]:
    found = durable(*arguments, cwd=cwd, env=environment)
    try:
        yield found
    finally:
        found.kill()
        found.communicate()


def started(running: Popen[str]) -> str:
    """The URL that `serve --json` says."""
    assert running.stdout
    line = running.stdout.readline()
    assert line, running.communicate(timeout=10)[1]
    return str(json.loads(line)["url"])


def dev_url(running: Popen[str]) -> str:
    """The URL in the greeting of `dev`."""
    assert running.stdout
    for line in running.stdout:
        if found := re.search(r"API: (http://\S+),", line):
            return found[1]
    raise AssertionError(running.communicate(timeout=10)[1])


def ended(client: httpx2.Client, run_id: str) -> dict[str, Any]:
    with client.stream("GET", f"/runs/{run_id}/stream") as stream:
        for _ in stream.iter_bytes():
            pass
    found: dict[str, Any] = client.get(f"/runs/{run_id}").raise_for_status().json()
    return found


def test_e1_one_command(tmp_path: Path) -> None:
    """E1: `durable dev` has engine and API on one port; what it did is there after the next start."""
    url = f"sqlite:///{tmp_path}/dev.db"
    ids = []
    for _ in range(2):
        with process("dev", APP, "--port", "0", cwd=tmp_path, DURABLE_STORE=url) as running:
            with httpx2.Client(base_url=dev_url(running), timeout=20) as client:
                answer = (
                    client.post("/workflows/small_app/hello/trigger", json={"input": "ann"}).raise_for_status().json()
                )
                assert ended(client, answer["runId"])["result"] == "hello ann"
                ids.append(answer["runId"])
                assert [run["id"] for run in client.get("/runs").json()] == ids[::-1]
            running.send_signal(signal.SIGTERM)
            assert running.wait(20) == 0


def test_dev_without_an_app_is_a_service_too(tmp_path: Path) -> None:
    """Without an app the API is there for remote ones: a workspace can be made, an event published."""
    with process("dev", "--port", "0", cwd=tmp_path, DURABLE_STORE=f"sqlite:///{tmp_path}/dev.db") as running:
        with httpx2.Client(base_url=dev_url(running), timeout=20) as client:
            assert client.post("/api/apps", json={"name": "shop"}).raise_for_status().json()["id"] == "shop.dev"
            assert (
                client.post("/events", json={"name": "x", "app": "shop"}).raise_for_status().json()["triggered"] == []
            )


def test_a_taken_port(tmp_path: Path) -> None:
    """In development the next port is taken where the usual one is not free, and said; one that was asked for is not replaced."""
    url = f"sqlite:///{tmp_path}/dev.db"
    with process("serve", "--port", "0", "--host", "127.0.0.1", "--json", cwd=tmp_path, DURABLE_STORE=url) as first:
        port = started(first).rpartition(":")[2]
        with process("serve", "--port", port, "--host", "127.0.0.1", cwd=tmp_path, DURABLE_STORE=url) as second:
            out, err = second.communicate(timeout=20)
            assert second.returncode == 1
            assert f"error [port_taken]: Port {port}" in err
            assert "Traceback" not in err + out


def test_serve_asks_for_keys(tmp_path: Path) -> None:
    """`durable serve` has no development's conveniences: without a key 401, from this machine too; the admin token makes keys,
    with which everything works."""
    environment = {"DURABLE_STORE": f"sqlite:///{tmp_path}/serve.db", "DURABLE_ADMIN_TOKEN": ADMIN}
    with process("serve", APP, "--host", "127.0.0.1", "--port", "0", "--json", cwd=tmp_path, **environment) as running:
        with httpx2.Client(base_url=started(running), timeout=20) as client:
            assert client.get("/runs").status_code == 401
            assert client.post("/api/apps", json={"name": "shop"}).status_code == 401
            made = client.post("/api/apps", json={"name": "shop"}, headers={"authorization": f"Bearer {ADMIN}"}).json()
            assert made["environment"] == "prod"
            key = {"authorization": f"Bearer {made['signingKey']}"}
            assert client.post("/events", json={"name": "x"}, headers=key).status_code == 200
            assert client.get("/readyz").json()["status"] == "ready"


def test_s38_ready_turns_red_before_the_drain(tmp_path: Path) -> None:
    """S38: at SIGTERM /readyz is 503 while a step under way finishes and requests are answered; then the process ends with 0,
    and the run is completed, once."""
    url = f"sqlite:///{tmp_path}/drain.db"
    with process(
        "dev", APP, "--port", "0", cwd=tmp_path, DURABLE_STORE=url, DURABLE_DRAIN_TIMEOUT_MS="20000"
    ) as running:
        with httpx2.Client(base_url=dev_url(running), timeout=20) as client:
            run_id = client.post("/workflows/small_app/patient/trigger", json={"input": 2.0}).json()["runId"]
            with client.stream("GET", f"/runs/{run_id}/stream") as stream:
                for line in stream.iter_lines():
                    if '"step_status"' in line and '"running"' in line:
                        break
            running.send_signal(signal.SIGTERM)
            seen = set()
            while True:
                ready = client.get("/readyz")
                seen.add(ready.status_code)
                if ready.status_code == 503:
                    break
            assert ready.json()["draining"] is True
            assert client.get(f"/runs/{run_id}").json()["status"] == "running"
        assert running.wait(20) == 0
    with process("dev", APP, "--port", "0", cwd=tmp_path, DURABLE_STORE=url) as again:
        with httpx2.Client(base_url=dev_url(again), timeout=20) as client:
            run = ended(client, run_id)
            assert run["status"] == "succeeded"
            [step] = client.get(f"/runs/{run_id}/steps").json()
            assert step["attempt"] == 1


def test_s38_a_second_signal_forces(tmp_path: Path) -> None:
    """S38: while a drain waits for a long step, a second signal ends the process at once with 130."""
    url = f"sqlite:///{tmp_path}/force.db"
    with process("dev", APP, "--port", "0", cwd=tmp_path, DURABLE_STORE=url) as running:
        with httpx2.Client(base_url=dev_url(running), timeout=20) as client:
            run_id = client.post("/workflows/small_app/patient/trigger", json={"input": 60.0}).json()["runId"]
            with client.stream("GET", f"/runs/{run_id}/stream") as stream:
                next(line for line in stream.iter_lines() if '"step_status"' in line and '"running"' in line)
            running.send_signal(signal.SIGTERM)
            while client.get("/readyz").status_code != 503:
                pass
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 130


def test_a_stream_does_not_hold_up_a_drain(tmp_path: Path) -> None:
    """An open stream ends with the process's drain, and does not keep it from ending."""
    with process("dev", APP, "--port", "0", cwd=tmp_path, DURABLE_STORE=f"sqlite:///{tmp_path}/s.db") as running:
        with httpx2.Client(base_url=dev_url(running), timeout=20) as client:
            run_id = client.post("/workflows/small_app/approval/trigger", json={"input": 1}).json()["runId"]
            lines: list[str] = []
            opened = threading.Event()

            def watch() -> None:
                with client.stream("GET", f"/runs/{run_id}/stream") as stream:
                    for line in stream.iter_lines():
                        lines.append(line)
                        opened.set()

            thread = threading.Thread(target=watch)
            thread.start()
            assert opened.wait(10)
            running.send_signal(signal.SIGTERM)
            thread.join(15)
            assert not thread.is_alive()
        assert running.wait(15) == 0
    assert ": this process is stopping; go on elsewhere" in lines


def test_capacity_only(tmp_path: Path) -> None:
    """`serve` with DURABLE_WORKERS=0 executes nothing; `worker --pure` beside it does, and drains with 0."""
    url = f"sqlite:///{tmp_path}/pure.db"
    with process("dev", APP, "--port", "0", cwd=tmp_path, DURABLE_STORE=url, DURABLE_WORKERS="0") as api:
        with httpx2.Client(base_url=dev_url(api), timeout=20) as client:
            run_id = client.post("/workflows/small_app/hello/trigger", json={"input": "bob"}).json()["runId"]
            assert client.get(f"/runs/{run_id}").json()["status"] == "queued"
            with process("worker", "--pure", APP, "--json", cwd=tmp_path, DURABLE_STORE=url) as worker:
                assert ended(client, run_id)["result"] == "hello bob"
                worker.send_signal(signal.SIGTERM)
                assert worker.wait(20) == 0


def test_settings_reach_the_engine(tmp_path: Path) -> None:
    """A setting that cannot be is one sentence, from whichever command; a file is read."""
    runner = CliRunner()
    result = runner.invoke(cli, ["dev"], env={"DURABLE_LEASE_MS": "soon"})
    assert result.exit_code != 0
    assert "DURABLE_LEASE_MS" in result.stderr
    result = runner.invoke(cli, ["serve", "--config", str(tmp_path / "none.toml")])
    assert "cannot be read" in result.stderr
    result = runner.invoke(cli, ["serve"], env={"DATABASE_URL": "memory://"})
    assert "error [weak_durability]" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["worker"], "--pure"),
        (["worker", "--pure", "--transport", "redis://x"], "no transports"),
        (["worker", "--pure", "--store", "memory://"], "inside one process"),
    ],
)
def test_usage_of_the_worker(arguments: list[str], says: str) -> None:
    """What does not go together is said with what does."""
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code != 0
    assert says in result.stderr
