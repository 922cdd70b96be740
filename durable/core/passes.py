"""What an app's function answers when it is asked for a pass, read once, in one shape for both ways of speaking.

A pass runs the function from its beginning with what is known already, up to what is new. Wire section 4 answers with the one
operation it has reached, section 5 with all of them. Both are read here into an `Answer`; it is what the journal keeps, less
what has entries of its own (`stripped`). Whatever a stranger writes comes out as an Answer or as BadAnswer, as nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, TypeGuard

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from durable.core import payload
from durable.core.clock import microseconds_of
from durable.core.errors import BadAnswer, ErrorData, PayloadError
from durable.core.retry import RetryPolicy

MAX_OPERATIONS = 10_000
"""Operations one pass may reach."""
MAX_LINES = 10_000
"""Log lines of one pass that are looked at; more are dropped."""
MAX_EVENTS = 100
"""Events one `sendEvent` may carry."""
LONGEST = 100 * 365 * 86_400_000
"""Milliseconds anything may wait."""
NULL = Raw(b"null")

Kind = Literal[
    "step",
    "skip",
    "sleep",
    "wait",
    "signal",
    "send",
    "child",
    "task",
    "webhook",
    "approval",
    "unknown",
]

_encode = msgspec.json.Encoder().encode


class Sending(Struct, frozen=True, omit_defaults=True):
    """An event to be sent."""

    name: str
    data: Raw = NULL
    id: str | None = None
    """The sender's: the same id again changes nothing."""
    app: str | None = None
    """Another app than one's own."""


class Reached(Struct, omit_defaults=True):
    """An operation a pass has reached. Which fields count depends on `kind`; times are µs."""

    kind: Kind
    id: str
    """What memos are found by: of section 4 the author's own id, of section 5 the hash of the name."""
    name: str
    seq: int | None = None
    """Its ordinal, where the app counts."""
    data: Raw | UnsetType = UNSET
    error: ErrorData | None = None
    retry: RetryPolicy | None = None
    until: int | None = None
    """When a sleep or a wait ends."""
    after: int | None = None
    """The same, from now on."""
    event: str = ""
    match: Raw | UnsetType = UNSET
    """What the event must contain."""
    condition: str | None = None
    """What must be true of the event."""
    events: list[Sending] = []
    app: str | None = None
    runner: str | None = None
    version: str | None = None
    on_parent_close: str = "cancel"
    url: str = ""
    ask: dict[str, Any] | None = None
    """Of an approval: what the one who decides is told."""
    group: str | None = None
    transport: str | None = None
    priority: int | None = None
    timeout: int | None = None
    heartbeat: int | None = None
    began: int | None = None
    ended: int | None = None
    word: str = ""
    """How the app called this kind, where it is none of ours."""


class Line(Struct, omit_defaults=True):
    """A log line. Stripped: which one it was."""

    scope: str
    index: int
    level: str = ""
    message: str = ""
    fields: Raw | UnsetType = UNSET


class Answer(Struct, omit_defaults=True):
    """What a pass comes to."""

    status: Literal["continue", "completed", "failed"]
    reached: list[Reached] = []
    data: Raw = NULL
    """The result."""
    error: ErrorData | None = None
    step: str | None = None
    """The operation the error came from, where the app says so."""
    lines: list[Line] = []
    parked: list[str] | None = None
    """Pending operations that the code still waits for, where the app names them."""
    patches: list[str] = []


def encode_answer(answer: Answer) -> bytes:
    """As the driver is handed it. Raises PayloadError for what no store would keep."""
    data = _encode(answer)
    payload.check(data, what="the app's answer", limit=2 * payload.DEFAULT_LIMIT)
    return data


decode_answer: Callable[[bytes], Answer] = msgspec.json.Decoder(Answer).decode


def stripped(data: bytes, seen: Callable[[Line], bool]) -> bytes:
    """What the journal keeps: what steps came to and what lines say stands in entries of their own. `seen`: whether a
    line has been told before; the app repeats them with every pass."""
    answer = decode_answer(data)
    for one in answer.reached:
        if one.kind == "step" and one.error is None:
            one.data = UNSET
    answer.lines = [Line(line.scope, line.index) for line in answer.lines if not seen(line)]
    return _encode(answer)


