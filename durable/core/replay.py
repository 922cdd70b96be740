"""Replay is a function: (definition, journal) → commands. No I/O, no clock, no thread.

A `Machine` is one run's workflow code on its own loop. Journal entries go in, one at a time, a full turn for each,
live and on replay alike; what the code asks for comes out. Before an entry does anything it is compared with what the
code asked for: kind, key, name, ordinal and the fingerprint of the arguments. Called by the engine, by runners, by
replay tests and by `why`; never does what it asks for.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from durable.core.commands import (
    Abandon,
    AskApproval,
    Cancelled,
    CloseApproval,
    Command,
    Completed,
    Failed,
    Note,
    Outcome,
    Patch,
    Report,
    SendEvent,
    Settled,
    StartChild,
    WaitEvent,
    WaitSignal,
    WriteLog,
)
from durable.core.ctx import Context
from durable.core.definition import WorkflowDefinition
from durable.core.errors import (
    ChildFailed,
    DurableError,
    ErrorData,
    NonDeterminism,
    PayloadError,
    StepFailed,
    StepTimeout,
)
from durable.core.event import Fact, read_fact
from durable.core.journal import (
    CHILD,
    COMMAND_KINDS,
    EVENT,
    LOG,
    MAIL_KINDS,
    PATCHED,
    RUN,
    SIGNAL,
    TIMER,
    Entry,
)
from durable.core.loop import Alarm, Loop, Promise, WorkflowTask
from durable.core.match import holds
from durable.core.payload import decode_error, describe, encode_error, through

logger = logging.getLogger("durable.workflow")

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

_ANSWERS = frozenset({"completed", "failed", "cancelled"})
_NULL = b"null"


class Ended(Exception):
    """Raised by a driver of ours to end its run in so many words: the outcome was made elsewhere."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class Timer(Struct, frozen=True):
    """The earliest of the run's own timers. `deadline` in µs since the epoch."""

    deadline: int
    ordinal: int
    key: str
    name: str


class _Failure(NamedTuple):
    """A failure that was handed to the workflow."""

    promise: Promise
    error: StepFailed
    seq: int


class Asked(Promise):
    """The promise of a command's answer."""

    __slots__ = ("alarm", "command", "read")

    def __init__(
        self, loop: Loop, release: Callable[[Promise], None], command: Command, read: Callable[[bytes], Any]
    ) -> None:
        asyncio.Future.__init__(self, loop=loop)  # past Promise's: this is the hot path
        self.number = next(loop.numbers)
        self.release = release
        self.command = command
        self.read = read
        self.alarm: Alarm | None = None
        """The timeout of a wait for a signal or an event."""

    def answer(self, payload: bytes) -> None:
        """Settle it with what the journal says."""
        try:
            value = self.read(payload)
        except PayloadError as error:
            self.set_exception(PayloadError(f"What came for {self.command.kind} {self.command.key!r}: {error}"))
        else:
            self.set_result(value)


# What an author reads who forgot an await: "unsupported operand type(s) for +: 'NotAwaited' and 'int'".
Asked.__name__ = Asked.__qualname__ = "NotAwaited"


