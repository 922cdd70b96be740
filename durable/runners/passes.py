"""One pass of a run in a runner: replays what the engine remembers, runs the steps it comes to, and says what it has reached.

Knows neither engine nor wire, and keeps nothing between passes: (workflow, invoke) → result. The code runs on the same machine
as in an engine. An operation is found by the hash of its key; one that waits for something outside is reported in every pass
until it is settled, since what a pass no longer reports is given up.

A pass ends when every step it has reached has ended, and goes on from there in the next one: no step begins before what
came before it is durable. What came is delivered in the order the engine says (`order`). An engine of another make says none:
then everything is delivered in order of call, and what would be a race is refused.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct

from durable.core import payload
from durable.core.clock import EPOCH, Clock
from durable.core.commands import (
    Cancelled,
    Command,
    Completed,
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
from durable.core.definition import WorkflowDefinition, workflow, workflow_name, workflow_of
from durable.core.errors import DefinitionError, DeterminismError, ErrorData, NonDeterminism, NotRegistered
from durable.core.event import fact_of, input_of, is_event
from durable.core.journal import CHILD, EMIT, EVENT, REMOTE, RUN, SIGNAL, STEP, TIMER, Entry
from durable.core.loop import Alarm
from durable.core.match import as_expression, parts_of
from durable.core.payload import decode_error, describe, encode_error
from durable.core.registry import Registry
from durable.core.replay import Asked
from durable.core.retry import RetryPolicy
from durable.core.step import StepObserver, StepScope
from durable.protocol import lenient, runners
from durable.protocol.messages import step_id
from durable.protocol.runners import (
    AnyOpcode,
    Emit,
    Invoke,
    InvokeBody,
    InvokeResult,
    Memo,
    RetryRules,
    RunnerLog,
    RunWorkflow,
    SleepFor,
    SleepUntil,
    StepRun,
    WaitForEvent,
    WaitForSignal,
    step_hash,
)
from durable.worker.bodies import Bodies
from durable.worker.hosting import HostedContext, HostedMachine, drop_soon, plainly, run_attempt

log = logging.getLogger("durable.runner")

_ENTRIES: dict[type, str] = {RunStep: STEP, SendTask: REMOTE, StartChild: CHILD, SendEvent: EMIT}
LINES_MAX = 1_000
"""Log lines a pass may tell; more are left out."""
INPUT_MAX = 16 << 10
"""Bytes of a step's arguments that are told beside its result, for people; larger ones are left out."""
_LEVELS = {"warning": "warn", "critical": "error"}


class Failure(Struct, frozen=True):
    """What a workflow's `on_failure` is called with, when a run of it has failed for good."""

    error: ErrorData
    input: Any
    """The run's, untyped."""


