"""dev.py and the fixtures of the test run do what they say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import Budget
from tests.house.sources import ROOT
from tests.servers import services


@pytest.fixture
def dev() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", ["demo", "test", "check", "bench", "lock"])
def test_every_command_explains_itself(command: str) -> None:
    """`dev.py COMMAND --help` says what it does, makes nothing and succeeds."""
    done = subprocess.run(
        [sys.executable, "dev.py", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"python3 dev.py {command}")


def test_an_unknown_command_is_told(dev: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that is not one ends with 2 and the list of those that are."""
    assert dev.main(["dance"]) == 2
    assert "demo, test, check" in capsys.readouterr().out


def test_an_old_python_is_told(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too old a Python ends with 1 and a sentence."""
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    assert dev.main(["test"]) == 1
    assert "needs Python 3.11 or later" in capsys.readouterr().out


def test_a_python_without_venv_is_told(dev: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where neither uv nor ensurepip is there, the sentence says what to install."""
    monkeypatch.setattr(dev, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(dev.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(dev.Failure, match="apt install python3-venv"):
        dev.make_venv()


def test_a_failed_install_is_told(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """When no way of installing works, as without a network, the sentence says so."""
    monkeypatch.setattr(dev, "run_quietly", lambda command, silent=False: False)
    with pytest.raises(dev.Failure, match="needs a package index"):
        dev.install(sys.executable, "test")


def test_installs_only_when_something_changed(dev: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stamp in .venv spares a second install, and knows that running needs less than testing."""
    installed: list[str] = []
    monkeypatch.setattr(dev, "VENV", tmp_path)
    monkeypatch.setattr(dev, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(dev, "works", lambda python: True)
    monkeypatch.setattr(dev, "install", lambda python, level: installed.append(level))
    monkeypatch.delenv("DURABLE_PYTHON", raising=False)
    for level in ("run", "run", "test", "test", "run"):
        dev.environment(level)
    assert installed == ["run", "test"]
    (tmp_path / "stamp").write_text("another-digest run test")
    dev.environment("run")
    assert installed == ["run", "test", "run"]


def test_one_failed_step_fails_the_whole(dev: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Every step runs, each has its minutes, and one failure is the outcome."""
    good, bad = [sys.executable, "-c", ""], [sys.executable, "-c", "raise SystemExit(3)"]
    assert dev.report([("first", bad), ("second", good)]) == 1
    told = capsys.readouterr().out
    assert "FAILED (3)" in told
    assert told.count(" min ") == 2
    assert dev.report([("only", good)]) == 0


def test_the_lock_fits(dev: ModuleType) -> None:
    """requirements.lock was made for what pyproject.toml asks for; otherwise: python3 dev.py lock."""
    assert dev.lock_fits()


def test_a_missing_service_is_a_skip_or_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a laptop a missing service is a skip with its remedy; where it is required, a failure."""
    services.service("teapot", lambda: False, "brew some")
    monkeypatch.delenv("DURABLE_TEST_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="brew some"):
        services.require("teapot")
    for required in ("all", "redis,teapot"):
        monkeypatch.setenv("DURABLE_TEST_REQUIRE", required)
        with pytest.raises(pytest.fail.Exception, match="brew some"):
            services.require("teapot")
    services.service("kettle", "json", "part of Python")
    services.require("kettle")


def test_a_budget_bounds_seeds() -> None:
    """Without a budget all seeds come; with one that is spent, still the first."""
    assert len(list(Budget(None).seeds(5))) == 5
    assert len(list(Budget(0).seeds(5))) == 1
