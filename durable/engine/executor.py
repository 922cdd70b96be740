"""Drives runs: replay, deliver what arrived, apply what the turn asks for, settle.

    arrive ─→ turns: stamp ─→ journal ─→ deliver ─→ apply ─→ settle ─→ commit ─→ what waited behind the barrier

Turns run only in `_pump`, a plain callback, never inside a task (D6). What becomes of a run after its turns is
engine/settle.py's business.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from contextvars import Context as Variables
from operator import attrgetter
from typing import Any

from msgspec.structs import replace

from durable.core.clock import SECOND, StoreClock
from durable.core.commands import Command, SendEvent
from durable.core.errors import DeterminismError, DurableError, ErrorData, NonDeterminism
from durable.core.journal import COMMAND_KINDS, EVENT, LOG, RUN, TIMER, Entry
from durable.core.payload import describe, encode_error
from durable.engine import apply, attempts, children, pause
from durable.engine.committer import Group
from durable.engine.deps import Deps
from durable.engine.dispatch import Dispatch
from durable.engine.lease import Lease
from durable.engine.residents import Arrival, Final, Resident, Sent, left, tell
from durable.engine.settle import Settler
from durable.engine.steps import LocalSteps
from durable.protocol.states import Status
from durable.store.records import Commit, CommitOutcome, Journal

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
        self.full = False
        """Work was left in the store for want of room; the next run that makes some has it looked for."""
        self.commits: Group[Commit, CommitOutcome] = Group(
            "commits",
            deps.store.commit,
            max_items=deps.store.capabilities.max_batch,
            in_flight=deps.store.capabilities.in_flight,
            size=attrgetter("size"),
            # A run that was dropped with a commit still queued may be claimed anew and commit again.
            alone=attrgetter("run_id"),
        )
        self.steps = LocalSteps(self)
        self.dispatch = Dispatch(self)
        self.settler = Settler(self)
        self.lease: Lease
        self.unsure = True
        """Whether the store may call a run ours that is not here: an answer got lost, or was an error nobody foresaw."""
        self.draining = False
        """Nothing new is begun: what waits behind the barrier stays there, for the next owner."""
        self.executing: str | None = None
        """The run whose turn it is; the watchdog names it when the loop is blocked."""

        # Told by the executor; set by the engine.
        self.on_finished: Callable[[Resident, Final], None] = lambda run, final: None
        self.on_committed: Callable[[Resident, Commit], None] = lambda run, commit: None
        self.on_calm: Callable[[Resident], None] = lambda run: None
        self.on_mail: Callable[[Resident], None] = lambda run: None
        self.on_look_back: Callable[[Resident, Iterable[str]], None] = lambda run, keys: None
        self.on_send_event: Callable[[Resident, SendEvent], None] = lambda run, command: None
        self.on_mailed: Callable[[str, str], None] = lambda run_id, kind: None
        self.on_freed: Callable[[Resident], None] = lambda run: None
        self.on_due: Callable[[], None] = lambda: None
        self.on_nudge: Callable[[str, str | None], None] = lambda run_id, owner: None
        self.webhooks_of: Callable[[str], Any] = lambda workspace: None
        self.on_parked_mail: Callable[[str], None] = lambda run_id: None

        self.on_unwanted: Callable[[Resident, Sent], None] = lambda run, sent: None
        self.on_cancelling: Callable[[Resident], None] = lambda run: None

        self._ready: deque[Resident] = deque()
        self._pumping = False
        self._leaving: list[Resident] = []
        """Dropped, their machines not unwound yet."""
        self._keep: set[asyncio.Task[None]] = set()
        self.variables = Variables()
        self.loop: asyncio.AbstractEventLoop

    def start(self, lease: Lease) -> None:
        """Begin, under this lease."""
        self.lease = lease
        self.loop = asyncio.get_running_loop()
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
                arrival.ack(left())
            return
        run.arrivals.append(arrival)
        self.wake(run)

    def call(self, function: Callable[[], None]) -> None:
        """Call it on the loop, at once if that is where we are."""
        if threading.get_ident() == self._thread:
            function()
        else:
            self.loop.call_soon_threadsafe(function)

    def wake(self, run: Resident) -> None:
        """Have a look at a run in the next pump."""
        if run.queued or run.held:
            return
        run.queued = True
        self._ready.append(run)
        if not self._pumping:
            self._pumping = True
            self.loop.call_soon(self._pump, context=self.variables)

    def _pump(self) -> None:
        self._pumping = False
        monotonic = self.clock.monotonic
        began = monotonic()
        for _ in range(len(self._ready)):
            run = self._ready.popleft()
            run.queued = False
            try:
                self._turns(run)
            except Exception:
                # Ours to fix. The run goes back to the store unharmed, others go on.
                log.exception("run %s could not be driven; it is given back", run.run_id)
                self.forsake(run)
            ended = monotonic()
            if ended - began > SLOW_SECONDS:
                log.warning(
                    "run %s held the event loop for %.2f s; every other run waited. Is there blocking work, such as "
                    "time.sleep, in the workflow? It belongs in a step.",
                    run.run_id,
                    ended - began,
                )
            began = ended
        if self._ready and not self._pumping:
            self._pumping = True
            self.loop.call_soon(self._pump, context=self.variables)

    # ------------------------------------------------------------------ turns

    def _turns(self, run: Resident) -> None:
        if run.dropped or run.suspending or run.ended or run.held:
            return
        self.executing = run.run_id
        try:
            if run.opening is not None:
                self._open(run)
            while run.machine.outcome is None and run.final is None:
                arrival = self._next(run)
                if arrival is None:
                    break
                self._take(run, arrival)
        except NonDeterminism as error:
            self.settler.block(run, error)
        except DeterminismError as error:
            run.final = Final(Status.FAILED, error=encode_error(describe(error)))
        finally:
            self.executing = None
        self.settler.settle(run)

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
            try:
                # With nothing recorded but the start, a replay is a live turn.
                fresh = run.machine.deliver(entries[0]) if len(entries) == 1 else run.machine.replay(entries)
            except NonDeterminism:
                raise  # it is parked as it is
            except DeterminismError:
                children.close_unseen(self, run, entries)
                raise
        else:
            begun = apply.started(self, run)
            self._recall(run, begun)
            fresh = run.machine.deliver(begun)
        if len(entries) > 1:
            issued = {command.key for command in fresh if isinstance(command, Command)}
            for command in list(run.machine.outstanding.values()):
                if command.key not in issued:
                    apply.resume(self, run, command, run.machine.trace(command.key))
        apply.apply(self, run, fresh)

    def _recall(self, run: Resident, entry: Entry) -> None:
        """Take the run's own deadlines from its journal."""
        if entry.status in ("started", "requeued"):
            run.cancel_deadline = run.timed_out = None
            run.tree_cancelled = False
            if run.definition.timeout is not None:
                run.deadline = entry.at + int(run.definition.timeout * SECOND)
        elif entry.status in ("cancelling", "timed_out"):
            run.deadline = None
            run.timed_out = entry.seq if entry.status == "timed_out" else None
            run.tree_cancelled = entry.status == "cancelling" and children.of_the_tree(entry)
            run.cancel_deadline = entry.at + int(self.settings.cancel_grace * SECOND)
        elif entry.status == "paused":
            pause.begin(run, entry)
        elif entry.status in ("resumed", "forked"):
            run.paused = None
            if held := entry.held:
                run.put_off(held)
                run.holds.append((entry.seq, held))

    def _next(self, run: Resident) -> Arrival | None:
        """What comes next: arrivals by when they happened, timers by their deadline, arrivals first when equal."""
        while True:
            if run.paused is not None and ((taken := pause.next_arrival(self, run)) or run.paused is not None):
                return taken
            arrival = run.arrivals[0] if run.arrivals else None
            due = run.next_wake()
            if due is None or (arrival is not None and arrival.happened <= due) or due > self.clock.now():
                if arrival is None or (arrival.kind == EVENT and run.unlooked):
                    return None
                return run.arrivals.popleft()
            if run.unlooked:
                return None
            if run.looked_back_at < due and (waits := run.machine.events_waited()):
                keys = [wait.key for wait in waits]
                run.unlooked.update(keys)
                self.on_look_back(run, keys)
                return None
            if run.looked_at < due and run.machine.signals_waited():
                # What the store took before the deadline comes first, though no hint has told of it (S19).
                if not run.looking:
                    run.looking = True
                    self.on_mail(run)
                return None
            timer = run.machine.next_timer()
            if timer is not None and timer.deadline == due:
                return Arrival(due, TIMER, "fired", key=timer.key, ordinal=timer.ordinal, name=timer.name)
            if due == run.deadline:
                return Arrival(due, RUN, "timed_out", name=run.definition.name)
            if due == run.cancel_deadline:
                late = "did not finish its clean-up in time."
                if run.timed_out is None:
                    error = ErrorData(message=f"The run {late}", code="run_cancelled")
                    run.final = Final(Status.CANCELLED, error=encode_error(error))
                else:
                    error = ErrorData(message=f"The run timed out, and {late}", code="run_timeout", type="RunTimeout")
                    run.final = Final(Status.FAILED, error=encode_error(error))
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
        if kind in COMMAND_KINDS and arrival.status != "held":
            if not attempts.accepts(self, run, arrival):
                return
        elif kind == RUN and (run.cancel_deadline is not None or arrival.status == "resumed"):
            return  # cancelled twice, or timed out while cancelling: the first one counts; or it had gone on before
        elif kind == EVENT and arrival.key in run.machine.events_had:
            return  # it was found looking back, and has been told of too
        elif kind == LOG and arrival.line is not None and not attempts.hears(run, arrival):
            return
        entry = self.append(run, arrival)
        if kind == RUN:
            self._recall(run, entry)
            if run.sent and entry.delivers:
                self.on_cancelling(run)
        if entry.delivers:
            if arrival.whole is not None:
                entry = replace(entry, payload=arrival.whole)
            apply.apply(self, run, run.machine.deliver(entry))

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

    def forsake(self, run: Resident) -> None:
        """Give a run back without writing anything but that."""
        self.drop(run)
        self.keep(self._give_back([(run.run_id, run.epoch)]))

    async def _give_back(self, runs: list[tuple[str, int]]) -> None:
        try:
            await self.deps.store.release(runs)
        except DurableError:
            log.warning("could not release %s; its lease will end by itself", runs)

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it as a task that is not lost."""
        task = self.loop.create_task(work)
        self._keep.add(task)
        task.add_done_callback(self._keep.discard)

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
        self._room()
        self.dispatch.forget(run)
        for task in run.bodies.values():
            if task is not None:
                task.cancel()
        run.bodies.clear()
        for arrival in run.arrivals:
            if arrival.ack is not None:
                arrival.ack(None if run.ended else left())
        run.arrivals.clear()
        tell(run.acks, left())
        # Not here: a commit's answer comes inside a task, and workflow code runs in none.
        if not self._leaving:
            self.loop.call_soon(self._unwind, context=self.variables)
        self._leaving.append(run)
        self.on_calm(run)

    def rest(self, run: Resident) -> None:
        """A run does nothing but wait: it takes no room from others."""
        run.idle = True
        self.idle[run.run_id] = run
        self._room()

    def _room(self) -> None:
        if self.full:
            self.full = False
            self.on_due()

    def _unwind(self) -> None:
        leaving, self._leaving = self._leaving, []
        for run in leaving:
            try:
                run.machine.drop()
            except Exception:
                log.exception("run %s could not be unwound cleanly", run.run_id)
