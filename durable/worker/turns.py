"""Runs one turn of a workflow that this worker hosts: replays its history, runs the local steps it reaches, and answers with
what it asks for. Knows neither engine nor store, and keeps nothing between turns.

The code runs on the same machine as in an engine, so `asyncio.gather`, timeouts and the rest of ctx work alike. What came of
an operation is delivered in the order the engine says (`order`). An engine of another make says none: then everything is
delivered in order of call, and what would be a race is refused.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Raw

from durable.core.clock import EPOCH, Clock
from durable.core.commands import (
    Abandon,
    Command,
    Completed,
    Failed,
    Note,
    Patch,
    RunStep,
    SendEvent,
    SendTask,
    StartChild,
    WaitEvent,
    WaitSignal,
    WriteLog,
)
from durable.core.ctx import Context
from durable.core.definition import WorkflowDefinition
from durable.core.errors import (
    DefinitionError,
    DeterminismError,
    ErrorData,
    NonDeterminism,
    NotRegistered,
)
from durable.core.journal import CHILD, REMOTE, RUN, SIGNAL, STEP, TIMER, Entry
from durable.core.loop import Alarm
from durable.core.payload import decode_error, describe, encode_error
from durable.core.registry import Registry
from durable.core.replay import Asked
from durable.core.step import StepObserver, StepScope
from durable.protocol.messages import (
    Answer,
    AwaitSignal,
    Call,
    HistoryItem,
    RecordStep,
    Sleep,
    StartChildRun,
    StepEvent,
    Task,
    TurnCommand,
    WorkflowDecision,
    WorkflowTask,
    routing_token,
    step_id,
)
from durable.transports.answers import failed, no_handler
from durable.worker.bodies import Bodies
from durable.worker.hosting import HostedContext, HostedMachine, drop_soon, plainly, run_attempt

log = logging.getLogger("durable.worker")

R = TypeVar("R")

_KINDS: dict[type, str] = {RunStep: "step", SendTask: "call", StartChild: "child", WaitSignal: "signal"}
_ENTRIES = {"step": STEP, "call": REMOTE, "child": CHILD}
_SLEEPS = frozenset({"_ring", "_set_result_unless_cancelled"})
"""What a timer calls that is a sleep and nothing else."""


def turn_groups(registry: Registry, partition: str | None = None) -> list[str]:
    """Where turns of the registry's own workflows wait: each under its name; for a worker of a `partition`, there only."""
    names = dict.fromkeys(flow.name for flow in registry.workflows() if flow.hosting is None)
    return [routing_token(name, partition) for name in names]


