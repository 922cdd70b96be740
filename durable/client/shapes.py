"""What the service answers with, as structs. Fields that are not known here are let be; times are aware datetimes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from msgspec import Struct


class Shape(Struct, frozen=True, rename="camel", kw_only=True):
    """What all have in common."""


class Run(Shape, frozen=True, kw_only=True):
    """A run as it stands. `status`: queued · running · waiting · paused · needs_attention · succeeded · failed · cancelled."""

    id: str
    workflow_name: str
    app: str = ""
    status: str
    error_count: int = 0
    attempt: int = 0
    trigger_kind: str | None = None
    step_count: int = 0
    current_step_index: int | None = None
    started_at: datetime | None = None
    input: Any = None
    result: Any = None
    error: Any = None
    paused_by: str | None = None
    current_step_name: str | None = None
    event_name: str | None = None
    event_id: str | None = None
    replay_of: str | None = None
    executed_by: str | None = None
    trace_id: str | None = None
    ended_at: datetime | None = None
    duration_ms: float | None = None
    tags: Any = None

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL


TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
"""States a run does not leave by itself."""


class Step(Shape, frozen=True, kw_only=True):
    """One step of a run."""

    name: str
    status: str
    index: int | None = None
    attempt: int = 0
    started_at: datetime | None = None
    ended_at: datetime | None = None
    duration_ms: float | None = None
    input: Any = None
    output: Any = None
    error: Any = None


class LogLine(Shape, frozen=True, kw_only=True):
    """A line a run has written. `seq`: its place in the run's journal."""

    seq: int
    level: str = "info"
    message: str = ""
    scope: str | None = None
    attempt: int = 0
    fields: Any = None
    ts: Any = None


class Frame(Shape, frozen=True, kw_only=True):
    """Something that has happened to a run. `kind`: run_status · step_status · log; which fields there are depends on it."""

    kind: str
    seq: int = 0
    run_id: str = ""
    ts: Any = None
    status: str | None = None
    name: str | None = None
    index: int | None = None
    attempt: int | None = None
    current_step_name: str | None = None
    error: Any = None
    will_retry: bool | None = None
    next_attempt_at: Any = None
    level: str | None = None
    message: str | None = None
    fields: Any = None
    scope: str | None = None


class Triggered(Shape, frozen=True, kw_only=True):
    """What became of an event at one function."""

    workflow: str
    run_id: str | None = None
    skipped: bool = False
    dropped: bool = False
    debounced: bool = False
    batched: bool = False
    deduped: bool = False
    suspended: bool = False


class EventAnswer(Shape, frozen=True, kw_only=True):
    """What became of an event. `woke`: how many waits it ended."""

    event_id: str
    woke: int = 0
    run_id: str | None = None
    skipped: bool = False
    dropped: bool = False
    debounced: bool = False
    batched: bool = False
    deduped: bool = False
    suspended: bool = False
    triggered: list[Triggered] = []


class Event(Shape, frozen=True, kw_only=True):
    """An accepted event."""

    id: str
    name: str
    data: Any = None
    received_at: datetime | None = None


class Approval(Shape, frozen=True, kw_only=True):
    """Something that waits for a person."""

    id: str
    run_id: str = ""
    tool: str | None = None
    risk: str | None = None
    summary: str | None = None
    status: str = "pending"
    data: Any = None


class Schedule(Shape, frozen=True, kw_only=True):
    """A schedule as it stands."""

    id: str
    workflow: str
    cron: str | None = None
    every_seconds: float | None = None
    at: datetime | None = None
    timezone: str = "UTC"
    paused: bool = False
    next_at: datetime | None = None
    last_at: datetime | None = None
    last_run: str | None = None
    catch_up: str = "last"
    overlap: str = "allow"