class PassHandler:
    """Answers invokes with the workflows of a registry."""

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        on_step: StepObserver | None = None,
        *,
        on_failure: Mapping[Any, Callable[..., Any]] | None = None,
        threads: int = 32,
    ) -> None:
        """`on_failure`: by workflow, or its name, an async function `(ctx, failure)` that may use steps like any workflow.

        Raises DefinitionError."""
        self.registry = registry
        self.on_failure = {_name(flow): _failing(flow, fn) for flow, fn in (on_failure or {}).items()}
        """The workflows that clean up, by the name of the workflow that failed."""
        self._clock = clock
        self._on_step = on_step
        self._bodies = Bodies(threads)

    def close(self) -> None:
        """Let the threads of plain bodies go."""
        self._bodies.close()

    async def __call__(self, invoke: Invoke) -> InvokeResult:
        """Never raises but CancelledError: whatever goes wrong is a result."""
        try:
            definition = self._definition(invoke)
        except NotRegistered as error:
            return broken(error)  # to be tried again: another runner may have it
        one = _Pass(invoke, definition, self._clock, self._bodies, self._on_step)
        try:
            return await one.take()
        except (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            if not isinstance(error, DeterminismError):
                log.exception("a pass of run %s of workflow %s broke", invoke.ctx.run_id, invoke.ctx.workflow)
            return broken(error)
        finally:
            drop_soon(one.machine)

    def _definition(self, invoke: Invoke) -> WorkflowDefinition:
        ctx = invoke.ctx
        if ctx.on_failure and ctx.workflow in self.on_failure:
            return self.on_failure[ctx.workflow]
        if ctx.workflow_version is None:
            return self.registry.latest(ctx.workflow)
        return self.registry.workflow(ctx.workflow, ctx.workflow_version)


def broken(error: BaseException) -> InvokeResult:
    """A pass that could not be made. What breaks the rules of replay is final; anything else is tried again."""
    data = describe(error)
    if isinstance(error, DeterminismError):
        return refusal(msgspec.structs.replace(data, retryable=False))
    return InvokeResult(status=500, body=InvokeBody(error=data, logs=[]))


def refusal(error: ErrorData) -> InvokeResult:
    """400: it is no use to try again."""
    return InvokeResult(status=400, body=InvokeBody(error=error))


class _PassMachine(HostedMachine):
    """One pass's replay."""

    def __init__(self, invoke: Invoke, definition: WorkflowDefinition, clock: Clock) -> None:
        ctx = invoke.ctx
        super().__init__(definition, run_id=ctx.run_id, input=_input(invoke, definition))
        settled = [memo for memo in invoke.steps.values() if not memo.pending]
        self.ordered = ctx.now is not None and all(memo.order is not None for memo in settled)
        self.timed = self.ordered and ctx.started_at is not None and all(memo.at is not None for memo in settled)
        self.memos = invoke.steps
        self.asked: dict[str, Command] = {}
        """Everything the code has asked for, by hash."""
        self.timers: dict[int, str] = {}
        """Keys of the timers there have been, by ordinal."""
        self.timer_hashes: dict[str, int] = {}
        self.ends: dict[int, str] = {}
        """Timeouts of waits for events, which are no operations of their own: the wait's key, by ordinal."""
        self.readings: list[StepRun] = []
        """What the clock has said in this pass."""
        self._clock = clock
        self._patches = dict.fromkeys(ctx.patches or (), True)

    def context(self) -> Context:
        return HostedContext(self)

    def ask(self, command: Command, read: Callable[[bytes], Any]) -> Asked:
        if not self.ordered:
            if isinstance(command, SendTask):
                self.refuse(_not_carried(f"ctx.remote({command.name!r})", "ctx.step, or ctx.child with a workflow"))
            if isinstance(command, WaitSignal):
                self.refuse(_not_carried(f"ctx.wait_for_signal({command.name!r})", "ctx.wait_for_event"))
        return super().ask(command, read)

    def wait_event(self, command: WaitEvent, read: Callable[[bytes], Any], give_up: Callable[[Asked], None]) -> Asked:
        promise = super().wait_event(command, read, give_up)
        if promise.alarm is not None:
            self.ends[promise.alarm.ordinal] = command.key
        return promise

    def _event(self, entry: Entry) -> None:
        """An event for one wait: which waits it is for is the engine's to say."""
        promise = self._promises[entry.key or ""]
        self._settle_wait(promise)
        promise.answer(entry.payload or b"null")

    def end_of(self, command: WaitEvent) -> Alarm | None:
        """The timeout of a wait for an event."""
        return self._promises[command.key].alarm

    def is_raced(self, alarm: Alarm) -> bool:
        """The timeout of a wait for an event is the engine's: it says which it was."""
        return alarm.ordinal not in self.ends and super().is_raced(alarm)

    def name_timers(self) -> None:
        """Give the timers of this turn their keys. One that was set and taken away in the same turn never was."""
        for ordinal, alarm in self.loop.alarms.items():
            if ordinal not in self.timers and ordinal not in self.ends:
                key = self.timers[ordinal] = self.key(alarm.name)
                self.timer_hashes[step_hash(key)] = ordinal

    def record_now(self) -> datetime:
        """A step like any other, but that nobody waits for it."""
        key, ordinal = self.key("now"), next(self.ordinals)
        memo = self.memos.get(step_hash(key))
        if memo is not None and isinstance(memo.data, Raw):
            return EPOCH + timedelta(milliseconds=msgspec.json.decode(memo.data, type=int))
        now = self._clock.now() // 1_000
        self.readings.append(StepRun(id=step_hash(key), name=key, seq=ordinal, data=Raw(b"%d" % now)))
        return EPOCH + timedelta(milliseconds=now)


class _Pass:
    """One invoke."""

    def __init__(
        self,
        invoke: Invoke,
        definition: WorkflowDefinition,
        clock: Clock,
        bodies: Bodies,
        on_step: StepObserver | None,
    ) -> None:
        self.machine = _PassMachine(invoke, definition, clock)
        self._invoke = invoke
        self._ctx = invoke.ctx
        self._clock = clock
        self._bodies = bodies
        self._on_step = on_step
        self._at = 0
        self._began = clock.monotonic()
        self._entries = itertools.count(1)
        self._ran: list[StepRun] = []
        """Steps that have ended in this pass, in that order."""
        self._asked_at: dict[str, int] = {}
        """When a wait for an event was asked for, by key."""
        self._patches: list[str] = []
        self._logs: list[RunnerLog] = []

    async def take(self) -> InvokeResult:
        """The result. Raises what breaks the rules of replay."""
        await plainly(self._replay)
        if self.machine.outcome is None:
            await self._run_steps()
        return self._result()

    def _now(self) -> int:
        """Epoch ms, by the engine's clock where it tells it."""
        if self._ctx.now is None:
            return self._clock.now() // 1_000
        return int(self._ctx.now + (self._clock.monotonic() - self._began) * 1_000)

    # ------------------------------------------------------------------ what the engine remembers

    def _replay(self) -> None:
        machine, ctx = self.machine, self._ctx
        seen = ctx.seen if machine.timed else None
        machine.behind(seen is not None)
        self._deliver(Entry(next(self._entries), 0, RUN, "started"), (ctx.started_at or 0) if machine.timed else 0)
        if not machine.ordered:
            self._in_order_of_call()
            return
        told = [(memo.order or 0, hash, memo) for hash, memo in machine.memos.items() if not memo.pending]
        if ctx.cancelling is not None:
            told.append((ctx.cancelling.order or 0, "", ctx.cancelling))
        for order, hash, memo in sorted(told, key=lambda item: item[0]):
            machine.behind(seen is not None and order <= seen)
            if memo is not ctx.cancelling:
                self._hand_over(hash, memo)
            elif machine.outcome is None:
                self._deliver(Entry(next(self._entries), 0, RUN, "cancelling"), memo.at)
        machine.behind(False)

    def _hand_over(self, hash: str, memo: Memo) -> None:
        """Deliver what came of an operation, unless the code has given it up meanwhile."""
        machine = self.machine
        if machine.outcome is not None:
            return
        command = machine.asked.get(hash)
        if command is None:
            ordinal = machine.timer_hashes.get(hash)
            if ordinal is None:
                self._check_known(hash)
            elif (alarm := machine.loop.alarms.get(ordinal)) is not None:
                entry = Entry(next(self._entries), 0, TIMER, "fired", f"timer:{ordinal}", ordinal, alarm.name)
                self._deliver(entry, memo.at)
        elif isinstance(command, WaitSignal):
            # By name: a wait that was given up leaves its signal to the next.
            entry = Entry(next(self._entries), 0, SIGNAL, "received", name=command.name, payload=_bytes(memo.data))
            self._deliver(entry, memo.at)
        elif machine.outstanding.get(command.key) is not command:
            return
        elif isinstance(command, WaitEvent):
            self._hand_over_event(command, memo)
        else:
            error = lenient.error(memo.error)
            self._deliver(
                Entry(
                    next(self._entries),
                    0,
                    _ENTRIES[type(command)],
                    "completed" if error is None else "failed",
                    command.key,
                    command.ordinal,
                    attempt=memo.attempt or 0,
                    payload=_value(command, memo) if error is None else encode_error(error),
                ),
                memo.at,
            )

    def _hand_over_event(self, command: WaitEvent, memo: Memo) -> None:
        """The event's data; null where none came in time, which only a wait with a timeout has to take for that."""
        error, data = lenient.error(memo.error), _bytes(memo.data)
        end = self.machine.end_of(command)
        if error is not None:
            raise DeterminismError(f"The engine does not take the wait for event {command.name!r}: {error.line}")
        if end is not None and memo.event is None and data == b"null":
            entry = Entry(next(self._entries), 0, TIMER, "fired", f"timer:{end.ordinal}", end.ordinal, end.name)
        else:
            event = memo.event or runners.MemoEvent()
            at = round((event.at or memo.at or 0) * 1_000)
            fact = fact_of(event.id, event.name or command.name, at, 0, data)
            entry = Entry(next(self._entries), 0, EVENT, "received", command.key, payload=fact)
        self._deliver(entry, memo.at)

    def _check_known(self, hash: str) -> None:
        """A memo that the code has not asked for here: it has changed. An engine that says no order may just be ahead."""
        if self.machine.ordered and hash not in {one.id for one in self.machine.readings}:
            raise NonDeterminism(
                f"Run {self._ctx.run_id}: memos and code disagree. Something came of operation {hash[:16]}…, and the code asks "
                "for nothing of that name there. Put the change behind `if ctx.patched('...')`, or register the old code under "
                "the run's version and the new code under another.",
                recorded=f"operation {hash}",
                asked="nothing there",
            )

    def _in_order_of_call(self) -> None:
        """Deliver what can be delivered, always the operation that was called first: nothing that is called earlier is
        unanswered then, so that every replay goes the same way, whatever came first."""
        machine = self.machine
        while machine.outcome is None:
            waiting = {command.ordinal: command.key for command in machine.outstanding.values()}
            waiting |= {
                ordinal: machine.timers[ordinal] for ordinal in machine.loop.alarms if ordinal in machine.timers
            }
            if not waiting:
                break
            hash = step_hash(waiting[min(waiting)])
            memo = machine.memos.get(hash)
            if memo is None or memo.pending:
                break
            self._hand_over(hash, memo)

    def _deliver(self, entry: Entry, at: float | None) -> None:
        """A turn of the code. Time never goes back."""
        machine = self.machine
        if machine.timed:
            self._at = max(self._at, round((at or 0) * 1_000))
        for item in machine.deliver(msgspec.structs.replace(entry, at=self._at)):
            self._heed(item)
        machine.name_timers()
        machine.check_races()

    def _heed(self, item: Command | Note) -> None:
        if isinstance(item, Command):
            self.machine.asked[step_hash(item.key)] = item
            if isinstance(item, WaitEvent):
                self._asked_at[item.key] = self._at
                _asked_of(item, self.machine.timed)  # what cannot be asked is refused now
        elif isinstance(item, Patch):
            self._patches.append(item.id)
        elif isinstance(item, WriteLog):
            at = self._at // 1_000 if self.machine.timed else self._now()
            self._line(item.level, item.message, "root", item.index, at, item.fields)

    def _line(self, level: str, message: str, scope: str, index: int, at: int, fields: bytes | None) -> None:
        if len(self._logs) < LINES_MAX:
            data = UNSET if fields is None else Raw(fields)
            level = _LEVELS.get(level, level)
            self._logs.append(RunnerLog(level=level, message=message, scope=scope, index=index, ts_ms=at, fields=data))

    # ------------------------------------------------------------------ steps that run here

    async def _run_steps(self) -> None:
        """Every step the code has reached and nothing has come of, at once; to the end of the last."""
        loop = asyncio.get_running_loop()
        bodies = [
            loop.create_task(self._run(command, hash), context=command.variables.copy())
            for hash, command in self.machine.asked.items()
            if isinstance(command, RunStep)
            and self.machine.outstanding.get(command.key) is command
            and hash not in self.machine.memos
        ]
        try:
            await asyncio.gather(*bodies)
        finally:
            for body in bodies:
                body.cancel()

    async def _run(self, command: RunStep, hash: str) -> None:
        """One attempt of one step."""
        began = self._now()
        attempt = (self._ctx.attempts or {}).get(hash, 0) + 1
        came = await run_attempt(command, self._scope(command, attempt), self._bodies, self._on_step, lambda: False)
        ran = StepRun(
            id=hash,
            name=command.key,
            seq=command.ordinal,
            input=_arguments(command),
            started_at=began,
            finished_at=self._now(),
        )
        if isinstance(came, bytes):
            ran.data = Raw(came)
        else:
            policy = command.options.retry
            # Whether these were attempts enough is the engine's to say: it counts them.
            final = policy.gives_up(0, retryable=came.retryable, names=(came.code, came.type))
            ran.error = decode_error(encode_error(came))
            ran.retry = retry_rules(policy)
            ran.retriable = False if final else None
            ran.retry_after_ms = None if came.retry_after is None else round(came.retry_after * 1_000)
        self._ran.append(ran)

    def _scope(self, command: RunStep, attempt: int) -> StepScope:
        scope = f"step:{command.key}" if attempt == 1 else f"step:{command.key}#{attempt}"
        indexes = itertools.count()

        def write(level: str, message: str, fields: dict[str, Any], progress: bool) -> None:
            data = payload.encode(fields, what="the fields of a log line") if fields else None
            self._line(level, payload.clean(str(message)), scope, next(indexes), self._now(), data)

        run_id, trace = self._ctx.run_id, self._ctx.traceparent
        return StepScope(run_id, step_id(run_id, command.ordinal), command.key, command.name, attempt, write, trace)

    # ------------------------------------------------------------------ the result

    def _result(self) -> InvokeResult:
        outcome, parked = self.machine.outcome, self._parked()
        if outcome is None:
            waited = self._waited() if self.machine.ordered else None
            return self._answer(206, opcodes=[*self.machine.readings, *self._ran, *parked], parked=waited)
        left: dict[str, Any] = {}
        if not self.machine.ordered and (untold := [one for one in parked if one.id not in self.machine.memos]):
            # Children nobody waits for. Only an engine of ours takes them with the last result.
            return self._answer(206, opcodes=untold)
        if parked and self.machine.ordered:
            left["opcodes"] = parked
        if isinstance(outcome, Completed):
            return self._answer(200, data=Raw(outcome.output), **left)
        error = decode_error(outcome.error) if outcome.error else ErrorData(message="The run was cancelled.")
        if isinstance(outcome, Cancelled):
            error = msgspec.structs.replace(error, code="run_cancelled")
        return self._answer(400, error=error, **left)

    def _answer(self, status: int, **fields: Any) -> InvokeResult:
        return InvokeResult(status=status, body=InvokeBody(logs=self._logs, patches=self._patches or None, **fields))

    def _parked(self) -> list[AnyOpcode]:
        """What waits for something outside, in order of call, whether the engine knows of it or not."""
        machine = self.machine
        found = list[tuple[int, AnyOpcode]]()
        for command in machine.outstanding.values():
            opcode = self._wait(command) if isinstance(command, WaitEvent) else _opcode(command)
            if opcode is not None:
                found.append((command.ordinal, opcode))
        for ordinal, alarm in machine.loop.alarms.items():
            if ordinal in machine.timers:
                found.append((ordinal, self._timer(ordinal, alarm)))
        known = {hash for hash, memo in machine.memos.items() if not memo.pending}
        return [one for _, one in sorted(found, key=lambda pair: pair[0]) if one.id not in known]

    def _waited(self) -> list[str]:
        """By hash, what the engine knows of and the code still waits for: also a step that waits for its next attempt, which
        no opcode tells of."""
        machine = self.machine
        keys = [command.key for command in machine.outstanding.values()]
        keys += [machine.timers[ordinal] for ordinal in machine.loop.alarms if ordinal in machine.timers]
        return [hash for hash in map(step_hash, keys) if hash in machine.memos]

    def _timer(self, ordinal: int, alarm: Alarm) -> AnyOpcode:
        """Until a moment where the engine's time is known: a sleep began with the turn that asked for it, not when the engine
        hears of it."""
        machine = self.machine
        key = machine.timers[ordinal]
        if machine.timed:
            return SleepUntil(id=step_hash(key), name=key, seq=ordinal, sleep_until_ms=_exactly(alarm.deadline))
        moment = machine.moments.get(ordinal)
        if moment is not None:
            return SleepUntil(id=step_hash(key), name=key, seq=ordinal, sleep_until_ms=_milliseconds(moment))
        return SleepFor(id=step_hash(key), name=key, seq=ordinal, sleep_ms=_milliseconds(alarm.deadline - self._at))

    def _wait(self, command: WaitEvent) -> AnyOpcode:
        ours = self.machine.timed
        asked: dict[str, Any] = _asked_of(command, ours)
        if command.deadline is not None:
            asked["timeout_ms"] = _milliseconds(command.deadline - self._asked_at.get(command.key, self._at))
            if ours:
                asked["until_ms"] = _exactly(command.deadline)
        if ours and command.since is not None:
            asked["since_ms"] = _exactly(command.since)
        return WaitForEvent(
            id=step_hash(command.key), name=command.key, seq=command.ordinal, event_name=command.name, **asked
        )


# ------------------------------------------------------------------ words


def _opcode(command: Command) -> AnyOpcode | None:
    """How an operation is told that waits for something outside; None for a step, which is run."""
    common: dict[str, Any] = {"id": step_hash(command.key), "name": command.key, "seq": command.ordinal}
    if isinstance(command, StartChild):
        return RunWorkflow(
            **common,
            child_name=command.workflow,
            child_data=Raw(command.input),
            child_version=command.version,
            on_parent_close=None if command.options.awaited else command.options.on_parent_close,
        )
    if isinstance(command, WaitSignal):
        return WaitForSignal(**common, signal_name=command.name)
    if isinstance(command, SendEvent):
        # An id of its own, so that it is one event however often it is told.
        dedupe = command.dedupe_id or command.event_id
        return Emit(**common, event_name=command.name, data=Raw(command.data), dedupe_id=dedupe)
    if isinstance(command, SendTask):
        options = command.options
        return runners.SendTask(
            **common,
            task_name=command.name,
            input=Raw(command.input),
            group=options.group,
            transport=options.transport,
            priority=options.priority,
            timeout_ms=_optional(options.timeout),
            heartbeat_timeout_ms=_optional(options.heartbeat_timeout),
            retry=retry_rules(options.retry),
        )
    return None


def _asked_of(command: WaitEvent, ours: bool) -> dict[str, Any]:
    """What a wait asks of its event, as an expression if it can be said so. Raises DeterminismError."""
    match, source = parts_of(command.condition)
    if match is None:
        return {} if source is None else {"event_if": source}
    expression = as_expression(match)
    if expression is not None:
        return {"event_if": expression}
    if ours:
        return {"match": Raw(msgspec.json.encode(match))}
    raise _not_carried(f"ctx.wait_for_event({command.name!r}) with null, a list or an empty object in match", "where=")


def _value(command: Command, memo: Memo) -> bytes:
    """The data; of an event sent its id, which a plain engine does not tell."""
    data = _bytes(memo.data)
    if isinstance(command, SendEvent) and not data.startswith(b'"'):
        return msgspec.json.encode(command.event_id)
    return data


def retry_rules(policy: RetryPolicy) -> RetryRules:
    """A retry policy as the wire has it."""
    return RetryRules(
        max_attempts=policy.max_attempts,
        backoff=policy.backoff,
        initial_delay_ms=round(policy.initial_delay * 1_000),
        max_delay_ms=round(policy.max_delay * 1_000),
        factor=policy.factor,
        jitter=policy.jitter,
    )


def _input(invoke: Invoke, definition: WorkflowDefinition) -> bytes:
    event = invoke.event
    data = bytes(event.data)
    if not invoke.ctx.on_failure:
        if is_event(definition.input_type):
            at = event.ts if event.ts is not None else invoke.ctx.started_at or 0
            return input_of(event.id or "", event.name, round(at * 1_000), data)
        return definition.kept(data)
    error = lenient.error(invoke.ctx.error) or ErrorData(message="The run failed, and nobody said why.")
    return msgspec.json.encode({"error": error, "input": Raw(data)})


def _arguments(command: RunStep) -> Any:
    """For people: what cannot be told is left out."""
    if not command.args:
        return UNSET
    try:
        data = payload.encode(command.args, what="arguments", limit=INPUT_MAX)
    except Exception:
        return UNSET
    return Raw(data)


def _failing(flow: Any, fn: Callable[..., Any]) -> WorkflowDefinition:
    name = _name(flow)
    if not inspect.iscoroutinefunction(fn):
        raise DefinitionError(f"on_failure of {name} is an async function (ctx, failure), not {fn!r:.100}.")
    return workflow_of(workflow(f"{name}.on_failure")(fn))


def _name(flow: Any) -> str:
    name = workflow_name(flow)
    assert name is not None
    return name


def _not_carried(what: str, instead: str) -> DeterminismError:
    return DeterminismError(f"{what}: this engine cannot be asked for that by a runner. Use {instead}.")


def _milliseconds(micro: int) -> int:
    """Rounded up: no timer rings early."""
    return max(0, -(-micro // 1_000))


def _exactly(micro: int) -> int | float:
    whole, fraction = divmod(micro, 1_000)
    return whole + fraction / 1_000 if fraction else whole


def _optional(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1_000)


def _bytes(data: Any) -> bytes:
    return bytes(data) if isinstance(data, Raw) else b"null"
