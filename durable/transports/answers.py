"""Answers a transport gives by itself, worded once so that every transport gives the same ones."""

from __future__ import annotations

from durable.core.errors import ErrorData, PayloadError
from durable.protocol.messages import Answer, RemoteTask, StepResult, Task, WorkflowDecision


def no_handler(task: Task) -> Answer:
    """Nobody here serves this name: trying again would not help."""
    message = f"no handler for {task.name}"
    return failed(task, ErrorData(message=message, code="unknown_step", retryable=False))


def crashed(task: Task, error: BaseException) -> Answer:
    """The handler raised where it should have answered: retryable, because nothing is known about the next attempt; but an
    answer that no wire carries is no better the next time."""
    message = str(error) or type(error).__name__
    code = str(getattr(error, "code", "error"))
    retryable = not isinstance(error, PayloadError)
    return failed(task, ErrorData(message=message, code=code, type=type(error).__name__, retryable=retryable))


def too_large(task: Task, size: int, limit: int) -> Answer:
    """The output does not fit: it would not fit the next time either."""
    message = (
        f"{task.name} returned {size} bytes, the transport carries {limit}: return a reference to the data instead"
    )
    return failed(task, ErrorData(message=message, code="payload_too_large", retryable=False))


def given_up(task: RemoteTask, reason: str) -> StepResult:
    """The broker has given up on it: a worker died with it too often, or nobody took it. The step's own retries decide."""
    message = f"remote step worker failed: {reason}"
    result = failed(task, ErrorData(message=message, code="worker_failed", type="WorkerFailed"))
    assert isinstance(result, StepResult)
    return result


def cancelled(task: Task) -> Answer:
    """Its run was cancelled, or the task was, by a word that may be late: retryable, so that a run which still waits for it,
    cleaning up, is not left without an answer."""
    what = "step" if isinstance(task, RemoteTask) else "turn"
    return failed(task, ErrorData(message=f"The {what} was cancelled.", code="step_cancelled", type="StepCancelled"))


def failed(task: Task, error: ErrorData) -> Answer:
    """A failed answer for this attempt."""
    if isinstance(task, RemoteTask):
        return StepResult(
            run_id=task.run_id,
            seq=task.seq,
            step_id=task.step_id,
            status="failed",
            error=error,
            attempt=task.attempt,
            token=task.token,
        )
    return WorkflowDecision(task_id=task.task_id, run_id=task.run_id, status="failed", error=error)
