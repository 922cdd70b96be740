"""Durable: workflows that survive crashes. What an author needs, by one import; the rest by its own path."""

from __future__ import annotations

from durable.app import Durable
from durable.core.ctx import ChildHandle, Context
from durable.core.definition import durable_step, workflow
from durable.core.errors import (
    ChildFailed,
    DurableError,
    NonRetryable,
    RetryAfter,
    RunCancelled,
    RunDead,
    RunFailed,
    RunTimeout,
    StepFailed,
    StepTimeout,
    WaitTimeout,
)
from durable.core.retry import RetryPolicy
from durable.core.step import current_step
from durable.engine.handle import RunHandle
from durable.engine.start import StartRequest

__all__ = [
    "ChildFailed",
    "ChildHandle",
    "Context",
    "Durable",
    "DurableError",
    "NonRetryable",
    "RetryAfter",
    "RetryPolicy",
    "RunCancelled",
    "RunDead",
    "RunFailed",
    "RunHandle",
    "RunTimeout",
    "StartRequest",
    "StepFailed",
    "StepTimeout",
    "WaitTimeout",
    "current_step",
    "durable_step",
    "workflow",
]
