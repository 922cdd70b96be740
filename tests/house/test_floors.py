"""Arrows point down: a module imports its own floor or below. A compass: if it complains and you are right, change the table."""

from __future__ import annotations

import ast

from tests.house.sources import modules, parsed

FLOORS = {
    "durable": 7,  # the front door: nothing below the app goes through it
    "durable.protocol": 0,
    "durable.core.errors": 0,  # error codes are words of the wire
    "durable.core": 1,
    "durable.protocol.codec": 1,  # checks payloads on their way in
    **dict.fromkeys([f"durable.store.{name}" for name in ("interface", "records", "items", "admission", "lanes")], 2),
    **dict.fromkeys(["durable.transports.interface", "durable.transports.pool", "durable.transports.answers"], 2),
    "durable.control_plane.interface": 2,
    **dict.fromkeys(["durable.runners", "durable.client", "durable.telemetry"], 3),
    **dict.fromkeys(["durable.engine", "durable.worker"], 4),
    "durable.runners.passes": 4,  # an app's own end: it runs code, as a worker does
    **dict.fromkeys(["durable.runners.runner", "durable.runners.serving", "durable.runners.connecting"], 7),
    **dict.fromkeys(["durable.store", "durable.transports", "durable.control_plane"], 5),
    "durable.testing": 6,
    **dict.fromkeys(["durable.testing.harness", "durable.testing.pytest_plugin"], 7),  # they test whole apps
    **dict.fromkeys(["durable.app", "durable.module", "durable.dashboard"], 7),
    **dict.fromkeys(["durable.opening", "durable.worker.worker"], 7),  # the doors that take URLs
    "durable.server": 8,
    **dict.fromkeys(["durable.cli", "durable.__main__"], 9),
}


def floor(module: str) -> int:
    return FLOORS[max((p for p in FLOORS if module == p or module.startswith(p + ".")), key=len)]


def imports(name: str) -> set[str]:
    found: set[str] = set()
    known = modules()
    for node in ast.walk(parsed(known[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(known)) or {node.module}
    return {module for module in found if module.split(".")[0] == "durable"}


def test_imports_point_down() -> None:
    """No module imports from a floor above its own; only `durable/__init__.py` is free."""
    up = [
        f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})"
        for name in modules()
        for target in imports(name)
        if name != "durable" and floor(target) > floor(name)
    ]
    assert up == []


def test_adapters_do_not_know_the_engine() -> None:
    """Stores, transports and control planes know their contract, never `durable.engine`."""
    knowing = [
        f"{name} imports {target}"
        for name in modules()
        if floor(name) == 5
        for target in imports(name)
        if target.startswith("durable.engine")
    ]
    assert knowing == []


def test_every_module_has_a_floor_of_its_own() -> None:
    """A new package is entered in the table: only the front door matches the bare prefix `durable`."""
    homeless = [
        name
        for name in modules()
        if name != "durable" and not any(name.startswith(p + ".") or name == p for p in FLOORS if p != "durable")
    ]
    assert homeless == []
