"""Messages between an engine and a runner, an app's process that runs its workflows pass by pass: protocol/runners.md.

Written by both ends, over a WebSocket that the runner dials (connect) or as a request that the engine makes (serve). Fields of
ours are additive: an engine of another make leaves them out, and a runner does without. Times are epoch milliseconds; what our
engine tells may have a fraction, so that no timer is a moment early.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType, field

from durable.core.errors import ErrorData

SUBPROTOCOLS = ("durable.connect.v0", "duraton.connect.v0")
"""Two names of the same; the first is ours."""
VERSION = 1
MAX_FRAME = 1 << 20
"""Bytes of a frame, of a request and of an answer."""
REGISTER_SECONDS = 30.0
"""How often a runner that serves checks in. Silent for three times as long, it is not routed to."""


def step_hash(name: str) -> str:
    """An operation's identity: what memos are found by. `name` as the author wrote it; a repeat's is `name:1`, `name:2` …"""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


class _Message(Struct, rename="camel", omit_defaults=True):
    pass


def _null() -> Raw:
    """A factory, so that it is written although it is the default: readers of other makes ask for the field."""
    return Raw(b"null")


# ------------------------------------------------------------------ what a runner is told


class InvokeEvent(_Message, kw_only=True):
    """What started the run. The workflow's input is its data."""

    name: str
    data: Raw = field(default_factory=_null)
    id: str | None = None
    ts: float | None = None
    """Ours: when it was accepted."""


class MemoEvent(_Message, kw_only=True):
    """Ours: which event a wait was given."""

    id: str = ""
    name: str = ""
    at: float | None = None
    """When it was accepted."""


class Memo(_Message, kw_only=True):
    """What came of an operation: its data, nothing (a sleep, an emit) or an error; or that nothing has come of it yet."""

    data: Raw | UnsetType = UNSET
    error: Any = None
    """`{message, stack?}`, and of ours the rest of an ErrorData."""
    pending: bool = False
    """It is under way, or waits for its next attempt: report it again, and run nothing."""
    order: int | None = None
    """Ours: its place among all that came of operations. A runner hears of them in this order."""
    at: float | None = None
    """Ours: when."""
    attempt: int | None = None
    """Ours: the attempt that settled it."""
    event: MemoEvent | None = None
    """Ours, of a wait for an event: which one it was. Without it null is no event where the wait has a timeout."""


class InvokeContext(_Message, kw_only=True):
    """Which run, of which workflow."""

    run_id: str
    workflow: str
    attempt: int = field(default_factory=lambda: 1)
    """Of the run."""
    app: str = field(default_factory=str)
    runner: str | None = None
    """The runner the run is pinned to."""
    on_failure: Any = None
    """True: the run has failed for good, with `error`; run what is to be done then."""
    error: Any = None
    traceparent: str | None = None
    spent: Any = None
    cap: Any = None
    fork: Any = None
    now: float | None = None
    """Ours: the engine's time. An engine that tells it is one of ours: memos bear `order` and `at`."""
    started_at: float | None = None
    """Ours: when the run began."""
    workflow_version: str | None = None
    """Ours: the version the run began with. Without it the latest."""
    seen: int | None = None
    """Ours: the highest `order` that an answered pass was told; None before the first answer. What lies behind is new ground."""
    patches: list[str] | None = None
    """Ours: patches whose new way the run has taken."""
    attempts: dict[str, int] | None = None
    """Ours: by hash, how many attempts of a step that is to be run have failed."""
    cancelling: Memo | None = None
    """Ours: the run is being cancelled, since this `order` and `at`."""


class Invoke(_Message, kw_only=True):
    """One pass of a run: replay it, go on to what is new, say what that is."""

    event: InvokeEvent
    steps: dict[str, Memo]
    ctx: InvokeContext


# ------------------------------------------------------------------ what it reaches


class RetryRules(_Message, kw_only=True):
    """How often and how soon. `factor`, `jitter` are ours."""

    max_attempts: int
    backoff: str
    initial_delay_ms: int
    max_delay_ms: int
    factor: float | None = None
    jitter: float | None = None


class Opcode(_Message, kw_only=True, tag_field="op"):
    """An operation the code has reached. `id` is the hash of `name`."""

    id: str
    name: str
    seq: int | None = None
    """Ours: its position by first call. A child's run id and a step's idempotency key follow from it."""


class StepRun(Opcode, kw_only=True, tag="StepRun"):
    """A step this pass has run: what it returned, or how this attempt failed."""

    data: Raw | UnsetType = UNSET
    error: ErrorData | None = None
    input: Raw | UnsetType = UNSET
    retry: RetryRules | None = None
    retriable: bool | None = None
    """False: this failure is final."""
    retry_after_ms: int | None = None
    started_at: int | None = None
    """Ours."""
    finished_at: int | None = None
    """Ours."""


