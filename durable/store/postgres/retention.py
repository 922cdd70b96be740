"""Deleting finished runs, in bounded batches."""

from __future__ import annotations

from durable.store.postgres.connection import Database
from durable.store.postgres.packing import texts
from durable.store.records import PruneRequest


async def prune(db: Database, schema: str, request: PruneRequest) -> int:
    if request.older_than_us is None and request.keep is None:
        return 0
    [count] = await db.one(
        f"SELECT {schema}.prune_runs(%s, %s, %s, %s, %s, %s)",
        [
            request.workspace,
            request.workflow,
            texts(request.but),
            request.older_than_us,
            request.keep,
            request.limit,
        ],
    )
    return int(count)
