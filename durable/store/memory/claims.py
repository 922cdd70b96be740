"""Who owns what: heartbeats, claims, releases; and the slots that come with a claim. Whose turn it is says lanes.py."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Collection, Iterator, Sequence

from durable.protocol.states import PARKED, Activity, Status
from durable.store import lanes
from durable.store.admission import LimitState
from durable.store.lanes import BEGUN, HOLDS, NEW, Free, LaneId, Ledger, Pick, Queue, Waiting
from durable.store.memory.rows import Rows, route_of
from durable.store.memory.tables import Engine, History, Line, Ready
from durable.store.records import Beat, Claim, ClaimedRun, ClaimRequest, Route, Rule, RunRecord


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
                elif self._lacks(run):
                    self._disown(run)
                    run.epoch += 1
                    if run.activity is Activity.EXECUTING:
                        run.recovery_attempts += 1
                        run.activity = Activity.QUEUED
                    self._due(run, now)
                else:
                    orphans.append(run)
        return orphans

    # ------------------------------------------------------------------ due runs

    def _claim_due(self, request: ClaimRequest, now: int) -> Claim:
        due = _Due(self, request, now)
        free = [Free(run.id, run.priority, run.wake_at or 0) for run in due.orphans]
        free += due.free()
        free.sort(key=lambda one: (-one.priority, one.wake_at, one.run_id))
        choice = lanes.choose(free, due.queues, due.ledger, request.limit, now)
        for pick in choice.picks:
            self._pay(pick, now)
        runs = self._tables.runs
        taken = [self._take(runs[pick.run_id], request.incarnation, now) for pick in choice.picks]
        due.put_back({pick.run_id for pick in choice.picks})
        if choice.more:
            return Claim(taken, now)
        waits = [at for at in (due.next_at(), choice.opens_at) if at is not None]
        return Claim(taken, min(waits, default=None))

    def _pay(self, pick: Pick, now: int) -> None:
        """What a turn costs."""
        tables = self._tables
        if pick.lane is None:
            return
        for key in pick.takes:
            self._hold(pick.run_id, key)
        rules = {rule.key: rule for rule in tables.lanes[pick.lane].rules}
        for key in pick.begins:
            period_us = rules[key].period_us
            tables.begun.setdefault(key, History(period_us)).add(now, period_us)
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
        due = [run for run in inside if _waits(run, run.wake_at) and (run.wake_at or 0) <= now]
        for rule in tables.lanes[lane].rules:
            next_at = None
            if rule.kind == lanes.SLOTS:
                used = len(tables.holders.get(rule.key, ()))
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


class _Due:
    """The due runs of a claim's routes, taken out of their lines as far as they are looked at."""

    def __init__(self, rows: Claims, request: ClaimRequest, now: int) -> None:
        self.rows = rows
        self.tables = rows._tables
        self.now = now
        self.most = request.limit + 1
        self.seen: set[str] = set()
        self.out: list[tuple[Line, Ready]] = []
        self.lines: list[Line] = []
        self.routes = set(request.routes)
        self.orphans = rows._orphans(self.routes, request.incarnation, now)
        self.queues: list[Queue] = []
        self._plain: list[Line] = []
        self._holding: list[Free] = []
        by_lane: dict[LaneId, list[Line]] = {}
        for route in self.routes:
            for key, line in self.tables.lines.get(route, {}).items():
                self.lines.append(line)
                self._ripen(line, key is not None)
                if key is None:
                    self._plain.append(line)
                elif line.ready:
                    by_lane.setdefault((route.workspace, route.workflow, key), []).append(line)
        for lane, lines in by_lane.items():
            self._queue(lane, lines)
        self.ledger = self._ledger()

    def free(self) -> list[Free]:
        """Those that wait for nothing."""
        found = self._holding
        for line in self._plain:
            for _, run in self._first(line, self.most):
                found.append(Free(run.id, run.priority, run.wake_at or 0))
        return found

    def next_at(self) -> int | None:
        """When the next of these lines falls due."""
        return min((line.later[0][0] for line in self.lines if line.later), default=None)

    def put_back(self, taken: Collection[str]) -> None:
        for line, entry in self.out:
            if entry[2] not in taken:
                heapq.heappush(line.ready, entry)
        for route in self.routes:
            lines = self.tables.lines.get(route, {})
            for key in [key for key, line in lines.items() if not line.later and not line.ready]:
                del lines[key]

    # ------------------------------------------------------------------

    def _ripen(self, line: Line, laned: bool) -> None:
        """What has come due is ready. Stale entries are dropped here; a clock that went back is obeyed."""
        runs, now = self.tables.runs, self.now
        while line.later and (line.later[0][0] <= now or not _waits(runs.get(line.later[0][1]), line.later[0][0])):
            wake_at, run_id = heapq.heappop(line.later)
            run = runs.get(run_id)
            if run is not None and _waits(run, wake_at):
                order = (self._class(run), self._rank(run)) if laned else (-run.priority, wake_at)
                heapq.heappush(line.ready, (*order, run_id, wake_at))

    def _class(self, run: RunRecord) -> int:
        if run.id in self.tables.slots:
            return HOLDS
        return NEW if run.started_at is None else BEGUN

    def _rank(self, run: RunRecord) -> int:
        return lanes.rank(self.tables.first_due[run.id], run.priority)

    def _pop(self, line: Line) -> tuple[Ready, RunRecord] | None:
        """The first that is due and was not seen in this claim. Stale entries are dropped."""
        while line.ready:
            entry = heapq.heappop(line.ready)
            _, _, run_id, wake_at = entry
            run = self.tables.runs.get(run_id)
            if run is None or not _waits(run, wake_at) or run_id in self.seen:
                continue
            if wake_at > self.now:
                heapq.heappush(line.later, (wake_at, run_id))
                continue
            self.seen.add(run_id)
            self.out.append((line, entry))
            return entry, run
        return None

    def _first(self, line: Line, most: int) -> Iterator[tuple[Ready, RunRecord]]:
        for _ in range(most):
            found = self._pop(line)
            if found is None:
                return
            yield found

    def _queue(self, lane: LaneId, lines: list[Line]) -> None:
        rules = self.tables.lanes[lane]
        heads: list[tuple[Ready, Waiting]] = []
        for line in lines:
            while line.ready and line.ready[0][0] == HOLDS and len(heads) + len(self._holding) < 2 * self.most:
                found = self._pop(line)
                if found is None:
                    break
                entry, run = found
                if entry[0] != HOLDS or self.rows._lacks(run):
                    heads.append(self._waiting(run))
                else:
                    self._holding.append(Free(run.id, run.priority, run.wake_at or 0))
        self.queues.append(Queue(lane, rules.rules, rules.weight, self._in_turn(heads, lines)))

    def _in_turn(self, heads: list[Waiting], lines: list[Line]) -> Iterator[Waiting]:
        yield from heads
        while True:
            ready = [line for line in lines if line.ready]
            if not ready:
                return
            found = self._pop(min(ready, key=lambda line: line.ready[0]))
            if found is not None:
                yield self._waiting(found[1])

    def _waiting(self, run: RunRecord) -> Waiting:
        return Waiting(run.id, run.priority, self._rank(run), self.rows._lacks(run), run.started_at is None)

    def _ledger(self) -> Ledger:
        tables = self.tables
        rules: list[Rule] = [rule for queue in self.queues for rule in queue.rules]
        used = {rule.key: len(tables.holders.get(rule.key, ())) for rule in rules if rule.kind == lanes.SLOTS}
        begun = {
            rule.key: tables.begun[rule.key].times
            for rule in rules
            if rule.kind == lanes.THROTTLE and rule.key in tables.begun
        }
        return Ledger(used, begun, tables.finish, tables.clock)


def _waits(run: RunRecord | None, wake_at: int | None) -> bool:
    """Whether a line's entry still says the truth; its run may be gone."""
    return (
        run is not None
        and run.owner is None
        and run.wake_at == wake_at
        and run.status is Status.ACTIVE
        and run.activity not in PARKED
    )
