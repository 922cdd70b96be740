"""Drives a Machine as an engine would, without one: journals, answers in random order, tells what was asked when."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from durable.core import payload
from durable.core.commands import Abandon, Command, Patch, RunStep, SendTask, StartChild, WaitSignal, WriteLog
from durable.core.definition import WorkflowDefinition, workflow_of
from durable.core.errors import ErrorData
from durable.core.journal import CHILD, LOG, PATCHED, REMOTE, RUN, SIGNAL, STEP, TIMER, Entry
from durable.core.replay import PYTHON, Machine
from durable.testing.programs import Program, Task, run_program

START = 1_700_000_000_000_000


class Driver:
    """One run and its journal. `asked[seq]` is what the turn of that entry asked for, as text."""

    def __init__(self, definition: Any, input: Any = None, *, run_id: str = "run-1") -> None:
        self.definition = definition if isinstance(definition, WorkflowDefinition) else workflow_of(definition)
        self.input = b"null" if input is None else payload.encode(input, what="input")
        self.run_id = run_id
        self.journal: list[Entry] = []
        self.asked: dict[int, list[str]] = {}
        self.issued: dict[int, list[Any]] = {}
        self.machine = self.fresh()

    # machines

    def fresh(self, logs: int = 0) -> Machine:
        return Machine(self.definition, run_id=self.run_id, input=self.input, logs=logs)

    def replayed(self, upto: int | None = None) -> tuple[Machine, list[Any]]:
        """A machine that has replayed the journal, or a prefix of it, and what it says is new."""
        entries = self.journal if upto is None else self.journal[:upto]
        machine = self.fresh(sum(entry.kind == LOG for entry in entries))
        return machine, machine.replay([entry for entry in entries if entry.kind != LOG])

    def go_cold(self) -> list[Any]:
        """Drop the machine and go on with a replayed one."""
        self.machine.drop()
        self.machine, news = self.replayed()
        return news

    # entries

    def append(self, kind: str, status: str, *, at: int | None = None, **fields: Any) -> Entry:
        last = self.journal[-1].at if self.journal else START
        entry = Entry(len(self.journal) + 1, max(last, at or last), kind, status, **fields)
        self.journal.append(entry)
        return entry

    def deliver(self, kind: str, status: str, **fields: Any) -> list[Any]:
        entry = self.append(kind, status, **fields)
        issued = self.machine.deliver(entry)
        self.issued[entry.seq] = issued
        self.asked[entry.seq] = [told(item) for item in issued]
        return issued

    def begin(self) -> list[Any]:
        return self.deliver(RUN, "started", payload=msgspec.json.encode({"python": PYTHON}))

    def answer(self, key: str, value: Any = None) -> list[Any]:
        data = payload.encode(value, what="result")
        return self.deliver(status="completed", payload=data, attempt=1, **self.of(self.machine.outstanding[key]))

    def fail(self, key: str, message: str = "boom", code: str = "error") -> list[Any]:
        data = payload.encode_error(ErrorData(message, code=code))
        return self.deliver(status="failed", payload=data, attempt=2, **self.of(self.machine.outstanding[key]))

    def fire(self) -> list[Any]:
        timer = self.machine.next_timer()
        assert timer is not None
        return self.deliver(TIMER, "fired", at=timer.deadline, key=timer.key, ordinal=timer.ordinal, name=timer.name)

    def signal(self, name: str, value: Any = None) -> list[Any]:
        return self.deliver(
            SIGNAL, "received", name=name, payload=payload.encode(value, what="signal"), key=f"m{len(self.journal)}"
        )

    def of(self, command: Command) -> dict[str, Any]:
        return {
            "kind": command.kind,
            "key": command.key,
            "ordinal": command.ordinal,
            "name": command.name,
            "fingerprint": command.fingerprint,
        }

    def mark(self, item: Any, *, steps: bool = True) -> None:
        """Journal what an engine writes when it takes a command up."""
        if isinstance(item, RunStep):
            if steps:
                self.append(status="started", **self.of(item))
        elif isinstance(item, SendTask):
            self.append(status="dispatched", **self.of(item))
        elif isinstance(item, StartChild):
            data = msgspec.json.encode({"run_id": item.child_id, "workflow": item.workflow, "version": item.version})
            self.append(status="started", payload=data, **self.of(item))
        elif isinstance(item, Abandon):
            self.append(status="cancelled", **self.of(item.command))
        elif isinstance(item, Patch):
            self.append(PATCHED, "marked", key=item.id, name=item.id)
        elif isinstance(item, WriteLog):
            self.append(LOG, "written", ordinal=item.index)


class ProgramDriver(Driver):
    """Plays a random program: answers, signals, timers and a cancellation in seeded order."""

    def __init__(self, program: Program, seed: int, *, cold: bool = False) -> None:
        super().__init__(run_program, program, run_id=f"run-{seed}")
        self.rng = random.Random(f"driver {seed}")
        self.cold = cold
        self.unsent = list(program["signals"])
        self.cancels = self.rng.random() < 0.15
        self.states: dict[int, tuple[Any, ...]] = {}

    def play(self) -> None:
        """To the end."""
        self.after(self.begin())
        for _ in range(5_000):
            if self.machine.outcome is not None:
                return
            if self.cold:
                news = self.go_cold()
                assert [told(item) for item in news] == self.unmarked(), "replay asks for something else"
            self.after(self.something())
        raise AssertionError("the program does not end")

    def after(self, issued: list[Any]) -> None:
        self.states[len(self.journal)] = state(self.machine)
        for item in issued:
            self.mark(item, steps=self.rng.random() < 0.5)

    def unmarked(self) -> list[str]:
        """Outstanding commands that the journal does not show."""
        marked = {entry.key for entry in self.journal if entry.kind in (STEP, REMOTE, CHILD)}
        return [told(item) for item in self.machine.outstanding.values() if item.key not in marked]

    def something(self) -> list[Any]:
        machine, rng = self.machine, self.rng
        answerable = [c for c in machine.outstanding.values() if not isinstance(c, WaitSignal)]
        choices: list[Any] = [*answerable, *answerable]
        if machine.next_timer() is not None:
            choices.append("timer")
        if self.unsent:
            choices.append("signal")
        if self.cancels and len(self.journal) > 5:
            choices.append("cancel")
        choice = rng.choice(choices)
        if choice == "timer":
            return self.fire()
        if choice == "signal":
            name, value = self.unsent.pop(0)
            return self.signal(name, value)
        if choice == "cancel":
            self.cancels = False
            return self.deliver(RUN, rng.choice(["cancelling", "timed_out"]))
        if isinstance(choice, StartChild):
            return self.fail(choice.key) if rng.random() < 0.2 else self.answer(choice.key, ["x"] * rng.randint(0, 5))
        if _failures(choice) > 1:
            return self.fail(choice.key)
        return self.answer(choice.key, rng.randint(0, 999))


def _failures(command: Any) -> int:
    if isinstance(command, RunStep):
        return command.args[0].failures if command.args and isinstance(command.args[0], Task) else 0
    return msgspec.json.decode(command.input, type=Task).failures


def told(item: Any) -> str:
    """A command or note as text: what must be the same wherever and whenever it is asked for."""
    if isinstance(item, Command):
        child = f" {item.child_id}" if isinstance(item, StartChild) else ""
        return f"{item.kind} {item.key} {item.ordinal} {item.name} {item.fingerprint}{child}"
    if isinstance(item, Abandon):
        return f"abandon {told(item.command)}"
    return repr(item)


def state(machine: Machine) -> tuple[Any, ...]:
    """All an engine sees of a machine."""
    return (
        [told(command) for command in machine.outstanding.values()],
        machine.next_timer(),
        machine.signals_waited(),
        machine.outcome,
        machine.now,
    )
