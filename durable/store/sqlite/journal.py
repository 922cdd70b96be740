"""Journal rows in and out."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from durable.core.journal import LOG, Entry
from durable.store.records import Journal
from durable.store.sqlite.statements import Row, execute_values, fetch_packed, listed

_COLUMNS = (
    "run_id, seq, at, kind, status, key, ordinal, name, attempt, fingerprint,"
    " enqueued_at, started_at, finished_at, payload"
)
_ENTRY = "seq, at, kind, status, key, ordinal, name, attempt, fingerprint, enqueued_at, started_at, finished_at"


def rows_of(run_id: str, entries: Iterable[Entry]) -> list[Row]:
    return [
        (
            run_id,
            entry.seq,
            entry.at,
            entry.kind,
            entry.status,
            entry.key,
            entry.ordinal,
            entry.name,
            entry.attempt,
            entry.fingerprint,
            entry.enqueued_at,
            entry.started_at,
            entry.finished_at,
            entry.payload,
        )
        for entry in entries
    ]


def insert(cx: sqlite3.Connection, rows: Sequence[Row]) -> None:
    if rows:
        execute_values(cx, _insert, rows)


def _insert(values: str) -> str:
    return f"INSERT INTO journal ({_COLUMNS}) SELECT * FROM ({values}) WHERE column1 IS NOT NULL"


def load(cx: sqlite3.Connection, run_ids: Sequence[str]) -> list[Journal]:
    ids = listed(list(dict.fromkeys(run_ids)))
    wanted = "journal WHERE run_id IN (SELECT value FROM json_each(?))"
    rows = fetch_packed(cx, f"{wanted} AND kind <> '{LOG}'", [ids], f"run_id, {_ENTRY}", ["payload"])
    logs = fetch_packed(
        cx,
        f"(SELECT run_id, count(*) AS lines FROM {wanted} AND kind = '{LOG}' AND key IS NULL GROUP BY run_id)",
        [ids],
        "run_id, lines",
    )
    lines: dict[str, int] = dict(logs)
    entries: dict[str, list[Entry]] = {run_id: [] for run_id in run_ids}
    for row in rows:
        entries[row[0]].append(_entry(row[1:]))
    for one in entries.values():
        one.sort(key=_seq)
    return [Journal(entries[run_id], lines.get(run_id, 0)) for run_id in run_ids]


def page(cx: sqlite3.Connection, run_id: str, after_seq: int, limit: int) -> list[Entry]:
    rows = fetch_packed(
        cx,
        "(SELECT * FROM journal WHERE run_id = ? AND seq > ? ORDER BY seq LIMIT ?)",
        [run_id, after_seq, limit],
        _ENTRY,
        ["payload"],
    )
    return sorted(map(_entry, rows), key=_seq)


def _entry(row: list[Any]) -> Entry:
    seq, at, kind, status, key, ordinal, name, attempt, fingerprint, enqueued, started, finished, payload = row
    return Entry(seq, at, kind, status, key, ordinal, name, attempt, fingerprint, payload, enqueued, started, finished)


def _seq(entry: Entry) -> int:
    return entry.seq