class Machine:
    """One run's workflow code, driven entry by entry. After an error it is good for `drop` only."""

    def __init__(
        self, definition: WorkflowDefinition, *, run_id: str, input: bytes, generation: int = 0, logs: int = 0
    ) -> None:
        self.definition = definition
        self.run_id = run_id
        self.generation = generation
        """How often the run was requeued; children started since then have it in their ids."""
        self.seed = run_id
        """What its random numbers are drawn from. A copy of another run draws that one's, or its steps would not fit."""
        self.outstanding: dict[str, Command] = {}
        """Asked for and unanswered, by key, in order of ordinals."""
        self.outcome: Outcome | None = None
        self.loop = Loop()  # type: ignore[abstract]
        self.input = input
        self.meta: bytes | None = None
        """The run's origin (core/origin.py), where whoever made the machine knows it."""
        self.entry: Entry | None = None
        """What the turn under way was handed; the last one between turns."""
        self._main: WorkflowTask | None = None
        self._ending: Entry | None = None
        self._broken: BaseException | None = None
        # Commands
        self._issued: list[Command | Note] = []
        self._turn_from = 0
        self._promises: dict[str, Asked] = {}
        self._release: Callable[[Any], None] = self._withdraw
        self.keys: dict[str, int] = {}
        """Every key given out, with the next number to try for a repeat of it."""
        self._failures: list[_Failure] = []
        # Signals
        self._signals: dict[str, deque[bytes]] = {}
        self._waiting: dict[str, deque[Asked]] = {}
        # Events
        self.events_had: set[str] = set()
        """Message ids of all events that have come: each comes once."""
        self._events: list[tuple[Fact, bytes]] = []
        """Those that no wait has taken."""
        # Notes
        self._logs = 0
        self._logs_stored = logs
        self._patches: dict[str, bool] = {}
        # Replay
        self._replaying = False
        self._behind = False
        self._known: dict[str, Command] = {}
        self._traces: dict[str, list[Entry]] = {}
        self._children: dict[str, str] = {}
        self._cancelled: set[str] = set()
        self._recorded_on = PYTHON

    # ------------------------------------------------------------------ driving

    @property
    def now(self) -> int:
        """The turn's time, µs since the epoch."""
        return self.loop.now

    def replay(self, entries: Sequence[Entry]) -> list[Command | Note]:
        """Feed a recorded journal. Returns what was asked for that it does not show yet, in order.

        Raises NonDeterminism at the first entry that disagrees with the code, before anything comes of it.
        """
        entries = self._prepare(entries)
        significant = [entry.delivers or entry.kind in COMMAND_KINDS for entry in entries]
        last = max((index for index, counts in enumerate(significant) if counts), default=-1)
        self._replaying = True
        for index, entry in enumerate(entries):
            self._behind = index < last
            if entry.kind in COMMAND_KINDS and entry.status != "late":
                self._compare(entry)
            if entry.delivers:
                self._turn(entry)
            elif held := entry.held:
                self.put_off(held)
        issued = [item for item in self._issued if self._is_news(item)]
        self._issued.clear()
        self._known.clear()
        self._cancelled.clear()
        self._replaying = self._behind = False
        return issued

    def deliver(self, entry: Entry) -> list[Command | Note]:
        """Run one live turn. Returns what it asked for."""
        self._turn(entry)
        issued, self._issued = self._issued, []
        self._turn_from = 0
        return issued

    def put_off(self, microseconds: int) -> None:
        """Every pending timer rings so much later: the run stood still meanwhile. Live, before the next entry is delivered;
        a replay finds it in the journal."""
        self.loop.put_off(microseconds)
        for command in self.outstanding.values():
            if isinstance(command, WaitEvent) and command.deadline is not None:
                command.deadline += microseconds
            elif isinstance(command, AskApproval) and command.expires_at is not None:
                command.expires_at += microseconds

    def trace(self, key: str) -> list[Entry]:
        """What the replayed journal says of an outstanding command: started, dispatched, retrying …"""
        return self._traces.get(key, [])

    def next_timer(self) -> Timer | None:
        """The earliest of the run's own timers."""
        alarm = self.loop.next_alarm()
        if alarm is None:
            return None
        return Timer(alarm.deadline, alarm.ordinal, f"timer:{alarm.ordinal}", alarm.name)

    def signals_waited(self) -> list[str]:
        """The names of signals that are waited for, in order of asking."""
        return [command.name for command in self.outstanding.values() if isinstance(command, WaitSignal)]

    def events_waited(self) -> list[WaitEvent]:
        """The open waits for events, in order of asking."""
        return [command for command in self.outstanding.values() if isinstance(command, WaitEvent)]

    def drop(self) -> None:
        """Unwind without a trace: every wait and every ctx call raises Unwound until the code has ended.

        No machine may be let go of without it, or the garbage collector would run the author's `finally`.
        """
        self._broken = self._broken or DurableError(f"Run {self.run_id} has left memory; replay it.")
        self.loop.drop()
        for failure in self._failures:
            failure.promise._log_traceback = False
        for promise in self._promises.values():
            promise.release = None
        self._failures.clear()
        self._promises.clear()
        self._waiting.clear()
        self._issued.clear()
        # No circle is left, so the run's memory is free now and not when the garbage collector comes by.
        self._main = None
        self._release = _let_go

    # ------------------------------------------------------------------ a turn

    def _turn(self, entry: Entry) -> None:
        if self._broken is not None:
            raise self._broken
        loop = self.loop
        try:
            if self.outcome is not None:
                self._after_the_end(entry)
                return
            loop.now = entry.at
            self.entry = entry
            self._turn_from = len(self._issued)
            loop.turn(self._answer if entry.kind in COMMAND_KINDS else self._hand_over, entry)
            main = self._main
            if main is not None and main.done():
                self._finish(main)
            elif not self.outstanding and not loop.alarms:
                loop.stalled()
        except BaseException as error:
            self._broken = error
            raise

    def _hand_over(self, entry: Entry) -> None:
        kind = entry.kind
        if kind == TIMER:
            self._fire(entry)
        elif kind == SIGNAL:
            self._signal(entry)
        elif kind == EVENT:
            self._event(entry)
        elif entry.status == "started":
            self._begin(entry)
        elif self._main is not None:
            self._ending = self._ending or entry
            self._main.cancel()

    def _begin(self, entry: Entry) -> None:
        if self._main is not None:
            raise self._mismatch(entry, "nothing: the run has begun already")
        if entry.payload:
            note = msgspec.json.decode(entry.payload)
            self._recorded_on = str(note.get("python", PYTHON))
            self.seed = str(note.get("seed", self.seed))
        try:
            main = self.definition.call(self.context(), self.input)
        except Exception as error:  # the input does not fit, or the class could not be made
            main = _fail(error)
        # An empty context: what the engine keeps in its own is none of the workflow's business.
        self._main = self.loop.create_task(main, name="main", context=contextvars.Context())

    def context(self) -> Context:
        """What the workflow's code is handed."""
        return Context(self)

    def _answer(self, entry: Entry) -> None:
        key = entry.key or ""
        command = self.outstanding.get(key)
        if command is None or not _same(command, entry):
            raise self._mismatch(entry, self._asked_instead(entry))
        del self.outstanding[key]
        if self._traces:
            self._traces.pop(key, None)
        promise = self._promises.pop(key)
        promise.release = None
        if entry.status == "completed":
            promise.answer(entry.payload or _NULL)
            return
        error = _failure_of(command, entry)
        self._failures.append(_Failure(promise, error, entry.seq))
        promise.set_exception(error)

    def _fire(self, entry: Entry) -> None:
        alarm = self.loop.alarms.get(-1 if entry.ordinal is None else entry.ordinal)
        if alarm is None or (entry.name is not None and entry.name != alarm.name):
            raise self._mismatch(entry, self._asked_instead(entry))
        self.loop.fire(alarm)

    def _signal(self, entry: Entry) -> None:
        name, payload = entry.name or "", entry.payload or _NULL
        waiting = self._waiting.get(name)
        if not waiting:
            self._signals.setdefault(name, deque()).append(payload)
            return
        promise = waiting.popleft()
        self._settle_wait(promise)
        promise.answer(payload)

    def _event(self, entry: Entry) -> None:
        """Every open wait that asks for it gets it; what nobody takes is kept for waits to come."""
        payload = entry.payload or _NULL
        fact = read_fact(payload)
        self.events_had.add(entry.key or "")
        takers = [command for command in self.events_waited() if asks_for(command, fact)]
        if not takers:
            self._events.append((fact, payload))
        for command in takers:
            promise = self._promises[command.key]
            self._settle_wait(promise)
            promise.answer(payload)

    def _after_the_end(self, entry: Entry) -> None:
        """What the journal may hold behind the entry that ended the code: messages that came as it ended."""
        if entry.kind not in MAIL_KINDS and entry.kind != RUN:
            raise self._mismatch(entry, "nothing: the code has finished")

    # ------------------------------------------------------------------ the end

    def _finish(self, main: WorkflowTask) -> None:
        self.outcome = self._outcome_of(main)
        loop = self.loop
        loop.finish()
        if self.outstanding:
            loop.turn(self._abandon_rest)
        loop.tell_unretrieved(main)
        for promise, error, _ in self._failures:
            if promise._log_traceback:
                promise._log_traceback = False
                logger.warning("run %s: nobody asked for the result of %r: %s", self.run_id, error.key, error)

    def _abandon_rest(self) -> None:
        forgotten = [key for key, command in self.outstanding.items() if not isinstance(command, StartChild)]
        if forgotten and isinstance(self.outcome, Completed):
            logger.warning(
                "run %s has returned while %s was asked for and not awaited; it is given up. Await it, or cancel it.",
                self.run_id,
                ", ".join(map(repr, forgotten)),
            )
        for key, command in list(self.outstanding.items()):
            if not isinstance(command, StartChild):  # a child nobody waits for is the engine's to close or to leave
                self._promises[key].cancel()

    def _outcome_of(self, main: WorkflowTask) -> Outcome:
        if main.cancelled():
            return self._let_through()
        error = main.exception()
        if isinstance(error, Ended):
            return error.outcome
        if error is None:
            try:
                name = self.definition.name
                # Read back too: what could never be read as its type must not be stored as a success.
                output, _ = through(main.result(), self.definition.output_type, what=f"the result of {name}")
                return Completed(output)
            except DurableError as refused:
                error = refused
        return Failed(encode_error(describe(error)), self._cut(error))

    def _let_through(self) -> Outcome:
        """A CancelledError came out of the workflow."""
        ending = self._ending
        if ending is None:
            data = ErrorData(
                message="The workflow ended in CancelledError, though nobody cancelled the run: it awaited something "
                "that it had cancelled itself. Catch asyncio.CancelledError there.",
                type="CancelledError",
            )
            return Failed(encode_error(data))
        if ending.status == "timed_out":
            limit = self.definition.timeout
            data = ErrorData(
                message=f"The run took longer than its timeout{'' if limit is None else f' of {limit:g} s'}.",
                code="run_timeout",
                type="RunTimeout",
            )
            return Failed(encode_error(data), ending.seq)
        return Cancelled(encode_error(ErrorData(message="The run was cancelled.", code="run_cancelled")))

    def _cut(self, error: BaseException) -> int | None:
        """The first failed entry among those whose errors came out, by identity: a requeue asks again from there."""
        seqs = {id(failure.error): failure.seq for failure in self._failures}
        return min((seqs[id(origin)] for origin in _origins(error) if id(origin) in seqs), default=None)

    # ------------------------------------------------------------------ what ctx asks for

    def peek(self, name: str) -> str:
        """The key that the next command of this name gets."""
        repeat, key = self.keys.get(name, 0), name
        while key in self.keys:
            key = f"{name}:{repeat}"
            repeat += 1
        return key

    def key(self, name: str) -> str:
        """The name, or `name:1`, `name:2` … for repeats, and never the key of another command."""
        keys = self.keys
        if name not in keys:
            keys[name] = 1
            return name
        repeat = keys[name]
        while (key := f"{name}:{repeat}") in keys:
            repeat += 1
        keys[name] = repeat + 1
        keys[key] = 1
        return key

    def ask(self, command: Command, read: Callable[[bytes], Any]) -> Asked:
        """Issue a command. What comes back is settled by the journal."""
        promise = Asked(self.loop, self._release, command, read)
        if self.loop.closing:
            return promise  # refused so often that it is now ignored
        key = command.key
        self.outstanding[key] = command
        self._promises[key] = promise
        self._issued.append(command)
        if self._replaying:
            self._known[key] = command
        return promise

    def wait_signal(
        self, command: WaitSignal, read: Callable[[bytes], Any], timeout: int | None, give_up: Callable[[Asked], None]
    ) -> Asked:
        """The oldest signal of that name, or the next. After `timeout` µs `give_up` settles the promise."""
        early = self._signals.get(command.name)
        if early:
            return self._at_once(command, read, early.popleft())
        promise = self.ask(command, read)
        if self.loop.closing:
            return promise
        self._waiting.setdefault(command.name, deque()).append(promise)
        if timeout is not None:
            promise.alarm = self.loop.call_at_microsecond(
                self.now + timeout, f"signal:{command.name}", self._give_up, promise, give_up
            )
        return promise

    def wait_event(self, command: WaitEvent, read: Callable[[bytes], Any], give_up: Callable[[Asked], None]) -> Asked:
        """The oldest event it asks for that has come and that no wait has taken, or the next. At its deadline `give_up`
        settles the promise."""
        for index, (fact, payload) in enumerate(self._events):
            if asks_for(command, fact):
                del self._events[index]
                return self._at_once(command, read, payload)
        promise = self.ask(command, read)
        if command.deadline is not None and not self.loop.closing:
            promise.alarm = self.loop.call_at_microsecond(
                command.deadline, f"event:{command.name}", self._give_up, promise, give_up
            )
        return promise

    def send_event(self, command: SendEvent, read: Callable[[bytes], Any]) -> Asked:
        """Publish an event; answered with its id."""
        return self.ask(command, read)

    def _at_once(self, command: Command, read: Callable[[bytes], Any], payload: bytes) -> Asked:
        """What is waited for is there: nothing is asked."""
        promise = Asked(self.loop, self._release, command, read)
        promise.release = None
        promise.answer(payload)
        return promise

    def _give_up(self, promise: Asked, give_up: Callable[[Asked], None]) -> None:
        if not promise.done():
            self._forget_wait(promise)
            self._settle_wait(promise)
            give_up(promise)

    def tell(self, note: Note) -> None:
        """Issue a note."""
        if not self.loop.closing:
            self._issued.append(note)

    def _forget_wait(self, promise: Asked) -> None:
        if isinstance(promise.command, WaitSignal):
            self._waiting[promise.command.name].remove(promise)

    def _settle_wait(self, promise: Asked) -> None:
        command = promise.command
        key = command.key
        del self.outstanding[key]
        del self._promises[key]
        self._traces.pop(key, None)
        promise.release = None
        if promise.alarm is not None:
            promise.alarm.cancel()
        if isinstance(command, WaitEvent) and not self._replaying:
            self._issued.append(Settled(command))
        elif isinstance(command, AskApproval) and not self._replaying:
            self._issued.append(CloseApproval(command))

    def _withdraw(self, promise: Promise) -> None:
        """The wait on a command was cancelled inside the run."""
        assert isinstance(promise, Asked)
        command = promise.command
        if self.loop.dropping or self.outstanding.get(command.key) is not command:
            return
        del self.outstanding[command.key]
        del self._promises[command.key]
        self._traces.pop(command.key, None)
        self._forget_wait(promise)
        if promise.alarm is not None:
            promise.alarm.cancel()
        for index in range(self._turn_from, len(self._issued)):
            if self._issued[index] is command:  # asked for in this very turn: as if it had never been
                del self._issued[index]
                return
        if not isinstance(command, WaitSignal):
            self._issued.append(Abandon(command))
        elif isinstance(command, AskApproval) and not self._replaying:
            self._issued.append(CloseApproval(command))

    def child_id(self, ordinal: int, key: str) -> str:
        """The id a child of this call has, or is to get."""
        recorded = self._children.get(key)
        if recorded is not None:
            return recorded
        plain = f"{self.run_id}.child.{ordinal}"
        return f"{plain}.{self.generation}" if self.generation else plain

    def patched(self, id: str) -> bool:
        """Whether the code behind this patch is to run: its marker is in the journal, or this is new ground.

        The answer stays for the whole run: a loop that took the old way goes on taking it.
        """
        answer = self._patches.get(id)
        if answer is None:
            answer = self._patches[id] = not self._behind
            if answer and not self.loop.closing:
                # Before the turn's commands: no crash can leave a trace of them without the marker.
                self._issued.insert(self._turn_from, Patch(id))
        return answer

    @property
    def lines(self) -> int:
        """Log lines the code has written so far."""
        return self._logs

    def write_log(self, level: str, message: str, fields: bytes | None) -> None:
        """A log line, unless it is stored already."""
        index = self._logs
        self._logs += 1
        if self.loop.closing:
            return
        if index >= self._logs_stored:
            self._issued.append(WriteLog(index, level, message, fields))

    # ------------------------------------------------------------------ journal and code, compared

    def _prepare(self, entries: Sequence[Entry]) -> list[Entry]:
        """Leave out what a requeue asks again, and look ahead for what the code must be told at the call."""
        kept: list[Entry] = []
        requeued = 0
        for entry in entries:
            if entry.kind == RUN and entry.status == "requeued":
                requeued += 1
                cut = msgspec.json.decode(entry.payload).get("from") if entry.payload else None
                kept = kept if cut is None else without(kept, cut)
            elif entry.kind != LOG:
                kept.append(entry)
        self.generation = max(self.generation, requeued)
        for entry in kept:
            if entry.kind == PATCHED:
                self._patches[entry.name or entry.key or ""] = True
            elif entry.kind == CHILD and entry.status == "started" and entry.key and entry.payload:
                self._children[entry.key] = msgspec.json.decode(entry.payload)["run_id"]
        return kept

    def _compare(self, entry: Entry) -> None:
        """Hold one recorded entry of a command against the command the code issued under that key."""
        key = entry.key or ""
        command = self._known.get(key)
        if command is None or not _same(command, entry):
            raise self._sticking(self._mismatch(entry, self._asked_instead(entry)))
        waits = key in self.outstanding
        if entry.status == "cancelled":
            if waits and self.outcome is None:
                raise self._sticking(self._mismatch(entry, f"{_shown(command)}, and still waits for it"))
            self._cancelled.add(key)
        elif entry.delivers:
            if not waits:
                raise self._sticking(self._mismatch(entry, f"{_shown(command)}, but no longer waits for it"))
        elif waits:
            self._traces.setdefault(key, []).append(entry)

    def _is_news(self, item: Command | Note) -> bool:
        if isinstance(item, Command):
            return self.outstanding.get(item.key) is item and item.key not in self._traces
        if isinstance(item, Report):
            if self.outstanding.get(item.command.key) is not item.command:
                return False
            told = [entry.attempt for entry in self._traces.get(item.command.key, ())]
            return item.status != "retrying" or item.attempt not in told
        return not isinstance(item, Abandon) or item.command.key not in self._cancelled

    def _sticking(self, error: NonDeterminism) -> NonDeterminism:
        self._broken = error
        return error

    def _asked_instead(self, entry: Entry) -> str:
        """What the code has at the place where the journal has `entry`: by key, else by ordinal."""
        commands = {**self._known, **self.outstanding}
        if (command := commands.get(entry.key or "")) is not None:
            return _shown(command)
        for command in commands.values():
            if command.ordinal == entry.ordinal:
                return _shown(command)
        alarm = self.loop.alarms.get(-1 if entry.ordinal is None else entry.ordinal)
        return "nothing there" if alarm is None else f"timer {alarm.name!r} at ordinal {alarm.ordinal}"

    def _mismatch(self, entry: Entry, asked: str) -> NonDeterminism:
        named = repr(entry.key if entry.key is not None else entry.name or "")
        recorded = f"{entry.kind} {named} {entry.status}"
        if entry.ordinal is not None:
            recorded += f" at ordinal {entry.ordinal}"
        if entry.fingerprint is not None:
            recorded += f" with arguments {entry.fingerprint}"
        python = ""
        if self._recorded_on != PYTHON:
            python = (
                f" The run was recorded on Python {self._recorded_on} and this is {PYTHON}: the order inside asyncio "
                f"may differ. An engine on {self._recorded_on} can finish it."
            )
        return NonDeterminism(
            f"Run {self.run_id}: journal and code disagree at seq {entry.seq}. Recorded: {recorded}. "
            f"The code asks for: {asked}.{python} Put the change behind `if ctx.patched('...')`, or register the old "
            "code under the run's version and the new code under another.",
            position=entry.seq,
            recorded=recorded,
            asked=asked,
        )


