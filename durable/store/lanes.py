"""Whose turn it is: which of the waiting runs a claim takes, where lanes limit them. One pure function for the stores that
decide in Python; a store that decides in SQL mirrors it rule by rule.

**Who stands in a lane's queue.** Due, unowned, unparked runs with that lane, of the routes asked for (a run of a version
nobody here serves holds up nobody). A run that still holds all slots its lane asks for, and at least one, has nothing to
wait for: it is taken like a run without a lane (`free`), and so is an orphan that lacks none. An orphan that lacks one
is freed first (epoch + 1, due now, `queued` and a recovery attempt more if it was `executing`), its slots kept, and queues.

**Within a lane**, by (class, rank, run id): class 0 holds some slot of its own, 1 has begun before, 2 is new.
`rank = first_due - priority * AGEING_US`, where first_due is the wake_at it had when it was first claimed, or has now if
it never was. Only the head of a queue may go; behind it nobody overtakes.

**A head fits** if each slot it lacks (`slots` rules whose key it does not hold) has a free place, that is fewer than `limit`
holders, and, for a new run, each `throttle` is open: fewer than `limit` of its begin times are later than
`now - period_us`. A lane whose head does not fit is passed over for the rest of the claim. If throttles alone close it (as
things stand after the last turn), it opens at the latest of their `limit`-th last begin times plus period; else nobody
knows when.

**Between the lanes of one workflow** (and workspace), looking at heads that fit: they are grouped by priority. The group with
the lowest rank in it goes first (equal: the higher priority). In it goes the lane that has been served least:

    start  = max(finish[lane, priority], clock[workflow, priority])      both 0 before the first turn
    order by (start, rank, run id)

and by its turn `finish[lane, priority] = start + 1 / weight` and `clock[workflow, priority] = start`. So a lane that was empty
begins where the others are and catches nothing up, and lanes that always have runs are served in proportion to weights.
The clock is also the highest start there is, so a store that keeps (start, finish) for each (lane, priority) needs no row
for it; rows with `finish <= clock` say nothing and may be deleted.

**Between workflows, and runs without a lane**: the lowest rank goes first (equal: the free run, then the lower run id). The free
runs are in their own order, priority descending, then wake_at; only their first is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush

from msgspec import Struct

from durable.store.interface import AGEING_US
from durable.store.records import Rule

SLOTS = "slots"
THROTTLE = "throttle"

Workflow = tuple[str, str]
"""(workspace, name)."""
LaneId = tuple[str, str, str]
"""(workspace, workflow, key)."""
HOLDS, BEGUN, NEW = 0, 1, 2
"""Classes of a run in its lane."""


class Free(Struct, frozen=True, gc=False):
    """A run that waits for nothing."""

    run_id: str
    priority: int
    wake_at: int

    @property
    def rank(self) -> int:
        return rank(self.wake_at, self.priority)


class Waiting(Struct, frozen=True, gc=False):
    """A due run in a lane."""

    run_id: str
    priority: int
    rank: int
    lacks: tuple[str, ...]
    """Keys of the slots it needs and does not hold."""
    new: bool = True
    """It has never begun: throttles count."""


class Queue(Struct):
    """A lane with its due runs, in their order. No more of them are looked at than are taken, and one."""

    id: LaneId
    rules: tuple[Rule, ...]
    weight: float
    waiting: Iterable[Waiting]


class Ledger(Struct, frozen=True):
    """What there is already. Absent keys are 0 or empty."""

    used: Mapping[str, int] = {}
    """Slot key → how many hold one."""
    begun: Mapping[str, Sequence[int]] = {}
    """Throttle key → begin times, rising. At least the last `limit` of them."""
    finish: Mapping[tuple[LaneId, int], float] = {}
    """(lane, priority) → virtual time."""
    clock: Mapping[tuple[Workflow, int], float] = {}


class Pick(Struct, frozen=True, gc=False):
    """One that is taken. Of a free run only `run_id` says anything."""

    run_id: str
    lane: LaneId | None = None
    priority: int = 0
    takes: tuple[str, ...] = ()
    """Slot keys."""
    begins: tuple[str, ...] = ()
    """Throttle keys in which it counts from now."""
    start: float = 0.0
    finish: float = 0.0


class Choice(Struct, frozen=True):
    picks: list[Pick]
    """In the order of their turns."""
    more: bool
    """Another would have been taken, had the limit been higher."""
    opens_at: int | None
    """When the first of the throttles opens that alone hold up a lane."""


def rank(first_due: int, priority: int) -> int:
    """Lower goes first: each step of priority is worth AGEING_US of waiting."""
    return first_due - priority * AGEING_US


def lacking(rules: Iterable[Rule], held: Iterable[str]) -> tuple[str, ...]:
    """Slot keys that these rules ask for beyond the held ones."""
    has = set(held)
    return tuple(dict.fromkeys(rule.key for rule in rules if rule.kind == SLOTS and rule.key not in has))


def opens_at(rule: Rule, begun: Sequence[int], now: int) -> int | None:
    """When this throttle lets the next run begin: None if it does so now. Of a limit below 1: never, a day from now."""
    if rule.limit < 1:
        return now + 86_400_000_000
    if len(begun) < rule.limit or begun[-rule.limit] <= now - rule.period_us:
        return None
    return begun[-rule.limit] + rule.period_us


def choose(free: Iterable[Free], queues: Iterable[Queue], ledger: Ledger, limit: int, now: int) -> Choice:
    """Up to `limit` turns, as this module's first page says."""
    return _Round(free, queues, ledger, now).run(limit)


