"""What stands in files: nothing of anybody's machine, links that lead somewhere, docstrings where they are owed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.house.sources import ROOT, modules, parsed, short, tracked

# Spelled in pieces, so that this file does not find itself.
MACHINE = re.compile(
    r"(?<![\w.$}])/(?:" + "|".join(["root", "work", "home", "Users", "opt/py" + "pi"]) + r")/\w|[A-Z]:\\Users\\"
)
REGISTRY = re.compile(
    "|".join([r"pypi\." + "org", "python" + "hosted", r"registry\." + r"(npmjs|yarnpkg)", "arti" + "factory"])
)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_machine_and_no_registry_is_named() -> None:
    """No tracked file names a path of somebody's machine or the host of a package registry."""
    found = [
        f"{short(path)}:{number}: {match.group()}"
        for path in tracked()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        for pattern in (MACHINE, REGISTRY)
        if (match := pattern.search(line))
    ]
    assert found == []


def test_links_between_pages_lead_somewhere() -> None:
    """Every relative link in a Markdown file leads to a file that is there."""
    broken = [
        f"{short(path)}: {target}"
        for path in tracked()
        if path.suffix == ".md"
        for target in LINK.findall(text_of(path))
        if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists()
    ]
    assert broken == []


def test_every_module_opens_with_a_docstring() -> None:
    """A module says what it decides before it does anything."""
    assert [short(path) for path in modules().values() if not ast.get_docstring(parsed(path))] == []


def test_contracts_say_what_they_promise() -> None:
    """Every public class and function of an interface file has a docstring; `capabilities` speaks for itself."""
    silent = []
    for path in modules().values():
        if path.name == "interface.py":
            classes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)]
            owing = [node for node in [*classes, *functions(parsed(path))] if not node.name.startswith("_")]
            silent += [
                f"{short(path)}: {n.name}" for n in owing if n.name != "capabilities" and not ast.get_docstring(n)
            ]
    assert silent == []


def test_every_test_states_its_claim() -> None:
    """The first statement of a test is a docstring."""
    silent = [
        f"{short(path)}: {function.name}"
        for path in [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "durable" / "testing" / "suites").rglob("*.py")]
        for function in functions(parsed(path))
        if function.name.startswith("test_") and not ast.get_docstring(function)
    ]
    assert silent == []
