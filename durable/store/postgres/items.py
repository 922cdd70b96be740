"""Items, and schedules that move on with the runs they start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from durable.store.items import Fire, FireOutcome, Item, ItemKey, ItemPage, ItemQuery, NewItem, PutOutcome
from durable.store.postgres import runs
from durable.store.postgres.connection import Database, Row
from durable.store.postgres.packing import Packed, bigints, blobs, texts

_COLUMNS = "i.workspace, i.kind, i.id, i.data, i.version, i.due_at, i.expires_at, i.updated_at"
_CALL = ", ".join(["%s"] * 7)


async def put(db: Database, schema: str, items: Sequence[NewItem]) -> list[PutOutcome]:
    if not items:
        return []
    rows = await db.all(f"SELECT place, done, version FROM {schema}.put_items({_CALL}) ORDER BY place", _packed(items))
    return [PutOutcome(done, version) for _, done, version in rows]


async def get(db: Database, schema: str, keys: Sequence[ItemKey]) -> list[Item | None]:
    if not keys:
        return []
    rows = await db.read(
        f"SELECT {_COLUMNS} FROM (SELECT DISTINCT * FROM unnest(%s, %s, %s)) k(kind, workspace, id) JOIN {schema}.items i"
        " ON i.kind = k.kind AND i.workspace = k.workspace AND i.id = k.id"
        f" WHERE i.expires_at IS NULL OR i.expires_at > {schema}.now_us()",
        _keys(keys),
    )
    found = {(row[0], row[1], row[2]): Item(*row) for row in rows}
    return [found.get((key.workspace, key.kind, key.id)) for key in keys]


async def listed(db: Database, schema: str, query: ItemQuery) -> ItemPage:
    """One statement, so that the clock and the items are of one moment."""
    conditions, parameters = list[str](), list[Any]()
    for condition, value in (
        ("i.kind = %s", query.kind),
        ("i.workspace = %s", query.workspace),
        ("i.updated_at >= %s", query.changed_since),
    ):
        if value is not None:
            conditions.append(condition)
            parameters.append(value)
    conditions.append("(i.expires_at IS NULL OR i.expires_at > c.now)")
    later, later_parameters = "NULL::bigint", list[Any]()
    order = "i.workspace, i.id"
    if query.due:
        later = f"(SELECT min(i.due_at) FROM {schema}.items i WHERE {' AND '.join(conditions)} AND i.due_at > c.now)"
        later_parameters = list(parameters)
        conditions.append("i.due_at <= c.now")
        order = "i.due_at, i.workspace, i.id"
    elif query.after is not None:
        conditions.append("(i.workspace, i.id) > (%s, %s)")
        parameters += [query.after.workspace, query.after.id]
    rows = await db.read(
        f"SELECT c.now, {later}, p.* FROM (SELECT {schema}.now_us() AS now OFFSET 0) c LEFT JOIN LATERAL ("
        f"SELECT {_COLUMNS} FROM {schema}.items i WHERE {' AND '.join(conditions)} ORDER BY {order} LIMIT %s) p ON true",
        [*later_parameters, *parameters, query.limit + 1],
    )
    now, next_due_at = rows[0][0], rows[0][1]
    items = [Item(*row[2:]) for row in rows if row[2] is not None]
    if query.due and len(items) > query.limit:
        next_due_at = now
    return ItemPage(items[: query.limit], now, next_due_at)


async def delete(db: Database, schema: str, keys: Sequence[ItemKey]) -> int:
    if not keys:
        return 0
    [count] = await db.one(f"SELECT {schema}.delete_items(%s, %s, %s)", _keys(keys))
    return int(count)


async def fire(db: Database, schema: str, fires: Sequence[Fire]) -> list[FireOutcome]:
    if not fires:
        return []
    occurrences = [
        {"of": place, "schedule_id": one.schedule_id, "at": occurrence.at, "run": runs.as_json(occurrence.run)}
        for place, one in enumerate(fires, 1)
        for occurrence in one.occurrences
    ]
    rows: list[Row] = await db.all(
        f"SELECT place, done, started FROM {schema}.fire({_CALL}, %s::jsonb) ORDER BY place",
        [*_packed([one.item for one in fires]), runs.json_text(occurrences)],
    )
    return [FireOutcome(done, tuple(started)) for _, done, started in rows]


def _packed(items: Sequence[NewItem]) -> list[Packed]:
    return [
        texts([item.kind for item in items]),
        texts([item.workspace for item in items]),
        texts([item.id for item in items]),
        blobs([item.data for item in items]),
        bigints([item.due_at for item in items]),
        bigints([item.expires_in for item in items]),
        bigints([item.expected for item in items]),
    ]


def _keys(keys: Sequence[ItemKey]) -> list[Packed]:
    return [
        texts([key.kind for key in keys]),
        texts([key.workspace for key in keys]),
        texts([key.id for key in keys]),
    ]
