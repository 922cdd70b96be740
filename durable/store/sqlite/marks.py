"""What runs are found by: a row for each tag and search attribute, in the transaction that changes the run. A run without any
costs nothing."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Mapping, Sequence

from durable.store.records import NewRun
from durable.store.sqlite.statements import execute_values

Mark = tuple[str, str, str | int | float]
"""(name, type, value), the types being those of json_each; a tag has no name, and the type `tag`."""


def of_tag(tag: str) -> Mark:
    return "", "tag", tag


def of_attribute(name: str, value: str | int | float | bool) -> Mark:
    if isinstance(value, bool):
        return name, "true" if value else "false", int(value)
    if isinstance(value, int):
        return name, "integer", value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, float):
        return name, "real", "nan" if math.isnan(value) else value
    return name, "text", value


def of(attributes: Mapping[str, str | int | float | bool], tags: Iterable[str]) -> list[Mark]:
    return [*(of_attribute(*one) for one in attributes.items()), *map(of_tag, tags)]


def rows_of(run: NewRun) -> list[tuple[str, str, str, str | int | float]]:
    return [(run.id, *mark) for mark in of(run.attributes, run.tags)]


def add(cx: sqlite3.Connection, rows: Sequence[tuple[str, str, str, str | int | float]]) -> None:
    """(run id, *mark)."""
    if rows:
        execute_values(cx, _add_text, rows)


def _add_text(values: str) -> str:
    return f"""
        WITH v(id, name, type, value) AS ({values})
        INSERT OR IGNORE INTO run_marks (number, workspace, name, type, value)
        SELECT r.number, r.workspace, v.name, v.type, v.value FROM v JOIN runs r ON r.id = v.id"""


def replace(
    cx: sqlite3.Connection, run_id: str, attributes: Mapping[str, str | int | float | bool], tags: Iterable[str]
) -> None:
    """The run has these now."""
    cx.execute("DELETE FROM run_marks WHERE number = (SELECT number FROM runs WHERE id = ?)", [run_id])
    add(cx, [(run_id, *mark) for mark in of(attributes, tags)])