async def _fail(error: Exception) -> None:
    raise error


def _same(command: Command, entry: Entry) -> bool:
    """Whether an entry tells of this command. Marks may leave out what their first entry has said."""
    return (
        command.kind == entry.kind
        and (entry.ordinal is None or entry.ordinal == command.ordinal)
        and (entry.name is None or entry.name == command.name)
        and (entry.fingerprint is None or entry.fingerprint == command.fingerprint)
    )


def asks_for(command: WaitEvent, fact: Fact) -> bool:
    """Whether a wait asks for this event. By when it was accepted, whenever it was told of."""
    if fact.name != command.name or (command.since is not None and fact.at < command.since):
        return False
    if command.deadline is not None and fact.at > command.deadline:
        return False
    return command.condition is None or holds(command.condition)(fact.plain())


def _shown(command: Command) -> str:
    return f"{command.kind} {command.key!r} at ordinal {command.ordinal} with arguments {command.fingerprint}"


def _failure_of(command: Command, entry: Entry) -> StepFailed:
    data = decode_error(entry.payload) if entry.payload else ErrorData(message="no reason was given")
    cls: type[StepFailed] = StepFailed
    if command.kind == CHILD:
        cls = ChildFailed
    elif data.code == "step_timeout":
        cls = StepTimeout
    what = "Child" if command.kind == CHILD else "Step"
    return cls(f"{what} {command.key!r} failed: {data.line}", key=command.key, error=data, attempts=entry.attempt)


def _origins(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and what a group holds."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        left.append(one.__cause__)
        if isinstance(one, BaseExceptionGroup):
            left.extend(one.exceptions)


def without(entries: list[Entry], cut: int) -> list[Entry]:
    """Without what was recorded from `cut` on, signals and events excepted, and all traces of commands that were answered there.

    A command asked for before the cut and answered behind it is asked for again as if for the first time: its old
    child has ended, its old attempts are spent.
    """
    again = {e.key for e in entries if e.seq >= cut and e.kind in COMMAND_KINDS and e.status in _ANSWERS}
    return [
        entry
        for entry in entries
        if (entry.seq < cut or entry.kind in MAIL_KINDS) and not (entry.kind in COMMAND_KINDS and entry.key in again)
    ]


def _let_go(promise: Any) -> None:
    """What is cancelled after its run has left memory concerns nobody."""
