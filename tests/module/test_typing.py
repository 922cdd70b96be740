"""Types follow references, from a step's method to what `await` gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house.sources import ROOT


def test_references_are_typed(tmp_path: Path) -> None:
    """mypy --strict agrees with every `assert_type` in typing_references.py."""
    mypy = pytest.importorskip("mypy.api", reason="mypy is part of the test extra: pip install -e .[test]")
    options = ["--strict", "--config-file=", f"--cache-dir={tmp_path}", "--follow-imports=silent"]
    told, errors, code = mypy.run([*options, str(ROOT / "tests" / "module" / "typing_references.py")])
    assert code == 0, told + errors
