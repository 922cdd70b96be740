"""Durable: workflows that survive crashes. What an author needs, by one import; the rest by its own path.

Names are imported when first used, so that `durable --help` does not pay for an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.core.ctx import ChildHandle, Context
    from durable.core.dead_letter import DeadLetter, dead_letter
    from durable.core.definition import durable_step, workflow
    from durable.core.errors import (
        ChildFailed,
        DurableError,
        IdempotencyConflict,
        NonRetryable,
        RetryAfter,
        RunCancelled,
        RunDead,
        RunFailed,
        RunTimeout,
        StepCancelled,
        StepFailed,
        StepTimeout,
        WaitTimeout,
    )
    from durable.core.event import Event
    from durable.core.flow import (
        Batch,
        Concurrency,
        Debounce,
        Fairness,
        RateLimit,
        Singleton,
        Throttle,
        Trigger,
    )
    from durable.core.hosted import remote_workflow
    from durable.core.retention import Retention
    from durable.core.retry import RetryPolicy
    from durable.core.step import current_step
    from durable.engine.events import Publication, Published
    from durable.engine.handle import RunHandle
    from durable.engine.start import StartRequest
    from durable.worker.adaptive import Adaptive
    from durable.worker.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "Batch",
    "ChildFailed",
    "ChildHandle",
    "Concurrency",
    "Context",
    "DeadLetter",
    "Debounce",
    "Durable",
    "DurableError",
    "Event",
    "Fairness",
    "IdempotencyConflict",
    "NonRetryable",
    "Publication",
    "Published",
    "RateLimit",
    "Retention",
    "RetryAfter",
    "RetryPolicy",
    "RunCancelled",
    "RunDead",
    "RunFailed",
    "RunHandle",
    "RunTimeout",
    "Singleton",
    "StartRequest",
    "StepCancelled",
    "StepFailed",
    "StepTimeout",
    "Throttle",
    "Trigger",
    "WaitTimeout",
    "Worker",
    "current_step",
    "dead_letter",
    "durable_step",
    "remote_workflow",
    "workflow",
]

_HOME = {
    "Adaptive": "durable.worker.adaptive",
    "Worker": "durable.worker.worker",
    "Durable": "durable.app",
    "ChildHandle": "durable.core.ctx",
    "Context": "durable.core.ctx",
    "DeadLetter": "durable.core.dead_letter",
    "dead_letter": "durable.core.dead_letter",
    "durable_step": "durable.core.definition",
    "workflow": "durable.core.definition",
    "remote_workflow": "durable.core.hosted",
    "Retention": "durable.core.retention",
    "RetryPolicy": "durable.core.retry",
    "current_step": "durable.core.step",
    "Batch": "durable.core.flow",
    "Concurrency": "durable.core.flow",
    "Debounce": "durable.core.flow",
    "Event": "durable.core.event",
    "Fairness": "durable.core.flow",
    "RateLimit": "durable.core.flow",
    "Singleton": "durable.core.flow",
    "Throttle": "durable.core.flow",
    "Trigger": "durable.core.flow",
    "Publication": "durable.engine.events",
    "Published": "durable.engine.events",
    "RunHandle": "durable.engine.handle",
    "StartRequest": "durable.engine.start",
}
"""Where a public name lives; errors live in core/errors.py."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'durable' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME.get(name, "durable.core.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
