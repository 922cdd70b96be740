"""A workflow whose code runs in a worker: the engine's side of it, as workflow code of ours.

`Host` is a driver that runs on the same machine as any workflow. It sends the worker a turn, takes its decision apart into
ordinary commands, waits until something has come of one, and sends the next. So journal, replay, timers, children, retries and
cancellation are what they are for every run; nothing here does I/O or knows a clock.

The worker counts its operations itself, and its numbers are their ordinals here: a call's step id and a child's run id
follow. Turns have ordinals of their own, from `TURNS` on. What came while a turn was under way is put behind what that turn
recorded: the worker had not heard of it yet, and in a replay it must not hear of it sooner.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Awaitable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, Raw, Struct

from durable.core import payload
from durable.core.commands import Cancelled, Completed, Failed, Record, SendTask, StartChild, TakeTurn, WaitSignal
from durable.core.definition import WorkflowDefinition, check_name, workflow, workflow_of
from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError, ErrorData, StepFailed
from durable.core.options import ChildOptions, RemoteOptions
from durable.core.replay import Ended
from durable.core.retention import Retention
from durable.core.retry import RetryPolicy
from durable.protocol.messages import (
    AwaitSignal,
    Call,
    HistoryItem,
    RecordStep,
    Sleep,
    StartChildRun,
    StepEvent,
    TurnCommand,
    WorkflowDecision,
)

if TYPE_CHECKING:
    from durable.core.ctx import Context
    from durable.core.loop import Promise

TURNS = 1_000_000_000
"""The first turn's ordinal. A worker's operations are counted below it."""
MAX_COMMANDS = 10_000
"""Commands one decision may have."""
LONGEST_SLEEP = 100 * 365 * 86_400_000
"""Milliseconds."""
PATIENT = RetryPolicy(max_attempts=1_000_000, initial_delay=1.0, max_delay=60.0)
"""How turns are tried again: for as long as it takes. A worker that is away for an afternoon fails nobody's run."""

_KINDS: dict[type, str] = {
    Call: "call",
    RecordStep: "step",
    Sleep: "timer",
    AwaitSignal: "signal",
    StartChildRun: "child",
}
_decode = msgspec.json.Decoder(WorkflowDecision).decode
_encode = msgspec.json.Encoder().encode


class Hosting(Struct, frozen=True):
    """How a hosted workflow's turns and steps are sent."""

    turns: RemoteOptions
    steps: RemoteOptions


def remote_workflow(
    name: str,
    version: str = "1",
    *,
    group: str | None = None,
    transport: str | None = None,
    turn_timeout: Duration = "30s",
    retries: int | RetryPolicy | None = None,
    step_retries: int | RetryPolicy | None = None,
    step_timeout: Duration | None = None,
    timeout: Duration | None = None,
    tags: Iterable[str] = (),
    category: str | None = None,
    priority: int = 0,
    dead_letter_workflow: Any = None,
    retention: Retention | Duration | None = None,
    **flow: Any,
) -> WorkflowDefinition:
    """A workflow whose code lives in a worker, in whatever language: register what this returns like a workflow of your own.

    `group`: the worker's partition. `transport`: the pool's member to try first. `turn_timeout`: how long a worker may be
    silent over a turn before it is sent again; heartbeats extend it. `retries`: how often, without end unless you say;
    `step_retries` and `step_timeout` are for the steps it calls. The rest, `flow` too (`on`, `cron`, `concurrency` …), is as for
    `@workflow`.
    """
    hosting = Hosting(
        RemoteOptions(
            retry=_policy(retries, "retries") or PATIENT,
            heartbeat_timeout=seconds(turn_timeout),
            transport=transport,
            group=group,
            priority=priority or None,
        ),
        RemoteOptions(
            retry=_policy(step_retries, "step_retries") or RetryPolicy(),
            timeout=None if step_timeout is None else seconds(step_timeout),
        ),
    )
    if not hosting.turns.heartbeat_timeout:
        raise DefinitionError(
            f"turn_timeout of workflow {name} is zero: no worker can answer in no time. Give it seconds."
        )

    async def drive(ctx: Any, input: Any = None) -> Any:
        return await Host(ctx, hosting).run()

    decorate = workflow(
        name,
        version,
        timeout=timeout,
        tags=tags,
        category=category,
        priority=priority,
        dead_letter_workflow=dead_letter_workflow,
        retention=retention,
        **flow,
    )
    return replace(workflow_of(decorate(drive)), hosting=hosting)


