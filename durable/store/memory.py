"""The reference store: plain dicts, exact semantics, no durability. What the contract leaves to the reader, this file
decides, and the shared suite holds the others to it.

No operation awaits anything, so each is atomic; the lock is for `beat` and for engines on other threads. All time comes
from the given clock, so it runs under virtual time as well.
"""

from __future__ import annotations

import copy
import heapq
import threading
from bisect import bisect_left, insort
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from msgspec import UNSET

from durable.core.clock import Clock, SystemClock
from durable.core.errors import StoreError
from durable.core.journal import LOG, NOT_REPLAYED, Entry
from durable.protocol.states import PARKED, REOPENABLE, Activity, Status
from durable.store.checks import check_batch, check_message, check_run, refusal
from durable.store.hints import Listeners
from durable.store.interface import Capabilities
from durable.store.records import (
    AddFire,
    Beat,
    Claim,
    ClaimedRun,
    ClaimRequest,
    CloseWaiter,
    Commit,
    CommitOutcome,
    CommitStatus,
    FreeSlots,
    InboxRow,
    Journal,
    Message,
    NewRun,
    OpenWaiter,
    PruneRequest,
    PutMessage,
    Route,
    RunPage,
    RunQuery,
    RunRecord,
    SendOutcome,
    SendStatus,
    SetAttributes,
    StartOutcome,
    StartRun,
    StartStatus,
)

_FENCED = CommitOutcome(CommitStatus.FENCED)
_Due = tuple[int, int, str]
"""(minus priority, wake_at, run id): the order of claiming."""


_Ended = tuple[int, str]
"""(finished_at, run id): the order of pruning."""


class _Lane:
    """Unowned runs of one route, by due time. Entries are never removed when a run changes, only checked when met."""

    __slots__ = ("later", "ready")

    def __init__(self) -> None:
        self.later: list[tuple[int, str]] = []
        self.ready: list[_Due] = []


class _Engine:
    __slots__ = ("dead", "expires_at")

    def __init__(self, expires_at: int) -> None:
        self.expires_at = expires_at
        self.dead = False


