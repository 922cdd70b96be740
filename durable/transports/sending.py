"""What every transport does to a message before its broker gets it."""

from __future__ import annotations

from durable.core.errors import PayloadError, TransportError
from durable.protocol.codec import encode
from durable.protocol.messages import Answer, StepResult, Task, WorkflowDecision


def encoded(message: Task | Answer, *, carrier: str, limit: int) -> bytes:
    """A task or an answer as bytes, at most `limit`. Raises TransportError."""
    try:
        data = encode(message, limit=limit)
    except PayloadError as error:
        raise TransportError(f"{_called(message)} cannot be sent: {error}") from error
    check_size(message, len(data), carrier=carrier, limit=limit)
    return data


def check_size(message: Task | Answer, size: int, *, carrier: str, limit: int) -> None:
    """Raises TransportError for more bytes than the transport carries. `carrier`: what it is called in the sentence."""
    if size > limit:
        raise TransportError(
            f"{_called(message)} has {size} bytes and {carrier} carries {limit}: send a reference to the data instead, or "
            "raise max_message."
        )


def _called(message: Task | Answer) -> str:
    what = "answer of" if isinstance(message, StepResult | WorkflowDecision) else "task"
    return f"The {what} {message.id}"
