"""Run rows: starting and reading."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from durable.protocol.states import Activity, Status
from durable.store.interface import AGEING_US
from durable.store.records import NewRun, Parent, RunRecord, StartOutcome, StartStatus
from durable.store.sqlite import journal, lanes, marks
from durable.store.sqlite.connection import atomic
from durable.store.sqlite.statements import Row, execute_values, fetch_packed, listed

INLINE_INPUT_MAX = 2_000
"""Bytes. A row is rewritten whole by every commit, so a larger input stands elsewhere."""

_NEW = (
    "id, workspace, workflow, version, input_hash, idempotency_key, priority, tags, attributes, parent_run_id,"
    " parent_key, parent_ordinal, owner, epoch, seq, activity, wake_at, created_at, started_at, updated_at, meta, lane,"
    " standing, ready, input"
)
_PLAIN = (
    "number, id, workspace, workflow, version, status, activity, priority, tags, attributes, parent_run_id, parent_key,"
    " parent_ordinal, idempotency_key, input_hash, wake_at, inbox_last, inbox_read, owner, epoch, seq, commit_id,"
    " recovery_attempts, created_at, started_at, finished_at, updated_at, lane, meta"
)
INPUT = "coalesce(runs.input, (SELECT b.input FROM big_inputs b WHERE b.run_id = runs.id))"
_BLOBS = [INPUT, "output", "error"]

_STATUS = {str(status): status for status in Status}
_ACTIVITY = {str(activity): activity for activity in Activity}


def start(cx: sqlite3.Connection, runs: Sequence[NewRun], now: int) -> list[StartOutcome]:
    """Insert those that are new. The usual case, all of them, is one statement and nothing read before."""
    if not runs:
        return []
    try:
        with atomic(cx):
            insert(cx, runs, now)
            return [StartOutcome(StartStatus.STARTED, run.id) for run in runs]
    except SomeExist:
        pass
    with atomic(cx):
        outcomes = _known(cx, runs)
        fresh = [run for run, outcome in zip(runs, outcomes, strict=True) if outcome.status is StartStatus.STARTED]
        if fresh:
            insert(cx, fresh, now)
        return outcomes


class SomeExist(Exception):
    """The id or the key of one of them is known."""


def insert(cx: sqlite3.Connection, runs: Sequence[NewRun], now: int) -> None:
    """All of them, or SomeExist: roll back then."""
    inserted = execute_values(cx, _insert_text, [_row(run, now) for run in runs])
    if inserted != len(runs):
        raise SomeExist
    insert_big(cx, [(run.id, run.input) for run in runs if len(run.input) > INLINE_INPUT_MAX])
    journal.insert(cx, [row for run in runs if run.entries for row in journal.rows_of(run.id, run.entries)])
    marks.add(cx, [row for run in runs if run.tags or run.attributes for row in marks.rows_of(run)])
    lanes.keep(cx, [run for run in runs if run.lane is not None])


def _insert_text(values: str) -> str:
    return f"INSERT INTO runs ({_NEW}) SELECT * FROM ({values}) WHERE column1 IS NOT NULL ON CONFLICT DO NOTHING"


def inline(data: bytes) -> bytes | None:
    """What stands in the run's own row of such an input."""
    return data if len(data) <= INLINE_INPUT_MAX else None


def insert_big(cx: sqlite3.Connection, inputs: Sequence[tuple[str, bytes]]) -> None:
    """(run id, input) of those that have no place in their run's row."""
    if inputs:
        execute_values(cx, _insert_big_text, inputs)


def _insert_big_text(values: str) -> str:
    return f"INSERT INTO big_inputs SELECT * FROM ({values}) WHERE column1 IS NOT NULL"


def _row(run: NewRun, now: int) -> Row:
    owned = run.owner is not None
    parent = run.parent
    wake_at = None if owned else now if run.wake_at is None else run.wake_at
    later = wake_at is not None and wake_at > now
    laned = run.lane is not None
    return (
        run.id,
        run.workspace,
        run.workflow,
        run.version,
        run.input_hash,
        run.idempotency_key,
        run.priority,
        tags_text(run.tags),
        attributes_text(run.attributes),
        parent and parent.run_id,
        parent and parent.key,
        parent and parent.ordinal,
        run.owner,
        1 if owned else 0,
        len(run.entries),
        "executing" if owned else "scheduled" if later else "queued",
        wake_at,
        now,
        now if owned else None,
        now,
        run.meta and run.meta.decode(),
        run.lane and run.lane.key,
        (now if wake_at is None else wake_at) - run.priority * AGEING_US if laned else None,
        laned and not later,
        inline(run.input),
    )


