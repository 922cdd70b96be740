"""Messages to bytes and back, with every bound that a stranger's message must meet.

Decides what may enter from a wire. Called by transports, control planes and workers, on both ends. Fields it does not
know are ignored. A message that cannot be read raises PayloadError; but a result that says which step it is for is
always an answer: if its content cannot be kept, that step has failed, so that no run waits for it for ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, structs

from durable.core import payload
from durable.core.errors import ErrorData, PayloadError, PayloadText, PayloadTooLarge
from durable.protocol import lenient
from durable.protocol.messages import (
    Answer,
    ControlMessage,
    Heartbeat,
    RemoteTask,
    StartRunRequest,
    StepEvent,
    StepResult,
    Task,
    WorkflowDecision,
    WorkflowStepEvent,
    WorkflowTask,
    step_id,
)

Message = Task | Answer | Heartbeat | ControlMessage | WorkflowStepEvent | StartRunRequest
M = TypeVar("M", bound=Message)

ENVELOPE = 256 << 10
"""Bytes a message may have beside its payload: ids, trace, context, events, an error."""
MAX_MESSAGE = 64 << 20
"""Bytes of a result that are still looked into for whose it is."""
MAX_EVENTS = 1_000
"""Lines one result may tell; more are dropped."""

_encode = msgspec.json.Encoder().encode


class _Address(Struct, rename="camel"):
    """The part of a result that says which step it answers."""

    run_id: str
    seq: int
    step_id: str
    attempt: int | None = None


def encode(message: Message, *, limit: int = payload.DEFAULT_LIMIT) -> bytes:
    """A message as bytes; payloads in it are taken as they are, encoded before. Raises PayloadTooLarge, PayloadText."""
    what = f"the {type(message).__name__}"
    try:
        data = _encode(message)
    except UnicodeEncodeError as error:
        raise PayloadText(f"{what} contains half a surrogate pair, which no wire carries. Remove it.") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(f"{what} cannot be written as JSON: {error}") from error
    if len(data) > limit + ENVELOPE:
        raise PayloadTooLarge(
            f"{what} is {len(data)} bytes; the limit is {limit + ENVELOPE}. Store the data elsewhere and pass its id."
        )
    return data


class _Shape(Struct, rename="camel"):
    """What tells a step's task or result from a turn's."""

    workflow: str | None = None
    history: list[Raw] | None = None
    task_id: str | None = None
    step_id: str | None = None


def decode_any_task(data: bytes, *, limit: int = payload.DEFAULT_LIMIT) -> Task:
    """A step's task, or a turn's: `workflow` is a text and `history` a list. Raises PayloadError."""
    if b'"history"' in data:  # spares most tasks a second look
        shape = _shape(data)
        if shape.workflow is not None and shape.history is not None:
            return decode_turn(data)
    return decode_task(data, limit=limit)


def decode_answer(data: bytes, *, limit: int = payload.DEFAULT_LIMIT) -> Answer:
    """A step's result, or a turn's decision, where both come the same way. Raises PayloadError."""
    shape = _shape(data) if b'"taskId"' in data else _Shape()
    if shape.task_id is not None and shape.step_id is None:
        return decode_decision(data)
    return decode_result(data, limit=limit)


def decode_turn(data: bytes) -> WorkflowTask:
    """A turn has a history, so it may be as large as any message. Raises PayloadError."""
    return _decode(data, WorkflowTask, MAX_MESSAGE, lenient.turn)


class _Turn(Struct, rename="camel"):
    """The part of a decision that says which turn it answers."""

    task_id: str
    run_id: str


def decode_decision(data: bytes) -> WorkflowDecision:
    """The decision; a failed one in its place if it cannot be read, so that its run does not ask for it for ever. Raises
    PayloadError if it is nobody's."""
    try:
        return _decode(data, WorkflowDecision, MAX_MESSAGE, lenient.decision)
    except PayloadError as error:
        try:
            turn: _Turn = msgspec.convert(json.loads(data[: MAX_MESSAGE + ENVELOPE]), _Turn)
        except (ValueError, RecursionError):
            raise error from None
        if "\0" in turn.run_id or "\0" in turn.task_id:
            raise
        reason = ErrorData(
            message=f"The worker's decision cannot be read: {error}", code="bad_decision", retryable=False
        )
        return WorkflowDecision(task_id=turn.task_id, run_id=turn.run_id, status="failed", error=reason)


def decode_step_event(data: bytes) -> WorkflowStepEvent:
    """Raises PayloadError."""
    return _decode(data, WorkflowStepEvent, payload.DEFAULT_LIMIT)


def decode_start_run(data: bytes, *, limit: int = payload.DEFAULT_LIMIT) -> StartRunRequest:
    """Raises PayloadError."""
    return _decode(data, StartRunRequest, limit)


def _shape(data: bytes) -> _Shape:
    """Nothing at all where it cannot be read; whoever decodes it next says why."""
    try:
        return msgspec.json.decode(data, type=_Shape)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _Shape()


