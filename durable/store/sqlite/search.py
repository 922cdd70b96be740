"""Finding runs. Pages go by row number, the order in which runs were inserted; a tag or a search attribute is an index walked
in that order, and the bounds in time are numbers found by halving."""

from __future__ import annotations

import sqlite3
from typing import Any

from durable.store.records import RunPage, RunQuery
from durable.store.sqlite import marks, runs
from durable.store.sqlite.statements import fetch_value, listed


def find(cx: sqlite3.Connection, query: RunQuery) -> RunPage:
    conditions, parameters = ["1"], list[Any]()

    def only(condition: str, *values: Any) -> None:
        conditions.append(condition)
        parameters.extend(values)

    wanted = [marks.of_attribute(*one) for one in query.attributes.items()]
    if query.tag is not None:
        wanted.append(marks.of_tag(query.tag))
    source, number = "runs r", "r.number"
    if wanted and query.workspace is not None:
        # Walked in the order of the page, so it stops where the page is full.
        source, number = "run_marks m CROSS JOIN runs r ON r.number = m.number", "m.number"
        only("m.workspace = ? AND m.name = ? AND m.type = ? AND m.value = ?", query.workspace, *wanted.pop())
    for mark in wanted:
        only(
            "EXISTS (SELECT 1 FROM run_marks k WHERE k.number = r.number AND k.name = ? AND k.type = ? AND k.value = ?)",
            *mark,
        )
    for column, value in (
        ("workspace", query.workspace),
        ("workflow", query.workflow),
        ("status", query.status and str(query.status)),
        ("activity", query.activity and str(query.activity)),
        ("idempotency_key", query.idempotency_key),
        ("parent_run_id", query.parent),
    ):
        if value is not None:
            only(f"r.{column} = ?", value)
    for column, values in (("workflow", query.workflows), ("status", query.statuses)):
        if values is not None:
            only(f"r.{column} IN (SELECT value FROM json_each(?))", listed([str(value) for value in values]))
    if query.since is not None:
        only(f"r.created_at >= ? AND {number} >= ?", query.since, first_since(cx, "runs", "created_at", query.since))
    if query.until is not None:
        only("r.created_at < ?", query.until)
        if not query.oldest_first:
            only(f"{number} < ?", first_since(cx, "runs", "created_at", query.until))
    if query.text is not None:
        contains = "contains({}, ?)"
        each = " OR ".join(contains.format(f"r.{column}") for column in ("id", "workflow", "idempotency_key"))
        only(f"({each})", *[query.text.lower()] * 3)
    if query.cursor is not None:
        only(
            f"{number} {'>' if query.oldest_first else '<'} (SELECT c.number FROM runs c WHERE c.id = ?)", query.cursor
        )
    order = "ASC" if query.oldest_first else "DESC"
    page = f"SELECT {number} FROM {source} WHERE {' AND '.join(conditions)} ORDER BY {number} {order} LIMIT ?"
    found = runs.records(cx, f"number IN ({page})", [*parameters, query.limit + 1])
    if not query.oldest_first:
        found.reverse()
    if len(found) <= query.limit:
        return RunPage(found, None)
    found.pop()
    return RunPage(found, found[-1].id if found else query.cursor)


def first_since(cx: sqlite3.Connection, table: str, column: str, at: int) -> int:
    """The number from which on rows are from that time or later. Numbers rise with time; where the clock was once set back, one
    of the places where it passed `at`."""
    low = 0
    high = 1 + (fetch_value(cx, f"SELECT max(number) FROM {table}") or 0)
    text = f"SELECT {column}, number FROM {table} WHERE number >= ? AND number < ? ORDER BY number LIMIT 1"
    while low < high:
        middle = (low + high) // 2
        row = cx.execute(text, (middle, high)).fetchone()
        if row is None or row[0] >= at:
            high = middle
        else:
            low = row[1] + 1
    return high
