"""Deleting finished runs. Each workflow's finished runs stand in an index of their own in the order in which they go, so a
call costs what it deletes; runs that their family keeps are walked over, and the newest of a `keep` are counted off."""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import islice
from typing import Any

from durable.store.records import PruneRequest
from durable.store.sqlite.connection import atomic
from durable.store.sqlite.statements import listed

_Ended = tuple[int, str]
"""(finished_at, run id): the order of going."""

_EVER = 2**63 - 1

_FINISHED = "workspace = ? AND workflow = ? AND finished_at IS NOT NULL"

_GOING = f"""
SELECT finished_at, id FROM runs r
WHERE {_FINISHED} AND (finished_at, id) < (?, ?) AND status <> 'active'
  AND NOT EXISTS (SELECT 1 FROM runs p WHERE p.id = r.parent_run_id AND p.status = 'active')
  AND NOT EXISTS (SELECT 1 FROM runs c WHERE c.parent_run_id = r.id AND c.status = 'active')
ORDER BY finished_at, id"""

_WORKFLOWS = """
WITH RECURSIVE each(workflow) AS (
  SELECT min(workflow) FROM runs WHERE workspace = :workspace AND finished_at IS NOT NULL
  UNION ALL
  SELECT (SELECT min(r.workflow) FROM runs r
          WHERE r.workspace = :workspace AND r.finished_at IS NOT NULL AND r.workflow > each.workflow)
  FROM each WHERE each.workflow IS NOT NULL)
SELECT workflow FROM each WHERE workflow IS NOT NULL"""

_HANGING = ("journal", "inbox", "event_waiters", "slots", "big_inputs", "schedule_fires", "gates")

EVENTS_AT_LEAST = 1_000
"""Events that one call may delete, however few runs."""


def prune(cx: sqlite3.Connection, request: PruneRequest, now: int) -> int:
    with atomic(cx):
        going = _going(cx, request, now)
        if going:
            ids = [listed(going)]
            cx.execute(
                "DELETE FROM run_marks WHERE number IN"
                " (SELECT number FROM runs WHERE id IN (SELECT value FROM json_each(?)))",
                ids,
            )
            for table in _HANGING:
                cx.execute(f"DELETE FROM {table} WHERE run_id IN (SELECT value FROM json_each(?))", ids)
            cx.execute("DELETE FROM runs WHERE id IN (SELECT value FROM json_each(?))", ids)
        _sweep(cx, request, now)
        return len(going)


def _sweep(cx: sqlite3.Connection, request: PruneRequest, now: int) -> None:
    """What says nothing any more, whoever asks; and old events, where no single workflow is meant."""
    cx.execute("DELETE FROM items WHERE expires_at <= ?", [now])
    cx.execute("DELETE FROM ticks WHERE until <= ?", [now])
    cx.execute(
        "DELETE FROM lanes WHERE NOT EXISTS (SELECT 1 FROM runs r WHERE r.workspace = lanes.workspace"
        " AND r.workflow = lanes.workflow AND r.lane = lanes.key AND r.lane IS NOT NULL)"
    )
    if request.workflow is None and request.older_than_us is not None:
        cx.execute(
            "DELETE FROM events WHERE number IN (SELECT number FROM events"
            " WHERE workspace = ? AND received_at < ? AND settled LIMIT ?)",
            [request.workspace, now - request.older_than_us, max(request.limit, EVENTS_AT_LEAST)],
        )


def _going(cx: sqlite3.Connection, request: PruneRequest, now: int) -> list[str]:
    with ExitStack() as stack:
        queues: list[Iterator[_Ended]] = []
        for workflow in _workflows(cx, request):
            bound = _bound(cx, request, workflow, now)
            if bound is not None:
                cursor = cx.execute(_GOING, (request.workspace, workflow, *bound))
                queues.append(stack.enter_context(closing(cursor)))
        return [run_id for _, run_id in islice(heapq.merge(*queues), max(request.limit, 0))]


def _workflows(cx: sqlite3.Connection, request: PruneRequest) -> list[str]:
    if request.workflow is not None:
        return [request.workflow]
    found: list[tuple[str]] = cx.execute(_WORKFLOWS, {"workspace": request.workspace}).fetchall()
    return [workflow for (workflow,) in found if workflow not in request.but]


def _bound(cx: sqlite3.Connection, request: PruneRequest, workflow: str, now: int) -> _Ended | None:
    """What finished before this goes, its family permitting. None: nothing goes."""
    bounds: list[_Ended] = []
    if request.older_than_us is not None:
        bounds.append((now - request.older_than_us, ""))
    if request.keep == 0:
        bounds.append((_EVER, ""))
    elif request.keep is not None:
        last_kept: Any = cx.execute(
            f"SELECT finished_at, id FROM runs WHERE {_FINISHED} ORDER BY finished_at DESC, id DESC LIMIT 1 OFFSET ?",
            (request.workspace, workflow, request.keep - 1),
        ).fetchone()
        if last_kept is not None:
            bounds.append(last_kept)
    return max(bounds, default=None)
