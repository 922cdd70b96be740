"""Events: one call of `publish` accepts many, with the runs they start; another column says who waits for them."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from typing import Any

from durable.store.admission import (
    Admission,
    EventOutcome,
    EventQuery,
    EventRecord,
    NewEvent,
    Trigger,
    Verdict,
    Waiter,
)
from durable.store.postgres import runs
from durable.store.postgres.connection import Database, Row
from durable.store.postgres.packing import blobs, texts

_COLUMNS = "id, workspace, name, data, number, received_at, dedupe_id, meta, admissions, settled"
_CALL = ", ".join(["%s"] * 7)
_VERDICT = {str(verdict): verdict for verdict in Verdict}


async def publish(db: Database, schema: str, events: Sequence[NewEvent], max_payload: int) -> list[EventOutcome]:
    if not events:
        return []
    plain: list[dict[str, Any]] = []
    policies: list[dict[str, Any]] = []
    expected: list[tuple[Admission, ...]] = []
    for place, event in enumerate(events, 1):
        if any(map(_has_policy, event.triggers)):
            # In their order, and so all of them.
            policies += [_trigger(place, trigger) for trigger in event.triggers]
            expected.append(())
        else:
            plain += [{"of": place, **runs.as_json(trigger.run)} for trigger in event.triggers]
            expected.append(
                tuple(
                    Admission(trigger.run.workflow, Verdict.STARTED, trigger.run.id, True) for trigger in event.triggers
                )
            )
    rows = await db.all(
        "SELECT place, event_id, number, received_at, admissions, waiters"
        f" FROM {schema}.publish({_CALL}, %s::jsonb, %s::jsonb, %s::jsonb, %s) ORDER BY place",
        [
            texts([event.id for event in events]),
            texts([event.workspace for event in events]),
            texts([event.name for event in events]),
            texts([event.dedupe_id for event in events]),
            blobs([event.data for event in events]),
            blobs([event.meta for event in events]),
            texts([runs.json_text(admissions) for admissions in expected]),
            runs.json_text(
                [None if event.probes is None else [storable(one) for one in event.probes] for event in events]
            ),
            runs.json_text(plain) if plain else None,
            runs.json_text(policies) if policies else None,
            max_payload,
        ],
    )
    there = await _get(db, schema, [row[1] for row in rows if row[2] is None])
    again = await _told_again(db, schema, events, [there.get(row[1]) if row[2] is None else None for row in rows])
    outcomes = []
    for index, (event, admissions, row) in enumerate(zip(events, expected, rows, strict=True)):
        _, event_id, number, received_at, made, waiters = row
        if number is None:
            if event_id not in there:
                # What was in its way has been pruned since: now it is new.
                outcomes += await publish(db, schema, [event], max_payload)
            else:
                outcomes.append(EventOutcome(there[event_id], True, tuple(again.get(index, ()))))
            continue
        record = EventRecord(
            event.id,
            event.workspace,
            event.name,
            event.data,
            number,
            received_at,
            event.dedupe_id,
            event.meta,
            admissions if made is None else _admissions(made),
            settled=waiters is None,
        )
        outcomes.append(EventOutcome(record, False, tuple(map(_waiter, waiters or ()))))
    return outcomes


async def find(db: Database, schema: str, query: EventQuery) -> list[EventRecord]:
    conditions, parameters = ["true"], list[Any]()
    for condition, value in (
        ("e.workspace = %s", query.workspace),
        ("e.id = %s", query.id),
        ("e.name = %s", query.name),
        ("e.received_at >= %s", query.since),
        ("e.number > %s", query.after),
        ("e.number < %s", query.before),
    ):
        if value is not None:
            conditions.append(condition)
            parameters.append(value)
    if query.unsettled:
        conditions.append("NOT e.settled")
    if query.whole:
        # First, in a statement of its own: the rows are then read as they stand after it.
        [[bound]] = await db.read(f"SELECT {schema}.whole_events()")
        conditions.append("e.number <= %s")
        parameters.append(bound)
    if query.since is not None and query.after is None and query.workspace is not None:
        # Numbers rise with time but for what a statement may take: an event that is older by a minute is a bound.
        conditions.append(
            f"e.number > coalesce((SELECT o.number FROM {schema}.events o WHERE o.workspace = %s"
            " AND o.received_at < %s ORDER BY o.received_at DESC LIMIT 1), 0)"
        )
        parameters += [query.workspace, query.since - 60_000_000]
    rows = await db.read(
        f"SELECT {_COLUMNS} FROM {schema}.events e WHERE {' AND '.join(conditions)}"
        f" ORDER BY e.number {'DESC' if query.newest_first else ''} LIMIT %s",
        [*parameters, query.limit],
    )
    return [_record(row) for row in rows]


async def settle(db: Database, schema: str, ids: Sequence[str]) -> None:
    if ids:
        await db.all(f"SELECT {schema}.settle_events(%s)", [texts(ids)])


def storable(probe: str) -> str:
    """A probe is a guess at what may match and not data: what PostgreSQL cannot keep is replaced, on both sides alike."""
    return probe.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


async def _get(db: Database, schema: str, ids: Sequence[str | None]) -> dict[str, EventRecord]:
    wanted = [one for one in ids if one is not None]
    if not wanted:
        return {}
    rows = await db.read(f"SELECT {_COLUMNS} FROM {schema}.events e WHERE e.id = ANY (%s)", [texts(wanted)])
    return {row[0]: _record(row) for row in rows}


async def _told_again(
    db: Database, schema: str, events: Sequence[NewEvent], there: Sequence[EventRecord | None]
) -> dict[int, list[Waiter]]:
    """Who waits now for those that were there before and are not settled, by place."""
    asked = []
    for place, (event, record) in enumerate(zip(events, there, strict=True)):
        if record is not None and not record.settled:
            known = event.id == record.id and event.probes is not None  # another's probes say nothing of it
            probes = ["", *map(storable, event.probes or ())] if known else None
            asked.append({"place": place, "workspace": record.workspace, "name": record.name, "probes": probes})
    if not asked:
        return {}
    found: dict[int, list[Waiter]] = {}
    for place, *waiter in await db.read(
        "SELECT a.place, w.run_id, w.id, w.match, w.expires_at, r.owner"
        " FROM jsonb_to_recordset(%s::jsonb) AS a(place integer, workspace text, name text, probes jsonb)"
        f" JOIN {schema}.event_waiters w ON w.workspace = a.workspace AND w.event = a.name"
        "  AND (jsonb_typeof(a.probes) IS DISTINCT FROM 'array' OR a.probes ? w.probe)"
        f"  AND (w.expires_at IS NULL OR w.expires_at > {schema}.now_us())"
        f" JOIN {schema}.runs r ON r.id = w.run_id ORDER BY a.place, w.number",
        [runs.json_text(asked)],
    ):
        found.setdefault(place, []).append(Waiter(*waiter))
    return found


def _has_policy(trigger: Trigger) -> bool:
    policies = (trigger.rate, trigger.singleton, trigger.debounce, trigger.batch)
    return any(policy is not None for policy in policies)


def _trigger(place: int, trigger: Trigger) -> dict[str, Any]:
    policies = {
        "rate": trigger.rate,
        "singleton": trigger.singleton,
        "debounce": trigger.debounce,
        "batch": trigger.batch,
    }
    given = {name: policy for name, policy in policies.items() if policy is not None}
    return {"of": place, "run": runs.as_json(trigger.run), **given}


def _record(row: Row) -> EventRecord:
    return EventRecord(
        id=row[0],
        workspace=row[1],
        name=row[2],
        data=row[3],
        number=row[4],
        received_at=row[5],
        dedupe_id=row[6],
        meta=row[7],
        admissions=_admissions(row[8]),
        settled=row[9],
    )


def _admissions(made: Sequence[dict[str, Any]]) -> tuple[Admission, ...]:
    return tuple(
        Admission(
            one["workflow"],
            _VERDICT[one["verdict"]],
            one.get("run_id"),
            one.get("new", False),
            one.get("cancelled"),
        )
        for one in made
    )


def _waiter(one: dict[str, Any]) -> Waiter:
    match = one["match"]
    return Waiter(
        one["run_id"], one["id"], None if match is None else b64decode(match), one["expires_at"], one["owner"]
    )
