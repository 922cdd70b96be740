"""What the service answers with, as structs. Fields that are not known here are let be; times are aware datetimes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from msgspec import Struct


class Shape(Struct, frozen=True, rename="camel", kw_only=True):
    """What all have in common."""


class Error(Shape, frozen=True, kw_only=True):
    """What a run or a step ended with."""

    message: str = ""
    code: str = "error"
    type: str = ""
    retryable: bool | None = None
    details: Any = None
    stack: str | None = None


class Run(Shape, frozen=True, kw_only=True):
    """A run as it stands. `status`: queued · running · waiting · paused · needs_attention · succeeded · failed · cancelled;
    `activity` says more of one that has not ended. A list has no `input` and `result`."""

    id: str
    workflow_name: str
    app: str = ""
    environment: str = ""
    version: str = ""
    status: str
    activity: str | None = None
    seq: int = 0
    """Of its newest journal row: a watch after it begins with what comes next."""
    error_count: int = 0
    attempt: int = 0
    trigger_kind: str | None = None
    step_count: int = 0
    current_step_index: int | None = None
    current_step_name: str | None = None
    counts_omitted: bool = False
    started_at: datetime | None = None
    created_at: datetime | None = None
    ended_at: datetime | None = None
    wake_at: datetime | None = None
    duration_ms: float | None = None
    input: Any = None
    result: Any = None
    error: Error | None = None
    paused_by: str | None = None
    event_name: str | None = None
    event_id: str | None = None
    replay_of: str | None = None
    from_step: str | None = None
    parent_id: str | None = None
    executed_by: str | None = None
    trace_id: str | None = None
    idempotency_key: str | None = None
    tags: list[str] = []
    attributes: dict[str, Any] = {}

    @property
    def ended(self) -> bool:
        """Also one that has been given up on (`needs_attention` without an activity), until somebody requeues it."""
        return self.activity is None


class Step(Shape, frozen=True, kw_only=True):
    """One step of a run."""

    name: str
    key: str = ""
    kind: str = "step"
    status: str
    index: int | None = None
    attempt: int = 0
    started_at: datetime | None = None
    ended_at: datetime | None = None
    duration_ms: float | None = None
    executed_ms: float | None = None
    next_attempt_at: datetime | None = None
    child_run_id: str | None = None
    input: Any = None
    output: Any = None
    error: Error | None = None


class LogLine(Shape, frozen=True, kw_only=True):
    """A line a run has written. `seq`: its place in the run's journal."""

    seq: int
    level: str = "info"
    message: str = ""
    scope: str | None = None
    attempt: int = 0
    fields: dict[str, Any] = {}
    ts: datetime | None = None


class Frame(Shape, frozen=True, kw_only=True):
    """Something that has happened to a run. `kind`: run_status · step_status · log; which fields there are depends on it.
    Of all runs' stream also `resync`: it was cut, what lists show may be old."""

    kind: str
    seq: int = 0
    run_id: str = ""
    ts: datetime | None = None
    status: str | None = None
    name: str | None = None
    index: int | None = None
    attempt: int | None = None
    current_step_name: str | None = None
    error: Error | None = None
    will_retry: bool | None = None
    next_attempt_at: datetime | None = None
    level: str | None = None
    message: str | None = None
    fields: dict[str, Any] = {}
    scope: str | None = None
    workflow_name: str | None = None
    app: str | None = None
    duration_ms: float | None = None
    child_run_id: str | None = None


class NewRun(Shape, frozen=True, kw_only=True):
    """A run that was started, or found by its key."""

    run_id: str


class Changed(Shape, frozen=True, kw_only=True):
    """`changed` false: it had been so before."""

    ok: bool = True
    changed: bool = True
    settled: bool = False


class BulkOne(Shape, frozen=True, kw_only=True):
    """What became of one run of many."""

    run_id: str
    outcome: str
    new_run_id: str | None = None
    code: str = ""
    message: str = ""


class Bulk(Shape, frozen=True, kw_only=True):
    """What became of many. `matched`: found by this call, of a dry run all there are; `cursor`: where to go on."""

    matched: int
    run_ids: list[str] = []
    items: list[BulkOne] = []
    cursor: str | None = None


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
    """An accepted event. `number` rises with the order of acceptance."""

    id: str
    name: str
    data: Any = None
    app: str = ""
    number: int = 0
    received_at: datetime | None = None
    triggered: list[Triggered] = []
    dedupe_id: str | None = None
    runner: str | None = None
    session: str | None = None
    tags: list[str] = []


class Approval(Shape, frozen=True, kw_only=True):
    """Something that waits for a person: `tool` with `args`, and how risky that is."""

    id: str
    run_id: str
    workflow: str = ""
    app: str = ""
    name: str = ""
    args: Any = None
    tool: str | None = None
    risk: str | None = None
    summary: str | None = None
    policy: Any = None
    context: Any = None
    escalates_to: Any = None
    requested_at: datetime | None = None
    expires_at: datetime | None = None


class Schedule(Shape, frozen=True, kw_only=True):
    """A schedule as it stands. `skipped`: occurrences that started no run, by policy or for the `error`."""

    id: str
    workflow: str
    cron: str | None = None
    every_seconds: float | None = None
    at: datetime | None = None
    timezone: str | None = None
    version: str | None = None
    input: Any = None
    tags: list[str] = []
    paused: bool = False
    catch_up: str = "last"
    overlap: str = "allow"
    fired: int = 0
    skipped: int = 0
    next_at: datetime | None = None
    last_at: datetime | None = None
    last_run: str | None = None
    error: str | None = None


class Trigger(Shape, frozen=True, kw_only=True):
    """An event (and its condition), or the clock, that starts a workflow."""

    event: str | None = None
    condition: str | None = None
    cron: str | None = None
    timezone: str | None = None


class Workflow(Shape, frozen=True, kw_only=True):
    """Something that can be started."""

    app: str
    name: str
    version: str = ""
    tags: list[str] = []
    category: str | None = None
    timeout_ms: float | None = None
    triggers: list[Trigger] = []


class App(Shape, frozen=True, kw_only=True):
    """An app the key sees, and how many workflows it has."""

    id: str
    name: str
    environment: str = ""
    workflows: int = 0


class Runner(Shape, frozen=True, kw_only=True):
    """A runner that is alive."""

    instance: str
    app: str
    mode: str = ""
    runner: str | None = None
    workflows: list[str] = []
    since: datetime | None = None
    seen: datetime | None = None
    in_flight: int = 0
    runtime: str = ""
    language: str | None = None
    version: str = ""
    key_matches: bool | None = None


class Limit(Shape, frozen=True, kw_only=True):
    """A limit as it stands: how much of it is used, and how many due runs wait behind it."""

    workflow: str
    lane: str
    rule: str
    kind: str
    limit: int
    period_ms: float = 0.0
    used: int = 0
    queued: int = 0
    weight: float = 1.0
    next_at: datetime | None = None


class Stats(Shape, frozen=True, kw_only=True):
    """Runs by status, and how long the ended ones took."""

    total: int
    by_status: dict[str, int] = {}
    failure_rate: float = 0.0
    p50_ms: float | None = None
    p95_ms: float | None = None
    truncated: bool = False


class Bucket(Shape, frozen=True, kw_only=True):
    """What happened in one stretch of time, which begins at `ts`."""

    ts: datetime
    started: int = 0
    succeeded: int = 0
    failed: int = 0
