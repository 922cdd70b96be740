"""Time, ids and randomness come through a door: core and engine never ask the machine themselves, or no simulation is true."""

from __future__ import annotations

import ast

from tests.house.sources import modules, parsed

BANNED = {
    "time": {"time", "time_ns", "monotonic", "monotonic_ns"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
    "uuid": {"uuid1", "uuid4", "uuid6", "uuid7"},
    "uuid_utils": {"*"},
    "secrets": {"*"},
    "os": {"urandom"},
    "random": {"*"},
}
HARMLESS = {("random", "Random")}
"""With a seed it is a function."""
DOORS = {"durable.core.clock", "durable.core.ids"}
ALLOWED: dict[str, set[str]] = {}
"""Module → names it may use all the same; say why beside it."""


def banned(module: str, name: str) -> bool:
    names = BANNED.get(module, set())
    return (name in names or "*" in names) and (module, name) not in HARMLESS


def uses(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
            if banned(owner, node.attr) and not (owner == "random" and not imports_module(tree, "random")):
                found.add(f"{owner}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names if banned(node.module, a.name)}
    return found


def imports_module(tree: ast.Module, name: str) -> bool:
    """Whether `name` here is the module, and not a parameter or attribute called like it."""
    return any(isinstance(node, ast.Import) and any(a.name == name for a in node.names) for node in ast.walk(tree))


def test_core_and_engine_use_the_doors() -> None:
    """Only clock.py and ids.py ask the machine for time, ids or randomness."""
    found = {
        name: around
        for name, path in modules().items()
        if name.startswith(("durable.core", "durable.engine")) and name not in DOORS
        if (around := uses(parsed(path)) - ALLOWED.get(name, set()))
    }
    assert found == {}


def test_the_check_sees_what_it_should() -> None:
    """The check finds each way around a door, and leaves seeded generators and parameters alone."""
    sly = "import time, random, datetime\nfrom uuid import uuid4\ntime.time(); random.random(); datetime.datetime.now()"
    assert uses(ast.parse(sly)) == {"time.time", "random.random", "datetime.now", "uuid.uuid4"}
    assert uses(ast.parse("import random\nrandom.Random(7)\ndef f(ids): ids.random()")) == set()
