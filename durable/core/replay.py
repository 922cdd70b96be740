"""Replay is a function: (definition, journal) → commands. No I/O, no clock, no thread.

A `Machine` is one run's workflow code on its own loop. Entries go in, one at a time, a full turn for each, live and on
replay alike; commands come out. Before anything is done, what the journal says of a command is compared with what the
code asks for: kind, key, name, position and the fingerprint of the arguments.
"""

from __future__ import annotations

import contextvars
import logging
import random
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from durable.core.commands import (
    Abandon,
    Cancelled,
    Command,
    Completed,
    Failed,
    Note,
    Outcome,
    Patch,
    StartChild,
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
    Stalled,
    StepFailed,
    StepTimeout,
    Unwound,
)
from durable.core.journal import CHILD, COMMAND_KINDS, LOG, PATCHED, RUN, SIGNAL, TIMER, Entry
from durable.core.loop import TurnFuture, TurnLoop, TurnTask
from durable.core.payload import decoder, describe, encode, encode_error, decode_error

log = logging.getLogger("durable.workflow")

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class Timer(Struct, frozen=True):
    """A timer of the run's own. `deadline` in µs."""

    deadline: int
    ordinal: int
    key: str
    name: str


class CommandFuture(TurnFuture):
    """What ctx hands out: answered by the journal. Cancelling it tells the engine at once."""

    def __init__(self, machine: Machine, command: Command, decode: Callable[[bytes], Any]) -> None:
        self.machine = machine
        self.command = command
        self.decode = decode
        super().__init__(machine.loop)

    def cancel(self, msg: Any | None = None) -> bool:
        if super().cancel(msg):
            self.machine.abandon(self)
            return True
        return False


