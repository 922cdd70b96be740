"""A run's two-layer state. `status` is what became of the run, `activity` what an active run is doing now.

Both are always shown together. Terminal statuses are absorbing: only the operator's `requeue` reopens a run.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What became of a run."""

    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DEAD = "dead"
    COMPENSATION_FAILED = "compensation_failed"


class Activity(StrEnum):
    """What an active run is doing. Meaningless, and shown as empty, once the run is terminal."""

    EXECUTING = "executing"
    """A turn or a local step body is under way: if the engine dies now, it counts as a crash of this run."""
    QUEUED = "queued"
    """Ready; no engine has taken it yet."""
    WAITING = "waiting"
    """For a signal, a child, or a worker's answer."""
    SLEEPING = "sleeping"
    """Only timers are outstanding."""
    SCHEDULED = "scheduled"
    """Not to begin before its wake time."""
    RETRYING = "retrying"
    """Only retry delays are outstanding."""
    PAUSED = "paused"
    BLOCKED = "blocked"
    """Its journal and its code disagree; it goes on after a fix."""
    CANCELLING = "cancelling"


TERMINAL = frozenset(Status) - {Status.ACTIVE}
REOPENABLE = frozenset({Status.DEAD, Status.FAILED})
"""What `requeue` accepts."""
PARKED = frozenset({Activity.PAUSED, Activity.BLOCKED})
"""Runs that take inbox rows in but stay put."""
