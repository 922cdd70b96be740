"""Items, and schedules, whose occurrences start runs."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from durable.store.items import Fire, FireOutcome, Item, ItemKey, ItemPage, ItemQuery, NewItem, PutOutcome
from durable.store.records import DropItem, PutItem, StartStatus
from durable.store.sqlite import runs
from durable.store.sqlite.connection import atomic
from durable.store.sqlite.statements import execute_values, fetch_packed, fetch_value, listed

_PLAIN = "i.workspace, i.kind, i.id, i.version, i.due_at, i.expires_at, i.updated_at"
_BY_KEY = (
    "json_each(?) w CROSS JOIN items i ON i.kind = json_extract(w.value, '$[0]')"
    " AND i.workspace = json_extract(w.value, '$[1]') AND i.id = json_extract(w.value, '$[2]')"
)
_ALIVE = "(i.expires_at IS NULL OR i.expires_at > ?)"

_Key = tuple[str, str, str]
"""(kind, workspace, id), the order of the index."""


def put(cx: sqlite3.Connection, items: Sequence[NewItem], now: int) -> list[PutOutcome]:
    if not items:
        return []
    with atomic(cx):
        versions = _versions(cx, [(item.kind, item.workspace, item.id) for item in items], now)
        rows: dict[_Key, tuple[Any, ...]] = {}
        outcomes = []
        for item in items:
            key = (item.kind, item.workspace, item.id)
            version = versions.get(key, 0)
            if item.expected is not None and item.expected != version:
                outcomes.append(PutOutcome(False, version))
                continue
            expires_at = None if item.expires_in is None else now + item.expires_in
            version += 1
            rows[key] = (version, item.due_at, expires_at, now, item.data)
            # One that expires at once is none for the next.
            versions[key] = 0 if expires_at is not None and expires_at <= now else version
            outcomes.append(PutOutcome(True, version))
        _write(cx, rows)
        return outcomes


def apply(cx: sqlite3.Connection, effects: Mapping[_Key, PutItem | DropItem], now: int) -> None:
    """What commits ask for, by (kind, id, run id): in the run's workspace, over whatever version is there."""
    workspaces: dict[str, str] = dict(
        fetch_packed(
            cx,
            "runs WHERE id IN (SELECT value FROM json_each(?))",
            [listed(sorted({run_id for *_, run_id in effects}))],
            "id, workspace",
        )
    )
    last_word: dict[_Key, PutItem | DropItem] = {}
    for (kind, item_id, run_id), effect in effects.items():
        last_word[kind, workspaces[run_id], item_id] = effect
    puts = {key: effect for key, effect in last_word.items() if isinstance(effect, PutItem)}
    if puts:
        versions = _versions(cx, list(puts), now)
        _write(
            cx,
            {
                key: (versions.get(key, 0) + 1, None, effect.expires_at, now, effect.data)
                for key, effect in puts.items()
            },
        )
    _drop(cx, [key for key, effect in last_word.items() if isinstance(effect, DropItem)])


def get(cx: sqlite3.Connection, keys: Sequence[ItemKey], now: int) -> list[Item | None]:
    wanted = listed([(key.kind, key.workspace, key.id) for key in keys])
    rows = fetch_packed(cx, f"{_BY_KEY} WHERE {_ALIVE}", [wanted, now], _PLAIN, ["i.data"])
    found = {(item.workspace, item.kind, item.id): item for item in map(_item, rows)}
    return [found.get((key.workspace, key.kind, key.id)) for key in keys]


