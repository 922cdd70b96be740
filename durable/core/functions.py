"""A function that lives in an app: the engine's side of it, as workflow code of ours.

`FunctionHost` is a driver that runs on the same machine as any workflow. It asks the app for a pass (`Invoke`), takes the answer
apart into ordinary commands, waits until something has come of one, and asks for the next pass, with what it then knows as
memos. So journal, replay, timers, children, retries and cancellation are what they are for every run; nothing here does I/O or
knows a clock. How a pass is asked for and what it answers is the dialect's business: one operation at a time over HTTP (wire
section 4), or all that was reached, of a runner (section 5).

Passes have ordinals of their own, from `PASSES` on, and the driver's own timers from `TIMERS` on, so that the app may count its
operations itself. What came while a pass was under way is in the next one.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Raw, Struct

from durable.core import payload
from durable.core.commands import (
    AppStep,
    AskApproval,
    Cancelled,
    Completed,
    Failed,
    Invoke,
    Report,
    RunStep,
    SendEvent,
    SendTask,
    StartChild,
    WaitEvent,
    WaitSignal,
)
from durable.core.definition import WorkflowDefinition, check_name, workflow, workflow_of
from durable.core.errors import (
    BadAnswer,
    DefinitionError,
    DurableError,
    ErrorData,
    PayloadError,
    RunnerGone,
    StepFailed,
)
from durable.core.event import data_in, read_fact
from durable.core.match import condition_of
from durable.core.options import ChildOptions, RemoteOptions, StepOptions
from durable.core.origin import Origin, meta_of, origin_of
from durable.core.passes import (
    NULL,
    Answer,
    Line,
    Reached,
    decode_answer,
    encode_answer,
    read_operation,
    read_result,
    stripped,
)
from durable.core.replay import Ended
from durable.core.retry import RetryPolicy
from durable.core.step import current_step
from durable.protocol.trace import traceparent

if TYPE_CHECKING:
    from durable.core.ctx import Context
    from durable.core.loop import Promise

PASSES = 1_000_000_000
"""The first pass's ordinal. An app's operations are counted below it."""
HANDLER = 500_000_000
"""Where the operations of a failure handler begin."""
TIMERS = 2_000_000_000
"""The first ordinal of the driver's own timers: delays before something is tried again."""
PATIENT = RetryPolicy(max_attempts=1_000_000, initial_delay=1.0, max_delay=10.0)
"""How a pass is tried again while nobody is there to be asked: for as long as it takes."""

_RETRY = RetryPolicy()
Dialect = Literal["operation", "runner"]
_encode = msgspec.json.Encoder().encode
_bytes: Callable[[bytes], Any] = bytes


class Pass(Struct, frozen=True):
    """One pass to be asked for, as a link is given it. `body` is what the app is to read."""

    workspace: str
    app: str
    workflow: str
    version: str
    function_id: str
    """What the app calls it."""
    run_id: str
    dialect: Dialect
    body: bytes
    runner: str | None = None
    """The runner the run is pinned to."""


class Reply(Struct, frozen=True):
    """What the app said: a status of section 5 (of section 4: 200), and the body."""

    status: int
    body: bytes


AskApp = Callable[[Pass], Awaitable[Reply]]
"""Asks for a pass. Raises RunnerError."""
CallOut = Callable[[str, bytes, str], Awaitable[bytes]]
"""Makes a webhook's call: URL, body, idempotency key; gives what the step comes to, as JSON."""


@dataclass(frozen=True)
class AppFunction:
    """What there is to know of a function in order to drive it."""

    name: str
    version: str
    workspace: str
    app: str
    dialect: Dialect
    ask: AskApp
    call_out: CallOut | None = None
    retry: RetryPolicy = _RETRY
    timeout: float | None = None
    """Seconds the whole run may take."""
    on_failure: bool = False
    cap: Any = None
    cleans: bool = False
    """Its runner knows `ctx.cancelling`: a cancelled run is asked for passes in which the code cleans up."""
    versioned: bool = False
    """Whether the app itself named the version."""

    @property
    def function_id(self) -> str:
        """As the app knows it."""
        return f"{self.name}@{self.version}" if self.versioned else self.name


