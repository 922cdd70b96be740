"""How the tasks of this engine stand: signs of life, and workers that were lost with one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from durable.transports.db.rows import Seen, TaskRow
from durable.transports.db.tables import Tables
from durable.transports.trouble import Trouble


class Watch:
    """Looks at all of them by one question every `interval` seconds, for as long as there are any."""

    def __init__(
        self,
        tables: Tables,
        *,
        interval: float,
        max_deliveries: int,
        alive: Callable[[TaskRow], None],
        give_up: Callable[[TaskRow, str], None],
    ) -> None:
        """`alive`: a claim is new, or was extended. `give_up`: its workers let their claims run out too often."""
        self._tables = tables
        self._interval = interval
        self._max_deliveries = max_deliveries
        self._alive = alive
        self._give_up = give_up
        self._stands: dict[str, _Stand] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, step_id: str) -> None:
        """From now on; once is enough."""
        self._stands.setdefault(step_id, _Stand())
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._look(), name="durable-db-watch")

    def drop(self, step_id: str) -> None:
        """It is over, or nobody waits for it."""
        self._stands.pop(step_id, None)

    async def close(self) -> None:
        self._stands.clear()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _look(self) -> None:
        trouble = Trouble("it cannot be seen how tasks stand", "it is seen again how tasks stand")
        try:
            while True:
                await asyncio.sleep(self._interval)
                ids = list(self._stands)
                if not ids:
                    return
                try:
                    seen = {one.row.step_id: one for one in await self._tables.look(ids)}
                except Exception as error:
                    trouble.tell(error)
                    continue
                trouble.over()
                for step_id in ids:
                    if step_id not in seen:
                        self.drop(step_id)
                    elif step_id in self._stands:
                        self._saw(self._stands[step_id], seen[step_id])
        finally:
            self._task = None

    def _saw(self, stood: _Stand, seen: Seen) -> None:
        row = seen.row
        if row.attempt != stood.attempt:
            stood.begin(row.attempt)
        if seen.claim is None or seen.claimed_at == stood.claimed_at:
            return
        others = stood.claim is not None and seen.claim != stood.claim and seen.deliveries == stood.deliveries
        stood.reclaims += others
        stood.claim, stood.claimed_at, stood.deliveries = seen.claim, seen.claimed_at, seen.deliveries
        if stood.reclaims >= self._max_deliveries:
            self.drop(row.step_id)
            self._give_up(row, f"{stood.reclaims} workers let their claim run out")
        else:
            self._alive(row)


class _Stand:
    """How a task stood when it was last seen."""

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, attempt: int | None) -> None:
        self.attempt = attempt
        self.claim: str | None = None
        self.claimed_at: int | None = None
        self.deliveries = 0
        self.reclaims = 0
        """By workers that do not count deliveries themselves."""
