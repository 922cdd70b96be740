"""Run rows: starting, reading, finding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import msgspec

from durable.protocol.states import Activity, Status
from durable.store.postgres.connection import Database, Row
from durable.store.postgres.packing import texts
from durable.store.records import (
    NewRun,
    Parent,
    RunPage,
    RunQuery,
    RunRecord,
    StartOutcome,
    StartStatus,
)

_COLUMNS = (
    "number, id, workspace, workflow, version, status, activity, input, output, error, priority, tags, attributes,"
    " parent_run_id, parent_key, parent_ordinal, idempotency_key, input_hash, wake_at, inbox_last, inbox_read, owner,"
    " epoch, seq, commit_id, recovery_attempts, created_at, started_at, finished_at, updated_at, lane, meta"
)
_STATUS = {str(status): status for status in Status}
_ACTIVITY = {str(activity): activity for activity in Activity}


async def start(db: Database, schema: str, runs: Sequence[NewRun]) -> list[StartOutcome]:
    """Insert those that are new. The usual case, all of them, is one statement and nothing read before."""
    if not runs:
        return []
    [born] = await db.one(f"SELECT {schema}.start_runs(%s::jsonb)", [json_text([as_json(run) for run in runs])])
    if len(born) == len(runs):
        return [StartOutcome(StartStatus.STARTED, run.id) for run in runs]
    return await _outcomes(db, schema, runs, set(born))


async def _outcomes(db: Database, schema: str, runs: Sequence[NewRun], born: set[str]) -> list[StartOutcome]:
    """What each start came to."""
    rows = await db.read(
        f"SELECT id, workspace, workflow, idempotency_key, input_hash FROM {schema}.runs WHERE id = ANY (%s)"
        f" UNION SELECT r.id, r.workspace, r.workflow, r.idempotency_key, r.input_hash"
        f" FROM unnest(%s, %s, %s) k(workspace, workflow, key) JOIN {schema}.runs r"
        " ON r.workspace = k.workspace AND r.workflow = k.workflow AND r.idempotency_key = k.key",
        [
            texts([run.id for run in runs]),
            texts([run.workspace for run in runs]),
            texts([run.workflow for run in runs]),
            texts([run.idempotency_key for run in runs]),
        ],
    )
    ids = {row[0] for row in rows}
    holders = {(row[1], row[2], row[3]): (row[0], row[4]) for row in rows if row[3] is not None}
    outcomes = []
    for run in runs:
        holder = holders.get((run.workspace, run.workflow, run.idempotency_key))
        if run.id in born:
            born.discard(run.id)  # the same id again in this call is not new
            outcomes.append(StartOutcome(StartStatus.STARTED, run.id))
        elif run.id in ids:
            outcomes.append(StartOutcome(StartStatus.EXISTING, run.id))
        elif holder is not None:
            same = holder[1] == run.input_hash
            outcomes.append(StartOutcome(StartStatus.EXISTING if same else StartStatus.CONFLICT, holder[0]))
        else:
            # What was in its way has been pruned since: now it is new.
            outcomes += await start(db, schema, [run])
    return outcomes


def as_json(run: NewRun) -> dict[str, Any]:
    """One run as `start_runs` takes it."""
    fields: dict[str, Any] = {
        "id": run.id,
        "workspace": run.workspace,
        "workflow": run.workflow,
        "version": run.version,
        "input": run.input,
        "input_hash": run.input_hash,
        "idempotency_key": run.idempotency_key,
        "priority": run.priority,
        "tags": run.tags or None,
        "attributes": attributes(run.attributes) or None,
        "parent": run.parent,
        "owner": run.owner,
        "seq": len(run.entries),
        "wake_at": run.wake_at,
        "entries": run.entries,
    }
    if run.lane is not None:
        fields["lane"] = run.lane
    if run.meta is not None:
        fields["meta"] = run.meta
    return fields


def attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Large floats are written out: of `1e22` jsonb makes an integer, of `10000000000000000000000.0` it does not."""
    return {
        name: msgspec.Raw(format(value, ".1f").encode())
        if isinstance(value, float) and 1e15 < abs(value) < inf
        else value
        for name, value in values.items()
    }


def json_text(value: object) -> str:
    """A parameter for `::jsonb`; bytes become base64."""
    return msgspec.json.encode(value).decode()


