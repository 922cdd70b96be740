"""Answers a transport gives by itself, worded once so that every transport gives the same ones."""

from __future__ import annotations

from durable.core.errors import ErrorData
from durable.protocol.messages import RemoteTask, StepResult


def no_handler(task: RemoteTask) -> StepResult:
    """Nobody here serves this name: trying again would not help."""
    message = f"no handler for {task.name}"
    return failed(task, ErrorData(message=message, code="unknown_step", retryable=False))


def crashed(task: RemoteTask, error: BaseException) -> StepResult:
    """The handler raised where it should have answered: retryable, because nothing is known about the next attempt."""
    message = str(error) or type(error).__name__
    code = str(getattr(error, "code", "error"))
    return failed(task, ErrorData(message=message, code=code, type=type(error).__name__))


def too_large(task: RemoteTask, size: int, limit: int) -> StepResult:
    """The output does not fit: it would not fit the next time either."""
    message = (
        f"{task.name} returned {size} bytes, the transport carries {limit}: return a reference to the data instead"
    )
    return failed(task, ErrorData(message=message, code="payload_too_large", retryable=False))


def failed(task: RemoteTask, error: ErrorData) -> StepResult:
    """A failed result for this attempt."""
    return StepResult(
        run_id=task.run_id, seq=task.seq, step_id=task.step_id, status="failed", error=error, attempt=task.attempt
    )
