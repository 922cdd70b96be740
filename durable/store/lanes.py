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
`now - period_us`. A lane whose head does not fit is passed over for the rest of the claim. If throttles alone close it, it
opens at the latest of their `limit`-th last begin times plus period; else nobody knows when.

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
    """One claim's deliberation. Writes nothing but its own notes."""

    def __init__(self, free: Iterable[Free], queues: Iterable[Queue], ledger: Ledger, now: int) -> None:
        self.now = now
        self.ledger = ledger
        self.free = iter(free)
        self.first_free = next(self.free, None)
        self.used: dict[str, int] = {}
        self.begun: dict[str, list[int]] = {}
        self.finish: dict[tuple[LaneId, int], float] = {}
        self.clock: dict[tuple[Workflow, int], float] = {}
        self.opens_at: int | None = None
        self.lanes: dict[Workflow, list[_Head]] = {}
        for queue in queues:
            waiting = iter(queue.waiting)
            head = next(waiting, None)
            if head is not None:
                self.lanes.setdefault(queue.id[:2], []).append(_Head(queue, waiting, head))

    def run(self, limit: int) -> Choice:
        picks: list[Pick] = []
        best: _Head | None = None
        known = False
        while True:
            if not known:
                best, known = self._best(), True
            one = self.first_free
            if best is None and one is None:
                return Choice(picks, False, self.opens_at)
            if len(picks) >= limit:
                return Choice(picks, True, self.opens_at)
            if best is None or (one is not None and one.rank <= best.run.rank):
                assert one is not None
                picks.append(Pick(one.run_id))
                self.first_free = next(self.free, None)
            else:
                picks.append(self._turn(best))
                known = False

    def _best(self) -> _Head | None:
        found: _Head | None = None
        for workflow, heads in self.lanes.items():
            heads[:] = [head for head in heads if self._fits(head)]
            if heads:
                best = self._first(workflow, heads)
                if found is None or (best.run.rank, best.run.run_id) < (found.run.rank, found.run.run_id):
                    found = best
        return found

    def _first(self, workflow: Workflow, heads: list[_Head]) -> _Head:
        _, negative = min((head.run.rank, -head.run.priority) for head in heads)
        group = [head for head in heads if head.run.priority == -negative]
        return min(group, key=lambda head: (self._start(head), head.run.rank, head.run.run_id))

    def _start(self, head: _Head) -> float:
        lane, priority = (head.queue.id, head.run.priority), (head.queue.id[:2], head.run.priority)
        finish = self.finish.get(lane, self.ledger.finish.get(lane, 0.0))
        return max(finish, self.clock.get(priority, self.ledger.clock.get(priority, 0.0)))

    def _fits(self, head: _Head) -> bool:
        opens: int | None = None
        for rule in head.queue.rules:
            if rule.kind == SLOTS:
                if rule.key in head.run.lacks and self._used(rule.key) >= rule.limit:
                    return False
            elif head.run.new:
                at = opens_at(rule, self._begun(rule.key), self.now)
                if at is not None and (opens is None or at > opens):
                    opens = at
        if opens is not None and (self.opens_at is None or opens < self.opens_at):
            self.opens_at = opens
        return opens is None

    def _used(self, key: str) -> int:
        return self.used.get(key, self.ledger.used.get(key, 0))

    def _begun(self, key: str) -> Sequence[int]:
        return self.begun.get(key, self.ledger.begun.get(key, ()))

    def _turn(self, head: _Head) -> Pick:
        run, lane = head.run, head.queue.id
        start = self._start(head)
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
        following = next(head.waiting, None)
        if following is None:
            self.lanes[lane[:2]].remove(head)
        else:
            head.run = following
        return Pick(run.run_id, lane, run.priority, run.lacks, begins, start, finish)


class _Head:
    """A lane whose first run may be next."""

    __slots__ = ("queue", "run", "waiting")

    def __init__(self, queue: Queue, waiting: Iterator[Waiting], run: Waiting) -> None:
        self.queue = queue
        self.waiting = waiting
        self.run = run
