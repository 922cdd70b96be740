"""Who owns what: claims and releases. The epoch is raised at every claim, so a wrong guess about who is alive costs a
takeover and never a double commit."""

from __future__ import annotations

from collections.abc import Sequence

from durable.store.admission import LimitState
from durable.store.postgres import runs
from durable.store.postgres.connection import Database
from durable.store.postgres.packing import ints, texts
from durable.store.records import Claim, ClaimedRun, ClaimRequest

CONFIRM_US = 300_000
"""An engine's lock must be found free twice, this far apart, before the engine counts as gone."""


async def claim(db: Database, schema: str, request: ClaimRequest) -> Claim:
    """An idle claim is one statement; one that takes runs reads them with a second."""
    ids, crashed, next_due_at = await db.one(
        f"SELECT ids, crashed, next_due_at FROM {schema}.claim_runs(%s, %s, %s, %s, %s, %s, %s, %s)",
        [
            request.incarnation,
            texts([route.workspace for route in request.routes]),
            texts([route.workflow for route in request.routes]),
            texts([route.version for route in request.routes]),
            request.limit,
            request.blocked,
            request.after,
            CONFIRM_US,
        ],
    )
    found = await runs.get(db, schema, ids)
    # A run that is no longer at hand was pruned or taken from us since; the fence will say so.
    taken = [ClaimedRun(run, crash) for run, crash in zip(found, crashed, strict=True) if run is not None]
    return Claim([one for one in taken if one.run.owner == request.incarnation], next_due_at)


async def release(db: Database, schema: str, held: Sequence[tuple[str, int]]) -> int:
    if not held:
        return 0
    ordered = sorted(held)
    parameters = [texts([run_id for run_id, _ in ordered]), ints([epoch for _, epoch in ordered])]
    [count] = await db.one(f"SELECT {schema}.release_runs(%s, %s)", parameters)
    return int(count)


async def limits(db: Database, schema: str, workspace: str, workflow: str | None) -> list[LimitState]:
    rows = await db.read(
        'SELECT workflow, lane, rule, kind, "limit", period_us, used, queued, weight, next_at'
        f" FROM {schema}.limits(%s, %s)",
        [workspace, workflow],
    )
    return [LimitState(*row) for row in rows]


async def owned(db: Database, schema: str, incarnation: str) -> list[tuple[str, int]]:
    rows = await db.read(f"SELECT id, epoch FROM {schema}.runs WHERE owner = %s", [incarnation])
    return [(run_id, epoch) for run_id, epoch in rows]


async def leave(db: Database, schema: str, incarnation: str) -> None:
    await db.all(f"DELETE FROM {schema}.engines WHERE incarnation = %s RETURNING 1", [incarnation])
