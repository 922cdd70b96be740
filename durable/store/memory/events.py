"""Events: what is accepted, which runs it starts or joins, and who waits for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from msgspec.structs import replace

from durable.protocol.states import Activity, Status
from durable.store.admission import (
    Admission,
    Batch,
    Debounce,
    EventOutcome,
    EventQuery,
    EventRecord,
    NewEvent,
    Rate,
    Singleton,
    Trigger,
    Verdict,
    Waiter,
)
from durable.store.checks import check_event, check_events
from durable.store.memory.rows import Rows
from durable.store.memory.tables import History, Window
from durable.store.records import Message, NewRun, RunRecord, StartStatus


class Events(Rows):
    async def publish(self, events: Sequence[NewEvent]) -> list[EventOutcome]:
        for event in events:
            check_event(event, self._capabilities.max_payload)
        with self._tables.lock:
            now = self._clock.now()
            outcomes = [self._publish(event, now) for event in events]
        if not all(outcome.duplicate for outcome in outcomes):
            self._tables.listeners.changed(self)
        return outcomes

    async def events(self, query: EventQuery) -> list[EventRecord]:
        check_events(query)
        with self._tables.lock:
            events = self._tables.events.values()
            ordered = reversed(events) if query.newest_first else iter(events)
            found: list[EventRecord] = []
            for event in ordered:
                if len(found) >= query.limit:
                    break
                if _matches(event, query):
                    found.append(event)
            return found

    async def settle_events(self, ids: Sequence[str]) -> None:
        with self._tables.lock:
            for event_id in ids:
                event = self._tables.events.get(event_id)
                if event is not None:
                    self._tables.events[event_id] = replace(event, settled=True)

    # ------------------------------------------------------------------ one event, under the lock

    def _publish(self, new: NewEvent, now: int) -> EventOutcome:
        tables = self._tables
        there = new.id if new.id in tables.events else None
        if there is None and new.dedupe_id is not None:
            there = tables.dedupe_ids.get((new.workspace, new.dedupe_id))
        if there is not None:
            event = tables.events[there]
            if event.settled:
                return EventOutcome(event, True)
            probes = new.probes if new.id == there else None
            again = replace(new, workspace=event.workspace, name=event.name, probes=probes)
            return EventOutcome(event, True, tuple(self._waiting_for(again, now)))
        admissions = tuple(self._admit(trigger, now) for trigger in new.triggers)
        waiters = tuple(self._waiting_for(new, now))
        tables.accepted += 1
        event = EventRecord(
            new.id,
            new.workspace,
            new.name,
            new.data,
            tables.accepted,
            now,
            new.dedupe_id,
            new.meta,
            admissions,
            settled=not waiters,
        )
        tables.events[new.id] = event
        if new.dedupe_id is not None:
            tables.dedupe_ids[new.workspace, new.dedupe_id] = new.id
        return EventOutcome(event, False, waiters)

    def _waiting_for(self, event: NewEvent, now: int) -> Iterator[Waiter]:
        tables = self._tables
        for run_id, waiter_id in tables.awaited.get((event.workspace, event.name), ()):
            waiter = tables.waiters[run_id][waiter_id]
            in_time = waiter.expires_at is None or waiter.expires_at > now
            likely = not waiter.probe or event.probes is None or waiter.probe in event.probes
            if in_time and likely:
                yield Waiter(run_id, waiter_id, waiter.match, waiter.expires_at, tables.runs[run_id].owner)

    # ------------------------------------------------------------------ its triggers

    def _admit(self, trigger: Trigger, now: int) -> Admission:
        new = trigger.run
        if trigger.rate is not None and not self._open(trigger.rate, now):
            return Admission(new.workflow, Verdict.DROPPED)
        window = self._window(trigger.debounce or trigger.batch, now)
        if window is not None and trigger.batch is not None and not self._fits(window, trigger.batch):
            self._move(self._tables.runs[window.run_id], now, now)
            window = None
        old = None if trigger.singleton is None else self._unfinished(trigger.singleton)
        if window is not None and window.run_id == old:
            old = None  # the run that this event joins is not in its way
        if trigger.singleton is not None and trigger.singleton.mode == "skip" and old is not None:
            return Admission(new.workflow, Verdict.SKIPPED, old)
        if trigger.debounce is not None:
            run_id, fresh = self._debounce(new, trigger.debounce, window, now)
            verdict = Verdict.DEBOUNCED
        elif trigger.batch is not None:
            run_id, fresh = self._batch(new, trigger.batch, window, now)
            verdict = Verdict.BATCHED
        else:
            run_id, fresh = self._begin(new, now)
            verdict = Verdict.STARTED
            if trigger.rate is not None and fresh:
                history = self._tables.rates.setdefault(trigger.rate.key, History(trigger.rate.period_us))
                history.add(now, trigger.rate.period_us)
        cancelled = None
        if trigger.singleton is not None:
            self._tables.singletons[trigger.singleton.key] = run_id
            if old is not None and old != run_id:
                self._ask_to_stop(old, new, now)
                cancelled = old
        return Admission(new.workflow, verdict, run_id, fresh, cancelled)

    def _begin(self, new: NewRun, now: int) -> tuple[str, bool]:
        """The run that the event is in, and whether it is new."""
        outcome = self._start(new, now)
        return outcome.run_id, outcome.status is StartStatus.STARTED

    def _open(self, rate: Rate, now: int) -> bool:
        history = self._tables.rates.get(rate.key)
        if history is None:
            return rate.limit > 0
        return sum(at > now - rate.period_us for at in history.times) < rate.limit

    def _unfinished(self, singleton: Singleton) -> str | None:
        run = self._tables.runs.get(self._tables.singletons.get(singleton.key, ""))
        return run.id if run is not None and run.status is Status.ACTIVE else None

    def _ask_to_stop(self, run_id: str, new: NewRun, now: int) -> None:
        reason = msgspec.json.encode({"reason": f"run {new.id} takes its place"})
        workspace = self._tables.runs[run_id].workspace
        self._send(Message(run_id, f"singleton:{new.id}", "cancel", payload=reason, workspace=workspace), now)

    def _window(self, policy: Debounce | Batch | None, now: int) -> Window | None:
        """The run that events may still join: it has not begun, and is not due."""
        window = None if policy is None else self._tables.windows.get(policy.key)
        run = None if window is None else self._tables.runs.get(window.run_id)
        if run is None or run.status is not Status.ACTIVE or run.started_at is not None:
            return None
        return window if run.activity is Activity.SCHEDULED and (run.wake_at or 0) > now else None

    def _debounce(self, new: NewRun, rule: Debounce, window: Window | None, now: int) -> tuple[str, bool]:
        opened_at = now if window is None else window.opened_at
        until = now + rule.period_us
        if rule.max_wait_us is not None:
            until = min(until, opened_at + rule.max_wait_us)
        if window is None:
            return self._open_window(new, rule.key, until, now)
        run = self._tables.runs[window.run_id]
        run.input, run.input_hash, run.meta, run.updated_at = new.input, new.input_hash, new.meta, now
        self._move(run, until, now)
        return run.id, False

    def _batch(self, new: NewRun, rule: Batch, window: Window | None, now: int) -> tuple[str, bool]:
        if window is not None:
            run = self._tables.runs[window.run_id]
            run.input, run.updated_at = _grown(run.input, rule.member), now
            window.members += 1
            if window.members >= rule.max_size:
                self._move(run, now, now)
            return run.id, False
        until = now if rule.max_size <= 1 else now + rule.timeout_us
        return self._open_window(new, rule.key, until, now)

    def _fits(self, window: Window, rule: Batch) -> bool:
        return len(_grown(self._tables.runs[window.run_id].input, rule.member)) <= self._capabilities.max_payload

    def _open_window(self, new: NewRun, key: str, until: int, now: int) -> tuple[str, bool]:
        run_id, fresh = self._begin(replace(new, owner=None, wake_at=until), now)
        if fresh:
            self._tables.windows[key] = Window(run_id, now)
        return run_id, fresh

    def _move(self, run: RunRecord, wake_at: int, now: int) -> None:
        run.updated_at = now
        if wake_at <= now:
            run.activity = Activity.QUEUED
        self._due(run, wake_at)


def _grown(batch: bytes, member: bytes) -> bytes:
    return batch[:-2] + b"," + member + b"]}"


def _matches(event: EventRecord, query: EventQuery) -> bool:
    return (
        (query.workspace is None or event.workspace == query.workspace)
        and (query.id is None or event.id == query.id)
        and (query.name is None or event.name == query.name)
        and (query.since is None or event.received_at >= query.since)
        and (query.after is None or event.number > query.after)
        and (query.before is None or event.number < query.before)
        and not (query.unsettled and event.settled)
    )
