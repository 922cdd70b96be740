"""Who owns what: heartbeats, claims, releases; and the slots that come with a claim. Whose turn it is says lanes.py."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence

from durable.protocol.states import PARKED, Activity, Status
from durable.store import lanes
from durable.store.admission import LimitState
from durable.store.lanes import LaneId, Pick
from durable.store.memory.due import Due, waits
from durable.store.memory.rows import Rows, route_of
from durable.store.memory.tables import Engine, History
from durable.store.records import Beat, Claim, ClaimedRun, ClaimRequest, Route, RunRecord


class Claims(Rows):
    def beat(self, incarnation: str, lease_us: int) -> Beat:
        with self._tables.lock:
            now = self._clock.now()
            engine = self._tables.engines.setdefault(incarnation, Engine(now))
            if not engine.dead:
                engine.expires_at = now + lease_us
            return Beat(now, not engine.dead)

    async def leave(self, incarnation: str) -> None:
        with self._tables.lock:
            self._tables.engines.pop(incarnation, None)
        self._tables.listeners.changed(self)

    async def claim(self, request: ClaimRequest) -> Claim:
        with self._tables.lock:
            now = self._clock.now()
            if self._gone(request.incarnation, now):
                return Claim([], None)
            if request.blocked:
                return self._claim_blocked(request, now)
            return self._claim_due(request, now)

    async def release(self, runs: Sequence[tuple[str, int]]) -> None:
        with self._tables.lock:
            now = self._clock.now()
            for run_id, epoch in runs:
                run = self._tables.runs.get(run_id)
                if run is not None and run.owner is not None and run.epoch == epoch:
                    self._disown(run)
                    self._free_slots(run_id)
                    if run.activity is Activity.EXECUTING:
                        run.activity = Activity.QUEUED
                    run.updated_at = now
                    if run.activity not in PARKED:
                        self._due(run, now)
        self._tables.listeners.changed(self)

    async def owned(self, incarnation: str) -> list[tuple[str, int]]:
        with self._tables.lock:
            runs = self._tables.runs
            return [(run_id, runs[run_id].epoch) for run_id in self._tables.owned.get(incarnation, ())]

    async def limits(self, workspace: str, workflow: str | None = None) -> list[LimitState]:
        with self._tables.lock:
            now = self._clock.now()
            found = [lane for lane in self._tables.lanes if lane[0] == workspace and workflow in (None, lane[1])]
            return [state for lane in sorted(found) for state in self._limits(lane, now)]

    # ------------------------------------------------------------------ who is gone

    def _gone(self, incarnation: str, now: int) -> bool:
        engine = self._tables.engines.get(incarnation)
        return engine is None or engine.dead or engine.expires_at <= now

    def _orphans(self, routes: Collection[Route], claimer: str, now: int) -> list[RunRecord]:
        """Runs of these routes whose owner is gone; that owner is marked dead. Those nobody may take now are merely freed,
        under a new epoch: parked ones, and those that lack a slot."""
        tables = self._tables
        orphans: list[RunRecord] = []
        for owner, owned in tables.owned.items():
            if owner == claimer or not owned or not self._gone(owner, now):
                continue
            found = [run for run in map(tables.runs.__getitem__, owned) if route_of(run) in routes]
            if found and owner in tables.engines:
                tables.engines[owner].dead = True
            for run in found:
                if run.activity in PARKED:
                    self._disown(run)
                    self._free_slots(run.id)
                    run.epoch += 1
                    run.updated_at = now
                elif self._lacks(run):
                    self._disown(run)
                    run.epoch += 1
                    run.updated_at = now
                    if run.activity is Activity.EXECUTING:
                        run.recovery_attempts += 1
                        run.activity = Activity.QUEUED
                    self._due(run, now)
                else:
                    orphans.append(run)
        return orphans

    # ------------------------------------------------------------------ due runs

    def _claim_due(self, request: ClaimRequest, now: int) -> Claim:
        routes = set(request.routes)
        due = Due(self, routes, self._orphans(routes, request.incarnation, now), request.limit, now)
        choice = lanes.choose(due.free(), due.queues, due.ledger, request.limit, now)
        for pick in choice.picks:
            self._pay(pick, now)
        runs = self._tables.runs
        taken = [self._take(runs[pick.run_id], request.incarnation, now) for pick in choice.picks]
        due.put_back({pick.run_id for pick in choice.picks})
        if choice.more:
            return Claim(taken, now)
        times = [at for at in (due.next_at(), choice.opens_at) if at is not None]
        return Claim(taken, min(times, default=None))

    def _pay(self, pick: Pick, now: int) -> None:
        """What a turn costs."""
        tables = self._tables
        if pick.lane is None:
            return
        for key in pick.takes:
            self._hold(pick.run_id, key)
        periods = {rule.key: rule.period_us for rule in tables.lanes[pick.lane].rules if rule.kind == lanes.THROTTLE}
        for key in pick.begins:
            tables.begun.setdefault(key, History(periods[key])).add(now, periods[key])
        tables.finish[pick.lane, pick.priority] = pick.finish
        tables.clock[pick.lane[:2], pick.priority] = pick.start

    def _take(self, run: RunRecord, incarnation: str, now: int) -> ClaimedRun:
        crashed = run.owner is not None and run.activity is Activity.EXECUTING
        self._disown(run)
        run.owner = incarnation
        self._tables.owned.setdefault(incarnation, {})[run.id] = None
        run.epoch += 1
        run.recovery_attempts += crashed
        if run.activity is not Activity.BLOCKED:
            run.activity = Activity.QUEUED if run.recovery_attempts else Activity.EXECUTING
        run.started_at = run.started_at or now
        run.updated_at = now
        return ClaimedRun(copy.copy(run), crashed)

    def _claim_blocked(self, request: ClaimRequest, now: int) -> Claim:
        routes = set(request.routes)
        self._orphans(routes, request.incarnation, now)
        blocked = [
            run
            for run in self._tables.runs.values()
            if run.activity is Activity.BLOCKED
            and run.status is Status.ACTIVE
            and run.owner is None
            and run.id > request.after
            and route_of(run) in routes
        ]
        queue = [run for run in blocked if self._lacks(run)]
        for run in queue:  # they are tried again when their lane lets them
            run.activity, run.error, run.updated_at = Activity.QUEUED, None, now
            self._due(run, now)
        rest = sorted((run for run in blocked if run.activity is Activity.BLOCKED), key=lambda run: run.id)
        taken = [self._take(run, request.incarnation, now) for run in rest[: request.limit]]
        return Claim(taken, None)

    # ------------------------------------------------------------------ limits

    def _limits(self, lane: LaneId, now: int) -> Iterator[LimitState]:
        tables = self._tables
        _, workflow, key = lane
        inside = [
            run
            for run in tables.runs.values()
            if run.status is Status.ACTIVE and (run.workspace, run.workflow, run.lane) == lane
        ]
        due = [run for run in inside if waits(run, run.wake_at) and (run.wake_at or 0) <= now]
        for rule in tables.lanes[lane].rules:
            next_at = None
            if rule.kind == lanes.SLOTS:
                used = self._used(rule.key)
                queued = sum(rule.key in self._lacks(run) for run in due)
            else:
                history = tables.begun.get(rule.key, History(rule.period_us))
                times = history.since(now)
                used = len(times)
                queued = sum(run.started_at is None for run in due)
                next_at = lanes.opens_at(rule, times, now)
            if inside or used:
                yield LimitState(
                    workflow,
                    key,
                    rule.key,
                    rule.kind,
                    rule.limit,
                    rule.period_us,
                    used,
                    queued,
                    tables.lanes[lane].weight,
                    next_at,
                )
