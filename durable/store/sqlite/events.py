"""Events: what is accepted, and who waits for it."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec

from durable.store.admission import (
    Admission,
    EventOutcome,
    EventQuery,
    EventRecord,
    NewEvent,
    Waiter,
)
from durable.store.sqlite import search
from durable.store.sqlite.admission import Desk
from durable.store.sqlite.connection import atomic
from durable.store.sqlite.runs import SomeExist
from durable.store.sqlite.statements import execute_values, fetch_packed, fetch_value, listed

_PLAIN = "number, id, workspace, name, received_at, settled, dedupe_id, meta, admissions"
_encode_admissions = msgspec.json.Encoder().encode
_decode_admissions = msgspec.json.Decoder(tuple[Admission, ...]).decode


def publish(cx: sqlite3.Connection, events: Sequence[NewEvent], now: int, max_payload: int) -> list[EventOutcome]:
    """All of them in one transaction. The usual case, nothing of it known, reads little and never twice."""
    if not events:
        return []
    try:
        with atomic(cx):
            return _publish(cx, events, now, max_payload, eager=False)
    except SomeExist:
        with atomic(cx):
            return _publish(cx, events, now, max_payload, eager=True)


def _publish(
    cx: sqlite3.Connection, events: Sequence[NewEvent], now: int, max_payload: int, *, eager: bool
) -> list[EventOutcome]:
    ids, dedupe_ids = _known(cx, events)
    fresh: list[NewEvent] = []
    same_as: list[str | None] = []
    """For each event the one that was there before."""
    for event in events:
        there = event.id if event.id in ids else None
        if there is None and event.dedupe_id is not None:
            there = dedupe_ids.get((event.workspace, event.dedupe_id))
        same_as.append(there)
        if there is None:
            fresh.append(event)
            ids.add(event.id)
            if event.dedupe_id is not None:
                dedupe_ids[event.workspace, event.dedupe_id] = event.id
    triggers = [trigger for event in fresh for trigger in event.triggers]
    admissions: dict[str, tuple[Admission, ...]] = {}
    if triggers:
        desk = Desk(cx, triggers, now, max_payload, eager=eager)
        for event in fresh:
            admissions[event.id] = tuple([desk.admit(trigger) for trigger in event.triggers])
        desk.write()
    waiters = _waiting_for(cx, fresh, now)
    records = _insert(cx, fresh, admissions, waiters, now)
    older = {there for there in same_as if there is not None and there not in records}
    if older:
        records |= {
            record.id: record
            for record in _records(cx, "id IN (SELECT value FROM json_each(?))", [listed(list(older))])
        }
    again = _told_again(cx, events, same_as, records, now)
    return [
        EventOutcome(
            records[there or event.id],
            there is not None,
            tuple(again.get(str(place), ()) if there else waiters.get(event.id, ())),
        )
        for place, (event, there) in enumerate(zip(events, same_as, strict=True))
    ]


def _told_again(
    cx: sqlite3.Connection,
    events: Sequence[NewEvent],
    same_as: Sequence[str | None],
    records: dict[str, EventRecord],
    now: int,
) -> dict[str, list[Waiter]]:
    """Who waits now for those that were there before and are not settled, by place."""
    asked = []
    for place, (event, there) in enumerate(zip(events, same_as, strict=True)):
        if there is not None and not records[there].settled:
            record = records[there]
            probes = event.probes if event.id == there else None  # another's say nothing of it
            asked.append(NewEvent(str(place), record.name, b"", record.workspace, probes=probes))
    return _waiting_for(cx, asked, now)


def _known(cx: sqlite3.Connection, events: Sequence[NewEvent]) -> tuple[set[str], dict[tuple[str, str], str]]:
    """Ids that are there, and who has the dedupe ids."""
    wanted = listed([event.id for event in events])
    ids = {row[0] for row in fetch_packed(cx, "events WHERE id IN (SELECT value FROM json_each(?))", [wanted], "id")}
    dedupes = [(event.workspace, event.dedupe_id) for event in events if event.dedupe_id is not None]
    if not dedupes:
        return ids, {}
    rows = fetch_packed(
        cx,
        "json_each(?) w CROSS JOIN events e ON e.workspace = json_extract(w.value, '$[0]')"
        " AND e.dedupe_id = json_extract(w.value, '$[1]')",
        [listed(dedupes)],
        "e.workspace, e.dedupe_id, e.id",
    )
    return ids, {(workspace, dedupe_id): event_id for workspace, dedupe_id, event_id in rows}


def _insert(
    cx: sqlite3.Connection,
    events: Sequence[NewEvent],
    admissions: dict[str, tuple[Admission, ...]],
    waiters: dict[str, list[Waiter]],
    now: int,
) -> dict[str, EventRecord]:
    if not events:
        return {}
    last: int = fetch_value(cx, "SELECT seq FROM sqlite_sequence WHERE name = 'events'") or 0
    records: dict[str, EventRecord] = {}
    rows = []
    for number, event in enumerate(events, last + 1):
        admitted = admissions.get(event.id, ())
        settled = event.id not in waiters
        records[event.id] = EventRecord(
            event.id,
            event.workspace,
            event.name,
            event.data,
            number,
            now,
            event.dedupe_id,
            event.meta,
            admitted,
            settled,
        )
        rows.append(
            (
                number,
                event.id,
                event.workspace,
                event.name,
                now,
                settled,
                event.dedupe_id,
                event.meta and event.meta.decode(),
                _encode_admissions(admitted).decode() if admitted else None,
                event.data,
            )
        )
    execute_values(cx, _insert_text, rows)
    return records


def _insert_text(values: str) -> str:
    return f"INSERT INTO events ({_PLAIN}, data) SELECT * FROM ({values}) WHERE column1 IS NOT NULL"


# ------------------------------------------------------------------ waiters


def _waiting_for(cx: sqlite3.Connection, events: Sequence[NewEvent], now: int) -> dict[str, list[Waiter]]:
    if not events or not fetch_value(cx, "SELECT 1 FROM event_waiters LIMIT 1"):
        return {}
    probed: list[tuple[str, str, str, str]] = []
    anyway: list[tuple[str, str, str]] = []
    for event in events:
        if event.probes is None:
            anyway.append((event.id, event.workspace, event.name))
        else:
            probed += [(event.id, event.workspace, event.name, probe) for probe in dict.fromkeys(("", *event.probes))]
    found: dict[str, list[Waiter]] = {}
    for wanted, condition in ((probed, "AND e.probe = json_extract(w.value, '$[3]')"), (anyway, "")):
        if not wanted:
            continue
        rows = fetch_packed(
            cx,
            "json_each(?) w CROSS JOIN event_waiters e ON e.workspace = json_extract(w.value, '$[1]')"
            f" AND e.event = json_extract(w.value, '$[2]') {condition}"
            " CROSS JOIN runs r ON r.id = e.run_id WHERE (e.expires_at IS NULL OR e.expires_at > ?)",
            [listed(wanted), now],
            "r.number, json_extract(w.value, '$[0]'), e.run_id, e.id, e.expires_at, r.owner",
            ["e.match"],
        )
        rows.sort(key=lambda row: (row[0], row[3]))
        for _, event_id, run_id, waiter_id, expires_at, owner, match in rows:
            found.setdefault(event_id, []).append(Waiter(run_id, waiter_id, match, expires_at, owner))
    return found


# ------------------------------------------------------------------ reading


def find(cx: sqlite3.Connection, query: EventQuery) -> list[EventRecord]:
    conditions, parameters = ["1"], list[Any]()

    def only(condition: str, *values: Any) -> None:
        conditions.append(condition)
        parameters.extend(values)

    for condition, value in (
        ("workspace = ?", query.workspace),
        ("id = ?", query.id),
        ("name = ?", query.name),
        ("number > ?", query.after),
        ("number < ?", query.before),
    ):
        if value is not None:
            only(condition, value)
    if query.unsettled:
        only("NOT settled")
    if query.since is not None:
        only(
            "received_at >= ? AND number >= ?",
            query.since,
            search.first_since(cx, "events", "received_at", query.since),
        )
    order = "DESC" if query.newest_first else "ASC"
    page = f"SELECT number FROM events WHERE {' AND '.join(conditions)} ORDER BY number {order} LIMIT ?"
    found = _records(cx, f"number IN ({page})", [*parameters, query.limit])
    if query.newest_first:
        found.reverse()
    return found


def settle(cx: sqlite3.Connection, ids: Sequence[str]) -> None:
    cx.execute(
        "UPDATE events SET settled = 1 WHERE id IN (SELECT value FROM json_each(?)) AND NOT settled",
        [listed(list(ids))],
    )


def _records(cx: sqlite3.Connection, where: str, parameters: Sequence[Any]) -> list[EventRecord]:
    """Oldest first."""
    rows = fetch_packed(cx, f"events WHERE {where}", parameters, _PLAIN, ["data"])
    rows.sort(key=lambda row: int(row[0]))
    return [
        EventRecord(
            event_id,
            workspace,
            name,
            data,
            number,
            received_at,
            dedupe_id,
            None if meta is None else meta.encode(),
            () if admissions is None else _decode_admissions(admissions),
            bool(settled),
        )
        for number, event_id, workspace, name, received_at, settled, dedupe_id, meta, admissions, data in rows
    ]
