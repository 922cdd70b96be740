"""What the README shows is true: its Python runs, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.sources import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number: int, tmp_path: Path) -> None:
    """Each Python block, alone in an empty folder, runs to its end."""
    script = tmp_path / "block.py"
    script.write_text(BLOCKS[number])
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "block.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=45,
        check=False,
    )
    assert done.returncode == 0, f"block {number + 1} of README.md:\n{done.stderr}"


def test_there_are_blocks() -> None:
    """The README shows code; if the pattern above no longer finds it, nothing would be run."""
    assert BLOCKS


def test_commands_exist() -> None:
    """Every `dev.py` command the README names is one."""
    source = (ROOT / "dev.py").read_text()
    named = set(re.findall(r"dev\.py (\w+)", README))
    assert named
    assert {name for name in named if f"\ndef {name}(args" not in source} == set()
