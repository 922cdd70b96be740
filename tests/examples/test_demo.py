"""The demo: a fresh copy is run as a newcomer would, and its table is held against its own ledger and store."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.chaos
@pytest.mark.timeout(150)
def test_demo(tmp_path: Path) -> None:
    """Engines killed five times, once with the money moved and the answer lost: every order gets its receipt, no charge is
    made twice, broken lines are told, and what happened can be looked at afterwards."""
    home = tmp_path / "clone"
    shutil.copytree(ROOT / "examples", home / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (home / "durable").symlink_to(ROOT / "durable")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(home / "examples" / "order_demo.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    def counted(row: str) -> int:
        found = re.search(rf"^ *{re.escape(row)} +(\d+)", done.stdout, re.MULTILINE)
        assert found, row
        return int(found[1])

    assert (counted("orders in"), counted("receipts out")) == (36, 36)
    assert counted("engine killed with -9") >= 5
    assert counted("step bodies run twice") > 0
    assert counted("charge requests recognised by key") > 0
    assert counted("charges made twice") == counted("lost") == 0
    for problem in (
        "'two' is not a whole number",
        "no quantity and no total",
        "'45.OO' is not an amount",
        "idempotency_conflict",
    ):
        assert problem in done.stdout
    assert "every line found its run" in done.stdout
    assert "\x1b" not in done.stdout

    ledger = sqlite3.connect(home / ".durable" / "demo" / "ledger.db")
    charges = ledger.execute(
        "SELECT order_id, count(*), count(DISTINCT key) FROM facts WHERE kind = 'charged' GROUP BY 1"
    )
    assert {row[1:] for row in charges.fetchall()} == {(1, 1)}
    with pytest.raises(sqlite3.IntegrityError, match="append only"):
        ledger.execute("DELETE FROM facts")
    ledger.close()

    store = f"sqlite:///{home}/.durable/demo/orders.db"
    show = re.search(r"runs show (\S+) --store", done.stdout)
    assert show
    shown = subprocess.run(
        [sys.executable, "-m", "durable", "runs", "show", show[1], "--store", store, "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert json.loads(shown.stdout)["status"] == "completed"
