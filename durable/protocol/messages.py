"""The messages that cross a wire. Camel case there, snake case here; unknown fields are ignored on reading.

The JSON Schemas and vectors in `protocol/` say the same for every language.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Literal, TypeAlias

from msgspec import UNSET, Raw, Struct, UnsetType, field

from durable.core.errors import ErrorData


def _null() -> Raw:
    """A factory, so that it is written although it is the default: readers of other makes may ask for the field."""
    return Raw(b"null")


class RemoteTask(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """A step for a worker, engine → worker. `step_id` is `<runId>:<seq>`, the same across redeliveries and retries."""

    run_id: str
    seq: int
    """The step's ordinal."""
    step_id: str
    name: str
    group: str
    """The routing token."""
    input: Raw
    attempt: int
    traceparent: str | None = None
    transport: str | None = None
    priority: int | None = None
    """Higher is sooner."""
    context: dict[str, Any] | None = None
    token: str | None = None
    """Ours, opaque: a worker that echoes it proves that it was sent this very attempt (protocol/token.py)."""

    @property
    def id(self) -> str:
        """What cancels, beats and questions name: the same for every attempt."""
        return self.step_id


class StepEvent(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """One line a step tells of itself while or after it ran. `at` is epoch ms."""

    at: int
    level: Literal["debug", "info", "warn", "error"]
    message: str
    data: Any = None
    sub_id: str | None = None
    name: str | None = None
    group: str | None = None
    status: Literal["ok", "failed", "skipped"] | None = None
    phase: str | None = None
    process: str | None = None
    index: int | None = None
    """Ours: the line's place in its attempt, from 0. One told live and again with the result is journaled once."""


class StepResult(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """A worker's answer. `attempt` is echoed by our own workers: an older attempt's result is then recorded as late."""

    run_id: str
    seq: int
    step_id: str
    status: Literal["completed", "failed"]
    output: Raw | UnsetType = UNSET
    """Not `Raw | None`: msgspec reads that as null only."""
    error: ErrorData | None = None
    started_at: int | None = None
    """Epoch ms of pick-up."""
    events: list[StepEvent] | None = None
    attempt: int | None = None
    token: str | None = None
    """The task's, echoed."""

    @property
    def id(self) -> str:
        """The task's."""
        return self.step_id


class HistoryItem(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """What came of one operation of a hosted run. `order` and `at` (epoch ms) are ours: the order of delivery, its time."""

    seq: int
    kind: Literal["step", "call", "timer", "signal", "child"]
    name: str | None = None
    output: Raw | UnsetType = UNSET
    error: ErrorData | None = None
    order: int | None = None
    at: int | None = None


class PendingSignal(Struct, frozen=True, rename="camel", kw_only=True):
    """A signal that has come and that nothing has used."""

    seq: int
    signal: str
    payload: Raw


class WorkflowTask(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """One turn of a run whose workflow a worker hosts, engine → worker: replay the history, answer with a decision."""

    task_id: str
    """`<runId>:wf:<8 hex>`, another one for each attempt: only the awaited one's decision counts."""
    run_id: str
    workflow: str
    workflow_version: str
    input: Raw
    history: list[HistoryItem]
    """By seq."""
    group: str
    attempt: int
    pending_signals: list[PendingSignal] | None = None
    transport: str | None = None
    traceparent: str | None = None
    priority: int | None = None
    at: int | None = None
    """Ours: the turn's time, epoch ms."""
    started_at: int | None = None
    """Ours: when the run began, epoch ms; what the workflow's clock says before anything has come of anything."""
    seen: int | None = None
    """Ours: items of an `order` up to this one were known to the turns before, and what they led to has been asked for.
    Absent in a run's first turn."""
    patches: list[str] | None = None
    """Ours: ids of the patches (`ctx.patched`) this run has taken the new way of."""
    logs: int | None = None
    """Ours: how many lines of the workflow's log are stored."""

    @property
    def id(self) -> str:
        """What cancels, beats and questions name."""
        return self.task_id

    @property
    def name(self) -> str:
        """Who serves it: a workflow's name, where a step's task has a step's."""
        return self.workflow

    @property
    def seq(self) -> int:
        """A turn has no place among the run's operations."""
        return -1


class _TurnCommand(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True, tag_field="kind"):
    seq: int
    parallel_group: str | None = None


class Call(_TurnCommand, frozen=True, tag="call", kw_only=True):
    """Dispatch a step. `group` is a partition; empty or `default`: none."""

    name: str
    group: str = field(default_factory=str)
    input: Raw = field(default_factory=_null)


class RecordStep(_TurnCommand, frozen=True, tag="recordStep", kw_only=True):
    """A local step that the worker ran in this turn. Times are epoch ms."""

    name: str
    output: Raw | UnsetType = UNSET
    error: ErrorData | None = None
    started_at: int | None = None
    finished_at: int | None = None
    events: list[StepEvent] | None = None


class Sleep(_TurnCommand, frozen=True, tag="sleep", kw_only=True):
    """A timer of `ms` milliseconds from the turn's time."""

    ms: int


class AwaitSignal(_TurnCommand, frozen=True, tag="waitSignal", kw_only=True):
    """Wait for a signal of this name."""

    signal: str


class StartChildRun(_TurnCommand, frozen=True, tag="startChild", kw_only=True):
    """Start a run with the id `<runId>.child.<seq>`, and wait for it."""

    workflow: str
    input: Raw = field(default_factory=_null)


TurnCommand: TypeAlias = Call | RecordStep | Sleep | AwaitSignal | StartChildRun


def _none() -> list[TurnCommand]:
    """As `_null`."""
    return []


class WorkflowDecision(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """A turn's answer, worker → engine: what the replay asked for anew, and whether the run is over."""

    task_id: str
    run_id: str
    status: Literal["continue", "completed", "failed", "cancelled"]
    commands: list[TurnCommand] = field(default_factory=_none)
    output: Raw | UnsetType = UNSET
    error: ErrorData | None = None
    patches: list[str] | None = None
    """Ours: ids of patches whose new way this turn took for the first time."""
    logs: list[StepEvent] | None = None
    """Ours: lines the workflow's code has written in this turn."""

    @property
    def id(self) -> str:
        """The turn's."""
        return self.task_id


class WorkflowStepEvent(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """A local step of a turn under way, as it happens. Times are epoch ms."""

    run_id: str
    seq: int
    name: str
    phase: Literal["running", "completed", "failed"]
    started_at: int
    finished_at: int | None = None
    output: Raw | UnsetType = UNSET
    error: ErrorData | None = None
    events: list[StepEvent] | None = None


Task: TypeAlias = RemoteTask | WorkflowTask
"""What an engine sends. Both share a queue; a turn is told by its `workflow`, a text, and its `history`, a list."""
Answer: TypeAlias = StepResult | WorkflowDecision
"""What a worker sends back."""


class StartRunRequest(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """Another system's wish that a run be started here, by message."""

    tenant: str
    workflow: str
    input: Raw = field(default_factory=_null)
    run_id: str | None = None
    tags: list[str] | None = None
    search_attributes: dict[str, str | int | float | bool] | None = None


class Heartbeat(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """A sign of life for one step, or (without `step_id`) for a run's whole turn."""

    run_id: str
    seq: int
    group: str
    step_id: str | None = None


class ControlMessage(
    Struct, frozen=True, rename={"sender": "from", "run_id": "runId"}, omit_defaults=True, kw_only=True
):
    """A broadcast between engine instances: a hint, never truth. `sender` ("from") is an incarnation."""

    sender: str
    kind: Literal["event", "cancel", "enqueued"]
    run_id: str | None = None
    event: dict[str, Any] | None = None


def sanitize(name: str) -> str:
    """The routing form of a step or workflow name: `:` is taken by the queues' own grammar."""
    return name.replace(":", "-")


def routing_token(name: str, partition: str | None = None) -> str:
    """Where a task waits: the sanitized name, and `@partition` where there is one that says something."""
    suffix = f"@{partition}" if partition and partition != "default" else ""
    return sanitize(name) + suffix


def step_id(run_id: str, ordinal: int) -> str:
    """A task's identity: exactly `<runId>:<ordinal>`."""
    return f"{run_id}:{ordinal}"


def turn_id(run_id: str, turn: int, attempt: int) -> str:
    """The id of one attempt of a hosted run's turn, `<runId>:wf:<8 hex>`. Derived, so that a new owner of the run publishes it
    under the same."""
    return f"{run_id}:wf:{sha256(f'{run_id}:{turn}:{attempt}'.encode()).hexdigest()[:8]}"
