"""`durable worker` on the command line: what it says, and what it says when it cannot. Its life is in tests/worker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from durable import Durable
from durable.cli.main import cli
from durable.cli.worker import _concurrency, _named
from durable.worker.adaptive import Adaptive
from tests.cli.world import ROOT, durable
from tests.servers.process import free_port
from tests.worker.engine_node import relay

DRIVERS = [
    ("redis://host", "redis", "redis"),
    ("bullmq://host", "redis", "redis"),
    ("amqp://host", "aio_pika", "rabbitmq"),
    ("sqs://eu-west-1", "aiobotocore", "sqs"),
    ("postgresql://host/db", "psycopg", "postgres"),
]
APP = str(ROOT / "tests" / "worker" / "steps_app.py")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["worker", *arguments], prog_name="durable")


def test_help_shows_how_it_is_used() -> None:
    """Options, their environment variables, examples and exit codes."""
    text = run("--help").output
    for word in ("DURABLE_TRANSPORT", "durable worker orders:app --transport redis://localhost", "--partition", "130"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "exit", "words"),
    [
        ([APP], 1, "A worker needs a transport"),
        (
            [APP, "--transport", "carrier-pigeon://roof"],
            1,
            "No transport is known for 'carrier-pigeon://roof'. Give redis://",
        ),
        ([APP, "--transport", "redis://:secret@host?speed=9"], 1, "no option 'speed'"),
        ([APP, "--transport", "redis://host?lease=soon"], 1, "'soon' is not a duration"),
        ([APP, "--transport", "redis://a", "--transport", "redis://b"], 2, "Two transports are called default"),
        ([APP, "--transport", "redis://a", "--concurrency", "many"], 2, "a number from 1, or auto, not many"),
        ([APP, "--prefix", "shop"], 2, "for a --transport given here"),
        ([APP, "--transport", "redis://a", "--drain-timeout", "soon"], 1, "'soon' is not a duration"),
        ([APP, "--transport", "redis://a", "--control-plane", "smoke://hill"], 1, "No control plane is known for"),
        (["no_such_module:app", "--transport", "redis://a"], 2, "no module no_such_module"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_sentence(arguments: list[str], exit: int, words: str) -> None:
    """Each mistake ends with its code and one sentence; no traceback, no password."""
    result = run(*arguments)
    assert result.exit_code == exit, result.output
    assert words in result.output
    assert "Traceback" not in result.output
    assert "secret" not in result.output


def test_B55_a_transport_that_is_not_there_ends_it_with_a_sentence() -> None:
    """(B55) Redis unreachable at the start: it exits with 1, says so, and does not hang."""
    result = run(APP, "--transport", f"redis://127.0.0.1:{free_port()}")
    assert result.exit_code == 1
    assert "transport_error" in result.output
    assert "Traceback" not in result.output


def test_a_file_that_starts_itself_when_imported_is_told_how_not_to(tmp_path: Path) -> None:
    """The sentence names the guard, and no warning of Python's own follows it."""
    (tmp_path / "eager.py").write_text(
        "import asyncio\nfrom durable import Durable\napp = Durable()\n"
        "async def main() -> None:\n    pass\nasyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "from durable.cli.main import main; main()", "worker", "eager.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert 'if __name__ == "__main__":' in done.stderr
    assert "eager.py:6" in done.stderr
    assert "never awaited" not in done.stderr


def test_an_app_without_steps_is_said(tmp_path: Path) -> None:
    """Nothing to serve is an error, and not a process that idles."""
    (tmp_path / "bare.py").write_text("from durable import Durable\napp = Durable()\n")
    result = run(str(tmp_path / "bare.py"), "--transport", "event-emitter://")
    assert result.exit_code == 1
    assert "no steps to serve: put @durable_step" in result.output


@pytest.mark.parametrize(("url", "driver", "extra"), DRIVERS, ids=[url.partition(":")[0] for url, _, _ in DRIVERS])
def test_a_missing_driver_names_what_to_install(url: str, driver: str, extra: str, tmp_path: Path) -> None:
    """`pip install 'durable[…]'`, whichever transport needs one."""
    script = f"import sys; sys.modules[{driver!r}] = None; from durable.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "worker", APP, "--transport", url],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert f"pip install 'durable[{extra}]'" in done.stderr


def test_transports_and_concurrency_are_read() -> None:
    """`name=URL`, a URL whose query has an equals sign, a number, auto."""
    assert _named(["redis://h?prefix=a"]) == {"default": "redis://h?prefix=a"}
    assert _named(["fast=redis://h", "slow=sqs://eu"]) == {"fast": "redis://h", "slow": "sqs://eu"}
    assert _concurrency("7") == 7
    assert isinstance(_concurrency("auto"), Adaptive)


def test_a_transport_that_stays_inside_is_warned_of(tmp_path: Path) -> None:
    """It serves, for what it is worth, says that no engine elsewhere will be heard, and ends with 0."""
    process = durable("worker", APP, "--transport", "event-emitter://", cwd=tmp_path)
    try:
        assert process.stdout
        head = [process.stdout.readline() for _ in range(3)]
        assert "over default (event-emitter://)" in head[0]
        assert "greet" in head[1]
        assert "Ctrl-C drains" in head[2]
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert "Stopped. Tasks: none" in out
    assert "stays inside this process" in errors
    assert "Draining" in errors
    assert "never-opened.db" not in {path.name for path in tmp_path.iterdir()}


@pytest.mark.service
@pytest.mark.broker
def test_a_line_for_each_task(redis_url: str, tmp_path: Path) -> None:
    """Name, run, attempt, time and outcome: for people, and as JSON with the same facts."""

    async def call(name: str, value: Any) -> None:
        async with Durable("memory://", workflows=[relay], transport=redis_url) as app:
            run = await app.start(relay, [name, value])
            await app.engine.wait(run.id, 20)

    for options in ((), ("--json",)):
        process = durable("worker", APP, "--transport", redis_url, *options, cwd=tmp_path)
        try:
            assert process.stdout
            for line in process.stdout:
                if "Ctrl-C drains" in line or '"started"' in line:
                    break
            asyncio.run(call("broken", None))
            line = process.stdout.readline()
            if options:
                row = json.loads(line)
                assert (row["name"], row["attempt"], row["outcome"]) == ("broken", 1, "failed")
                assert row["error"]["message"] == "cannot bear it"
            else:
                assert "broken  attempt 1" in line
                assert "failed: ValueError: cannot bear it" in line
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.communicate()


@pytest.mark.service
@pytest.mark.broker
def test_a_module_app_is_served_with_its_providers(redis_url: str, tmp_path: Path) -> None:
    """`durable worker MODULE:AppModule` makes the providers that have the steps, and stops them at the end."""
    (tmp_path / "mod.py").write_text(
        "from durable import durable_step\n"
        "from durable.module import module\n"
        "class Prices:\n"
        "    def __init__(self) -> None: self.factor = 3\n"
        "class Shop:\n"
        "    def __init__(self, prices: Prices) -> None: self.prices = prices\n"
        "    @durable_step('shop.price')\n"
        "    async def price(self, n: int) -> int: return n * self.prices.factor\n"
        "    async def on_stop(self) -> None: print('the shop is closed', flush=True)\n"
        "@module(providers=[Prices, Shop])\n"
        "class AppModule: ...\n"
    )
    process = durable("worker", "mod:AppModule", "--transport", redis_url, "--json", cwd=tmp_path)
    try:
        assert process.stdout
        started = json.loads(process.stdout.readline())
        assert (started["steps"], started["transports"]) == (["shop.price"], {"default": "redis"})

        async def call() -> Any:
            async with Durable("memory://", workflows=[relay], transport=redis_url) as app:
                return await app.start_and_wait(relay, ["shop.price", 7], timeout=20)

        assert asyncio.run(call()) == 21
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
