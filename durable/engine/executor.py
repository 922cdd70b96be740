"""Drives runs: replay, deliver what arrived, apply what the turn asks for, settle.

    arrive ─→ turns: stamp ─→ journal ─→ deliver ─→ apply ─→ settle ─→ commit ─→ what waited behind the barrier

The barrier (D4): whatever touches the world — a body, a dispatch, an acknowledgement, the outcome — is an action that
waits until every entry before it is committed. Results do not wait: the workflow goes on at once, and entries that
nothing waits for share a commit. Turns run only in `_pump`, a plain callback, never inside a task (D6).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context as Variables
from functools import partial
from typing import Any

from durable.core.clock import SECOND, StoreClock
from durable.core.commands import Cancelled, Command, Completed, Failed, StartChild
from durable.core.errors import DeterminismError, DurableError, ErrorData, NonDeterminism
from durable.core.journal import CHILD, COMMAND_KINDS, REMOTE, RUN, SIGNAL, STEP, TIMER, Entry
from durable.core.payload import describe, encode_error
from durable.engine import apply, attempts
from durable.engine.children import tell_parent
from durable.engine.committer import Group
from durable.engine.deps import Deps
from durable.engine.dispatch import Dispatch
from durable.engine.lease import Lease
from durable.engine.residents import Arrival, Final, Resident
from durable.engine.steps import LocalSteps
from durable.protocol.states import Activity, Status
from durable.store.records import Commit, CommitOutcome, CommitStatus, Journal

log = logging.getLogger("durable.executor")

SLOW_SECONDS = 0.25
"""A run's turns that take longer than this are named: they hold up all others."""


