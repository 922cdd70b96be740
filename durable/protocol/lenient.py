"""Answers of other makes that mean what we mean and write it slightly otherwise: a time with a fraction, null for what is not
there, a level we do not know. Read here when the strict reading has failed, so what is in order costs nothing.

What a worker has done is never lost to how it tells of it: ids, status and payload must be right, everything else is taken as
far as it can be understood, and left out where it cannot. Raises PayloadError where the former are not right.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from durable.core.errors import ErrorData, PayloadError
from durable.protocol.messages import StepEvent, StepResult, TurnCommand, WorkflowDecision, WorkflowTask

_NULL = Raw(b"null")
_SAFE = 2**53
Level = Literal["debug", "info", "warn", "error"]
_LEVELS: dict[str, Level] = {
    "trace": "debug",
    "verbose": "debug",
    "debug": "debug",
    "info": "info",
    "warn": "warn",
    "warning": "warn",
    "error": "error",
    "fatal": "error",
    "critical": "error",
}


class _Result(Struct, rename="camel"):
    run_id: str
    step_id: str
    status: Literal["completed", "failed"]
    seq: Any = None
    output: Raw | UnsetType = UNSET
    error: Any = None
    started_at: Any = None
    events: Any = None
    attempt: Any = None
    token: Any = None


class _Command(Struct, rename="camel"):
    kind: str
    seq: Any = None
    parallel_group: Any = None
    name: Any = None
    group: Any = None
    input: Raw = _NULL
    output: Raw | UnsetType = UNSET
    error: Any = None
    started_at: Any = None
    finished_at: Any = None
    events: Any = None
    ms: Any = None
    signal: Any = None
    workflow: Any = None


class _Decision(Struct, rename="camel"):
    task_id: str
    run_id: str
    status: Literal["continue", "completed", "failed", "cancelled"]
    commands: list[_Command] | None = None
    output: Raw | UnsetType = UNSET
    error: Any = None
    patches: list[str] | None = None
    logs: Any = None


def result(data: bytes) -> StepResult:
    """A step's result."""
    said = _read(data, _Result)
    return StepResult(
        run_id=said.run_id,
        seq=_seq(said.seq),
        step_id=said.step_id,
        status=said.status,
        output=said.output,
        error=error(said.error),
        started_at=number(said.started_at),
        events=events(said.events),
        attempt=number(said.attempt),
        token=text(said.token),
    )


def decision(data: bytes) -> WorkflowDecision:
    """A turn's answer."""
    said = _read(data, _Decision)
    return WorkflowDecision(
        task_id=said.task_id,
        run_id=said.run_id,
        status=said.status,
        commands=[_command(one) for one in said.commands or ()],
        output=said.output,
        error=error(said.error),
        patches=said.patches,
        logs=events(said.logs),
    )


def turn(data: bytes) -> WorkflowTask:
    """A turn of an engine that leaves out what is undefined (an input, a signal's payload), or hands on a step's error as the
    worker wrote it. Everything else must be right."""
    said = _read(data, dict[str, Raw])
    said.setdefault("input", _NULL)
    if "history" in said:
        said["history"] = _encoded([_mended(item) for item in _read(said["history"], list[dict[str, Raw]])])
    if "pendingSignals" in said:
        signals = _read(said["pendingSignals"], list[dict[str, Raw]] | None)
        said["pendingSignals"] = _encoded(signals and [{"payload": _NULL, **signal} for signal in signals])
    return _read(_encoded(said), WorkflowTask)  # type: ignore[no-any-return]


def _mended(item: dict[str, Raw]) -> dict[str, Raw]:
    return {**item, "error": _encoded(error(_read(item["error"], Any)))} if "error" in item else item


def _encoded(value: Any) -> Raw:
    return Raw(msgspec.json.encode(value))


def _command(said: _Command) -> TurnCommand:
    """Strict again, once the optional part of it is in order."""
    fields: dict[str, Any] = {"kind": said.kind, "seq": _seq(said.seq), "parallelGroup": text(said.parallel_group)}
    match said.kind:
        case "call":
            fields |= {"name": said.name, "group": text(said.group) or "", "input": said.input}
        case "recordStep":
            failure = error(said.error)
            fields |= {
                "name": said.name,
                "error": failure,
                "startedAt": number(said.started_at),
                "finishedAt": number(said.finished_at),
                "events": events(said.events),
            }
            if failure is None:
                fields["output"] = _NULL if isinstance(said.output, UnsetType) else said.output
        case "sleep":
            fields["ms"] = number(said.ms, most=1 << 62)
        case "waitSignal":
            fields["signal"] = said.signal
        case "startChild":
            fields |= {"workflow": said.workflow, "input": said.input}
    command: TurnCommand = _read(msgspec.json.encode(fields), TurnCommand)
    return command


def error(said: Any) -> ErrorData | None:
    """Of whatever stands where an error should; None for nothing at all."""
    if said is None:
        return None
    if not isinstance(said, dict):
        return ErrorData(message=_words(said))
    message, code, retryable = said.get("message"), said.get("code"), said.get("retryable")
    after = said.get("retryAfter")
    return ErrorData(
        message="The worker said failed, and not why." if message is None else _words(message),
        code="error" if code is None else _words(code),
        type=text(said.get("type")) or "",
        retryable=retryable if isinstance(retryable, bool) else True,
        retry_after=after if isinstance(after, int | float) and not isinstance(after, bool) else None,
        details=said.get("details"),
        stack=text(said.get("stack")),
    )


def events(said: Any) -> list[StepEvent] | None:
    """Those of a worker's lines that can be understood."""
    if not isinstance(said, list):
        return None
    return [event(one) for one in said if isinstance(one, dict)]


def event(said: dict[str, Any]) -> StepEvent:
    """One line. A level we do not know is `info`; a time that is none is 0."""
    message, status = said.get("message"), said.get("status")
    return StepEvent(
        at=number(said.get("at")) or 0,
        level=_LEVELS.get(str(said.get("level")).lower(), "info"),
        message="" if message is None else _words(message),
        data=said.get("data"),
        sub_id=text(said.get("subId")),
        name=text(said.get("name")),
        group=text(said.get("group")),
        status=status if status in ("ok", "failed", "skipped") else None,
        phase=text(said.get("phase")),
        process=text(said.get("process")),
        index=number(said.get("index")),
    )


def number(said: Any, *, most: int = _SAFE) -> int | None:
    """A whole number from 0; None for anything else. A fraction is cut off."""
    if isinstance(said, bool) or not isinstance(said, int | float) or not math.isfinite(said):
        return None
    return int(said) if 0 <= said <= most else None


def text(said: Any) -> str | None:
    """A text, or nothing."""
    return said if isinstance(said, str) else None


def _seq(said: Any) -> int:
    """Whole: a place is not rounded to."""
    found = number(said)
    if found is None or (isinstance(said, float) and said != found):
        raise PayloadError(f"seq is {ascii(said)[:100]}, and not a whole number from 0.")
    return found


def _words(said: Any) -> str:
    return said if isinstance(said, str) else msgspec.json.encode(said).decode()


def _read(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as refused:
        raise PayloadError(str(refused)) from refused
