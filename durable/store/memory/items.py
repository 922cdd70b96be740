"""Items, and schedules, whose occurrences start runs."""

from __future__ import annotations

from collections.abc import Sequence

from durable.store.checks import check_item, check_run
from durable.store.items import Fire, FireOutcome, Item, ItemKey, ItemPage, ItemQuery, NewItem, PutOutcome
from durable.store.memory.rows import Rows
from durable.store.records import NewRun, StartStatus


class Items(Rows):
    async def put_items(self, items: Sequence[NewItem]) -> list[PutOutcome]:
        for item in items:
            check_item(item, self._capabilities.max_payload)
        with self._tables.lock:
            now = self._clock.now()
            outcomes = [self._put(item, now) for item in items]
        if any(outcome.done for outcome in outcomes):
            self._tables.listeners.changed(self)
        return outcomes

    async def get_items(self, keys: Sequence[ItemKey]) -> list[Item | None]:
        with self._tables.lock:
            now = self._clock.now()
            return [self._item(key, now) for key in keys]

    async def list_items(self, query: ItemQuery) -> ItemPage:
        with self._tables.lock:
            now = self._clock.now()
            found = [
                item
                for item in self._tables.items.values()
                if item.kind == query.kind
                and (query.workspace is None or item.workspace == query.workspace)
                and (query.changed_since is None or item.updated_at >= query.changed_since)
                and not _expired(item, now)
            ]
        if query.due:
            return _due_page(found, query.limit, now)
        if query.after is not None:
            after = (query.after.workspace, query.after.id)
            found = [item for item in found if (item.workspace, item.id) > after]
        found.sort(key=lambda item: (item.workspace, item.id))
        return ItemPage(found[: query.limit], now)

    async def delete_items(self, keys: Sequence[ItemKey]) -> int:
        with self._tables.lock:
            now = self._clock.now()
            count = 0
            for key in keys:
                item = self._tables.items.pop((key.kind, key.workspace, key.id), None)
                count += item is not None and not _expired(item, now)
        if count:
            self._tables.listeners.changed(self)
        return count

    async def fire(self, fires: Sequence[Fire]) -> list[FireOutcome]:
        for fire in fires:
            check_item(fire.item, self._capabilities.max_payload)
            for occurrence in fire.occurrences:
                check_run(occurrence.run, self._capabilities.max_payload)
        with self._tables.lock:
            now = self._clock.now()
            outcomes = [self._move_on(fire, now) for fire in fires]
        if any(outcome.done for outcome in outcomes):
            self._tables.listeners.changed(self)
        return outcomes

    # ------------------------------------------------------------------ under the lock

    def _item(self, key: ItemKey, now: int) -> Item | None:
        item = self._tables.items.get((key.kind, key.workspace, key.id))
        return None if item is None or _expired(item, now) else item

    def _put(self, new: NewItem, now: int) -> PutOutcome:
        key = ItemKey(new.workspace, new.kind, new.id)
        there = self._item(key, now)
        version = 0 if there is None else there.version
        if new.expected is not None and new.expected != version:
            return PutOutcome(False, version)
        expires_at = None if new.expires_in is None else now + new.expires_in
        return PutOutcome(True, self._put_item(key, new.data, new.due_at, expires_at, now))

    def _put_item(self, key: ItemKey, data: bytes, due_at: int | None, expires_at: int | None, now: int) -> int:
        there = self._item(key, now)
        version = 1 if there is None else there.version + 1
        self._tables.items[key.kind, key.workspace, key.id] = Item(
            key.workspace, key.kind, key.id, data, version, due_at, expires_at, now
        )
        return version

    def _move_on(self, fire: Fire, now: int) -> FireOutcome:
        if not self._put(fire.item, now).done:
            return FireOutcome(False)
        started = [one.run.id for one in fire.occurrences if self._fire(fire.schedule_id, one.at, one.run, now)]
        return FireOutcome(True, tuple(started))

    def _fire(self, schedule_id: str, occurrence: int, new: NewRun, now: int) -> bool:
        """Whether the occurrence is new, and the run."""
        tables = self._tables
        if (schedule_id, occurrence) in tables.fires:
            return False
        tables.fires.add((schedule_id, occurrence))
        tables.fired.setdefault(new.id, []).append((schedule_id, occurrence))
        return self._start(new, now).status is StartStatus.STARTED


def _due_page(items: list[Item], limit: int, now: int) -> ItemPage:
    timed = sorted((item.due_at, item.workspace, item.id, item) for item in items if item.due_at is not None)
    due = [item for at, _, _, item in timed if at <= now]
    later = next((at for at, *_ in timed if at > now), None)
    return ItemPage(due[:limit], now, now if len(due) > limit else later)


def _expired(item: Item, now: int) -> bool:
    return item.expires_at is not None and item.expires_at <= now