def _known(cx: sqlite3.Connection, runs: Sequence[NewRun]) -> list[StartOutcome]:
    """What each start comes to, given the rows there are and the runs before it in this call."""
    keys = [[run.workspace, run.workflow, run.idempotency_key] for run in runs if run.idempotency_key is not None]
    rows = fetch_packed(
        cx,
        "runs WHERE id IN (SELECT value FROM json_each(?)) OR number IN (SELECT r.number FROM json_each(?) k JOIN runs r"
        " ON r.workspace = json_extract(k.value, '$[0]') AND r.workflow = json_extract(k.value, '$[1]')"
        " AND r.idempotency_key = json_extract(k.value, '$[2]'))",
        [listed([run.id for run in runs]), listed(keys)],
        "id, workspace, workflow, idempotency_key, input_hash",
    )
    ids = {row[0] for row in rows}
    holders = {(row[1], row[2], row[3]): (row[0], row[4]) for row in rows if row[3] is not None}
    outcomes = []
    for run in runs:
        key = (run.workspace, run.workflow, run.idempotency_key)
        if run.id in ids:
            outcomes.append(StartOutcome(StartStatus.EXISTING, run.id))
        elif run.idempotency_key is not None and key in holders:
            holder, input_hash = holders[key]
            same = input_hash == run.input_hash
            outcomes.append(StartOutcome(StartStatus.EXISTING if same else StartStatus.CONFLICT, holder))
        else:
            ids.add(run.id)
            holders[key] = (run.id, run.input_hash)
            outcomes.append(StartOutcome(StartStatus.STARTED, run.id))
    return outcomes


# ------------------------------------------------------------------ reading


def records(cx: sqlite3.Connection, where: str, parameters: Sequence[Any]) -> list[RunRecord]:
    """The runs of a condition, oldest first."""
    rows = fetch_packed(cx, f"runs WHERE {where}", parameters, _PLAIN, _BLOBS)
    rows.sort(key=_number)
    return [_record(row) for row in rows]


def numbered(cx: sqlite3.Connection, numbers: Sequence[int]) -> dict[int, RunRecord]:
    """The runs of these row numbers, by number."""
    rows = fetch_packed(
        cx, "runs WHERE number IN (SELECT value FROM json_each(?))", [listed(list(numbers))], _PLAIN, _BLOBS
    )
    return {row[0]: _record(row) for row in rows}


def get(cx: sqlite3.Connection, run_ids: Sequence[str]) -> list[RunRecord | None]:
    found = {run.id: run for run in records(cx, "id IN (SELECT value FROM json_each(?))", [listed(list(run_ids))])}
    return [found.get(run_id) for run_id in run_ids]


def children(cx: sqlite3.Connection, run_id: str) -> list[RunRecord]:
    return records(cx, "parent_run_id = ?", [run_id])


def _record(row: list[Any]) -> RunRecord:
    parent = None if row[10] is None else Parent(row[10], row[11], row[12])
    return RunRecord(
        id=row[1],
        workspace=row[2],
        workflow=row[3],
        version=row[4],
        status=_STATUS[row[5]],
        activity=_ACTIVITY[row[6]],
        input=row[29],
        output=row[30],
        error=row[31],
        priority=row[7],
        tags=() if row[8] is None else tuple(json.loads(row[8])),
        attributes={} if row[9] is None else json.loads(row[9]),
        parent=parent,
        idempotency_key=row[13],
        input_hash=row[14],
        wake_at=row[15],
        inbox_last=row[16],
        inbox_read=row[17],
        owner=row[18],
        epoch=row[19],
        seq=row[20],
        commit_id=row[21],
        recovery_attempts=row[22],
        created_at=row[23],
        started_at=row[24],
        finished_at=row[25],
        updated_at=row[26],
        lane=row[27],
        meta=None if row[28] is None else row[28].encode(),
    )


def _number(row: list[Any]) -> int:
    number: int = row[0]
    return number


def tags_text(tags: Iterable[str]) -> str | None:
    listed_tags = list(tags)
    return json.dumps(listed_tags) if listed_tags else None


def attributes_text(attributes: Mapping[str, Any]) -> str | None:
    return json.dumps(dict(attributes)) if attributes else None
