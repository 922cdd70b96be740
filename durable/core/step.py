"""What a step body may know of itself: `current_step()`.

Set by whoever runs the body, the engine for `ctx.step`, a worker for a remote step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from msgspec import Struct

from durable.core.errors import DurableError


class StepScope(Struct, eq=False):
    """The step under way."""

    run_id: str
    step_id: str
    """`<runId>:<ordinal>`: the same for every attempt and redelivery."""
    key: str
    name: str
    attempt: int
    """From 1."""
    _write: Callable[[str, str, dict[str, Any]], None]

    @property
    def idempotency_key(self) -> str:
        """Hand it to whatever the step calls: a body may run twice, and the other side can tell by this."""
        return self.step_id

    def log(self, message: str, *, level: str = "info", **fields: Any) -> None:
        """Write a line to the run's journal, under this step."""
        self._write(level, message, fields)


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