def page(cx: sqlite3.Connection, query: ItemQuery, now: int) -> ItemPage:
    conditions, parameters = ["i.kind = ?", _ALIVE], list[Any]([query.kind, now])
    for condition, values in (
        ("i.workspace = ?", None if query.workspace is None else [query.workspace]),
        ("i.updated_at >= ?", None if query.changed_since is None else [query.changed_since]),
        (
            "(i.workspace, i.id) > (?, ?)",
            None if query.after is None or query.due else [query.after.workspace, query.after.id],
        ),
        ("i.due_at <= ?", [now] if query.due else None),
    ):
        if values is not None:
            conditions.append(condition)
            parameters += values
    order = "i.due_at, i.workspace, i.id" if query.due else "i.workspace, i.id"
    source = f"items i WHERE i.rowid IN (SELECT i.rowid FROM items i WHERE {' AND '.join(conditions)} ORDER BY {order} LIMIT ?)"
    most = query.limit + 1 if query.due else query.limit
    found = [_item(row) for row in fetch_packed(cx, source, [*parameters, most], _PLAIN, ["i.data"])]
    if not query.due:
        return ItemPage(sorted(found, key=lambda item: (item.workspace, item.id)), now)
    found.sort(key=lambda item: (item.due_at, item.workspace, item.id))
    if len(found) > query.limit:
        return ItemPage(found[: query.limit], now, now)
    conditions[-1] = "i.due_at > ?"
    later = fetch_value(cx, f"SELECT min(i.due_at) FROM items i WHERE {' AND '.join(conditions)}", parameters)
    return ItemPage(found, now, later)


def delete(cx: sqlite3.Connection, keys: Sequence[ItemKey], now: int) -> int:
    with atomic(cx):
        wanted = list(dict.fromkeys((key.kind, key.workspace, key.id) for key in keys))
        count = len(_versions(cx, wanted, now))
        _drop(cx, wanted)
        return count


def fire(cx: sqlite3.Connection, fires: Sequence[Fire], now: int) -> list[FireOutcome]:
    with atomic(cx):
        return [_fire(cx, one, now) for one in fires]


def _fire(cx: sqlite3.Connection, one: Fire, now: int) -> FireOutcome:
    [put_] = put(cx, [one.item], now)
    if not put_.done:
        return FireOutcome(False)
    fresh = []
    for occurrence in one.occurrences:
        added = cx.execute(
            "INSERT INTO schedule_fires VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (one.schedule_id, occurrence.at, occurrence.run.id),
        )
        if added.rowcount:
            fresh.append(occurrence.run)
    started = runs.start(cx, fresh, now)
    return FireOutcome(True, tuple(outcome.run_id for outcome in started if outcome.status is StartStatus.STARTED))


# ------------------------------------------------------------------ rows


def _versions(cx: sqlite3.Connection, keys: Sequence[_Key], now: int) -> dict[_Key, int]:
    """Of those there are; an expired one is none."""
    rows = fetch_packed(
        cx,
        f"{_BY_KEY} WHERE {_ALIVE}",
        [listed(list(dict.fromkeys(keys))), now],
        "i.kind, i.workspace, i.id, i.version",
    )
    return {(kind, workspace, item_id): version for kind, workspace, item_id, version in rows}


def _write(cx: sqlite3.Connection, rows: Mapping[_Key, tuple[Any, ...]]) -> None:
    if rows:
        execute_values(cx, _write_text, [(*key, *row) for key, row in rows.items()])


def _write_text(values: str) -> str:
    return f"""
        INSERT INTO items (kind, workspace, id, version, due_at, expires_at, updated_at, data)
        SELECT * FROM ({values}) WHERE column1 IS NOT NULL
        ON CONFLICT (kind, workspace, id) DO UPDATE SET
          version = excluded.version, due_at = excluded.due_at, expires_at = excluded.expires_at,
          updated_at = excluded.updated_at, data = excluded.data"""


def _drop(cx: sqlite3.Connection, keys: Sequence[_Key]) -> None:
    if keys:
        execute_values(cx, _drop_text, keys)


def _drop_text(values: str) -> str:
    return f"DELETE FROM items WHERE (kind, workspace, id) IN ({values})"


def _item(row: list[Any]) -> Item:
    workspace, kind, item_id, version, due_at, expires_at, updated_at, data = row
    return Item(workspace, kind, item_id, data, version, due_at, expires_at, updated_at)