# ------------------------------------------------------------------ section 4: one operation


class _Operation(Struct):
    op: str
    id: Any = None
    data: Raw | UnsetType = UNSET
    until: Any = None
    event: Any = None
    match: Raw | UnsetType = UNSET
    events: Any = None
    message: Any = None
    name: Any = None
    code: Any = None
    details: Any = None
    retryable: Any = True


def read_operation(body: bytes) -> Answer:
    """The answer of an app that speaks section 4. Raises BadAnswer."""
    one = _read(body, _Operation, "an object with `op`")
    if one.op == "done":
        return Answer("completed", data=_value(one.data))
    if one.op == "error":
        error = ErrorData(
            message=_text(one.message) or "The app gave no reason.",
            code=_text(one.code, 200) or "error",
            type=_text(one.name, 200),
            retryable=one.retryable is not False,
            details=one.details,
        )
        if one.id is None:
            return Answer("failed", error=_bounded(error))
        name = _id(one.id, one.op)
        return Answer("continue", [Reached("step", name, name, error=_bounded(error))])
    if one.op not in ("step", "sleep", "wait", "sendEvent"):
        raise BadAnswer(f"The app answered op {_shown(one.op)}; it is step, sleep, wait, sendEvent, done or error.")
    name = _id(one.id, one.op)
    if one.op == "step":
        return Answer("continue", [Reached("step", name, name, data=_value(one.data))])
    if one.op == "sleep":
        return Answer("continue", [Reached("sleep", name, name, until=_moment(one.until, name))])
    if one.op == "wait":
        match = one.match if isinstance(one.match, Raw) and bytes(one.match) != b"null" else UNSET
        until = None if one.until is None else _moment(one.until, name)
        reached = Reached("wait", name, name, event=_event_name(one.event, name), match=match, until=until)
        return Answer("continue", [reached])
    if not isinstance(one.events, list) or not 1 <= len(one.events) <= MAX_EVENTS:
        raise BadAnswer(f"sendEvent {_shown(name)} carries a list of 1 to {MAX_EVENTS} events.")
    return Answer("continue", [Reached("send", name, name, events=[_sending(event, name) for event in one.events])])


def _sending(event: Any, name: str) -> Sending:
    if not isinstance(event, dict):
        raise BadAnswer(f"An event of sendEvent {_shown(name)} is no object with `name` and `data`.")
    given = event.get("id")
    return Sending(_event_name(event.get("name"), name), Raw(_encode(event.get("data"))), _optional(given, "id"))


# ------------------------------------------------------------------ section 5: a status and opcodes


class _Opcode(Struct, rename="camel"):
    op: str
    id: str
    name: str
    seq: int | None = None
    data: Raw | UnsetType = UNSET
    error: Any = None
    retry: Any = None
    retriable: Any = None
    retry_after_ms: Any = None
    sleep_ms: Any = None
    sleep_until_ms: Any = None
    event_name: Any = None
    timeout_ms: Any = None
    event_if: Any = None
    signal_name: Any = None
    child_name: Any = None
    child_app: Any = None
    child_runner: Any = None
    child_data: Raw | UnsetType = UNSET
    child_version: Any = None
    on_parent_close: Any = None
    target_app: Any = None
    dedupe_id: Any = None
    webhook_url: Any = None
    tool: Any = None
    risk: Any = None
    summary: Any = None
    policy: Any = None
    context: Any = None
    escalates_to: Any = None
    task_name: Any = None
    input: Raw | UnsetType = UNSET
    group: Any = None
    transport: Any = None
    priority: Any = None
    heartbeat_timeout_ms: Any = None
    started_at: Any = None
    finished_at: Any = None


class _Log(Struct, rename="camel"):
    message: Any = ""
    level: Any = "info"
    scope: Any = "root"
    index: Any = None
    fields: Raw | UnsetType = UNSET


class _Body(Struct, rename="camel"):
    data: Raw | UnsetType = UNSET
    opcodes: list[_Opcode] | None = None
    error: Any = None
    logs: Raw | UnsetType = UNSET
    parked: Any = None
    patches: Any = None


