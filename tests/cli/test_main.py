"""The entry: quick help, a version, sentences instead of tracebacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import durable as package
from tests.cli.world import ROOT, World, durable


def test_version_is_the_packages(tmp_path: Path) -> None:
    """`durable --version` prints what pyproject.toml says."""
    out, _ = durable("--version", cwd=tmp_path).communicate(timeout=20)
    assert out == f"durable {package.__version__}\n"
    assert f'version = "{package.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_help_imports_no_engine() -> None:
    """`durable --help` starts fast: no engine, no store, no rich is imported for it."""
    code = (
        "import sys\nfrom durable.cli.main import cli\ncli(['runs', '--help'], standalone_mode=False)\n"
        "slow = ('durable.engine', 'durable.store', 'durable.app', 'rich', 'msgspec')\n"
        "heavy = [name for name in sys.modules if name.startswith(slow)]\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [[], ["dev"], ["doctor"], ["runs"], *(["runs", name] for name in
    ("list", "show", "watch", "cancel", "signal", "requeue"))])  # fmt: skip
def test_every_command_explains_itself(world: World, command: list[str]) -> None:
    """`--help` succeeds everywhere; commands show examples, and exit codes where they end."""
    result = world.run(*command, "--help")
    assert result.exit_code == 0
    assert "Exit codes:" in result.output or "Examples:" in result.output
    assert command in ([], ["runs"]) or "Examples:" in result.output


@pytest.mark.parametrize(
    "arguments", [["dance"], ["runs", "list", "--limit", "0"], ["runs", "list", "--status", "fine"], ["runs", "show"]]
)
def test_what_is_not_understood_is_a_usage_error(world: World, arguments: list[str]) -> None:
    """Unknown commands and bad options end with 2 and say how to get help."""
    result = world.run(*arguments)
    assert result.exit_code == 2
    assert "--help" in result.stderr


def test_output_into_a_closed_pipe_is_no_error(world: World, tmp_path: Path) -> None:
    """`durable runs list | head -1` leaves no traceback behind."""
    with durable("runs", "list", "--json", cwd=tmp_path, env={"DURABLE_STORE": world.url}) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
