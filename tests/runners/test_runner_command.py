"""`durable runner`, as a process: dialling and serving, drained, forced, and what it says when it cannot."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from durable.cli.main import cli
from durable.testing.facts import eventually
from tests.runners.little_engine import LittleEngine
from tests.runners.test_runner_connecting import Engine
from tests.runners.test_runner_serving import Asking, Book, listening
from tests.worker.test_process import started

APP = str(Path(__file__).parent / "runner_app.py")
KEY = "dk_shop.dev_secret"


async def test_it_dials_and_drains(tmp_path: Path) -> None:
    """Connected, it runs passes; the first signal lets the one under way finish, and the process ends with 0."""
    engine = Engine()
    await engine.start()
    command = ("-m", "durable", "runner", APP, "--connect", engine.url, "--as", "shop.dev", "--json")
    async with started(*command, cwd=tmp_path, DURABLE_REGION="ams") as process:
        said = await process.said(kind="started")
        assert (said["app"], said["workflows"], said["connect"]) == ("shop.dev", ["adds", "waits"], engine.url)
        await process.said(kind="connected")
        await eventually(lambda: engine.registered != [])
        assert engine.registered[0]["region"] == "ams"
        assert await LittleEngine(engine.ask, "adds", [1, 2]).run() == 3
        place = tmp_path / "file"
        asked = asyncio.create_task(engine.ask(LittleEngine(engine.ask, "waits", str(place)).invoke()))
        await eventually(lambda: Path(f"{place}.began").exists())
        process.signal(signal.SIGTERM)
        await eventually(lambda: engine.count("runner.drain") == 1)
        place.touch()
        assert (await asked)[0] == 206
        await process.said(kind="stopped")
        assert await process.ended() == 0
    await engine.stop()


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """130, whatever is under way."""
    engine = Engine()
    await engine.start()
    command = ("-m", "durable", "runner", APP, "--connect", engine.url, "--as", "shop.dev", "--json")
    async with started(*command, cwd=tmp_path) as process:
        await process.said(kind="connected")
        place = tmp_path / "file"
        asked = asyncio.create_task(engine.ask(LittleEngine(engine.ask, "waits", str(place)).invoke()))
        await eventually(lambda: Path(f"{place}.began").exists())
        process.signal(signal.SIGTERM)
        await eventually(lambda: engine.count("runner.drain") == 1)
        process.signal(signal.SIGTERM)
        assert await process.ended() == 130
        asked.cancel()
    await engine.stop()


async def test_it_serves_checks_in_and_drains(tmp_path: Path) -> None:
    """Listening, it checks in, answers signed invokes, and a signal lets the one under way finish."""
    book = Book()
    async with listening(book.app) as engine:
        options = ("--url", "https://shop.example", "--engine", f"{engine}/base", "--name", "r1", "--key", KEY)
        command = ("-m", "durable", "runner", APP, "--serve", "127.0.0.1:0", "--as", "shop.dev", "--json", *options)
        async with started(*command, cwd=tmp_path) as process:
            url = (await process.said(kind="started"))["serve"]
            await eventually(lambda: book.entries != [])
            assert book.entries[0][1]["runner"] == "r1"
            assert await LittleEngine(Asking(url, KEY), "adds", [1, 2]).run() == 3
            assert (await Asking(url, "another")(LittleEngine(Asking(url), "adds", [1]).invoke()))[0] == 401
            place = tmp_path / "file"
            asked = asyncio.create_task(Asking(url, KEY)(LittleEngine(Asking(url), "waits", str(place)).invoke()))
            await eventually(lambda: Path(f"{place}.began").exists())
            process.signal(signal.SIGTERM)
            place.touch()
            assert (await asked)[0] == 206
            await process.said(kind="stopped")
            assert await process.ended() == 0


@pytest.mark.parametrize(
    ("arguments", "exit", "words"),
    [
        ([APP, "--as", "shop.dev"], 2, "--connect URL, or --serve HOST:PORT"),
        ([APP, "--as", "shop.dev", "--connect", "ws://h", "--serve", ":1"], 2, "--connect URL, or --serve"),
        ([APP, "--as", "shop.dev", "--connect", "ws://h", "--url", "http://x"], 2, "are for --serve"),
        ([APP, "--as", "shop.dev", "--connect", "durable.example"], 1, "ws:// or wss://"),
        ([APP, "--as", "shop.dev", "--serve", "somewhere"], 2, "HOST:PORT"),
        ([APP, "--as", "shop.dev", "--serve", ":0", "--engine", "http://h"], 1, "reached at"),
        ([APP, "--connect", "ws://h"], 2, "--as"),
        (["no_such_module:app", "--as", "shop.dev", "--connect", "ws://h"], 2, "no module no_such_module"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_sentence(
    arguments: list[str], exit: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each mistake ends with its code and one sentence; no traceback."""
    for name in [name for name in os.environ if name.startswith("DURABLE_")]:
        monkeypatch.delenv(name)
    result: Any = CliRunner().invoke(cli, ["runner", *arguments], prog_name="durable")
    assert result.exit_code == exit, result.output
    assert words in result.output
    assert "Traceback" not in result.output
