"""What README and docs/ show is true: their Python runs, what they print is what it prints, their commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.sources import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```)?", re.MULTILINE | re.DOTALL)
CUT = "\x1e"
"""Between the outputs of two blocks."""


def pages_with_code() -> list[Path]:
    return [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", pages_with_code(), ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """A page's Python blocks, one after another in one file in an empty folder, run to their end; a text block right
    below one is what it prints, `…` standing for what differs from run to run."""
    blocks = list(BLOCK.finditer(page.read_text()))
    script = tmp_path / "page.py"
    script.write_text("".join(f"{block['code']}\nprint({CUT!r}, flush=True)\n" for block in blocks))
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    printed = [part.strip() for part in done.stdout.split(CUT)[:-1]]
    reached = len(printed)
    assert done.returncode == 0, f"{page.name}, block {reached + 1}:\n{blocks[reached]['code']}\n{done.stderr}"
    for block, output in zip(blocks, printed, strict=True):
        if block["output"] is not None:
            shown = re.escape(block["output"].strip()).replace("…", ".*")
            assert re.fullmatch(shown, output), f"{page.name} shows:\n{block['output']}\nbut it prints:\n{output}"


def test_there_are_blocks() -> None:
    """README and guide show code; if the pattern above no longer finds it, nothing would be run."""
    assert {"README.md", "guide.md"} <= {page.name for page in pages_with_code()}


def test_commands_exist() -> None:
    """Every `dev.py` command that README or docs/ name is one, and every `durable` command too."""
    source = (ROOT / "dev.py").read_text()
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"dev\.py (\w+)", text))
    assert named
    assert {name for name in named if f"\ndef {name}(args" not in source} == set()
    from durable.cli.main import cli
    from durable.cli.runs import runs

    asked = set(re.findall(r"^durable (\w+)", text, re.MULTILINE)) | set(re.findall(r"`durable (\w+)", text))
    assert asked - set(cli.commands) == set()
    assert set(re.findall(r"durable runs ([a-z]+)", text)) - set(runs.commands) == set()
