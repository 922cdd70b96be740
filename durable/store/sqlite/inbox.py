"""Inbox rows. A message and the rise of `inbox_last` are one transaction, so a suspending commit sees either both or
neither (D8)."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from durable.store.records import InboxRow, Message, SendOutcome, SendStatus
from durable.store.sqlite.connection import atomic
from durable.store.sqlite.statements import Row, execute_values, fetch_packed, listed

_COLUMNS = "run_id, number, id, created_at, workspace, kind, name, key, ordinal, attempt, payload"


def send(cx: sqlite3.Connection, messages: Sequence[Message], now: int) -> list[SendOutcome]:
    if not messages:
        return []
    with atomic(cx):
        ids = listed(list(dict.fromkeys(message.run_id for message in messages)))
        runs = {
            run_id: (workspace, status, owner, last)
            for run_id, workspace, status, owner, last in fetch_packed(
                cx,
                "runs WHERE id IN (SELECT value FROM json_each(?))",
                [ids],
                "id, workspace, status, owner, inbox_last",
            )
        }
        pairs = listed([(message.run_id, message.id) for message in messages])
        known = {
            (run_id, message_id)
            for run_id, message_id in fetch_packed(
                cx,
                "json_each(?) m JOIN inbox i ON i.run_id = json_extract(m.value, '$[0]')"
                " AND i.id = json_extract(m.value, '$[1]')",
                [pairs],
                "i.run_id, i.id",
            )
        }
        outcomes: list[SendOutcome] = []
        rows: list[Row] = []
        raised: dict[str, int] = {}
        cancels = {message.run_id for message in messages if message.kind == "cancel"}
        for message in messages:
            run = runs.get(message.run_id)
            if run is None or run[0] != message.workspace:
                outcomes.append(SendOutcome(SendStatus.NOT_FOUND))
            elif (message.run_id, message.id) in known:
                outcomes.append(SendOutcome(SendStatus.DUPLICATE, run[2]))
            elif run[1] != "active":
                outcomes.append(SendOutcome(SendStatus.FINISHED))
            else:
                number = raised.get(message.run_id, run[3]) + 1
                raised[message.run_id] = number
                known.add((message.run_id, message.id))
                rows.append(_row(message, number, now))
                outcomes.append(SendOutcome(SendStatus.ACCEPTED, run[2]))
        if rows:
            execute_values(cx, _insert_text, rows)
            execute_values(cx, _raise_text, [(*one, one[0] in cancels) for one in raised.items()], now, now)
        return outcomes


def _insert_text(values: str) -> str:
    return f"INSERT INTO inbox ({_COLUMNS}) SELECT * FROM ({values}) WHERE column1 IS NOT NULL"


def _raise_text(values: str) -> str:
    return f"""
        WITH v(id, last, cancels) AS ({values})
        UPDATE runs SET
          inbox_last = v.last,
          wake_at = CASE
            WHEN owner IS NULL AND activity NOT IN ('paused', 'blocked')
              AND (activity <> 'scheduled' OR v.cancels) AND (wake_at IS NULL OR wake_at > ?) THEN ?
            ELSE wake_at END
        FROM v WHERE runs.id = v.id"""


def _row(message: Message, number: int, now: int) -> Row:
    return (
        message.run_id,
        number,
        message.id,
        now,
        message.workspace,
        message.kind,
        message.name,
        message.key,
        message.ordinal,
        message.attempt,
        message.payload,
    )


def unread(cx: sqlite3.Connection, incarnation: str) -> list[str]:
    rows = fetch_packed(cx, "runs WHERE owner = ? AND inbox_last > inbox_read", [incarnation], "id")
    return [row[0] for row in rows]


def read(cx: sqlite3.Connection, after: Sequence[tuple[str, int]]) -> list[list[InboxRow]]:
    rows = fetch_packed(
        cx,
        "json_each(?) w JOIN inbox i ON i.run_id = json_extract(w.value, '$[0]')"
        " AND i.number > json_extract(w.value, '$[1]')",
        [listed([(run_id, number) for run_id, number in after])],
        "w.key, i.number, i.created_at, i.run_id, i.id, i.kind, i.name, i.key, i.ordinal, i.attempt, i.workspace",
        ["i.payload"],
    )
    rows.sort(key=lambda row: row[1])
    answers: list[list[InboxRow]] = [[] for _ in after]
    for position, number, created_at, run_id, message_id, kind, name, key, ordinal, attempt, workspace, payload in rows:
        message = Message(run_id, message_id, kind, name, payload, key, ordinal, attempt, workspace)
        answers[position].append(InboxRow(number, created_at, message))
    return answers