class _Round:
    """One claim's deliberation. Writes nothing but its own notes.

    A head that does not fit never fits again in this claim, and the start of one that waits does not change by the turns
    of others (the clock never gets above it). So heaps will do, with what stands on top looked at when it is met.
    """

    def __init__(self, free: Iterable[Free], queues: Iterable[Queue], ledger: Ledger, now: int) -> None:
        self.now = now
        self.ledger = ledger
        self.free = iter(free)
        self.first_free = next(self.free, None)
        self.used: dict[str, int] = {}
        self.begun: dict[str, list[int]] = {}
        self.finish: dict[tuple[LaneId, int], float] = {}
        self.clock: dict[tuple[Workflow, int], float] = {}
        self.groups: dict[Workflow, dict[int, _Group]] = {}
        self.passed_over: list[_Head] = []
        for queue in queues:
            self._advance(queue, iter(queue.waiting))

    def run(self, limit: int) -> Choice:
        picks: list[Pick] = []
        while True:
            best, one = self._best(), self.first_free
            if best is None and one is None:
                return Choice(picks, False, self._opens_at())
            if len(picks) >= limit:
                return Choice(picks, True, self._opens_at())
            if best is None or (one is not None and one.rank <= best.run.rank):
                assert one is not None
                picks.append(Pick(one.run_id))
                self.first_free = next(self.free, None)
            else:
                picks.append(self._turn(best))

    def _best(self) -> _Head | None:
        """The first of the workflows' firsts."""
        firsts = [first for workflow in list(self.groups) if (first := self._first(workflow)) is not None]
        return min(firsts, key=lambda head: (head.run.rank, head.run.run_id), default=None)

    def _first(self, workflow: Workflow) -> _Head | None:
        groups = self.groups[workflow]
        lowest: list[tuple[int, int]] = []
        for priority, group in list(groups.items()):
            oldest = self._top(group.by_rank)
            if oldest is None:
                del groups[priority]
            else:
                lowest.append((oldest.run.rank, -priority))
        if not lowest:
            del self.groups[workflow]
            return None
        return self._top(groups[-min(lowest)[1]].by_start)

    def _top(self, heap: list[tuple[float, int, str, _Head]]) -> _Head | None:
        """The first that has not had its turn and fits. One that does not is passed over for good."""
        while heap:
            head = heap[0][-1]
            if head.waits and not self._fits(head):
                head.waits = False
                self.passed_over.append(head)
            if head.waits:
                return head
            heappop(heap)
        return None

    def _fits(self, head: _Head) -> bool:
        return self._has_places(head) and not self._closed(head)

    def _has_places(self, head: _Head) -> bool:
        lacks = head.run.lacks
        rules = head.queue.rules
        return not any(
            rule.kind == SLOTS and rule.key in lacks and self._used(rule.key) >= rule.limit for rule in rules
        )

    def _closed(self, head: _Head) -> int | None:
        """When the throttles that close it are all open; None: they are."""
        if not head.run.new:
            return None
        times = [
            at
            for rule in head.queue.rules
            if rule.kind == THROTTLE and (at := opens_at(rule, self._begun(rule.key), self.now)) is not None
        ]
        return max(times, default=None)

    def _opens_at(self) -> int | None:
        times = [self._closed(head) for head in self.passed_over if self._has_places(head)]
        return min((at for at in times if at is not None), default=None)

    def _used(self, key: str) -> int:
        return self.used.get(key, self.ledger.used.get(key, 0))

    def _begun(self, key: str) -> Sequence[int]:
        return self.begun.get(key, self.ledger.begun.get(key, ()))

    def _advance(self, queue: Queue, waiting: Iterator[Waiting]) -> None:
        """The next of this lane stands at its head."""
        run = next(waiting, None)
        if run is None:
            return
        lane, workflow = (queue.id, run.priority), (queue.id[:2], run.priority)
        finish = self.finish.get(lane, self.ledger.finish.get(lane, 0.0))
        start = max(finish, self.clock.get(workflow, self.ledger.clock.get(workflow, 0.0)))
        head = _Head(queue, waiting, run, start)
        group = self.groups.setdefault(queue.id[:2], {}).setdefault(run.priority, _Group())
        heappush(group.by_rank, (0.0, run.rank, run.run_id, head))
        heappush(group.by_start, (start, run.rank, run.run_id, head))

    def _turn(self, head: _Head) -> Pick:
        run, lane, start = head.run, head.queue.id, head.start
        head.waits = False
        finish = start + 1.0 / head.queue.weight
        begins: tuple[str, ...] = ()
        if run.new:
            begins = tuple(dict.fromkeys(rule.key for rule in head.queue.rules if rule.kind == THROTTLE))
        for key in run.lacks:
            self.used[key] = self._used(key) + 1
        for key in begins:
            self.begun[key] = sorted([*self._begun(key), self.now])
        self.finish[lane, run.priority] = finish
        self.clock[lane[:2], run.priority] = start
        self._advance(head.queue, head.waiting)
        return Pick(run.run_id, lane, run.priority, run.lacks, begins, start, finish)


class _Group:
    """Heads of one workflow and priority."""

    __slots__ = ("by_rank", "by_start")

    def __init__(self) -> None:
        self.by_rank: list[tuple[float, int, str, _Head]] = []
        self.by_start: list[tuple[float, int, str, _Head]] = []


class _Head:
    """The first run of a lane, until its turn."""

    __slots__ = ("queue", "run", "start", "waiting", "waits")

    def __init__(self, queue: Queue, waiting: Iterator[Waiting], run: Waiting, start: float) -> None:
        self.queue = queue
        self.waiting = waiting
        self.run = run
        self.start = start
        self.waits = True
