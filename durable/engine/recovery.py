"""Runs whose engine died. Claimed all the time, not once at boot; those that were executing are suspects.

Most of them only happened to be there, so a suspect goes on at once. One that is at its last attempt runs alone among
its like, until it has made progress, waits, or has survived for a while: a poison run may use up its neighbours'
attempts but for the last, which nobody but itself can take (D7, S32). A run that was dead and is requeued has its whole
budget again and nobody's trust: it runs alone until it has made progress. Those that wait for their turn are stored as
`queued`, so that another crash does not count against them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from durable.core.errors import ErrorData
from durable.core.journal import CHILD, RUN, Entry
from durable.core.payload import encode_error
from durable.engine.children import cancel, parents_workspace, tell_parent, to_cancel
from durable.engine.dead_letter import route
from durable.engine.executor import Executor
from durable.engine.residents import Final, Resident
from durable.protocol.states import Activity, Status
from durable.store.records import Commit, CommitOutcome, CommitStatus, Journal, PutMessage

log = logging.getLogger("durable.recovery")


def back_from_the_dead(entries: Sequence[Entry]) -> bool:
    """Whether a requeue has reopened a dead run, and it has got no further since."""
    reopened = False
    for entry in reversed(entries):
        if entry.kind == RUN and entry.status in ("requeued", "dead"):
            if reopened and entry.status == "dead":
                return True
            reopened = entry.status == "requeued"
        elif entry.delivers and not reopened:
            return False
    return False


class Recovery:
    """The lane of suspects."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._lane: deque[tuple[Resident, Journal]] = deque()
        self._current: Resident | None = None
        self._bound: asyncio.TimerHandle | None = None

    def admit(self, run: Resident, journal: Journal) -> None:
        """Take a suspect in. It stays still until the store says that it executes; the last attempt is made alone."""
        run.held = True
        self._executor.residents[run.run_id] = run
        last = run.recovery_attempts >= self._executor.settings.max_recovery_attempts
        if not last and not back_from_the_dead(journal.entries):
            self._try(run, journal)
            return
        self._lane.append((run, journal))
        if self._current is None:
            self._advance()

    def calm(self, run: Resident) -> None:
        """A run has progressed, waits, or has left: if it was the suspect, the next may begin."""
        if run is self._current:
            self._advance()

    def _advance(self) -> None:
        self._current = None
        if self._bound is not None:
            self._bound.cancel()
            self._bound = None
        while self._lane:
            run, journal = self._lane.popleft()
            if run.dropped:
                continue
            self._current = run
            self._bound = asyncio.get_running_loop().call_later(self._executor.settings.lease, self.calm, run)
            limit = self._executor.settings.max_recovery_attempts
            if run.recovery_attempts > limit:
                self._bury(run, journal, limit)
            else:
                log.warning(
                    "run %s was executing when its engine died (%d of %d); it is tried alone",
                    run.run_id,
                    run.recovery_attempts,
                    limit,
                )
                self._try(run, journal)
            return

    def _try(self, run: Resident, journal: Journal) -> None:
        self._commit(run, [], Activity.EXECUTING, partial(self._begin, run, journal))

    def _begin(self, run: Resident, journal: Journal, answer: CommitOutcome | BaseException) -> None:
        run.held = False
        if run.dropped:
            return  # the lease was lost, or the engine drained, while this was under way
        if isinstance(answer, BaseException) or answer.status is not CommitStatus.DONE:
            self._executor.drop(run)
            return
        run.activity = Activity.EXECUTING
        self._executor.admit(run, journal)

    def _bury(self, run: Resident, journal: Journal, limit: int) -> None:
        log.error("run %s is dead: its engine died %d times while it was executing", run.run_id, run.recovery_attempts)
        data = ErrorData(
            message=f"The engine died {run.recovery_attempts} times in a row while this run was executing, "
            f"more than its {limit} recovery attempts. Mend what kills it, then requeue it.",
            code="run_dead",
        )
        final = Final(Status.DEAD, error=encode_error(data))
        run.final = final
        entries, messages = self._last_entries(run, journal)
        if run.parent is not None:
            messages.append(tell_parent(run.run_id, parents_workspace(run), run.parent, final))

        def done(answer: CommitOutcome | BaseException) -> None:
            run.held = False
            run.ended = not isinstance(answer, BaseException) and answer.status is CommitStatus.DONE
            self._executor.drop(run)
            if not isinstance(answer, BaseException) and run.ended:
                self._executor.on_finished(run, final)
                self._executor.on_due()
                for put in messages if answer.wake else ():
                    self._executor.on_nudge(put.message.run_id, answer.wake[0])

        self._commit(run, entries, None, done, final, messages)

    def _last_entries(self, run: Resident, journal: Journal) -> tuple[list[Entry], list[PutMessage]]:
        """What a run that dies leaves in its journal, and what its open children are told. Those whose outcome is in its
        inbox have ended: a requeue finds that outcome, and starts the others again."""
        told = {arrival.child_id for arrival in run.arrivals}
        children = {key: one for key, one in to_cancel(journal.entries).items() if one.run_id not in told}
        at = max(self._executor.clock.now(), journal.entries[-1].at if journal.entries else 0)
        entries = [
            Entry(run.seq + n, at, CHILD, "cancelled", key, begun.ordinal, begun.name, fingerprint=begun.fingerprint)
            for n, (key, (begun, _, _)) in enumerate(children.items(), 1)
        ]
        payload = b'{"cut":%d}' % entries[0].seq if entries else None
        entries.append(Entry(run.seq + len(entries) + 1, at, RUN, "dead", name=run.definition.name, payload=payload))
        return entries, [cancel(run, key, one.run_id, one.workspace) for key, one in children.items()]

    def _commit(
        self,
        run: Resident,
        entries: list[Entry],
        activity: Activity | None,
        done: Callable[[CommitOutcome | BaseException], None],
        final: Final | None = None,
        messages: Sequence[PutMessage] = (),
    ) -> None:
        executor = self._executor
        commit = Commit(run.run_id, run.epoch, run.seq, executor.deps.ids.unique(), entries)
        if activity is not None:
            commit.activity = activity
        if final is not None:
            commit.status, commit.error = final.status, final.error
            commit.effects = (*messages, *route(executor.deps, run, final))
        executor.commits.submit(commit, done)
