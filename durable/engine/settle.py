"""What becomes of a run when its turns are over: commit now, commit soon, act at once, or leave memory.

The barrier (D4) stands here. Whatever touches the world — a body, a publish, an acknowledgement, the outcome — is an action
that waits until every entry before it is committed. Results do not wait: the workflow has gone on already, and entries that
nothing waits for share a commit. One commit of a run is under way at a time; what comes meanwhile goes into the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from durable.core.clock import SECOND
from durable.core.commands import Cancelled, Completed, Failed, StartChild
from durable.core.errors import ErrorData, NonDeterminism
from durable.core.journal import CHILD, EMIT, REMOTE, RUN, SIGNAL, STEP, WAIT
from durable.core.payload import describe, encode_error
from durable.engine import apply, pause
from durable.engine.children import parents_workspace, tell_parent
from durable.engine.residents import Arrival, Final, Resident, Sent, left, tell
from durable.protocol.states import Activity, Status
from durable.store.records import Commit, CommitOutcome, CommitStatus, FreeSlots, PutMessage

if TYPE_CHECKING:
    from durable.engine.executor import Executor

log = logging.getLogger("durable.settle")

_KEPT = frozenset({SIGNAL, CHILD, REMOTE, WAIT, EMIT})
"""What may come any moment: who waits for one of these stays in memory for a while."""


class Settler:
    """Settles the runs of one executor."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.settings = executor.settings
        self.clock = executor.clock
        self._flush: list[Resident] = []
        self._commits_made = 0

    # ------------------------------------------------------------------ settle

    def settle(self, run: Resident) -> None:
        """Decide what becomes of what the turns left: commit now, soon, act at once, or leave memory."""
        if run.dropped or run.committing or run.held:
            return
        if not run.ended and (run.machine.outcome is not None or run.final is not None):
            self._end(run)
        uncommitted = run.pending or run.effects or run.inbox_read > run.inbox_written
        if run.ended or run.effects:
            self.commit(run)
            return
        if run.paused is not None:
            pause.settle(self, run)
            return
        if run.actions or run.acks:
            # A body begins under the name `executing`: if the engine dies of it, it must be seen to.
            if uncommitted or (run.bodies and run.activity is not Activity.EXECUTING):
                self.commit(run)
                return
            self._release_barrier(run, run.actions, run.acks)
            run.actions, run.acks = [], []
            if self._taken_away(run):
                return
        if run.arrivals and not run.held:
            if not run.looking and not run.unlooked:
                self._executor.wake(run)
            return
        if not run.bodies and self._parked(run):
            wake = run.next_wake()
            if run.recovery_attempts:
                # It has come to rest, so it was not what killed its engine. The next suspect may begin once that is stored.
                run.progressed = True
            if self.settings.cold or run.lane is not None or self._far(run, wake):
                self.commit(run, suspend=True)
                return
            if run.progressed:
                self.commit(run)
                return
            if not run.idle:
                self._executor.rest(run)
            if uncommitted or run.activity != self._activity(run):
                self.later(run)
        else:
            if run.idle:
                run.idle = False
                self._executor.idle.pop(run.run_id, None)
            if uncommitted:
                self.later(run)
        self._arm(run)

    def _parked(self, run: Resident) -> bool:
        """Whether everything this run does is wait, so that it could leave memory."""
        if run.bodies or run.arrivals or run.actions or run.fetching or run.asking or run.unlooked:
            return False
        for sent in run.sent.values():
            if not sent.published or sent.asking or sent.command.options.heartbeat_timeout is not None:
                return False
        # A task in this process lives and dies with it, so its run must be seen to die too.
        return not self.has_task_here(run)

    def has_task_here(self, run: Resident) -> bool:
        """Whether a task of this run is, or may be, under way in this process."""
        pool = self._executor.deps.transport
        if not run.sent or pool.capabilities.shared:  # all members are
            return False
        return any(not self.shared(sent) for sent in run.sent.values())

    def shared(self, sent: Sent) -> bool:
        """Whether a task's transport reaches beyond this process."""
        return self._executor.deps.transport.member(sent.transport).capabilities.shared

    def _taken_away(self, run: Resident) -> bool:
        """An action may have ended or committed it; a function, since it changes behind the reader's back."""
        return run.committing or run.dropped

    def _far(self, run: Resident, wake: int | None) -> bool:
        """Whether only time can wake it, and not soon: no reason to keep it in memory."""
        if wake is None or wake < self.clock.now() + int(self.settings.hot_for * SECOND):
            return False
        return not any(command.kind in _KEPT for command in run.machine.outstanding.values())

    def _activity(self, run: Resident) -> Activity:
        if run.paused is not None:
            return Activity.PAUSED
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
        if run.looking or run.unlooked:
            return  # it is woken when its inbox has been read, and events have been looked at
        if wake is None or (run.armed is not None and run.armed <= wake):
            return
        if run.alarm is not None:
            run.alarm.cancel()
        run.armed = wake
        delay = max(0.0, (wake - self.clock.now()) / SECOND)
        run.alarm = self._executor.loop.call_later(delay, self._ring, run, context=self._executor.variables)

    def _ring(self, run: Resident) -> None:
        run.armed = run.alarm = None
        # A loop's timer may come a hair early by the store's clock; then it is simply armed again.
        if not run.dropped:
            self._executor.wake(run)

    def later(self, run: Resident) -> None:
        """Commit within a tick: nothing waits for it but those who watch."""
        if run.flushing:
            return
        run.flushing = True
        if not self._flush:
            self._executor.loop.call_later(self.settings.tick, self._tick, context=self._executor.variables)
        self._flush.append(run)

    def _tick(self) -> None:
        runs, self._flush = self._flush, []
        for run in runs:
            run.flushing = False
            if run.paused is not None:
                self.settle(run)
                continue
            if run.dropped or run.committing or run.held or run.ended:
                continue
            if (
                run.pending
                or run.marks
                or run.inbox_read > run.inbox_written
                or (run.idle and run.activity != self._activity(run))
            ):
                self.commit(run)

    def evict(self) -> None:
        """Let runs leave memory that have waited long enough, and the longest idle above the limit. Called now and then."""
        spare = len(self._executor.idle) - self.settings.hot_limit
        limit = self.clock.now() - int(self.settings.hot_for * SECOND)
        for run in list(self._executor.idle.values()):
            if spare <= 0 and run.last_at > limit:
                continue
            if not run.committing and not run.flushing and self._parked(run):
                spare -= 1
                self.commit(run, suspend=True)

    def suspend_waiting(self) -> None:
        """Let every run leave memory that only waits: the engine is about to stop."""
        for run in list(self._executor.residents.values()):
            if not (run.committing or run.held or run.ended or run.opening) and self._parked(run):
                self.commit(run, suspend=True)

    # ------------------------------------------------------------------ end

    def _end(self, run: Resident) -> None:
        """Write down the outcome. What is still under way is told that nobody waits any more."""
        final = run.final or _final(run)
        run.final = final
        run.ended = True
        # Those given up inside the run have said so; what is left was never awaited.
        closing = final.status is not Status.COMPLETED
        for command in list(run.machine.outstanding.values()):
            closes = closing and isinstance(command, StartChild) and command.options.on_parent_close == "cancel"
            if not isinstance(command, StartChild) or closes or run.tree_cancelled:
                apply.abandon(self._executor, run, command)
        outcome = run.machine.outcome
        cut = outcome.cut if isinstance(outcome, Failed) and run.final.status is Status.FAILED else None
        if outcome is None and run.final.status is Status.FAILED:
            cut = run.timed_out
        self._executor.append(
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
            run.effects.append(tell_parent(run.run_id, parents_workspace(run), run.parent, final))

    def block(self, run: Resident, error: NonDeterminism) -> None:
        """Journal and code disagree: nothing has been done, nothing is lost; park it until the code is mended."""
        log.error("run %s is blocked: %s", run.run_id, error)
        self._forget(run)
        data = describe(error)
        details = {"position": error.position, "recorded": error.recorded, "asked": error.asked}
        payload = encode_error(ErrorData(message=data.message, code=data.code, type=data.type, details=details))
        self._executor.append(run, Arrival(self.clock.now(), RUN, "blocked", name=run.definition.name, payload=payload))
        self.commit(run, suspend=True, blocked=payload)

    def _forget(self, run: Resident) -> None:
        """Undo, in memory, what is not committed. Inbox rows stay unread; what came directly is sent again."""
        run.pending.clear()
        run.effects.clear()
        run.actions.clear()
        run.marks.clear()
        run.looked.clear()
        run.tail = run.seq
        run.inbox_read = run.inbox_known = run.inbox_written
        tell(run.acks, left())

    # ------------------------------------------------------------------ commit

    def commit(self, run: Resident, *, suspend: bool = False, blocked: bytes | None = None) -> None:
        if run.marks:
            for key, began in run.marks.items():
                attempt = run.attempts.get(key, 1)
                mark = Arrival(began, STEP, "started", key=key, attempt=attempt, started_at=began)
                self._executor.append(run, mark)
            run.marks.clear()
        if run.looked and run.paused is None:  # what was found is not delivered: it is looked for again
            for key in [wait.key for wait in run.machine.events_waited() if wait.key in run.looked]:
                self._executor.append(run, Arrival(self.clock.now(), WAIT, "looked", key=key))
            run.looked.clear()
        if suspend and run.lane is not None and (blocked is not None or run.paused is not None or not run.sent):
            run.effects.append(FreeSlots())  # nothing is under way: others of its lane may go on
        self._commits_made += 1
        commit = Commit(
            run.run_id,
            run.epoch,
            run.seq,
            f"{self._executor.lease.incarnation}-{self._commits_made}",
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
                if blocked is None and run.paused is None:
                    commit.wake_at = self._wake_at(run)
        actions, run.actions = run.actions, []
        acks, run.acks = run.acks, []
        run.committing = True
        run.suspending = suspend
        self._executor.commits.submit(commit, partial(self._committed, run, commit, actions, acks))

    def _wake_at(self, run: Resident) -> int:
        """When a run that leaves memory is due again: never without a time, and in time to ask after its tasks."""
        now = self.clock.now()
        wake = run.next_wake() or now + int(self.settings.reconcile * SECOND)
        asks = (self._executor.dispatch.ask_at(sent, now) for sent in run.sent.values())
        return min([wake, *(ask for ask in asks if ask is not None)])

    def _committed(
        self,
        run: Resident,
        commit: Commit,
        actions: list[Callable[[], None]],
        acks: list[Callable[[BaseException | None], None]],
        answer: CommitOutcome | BaseException,
    ) -> None:
        run.committing = False
        if run.dropped or isinstance(answer, BaseException) or answer.status is not CommitStatus.DONE:
            self._not_committed(run, commit, acks, answer)
            return
        executor = self._executor
        run.seq += len(commit.entries)
        if commit.inbox_read:
            run.inbox_written = max(run.inbox_written, commit.inbox_read)
        if commit.progressed:
            run.recovery_attempts = 0
            run.progressed = False
            executor.on_calm(run)
        if commit.activity:
            run.activity = commit.activity
        if commit.effects:
            if answer.wake:
                for effect in commit.effects:
                    if isinstance(effect, PutMessage):
                        executor.on_nudge(effect.message.run_id, answer.wake[0])
            for effect in commit.effects:
                if isinstance(effect, PutMessage) and effect.message.kind == "cancel":
                    executor.on_parked_mail(effect.message.run_id)  # a paused one hears it only so
            executor.on_due()
        if run.lane is not None and (run.ended or commit.suspend):
            executor.on_freed(run)
        executor.on_committed(run, commit)
        if run.ended:
            tell(acks, None)
            final = run.final
            assert final is not None
            self._executor.drop(run)
            self._executor.on_finished(run, final)
            return
        if commit.suspend:
            tell(acks, None)
            self._executor.drop(run)
            if run.paused is not None and answer.inbox_last > run.inbox_known:
                self._executor.on_parked_mail(run.run_id)  # it may be the word to go on
            # Mail that came in between has made it due at once.
            if answer.inbox_last > run.inbox_written or commit.wake_at is not None:
                self._executor.on_due()
            return
        if answer.inbox_last > run.inbox_known:
            self._executor.on_mail(run)
        self._release_barrier(run, actions, acks)
        self.settle(run)

    def _not_committed(
        self,
        run: Resident,
        commit: Commit,
        acks: list[Callable[[BaseException | None], None]],
        answer: CommitOutcome | BaseException,
    ) -> None:
        if not run.dropped and isinstance(answer, CommitOutcome):
            if answer.failure is not None:
                tell(acks, None)
                self._refused(run, commit, answer.failure)
                return
            log.warning("run %s belongs to another engine now; dropped here", run.run_id)
        if not isinstance(answer, CommitOutcome):
            self._executor.unsure = True
        tell(acks, left())
        self._executor.drop(run)

    def _release_barrier(
        self, run: Resident, actions: list[Callable[[], None]], acks: list[Callable[[BaseException | None], None]]
    ) -> None:
        if acks:
            tell(acks, None)
        for action in actions:
            action()

    def _refused(self, run: Resident, commit: Commit, failure: Exception) -> None:
        """The store takes this commit never: the run fails with the reason, instead of trying for ever."""
        log.error("the store refused a commit of run %s, which fails: %s", run.run_id, failure)
        if run.refused:
            self._executor.forsake(run)
            return
        run.refused = True
        self._forget(run)
        # The machine has let go of what it gave up; children are told all the same. One never started hears nothing.
        run.effects += [e for e in commit.effects if isinstance(e, PutMessage) and e.message.kind == "cancel"]
        run.suspending = False
        run.ended = False
        run.final = Final(Status.FAILED, error=encode_error(describe(failure)))
        self.settle(run)


def _final(run: Resident) -> Final:
    outcome = run.machine.outcome
    if isinstance(outcome, Completed):
        return Final(Status.COMPLETED, output=outcome.output)
    if isinstance(outcome, Cancelled):
        return Final(Status.CANCELLED, error=outcome.error)
    assert isinstance(outcome, Failed)
    return Final(Status.FAILED, error=outcome.error)
