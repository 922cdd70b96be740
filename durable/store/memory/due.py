"""The due runs of one claim, as lanes.py wants to see them: those that wait for nothing, and the queues of the lanes."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator

from durable.protocol.states import PARKED, Status
from durable.store import lanes
from durable.store.lanes import BEGUN, HOLDS, NEW, Free, LaneId, Ledger, Queue, Waiting
from durable.store.memory.rows import Rows
from durable.store.memory.tables import Line, Ready
from durable.store.records import Route, Rule, RunRecord


class Due:
    """The due runs of a claim's routes, taken out of their lines as far as they are looked at."""

    def __init__(self, rows: Rows, routes: Collection[Route], orphans: list[RunRecord], limit: int, now: int) -> None:
        self.rows = rows
        self.tables = rows._tables
        self.now = now
        self.most = limit + 1
        self.routes = routes
        self.seen: set[str] = set()
        self.out: list[tuple[Line, Ready]] = []
        self.lines: list[Line] = []
        self.queues: list[Queue] = []
        self._plain: list[Line] = []
        self._holding = [Free(run.id, run.priority, run.wake_at or 0) for run in orphans]
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
        return sorted(found, key=lambda one: (-one.priority, one.wake_at, one.run_id))

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
        while line.later and (line.later[0][0] <= now or not waits(runs.get(line.later[0][1]), line.later[0][0])):
            wake_at, run_id = heapq.heappop(line.later)
            run = runs.get(run_id)
            if run is not None and waits(run, wake_at):
                order = (self._class(run), self._rank(run)) if laned else (-run.priority, wake_at)
                heapq.heappush(line.ready, (*order, run_id, wake_at))

    def _class(self, run: RunRecord) -> int:
        if run.id in self.tables.slots:
            return HOLDS
        return NEW if run.started_at is None else BEGUN

    def _rank(self, run: RunRecord) -> int:
        return lanes.rank(self.tables.first_due[run.id], run.priority)

    def _head(self, line: Line) -> RunRecord | None:
        """The first that is due and was not seen in this claim. Stale entries before it are dropped."""
        while line.ready:
            _, _, run_id, wake_at = line.ready[0]
            run = self.tables.runs.get(run_id)
            if run is not None and waits(run, wake_at) and run_id not in self.seen:
                if wake_at <= self.now:
                    return run
                heapq.heappush(line.later, (wake_at, run_id))
            heapq.heappop(line.ready)
        return None

    def _pop(self, line: Line) -> tuple[Ready, RunRecord] | None:
        """The same, taken out of its line."""
        run = self._head(line)
        if run is None:
            return None
        entry = heapq.heappop(line.ready)
        self.seen.add(run.id)
        self.out.append((line, entry))
        return entry, run

    def _first(self, line: Line, most: int) -> Iterator[tuple[Ready, RunRecord]]:
        for _ in range(most):
            found = self._pop(line)
            if found is None:
                return
            yield found

    def _queue(self, lane: LaneId, lines: list[Line]) -> None:
        rules = self.tables.lanes[lane]
        first: list[tuple[Ready, Waiting]] = []
        for line in lines:
            for _ in range(self.most):
                found = self._pop(line) if line.ready and line.ready[0][0] == HOLDS else None
                if found is None:
                    break
                entry, run = found
                if entry[0] == HOLDS and not self.rows._lacks(run):
                    self._holding.append(Free(run.id, run.priority, run.wake_at or 0))
                else:
                    first.append((entry, self._waiting(run)))
        heads = [one for _, one in sorted(first, key=lambda pair: pair[0])]
        self.queues.append(Queue(lane, rules.rules, rules.weight, self._in_turn(heads, lines)))

    def _in_turn(self, heads: list[Waiting], lines: list[Line]) -> Iterator[Waiting]:
        yield from heads
        while True:
            ready = [line for line in lines if self._head(line) is not None]
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
        used = {rule.key: self.rows._used(rule.key) for rule in rules if rule.kind == lanes.SLOTS}
        begun = {
            rule.key: tables.begun[rule.key].times
            for rule in rules
            if rule.kind == lanes.THROTTLE and rule.key in tables.begun
        }
        return Ledger(used, begun, tables.finish, tables.clock)


def waits(run: RunRecord | None, wake_at: int | None) -> bool:
    """Whether a line's entry still says the truth; its run may be gone."""
    return (
        run is not None
        and run.owner is None
        and run.wake_at == wake_at
        and run.status is Status.ACTIVE
        and run.activity not in PARKED
    )