class SleepFor(Opcode, kw_only=True, tag="Sleep"):
    """Wake me after so long."""

    sleep_ms: int


class SleepUntil(Opcode, kw_only=True, tag="SleepUntil"):
    """Wake me at a time."""

    sleep_until_ms: int | float
    """With a fraction only where the engine's own times have one."""


class WaitForEvent(Opcode, kw_only=True, tag="WaitForEvent"):
    """Wait for an event by name, as long as `timeout_ms`. `event_if`: a condition over `event`. The memo's data is the
    event's, null when none came."""

    event_name: str
    timeout_ms: int | None = None
    event_if: str | None = None
    match: Raw | UnsetType = UNSET
    """Ours: what the event's data must hold, where `event_if` cannot say it."""
    until_ms: int | float | None = None
    """Ours: when the timeout is."""
    since_ms: int | float | None = None
    """Ours: events accepted before are not meant. Without it those since the run began are."""


class RunWorkflow(Opcode, kw_only=True, tag="RunWorkflow"):
    """Start another run and wait for what it returns."""

    child_name: str
    child_app: str | None = None
    child_runner: str | None = None
    child_data: Raw | UnsetType = UNSET
    child_version: str | None = None
    """Ours."""
    on_parent_close: str | None = None
    """Ours: cancel or abandon, of a child whose parent goes on without it."""


class Emit(Opcode, kw_only=True, tag="Emit"):
    """Send an event."""

    event_name: str
    target_app: str | None = None
    data: Raw | UnsetType = UNSET
    dedupe_id: str | None = None


class WaitForSignal(Opcode, kw_only=True, tag="WaitForSignal"):
    """Ours: wait for a signal by name. The memo's data is what was sent."""

    signal_name: str


class SendTask(Opcode, kw_only=True, tag="SendTask"):
    """Ours: a step for a worker of the engine's transports. The memo's data is its output."""

    task_name: str
    input: Raw = field(default_factory=_null)
    group: str | None = None
    transport: str | None = None
    priority: int | None = None
    timeout_ms: int | None = None
    heartbeat_timeout_ms: int | None = None
    retry: RetryRules | None = None


AnyOpcode = StepRun | SleepFor | SleepUntil | WaitForEvent | RunWorkflow | Emit | WaitForSignal | SendTask


class RunnerLog(_Message, kw_only=True):
    """A line. The engine keeps it once for each run, attempt, scope and index, however often it comes."""

    level: str
    message: str
    scope: str
    """`root` for the workflow's own lines, `step:<name>` for a step's, with `#2` behind it in its second attempt."""
    index: int
    ts_ms: int
    fields: Raw | UnsetType = UNSET


class InvokeBody(_Message, kw_only=True):
    """200 `{data, logs}` · 206 `{opcodes, logs}` · 400 `{error}` · 500 `{error, logs}`."""

    data: Raw | UnsetType = UNSET
    opcodes: list[AnyOpcode] | UnsetType = UNSET
    """Ours with 200 and 400: what the last pass has asked for and does not wait for."""
    error: ErrorData | None = None
    logs: list[RunnerLog] | UnsetType = UNSET
    parked: list[str] | None = None
    """Ours with 206: by hash, what the engine knows of and the code still waits for. What is not named is given up."""
    patches: list[str] | None = None
    """Ours: patches whose new way this pass has taken for the first time."""


class InvokeResult(_Message, kw_only=True):
    """What a pass comes to."""

    status: int
    body: Any = None


# ------------------------------------------------------------------ meeting


class Hello(Struct, kw_only=True, rename="camel"):
    """The engine's first frame."""

    protocol_version: int = 1
    min_protocol_version: int = 1
    max_protocol_version: int = 1
    heartbeat_ms: int = 15_000


class Envelope(_Message, kw_only=True):
    """A frame of connect. Types: hello, runner.register, invoke, invoke.result, ping, pong; runner.drain of ours. Others are
    passed over."""

    type: str
    id: str | None = None
    payload: Raw | UnsetType = UNSET


_envelope = msgspec.json.Decoder(Envelope)
_invoke = msgspec.json.Decoder(Invoke)


def read_envelope(data: bytes | str) -> Envelope:
    """Raises msgspec.MsgspecError, UnicodeDecodeError."""
    return _envelope.decode(data)


def read_invoke(data: bytes) -> Invoke:
    """All three objects must be there. Raises msgspec.MsgspecError, UnicodeDecodeError."""
    return _invoke.decode(data)