def function_workflow(function: AppFunction, **options: Any) -> WorkflowDefinition:
    """A workflow over a function that lives in an app. `options` as of `@workflow`."""

    async def drive(ctx: Any, input: Any = None) -> Any:
        return await FunctionHost(ctx, function).run()

    drive.__qualname__ = function.name
    decorate = workflow(function.name, function.version, **options)
    return replace(workflow_of(decorate(drive)), hosting=function)


class _Op(Struct, eq=False):
    """An operation the app has told of."""

    kind: str
    id: str
    name: str
    attempt: int = 1
    """Under way, or to be made next."""
    step: AppStep | None = None
    """Of a step: the command that its Reports answer."""
    pending: bool = True
    """The app is told that it is under way. Of a step: its next attempt is not due yet."""
    failed_at: int | None = None
    """Seq of the pass that told of its first failure: a requeue asks again from there."""
    promise: Any = None
    memo: dict[str, Any] | None = None


class _FunctionFailed(Exception):
    """The function has failed for good."""

    def __init__(self, error: ErrorData, cut: int | None, step: str | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.cut = cut
        self.step = step


class FunctionHost:
    """One run of such a function: what the app has asked for, and what has come of it."""

    def __init__(self, ctx: Context, function: AppFunction) -> None:
        self._machine = ctx._machine
        self._loop = self._machine.loop
        self._function = function
        self._origin = origin_of(self._machine.meta)
        self._event = event_of(self._machine.definition, self._machine.input, self._origin)
        self._random = Random(self._machine.run_id)
        self._started_at = self._machine.now
        self._ordinals = itertools.count()
        self._timers = itertools.count(TIMERS)
        self._passes = itertools.count(PASSES)
        self._ops: dict[str, _Op] = {}
        self._news: Promise | None = None
        self._changes = 0
        """Rises with everything the app has not been told of."""
        self._attempt = 1
        """Of the function: how often its code, and not a step, has failed, and one."""
        self._in_a_row = 0
        """Failures of the function since it last got anywhere."""
        self._first_failure: int | None = None
        self._told: set[tuple[int, str, int]] = set()
        """Log lines that are written, by attempt, scope and index."""
        self._seen: int | None = None
        """The highest order the app knows, once it has answered."""
        self._patches: list[str] = []
        self._failure: tuple[ErrorData, str | None] | None = None
        self._work: Any = None
        """The task of the passes, where the run has a timeout."""
        self._cancelling: dict[str, Any] | None = None
        """When the run was cancelled, as its app is told."""
        self._broken: tuple[_Op, ErrorData] | None = None
        """The operation that the function has failed with."""
        self._reports_pending = False
        """This app names the pending operations it still waits for: one it does not name is dropped."""

    async def run(self) -> Any:
        """To the end of the run."""
        try:
            try:
                data = await self._bounded(self._series())
            except asyncio.CancelledError:
                if not self._function.cleans:
                    raise
                data = await self._clean_up()
        except _FunctionFailed as failed:
            if self._cancelling is not None and failed.error.code == "run_cancelled":
                raise Ended(Cancelled(payload.encode_error(failed.error))) from None
            if self._function.on_failure and failed.error.code != RunnerGone.code:
                await self._after_failure(failed)
            raise Ended(Failed(payload.encode_error(failed.error), failed.cut)) from None
        raise Ended(Completed(bytes(data)))

    async def _clean_up(self) -> Raw:
        """The run is being cancelled, and the app's code is told: what it does about it is passes like any others. The engine
        gives it `cancel_grace`."""
        entry = self._machine.entry
        assert entry is not None
        self._cancelling = {"order": entry.seq, "at": entry.at / 1_000}
        if self._work is not None and not self._work.done():
            await asyncio.wait([self._work])
        return await self._series()

    async def _bounded(self, series: Any) -> Raw:
        limit = self._function.timeout
        if limit is None:
            whole: Raw = await series
            return whole
        work = self._work = self._loop.create_task(series, name="series")
        end = self._timer(self._started_at + round(limit * 1e6))
        try:
            await asyncio.wait([work, end], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()  # type: ignore[no-any-return]
        finally:
            end.cancel()
            work.cancel()
        self._drop_all()
        message = f"The function took longer than its timeout of {limit:g} s."
        raise _FunctionFailed(ErrorData(message=message, code="run_timeout", type="RunTimeout", retryable=False), None)

    async def _after_failure(self, failed: _FunctionFailed) -> None:
        """One more series of passes, in which the app is told of the failure. It begins with nothing: its operations are
        others than the function's, though they may be called the same."""
        self._drop_all()
        self._ops = {}
        self._in_a_row, self._first_failure, self._seen = 0, None, None
        self._failure = failed.error, failed.step
        try:
            await self._series()
        except _FunctionFailed as again:
            self._log("error", f"The function's failure handler has failed too: {again.error.line}")
        self._drop_all()

    # ------------------------------------------------------------------ passes

    async def _series(self) -> Raw:
        """Pass after pass, until the function has an outcome. Raises _FunctionFailed."""
        while True:
            asked, told = self._changes, self._known_order()
            pending = {op.id for op in self._ops.values() if op.memo is None and op.pending}
            answer = await self._ask()
            at = self._seq()
            self._write_lines(answer)
            self._patches += [patch for patch in answer.patches if patch not in self._patches]
            advanced = await self._apply(answer, at)
            if answer.status == "failed":
                assert answer.error is not None
                await self._try_again(answer.error, at)
                continue
            if answer.status == "completed":
                await self._finish_last(answer)
                result: Raw = answer.data
                return result
            if advanced:
                self._in_a_row, self._first_failure = 0, None
            self._seen = told
            self._drop_unnamed(answer, pending)
            self._check()
            while self._changes == asked:
                if not any(op.memo is None and op.pending for op in self._ops.values()):
                    message = (
                        "The app's answer was to go on, and nothing is outstanding that could wake the run: every operation "
                        "it named is settled, and it has been told so. Does the app look at `steps`?"
                    )
                    raise _FunctionFailed(ErrorData(message, "stalled", "Stalled", retryable=False), at)
                self._news = self._loop.create_future()
                await self._news
                self._check()

    def _check(self) -> None:
        """An app of section 4 is told of no failure: with its operation the function has failed."""
        if self._broken is not None:
            op, error = self._broken
            self._broken = None
            raise _FunctionFailed(error, op.failed_at, op.name)

    def _ask(self) -> Any:
        machine = self._machine
        body = partial(self._pass, dict(self._steps()), self._attempt, self._loop.now, self._seen, tuple(self._patches))
        command = Invoke(
            next(self._passes),
            machine.key("invoke"),
            "invoke",
            "",
            body,
            (),
            StepOptions(PATIENT),
            Any,
            contextvars.copy_context(),
            partial(stripped, seen=self._was_told),
        )
        return machine.ask(command, decode_answer)

    def _known_order(self) -> int:
        """The highest order of what the app is told now."""
        orders = [op.memo["order"] for op in self._ops.values() if op.memo is not None]
        if self._cancelling is not None:
            orders.append(self._cancelling["order"])
        highest: int = max([self._seen or 0, *orders])
        return highest

    def _steps(self) -> Any:
        """What the app is told of its operations: a snapshot, since more may come while the pass is under way."""
        for op in self._ops.values():
            if op.memo is not None:
                yield op.id, op
            elif op.pending:
                yield op.id, None

    async def _pass(
        self, known: dict[str, _Op | None], attempt: int, now: int, seen: int | None, patches: tuple[str, ...]
    ) -> bytes:
        """The body of an Invoke: ask, and read the answer. What came of it is an answer too, a failed one, unless nobody was
        there to be asked."""
        function, machine = self._function, self._machine
        if function.dialect == "operation":
            said = self._operation_body(known)
        else:
            said = self._runner_body(known, attempt, now, seen, patches)
        asked = Pass(
            function.workspace,
            function.app,
            function.name,
            function.version,
            function.function_id,
            machine.run_id,
            function.dialect,
            _encode(said),
            self._origin.runner,
        )
        try:
            reply = await function.ask(asked)
            if function.dialect == "operation":
                return encode_answer(read_operation(reply.body))
            return encode_answer(read_result(reply.status, reply.body))
        except Exception as error:
            if isinstance(error, RunnerGone) and error.retryable:
                raise
            data = payload.describe(error)
            retryable = bool(getattr(error, "retryable", not isinstance(error, PayloadError)))
            return encode_answer(Answer("failed", error=msgspec.structs.replace(data, retryable=retryable, stack=None)))

    def _operation_body(self, known: dict[str, _Op | None]) -> dict[str, Any]:
        steps = {id: {"type": op.memo["type"], "data": op.memo["data"]} for id, op in known.items() if op and op.memo}
        said: dict[str, Any] = {
            "runId": self._machine.run_id,
            "functionId": self._function.function_id,
            "event": {"id": self._event.id or self._machine.run_id, "name": self._event.name, "data": self._event.data},
            "steps": steps,
        }
        if self._failure is not None:
            error, step = self._failure
            said["failure"] = {
                "message": error.message,
                "name": error.type or "Error",
                "code": error.code,
                "stepId": step,
                "details": error.details,
            }
        return said

    def _runner_body(
        self, known: dict[str, _Op | None], attempt: int, now: int, seen: int | None, patches: tuple[str, ...]
    ) -> dict[str, Any]:
        function, run_id = self._function, self._machine.run_id
        event: dict[str, Any] = {"name": self._event.name, "data": self._event.data}
        if self._event.id is not None:
            event["id"] = self._event.id
        ctx: dict[str, Any] = {
            "runId": run_id,
            "attempt": attempt,
            "app": function.app,
            "workflow": function.name,
            "traceparent": traceparent(run_id, current_step().step_id, current_step().attempt),
            "now": now / 1_000,
            "startedAt": self._started_at / 1_000,
            "workflowVersion": function.version,
        }
        if seen is not None:
            ctx["seen"] = seen
        if self._origin.runner is not None:
            ctx["runner"] = self._origin.runner
        if function.cap is not None:
            ctx["cap"] = function.cap
        if self._cancelling is not None:
            ctx["cancelling"] = self._cancelling
        if patches:
            ctx["patches"] = list(patches)
        failed = {op.id: op.attempt - 1 for op in self._ops.values() if op.step is not None and op.attempt > 1}
        if failed:
            ctx["attempts"] = {id: count for id, count in failed.items() if id not in known}
        if self._failure is not None:
            ctx["onFailure"] = True
            ctx["error"] = _told_error(self._failure[0])
        steps = {}
        for id, op in known.items():
            if op is None or op.memo is None:
                steps[id] = {"pending": True}
            else:
                steps[id] = {name: value for name, value in op.memo.items() if name != "type"}
        return {"event": event, "steps": steps, "ctx": ctx}

    async def _try_again(self, error: ErrorData, at: int) -> None:
        """The function itself has failed: wait before the next pass, or give up."""
        if self._first_failure is None:
            self._first_failure = at
        self._in_a_row += 1
        self._attempt += 1
        policy = self._function.retry
        if policy.gives_up(self._in_a_row, retryable=error.retryable, names=(error.code, error.type)):
            raise _FunctionFailed(error, *self._cause(error))
        delay = policy.delay(self._in_a_row, self._random.random(), retry_after=error.retry_after)
        self._log("warn", f"The function failed, and is tried again in {delay:.3g} s: {error.line}")
        await self._timer(self._loop.now + round(delay * 1e6))

    def _cause(self, error: ErrorData) -> tuple[int | None, str | None]:
        """From where a requeue asks again, and the step whose error came out: else the passes that failed."""
        for op in self._ops.values():
            told = None if op.memo is None else op.memo.get("error")
            if told is not None and op.failed_at is not None and told.get("message") == error.message:
                return min(op.failed_at, self._first_failure or op.failed_at), op.name
        return self._first_failure, None

    def _drop_unnamed(self, answer: Answer, pending: set[str]) -> None:
        """Give up what the code no longer waits for. Only of an app that tells: one that names none of its pending
        operations may just not repeat them."""
        if answer.parked is not None:
            named = set(answer.parked) | {one.id for one in answer.reached}
        else:
            named = {one.id for one in answer.reached}
            self._reports_pending = self._reports_pending or bool(named & pending)
            if not self._reports_pending:
                return
        for id in pending - named:
            op = self._ops[id]
            if op.memo is None and op.pending:
                self._drop(op)

    def _drop(self, op: _Op) -> None:
        del self._ops[op.id]
        if op.promise is not None:
            op.promise.cancel()

    def _drop_all(self) -> None:
        for op in list(self._ops.values()):
            if op.memo is None:
                self._drop(op)

    # ------------------------------------------------------------------ operations

    async def _apply(self, answer: Answer, at: int) -> bool:
        """Ask for what is new. Whether the function got anywhere."""
        last = answer.status != "continue"
        advanced = False
        settled: list[Any] = []
        for one in answer.reached:
            known = self._ops.get(one.id)
            if known is not None and known.kind != one.kind:
                raise _FunctionFailed(_reused(known, one), at)
            if known is not None and (known.memo is not None or (known.pending and one.kind != "step")):
                self._repeated(one, at)
                continue
            try:
                check_name(one.name, "name of an operation", reserved=False)
            except DefinitionError as error:
                raise _FunctionFailed(_bad(str(error)), at) from None
            if last and one.kind in _WAITS:
                continue
            if known is None:
                known = self._ops[one.id] = _Op(one.kind, one.id, one.name)
                advanced = True
            if one.kind not in _REPORTED:
                try:
                    self._begin(known, one)
                    continue
                except DurableError as error:  # it asks for what there cannot be: that operation fails
                    one.error = msgspec.structs.replace(payload.describe(error), retryable=False, stack=None)
            if self._report(known, one, answer, at):
                advanced = True
                settled.append(known.promise)
        # The entries of what they came to stand behind this answer's, and are read now.
        for promise in settled:
            if not promise.done():
                await asyncio.wait([promise])
        return advanced

    def _repeated(self, one: Reached, at: int) -> None:
        if self._function.dialect == "operation":
            message = (
                f"The app reached operation {one.name!r} again, which it has been told the outcome of. Every operation needs an "
                "id of its own, and the app has to look at `steps`."
            )
            raise _FunctionFailed(ErrorData(message, "id_reused", "IdReused", retryable=False), at)

    def _report(self, op: _Op, one: Reached, answer: Answer, at: int) -> bool:
        """An attempt of a step that the app has run. Whether it settles the step."""
        machine = self._machine
        if op.step is None:
            op.step = AppStep(self._ordinal(one), machine.key(one.name), one.name, "")
            op.promise = machine.ask(op.step, _bytes)
            op.promise.add_done_callback(partial(self._settled, op))
        op.pending = False
        attempt, error = op.attempt, one.error
        if one.kind == "unknown":
            error = ErrorData(
                message=f"This engine offers no operation {one.word!r}: it knows StepRun, Skip, Sleep, SleepUntil, WaitForEvent, "
                "RunWorkflow, Emit, Webhook and Approval. Do it in a step.",
                code="unknown_operation",
                type="UnknownOperation",
                retryable=False,
            )
        status, data = "completed", b"null"
        delay = 0.0
        if error is not None:
            status, data = "failed", payload.encode_error(error)
            op.failed_at = at if op.failed_at is None else op.failed_at
            policy = one.retry or self._function.retry
            if not policy.gives_up(attempt, retryable=error.retryable, names=(error.code, error.type)):
                delay = policy.delay(attempt, self._random.random(), retry_after=error.retry_after)
                status = "retrying"
                data = _encode({"error": error, "next_at": self._loop.now + round(delay * 1e6)})
        elif isinstance(one.data, Raw):
            data = bytes(one.data)
        lines = self._step_lines(op, one, answer)
        machine.tell(Report(op.step, status, attempt, data, lines, one.began, one.ended))
        if status == "retrying":
            op.attempt += 1
            op.pending = True
            self._timer(self._loop.now + round(delay * 1e6)).add_done_callback(partial(self._due, op))
            return False
        return True

    def _due(self, op: _Op, timer: Any) -> None:
        """The next attempt of a step is due: the app is no longer told that it is under way, so it runs it."""
        if not timer.cancelled() and self._ops.get(op.id) is op:
            op.pending = False
            self._changed()

    def _begin(self, op: _Op, one: Reached) -> None:
        """Ask for what the engine does."""
        loop, ordinal = self._loop, self._ordinal(one)
        until = one.until
        if one.after is not None:
            until = loop.now + one.after
        promise: Any
        if one.kind == "sleep":
            loop.ordinals = itertools.count(ordinal)
            promise = loop.sleep_until(until or 0)
        elif one.kind in ("wait", "signal"):
            promise = self._wait(one, ordinal, until)
        elif one.kind == "approval":
            promise = self._approval(op, one, ordinal, until)
        elif one.kind == "send":
            promise = self._send(one, ordinal)
        elif one.kind == "child":
            promise = self._child(one, ordinal)
        elif one.kind == "webhook":
            promise = self._webhook(op, one, ordinal)
        else:
            promise = self._task(one, ordinal)
        op.promise = promise
        promise.add_done_callback(partial(self._settled, op))

    def _wait(self, one: Reached, ordinal: int, until: int | None) -> Any:
        machine = self._machine
        if one.kind == "signal":
            signal = WaitSignal(ordinal, machine.key(f"signal:{one.event}"), one.event, "")
            return machine.wait_signal(signal, _bytes, self._left(until), _nothing)
        match = msgspec.json.decode(one.match) if isinstance(one.match, Raw) else None
        condition = condition_of(match, one.condition)
        # Never at once: what was accepted before this moment is looked for first.
        deadline = None if until is None else max(self._loop.now + 1, until)
        fingerprint = payload.fingerprint(condition or b"")
        key = machine.key(f"event:{one.event}")
        command = WaitEvent(ordinal, key, one.event, fingerprint, condition, None, deadline)
        return machine.wait_event(
            command, _event_data if self._function.dialect == "runner" else _whole_event, _nothing
        )

    def _left(self, until: int | None) -> int | None:
        return None if until is None else max(0, until - self._loop.now)

    def _approval(self, op: _Op, one: Reached, ordinal: int, until: int | None) -> Any:
        machine = self._machine
        id = f"{machine.run_id}.approval.{ordinal}"
        item = {
            "id": id,
            "runId": machine.run_id,
            "workflow": self._function.name,
            "app": self._function.app,
            "name": one.name,
            "signal": id,
            "args": one.data,
            "requestedAt": self._loop.now,
            "expiresAt": until,
            **(one.ask or {}),
        }
        command = AskApproval(ordinal, machine.key(f"approval:{one.name}"), id, "", id, _encode(item), until)
        return machine.wait_signal(command, _bytes, self._left(until), _undecided)

    def _send(self, one: Reached, ordinal: int) -> Any:
        """One event after the other is asked for, and all of them are waited for. Gives their ids."""
        machine = self._machine
        sent = []
        for number, event in enumerate(one.events):
            place = ordinal if number == 0 else next(self._ordinals)
            data = bytes(event.data)
            command = SendEvent(
                place,
                machine.key(f"emit:{event.name}"),
                event.name,
                payload.fingerprint(data),
                f"{machine.run_id}.event.{place}",
                event.id,
                data,
                workspace_of(event.app, self._function.workspace),
            )
            sent.append(machine.send_event(command, _text))
        return sent[0] if len(sent) == 1 else self._loop.create_task(_all(sent), name=f"send {one.name}")

    def _child(self, one: Reached, ordinal: int) -> Any:
        machine = self._machine
        key = machine.key(one.name)
        data = bytes(one.data) if isinstance(one.data, Raw) else b"null"
        origin = Origin(trigger_kind="child", app=one.app or self._function.app, runner=one.runner)
        options = ChildOptions(on_parent_close=one.on_parent_close)
        command = StartChild(
            ordinal,
            key,
            one.name,
            payload.fingerprint(data),
            one.event,
            one.version,
            data,
            machine.child_id(ordinal, key),
            options,
            Any,
            meta_of(origin),
            workspace_of(one.app, self._function.workspace),
        )
        return machine.ask(command, _bytes)

    def _webhook(self, op: _Op, one: Reached, ordinal: int) -> Any:
        machine = self._machine
        data = bytes(one.data) if isinstance(one.data, Raw) else b"null"
        command = RunStep(
            ordinal,
            machine.key(one.name),
            one.name,
            payload.fingerprint(one.url.encode(), data),
            partial(self._call_out, one.url, data),
            (),
            StepOptions(one.retry or self._function.retry),
            Any,
            contextvars.copy_context(),
        )
        return machine.ask(command, _bytes)

    async def _call_out(self, url: str, data: bytes) -> Any:
        call = self._function.call_out
        if call is None:
            raise DefinitionError("This engine makes no outgoing calls: it has not been given a way to.")
        return Raw(await call(url, data, current_step().idempotency_key))

    def _task(self, one: Reached, ordinal: int) -> Any:
        machine = self._machine
        data = bytes(one.data) if isinstance(one.data, Raw) else b"null"
        options = RemoteOptions(
            retry=one.retry or RetryPolicy(),
            timeout=None if one.timeout is None else one.timeout / 1e6,
            heartbeat_timeout=None if one.heartbeat is None else one.heartbeat / 1e6,
            transport=one.transport,
            group=one.group,
            priority=one.priority,
        )
        command = SendTask(ordinal, machine.key(one.name), one.event, payload.fingerprint(data), data, options, Any)
        return machine.ask(command, _bytes)

    def _settled(self, op: _Op, answer: Any) -> None:
        """Something has come of an operation."""
        if answer.cancelled() or self._ops.get(op.id) is not op:
            return
        entry = self._machine.entry
        assert entry is not None
        memo: dict[str, Any] = {"type": _MEMO.get(op.kind, op.kind)}
        error = answer.exception()
        if error is None:
            value = answer.result()
            if op.kind == "send" and self._function.dialect == "operation":
                memo["data"] = {"ids": value if isinstance(value, list) else [value]}
            else:
                memo["data"] = NULL if value is None or op.kind in _EMPTY else Raw(value)
        else:
            data = error.error if isinstance(error, StepFailed) and error.error else payload.describe(error)
            memo["error"] = _told_error(data)
            if op.failed_at is None:
                op.failed_at = entry.seq
        memo |= {"order": entry.seq, "at": entry.at / 1_000, "attempt": op.attempt}
        op.memo = memo
        if error is not None and self._function.dialect == "operation":
            # An app of section 4 knows no memo of a failure: the function has failed with its operation.
            self._broken = op, data
        self._changed()

    async def _finish_last(self, answer: Answer) -> None:
        """The function has returned. Events, calls and tasks it asked for with its last word are made first."""
        ids = {one.id for one in answer.reached}
        waits = [
            op.promise for op in self._ops.values() if op.id in ids and op.memo is None and op.kind in _MADE_AT_THE_END
        ]
        if waits:
            await asyncio.wait(waits)

    # ------------------------------------------------------------------ log lines

    def _scope(self, line: Line) -> tuple[int, str, int]:
        return self._attempt, line.scope, line.index

    def _was_told(self, line: Line) -> bool:
        return self._scope(line) in self._told

    def _write_lines(self, answer: Answer) -> None:
        """The function's own lines, each once. What a step told in this pass goes with the step."""
        own = {name for one in answer.reached if one.kind == "step" for name in _scopes(one)}
        for line in answer.lines:
            if _belongs(line, own):
                continue
            if not self._was_told(line):
                self._told.add(self._scope(line))
                self._machine.write_log(
                    line.level, line.message, bytes(line.fields) if isinstance(line.fields, Raw) else None
                )

    def _step_lines(self, op: _Op, one: Reached, answer: Answer) -> list[bytes]:
        own = _scopes(one)
        return [
            _encode({"level": line.level, "message": line.message, "fields": line.fields or Raw(b"{}")})
            for line in answer.lines
            if _belongs(line, own) and line.level
        ]

    def _log(self, level: str, message: str) -> None:
        self._machine.write_log(level, payload.clean(message), None)

    # ------------------------------------------------------------------ small things

    def _timer(self, deadline: int) -> Any:
        self._loop.ordinals = self._timers
        return self._loop.sleep_until(deadline)

    def _ordinal(self, one: Reached) -> int:
        """The app's own count where it has one; the failure handler's begins anew."""
        number = one.seq if one.seq is not None else next(self._ordinals)
        return number if self._failure is None or one.seq is None else HANDLER + number

    def _changed(self) -> None:
        self._changes += 1
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _seq(self) -> int:
        entry = self._machine.entry
        assert entry is not None
        return entry.seq


class StoredEvent(Struct, frozen=True):
    """The event a run was started by, as the app is told of it."""

    name: str
    data: Raw = NULL
    id: str | None = None


def event_of(definition: WorkflowDefinition, input: bytes, origin: Origin) -> StoredEvent:
    """The event that a run was started by. One that was started by hand or by another has none: its input is the data."""
    data = data_in(input) if definition.flow.batch is not None else input
    name = origin.event_name or ("$child" if origin.trigger_kind == "child" else "$start")
    return StoredEvent(name, Raw(data or b"null"), origin.event_id)


def workspace_of(app: str | None, own: str) -> str | None:
    """The workspace that an app's name means in a workspace: the app in the same environment, or a whole token. None: the
    own one."""
    if app is None or app == own:
        return None
    name, _, environment = own.rpartition(".")
    if app == name:
        return None
    if app.endswith(ENVIRONMENTS) or environment not in ("dev", "acc", "prod"):
        return app
    return f"{app}.{environment}"


ENVIRONMENTS = (".dev", ".acc", ".prod")
_MEMO = {"step": "run", "signal": "wait", "send": "sendEvent"}
"""What section 4 calls the kinds."""
_REPORTED = frozenset({"step", "skip", "unknown"})
"""Kinds that are over when they are told of."""
_WAITS = frozenset({"sleep", "wait", "signal", "approval"})
_EMPTY = frozenset({"sleep", "send", "skip"})
_MADE_AT_THE_END = frozenset({"send", "webhook", "task"})


def _scopes(one: Reached) -> set[str]:
    """How an app may call the scope of a step's lines."""
    return {one.id, one.name, f"step:{one.name}", f"step:{one.id}"}


def _belongs(line: Line, own: set[str]) -> bool:
    return line.scope in own or line.scope.rpartition("#")[0] in own


def _told_error(error: ErrorData) -> dict[str, Any]:
    """An error as an app is told of it: `{message, stack?}`, and of ours the rest."""
    told: dict[str, Any] = msgspec.to_builtins(error)
    return {"name": error.type or "Error", **told}


def _reused(known: _Op, one: Reached) -> ErrorData:
    was, now = _MEMO.get(known.kind, known.kind), _MEMO.get(one.kind, one.kind)
    message = (
        f"Operation {one.name!r} was a {was} and is now a {now}: an id means one operation. Give each its own, or register the "
        "changed code under another version."
    )
    return ErrorData(message, "id_reused", "IdReused", retryable=False)


def _bad(why: str) -> ErrorData:
    return ErrorData(f"The app's answer makes no sense: {why}", BadAnswer.code, "BadAnswer", retryable=False)


async def _all(promises: list[Any]) -> list[Any]:
    return [await promise for promise in promises]


def _event_data(fact: bytes) -> bytes:
    return bytes(read_fact(fact).data)


def _whole_event(fact: bytes) -> bytes:
    """As section 4 tells of it: the event, and not its data alone."""
    event = read_fact(fact)
    return _encode({"id": event.id, "name": event.name, "data": event.data})


def _text(data: bytes) -> Any:
    return msgspec.json.decode(data)


def _nothing(promise: Any) -> None:
    """A wait has given up: null."""
    promise.set_result(b"null")


def _undecided(promise: Any) -> None:
    """Nobody has decided in time, which is no yes."""
    promise.set_result(b'{"status":"denied","args":null,"decidedBy":null,"timedOut":true}')