class _Tables:
    """What handles on the same data share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.runs: dict[str, RunRecord] = {}
        self.journals: dict[str, list[Entry]] = {}
        self.inboxes: dict[str, list[InboxRow]] = {}
        self.message_ids: set[tuple[str, str]] = set()
        self.keys: dict[tuple[str, str, str], str] = {}
        self.children: dict[str, list[str]] = {}
        self.lanes: dict[Route, _Lane] = {}
        self.owned: dict[str, dict[str, None]] = {}
        self.engines: dict[str, _Engine] = {}
        self.waiters: dict[str, dict[str, OpenWaiter]] = {}
        self.slots: dict[str, list[tuple[str, int]]] = {}
        """By holder: (key, number)."""
        self.fires: set[tuple[str, int]] = set()
        self.fired: dict[str, list[tuple[str, int]]] = {}
        """By run: the occurrences it was started for."""
        self.ended: dict[tuple[str, str], list[_Ended]] = {}
        """Finished runs by workspace and workflow, in the order in which they go."""
        self.listeners = Listeners()


class MemoryStore:
    """All runs of one process, gone with it."""

    def __init__(self, clock: Clock | None = None, *, max_payload: int = 64 * 1024 * 1024) -> None:
        self._clock: Clock = clock or SystemClock()
        self._tables = _Tables()
        self._capabilities = Capabilities(
            name="memory",
            durable=False,
            durability="Nothing survives the end of this process.",
            shared=False,
            commit_with=False,
            max_payload=max_payload,
            in_flight=2,
        )

    def another(self) -> MemoryStore:
        """A second handle on the same data, as another connection would be."""
        other = copy.copy(self)
        return other

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    async def open(self) -> None:
        return None

    async def close(self) -> None:
        return None

    # ------------------------------------------------------------------ runs

    async def start(self, runs: Sequence[NewRun]) -> list[StartOutcome]:
        for new in runs:
            check_run(new, self._capabilities.max_payload)
        with self._tables.lock:
            now = self._clock.now()
            outcomes = [self._start(new, now) for new in runs]
        if any(outcome.status is StartStatus.STARTED for outcome in outcomes):
            self._tables.listeners.changed(self)
        return outcomes

    async def get(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        with self._tables.lock:
            runs = self._tables.runs
            return [copy.copy(runs[run_id]) if run_id in runs else None for run_id in run_ids]

    async def find(self, query: RunQuery) -> RunPage:
        with self._tables.lock:
            runs = self._tables.runs
            newest_first = iter(reversed(runs.values()))
            if query.cursor is not None:
                if query.cursor not in runs:
                    return RunPage([], None)
                for run in newest_first:
                    if run.id == query.cursor:
                        break
            found: list[RunRecord] = []
            for run in newest_first:
                if _matches(run, query):
                    if len(found) == query.limit:
                        return RunPage(found, found[-1].id if found else query.cursor)
                    found.append(copy.copy(run))
            return RunPage(found, None)

    # ------------------------------------------------------------------ commits

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

    # ------------------------------------------------------------------ claims

    def beat(self, incarnation: str, lease_us: int) -> Beat:
        with self._tables.lock:
            now = self._clock.now()
            engine = self._tables.engines.setdefault(incarnation, _Engine(now))
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

    # ------------------------------------------------------------------ inbox

    async def send(self, messages: Sequence[Message]) -> list[SendOutcome]:
        for message in messages:
            check_message(message, self._capabilities.max_payload)
        with self._tables.lock:
            now = self._clock.now()
            outcomes = [self._send(message, now) for message in messages]
        if any(outcome.status is SendStatus.ACCEPTED for outcome in outcomes):
            self._tables.listeners.changed(self)
        return outcomes

    async def unread(self, incarnation: str) -> list[str]:
        with self._tables.lock:
            runs = (self._tables.runs[run_id] for run_id in self._tables.owned.get(incarnation, ()))
            return [run.id for run in runs if run.inbox_last > run.inbox_read]

    async def inbox(self, after: Sequence[tuple[str, int]]) -> list[list[InboxRow]]:
        with self._tables.lock:
            return [self._tables.inboxes.get(run_id, [])[max(number, 0) :] for run_id, number in after]

    # ------------------------------------------------------------------ journal

    async def load(self, run_ids: Sequence[str]) -> list[Journal]:
        with self._tables.lock:
            return [_replayed(self._tables.journals.get(run_id, ())) for run_id in run_ids]

    async def page(self, run_id: str, after_seq: int, limit: int) -> list[Entry]:
        with self._tables.lock:
            after_seq = max(after_seq, 0)
            return self._tables.journals.get(run_id, [])[after_seq : after_seq + limit]

    async def children(self, run_id: str) -> list[RunRecord]:
        with self._tables.lock:
            return [copy.copy(self._tables.runs[child]) for child in self._tables.children.get(run_id, ())]

    # ------------------------------------------------------------------ retention

    async def prune(self, request: PruneRequest) -> int:
        with self._tables.lock:
            now = self._clock.now()
            queues = [
                self._going(ended, request, now)
                for (workspace, workflow), ended in self._tables.ended.items()
                if workspace == request.workspace
                and (workflow not in request.but if request.workflow is None else workflow == request.workflow)
            ]
            going = list(islice(heapq.merge(*queues), max(request.limit, 0)))
            for _, run_id in going:
                self._forget(run_id)
            return len(going)

    # ------------------------------------------------------------------ hints

    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        return self._tables.listeners.add(on_hint, self)

    # ------------------------------------------------------------------ one row at a time, under the lock

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
        if new.owner is not None:
            tables.owned.setdefault(new.owner, {})[new.id] = None
        else:
            self._due(run, run.wake_at or now)
        return StartOutcome(StartStatus.STARTED, new.id)

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
            tables.waiters.pop(run.id, None)
            tables.slots.pop(run.id, None)
        return CommitOutcome(CommitStatus.DONE, run.inbox_last, wake)

    def _effects(self, run: RunRecord, commit: Commit, now: int) -> tuple[str, ...]:
        tables = self._tables
        wake: dict[str, None] = {}
        for effect in sorted(commit.effects, key=_starts_first):
            match effect:
                case StartRun(new):
                    self._start(new, now)
                case AddFire(schedule_id, occurrence, new):
                    if (schedule_id, occurrence) not in tables.fires:
                        tables.fires.add((schedule_id, occurrence))
                        tables.fired.setdefault(new.id, []).append((schedule_id, occurrence))
                        self._start(new, now)
                case PutMessage(message):
                    owner = self._send(message, now).owner
                    if owner is not None:
                        wake[owner] = None
                case OpenWaiter(waiter_id):
                    tables.waiters.setdefault(run.id, {})[waiter_id] = effect
                case CloseWaiter(waiter_id):
                    tables.waiters.get(run.id, {}).pop(waiter_id, None)
                case SetAttributes(attributes, tags):
                    merged = {**run.attributes, **attributes}
                    run.attributes = {name: value for name, value in merged.items() if value is not None}
                    run.tags = run.tags if tags is None else tags
                case FreeSlots(keys):
                    held = tables.slots.pop(run.id, [])
                    kept = [slot for slot in held if keys is not None and slot[0] not in keys]
                    if kept:
                        tables.slots[run.id] = kept
        return tuple(wake)

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

    # ------------------------------------------------------------------ retention

    def _going(self, ended: list[_Ended], request: PruneRequest, now: int) -> Iterator[_Ended]:
        """What goes of one workflow's finished runs, oldest first: either bound lets a first part of them go."""
        count = 0
        if request.older_than_us is not None:
            count = bisect_left(ended, (now - request.older_than_us, ""))
        if request.keep is not None:
            count = max(count, len(ended) - request.keep)
        return (one for one in islice(ended, count) if not self._family_active(self._tables.runs[one[1]]))

    def _family_active(self, run: RunRecord) -> bool:
        tables = self._tables
        family = [*tables.children.get(run.id, ()), *([] if run.parent is None else [run.parent.run_id])]
        return any(one in tables.runs and tables.runs[one].status is Status.ACTIVE for one in family)

    def _forget(self, run_id: str) -> None:
        """A finished run, with everything that hangs on it."""
        tables = self._tables
        run = tables.runs.pop(run_id)
        del tables.journals[run_id]
        tables.message_ids -= {(run_id, row.message.id) for row in tables.inboxes.pop(run_id, ())}
        tables.fires -= set(tables.fired.pop(run_id, ()))
        tables.waiters.pop(run_id, None)
        tables.slots.pop(run_id, None)
        if run.idempotency_key is not None:
            del tables.keys[run.workspace, run.workflow, run.idempotency_key]
        if run.parent is not None:
            siblings = tables.children[run.parent.run_id]
            siblings.remove(run_id)
            if not siblings:
                del tables.children[run.parent.run_id]
        ended = tables.ended[run.workspace, run.workflow]
        del ended[bisect_left(ended, (run.finished_at or 0, run_id))]

    # ------------------------------------------------------------------ ownership

    def _due(self, run: RunRecord, wake_at: int) -> None:
        """This unowned run is due then."""
        run.wake_at = wake_at
        lane = self._tables.lanes.setdefault(_route(run), _Lane())
        heapq.heappush(lane.later, (wake_at, run.id))

    def _disown(self, run: RunRecord) -> None:
        if run.owner is not None:
            self._tables.owned[run.owner].pop(run.id, None)
            run.owner = None

    def _gone(self, incarnation: str, now: int) -> bool:
        engine = self._tables.engines.get(incarnation)
        return engine is None or engine.dead or engine.expires_at <= now

    def _claim_due(self, request: ClaimRequest, now: int) -> Claim:
        runs = self._tables.runs
        routes = set(request.routes)
        orphans = self._orphans(routes, request.incarnation, now)
        candidates = [(-run.priority, run.wake_at or 0, run.id) for run in orphans]
        next_due_at: int | None = None
        for route in routes:
            lane = self._tables.lanes.get(route)
            if lane is not None:
                candidates += self._take_ready(lane, request.limit + 1, now)
                if lane.later and (next_due_at is None or lane.later[0][0] < next_due_at):
                    next_due_at = lane.later[0][0]
        candidates.sort()
        for candidate in candidates[request.limit :]:
            next_due_at = now
            run = runs[candidate[2]]
            if run.owner is None:
                heapq.heappush(self._tables.lanes[_route(run)].ready, candidate)
        taken = [self._take(runs[run_id], request.incarnation, now) for _, _, run_id in candidates[: request.limit]]
        return Claim(taken, next_due_at)

    def _claim_blocked(self, request: ClaimRequest, now: int) -> Claim:
        routes = set(request.routes)
        self._orphans(routes, request.incarnation, now)
        blocked = sorted(
            run.id
            for run in self._tables.runs.values()
            if run.activity is Activity.BLOCKED
            and run.status is Status.ACTIVE
            and run.owner is None
            and run.id > request.after
            and _route(run) in routes
        )
        runs = self._tables.runs
        taken = [self._take(runs[run_id], request.incarnation, now) for run_id in blocked[: request.limit]]
        return Claim(taken, None)

    def _take_ready(self, lane: _Lane, limit: int, now: int) -> list[_Due]:
        """Pop up to `limit` due runs, best first. Stale entries are dropped here; a clock that went back is obeyed."""
        runs = self._tables.runs
        while lane.later and (lane.later[0][0] <= now or not self._waits(runs.get(lane.later[0][1]), lane.later[0][0])):
            wake_at, run_id = heapq.heappop(lane.later)
            if self._waits(runs.get(run_id), wake_at):
                heapq.heappush(lane.ready, (-runs[run_id].priority, wake_at, run_id))
        taken: dict[str, _Due] = {}
        while lane.ready and len(taken) < limit:
            due = heapq.heappop(lane.ready)
            _, wake_at, run_id = due
            if not self._waits(runs.get(run_id), wake_at):
                continue
            if wake_at > now:
                heapq.heappush(lane.later, (wake_at, run_id))
                continue
            taken[run_id] = due
        return list(taken.values())

    @staticmethod
    def _waits(run: RunRecord | None, wake_at: int) -> bool:
        """Whether a lane's entry still says the truth; its run may be gone."""
        return (
            run is not None
            and run.owner is None
            and run.wake_at == wake_at
            and run.status is Status.ACTIVE
            and run.activity not in PARKED
        )

    def _orphans(self, routes: Collection[Route], claimer: str, now: int) -> list[RunRecord]:
        """Runs of these routes whose owner is gone; that owner is marked dead. Parked ones nobody takes: they are
        merely freed, under a new epoch."""
        tables = self._tables
        orphans: list[RunRecord] = []
        for owner, owned in tables.owned.items():
            if owner == claimer or not owned or not self._gone(owner, now):
                continue
            found = [run for run in map(tables.runs.__getitem__, owned) if _route(run) in routes]
            if found and owner in tables.engines:
                tables.engines[owner].dead = True
            for run in found:
                if run.activity in PARKED:
                    self._disown(run)
                    run.epoch += 1
                else:
                    orphans.append(run)
        return orphans

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


