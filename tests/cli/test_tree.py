"""The tree of `durable runs watch`: what it is made of, and how it looks on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from durable.cli.tree import Branch
from durable.cli.watching import picture
from durable.client import Error, Frame
from tests.cli.world import ROOT, World

SECOND = 1_000_000


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def step(name: str, status: str, seconds: float, **more: Any) -> Frame:
    return Frame(kind="step_status", name=name, status=status, ts=at(seconds), **more)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("durable.cli.tree.unicode_output", lambda: False)


def grown() -> Branch:
    root = Branch("order@1", "0199-abcdef")
    root.feed(Frame(kind="run_status", status="running", ts=at(1)))
    root.feed(Frame(kind="log", level="warn", message="slow \x1b[31m", fields={"n": 1}, scope="root", ts=at(1)))
    root.feed(step("reserve", "completed", 2, duration_ms=250.0))
    root.feed(Frame(kind="log", message="inside", scope="reserve", ts=at(2)))
    root.feed(step("charge", "running", 2))
    error = Error(message="no answer", type="BankError")
    root.feed(step("charge", "retrying", 3, attempt=2, error=error, next_attempt_at=at(6)))
    child = root.feed(step("ship", "running", 3, child_run_id="0199-abcdef.child.2"))
    assert child is not None
    child.feed(Frame(kind="run_status", status="running", ts=at(3.5)))
    child.feed(step("pack", "completed", 4, duration_ms=400.0))
    return root


def test_a_tree_has_everything_in_its_place() -> None:
    """Steps are under their run, children's runs under their step, lines under what has written them; each says how long it
    took, a retry when it comes; nothing stored can steer the terminal."""
    assert [line.plain for line in grown().lines(5 * SECOND)] == [
        "> order@1  abcdef  running  4.00 s",
        "|- warn: slow \\x1b[31m  n=1",
        "|- + reserve  250 ms",
        "|  `- inside",
        "|- ~ charge  retrying  3.00 s  attempt 2  again in 1.00 s  BankError: no answer",
        "`- > ship  abcdef.child.2  running  2.00 s",
        "   `- + pack  400 ms",
    ]


def test_a_child_ends_with_its_step() -> None:
    """A step that has become a child's run takes what is told of it later, too."""
    root = grown()
    root.feed(step("ship", "completed", 8, child_run_id=None))
    assert [line.plain for line in root.lines(9 * SECOND)][5] == "`- + ship  abcdef.child.2  completed  5.00 s"


def test_a_tall_tree_shows_its_end() -> None:
    """What has no room above is counted; the run itself and the latest stay in sight."""
    root = Branch("many@1", "0199-abcdef")
    for n in range(100):
        root.feed(step(f"step:{n}", "completed", n, duration_ms=1.0))
    out = io.StringIO()
    Console(file=out, width=60, height=20).print(picture(root, 20))
    lines = out.getvalue().splitlines()
    assert len(lines) <= 19
    assert lines[0].startswith("o many@1")
    assert "lines above" in lines[1]
    assert "step:99" in lines[-1]


def test_on_a_real_terminal(world: World) -> None:
    """On a terminal a run of a store is drawn as a tree with its child's run in it, and ends with how it ended."""
    ours, theirs = pty.openpty()
    environment = os.environ | {
        "DURABLE_STORE": world.url,
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
        "COLUMNS": "100",
        "LINES": "30",
    }
    command = [sys.executable, "-m", "durable", "runs", "watch", world["family"]]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment) as watching:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:
                break
            if not part:
                break
            shown += part
        os.close(ours)
        assert watching.wait(20) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "family@1" in text
    assert "greet" in text[text.index("hello") :]
    assert "Ended: completed" in text