class TurnHandler:
    """A transport's task handler over a registry's workflows."""

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        on_step: StepObserver | None = None,
        *,
        threads: int = 32,
        partition: str | None = None,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._on_step = on_step
        self._partition = partition
        self._bodies = Bodies(threads)

    def close(self) -> None:
        """Let the threads of plain bodies go."""
        self._bodies.close()

    async def __call__(self, task: Task) -> Answer:
        """Never raises but CancelledError: whatever goes wrong is a decision."""
        if not isinstance(task, WorkflowTask):
            return no_handler(task)
        try:
            definition = self._registry.workflow(task.workflow, task.workflow_version)
        except NotRegistered as error:
            return failed(task, describe(error))
        if definition.hosting is not None:
            return no_handler(task)  # an engine's own entry for it: the code is elsewhere
        turn = _Turn(task, definition, self._clock, self._bodies, self._on_step, self._partition)
        try:
            return await turn.take()
        except (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            if not isinstance(error, DeterminismError):
                log.exception("turn %s of workflow %s broke", task.task_id, task.workflow)
            return turn.broken(error)
        finally:
            await turn.close()


class _TurnContext(HostedContext):
    """ctx of a workflow in a worker. What it cannot derive from the history it records."""

    _machine: _TurnMachine

    def side_effect(self, fn: Callable[[], Any], *, name: str | None = None, **options: Any) -> Any:
        return super().side_effect(fn, name=name or f"side_effect#{self._machine.ordinals.next}", **options)


class _TurnMachine(HostedMachine):
    """One turn's replay."""

    def __init__(self, task: WorkflowTask, definition: WorkflowDefinition, clock: Clock) -> None:
        super().__init__(definition, run_id=task.run_id, input=bytes(task.input), logs=task.logs or 0)
        self.ordered = task.at is not None and all(item.order is not None for item in task.history)
        """The engine says in which order things happened."""
        self.timed = self.ordered and task.started_at is not None
        """And when."""
        self.items = {item.seq: item for item in task.history}
        self.readings: list[RecordStep] = []
        """What the clock has said in this turn."""
        self._clock = clock
        self._patches = dict.fromkeys(task.patches or (), True)

    def context(self) -> Context:
        return _TurnContext(self)

    def record_now(self) -> datetime:
        """The time, recorded: this engine does not tell it."""
        seq = next(self.ordinals)
        name = f"now#{seq}"
        item = self.items.pop(seq, None)
        if item is None:
            now = self._clock.now() // 1_000
            self.readings.append(
                RecordStep(seq=seq, name=name, output=Raw(b"%d" % now), started_at=now, finished_at=now)
            )
            return EPOCH + timedelta(milliseconds=now)
        if item.kind != "step" or item.name not in (None, name) or not isinstance(item.output, Raw):
            raise _mismatch(item, f"step {name!r}")
        return EPOCH + timedelta(milliseconds=msgspec.json.decode(item.output, type=int))

    def wait_event(self, command: WaitEvent, *arguments: Any) -> Asked:
        raise _not_here("wait_for_event")

    def send_event(self, command: SendEvent, *arguments: Any) -> Asked:
        raise _not_here("send_event")


class _Turn:
    """One task."""

    def __init__(
        self,
        task: WorkflowTask,
        definition: WorkflowDefinition,
        clock: Clock,
        bodies: Bodies,
        on_step: StepObserver | None,
        partition: str | None,
    ) -> None:
        self._task = task
        self._clock = clock
        self._bodies = bodies
        self._on_step = on_step
        self._partition = partition
        self._machine = _TurnMachine(task, definition, clock)
        self._asked: dict[int, Command] = {}
        """Everything the code has asked for, by ordinal."""
        self._new_from = 0
        """Ordinals from here on have been given out in this turn: the engine does not know of them yet."""
        self._at = 0
        self._began = clock.monotonic()
        self._entries = itertools.count(1)
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._done: dict[int, RecordStep] = {}
        """Local steps that have ended in this turn, by seq, in order of ending."""
        self._finished: asyncio.Queue[RecordStep] = asyncio.Queue()
        self._patches: list[str] = []
        self._logs: list[StepEvent] = []

    def _now(self) -> int:
        """Epoch ms, by the engine's clock where it tells it: another clock, minutes off, would have timers ring early."""
        if not self._machine.timed:
            return self._clock.now() // 1_000
        return (self._task.at or 0) + int((self._clock.monotonic() - self._began) * 1_000)

    async def take(self) -> WorkflowDecision:
        """The decision. Raises what breaks the rules of replay."""
        await plainly(self._replay)
        while self._machine.outcome is None:
            self._launch()
            if not self._under_way:
                break
            step = await self._finished.get()
            if self._under_way.pop(self._asked[step.seq].key, None) is not None:
                self._done[step.seq] = step
                await plainly(self._go_on, step)
        return self._decision()

    def broken(self, error: BaseException) -> WorkflowDecision:
        """What has been done is told, and why there is no more."""
        data = describe(error)
        if isinstance(error, DeterminismError):
            data = msgspec.structs.replace(data, retryable=False)
        return self._answer("failed", self._records(), error=data)

    async def close(self) -> None:
        """Give up what is still under way, and unwind."""
        for body in self._under_way.values():
            body.cancel()
        drop_soon(self._machine)

    # ------------------------------------------------------------------ history

    def _replay(self) -> None:
        machine, task = self._machine, self._task
        started = (task.started_at or 0) * 1_000 if machine.timed else 0
        seen = task.seen
        machine.behind(machine.timed and seen is not None)
        self._deliver(Entry(next(self._entries), started, RUN, "started"), started)
        if not machine.ordered:
            self._in_order_of_call()
            return
        # What is behind the last item an earlier turn knew is new ground, and so is all that it asks for.
        known = -1 if not machine.timed or seen is None else seen
        if known == 0:
            self._to_new_ground()
        for item in sorted(task.history, key=lambda item: item.order or 0):
            self._hand_over(item)
            if item.order == known:
                self._to_new_ground()
        missing = next((item for item in task.history if item.seq >= machine.ordinals.next), None)
        if missing is not None:
            raise _mismatch(missing, "nothing yet")

    def _to_new_ground(self) -> None:
        self._machine.behind(False)
        self._new_from = self._machine.ordinals.next

    def _hand_over(self, item: HistoryItem) -> None:
        """Deliver what came of an operation, unless the code has given it up meanwhile."""
        machine, seq = self._machine, item.seq
        if machine.outcome is not None:
            return
        at = item.at * 1_000 if machine.timed and item.at is not None else 0
        command = self._asked.get(seq)
        if command is None:
            if (alarm := machine.loop.alarms.get(seq)) is not None:
                if item.kind != "timer":
                    raise _mismatch(item, "a timer")
                entry = Entry(next(self._entries), 0, TIMER, "fired", f"timer:{seq}", seq, alarm.name)
                self._deliver(entry, at)
            elif seq >= machine.ordinals.next:
                raise _mismatch(item, "nothing there")
            elif item.kind == "signal" and item.name is not None:
                self._signal(item, item.name, at)
            # Else the code has asked for it and given it up at once: it never was.
            return
        kind = _KINDS[type(command)]
        if kind != item.kind or item.name not in (None, command.name):
            raise _mismatch(item, f"{kind} {command.name!r}")
        if kind == "signal":
            # By name: a wait that was given up leaves its signal to the next.
            self._signal(item, command.name, at)
        elif machine.outstanding.get(command.key) is command:
            error = item.error is not None
            body = encode_error(item.error) if item.error is not None else _bytes(item.output)
            status = "failed" if error else "completed"
            self._deliver(
                Entry(next(self._entries), 0, _ENTRIES[kind], status, command.key, command.ordinal, payload=body), at
            )

    def _signal(self, item: HistoryItem, name: str, at: int) -> None:
        self._deliver(Entry(next(self._entries), 0, SIGNAL, "received", name=name, payload=_bytes(item.output)), at)

    def _in_order_of_call(self) -> None:
        """Deliver what can be delivered, always the operation that was called first: nothing that is called earlier is
        unanswered then, so that every replay goes the same way, whatever came first."""
        machine = self._machine
        hints = {one.seq: one for one in self._task.pending_signals or ()}
        while machine.outcome is None:
            first = min((command.ordinal for command in machine.outstanding.values()), default=None)
            alarm = min(machine.loop.alarms, default=None)
            first = alarm if first is None or (alarm is not None and alarm < first) else first
            if first is None:
                break
            command = self._asked.get(first)
            item = machine.items.pop(first, None)
            if item is None and first in self._done:
                self._go_on_with(self._done[first])
                continue
            if item is None and isinstance(command, WaitSignal) and first in hints:
                hint = hints[first]
                if hint.signal == command.name:
                    item = HistoryItem(seq=first, kind="signal", name=hint.signal, output=hint.payload)
            if item is None:
                break
            self._hand_over(item)
        missing = next((item for seq, item in sorted(machine.items.items()) if seq >= machine.ordinals.next), None)
        if missing is not None and not machine.outstanding and not machine.loop.alarms:
            raise _mismatch(missing, "nothing there")

    def _deliver(self, entry: Entry, at: int) -> None:
        """A turn of the code. Time never goes back, whoever's clock it comes from."""
        self._at = max(self._at, at)
        for item in self._machine.deliver(msgspec.structs.replace(entry, at=self._at)):
            self._heed(item)
        self._machine.check_races()

    def _heed(self, item: Command | Note) -> None:
        if isinstance(item, Command):
            self._asked[item.ordinal] = item
        elif isinstance(item, Patch):
            self._patches.append(item.id)
        elif isinstance(item, WriteLog):
            fields = None if item.fields is None else Raw(item.fields)
            at = self._now()
            self._logs.append(StepEvent(at=at, level=item.level, message=item.message, data=fields))  # type: ignore[arg-type]
        elif isinstance(item, Abandon):
            body = self._under_way.pop(item.command.key, None)
            if body is not None:
                body.cancel()

    # ------------------------------------------------------------------ steps that run here

    def _launch(self) -> None:
        """Begin the bodies the code has reached."""
        for command in list(self._machine.outstanding.values()):
            if (
                isinstance(command, RunStep)
                and command.key not in self._under_way
                and command.ordinal not in self._done
                and (self._machine.ordered or command.ordinal not in self._machine.items)
            ):
                self._under_way[command.key] = asyncio.get_running_loop().create_task(
                    self._run(command), context=command.variables.copy()
                )

    async def _run(self, command: RunStep) -> None:
        """Every attempt of one step, here and now."""
        began = self._now()
        events: list[StepEvent] = []
        policy = command.options.retry
        for attempt in itertools.count(1):
            came = await run_attempt(
                command, self._scope(command, attempt, events), self._bodies, self._on_step, self._given_up(command)
            )
            if isinstance(came, bytes):
                self._tell(command, began, events, Raw(came), None)
                return
            error = came
            if policy.gives_up(attempt, retryable=error.retryable, names=(error.code, error.type)):
                self._tell(command, began, events, UNSET, error)
                return
            await asyncio.sleep(policy.delay(attempt, 0.0, retry_after=error.retry_after))

    def _given_up(self, command: RunStep) -> Callable[[], bool]:
        """Whether the workflow waits for it no more."""
        task = asyncio.current_task()
        return lambda: self._under_way.get(command.key) is not task

    def _scope(self, command: RunStep, attempt: int, events: list[StepEvent]) -> StepScope:
        run_id = self._task.run_id

        def write(level: str, message: str, fields: dict[str, Any], progress: bool) -> None:
            at = self._now()
            events.append(StepEvent(at=at, level=level, message=message, data=fields or None))  # type: ignore[arg-type]

        return StepScope(run_id, step_id(run_id, command.ordinal), command.key, command.name, attempt, write)

    def _tell(
        self, command: RunStep, began: int, events: list[StepEvent], output: Any, error: ErrorData | None
    ) -> None:
        self._finished.put_nowait(
            RecordStep(
                seq=command.ordinal,
                name=command.name,
                output=output,
                error=None if error is None else decode_error(encode_error(error)),
                started_at=began,
                finished_at=self._now(),
                events=events or None,
            )
        )

    def _go_on(self, step: RecordStep) -> None:
        if self._machine.ordered:
            self._go_on_with(step)
        else:
            self._in_order_of_call()

    def _go_on_with(self, step: RecordStep) -> None:
        command = self._asked[step.seq]
        if self._machine.outstanding.get(command.key) is not command:
            return
        at = (step.finished_at or 0) * 1_000 if self._machine.timed else 0
        body = encode_error(step.error) if step.error is not None else _bytes(step.output)
        status = "failed" if step.error is not None else "completed"
        self._deliver(Entry(next(self._entries), 0, STEP, status, command.key, command.ordinal, payload=body), at)

    # ------------------------------------------------------------------ the decision

    def _decision(self) -> WorkflowDecision:
        outcome = self._machine.outcome
        commands = self._records() + self._commands()
        if outcome is None:
            return self._answer("continue", commands)
        if isinstance(outcome, Completed):
            return self._answer("completed", commands, output=Raw(outcome.output))
        assert isinstance(outcome, Failed)
        return self._answer("failed", commands, error=decode_error(outcome.error))

    def _answer(self, status: Any, commands: list[TurnCommand], **fields: Any) -> WorkflowDecision:
        return WorkflowDecision(
            task_id=self._task.task_id,
            run_id=self._task.run_id,
            status=status,
            commands=commands,
            patches=self._patches or None,
            logs=self._logs or None,
            **fields,
        )

    def _records(self) -> list[TurnCommand]:
        """In the order in which the code heard of them: that is the order a replay will have."""
        return [*self._machine.readings, *self._done.values()]

    def _commands(self) -> list[TurnCommand]:
        """What waits for something outside, and what the engine does not know of."""
        machine, found = self._machine, list[TurnCommand]()
        for command in machine.outstanding.values():
            if self._is_known(command.ordinal):
                continue
            if isinstance(command, SendTask):
                group = command.options.group or self._partition or ""
                found.append(Call(seq=command.ordinal, name=command.name, group=group, input=Raw(command.input)))
            elif isinstance(command, WaitSignal):
                found.append(AwaitSignal(seq=command.ordinal, signal=command.name))
            elif isinstance(command, StartChild):
                found.append(StartChildRun(seq=command.ordinal, workflow=command.workflow, input=Raw(command.input)))
        for ordinal, alarm in machine.loop.alarms.items():
            if not self._is_known(ordinal):
                found.append(Sleep(seq=ordinal, ms=self._left(ordinal, alarm)))
        return sorted(found, key=lambda command: command.seq)

    def _is_known(self, ordinal: int) -> bool:
        """Whether the engine has been asked for it: by an earlier turn, or so long ago that there is an answer, which waits."""
        return ordinal < self._new_from or (not self._machine.ordered and ordinal in self._machine.items)

    def _left(self, ordinal: int, alarm: Alarm) -> int:
        """Milliseconds, rounded up. What sleeps for a while has slept since it was asked for; what sleeps until a moment
        goes by the world's clock."""
        moment = self._machine.moments.get(ordinal)
        left = alarm.deadline - self._at if moment is None else moment - self._clock.now()
        return max(0, -(-left // 1_000))


def _bytes(output: Any) -> bytes:
    return bytes(output) if isinstance(output, Raw) else b"null"


def _mismatch(item: HistoryItem, asked: str) -> NonDeterminism:
    recorded = f"{item.kind} {item.name or ''}".strip()
    return NonDeterminism(
        f"History and code disagree at seq {item.seq}. Recorded: {recorded}. The code asks for: {asked}. Put the change behind "
        "`if ctx.patched('...')`, or register the old code under the run's version and the new code under another.",
        position=item.seq,
        recorded=recorded,
        asked=asked,
    )


def _not_here(method: str) -> DefinitionError:
    return DefinitionError(
        f"ctx.{method} is not offered to workflows that a worker hosts over a queue: their wire has no word for it. Let the "
        "engine's own code run this workflow, or use signals."
    )
