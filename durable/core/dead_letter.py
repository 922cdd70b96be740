"""What is told of a run that is dead: the letter, and the mark of who reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

from durable.core.definition import STEP_MARK, durable_step, step_of
from durable.core.durations import Duration
from durable.core.errors import ErrorData
from durable.core.retry import RetryPolicy

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class DeadLetter:
    """A run that used up its recovery attempts. The input is as it was sent, untyped."""

    run_id: str
    workflow: str
    version: str
    input: Any
    error: ErrorData
    recovery_attempts: int


@overload
def dead_letter(name: T, /) -> T: ...
@overload
def dead_letter(
    name: str | None = None, *, retries: int | RetryPolicy | None = None, timeout: Duration | None = None
) -> Callable[[T], T]: ...
def dead_letter(name: Any = None, *, retries: int | RetryPolicy | None = None, timeout: Duration | None = None) -> Any:
    """Make a function or method `(letter: DeadLetter)` a reader of dead letters: a step, run once for each dead run."""

    def decorate(target: T) -> T:
        plain = name is None or name is target
        durable_step(None if plain else name, retries=retries, timeout=timeout)(target)
        setattr(target, STEP_MARK, replace(step_of(target), dead_letter=True))
        return target

    return decorate(name) if callable(name) else decorate
