"""Deleting finished runs, and rows that nobody asks for any more, in bounded batches; and the journal's months: made ahead,
dropped once no run is left in them."""

from __future__ import annotations

import time
from contextlib import suppress

from durable.core.errors import StoreUnavailable
from durable.store.postgres.connection import Database
from durable.store.postgres.packing import texts
from durable.store.records import PruneRequest

MONTHS_AHEAD = 2
TIDY_EVERY_S = 3600.0
SWEEP_ROWS = 1000
SWEEPS = 20
"""How often a call sweeps so many rows, at most: the rest is for the next."""


class Retention:
    """Prunes for one store object."""

    def __init__(self, db: Database, schema: str) -> None:
        self._db = db
        self._schema = schema
        self._tidied_at = -TIDY_EVERY_S

    async def prune(self, request: PruneRequest) -> int:
        if request.older_than_us is None and request.keep is None:
            await self._sweep(request)
            return 0
        [count] = await self._db.one(
            f"SELECT {self._schema}.prune_runs(%s, %s, %s, %s, %s, %s)",
            [
                request.workspace,
                request.workflow,
                texts(request.but),
                request.older_than_us,
                request.keep,
                request.limit,
            ],
        )
        if count < request.limit:
            await self._sweep(request)
        if count < request.limit and time.monotonic() - self._tidied_at > TIDY_EVERY_S:
            await self.tidy()
        return int(count)

    async def _sweep(self, request: PruneRequest) -> None:
        """What hangs on no run: in parts too, all that is there now but for a bound."""
        events = request.older_than_us if request.workflow is None else None
        for _ in range(SWEEPS):
            [count] = await self._db.one(
                f"SELECT {self._schema}.sweep(%s, %s, %s)", [request.workspace, events, SWEEP_ROWS]
            )
            if count < SWEEP_ROWS:
                return

    async def tidy(self) -> None:
        """The next months get their partitions, also where no engine has started for long; months that are over and empty go,
        and give back their space at once. A table that is busy is left for later."""
        self._tidied_at = time.monotonic()
        with suppress(StoreUnavailable):
            await self._db.all(f"SELECT {self._schema}.make_partitions(now(), %s)", [MONTHS_AHEAD])
            await self._db.all(f"SELECT {self._schema}.drop_partitions(now())")
