"""What the parts of this store do to one row, under the lock."""

from __future__ import annotations

import heapq

from durable.core.clock import Clock
from durable.protocol.states import PARKED, Activity, Status
from durable.store.interface import Capabilities
from durable.store.lanes import LaneId, lacking
from durable.store.memory.tables import Line, Places, Tables
from durable.store.records import (
    InboxRow,
    Message,
    NewRun,
    Route,
    RunRecord,
    SendOutcome,
    SendStatus,
    StartOutcome,
    StartStatus,
)


class Rows:
    """The base of the parts."""

    _clock: Clock
    _tables: Tables
    _capabilities: Capabilities

    def _start(self, new: NewRun, now: int) -> StartOutcome:
        tables = self._tables
        if new.id in tables.runs:
            return StartOutcome(StartStatus.EXISTING, new.id)
        if new.idempotency_key is not None:
            key = (new.workspace, new.workflow, new.idempotency_key)
            holder = tables.keys.setdefault(key, new.id)
            if holder != new.id:
                same = tables.runs[holder].input_hash == new.input_hash
                return StartOutcome(StartStatus.EXISTING if same else StartStatus.CONFLICT, holder)
        run = new_record(new, now)
        tables.runs[new.id] = run
        tables.journals[new.id] = list(new.entries)
        if new.parent is not None:
            tables.children.setdefault(new.parent.run_id, []).append(new.id)
        if new.lane is not None:
            tables.lanes[new.workspace, new.workflow, new.lane.key] = new.lane
        if new.owner is not None:
            tables.owned.setdefault(new.owner, {})[new.id] = None
        else:
            self._due(run, run.wake_at or now)
        return StartOutcome(StartStatus.STARTED, new.id)

    def _send(self, message: Message, now: int) -> SendOutcome:
        tables = self._tables
        run = tables.runs.get(message.run_id)
        if run is None or run.workspace != message.workspace:
            return SendOutcome(SendStatus.NOT_FOUND)
        if (message.run_id, message.id) in tables.message_ids:
            return SendOutcome(SendStatus.DUPLICATE, run.owner)
        if run.status is not Status.ACTIVE:
            return SendOutcome(SendStatus.FINISHED)
        run.inbox_last += 1
        tables.message_ids.add((message.run_id, message.id))
        tables.inboxes.setdefault(run.id, []).append(InboxRow(run.inbox_last, now, message))
        # A run that is not to begin yet begins no sooner for its mail; a cancel is no beginning.
        waits = run.activity in PARKED or (run.activity is Activity.SCHEDULED and message.kind != "cancel")
        if run.owner is None and not waits and (run.wake_at is None or run.wake_at > now):
            self._due(run, now)
        return SendOutcome(SendStatus.ACCEPTED, run.owner)

    # ------------------------------------------------------------------ ownership

    def _due(self, run: RunRecord, wake_at: int) -> None:
        """This unowned run is due then."""
        run.wake_at = wake_at
        if run.lane is not None and run.started_at is None:
            self._tables.first_due[run.id] = wake_at
        line = self._tables.lines.setdefault(route_of(run), {}).setdefault(run.lane, Line())
        heapq.heappush(line.later, (wake_at, run.id))

    def _disown(self, run: RunRecord) -> None:
        if run.owner is not None:
            self._tables.owned[run.owner].pop(run.id, None)
            run.owner = None

    # ------------------------------------------------------------------ slots

    def _lacks(self, run: RunRecord) -> tuple[str, ...]:
        """Keys of the slots it needs and does not hold."""
        lane = lane_of(run)
        if lane is None:
            return ()
        held = self._tables.slots.get(run.id, ())
        return lacking(self._tables.lanes[lane].rules, [key for key, _ in held])

    def _hold(self, run_id: str, key: str, number: int | None = None) -> None:
        """Give the run a slot: the lowest number that is free."""
        number = self._tables.places.setdefault(key, Places()).take(run_id, number)
        self._tables.slots.setdefault(run_id, []).append((key, number))

    def _free_slots(self, run_id: str, keys: tuple[str, ...] | None = None) -> None:
        """All slots of the run, or those of the given keys."""
        held = self._tables.slots.pop(run_id, [])
        kept = [slot for slot in held if keys is not None and slot[0] not in keys]
        if kept:
            self._tables.slots[run_id] = kept
        for key, number in held:
            if (key, number) not in kept:
                places = self._tables.places[key]
                places.free(number)
                if not places.holders:
                    del self._tables.places[key]

    def _used(self, key: str) -> int:
        """How many hold a slot of this key."""
        places = self._tables.places.get(key)
        return 0 if places is None else len(places.holders)

    # ------------------------------------------------------------------ waits

    def _close_waiter(self, run: RunRecord, waiter_id: str) -> None:
        waiters = self._tables.waiters.get(run.id, {})
        waiter = waiters.pop(waiter_id, None)
        if waiter is None:
            return
        if not waiters:
            del self._tables.waiters[run.id]
        awaited = self._tables.awaited[run.workspace, waiter.event]
        del awaited[run.id, waiter_id]
        if not awaited:
            del self._tables.awaited[run.workspace, waiter.event]


def new_record(new: NewRun, now: int) -> RunRecord:
    """The row a new run begins as."""
    owned = new.owner is not None
    if owned:
        activity = Activity.EXECUTING
    elif new.wake_at is not None and new.wake_at > now:
        activity = Activity.SCHEDULED
    else:
        activity = Activity.QUEUED
    return RunRecord(
        id=new.id,
        workspace=new.workspace,
        workflow=new.workflow,
        version=new.version,
        status=Status.ACTIVE,
        activity=activity,
        input=new.input,
        output=None,
        error=None,
        priority=new.priority,
        tags=new.tags,
        attributes=dict(new.attributes),
        parent=new.parent,
        idempotency_key=new.idempotency_key,
        input_hash=new.input_hash,
        wake_at=None if owned else (now if new.wake_at is None else new.wake_at),
        inbox_last=0,
        inbox_read=0,
        owner=new.owner,
        epoch=1 if owned else 0,
        seq=len(new.entries),
        commit_id=None,
        recovery_attempts=0,
        created_at=now,
        started_at=now if owned else None,
        finished_at=None,
        updated_at=now,
        lane=None if new.lane is None else new.lane.key,
        meta=new.meta,
    )


def route_of(run: RunRecord) -> Route:
    return Route(run.workflow, run.version, run.workspace)


def lane_of(run: RunRecord) -> LaneId | None:
    return None if run.lane is None else (run.workspace, run.workflow, run.lane)
