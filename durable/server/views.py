"""Runs, steps, logs and frames as the API shows them: the words and shapes of the wire, times in ISO 8601.

Pure: rows in, structs out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from durable.core.event import read_fact
from durable.core.functions import PASSES
from durable.core.journal import CHILD, COMMAND_KINDS, EVENT, LOG, RUN, STEP, TIMER, WAIT, Entry
from durable.core.match import holds
from durable.core.origin import Origin, origin_of
from durable.core.payload import decode_error
from durable.protocol.states import Activity, Status
from durable.server.workspaces import split
from durable.store.records import RunRecord

RunStatus = Literal["queued", "running", "waiting", "paused", "needs_attention", "succeeded", "failed", "cancelled"]
StepStatus = Literal["running", "retrying", "completed", "failed", "cancelled"]

ENDED: Mapping[Status, RunStatus] = {
    Status.COMPLETED: "succeeded",
    Status.FAILED: "failed",
    Status.CANCELLED: "cancelled",
    Status.DEAD: "needs_attention",
    Status.COMPENSATION_FAILED: "needs_attention",
}
ACTIVE: Mapping[Activity, RunStatus] = {
    Activity.QUEUED: "queued",
    Activity.SCHEDULED: "queued",
    Activity.EXECUTING: "running",
    Activity.CANCELLING: "running",
    Activity.WAITING: "waiting",
    Activity.SLEEPING: "waiting",
    Activity.RETRYING: "waiting",
    Activity.PAUSED: "paused",
    Activity.BLOCKED: "needs_attention",
}

_RUN_FRAMES: Mapping[str, RunStatus] = {
    "started": "running",
    "completed": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
    "dead": "needs_attention",
    "cancelling": "running",
    "timed_out": "running",
    "blocked": "needs_attention",
    "unblocked": "running",
    "requeued": "queued",
    "paused": "paused",
    "resumed": "queued",
}
_STEP_FRAMES: Mapping[str, StepStatus] = {
    "started": "running",
    "dispatched": "running",
    "retrying": "retrying",
    "completed": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}


class Error(Struct, frozen=True, omit_defaults=True, rename="camel"):
    """What a run or a step ended with."""

    message: str
    code: str = "error"
    type: str = ""
    retryable: bool | UnsetType = UNSET
    details: Any = UNSET
    stack: str | None = None


class Run(Struct, frozen=True, omit_defaults=True, rename="camel", kw_only=True):
    """A run. `app`, `environment` are its workspace; `activity` says more of an active one. Beside what the wire's readers
    know: version, environment, activity, idempotencyKey, parent, wakeAt, createdAt, seq."""

    id: str
    workflow_name: str
    app: str
    status: RunStatus
    error_count: int
    """Failed attempts, of all steps."""
    attempt: int
    """Of the step that is under way; 1 where none is."""
    trigger_kind: str
    step_count: int
    current_step_index: int
    """The position of the newest step; -1 before the first."""
    started_at: str
    """When an engine first took it; before that, when it was made."""
    version: str
    environment: str
    created_at: str
    seq: int
    """Of its newest journal row: where a stream from here would begin."""
    input: Raw | UnsetType = UNSET
    result: Raw | UnsetType = UNSET
    error: Error | UnsetType = UNSET
    activity: str | UnsetType = UNSET
    paused_by: str | UnsetType = UNSET
    current_step_name: str | UnsetType = UNSET
    event_name: str | UnsetType = UNSET
    event_id: str | UnsetType = UNSET
    replay_of: str | UnsetType = UNSET
    from_step: str | UnsetType = UNSET
    executed_by: str | UnsetType = UNSET
    trace_id: str | UnsetType = UNSET
    ended_at: str | UnsetType = UNSET
    duration_ms: float | UnsetType = UNSET
    tags: list[str] | UnsetType = UNSET
    attributes: dict[str, str | int | float | bool] | UnsetType = UNSET
    idempotency_key: str | UnsetType = UNSET
    parent_id: str | UnsetType = UNSET
    wake_at: str | UnsetType = UNSET
    counts_omitted: bool = False
    """In a list: the journal is too long to be counted here; ask for the run itself."""


class Step(Struct, frozen=True, omit_defaults=True, rename="camel", kw_only=True):
    """One step of a run: local, remote, a child or a timer that has fired."""

    index: int
    name: str
    key: str
    kind: str
    status: StepStatus
    attempt: int
    started_at: str | UnsetType = UNSET
    ended_at: str | UnsetType = UNSET
    duration_ms: float | UnsetType = UNSET
    """From the first sign of it to its end, waits and retries included."""
    executed_ms: float | UnsetType = UNSET
    """What its bodies took."""
    input: Raw | UnsetType = UNSET
    output: Raw | UnsetType = UNSET
    error: Error | UnsetType = UNSET
    next_attempt_at: str | UnsetType = UNSET
    child_run_id: str | UnsetType = UNSET


class LogLine(Struct, frozen=True, omit_defaults=True, rename="camel", kw_only=True):
    """A line a run has written."""

    seq: int
    ts: str
    run_id: str
    level: str
    message: str
    scope: str
    """The step's key; `root` for the workflow's own."""
    attempt: int
    index: int | UnsetType = UNSET
    fields: Any = UNSET


class RunStatusFrame(
    Struct, frozen=True, omit_defaults=True, rename="camel", kw_only=True, tag_field="kind", tag="run_status"
):
    seq: int
    ts: str
    run_id: str
    status: RunStatus
    current_step_name: str | UnsetType = UNSET
    attempt: int | UnsetType = UNSET
    error: Error | UnsetType = UNSET


class StepStatusFrame(
    Struct, frozen=True, omit_defaults=True, rename="camel", kw_only=True, tag_field="kind", tag="step_status"
):
    seq: int
    ts: str
    run_id: str
    name: str
    status: StepStatus
    attempt: int
    index: int | UnsetType = UNSET
    error: Error | UnsetType = UNSET
    will_retry: bool | UnsetType = UNSET
    next_attempt_at: str | UnsetType = UNSET
    duration_ms: float | UnsetType = UNSET
    """What its body took, this attempt."""
    child_run_id: str | UnsetType = UNSET
    """The run it is, where it is a child."""


class LogFrame(Struct, frozen=True, omit_defaults=True, rename="camel", kw_only=True, tag_field="kind", tag="log"):
    seq: int
    ts: str
    run_id: str
    level: str
    message: str
    scope: str
    attempt: int
    fields: Any = UNSET


Frame = RunStatusFrame | StepStatusFrame | LogFrame


def iso(us: int) -> str:
    """µs since the epoch as ISO 8601 UTC with milliseconds."""
    return datetime.fromtimestamp(us / 1_000_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def status_word(status: Status, activity: Activity) -> RunStatus:
    """The wire's word for our two layers."""
    return ACTIVE[activity] if status is Status.ACTIVE else ENDED[status]


