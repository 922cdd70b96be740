"""The messages that cross a wire. Camel case there, snake case here; unknown fields are ignored on reading.

The JSON Schemas and vectors in `protocol/` say the same for every language.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Raw, Struct, UnsetType

from durable.core.errors import ErrorData


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
    context: dict[str, Any] | None = None


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
