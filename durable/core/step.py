"""What a step body may know and tell of itself: `current_step()`.

Set by whoever runs the body, the engine for `ctx.step`, a worker for a remote step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from msgspec import Struct

from durable.core.errors import DurableError, StepCancelled

PROGRESS_SECONDS = 0.1
"""A body that tells of its progress more often is not heard more often."""

Write = Callable[[str, str, dict[str, Any], bool], None]
"""Takes a line: level, message, fields, and whether it tells of progress, so that the next of that kind may replace it."""


class StepScope(Struct, eq=False):
    """The step under way."""

    run_id: str
    step_id: str
    """`<runId>:<ordinal>`: the same for every attempt and redelivery."""
    key: str
    name: str
    attempt: int
    """From 1."""
    _write: Write
    traceparent: str | None = None
    """W3C, of the run's trace, where whoever sent the task has one."""
    context: dict[str, Any] | None = None
    """What came with the task beside its input; opaque."""
    webhooks: Any = None
    """What the engine does for webhooks (core/webhooks.py); None in a worker."""
    cancelled: bool = False
    """Whether nobody waits for the body any more: the run was cancelled, the step took too long, the process stops. An
    `async def` is told by CancelledError; a plain `def` has to look."""

    @property
    def idempotency_key(self) -> str:
        """Hand it to whatever the step calls: a body may run twice, and the other side can tell by this."""
        return self.step_id

    def log(self, message: str, *, level: str = "info", **fields: Any) -> None:
        """Write a line to the run's journal, under this step. Raises PayloadError for fields that are no JSON."""
        self._write(level, message, fields, False)

    def progress(self, value: Any, message: str = "", **fields: Any) -> None:
        """Say how far it is: a fraction from 0 to 1, or anything that is JSON. A line of the journal with the field
        `progress`; said too often, the last one counts. Raises PayloadError."""
        if not message:
            part = isinstance(value, float) and 0.0 <= value <= 1.0
            message = f"{value:.0%}" if part else "progress"
        self._write("info", message, {"progress": value} | fields, True)

    def raise_if_cancelled(self) -> None:
        """For a plain `def` between two pieces of work. Raises StepCancelled."""
        if self.cancelled:
            raise StepCancelled(f"Nobody waits for step {self.name} any more.")


class Pace:
    """Lets the first line of progress through, and then one every `PROGRESS_SECONDS`."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._next = float("-inf")

    def may(self) -> bool:
        now = self._monotonic()
        if now < self._next:
            return False
        self._next = now + PROGRESS_SECONDS
        return True


StepObserver = Callable[[StepScope], None]
"""Told of each attempt, in its place, just before the body. What it raises is the attempt's failure: how tests fail a step."""

_CURRENT: ContextVar[StepScope | None] = ContextVar("durable_step", default=None)


def current_step() -> StepScope:
    """The step whose body calls this. Raises DurableError outside of one."""
    scope = _CURRENT.get()
    if scope is None:
        raise DurableError("current_step() was called outside a step body; in a workflow use ctx instead.")
    return scope


def enter_step(scope: StepScope, observer: StepObserver | None = None) -> None:
    """Set the scope for the current context, and tell the observer."""
    _CURRENT.set(scope)
    if observer is not None:
        observer(scope)