def error_view(payload: bytes | None) -> Error | UnsetType:
    """A stored error; its cause is not left out, whatever wrote it."""
    if payload is None:
        return UNSET
    try:
        found = decode_error(payload)
    except Exception:
        return Error("This error cannot be read.", "unreadable")
    details = UNSET if found.details is None else found.details
    return Error(found.message, found.code, found.type, found.retryable, details, found.stack)


class Progress:
    """How far a run has got, by its journal."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.errors = 0
        self.names: dict[str, None] = {}
        self.index = -1
        self.current: str | None = None
        self.attempt = 1
        self.paused_by: str | None = None
        for entry in entries:
            self._read(entry)

    def _read(self, entry: Entry) -> None:
        if entry.kind == RUN and entry.status == "paused":
            by = _object(entry.payload).get("by")
            self.paused_by = by if isinstance(by, str) else None
        if entry.kind not in COMMAND_KINDS or entry.status in ("late", "published"):
            return
        if is_pass(entry):
            self.errors += entry.status in ("retrying", "failed")
            return
        key = entry.key or entry.name or str(entry.ordinal)
        if key not in self.names:
            self.names[key] = None
        if entry.status in ("retrying", "failed"):
            self.errors += 1
        if entry.ordinal is not None:
            self.index = max(self.index, entry.ordinal)
        self.current = key
        self.attempt = max(1, entry.attempt) if entry.status in ("started", "dispatched", "retrying") else 1


def is_pass(entry: Entry) -> bool:
    """Whether this row is of a call to an app, and no step of the author's."""
    return entry.kind == STEP and entry.ordinal is not None and entry.ordinal >= PASSES