_LEVELS = {"trace": "debug", "verbose": "debug", "debug": "debug", "warn": "warn", "warning": "warn"} | dict.fromkeys(
    ["error", "fatal", "critical"], "error"
)


def read_result(status: int, body: bytes) -> Answer:
    """The answer of a runner that speaks section 5. Raises BadAnswer."""
    if status not in (200, 206, 400, 500):
        raise BadAnswer(f"The runner answered status {status}; it is 200, 206, 400 or 500.")
    one = _read(body or b"{}", _Body, "an object")
    lines = _lines(one.logs)
    opcodes = one.opcodes or []
    if len(opcodes) > MAX_OPERATIONS:
        raise BadAnswer(f"A pass reached {len(opcodes):,} operations, and {MAX_OPERATIONS:,} is the most.")
    reached = [_reached(opcode) for opcode in opcodes]
    patches = [one for one in one.patches if isinstance(one, str)] if isinstance(one.patches, list) else []
    if status == 200:
        return Answer("completed", reached, data=_value(one.data), lines=lines, patches=patches)
    if status == 206:
        parked = [one for one in one.parked if isinstance(one, str)] if isinstance(one.parked, list) else None
        return Answer("continue", reached, lines=lines, parked=parked, patches=patches)
    error = _error(one.error, "The runner gave no reason.", retryable=status == 500)
    return Answer("failed", reached, error=error, lines=lines, patches=patches)


def _reached(one: _Opcode) -> Reached:
    name = _id(one.name, one.op)
    if not one.id or len(one.id) > 200:
        raise BadAnswer(f"Operation {_shown(name)} has no id; it is the SHA-256 of its name, in hexadecimal digits.")
    read = _OPCODES.get(one.op)
    if read is None:
        return Reached("unknown", one.id, name, one.seq, word=_text(one.op, 100))
    if one.seq is not None and not 0 <= one.seq < 1_000_000_000:
        raise BadAnswer(f"Operation {_shown(name)} stands at {one.seq}, which is no position.")
    found = read(one, name)
    found.seq = one.seq
    return found


def _step_run(one: _Opcode, name: str) -> Reached:
    found = Reached("step", one.id, name, retry=retry_policy(one.retry), began=_ms(one.started_at))
    found.ended = _ms(one.finished_at)
    if one.error is None:
        found.data = _value(one.data)
        return found
    after = one.retry_after_ms
    found.error = _error(
        one.error,
        "The step failed, and the runner gave no reason.",
        retryable=one.retriable is not False,
        retry_after=None if not _is_number(after) or after < 0 else after / 1_000,
    )
    return found


def _wait_for_event(one: _Opcode, name: str) -> Reached:
    condition = _optional(one.event_if, "eventIf")
    after = None if one.timeout_ms is None else _duration(one.timeout_ms, name)
    return Reached("wait", one.id, name, event=_event_name(one.event_name, name), condition=condition, after=after)


def _run_workflow(one: _Opcode, name: str) -> Reached:
    return Reached(
        "child",
        one.id,
        name,
        event=_event_name(one.child_name, name),
        data=_value(one.child_data),
        app=_optional(one.child_app, "childApp"),
        runner=_optional(one.child_runner, "childRunner"),
        version=_optional(one.child_version, "childVersion"),
        on_parent_close="abandon" if one.on_parent_close == "abandon" else "cancel",
    )


def _emit(one: _Opcode, name: str) -> Reached:
    sending = Sending(
        _event_name(one.event_name, name),
        _value(one.data),
        _optional(one.dedupe_id, "dedupeId"),
        _optional(one.target_app, "targetApp"),
    )
    return Reached("send", one.id, name, events=[sending])


def _webhook(one: _Opcode, name: str) -> Reached:
    url = one.webhook_url
    if not isinstance(url, str) or not url or len(url) > 4_000:
        raise BadAnswer(f"Webhook {_shown(name)} has no webhookUrl.")
    return Reached("webhook", one.id, name, url=url, data=_value(one.data), retry=retry_policy(one.retry))


def _approval(one: _Opcode, name: str) -> Reached:
    ask = {
        "tool": one.tool,
        "risk": one.risk,
        "summary": one.summary,
        "policy": one.policy,
        "context": one.context,
        "escalatesTo": one.escalates_to,
    }
    after = None if one.timeout_ms is None else _duration(one.timeout_ms, name)
    said = {key: value for key, value in ask.items() if value is not None}
    return Reached("approval", one.id, name, data=_value(one.data), after=after, ask=said)


