"""What happens in a store, of all runs, in order: the journal rows that came since the last look.

By looking: the newest runs, and those that were active. Each run's rows come in order, without gap or repeat; between
runs the order is that of their times. Used by `durable dev` and the demo.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from durable.protocol.states import Status

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.core.journal import Entry
    from durable.store.records import RunRecord

PAGE = 500
MAX_FOLLOWED = 5_000
"""Active runs followed at once; of more, the newest."""


class Feed:
    """A cursor on the whole store."""

    def __init__(self, app: Durable) -> None:
        self._app = app
        self._seen: dict[str, int] = {}
        self._active: dict[str, None] = {}
        self._newest: str | None = None

    async def skip(self) -> int:
        """Begin now: what has happened is not told. How many runs are active."""
        page = await self._app.find(limit=1)
        self._newest = page.runs[0].id if page.runs else None
        cursor = None
        while len(self._active) < MAX_FOLLOWED:
            page = await self._app.find(status=Status.ACTIVE, cursor=cursor, limit=PAGE)
            for run in page.runs:
                self._note(run, run.seq)
            cursor = page.cursor
            if cursor is None:
                break
        return len(self._active)

    async def look(self) -> list[tuple[RunRecord, Entry]]:
        """The rows since the last look. Raises StoreError; the next look then begins where this one did."""
        news: list[tuple[RunRecord, Entry]] = []
        told: list[tuple[RunRecord, int]] = []
        fresh = await self._fresh()
        for run in [*await self._followed(), *fresh]:
            seen = self._seen.get(run.id, 0)
            while run.seq > seen:
                entries = await self._app.engine.deps.store.page(run.id, seen, PAGE)
                if not entries:
                    break
                seen = entries[-1].seq
                news += [(run, entry) for entry in entries]
            told.append((run, seen))
        for run, seen in told:
            self._note(run, seen)
        if fresh:
            self._newest = fresh[0].id
        news.sort(key=lambda pair: (pair[1].at, pair[0].id, pair[1].seq))
        return news

    async def _followed(self) -> list[RunRecord]:
        ids = list(self._active)
        found: list[RunRecord] = []
        for start in range(0, len(ids), PAGE):
            found += _known(await self._app.engine.deps.store.get(ids[start : start + PAGE]))
        return found

    async def _fresh(self) -> list[RunRecord]:
        """Runs that are new since the last look."""
        fresh: list[RunRecord] = []
        cursor = None
        while len(fresh) < MAX_FOLLOWED:
            page = await self._app.find(cursor=cursor, limit=PAGE if fresh or self._newest is None else 20)
            for run in page.runs:
                if run.id == self._newest:
                    cursor = None
                    break
                if run.id not in self._seen:
                    fresh.append(run)
            else:
                cursor = page.cursor
            if cursor is None:
                break
        return fresh

    def _note(self, run: RunRecord, seq: int) -> None:
        # A run that has ended is followed until its last row was told.
        if run.status is Status.ACTIVE or seq < run.seq:
            self._seen[run.id] = seq
            self._active[run.id] = None
        else:
            self._active.pop(run.id, None)
            self._seen.pop(run.id, None)


def _known(records: Iterable[RunRecord | None]) -> list[RunRecord]:
    return [record for record in records if record is not None]