def decode_task(data: bytes, *, limit: int = payload.DEFAULT_LIMIT) -> RemoteTask:
    """Raises PayloadError."""
    task = _decode(data, RemoteTask, limit, _without_input)
    if len(bytes(task.input)) > limit:
        payload.check(bytes(task.input), what=f"the input of {task.name}", limit=limit)
    _check_address(task.run_id, task.seq, task.step_id)
    return task


def decode_result(data: bytes, *, limit: int = payload.DEFAULT_LIMIT) -> StepResult:
    """The result; a failed one in its place if its content cannot be kept. Raises PayloadError if it is nobody's."""
    address = _address(data)
    try:
        return _result(data, limit)
    except PayloadError as error:
        return StepResult(
            run_id=address.run_id,
            seq=address.seq,
            step_id=address.step_id,
            attempt=address.attempt,
            status="failed",
            error=ErrorData(message=str(error), code=error.code, type=type(error).__name__, retryable=False),
        )


def decode_heartbeat(data: bytes) -> Heartbeat:
    """Raises PayloadError."""
    return _decode(data, Heartbeat, 0)


def decode_control(data: bytes) -> ControlMessage:
    """Raises PayloadError; whoever listens drops such a message, it was only a hint."""
    return _decode(data, ControlMessage, payload.DEFAULT_LIMIT)


def _decode(data: bytes, kind: type[M], limit: int, otherwise: Callable[[bytes], M] | None = None) -> M:
    what = f"a {kind.__name__}"
    payload.check(data, what=what, limit=limit + ENVELOPE)
    return _read(data, kind, what, otherwise)


def _read(data: bytes, kind: type[M], what: str, otherwise: Callable[[bytes], M] | None) -> M:
    """`otherwise`: how to read what does not fit strictly."""
    try:
        message: M = payload.decode(data, kind, what=what)
    except PayloadError as refused:
        if otherwise is None:
            raise
        try:
            return otherwise(data)
        except PayloadError:
            raise refused from None
    return message


def _without_input(data: bytes) -> RemoteTask:
    """Some makes leave an input that is undefined out."""
    said = payload.decode(data, dict[str, Raw], what="a RemoteTask")
    if "input" in said:
        raise PayloadError("It is not the input that is missing.")
    task: RemoteTask = payload.decode(msgspec.json.encode(said | {"input": None}), RemoteTask, what="a RemoteTask")
    return task


def _address(data: bytes) -> _Address:
    what = "a StepResult"
    if len(data) > MAX_MESSAGE:
        raise PayloadTooLarge(f"{what} is {len(data)} bytes; nothing over {MAX_MESSAGE} is read.")
    try:
        address: _Address = payload.decode(data, _Address, what=what)
    except PayloadError as error:
        address = _lenient_address(data, error)
    _check_address(address.run_id, address.seq, address.step_id)
    return address


def _lenient_address(data: bytes, refused: PayloadError) -> _Address:
    """Half a surrogate pair or a NaN breaks a strict parser on the whole message, and some write numbers otherwise; whose it
    is can still be told."""
    try:
        said = json.loads(data)
        if isinstance(said, dict):
            said["attempt"] = lenient.number(said.get("attempt"))
        address: _Address = msgspec.convert(said, _Address)
    except (ValueError, RecursionError):
        raise refused from None
    return address


def _check_address(run_id: str, seq: int, step: str) -> None:
    if "\0" in run_id:
        raise PayloadText("A run id contains a NUL character.")
    if seq < 0 or seq > 2**53 or step != step_id(run_id, seq):
        raise PayloadError(f"stepId {ascii(step)[:200]} is not <runId>:<seq> of run {ascii(run_id)[:100]}, seq {seq}.")


def _result(data: bytes, limit: int) -> StepResult:
    result = _read(data, StepResult, "a StepResult", lenient.result)
    events = None if result.events is None else [_tidy(event) for event in result.events[:MAX_EVENTS]]
    if result.status == "failed":
        # Errors are kept whatever they say: cleaned, bounded, never refused.
        error = _kept(result.error or ErrorData(message="The worker said failed, and not why."))
        return structs.replace(result, events=events, output=UNSET, error=error)
    output = result.output if isinstance(result.output, Raw) else Raw(b"null")
    payload.check(bytes(output), what=f"the result of {result.step_id}", limit=limit)
    return structs.replace(result, events=events, output=output, error=None)


def _kept(error: ErrorData) -> ErrorData:
    return payload.decode_error(payload.encode_error(error))


def _tidy(event: StepEvent) -> StepEvent:
    """A line for the journal: its text cleaned; data that cannot be kept is left out, never the reason to fail."""
    try:
        payload.encode(event, what="an event", limit=ENVELOPE)
    except PayloadError:
        return StepEvent(at=event.at, level=event.level, message=payload.clean(event.message[: payload.MAX_MESSAGE]))
    return event