class Executor:
    """All resident runs of one engine."""

    def __init__(self, deps: Deps, clock: StoreClock) -> None:
        self.deps = deps
        self.settings = deps.settings
        self.clock = clock
        self.residents: dict[str, Resident] = {}
        self.idle: dict[str, Resident] = {}
        """Residents that only wait, longest first."""
        self.commits: Group[Commit, CommitOutcome] = Group(
            "commits",
            deps.store.commit,
            max_items=deps.store.capabilities.max_batch,
            size=lambda commit: commit.size,
            # A run that was dropped with a commit still queued may be claimed anew and commit again.
            alone=lambda commit: commit.run_id,
        )
        self.steps = LocalSteps(self)
        self.dispatch = Dispatch(self)
        self.lease: Lease
        self.draining = False
        """Nothing new is begun: what waits behind the barrier stays there, for the next owner."""
        self.executing: str | None = None
        """The run whose turn it is; the watchdog names it when the loop is blocked."""

        # Told by the executor; set by the engine.
        self.on_finished: Callable[[Resident, Final], None] = lambda run, final: None
        self.on_committed: Callable[[Resident, Commit], None] = lambda run, commit: None
        self.on_calm: Callable[[Resident], None] = lambda run: None
        self.on_mail: Callable[[Resident], None] = lambda run: None
        self.on_due: Callable[[], None] = lambda: None
        self.on_nudge: Callable[[str, str | None], None] = lambda run_id, owner: None

        self._ready: deque[Resident] = deque()
        self._pumping = False
        self._flush: list[Resident] = []
        self._keep: set[asyncio.Task[None]] = set()
        self._commits_made = 0
        self._variables = Variables()
        self._loop: asyncio.AbstractEventLoop

    def start(self, lease: Lease) -> None:
        """Begin, under this lease."""
        self.lease = lease
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    @property
    def running(self) -> int:
        """Residents that do more than wait."""
        return len(self.residents) - len(self.idle)

    # ------------------------------------------------------------------ in

    def admit(self, run: Resident, journal: Journal) -> None:
        """Take a run in: its journal is replayed in the pump, before anything that has arrived is delivered."""
        run.opening = journal
        self.residents[run.run_id] = run
        self.wake(run)

    def arrive(self, run: Resident, arrival: Arrival) -> None:
        """Something happened to a resident run."""
        if run.dropped:
            if arrival.ack is not None:
                arrival.ack(_left())
            return
        run.arrivals.append(arrival)
        self.wake(run)

    def call(self, function: Callable[[], None]) -> None:
        """Call it on the loop, at once if that is where we are."""
        if threading.get_ident() == self._thread:
            function()
        else:
            self._loop.call_soon_threadsafe(function)

    def wake(self, run: Resident) -> None:
        """Have a look at a run in the next pump."""
        if run.queued or run.held:
            return
        run.queued = True
        self._ready.append(run)
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump, context=self._variables)

    def _pump(self) -> None:
        self._pumping = False
        for _ in range(len(self._ready)):
            run = self._ready.popleft()
            run.queued = False
            try:
                self._turns(run)
            except Exception:
                # Ours to fix. The run goes back to the store unharmed, others go on.
                log.exception("run %s could not be driven; it is given back", run.run_id)
                self.forsake(run)
        if self._ready and not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump, context=self._variables)

    # ------------------------------------------------------------------ turns

    def _turns(self, run: Resident) -> None:
        if run.dropped or run.suspending or run.ended or run.held:
            return
        self.executing = run.run_id
        began = self.clock.monotonic()
        try:
            if run.opening is not None:
                self._open(run)
            while run.machine.outcome is None and run.final is None:
                arrival = self._next(run)
                if arrival is None:
                    break
                self._take(run, arrival)
        except NonDeterminism as error:
            self._block(run, error)
        except DeterminismError as error:
            run.final = Final(Status.FAILED, error=encode_error(describe(error)))
        finally:
            self.executing = None
            took = self.clock.monotonic() - began
            if took > SLOW_SECONDS:
                log.warning(
                    "run %s held the event loop for %.2f s; every other run waited. Is there blocking work, such as "
                    "time.sleep, in the workflow? It belongs in a step.",
                    run.run_id,
                    took,
                )
        self.settle(run)

    def _open(self, run: Resident) -> None:
        """Replay what is recorded, then take up what it leaves outstanding."""
        journal, run.opening = run.opening, None
        assert journal is not None
        entries = journal.entries
        for entry in entries:
            if entry.kind == RUN:
                self._recall(run, entry)
        run.spent = attempts.spent(entries)
        if entries:
            run.last_at = entries[-1].at
            fresh = run.machine.replay(entries)
        else:
            begun = apply.started(self, run)
            self._recall(run, begun)
            fresh = run.machine.deliver(begun)
        issued = {command.key for command in fresh if isinstance(command, Command)}
        for command in list(run.machine.outstanding.values()):
            if command.key not in issued:
                apply.resume(self, run, command, run.machine.trace(command.key))
        for asked in fresh:
            apply.apply(self, run, asked)

    def _recall(self, run: Resident, entry: Entry) -> None:
        """Take the run's own deadlines from its journal."""
        if entry.status in ("started", "requeued"):
            run.cancel_deadline = None
            if run.definition.timeout is not None:
                run.deadline = entry.at + int(run.definition.timeout * SECOND)
        elif entry.status in ("cancelling", "timed_out"):
            run.deadline = None
            run.cancel_deadline = entry.at + int(self.settings.cancel_grace * SECOND)

    def _next(self, run: Resident) -> Arrival | None:
        """What comes next: arrivals by when they happened, timers by their deadline, arrivals first when equal."""
        while True:
            arrival = run.arrivals[0] if run.arrivals else None
            due = run.next_wake()
            if due is None or (arrival is not None and arrival.happened <= due) or due > self.clock.now():
                return run.arrivals.popleft() if arrival is not None else None
            timer = run.machine.next_timer()
            if timer is not None and timer.deadline == due:
                return Arrival(due, TIMER, "fired", key=timer.key, ordinal=timer.ordinal, name=timer.name)
            if due == run.deadline:
                return Arrival(due, RUN, "timed_out", name=run.definition.name)
            if due == run.cancel_deadline:
                error = ErrorData(message="The run did not finish its clean-up in time.", code="run_cancelled")
                run.final = Final(Status.CANCELLED, error=encode_error(error))
                return None
            lost = attempts.due(self, run, due)
            if lost is not None:
                return lost

    def _take(self, run: Resident, arrival: Arrival) -> None:
        """Journal one arrival and, if it is the workflow's business, give it a turn."""
        if arrival.number is not None:
            run.inbox_read = arrival.number
        if arrival.ack is not None:
            run.acks.append(arrival.ack)
        kind = arrival.kind
        if kind in COMMAND_KINDS:
            if not attempts.accepts(self, run, arrival):
                return
        elif kind == RUN and (run.cancel_deadline is not None):
            return  # cancelled twice, or timed out while cancelling: the first one counts
        entry = self.append(run, arrival)
        if kind == RUN:
            self._recall(run, entry)
        if entry.delivers:
            for command in run.machine.deliver(entry):
                apply.apply(self, run, command)

    def append(self, run: Resident, arrival: Arrival, command: Command | None = None) -> Entry:
        """Stamp and journal: never earlier than the run's last entry. Committed later. `command`: whose entry it is,
        where it is no longer outstanding."""
        now = self.clock.now()
        at = now if now > run.last_at else run.last_at
        run.last_at = at
        run.tail += 1
        key, ordinal, name, fingerprint = arrival.key, arrival.ordinal, arrival.name, None
        if command is None and key is not None and arrival.kind in COMMAND_KINDS:
            command = run.machine.outstanding.get(key)
        if command is not None:
            ordinal, name, fingerprint = command.ordinal, command.name, command.fingerprint
        entry = Entry(
            run.tail,
            at,
            arrival.kind,
            arrival.status,
            key,
            ordinal,
            name,
            arrival.attempt,
            fingerprint,
            arrival.payload,
            arrival.enqueued_at,
            arrival.started_at,
            arrival.finished_at,
        )
        run.pending.append(entry)
        return entry

    # ------------------------------------------------------------------ settle

    def settle(self, run: Resident) -> None:
        """Decide what becomes of what the turns left: commit now, soon, act at once, or leave memory."""
        if run.dropped or run.committing or run.held:
            return
        if not run.ended and (run.machine.outcome is not None or run.final is not None):
            self._end(run)
        uncommitted = run.pending or run.effects or run.inbox_read > run.inbox_written
        # A body begins under the name `executing`: if the engine dies of it, it must be seen to.
        unnamed = run.bodies and run.activity is not Activity.EXECUTING
        if run.ended or run.effects or ((run.actions or run.acks) and (uncommitted or unnamed)):
            self._commit(run)
            return
        if run.actions or run.acks:
            self._release_barrier(run, run.actions, run.acks)
            run.actions, run.acks = [], []
            if self._left(run):
                return
        if run.arrivals and not run.held:
            self.wake(run)
            return
        if self._parked(run):
            self.on_calm(run)
            if run.recovery_attempts:
                run.progressed = True  # it has come to rest, so it was not what killed its engine
            wake = run.next_wake()
            if self.settings.cold or self._far(run, wake):
                self._commit(run, suspend=True)
                return
            if not run.idle:
                run.idle = True
                self.idle[run.run_id] = run
            if uncommitted or run.activity != self._activity(run):
                self.later(run)
        else:
            if run.idle:
                run.idle = False
                self.idle.pop(run.run_id, None)
            if uncommitted:
                self.later(run)
        self._arm(run)

    def _parked(self, run: Resident) -> bool:
        """Whether everything this run does is wait, so that it could leave memory."""
        if run.bodies or run.arrivals or run.actions or run.fetching or run.asking:
            return False
        for sent in run.sent.values():
            if not sent.published or sent.command.options.heartbeat_timeout is not None:
                return False
        # A task in this process lives and dies with it, so its run must be seen to die too.
        return not self.has_task_here(run)

    def has_task_here(self, run: Resident) -> bool:
        """Whether a task of this run is, or may be, under way in this process."""
        pool = self.deps.transport
        return any(not pool.member(sent.transport).capabilities.shared for sent in run.sent.values())

    def _left(self, run: Resident) -> bool:
        """An action may have ended or committed it; a function, since it changes behind the reader's back."""
        return run.committing or run.dropped

    def _far(self, run: Resident, wake: int | None) -> bool:
        """Whether only time can wake it, and not soon: no reason to keep it in memory."""
        if wake is None or wake < self.clock.now() + int(self.settings.hot_for * SECOND):
            return False
        return not any(command.kind in (SIGNAL, CHILD, REMOTE) for command in run.machine.outstanding.values())

    def _activity(self, run: Resident) -> Activity:
        if run.bodies or (run.sent and self.has_task_here(run)):
            return Activity.EXECUTING  # a task in this process is as good as a body
        if run.cancel_deadline is not None:
            return Activity.CANCELLING
        if any(c.kind != STEP and c.key not in run.retries for c in run.machine.outstanding.values()):
            return Activity.WAITING
        if run.retries:
            return Activity.RETRYING
        return Activity.SLEEPING if run.machine.next_timer() is not None else Activity.WAITING

    def _arm(self, run: Resident) -> None:
        """Have the run looked at when its next timer is due."""
        wake = run.next_wake()
        if wake is None or (run.armed is not None and run.armed <= wake):
            return
        if run.alarm is not None:
            run.alarm.cancel()
        run.armed = wake
        delay = max(0.0, (wake - self.clock.now()) / SECOND)
        run.alarm = self._loop.call_later(delay, self._ring, run, context=self._variables)

    def _ring(self, run: Resident) -> None:
        run.armed = run.alarm = None
        # A loop's timer may come a hair early by the store's clock; then it is simply armed again.
        if not run.dropped:
            self.wake(run)

    def later(self, run: Resident) -> None:
        """Commit within a tick: nothing waits for it but those who watch."""
        if run.flushing:
            return
        run.flushing = True
        if not self._flush:
            self._loop.call_later(self.settings.tick, self._tick, context=self._variables)
        self._flush.append(run)

    def _tick(self) -> None:
        runs, self._flush = self._flush, []
        for run in runs:
            run.flushing = False
            if run.dropped or run.committing or run.held or run.ended:
                continue
            if (
                run.pending
                or run.marks
                or run.inbox_read > run.inbox_written
                or (run.idle and run.activity != self._activity(run))
            ):
                self._commit(run)

    def evict(self) -> None:
        """Let runs leave memory that have waited long enough, and the longest idle above the limit. Called now and then."""
        spare = len(self.idle) - self.settings.hot_limit
        limit = self.clock.now() - int(self.settings.hot_for * SECOND)
        for run in list(self.idle.values()):
            if spare <= 0 and run.last_at > limit:
                continue
            if not run.committing and not run.flushing and self._parked(run):
                spare -= 1
                self._commit(run, suspend=True)

    def suspend_waiting(self) -> None:
        """Let every run leave memory that only waits: the engine is about to stop."""
        for run in list(self.residents.values()):
            if not (run.committing or run.held or run.ended or run.opening) and self._parked(run):
                self._commit(run, suspend=True)

    # ------------------------------------------------------------------ end

    def _end(self, run: Resident) -> None:
        """Write down the outcome. What is still under way is told that nobody waits any more."""
        final = run.final or _final(run)
        run.final = final
        run.ended = True
        # Those given up inside the run have said so; what is left was never awaited.
        closing = final.status is not Status.COMPLETED
        for command in list(run.machine.outstanding.values()):
            if not isinstance(command, StartChild) or (closing and command.options.on_parent_close == "cancel"):
                apply.abandon(self, run, command)
        outcome = run.machine.outcome
        cut = outcome.cut if isinstance(outcome, Failed) and run.final.status is Status.FAILED else None
        self.append(
            run,
            Arrival(
                self.clock.now(),
                RUN,
                final.status.value,
                name=run.definition.name,
                payload=None if cut is None else b'{"cut":%d}' % cut,
            ),
        )
        if run.parent is not None:
            run.effects.append(tell_parent(run.run_id, run.workspace, run.parent, final))

    def _block(self, run: Resident, error: NonDeterminism) -> None:
        """Journal and code disagree: nothing has been done, nothing is lost; park it until the code is mended."""
        log.error("run %s is blocked: %s", run.run_id, error)
        self._forget(run)
        data = describe(error)
        details = {"position": error.position, "recorded": error.recorded, "asked": error.asked}
        payload = encode_error(ErrorData(message=data.message, code=data.code, type=data.type, details=details))
        self.append(run, Arrival(self.clock.now(), RUN, "blocked", name=run.definition.name, payload=payload))
        self._commit(run, suspend=True, blocked=payload)

    def _forget(self, run: Resident) -> None:
        """Undo, in memory, what is not committed. Inbox rows stay unread; what came directly is sent again."""
        run.pending.clear()
        run.effects.clear()
        run.actions.clear()
        run.marks.clear()
        run.tail = run.seq
        run.inbox_read = run.inbox_known = run.inbox_written
        _tell(run.acks, _left())

    def forsake(self, run: Resident) -> None:
        """Give a run back without writing anything but that."""
        self.drop(run)
        task = self._loop.create_task(self._give_back([(run.run_id, run.epoch)]), name="durable-release")
        self._keep.add(task)
        task.add_done_callback(self._keep.discard)

    async def _give_back(self, runs: list[tuple[str, int]]) -> None:
        try:
            await self.deps.store.release(runs)
        except DurableError:
            log.warning("could not release %s; its lease will end by itself", runs)

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it as a task that is not lost."""
        task = self._loop.create_task(work)
        self._keep.add(task)
        task.add_done_callback(self._keep.discard)

    # ------------------------------------------------------------------ commit

    def _commit(self, run: Resident, *, suspend: bool = False, blocked: bytes | None = None) -> None:
        for mark in run.marks.values():
            self.append(run, mark)
        run.marks.clear()
        self._commits_made += 1
        commit = Commit(
            run.run_id,
            run.epoch,
            run.seq,
            f"{self.lease.incarnation}-{self._commits_made}",
            run.pending,
            progressed=run.progressed,
        )
        run.pending = []
        if run.effects:
            commit.effects = tuple(run.effects)
            run.effects = []
        if run.inbox_read > run.inbox_written:
            commit.inbox_read = run.inbox_read
        if run.ended:
            assert run.final is not None
            commit.status = run.final.status
            commit.output = run.final.output
            commit.error = run.final.error
        else:
            activity = Activity.BLOCKED if blocked is not None else self._activity(run)
            if activity is not run.activity:
                commit.activity = activity
            if suspend:
                commit.suspend = True
                commit.activity = activity
                commit.error = blocked
                if blocked is None:
                    commit.wake_at = run.next_wake() or self.clock.now() + int(self.settings.reconcile * SECOND)
        actions, run.actions = run.actions, []
        acks, run.acks = run.acks, []
        run.committing = True
        run.suspending = suspend
        self.commits.submit(commit, partial(self._committed, run, commit, actions, acks))

    def _committed(
        self,
        run: Resident,
        commit: Commit,
        actions: list[Callable[[], None]],
        acks: list[Callable[[BaseException | None], None]],
        answer: CommitOutcome | BaseException,
    ) -> None:
        run.committing = False
        if not run.dropped and not isinstance(answer, BaseException) and answer.failure is not None:
            _tell(acks, None)
            self._refused(run, answer.failure)
            return
        if run.dropped or isinstance(answer, BaseException) or answer.status is not CommitStatus.DONE:
            if not run.dropped and not isinstance(answer, BaseException):
                log.warning("run %s belongs to another engine now; dropped here", run.run_id)
            _tell(acks, _left())
            self.drop(run)
            return
        run.seq += len(commit.entries)
        if commit.inbox_read:
            run.inbox_written = max(run.inbox_written, commit.inbox_read)
        if commit.progressed:
            run.recovery_attempts = 0
            run.progressed = False
            self.on_calm(run)
        if commit.activity:
            run.activity = commit.activity
        for owner in answer.wake:
            self.on_nudge(run.run_id, owner)
        if commit.effects:
            self.on_due()
        self.on_committed(run, commit)
        if run.ended:
            _tell(acks, None)
            final = run.final
            assert final is not None
            self.drop(run)
            self.on_finished(run, final)
            return
        if commit.suspend:
            _tell(acks, None)
            self.drop(run)
            # Mail that came in between has made it due at once.
            if answer.inbox_last > run.inbox_written or commit.wake_at is not None:
                self.on_due()
            return
        if answer.inbox_last > run.inbox_known:
            self.on_mail(run)
        self._release_barrier(run, actions, acks)
        self.settle(run)

    def _release_barrier(
        self, run: Resident, actions: list[Callable[[], None]], acks: list[Callable[[BaseException | None], None]]
    ) -> None:
        _tell(acks, None)
        for action in actions:
            action()

    def _refused(self, run: Resident, failure: Exception) -> None:
        """The store takes this commit never: the run fails with the reason, instead of trying for ever."""
        log.error("the store refused a commit of run %s, which fails: %s", run.run_id, failure)
        if run.final is not None and run.final.error is not None and run.final.status is Status.FAILED:
            self.forsake(run)
            return
        self._forget(run)
        run.suspending = False
        run.ended = False
        run.final = Final(Status.FAILED, error=encode_error(describe(failure)))
        self.settle(run)

    # ------------------------------------------------------------------ out

    def drop(self, run: Resident) -> None:
        """Let a run leave memory. Its bodies are cancelled, its machine unwound; nothing durable happens."""
        if run.dropped:
            return
        run.dropped = True
        if run.alarm is not None:
            run.alarm.cancel()
        self.residents.pop(run.run_id, None)
        self.idle.pop(run.run_id, None)
        self.dispatch.forget(run)
        for task in run.bodies.values():
            if task is not None:
                task.cancel()
        run.bodies.clear()
        for arrival in run.arrivals:
            if arrival.ack is not None:
                arrival.ack(None if run.ended else _left())
        run.arrivals.clear()
        _tell(run.acks, _left())
        # Not here: a commit's answer comes inside a task, and workflow code runs in none.
        self._loop.call_soon(self._unwind, run, context=self._variables)
        self.on_calm(run)

    def _unwind(self, run: Resident) -> None:
        try:
            run.machine.drop()
        except Exception:
            log.exception("run %s could not be unwound cleanly", run.run_id)


def _final(run: Resident) -> Final:
    outcome = run.machine.outcome
    if isinstance(outcome, Completed):
        return Final(Status.COMPLETED, output=outcome.output)
    if isinstance(outcome, Cancelled):
        return Final(Status.CANCELLED, error=outcome.error)
    assert isinstance(outcome, Failed)
    return Final(Status.FAILED, error=outcome.error)


class Left(DurableError):
    """The run left this engine before what arrived for it was committed."""


def _left() -> Left:
    return Left("The run has left this engine; send it again.")


def _tell(acks: list[Callable[[BaseException | None], None]], why: BaseException | None) -> None:
    for ack in acks:
        ack(why)
    acks.clear()