def run_view(run: RunRecord, progress: Progress | None, *, payloads: bool = True, local_app: str | None = None) -> Run:
    """`progress` None: not counted. `local_app`: what the engine's own workspace is called."""
    origin = _origin(run)
    app, environment = split(run.workspace)
    if app == run.workspace and local_app is not None:
        app = local_app
    active = run.status is Status.ACTIVE
    begun = run.started_at or run.created_at
    return Run(
        id=run.id,
        workflow_name=run.workflow,
        version=run.version,
        app=app,
        environment=environment,
        status=status_word(run.status, run.activity),
        activity=run.activity.value if active else UNSET,
        error_count=progress.errors if progress else 0,
        attempt=progress.attempt if progress else 1,
        trigger_kind=origin.trigger_kind or ("child" if run.parent else "manual"),
        step_count=len(progress.names) if progress else 0,
        current_step_index=progress.index if progress else -1,
        counts_omitted=progress is None,
        current_step_name=(progress.current or UNSET) if progress and active else UNSET,
        paused_by=(progress.paused_by or UNSET) if progress and run.activity is Activity.PAUSED and active else UNSET,
        started_at=iso(begun),
        created_at=iso(run.created_at),
        ended_at=iso(run.finished_at) if run.finished_at is not None else UNSET,
        duration_ms=(run.finished_at - begun) / 1000 if run.finished_at is not None else UNSET,
        input=_raw(run.input) if payloads else UNSET,
        result=_raw(run.output) if payloads else UNSET,
        error=error_view(run.error) if payloads else _brief(error_view(run.error)),
        event_name=origin.event_name or UNSET,
        event_id=origin.event_id or UNSET,
        replay_of=origin.replay_of or UNSET,
        from_step=origin.from_step or UNSET,
        trace_id=origin.trace_id or UNSET,
        executed_by=origin.runner or run.owner or UNSET,
        tags=list(run.tags) or UNSET,
        attributes=dict(run.attributes) or UNSET,
        idempotency_key=run.idempotency_key or UNSET,
        parent_id=run.parent.run_id if run.parent else UNSET,
        wake_at=iso(run.wake_at) if run.wake_at is not None and active else UNSET,
        seq=run.seq,
    )


