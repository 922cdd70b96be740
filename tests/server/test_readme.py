"""The README's section on the service: its program, its command and its curl lines work as they are printed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from durable.server.routes_table import ROUTES
from tests.house.sources import ROOT

BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
USUAL = "localhost:3030"


def test_what_the_readme_says_of_the_service(tmp_path: Path) -> None:
    """`durable dev` runs the file that is shown, and each curl line after it, with the port alone replaced, is answered with
    2xx: the event starts a run, which the other event ends, and the stream ends with it."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = (ROOT / "README.md").read_text().partition("## One service for many apps\n")[2].partition("\n## ")[0]
    blocks = [(kind, code) for kind, code in BLOCK.findall(text)]
    [program] = [code for kind, code in blocks if kind == "python"]
    [commands] = [code for kind, code in blocks if "curl" in code]
    [served] = re.findall(r"^durable (dev \S+)", text, re.MULTILINE)
    (tmp_path / program.split()[1]).write_text(program)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "durable", *served.split(), "--port", "0"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as service:
        assert service.stdout is not None
        while not (line := service.stdout.readline()).startswith("API: "):
            assert line, "durable dev ended before it began"
        place = line.split()[1].removeprefix("http://").rstrip(",")
        try:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", FAILING + commands.replace(USUAL, place)],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        finally:
            service.terminate()
            service.communicate(timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"kind":"run_status"' in done.stdout
    assert '"result":"o-1 is on its way"' in done.stdout
    assert '"nextAt"' in done.stdout
    assert '"openapi"' in done.stdout


FAILING = 'curl() { command curl --fail-with-body --no-progress-meter "$@"; echo; }\n'
"""A refusal ends the shell, as nobody who reads along would miss it."""


def test_every_route_has_its_row() -> None:
    """docs/api.md has each route of the table once, with who may ask, and none that is not there."""
    page = (ROOT / "docs" / "api.md").read_text()
    shown = re.findall(r"^\| `([A-Z]+ /\S*)` \| ([a-z ]+) \|", page, re.MULTILINE)
    who = {"none": "open", "app": "app", "admin": "admin", "node": "other engines", "token": "link"}
    there = [(f"{route.method} {route.path}", who.get(route.auth, str(route.role))) for route in ROUTES]
    assert sorted(shown) == sorted(there)