class Machine:
    """One run's workflow code, driven entry by entry."""

    def __init__(
        self, definition: WorkflowDefinition, *, run_id: str, input: bytes, generation: int = 0, logs: int = 0
    ) -> None:
        self.definition = definition
        self.run_id = run_id
        self.generation = generation
        self.outstanding: dict[str, Command] = {}
        self.outcome: Outcome | None = None
        self.loop = TurnLoop(self.next_ordinal)
        self.random = random.Random(f"{run_id}:{generation}")
        self.signals: defaultdict[str, deque[bytes]] = defaultdict(deque)
        self.closing = False
        self._input = input
        self._logs_recorded = logs
        self._logs = 0
        self._ordinals = 0
        self._keys: set[str] = set()
        self._repeats: defaultdict[str, int] = defaultdict(int)
        self._issued: dict[str, Command] = {}
        self._futures: dict[str, CommandFuture] = {}
        self._waiting: defaultdict[str, deque[CommandFuture]] = defaultdict(deque)
        self._traces: defaultdict[str, list[Entry]] = defaultdict(list)
        self._abandoned: set[str] = set()
        self._patches: set[str] = set()
        self._children: dict[str, str] = {}
        self._fresh: list[Command | Note] = []
        self._remaining = 0
        self._main: TurnTask | None = None
        self._recorded_on = PYTHON
        self._ending: str | None = None
        self._failed: dict[int, int] = {}
        self._variables = contextvars.Context()

    # ------------------------------------------------------------------ driving

    @property
    def now(self) -> int:
        """µs: the time of the turn."""
        return self.loop.now

    def replay(self, entries: Sequence[Entry]) -> list[Command | Note]:
        """Feed a recorded journal. Returns what was asked for that it does not show yet, in order."""
        entries = _asked_again(entries)
        self._patches = {entry.name or "" for entry in entries if entry.kind == PATCHED}
        self._children = {e.key: msgspec.json.decode(e.payload)["run_id"] for e in entries if e.kind == CHILD and e.status == "started" and e.key and e.payload}
        self._remaining = sum(1 for entry in entries if entry.delivers)
        for entry in entries:
            if entry.kind in COMMAND_KINDS and entry.status != "late":
                self._verify(entry)
            if entry.delivers:
                self._remaining -= 1
                self._turn(entry)
        fresh, self._fresh = self._fresh, []
        return [
            command
            for command in fresh
            if (command.command.key not in self._abandoned if isinstance(command, Abandon) else self._is_news(command))
        ]

    def deliver(self, entry: Entry) -> list[Command | Note]:
        """Run one live turn. Returns what it asks for."""
        self._turn(entry)
        fresh, self._fresh = self._fresh, []
        return fresh

    def trace(self, key: str) -> list[Entry]:
        """What the journal says of a command that is not answered."""
        return self._traces.get(key, [])

    def next_timer(self) -> Timer | None:
        """The earliest timer of the run's own."""
        timer = self.loop.next_timer()
        return None if timer is None else Timer(timer[0], timer[1], f"timer:{timer[1]}", "sleep")

    def signals_waited(self) -> list[str]:
        """Names of signals somebody waits for."""
        return [command.name for command in self.outstanding.values() if isinstance(command, WaitSignal)]

    def drop(self) -> None:
        """Let the run leave memory: unwind without a trace."""
        for place in self.loop.unwind():
            log.warning("run %s: a coroutine refuses to be unwound and is abandoned at %s", self.run_id, place)

    def _is_news(self, command: Command | Note) -> bool:
        if not isinstance(command, Command):
            return True
        return command.key in self.outstanding and command.key not in self._traces

    # ------------------------------------------------------------------ a turn

    def _turn(self, entry: Entry) -> None:
        loop = self.loop
        loop.now = entry.at
        if self.outcome is not None:
            raise self._mismatch(entry, "nothing: the code has finished")
        loop.within(lambda: self._variables.run(self._hand_over, entry))
        loop.turn()
        assert self._main is not None
        if self._main.done():
            self._finish()
        elif not self.outstanding and loop.next_timer() is None:
            raise Stalled(f"The workflow waits for something that cannot come. {loop.places()}")

    def _hand_over(self, entry: Entry) -> None:
        kind = entry.kind
        if kind == RUN:
            self._run_entry(entry)
        elif kind == TIMER:
            if not self.loop.fire(entry.ordinal or 0):
                raise self._mismatch(entry, "no such timer")
        elif kind == SIGNAL:
            self.signals[entry.name or ""].append(entry.payload or b"null")
            self._match(entry.name or "")
        else:
            self._answer(entry)

    def _run_entry(self, entry: Entry) -> None:
        if entry.status == "started":
            if self._main is not None:
                raise self._mismatch(entry, "a run that has started")
            if entry.payload:
                self._recorded_on = msgspec.json.decode(entry.payload).get("python", PYTHON)
            self.loop.epoch = entry.at
            context = Context(self)
            try:
                main = self.definition.call(context, self._input)
            except DurableError as error:
                main = _raise(error)
            task = self.loop.create_task(main)
            assert isinstance(task, TurnTask)
            self._main = task
            return
        if self._main is None:
            raise self._mismatch(entry, "nothing: the run has not started")
        self._ending = entry.status
        self._failed[-1] = entry.seq
        self._main.cancel()

    def _answer(self, entry: Entry) -> None:
        key = entry.key or ""
        future = self._futures.pop(key, None)
        command = self.outstanding.pop(key, None)
        self._traces.pop(key, None)
        if future is None or command is None:
            raise self._mismatch(entry, "nothing by that key")
        if entry.status == "completed":
            try:
                future.set_result(future.decode(entry.payload or b"null"))
            except DurableError as error:
                future.set_exception(error)
            return
        error = _step_error(command, entry)
        self._failed[id(error)] = entry.seq
        future.set_exception(error)

    def _match(self, name: str) -> None:
        signals, waiting = self.signals[name], self._waiting[name]
        while signals and waiting:
            future = waiting.popleft()
            if future.done():
                continue
            self.outstanding.pop(future.command.key, None)
            self._futures.pop(future.command.key, None)
            try:
                future.set_result(future.decode(signals.popleft()))
            except DurableError as error:
                future.set_exception(error)

    def _finish(self) -> None:
        main = self._main
        assert main is not None
        if main.cancelled():
            self.outcome = self._let_through()
        elif (error := main.exception()) is not None:
            self.outcome = Failed(encode_error(describe(error)), self._cut(error))
        else:
            try:
                self.outcome = Completed(encode(main.result(), self.definition.output_type, what="the workflow's result"))
            except DurableError as refused:
                self.outcome = Failed(encode_error(describe(refused)))
        self.closing = True
        self.loop.tasks.pop(main.number, None)
        if self.loop.tasks or self.loop._generators:
            self.loop.within(lambda: (self.loop.cancel_living(), self.loop.close_generators())[0])
            self.loop.turn()
        for lost in self.loop.unretrieved():
            log.warning("run %s: an error nobody asked for: %r", self.run_id, lost)

    def _let_through(self) -> Outcome:
        if self._ending == "timed_out":
            data = ErrorData(message=f"The run took longer than its timeout of {self.definition.timeout} s.", code="run_timeout", type="RunTimeout")
            return Failed(encode_error(data), self._failed.get(-1))
        if self._ending is None:
            return Failed(encode_error(ErrorData(message="The workflow cancelled itself.", code="run_cancelled")))
        return Cancelled(encode_error(ErrorData(message="The run was cancelled.", code="run_cancelled")))

    def _cut(self, error: BaseException | None) -> int | None:
        while error is not None:
            if id(error) in self._failed and isinstance(error, StepFailed):
                return self._failed[id(error)]
            error = error.__cause__
        return None

    # ------------------------------------------------------------------ what ctx asks for

    def check(self) -> None:
        """Raise where ctx may not be used now."""
        if self.loop.unwinding:
            raise Unwound()
        if not self.loop.is_running():
            raise DurableError("ctx belongs to the workflow: it cannot be used in a step body, in a thread or after the run.")
        if self.closing:
            raise DurableError("The workflow has returned; ctx cannot be used any more.")

    def next_ordinal(self) -> int:
        """The next position by first call."""
        ordinal = self._ordinals
        self._ordinals += 1
        return ordinal

    def next_key(self, name: str) -> str:
        """The name, or `name:1`, `name:2` … for repeats, and never another command's key."""
        key = name
        while key in self._keys:
            self._repeats[name] += 1
            key = f"{name}:{self._repeats[name]}"
        self._keys.add(key)
        return key

    def issue(self, command: Command, decode: Callable[[bytes], Any]) -> CommandFuture:
        """A command of this turn, and the future its answer comes to."""
        future = CommandFuture(self, command, decode)
        key = command.key
        self.outstanding[key] = command
        self._issued[key] = command
        self._futures[key] = future
        self._fresh.append(command)
        if isinstance(command, WaitSignal):
            self._waiting[command.name].append(future)
            self._match(command.name)
        return future

    def withdraw(self, future: CommandFuture) -> bool:
        """A wait has ended by itself (its timeout). False: it had been answered."""
        if future.done():
            return False
        self.outstanding.pop(future.command.key, None)
        self._futures.pop(future.command.key, None)
        return True

    def abandon(self, future: CommandFuture) -> None:
        """The wait was cancelled inside the run."""
        command = future.command
        if self.outstanding.pop(command.key, None) is None:
            return
        self._futures.pop(command.key, None)
        self._traces.pop(command.key, None)
        if not isinstance(command, WaitSignal):
            self._fresh.append(Abandon(command))

    def child_id(self, ordinal: int, key: str) -> str:
        """The recorded one, or the next: `<run>.child.<ordinal>`, and the generation after a requeue."""
        recorded = self._children.get(key)
        if recorded is not None:
            return recorded
        suffix = f".{self.generation}" if self.generation else ""
        return f"{self.run_id}.child.{ordinal}{suffix}"

    def patched(self, id: str) -> bool:
        """Whether the code after this patch is to be run here."""
        if id in self._patches:
            return True
        if self._remaining > 0:
            return False
        self._patches.add(id)
        self._fresh.append(Patch(id))
        return True

    def write_log(self, level: str, message: str, fields: bytes | None) -> None:
        """A log line, unless it is stored already."""
        index = self._logs
        self._logs += 1
        if index >= self._logs_recorded:
            self._fresh.append(WriteLog(index, level, message, fields))

    # ------------------------------------------------------------------ comparing

    def _verify(self, entry: Entry) -> None:
        command = self._issued.get(entry.key or "")
        if command is None:
            raise self._mismatch(entry, "nothing by that key")
        asked = (command.kind, command.ordinal, command.name, command.fingerprint)
        if asked != (entry.kind, entry.ordinal, entry.name, entry.fingerprint):
            raise self._mismatch(entry, f"{command.kind} {command.key!r} at {command.ordinal} ({command.fingerprint})")
        if entry.status == "cancelled":
            if command.key in self.outstanding:
                raise self._mismatch(entry, f"{command.kind} {command.key!r}, and waits for it")
            self._abandoned.add(command.key)
        elif not entry.delivers and command.key in self.outstanding:
            self._traces[command.key].append(entry)

    def _mismatch(self, entry: Entry, asked: str) -> NonDeterminism:
        recorded = f"{entry.kind} {entry.key or entry.name or ''!r} {entry.status} at {entry.ordinal} ({entry.fingerprint})"
        python = "" if self._recorded_on == PYTHON else f" It was recorded on Python {self._recorded_on}, this is {PYTHON}."
        return NonDeterminism(
            f"Journal and code disagree at entry {entry.seq}: recorded {recorded}, the code asks for {asked}.{python} Keep the "
            "old path behind ctx.patched(), or register the old code under its version.",
            position=entry.seq,
            recorded=recorded,
            asked=asked,
        )


async def _raise(error: Exception) -> None:
    raise error


def _step_error(command: Command, entry: Entry) -> StepFailed:
    data = decode_error(entry.payload) if entry.payload else ErrorData(message="It failed.")
    kind: type[StepFailed] = StepFailed
    if isinstance(command, StartChild):
        kind = ChildFailed
    elif data.code == "step_timeout":
        kind = StepTimeout
    what = "child" if kind is ChildFailed else "step"
    return kind(f"{what} {command.key!r} failed: {data.message}", key=command.key, error=data, attempts=entry.attempt)


def _asked_again(entries: Sequence[Entry]) -> list[Entry]:
    """Leave out what a requeue asks again, signals excepted."""
    kept = list(entries)
    for entry in entries:
        if entry.kind == RUN and entry.status == "requeued" and entry.payload:
            start = msgspec.json.decode(entry.payload)["from"]
            kept = [e for e in kept if e.kind == SIGNAL or not start <= e.seq < entry.seq]
    return [entry for entry in kept if entry.kind != LOG]


__all__ = ["CHILD", "Machine", "Timer", "decoder"]