def step_views(entries: Sequence[Entry]) -> list[Step]:
    """Steps in the order of their first call, each as it stands at the journal's end."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in _with_ends_of_waits(entries):
        if ((entry.kind in COMMAND_KINDS and entry.status != "late") or entry.kind == TIMER) and not is_pass(entry):
            found.setdefault((entry.kind, entry.key or str(entry.ordinal)), []).append(entry)
    views = [_step(kind, key, rows) for (kind, key), rows in found.items()]
    return sorted(views, key=lambda step: step.index)


def _with_ends_of_waits(entries: Sequence[Entry]) -> Iterator[Entry]:
    """The rows, and behind what ended a wait for an event a row that says so: the journal has the event, or the timer, once,
    and replay knows what it was for."""
    opened: dict[str, Entry] = {}
    left: list[Entry] = []
    """Events that no wait has taken yet."""
    for entry in entries:
        yield entry
        if entry.kind == EVENT and entry.status == "received":
            takers = [wait for wait in opened.values() if _takes(wait, entry)]
            for wait in takers:
                yield _ended(opened.pop(wait.key or ""), entry)
            if not takers:
                left.append(entry)
        elif entry.kind == TIMER:
            for wait in [wait for wait in opened.values() if wait.ordinal is not None]:
                if wait.ordinal + 1 == entry.ordinal:  # type: ignore[operator]  # its timeout takes the ordinal behind its own
                    yield _ended(opened.pop(wait.key or ""), entry)
        elif entry.kind == WAIT and entry.status == "opened":
            early = next((event for event in left if _takes(entry, event)), None)
            if early is None:
                opened[entry.key or ""] = entry
            else:
                left.remove(early)
                yield _ended(entry, entry, early.payload)
        elif entry.kind == WAIT and entry.status == "cancelled":
            opened.pop(entry.key or "", None)


def _takes(wait: Entry, event: Entry) -> bool:
    if wait.name != event.name or event.payload is None:
        return False
    condition = _object(wait.payload).get("condition")
    asked = None if condition is None else msgspec.json.encode(condition)
    return holds(asked)(read_fact(event.payload).plain())


def _ended(wait: Entry, by: Entry, fact: bytes | None = None) -> Entry:
    """A wait's last row. Of one that was given an event its output is the event's data."""
    given = fact or (by.payload if by.kind == EVENT else None)
    output = None if given is None else bytes(read_fact(given).data)
    return msgspec.structs.replace(
        by, kind=WAIT, status="completed", key=wait.key, ordinal=wait.ordinal, name=wait.name, payload=output
    )


def _step(kind: str, key: str, rows: list[Entry]) -> Step:
    last = next((row for row in reversed(rows) if row.status not in ("published", "looked")), rows[-1])
    status = "completed" if kind == TIMER else _STEP_FRAMES.get(last.status, "running")
    begun = min(row.enqueued_at or row.started_at or row.at for row in rows)
    executed = sum(
        row.finished_at - row.started_at for row in rows if row.started_at is not None and row.finished_at is not None
    )
    ended = last.finished_at or last.at if status in ("completed", "failed", "cancelled") else None
    return Step(
        index=last.ordinal if last.ordinal is not None else -1,
        name=last.name or key,
        key=key,
        kind=kind,
        status=status,
        attempt=max(1, *(row.attempt for row in rows)),
        started_at=iso(begun),
        ended_at=iso(ended) if ended is not None else UNSET,
        duration_ms=max(0, ended - begun) / 1000 if ended is not None else UNSET,
        executed_ms=executed / 1000 if executed else UNSET,
        input=_input(rows),
        output=_raw(last.payload) if status == "completed" and kind != TIMER else UNSET,
        error=_step_error(last),
        next_attempt_at=_next_attempt(last),
        child_run_id=_child(rows),
    )


def log_view(run_id: str, entry: Entry) -> LogLine:
    line = _object(entry.payload)
    return LogLine(
        seq=entry.seq,
        ts=iso(entry.at),
        run_id=run_id,
        level=str(line.get("level", "info")),
        message=str(line.get("message", "")),
        fields=line.get("fields") or UNSET,
        scope=entry.key or "root",
        index=entry.ordinal if entry.ordinal is not None else UNSET,
        attempt=max(1, entry.attempt),
    )


def frame_of(run_id: str, entry: Entry) -> Frame | None:
    """A journal row as a frame. Rows that say nothing to a watcher have none."""
    if entry.kind == LOG:
        line = log_view(run_id, entry)
        return LogFrame(
            seq=line.seq,
            ts=line.ts,
            run_id=run_id,
            level=line.level,
            message=line.message,
            scope=line.scope,
            attempt=line.attempt,
            fields=line.fields,
        )
    if entry.kind == RUN and entry.status in _RUN_FRAMES:
        error = _without_stack(error_view(entry.payload)) if entry.status == "blocked" else UNSET
        return RunStatusFrame(
            seq=entry.seq, ts=iso(entry.at), run_id=run_id, status=_RUN_FRAMES[entry.status], error=error
        )
    if is_pass(entry) and entry.status not in ("retrying", "failed"):
        return None
    if entry.kind in COMMAND_KINDS and entry.status in _STEP_FRAMES:
        retry = entry.status == "retrying"
        return StepStatusFrame(
            seq=entry.seq,
            ts=iso(entry.at),
            run_id=run_id,
            name=entry.key or entry.name or "",
            status=_STEP_FRAMES[entry.status],
            attempt=max(1, entry.attempt),
            index=entry.ordinal if entry.ordinal is not None else UNSET,
            error=_without_stack(_step_error(entry)),
            will_retry=retry if retry or entry.status == "failed" else UNSET,
            next_attempt_at=_next_attempt(entry),
            duration_ms=_executed(entry),
            child_run_id=_child([entry]),
        )
    return None


def _executed(entry: Entry) -> float | UnsetType:
    if entry.started_at is None or entry.finished_at is None:
        return UNSET
    return max(0, entry.finished_at - entry.started_at) / 1000


def _step_error(entry: Entry) -> Error | UnsetType:
    if entry.status == "failed":
        return error_view(entry.payload)
    if entry.status == "retrying":
        error = _object(entry.payload).get("error")
        return error_view(msgspec.json.encode(error)) if error is not None else UNSET
    return UNSET


def _without_stack(error: Error | UnsetType) -> Error | UnsetType:
    """Where it happened is for who looks into the run."""
    return error if isinstance(error, UnsetType) else msgspec.structs.replace(error, stack=None)


def _next_attempt(entry: Entry) -> str | UnsetType:
    due = _object(entry.payload).get("next_at") if entry.status == "retrying" else None
    return iso(due) if isinstance(due, int) else UNSET


def _input(rows: list[Entry]) -> Raw | UnsetType:
    for row in rows:
        if row.status == "dispatched" and row.payload:
            try:
                return msgspec.json.decode(row.payload, type=dict[str, Raw]).get("input", UNSET)
            except (msgspec.DecodeError, RecursionError):
                return UNSET
    return UNSET


def _child(rows: list[Entry]) -> str | UnsetType:
    for row in rows:
        if row.kind == CHILD and row.status == "started":
            found = _object(row.payload).get("run_id")
            return found if isinstance(found, str) else UNSET
    return UNSET


def _brief(error: Error | UnsetType) -> Error | UnsetType:
    """For lists: its kind. What a message says may be long, and nobody else's business."""
    return UNSET if isinstance(error, UnsetType) else Error(error.type or error.code, error.code, error.type)


def _raw(payload: bytes | None) -> Raw | UnsetType:
    """A stored payload as a part of the answer, as it was stored."""
    if payload is None:
        return UNSET
    try:
        msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return Raw(b'"(not JSON)"')
    return Raw(payload)


def _origin(run: RunRecord) -> Origin:
    try:
        return origin_of(run.meta)
    except (msgspec.DecodeError, RecursionError):
        return Origin()


def _object(payload: bytes | None) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(payload or b"{}")
    except (msgspec.DecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