def stripped(decision: WorkflowDecision) -> bytes:
    """What the journal keeps of a decision: what recorded steps came to is in their own entries."""
    commands = [
        msgspec.structs.replace(command, output=UNSET, error=None, events=None)
        if isinstance(command, RecordStep)
        else command
        for command in decision.commands
    ]
    return _encode(msgspec.structs.replace(decision, commands=commands))


class Host:
    """One hosted run: what its worker has asked for, and what has come of it."""

    def __init__(self, ctx: Context, hosting: Hosting) -> None:
        self._machine = ctx._machine
        self._loop = self._machine.loop
        self._hosting = hosting
        self._asked: dict[int, tuple[str, str]] = {}
        """Kind and name of every operation, by seq."""
        self._open: dict[int, Promise] = {}
        """Operations nothing has come of yet."""
        self._history: list[HistoryItem] = []
        """What the worker knows, in the order in which it learned it."""
        self._arrived: list[HistoryItem] = []
        """What it is to be told next."""
        self._failed: dict[int, int] = {}
        """Where in the journal the failure of an operation came from, by seq: a requeue asks again from there."""
        self._patches: list[str] = []
        self._turns = 0
        self._started_at = self._machine.now
        self._news: Promise | None = None

    async def run(self) -> Any:
        """To the end of the run."""
        while True:
            decision = await self._turn()
            at = self._seq()
            problem = self._problem(decision)
            if problem is not None:
                raise Ended(Failed(payload.encode_error(problem), at))
            await self._apply(decision, at)
            if decision.status != "continue":
                await self._end(decision, at)
            while not self._arrived:
                if not self._open:
                    stalled = ErrorData(
                        message="The worker's decision was to go on, and nothing is outstanding that could wake the run: it "
                        "gave no command that waits. A workflow that has finished answers completed.",
                        code="stalled",
                        type="Stalled",
                        retryable=False,
                    )
                    raise Ended(Failed(payload.encode_error(stalled), at))
                self._news = self._loop.create_future()
                await self._news

    # ------------------------------------------------------------------ turns

    def _turn(self) -> Awaitable[WorkflowDecision]:
        seen = len(self._history)
        for item in self._arrived:
            self._tell(item)
        self._arrived.clear()
        command = TakeTurn(
            TURNS + self._turns,
            self._machine.key("turn"),
            "turn",
            "",
            b"null",
            self._hosting.turns,
            WorkflowDecision,
            self._turns,
            self._history,
            len(self._history),
            seen if self._turns else None,
            self._started_at,
            self._machine.lines,
            tuple(self._patches),
        )
        self._turns += 1
        return self._machine.ask(command, _decode)

    def _tell(self, item: HistoryItem) -> None:
        self._history.append(msgspec.structs.replace(item, order=len(self._history) + 1))

    def _problem(self, decision: WorkflowDecision) -> ErrorData | None:
        """Why a decision makes no sense. Nothing of it is applied then."""
        if len(decision.commands) > MAX_COMMANDS:
            return _bad(f"it has {len(decision.commands):,} commands, and {MAX_COMMANDS:,} is the most")
        seqs: set[int] = set()
        for command in decision.commands:
            kind, name = _KINDS[type(command)], _name_of(command)
            if not 0 <= command.seq < TURNS:
                return _bad(f"seq {command.seq} is no position of an operation")
            if command.seq in seqs:
                return _bad(f"seq {command.seq} is there twice")
            seqs.add(command.seq)
            known = self._asked.get(command.seq)
            if known is not None and known != (kind, name):
                message = (
                    f"The worker's code has changed under this run: operation {command.seq} was {_shown(*known)}, and now it "
                    f"asks for {_shown(kind, name)}. Deploy the code the run began with, and requeue it; register "
                    "the new code under another version."
                )
                return ErrorData(message=message, code="non_determinism", type="NonDeterminism", retryable=False)
            if isinstance(command, Sleep):
                if not 0 <= command.ms <= LONGEST_SLEEP:
                    return _bad(f"a sleep of {command.ms} ms is none, or too long")
                continue
            try:
                check_name(name, f"name of operation {command.seq}")
            except DefinitionError as error:
                return _bad(str(error))
        return None

    async def _apply(self, decision: WorkflowDecision, at: int) -> None:
        """Ask for what is new. What was asked for before is asked for once."""
        for patch in decision.patches or ():
            if patch not in self._patches:
                self._patches.append(patch)
        for line in decision.logs or ():
            fields = None if line.data is None else _encode(line.data)
            self._machine.write_log(line.level, payload.clean(line.message), fields)
        new = [command for command in decision.commands if command.seq not in self._asked]
        for command in new:
            self._asked[command.seq] = _KINDS[type(command)], _name_of(command)
        ended = decision.status != "continue"
        records = [(command, self._record(command)) for command in new if isinstance(command, RecordStep)]
        for command, answer in records:
            await self._take_down(command, answer, at)
        for command in new:
            if not isinstance(command, RecordStep) and not (ended and isinstance(command, Sleep | AwaitSignal)):
                self._ask(command)

    def _ask(self, command: TurnCommand) -> None:
        machine = self._machine
        seq, key = command.seq, ""
        promise: Promise | None = None
        kind, name = self._asked[seq]
        if not isinstance(command, Sleep):
            key = machine.key(f"signal:{name}" if isinstance(command, AwaitSignal) else name)
        if isinstance(command, Call):
            data = bytes(command.input)
            options = msgspec.structs.replace(self._hosting.steps, group=command.group or None)
            promise = machine.ask(SendTask(seq, key, name, payload.fingerprint(data), data, options, Any), bytes)
        elif isinstance(command, StartChildRun):
            data = bytes(command.input)
            child_id = machine.child_id(seq, key)
            child = StartChild(
                seq, key, name, payload.fingerprint(data), name, None, data, child_id, ChildOptions(), Any
            )
            promise = machine.ask(child, bytes)
        elif isinstance(command, AwaitSignal):
            promise = machine.wait_signal(WaitSignal(seq, key, name, ""), bytes, None, _never)
        elif isinstance(command, Sleep):
            self._loop.ordinals = itertools.count(seq)
            promise = self._loop.sleep_until(self._loop.now + command.ms * 1_000)
        assert promise is not None
        self._open[seq] = promise
        promise.add_done_callback(partial(self._settled, seq, kind, name))

    def _settled(self, seq: int, kind: str, name: str, answer: Promise) -> None:
        """Something has come of an operation."""
        if self._open.pop(seq, None) is None or answer.cancelled():
            return
        entry = self._machine.entry
        assert entry is not None
        self._arrived.append(self._item(seq, kind, name, answer, entry.at // 1_000, entry.seq))
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _item(self, seq: int, kind: str, name: str, answer: Any, at: int, origin: int) -> HistoryItem:
        error = answer.exception()
        if error is None:
            value = answer.result()
            output = UNSET if value is None else Raw(value)
            return HistoryItem(seq=seq, kind=kind, name=name, output=output, at=at)  # type: ignore[arg-type]
        self._failed[seq] = origin
        data = error.error if isinstance(error, StepFailed) else None
        return HistoryItem(seq=seq, kind=kind, name=name, error=data or payload.describe(error), at=at)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ steps the worker has run

    def _record(self, command: RecordStep) -> Promise:
        key = self._machine.key(command.name)
        failed = command.error is not None
        body = payload.encode_error(command.error) if command.error is not None else None
        if not failed and isinstance(command.output, Raw):
            body = bytes(command.output)
        record = Record(
            command.seq,
            key,
            command.name,
            "",
            body,
            failed,
            [log_line(event) for event in command.events or ()],
            _micro(command.started_at),
            _micro(command.finished_at),
        )
        return self._machine.ask(record, bytes)

    async def _take_down(self, command: RecordStep, answer: Promise, origin: int) -> None:
        with contextlib.suppress(StepFailed):
            await answer
        at = command.finished_at if command.finished_at is not None else self._loop.now // 1_000
        self._tell(self._item(command.seq, "step", command.name, answer, at, origin))

    # ------------------------------------------------------------------ the end

    async def _end(self, decision: WorkflowDecision, at: int) -> None:
        """Raises the outcome. Calls that came with it are made first: they are steps like any other; what comes of them is
        nobody's business any more, nor is what was asked for before and is still open."""
        last = {command.seq for command in decision.commands if isinstance(command, Call)}
        for seq, promise in list(self._open.items()):
            kind = self._asked[seq][0]
            if seq not in last and kind != "child":
                promise.cancel()
        while any(seq in self._open for seq in last):
            self._news = self._loop.create_future()
            await self._news
        if decision.status == "completed":
            raise Ended(Completed(bytes(decision.output) if isinstance(decision.output, Raw) else b"null"))
        if decision.status == "cancelled":
            error = decision.error or ErrorData(message="The run was cancelled.", code="run_cancelled")
            raise Ended(Cancelled(payload.encode_error(error)))
        error = decision.error or ErrorData(message="The workflow failed, and its worker did not say why.")
        raise Ended(Failed(payload.encode_error(error), self._cause(error, at)))

    def _cause(self, error: ErrorData, at: int) -> int:
        """From where a requeue asks again: the operation whose error came out; else the turn."""
        for item in self._history:
            if item.error is not None and (item.error.message, item.error.code) == (error.message, error.code):
                return self._failed[item.seq]
        return at

    def _seq(self) -> int:
        entry = self._machine.entry
        assert entry is not None
        return entry.seq


def log_line(event: StepEvent) -> bytes:
    """An event of a worker's as the payload of a log entry: with which part of the step it tells of, where it says so."""
    fields = Raw(b"{}") if event.data is None else Raw(_encode(event.data))
    said = {"level": event.level, "message": payload.clean(event.message), "fields": fields}
    about = {
        "id": event.sub_id,
        "name": event.name,
        "group": event.group,
        "status": event.status,
        "phase": event.phase,
        "process": event.process,
    }
    part = {name: payload.clean(value) for name, value in about.items() if value is not None}
    return _encode(said | {"part": part} if part else said)


def _name_of(command: TurnCommand) -> str:
    if isinstance(command, AwaitSignal):
        return command.signal
    if isinstance(command, StartChildRun):
        return command.workflow
    return f"sleep:{command.seq}" if isinstance(command, Sleep) else command.name


def _shown(kind: str, name: str) -> str:
    return f"{kind} {name!r}"


def _bad(why: str) -> ErrorData:
    message = (
        f"The worker's decision makes no sense: {why}. Nothing of it was applied. Mend the worker, and requeue the run."
    )
    return ErrorData(message=message, code="bad_decision", type="BadDecision", retryable=False)


def _micro(ms: int | None) -> int | None:
    return None if ms is None else ms * 1_000


def _never(_promise: Any) -> None:
    """A worker's wait for a signal has no end of its own."""


def _policy(retries: int | RetryPolicy | None, what: str) -> RetryPolicy | None:
    if retries is None or isinstance(retries, RetryPolicy):
        return retries
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise DefinitionError(f"{what} is a number from 0 or a RetryPolicy, not {retries!r}.")
    return RetryPolicy(max_attempts=retries + 1)