def _send_task(one: _Opcode, name: str) -> Reached:
    return Reached(
        "task",
        one.id,
        name,
        event=_event_name(one.task_name, name),
        data=_value(one.input),
        retry=retry_policy(one.retry),
        group=_optional(one.group, "group"),
        transport=_optional(one.transport, "transport"),
        priority=one.priority if isinstance(one.priority, int) else None,
        timeout=None if one.timeout_ms is None else _duration(one.timeout_ms, name),
        heartbeat=None if one.heartbeat_timeout_ms is None else _duration(one.heartbeat_timeout_ms, name),
    )


def _signal(one: _Opcode, name: str) -> Reached:
    after = None if one.timeout_ms is None else _duration(one.timeout_ms, name)
    return Reached("signal", one.id, name, event=_event_name(one.signal_name, name), after=after)


_OPCODES: dict[str, Callable[[_Opcode, str], Reached]] = {
    "StepRun": _step_run,
    "Skip": lambda one, name: Reached("skip", one.id, name),
    "Sleep": lambda one, name: Reached("sleep", one.id, name, after=_duration(one.sleep_ms, name)),
    "SleepUntil": lambda one, name: Reached("sleep", one.id, name, until=_epoch(one.sleep_until_ms, name)),
    "WaitForEvent": _wait_for_event,
    "WaitForSignal": _signal,
    "RunWorkflow": _run_workflow,
    "Emit": _emit,
    "Webhook": _webhook,
    "Approval": _approval,
    "SendTask": _send_task,
}


def retry_policy(given: Any) -> RetryPolicy | None:
    """`{maxAttempts, backoff, initialDelayMs, maxDelayMs}` as a policy; None where there is none. Raises BadAnswer."""
    if given is None:
        return None
    if isinstance(given, int) and not isinstance(given, bool):
        given = {"maxAttempts": given}
    if not isinstance(given, dict):
        raise BadAnswer("A retry is an object with maxAttempts, backoff, initialDelayMs, maxDelayMs.")
    plain = RetryPolicy()
    backoff = given.get("backoff", "exponential")
    attempts = given.get("maxAttempts", plain.max_attempts)
    initial = given.get("initialDelayMs", plain.initial_delay * 1_000)
    longest = given.get("maxDelayMs", plain.max_delay * 1_000)
    if backoff not in ("fixed", "linear", "exponential"):
        raise BadAnswer(f"A retry's backoff is fixed, linear or exponential, not {_shown(backoff)}.")
    if not isinstance(attempts, int) or isinstance(attempts, bool) or not 0 <= attempts <= 1_000_000:
        raise BadAnswer(f"A retry's maxAttempts is a number from 1, not {_shown(attempts)}.")
    for delay in (initial, longest):
        if not _is_number(delay) or not 0 <= delay <= LONGEST:
            raise BadAnswer(f"A retry's delays are milliseconds, not {_shown(delay)}.")
    factor, jitter = given.get("factor"), given.get("jitter")
    return RetryPolicy(
        max_attempts=max(1, attempts),
        backoff=backoff,
        initial_delay=initial / 1_000,
        max_delay=longest / 1_000,
        factor=factor if _is_number(factor) and 1 <= factor <= 1_000 else plain.factor,
        jitter=jitter if _is_number(jitter) and 0 <= jitter <= 1 else plain.jitter,
    )


def _lines(given: Raw | UnsetType) -> list[Line]:
    """Whatever can be read of them: how a pass tells of itself decides nothing."""
    if not isinstance(given, Raw) or bytes(given)[:1] != b"[":
        return []
    found: list[Line] = []
    counts: dict[str, int] = {}
    for raw in msgspec.json.decode(given, type=list[Raw])[:MAX_LINES]:
        try:
            one = msgspec.json.decode(raw, type=_Log)
        except msgspec.MsgspecError:
            continue
        scope = _text(one.scope, 300) or "root"
        index = one.index if isinstance(one.index, int) and one.index >= 0 else counts.get(scope, 0)
        counts[scope] = index + 1
        level = _LEVELS.get(str(one.level).lower(), "info")
        fields = one.fields if isinstance(one.fields, Raw) and bytes(one.fields)[:1] == b"{" else UNSET
        found.append(Line(scope, index, level, _text(one.message, payload.MAX_MESSAGE), fields))
    return found


