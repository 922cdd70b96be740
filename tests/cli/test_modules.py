"""`durable modules` and `durable dev` on an app made of modules."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from durable.cli.main import cli
from tests.house.sources import ROOT

APP = """
from durable import Context, durable_step, workflow
from durable.module import DurableModule, module, provide

class Gateway:
    pass

class Payments:
    def __init__(self, gateway: Gateway) -> None:
        print("made")

    @durable_step("payments.charge")
    async def charge(self, order: str) -> str:
        return order

@module(providers=[Gateway, Payments], exports=[Payments])
class PaymentsModule:
    def on_stop(self) -> None:
        print("stopped")

@workflow(name="checkout")
class Checkout:
    def __init__(self, payments: Payments) -> None: ...
    async def run(self, ctx: Context, order: str) -> str:
        return await ctx.remote(Payments.charge, order)

@module(imports=[PaymentsModule, DurableModule.for_root("sqlite:///shop.db")], providers=[Checkout])
class AppModule:
    pass
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "shop_app.py"
    path.write_text(APP)
    sys.modules.pop("shop_app", None)
    return path


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args), prog_name="durable")


def test_the_tree(shop: Path) -> None:
    """The tree shows modules, providers, what they need and from where; nothing is made."""
    result = run("modules", f"{shop}")
    assert result.exit_code == 0, result.output
    assert "made" not in result.output
    for words in (
        "AppModule",
        "Checkout  workflow checkout",
        "needs Payments from PaymentsModule",
        "Payments  exported",
        "step payments.charge",
        "DurableModule  global",
    ):
        assert words in result.output, words


def test_json(shop: Path) -> None:
    """The same as JSON, the root first."""
    result = run("modules", "shop_app:AppModule", "--json")
    described = json.loads(result.stdout)
    assert described[0]["name"] == "AppModule"
    [payments] = [p for m in described for p in m["providers"] if p["token"] == "Payments"]
    assert payments["needs"] == [{"parameter": "gateway", "token": "Gateway", "from": "PaymentsModule", "lazy": False}]
    assert payments["steps"] == ["payments.charge"]


def test_what_does_not_fit(shop: Path) -> None:
    """Modules that do not fit together are told in a sentence, with exit code 1."""
    shop.write_text(APP.replace("exports=[Payments]", "exports=[]"))
    result = run("modules", f"{shop}")
    assert result.exit_code == 1
    assert "Export it from PaymentsModule" in result.output
    assert "Traceback" not in result.output


def test_an_app_without_modules(shop: Path) -> None:
    """A Durable object has no modules to show."""
    shop.write_text("from durable import Durable\napp = Durable('memory://')\n")
    result = run("modules", f"{shop}")
    assert result.exit_code == 2
    assert "has no modules to show" in result.output


def test_dev_runs_a_module_app(shop: Path) -> None:
    """`durable dev MODULE:AppModule` starts the providers and the engine, and stops both on SIGINT."""
    command = [sys.executable, "-m", "durable", "dev", "shop_app:AppModule"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=shop.parent, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = ""
    deadline = time.monotonic() + 20
    while "Ctrl-C drains it" not in told and time.monotonic() < deadline:
        told += process.stdout.readline()
    process.send_signal(signal.SIGINT)
    told += process.communicate(timeout=20)[0]
    assert process.returncode == 0, told
    assert told.startswith("made\n")
    assert "Workflows: checkout@1. Remote steps served: payments.charge." in told
    assert "on sqlite:///shop.db" in told
    assert "stopped\n" in told
