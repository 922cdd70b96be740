"""Inbox rows. A message and the rise of `inbox_last` are one transaction, so a suspending commit sees either both or
neither (D8)."""

from __future__ import annotations

from collections.abc import Sequence

from durable.store.postgres.connection import Database
from durable.store.postgres.packing import ints, texts
from durable.store.postgres.runs import json_text
from durable.store.records import InboxRow, Message, SendOutcome, SendStatus

_STATUS = {str(status): status for status in SendStatus}


async def send(db: Database, schema: str, messages: Sequence[Message]) -> list[SendOutcome]:
    if not messages:
        return []
    rows = await db.all(
        f"SELECT answer, run_owner FROM {schema}.send_messages(%s::jsonb) ORDER BY place", [json_text(messages)]
    )
    return [SendOutcome(_STATUS[answer], owner) for answer, owner in rows]


async def unread(db: Database, schema: str, incarnation: str) -> list[str]:
    rows = await db.read(f"SELECT id FROM {schema}.runs WHERE owner = %s AND inbox_last > inbox_read", [incarnation])
    return [row[0] for row in rows]


async def read(db: Database, schema: str, after: Sequence[tuple[str, int]]) -> list[list[InboxRow]]:
    rows = await db.read(
        "SELECT w.place, i.number, i.created_at, i.run_id, i.id, i.kind, i.name, i.payload, i.key, i.ordinal, i.attempt,"
        f" i.workspace FROM unnest(%s, %s) WITH ORDINALITY w(run_id, number, place) JOIN {schema}.inbox i"
        " ON i.run_id = w.run_id AND i.number > w.number ORDER BY w.place, i.number",
        [texts([run_id for run_id, _ in after]), ints([number for _, number in after])],
    )
    answers: list[list[InboxRow]] = [[] for _ in after]
    for row in rows:
        answers[row[0] - 1].append(InboxRow(row[1], row[2], Message(*row[3:])))
    return answers