# ------------------------------------------------------------------ small things a stranger may get wrong


def _read(body: bytes, wanted: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(body, type=wanted)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # What it says is not repeated: it may be somebody's secret page.
        raise BadAnswer(f"The app's answer is not what it should be, {what}: {_place(error)}") from None


def _place(error: Exception) -> str:
    if isinstance(error, msgspec.ValidationError):
        return str(error)[:300]
    return "it is no JSON."


def _value(data: Raw | UnsetType) -> Raw:
    return NULL if isinstance(data, UnsetType) else data


def _id(given: Any, op: str) -> str:
    if not isinstance(given, str) or not given:
        raise BadAnswer(f"A {_shown(op)} has no id or name.")
    if len(given) > 200:
        raise BadAnswer(f"The name of an operation has at most 200 characters, this one {len(given)}.")
    return given


def _event_name(given: Any, name: str) -> str:
    if not isinstance(given, str) or not given or len(given) > 200:
        raise BadAnswer(f"Operation {_shown(name)} has to name what it is about, in 1 to 200 characters.")
    return given


def _optional(given: Any, what: str) -> str | None:
    if given is None or given == "":
        return None
    if not isinstance(given, str) or len(given) > 2_000:
        raise BadAnswer(f"{what} is text of at most 2,000 characters.")
    return given


def _is_number(given: Any) -> TypeGuard[float]:
    return isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)


def _duration(given: Any, name: str) -> int:
    if not _is_number(given) or not 0 <= given <= LONGEST:
        raise BadAnswer(f"Operation {_shown(name)} waits for {_shown(given)} ms, which is none, or too long.")
    return round(given * 1_000)


def _epoch(given: Any, name: str) -> int:
    if not _is_number(given) or not -LONGEST <= given <= 3 * LONGEST:
        raise BadAnswer(
            f"Operation {_shown(name)} waits until {_shown(given)}, which is no time in epoch milliseconds."
        )
    return round(given * 1_000)


def _moment(given: Any, name: str) -> int:
    """ISO 8601 as µs; without a zone it is UTC."""
    try:
        if _is_number(given):
            return _epoch(given, name)
        moment = datetime.fromisoformat(given)
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return microseconds_of(moment)
    except (TypeError, ValueError, OverflowError):
        raise BadAnswer(
            f"Operation {_shown(name)} waits until {_shown(given)}, which is no ISO 8601 time such as 2026-01-31T09:00:00Z."
        ) from None


def _ms(given: Any) -> int | None:
    return round(given * 1_000) if _is_number(given) and 0 <= given <= 3 * LONGEST else None


def _text(given: Any, limit: int = payload.MAX_MESSAGE) -> str:
    if given is None:
        return ""
    return payload.clean(given if isinstance(given, str) else str(given))[:limit]


def _shown(given: Any) -> str:
    return repr(given)[:100]


def _error(given: Any, otherwise: str, *, retryable: bool, retry_after: float | None = None) -> ErrorData:
    """`{message, stack?}` and, of ours, the rest of an ErrorData."""
    said = given if isinstance(given, dict) else {"message": given}
    stack = said.get("stack")
    after = said.get("retryAfter")
    if retry_after is None and _is_number(after) and after >= 0:
        retry_after = after
    error = ErrorData(
        message=_text(said.get("message")) or otherwise,
        code=_text(said.get("code"), 200) or "error",
        type=_text(said.get("type") or said.get("name"), 200),
        retryable=retryable and said.get("retryable") is not False,
        retry_after=retry_after,
        details=said.get("details"),
        stack=_text(stack, payload.MAX_STACK) or None,
    )
    return _bounded(error)


def _bounded(error: ErrorData) -> ErrorData:
    try:
        return payload.decode_error(payload.encode_error(error))
    except PayloadError:
        return ErrorData(message=error.message, code=error.code, type=error.type, retryable=error.retryable)