NO_WAKE_TIME = (
    "run {} would be suspended with nothing to wake it: give a suspending commit a wake_at,"
    " unless the run is paused or blocked"
)


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
    )


def _route(run: RunRecord) -> Route:
    return Route(run.workflow, run.version, run.workspace)


def _matches(run: RunRecord, query: RunQuery) -> bool:
    return (
        (query.workspace is None or run.workspace == query.workspace)
        and (query.workflow is None or run.workflow == query.workflow)
        and (query.status is None or run.status is query.status)
        and (query.activity is None or run.activity is query.activity)
        and (query.tag is None or query.tag in run.tags)
        and (query.idempotency_key is None or run.idempotency_key == query.idempotency_key)
        and (query.parent is None or (run.parent is not None and run.parent.run_id == query.parent))
    )


def _replayed(entries: Iterable[Entry]) -> Journal:
    kept: list[Entry] = []
    logs = 0
    for entry in entries:
        if entry.kind not in NOT_REPLAYED:
            kept.append(entry)
        elif entry.kind == LOG and entry.key is None:
            logs += 1
    return Journal(kept, logs)


def _renumbered(entry: Entry, seq: int) -> Entry:
    fields = {name: getattr(entry, name) for name in Entry.__struct_fields__}
    return Entry(**{**fields, "seq": seq})


def _starts_first(effect: object) -> bool:
    """A child's start comes before a message to it, in whatever order the commit names them."""
    return not isinstance(effect, (StartRun, AddFire))
