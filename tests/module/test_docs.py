"""What docs/modules.md and the module example show is true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.house.sources import ROOT

PAGE = (ROOT / "docs" / "modules.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
NAMES = [f"block {number}" for number, _ in enumerate(BLOCKS, 1)]


def run(*command: str, cwd: Path) -> str:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=45, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_python_blocks_run(block: str, tmp_path: Path, require: Any) -> None:
    """Each Python block of the page, alone in an empty folder, runs to its end."""
    if "starlette" in block:
        require("starlette")
    (tmp_path / "block.py").write_text(block)
    run("block.py", cwd=tmp_path)


def test_the_tree_on_the_page(tmp_path: Path) -> None:
    """The tree the page shows is what `durable modules` prints for the block above it."""
    [tree] = re.findall(r"^```\n(AppModule\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    block = next(block for block in BLOCKS if "class PaymentsModule" in block)
    (tmp_path / "shop.py").write_text(block.replace("asyncio.run(main())", ""))
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "durable", "modules", "shop:AppModule"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == tree


def test_the_order_demo_as_modules(tmp_path: Path) -> None:
    """examples/orders_module.py is the workflow of orders.py, its step on an injected provider; tests/examples run it."""
    example = str(ROOT / "examples" / "orders_module.py")
    described = json.loads(run("-m", "durable", "modules", example, "--json", cwd=tmp_path))
    assert described[0]["workflows"] == ["order"]
    assert [p["steps"] for m in described for p in m["providers"] if p["token"] == "Payments"] == [["payments.charge"]]