# ------------------------------------------------------------------ reading


async def get(db: Database, schema: str, run_ids: Sequence[str]) -> list[RunRecord | None]:
    if not run_ids:
        return []
    rows = await db.read(f"SELECT {_COLUMNS} FROM {schema}.runs WHERE id = ANY (%s)", [texts(run_ids)])
    found = {row[1]: record(row) for row in rows}
    return [found.get(run_id) for run_id in run_ids]


async def children(db: Database, schema: str, run_id: str) -> list[RunRecord]:
    rows = await db.read(f"SELECT {_COLUMNS} FROM {schema}.runs WHERE parent_run_id = %s ORDER BY number", [run_id])
    return [record(row) for row in rows]


async def find(db: Database, schema: str, query: RunQuery) -> RunPage:
    conditions, parameters = ["true"], list[Any]()

    def where(condition: str, *values: Any) -> None:
        conditions.append(condition)
        parameters.extend(values)

    for column, value in (
        ("workspace", query.workspace),
        ("workflow", query.workflow),
        ("status", query.status and str(query.status)),
        ("activity", query.activity and str(query.activity)),
        ("idempotency_key", query.idempotency_key),
        ("parent_run_id", query.parent),
    ):
        if value is not None:
            where(f"{column} = %s", value)
    if query.workflows is not None:
        where("workflow = ANY (%s)", texts(query.workflows))
    if query.statuses is not None:
        where("status = ANY (%s)", texts([str(status) for status in query.statuses]))
    if query.tag is not None:
        where("tags @> %s", texts([query.tag]))
    if query.attributes:
        where("attributes @> %s::jsonb", json_text(attributes(query.attributes)))
        for name, wanted in query.attributes.items():
            if isinstance(wanted, (int, float)):  # to jsonb, 1 and 1.0 are one number
                where("attributes->>%s = %s::jsonb->>0", name, json_text([*attributes({"": wanted}).values()]))
    if query.since is not None:
        where("created_at >= %s", query.since)
        if query.workspace is not None:
            where(f"number > (SELECT {schema}.number_before(%s, %s))", query.workspace, query.since)
    if query.until is not None:
        where("created_at < %s", query.until)
        if query.workspace is not None:
            where(f"number < (SELECT {schema}.number_behind(%s, %s))", query.workspace, query.until)
    if query.text is not None:
        like = re.sub(r"([\\%_])", r"\\\1", query.text)
        where(
            " OR ".join(
                f"{schema}.folded({column}) LIKE '%%' || {schema}.folded(%s) || '%%'"
                for column in ("id", "workflow", "idempotency_key")
            ).join("()"),
            like,
            like,
            like,
        )
    if query.cursor is not None:
        side = ">" if query.oldest_first else "<"
        where(f"number {side} (SELECT c.number FROM {schema}.runs c WHERE c.id = %s)", query.cursor)
    rows = await db.read(
        f"SELECT {_COLUMNS} FROM {schema}.runs WHERE {' AND '.join(conditions)}"
        f" ORDER BY number {'' if query.oldest_first else 'DESC'} LIMIT %s",
        [*parameters, query.limit + 1],
    )
    found = [record(row) for row in rows]
    if len(found) <= query.limit:
        return RunPage(found, None)
    found.pop()
    return RunPage(found, found[-1].id if found else query.cursor)


def record(row: Row) -> RunRecord:
    parent = None if row[13] is None else Parent(row[13], row[14], row[15])
    return RunRecord(
        id=row[1],
        workspace=row[2],
        workflow=row[3],
        version=row[4],
        status=_STATUS[row[5]],
        activity=_ACTIVITY[row[6]],
        input=row[7],
        output=row[8],
        error=row[9],
        priority=row[10],
        tags=tuple(row[11] or ()),
        attributes=row[12] or {},
        parent=parent,
        idempotency_key=row[16],
        input_hash=row[17],
        wake_at=row[18],
        inbox_last=row[19],
        inbox_read=row[20],
        owner=row[21],
        epoch=row[22],
        seq=row[23],
        commit_id=row[24],
        recovery_attempts=row[25],
        created_at=row[26],
        started_at=row[27],
        finished_at=row[28],
        updated_at=row[29],
        lane=row[30],
        meta=row[31],
    )
