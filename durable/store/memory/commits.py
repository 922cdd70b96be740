"""The one way in which a run changes, and the operator's."""

from __future__ import annotations

import copy
from bisect import insort
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from msgspec import UNSET

from durable.core.errors import StoreError
from durable.core.journal import Entry
from durable.protocol.states import PARKED, REOPENABLE, Activity, Status
from durable.store.checks import check_batch, refusal
from durable.store.items import ItemKey
from durable.store.memory.items import Items
from durable.store.records import (
    AddFire,
    CloseWaiter,
    Commit,
    CommitOutcome,
    CommitStatus,
    DropItem,
    FreeSlots,
    OpenWaiter,
    PutItem,
    PutMessage,
    RunRecord,
    SetAttributes,
    StartRun,
)

_FENCED = CommitOutcome(CommitStatus.FENCED)


class Commits(Items):
    async def commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        check_batch(batch, self._capabilities.max_batch)
        with self._tables.lock:
            now = self._clock.now()
            outcomes = [self._commit(commit, now) for commit in batch]
        self._tables.listeners.changed(self)
        return outcomes

    async def commit_with(self, work: Callable[[Any], Awaitable[None]], commit: Commit) -> CommitOutcome:
        raise StoreError("the memory store has no transactions to share; use SQLite or Postgres for ctx.transaction")

    async def requeue(self, run_id: str, *, commit_id: str, entry: Entry, activity: str) -> RunRecord | None:
        with self._tables.lock:
            run = self._tables.runs.get(run_id)
            if run is None:
                return None
            if run.commit_id != commit_id:
                parked = run.status is Status.ACTIVE and run.activity in PARKED
                if run.status not in REOPENABLE and not parked:
                    return None
                now = self._clock.now()
                self._disown(run)
                self._free_slots(run_id)
                run.epoch += 1
                run.seq += 1
                run.commit_id = commit_id
                run.status, run.activity = Status.ACTIVE, Activity(activity)
                if run.finished_at is not None:
                    self._tables.ended[run.workspace, run.workflow].remove((run.finished_at, run.id))
                run.recovery_attempts = 0
                run.output = run.error = run.finished_at = None
                run.updated_at = now
                self._tables.journals[run_id].append(_renumbered(entry, run.seq))
                self._due(run, now)
            answer = copy.copy(run)
        self._tables.listeners.changed(self)
        return answer

    # ------------------------------------------------------------------ one commit, under the lock

    def _commit(self, commit: Commit, now: int) -> CommitOutcome:
        tables = self._tables
        run = tables.runs.get(commit.run_id)
        if run is None:
            return _FENCED
        if run.commit_id == commit.commit_id:
            return CommitOutcome(CommitStatus.DONE, run.inbox_last)
        if run.epoch != commit.epoch or run.seq != commit.expected_seq or run.status is not Status.ACTIVE:
            return _FENCED
        failure = refusal(commit, self._capabilities.max_payload)
        if failure is not None:
            return CommitOutcome(CommitStatus.FENCED, failure=failure)
        terminal = commit.status is not UNSET and commit.status is not Status.ACTIVE
        activity = run.activity if commit.activity is UNSET else commit.activity
        inbox_read = run.inbox_read if commit.inbox_read is UNSET else commit.inbox_read
        wake_at = commit.wake_at
        if commit.suspend and not terminal and activity not in PARKED:
            if run.inbox_last > inbox_read:
                wake_at = now
            elif wake_at is None:
                return CommitOutcome(CommitStatus.FENCED, failure=StoreError(NO_WAKE_TIME.format(run.id)))
        # Nothing below this line can fail: all or none.
        entries = commit.entries
        if entries:
            tables.journals[run.id].extend(entries)
            run.seq += len(entries)
        run.commit_id = commit.commit_id
        run.updated_at = now
        run.inbox_read = inbox_read
        if commit.progressed:
            run.recovery_attempts = 0
        if commit.activity is not UNSET:
            run.activity = activity
            run.error = commit.error if activity is Activity.BLOCKED else None
        if terminal:
            run.status = commit.status  # type: ignore[assignment]
            run.output, run.error, run.finished_at, run.wake_at = commit.output, commit.error, now, None
            self._disown(run)
            insort(tables.ended.setdefault((run.workspace, run.workflow), []), (now, run.id))
        elif commit.suspend:
            self._disown(run)
            if wake_at is None or activity in PARKED:
                run.wake_at = wake_at
            else:
                self._due(run, wake_at)
        wake = self._effects(run, commit, now) if commit.effects else ()
        if terminal:
            for waiter_id in list(tables.waiters.get(run.id, ())):
                self._close_waiter(run, waiter_id)
            self._free_slots(run.id)
        return CommitOutcome(CommitStatus.DONE, run.inbox_last, wake)

    def _effects(self, run: RunRecord, commit: Commit, now: int) -> tuple[str, ...]:
        tables = self._tables
        wake: dict[str, None] = {}
        for effect in sorted(commit.effects, key=_starts_first):
            match effect:
                case StartRun(new):
                    self._start(new, now)
                case AddFire(schedule_id, occurrence, new):
                    self._fire(schedule_id, occurrence, new, now)
                case PutMessage(message):
                    owner = self._send(message, now).owner
                    if owner is not None:
                        wake[owner] = None
                case OpenWaiter(waiter_id, event):
                    self._close_waiter(run, waiter_id)
                    tables.waiters.setdefault(run.id, {})[waiter_id] = effect
                    tables.awaited.setdefault((run.workspace, event), {})[run.id, waiter_id] = None
                case CloseWaiter(waiter_id):
                    self._close_waiter(run, waiter_id)
                case SetAttributes(attributes, tags):
                    merged = {**run.attributes, **attributes}
                    run.attributes = {name: value for name, value in merged.items() if value is not None}
                    run.tags = run.tags if tags is None else tags
                case FreeSlots(keys):
                    self._free_slots(run.id, keys)
                case PutItem(kind, item_id, data, expires_at):
                    self._put_item(ItemKey(run.workspace, kind, item_id), data, None, expires_at, now)
                case DropItem(kind, item_id):
                    tables.items.pop((kind, run.workspace, item_id), None)
        return tuple(wake)


NO_WAKE_TIME = (
    "run {} would be suspended with nothing to wake it: give a suspending commit a wake_at,"
    " unless the run is paused or blocked"
)


def _renumbered(entry: Entry, seq: int) -> Entry:
    fields = {name: getattr(entry, name) for name in Entry.__struct_fields__}
    return Entry(**{**fields, "seq": seq})


def _starts_first(effect: object) -> bool:
    """A child's start comes before a message to it, in whatever order the commit names them."""
    return not isinstance(effect, (StartRun, AddFire))
