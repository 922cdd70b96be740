"""What stands in a row, and how a message becomes one and is read back.

The documented columns carry what every language's worker needs. The rest of a message, and a turn or a decision as a whole,
stands in `extra`, which like all other columns of ours may be null.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from msgspec import Raw, Struct, structs

from durable.core import payload
from durable.core.errors import ErrorData, PayloadError
from durable.protocol.codec import decode_decision, decode_result, decode_task, decode_turn, encode
from durable.protocol.messages import Answer, RemoteTask, Task, WorkflowDecision, WorkflowTask

TASK_COLUMNS = ("step_id", "run_id", "seq", "name", "grp", "input", "attempt", "status")
TASK_EXTRAS = ("priority", "token", "kind", "extra")
RESULT_COLUMNS = ("step_id", "run_id", "seq", "status", "output", "error", "started_at")
RESULT_EXTRAS = ("attempt", "token", "kind", "extra")

WAITING = "pending"
"""What `status` of a task says. Nobody reads it."""
TURN, DECISION = "turn", "decision"
"""What `kind` says of a row that is no step's."""


class TaskRow(NamedTuple):
    """A task as it is written."""

    step_id: str
    run_id: str
    seq: int
    name: str
    grp: str
    input: str | None
    attempt: int | None
    status: str = WAITING
    priority: int | None = None
    token: str | None = None
    kind: str | None = None
    extra: str | None = None


class ClaimedTask(NamedTuple):
    """A task as it is read, with what only the tables know."""

    row: TaskRow
    claim: str
    """`claimed_by`: another one for each claim."""
    deliveries: int
    """How often workers of ours have claimed this attempt."""
    cancelled: bool


class ResultRow(NamedTuple):
    """A result as it is written. `attempt` is the task's: which task it ends."""

    step_id: str
    run_id: str
    seq: int
    status: str
    output: str | None
    error: str | None
    started_at: int | None
    attempt: int | None = None
    token: str | None = None
    kind: str | None = None
    extra: str | None = None


class ClaimedResult(NamedTuple):
    """A result as it is read."""

    row: ResultRow
    claim: str


class Seen(NamedTuple):
    """How a task stands that was looked at."""

    row: TaskRow
    claim: str | None
    claimed_at: int | None
    deliveries: int
    cancelled: bool


class _StepExtra(Struct, frozen=True, rename="camel", omit_defaults=True):
    """What a step's task has beside its columns."""

    traceparent: str | None = None
    transport: str | None = None
    context: dict[str, Any] | None = None


def task_row(task: Task, limit: int) -> TaskRow:
    """Raises PayloadError for what no wire carries, or above `limit` bytes."""
    whole = encode(task, limit=limit)
    payload.check(whole, what=f"the task {task.id}", limit=limit)
    if isinstance(task, WorkflowTask):
        return TaskRow(
            task.task_id, task.run_id, task.seq, task.workflow, task.group, None, task.attempt,
            priority=task.priority, kind=TURN, extra=whole.decode(),
        )  # fmt: skip
    extra = msgspec.json.encode(_StepExtra(task.traceparent, task.transport, task.context)).decode()
    return TaskRow(
        task.step_id, task.run_id, task.seq, task.name, task.group, bytes(task.input).decode(), task.attempt,
        priority=task.priority, token=task.token, extra=None if extra == "{}" else extra,
    )  # fmt: skip


def task_of(row: TaskRow, limit: int) -> Task:
    """Raises PayloadError."""
    if row.kind == TURN:
        return decode_turn((row.extra or "").encode())
    task = bare_task(row)
    given = b"null" if row.input is None else _bytes(row.input)
    payload.check(given, what=f"the input of {row.name}", limit=limit)
    extra = payload.decode((row.extra or "{}").encode(), _StepExtra, what="the column extra")
    task = structs.replace(
        task, input=Raw(given), traceparent=extra.traceparent, transport=extra.transport, context=extra.context
    )
    return decode_task(encode(task, limit=limit), limit=limit)


def bare_task(row: TaskRow) -> RemoteTask:
    """A step's task as far as its small columns go: enough to answer it. An engine that counts no attempts means the first."""
    attempt = 1 if row.attempt is None else row.attempt
    return RemoteTask(
        run_id=row.run_id, seq=row.seq, step_id=row.step_id, name=row.name, group=row.grp, input=Raw(b"null"),
        attempt=attempt, priority=row.priority, token=row.token,
    )  # fmt: skip


def bare_turn(row: TaskRow) -> WorkflowTask:
    """The same for a turn."""
    return WorkflowTask(
        task_id=row.step_id, run_id=row.run_id, workflow=row.name, workflow_version="", input=Raw(b"null"), history=[],
        group=row.grp, attempt=row.attempt or 1,
    )  # fmt: skip


def result_row(answer: Answer, attempt: int | None = None) -> ResultRow:
    """`attempt`: the task's, where it is at hand. Raises PayloadError."""
    whole = encode(answer, limit=1 << 30)
    if isinstance(answer, WorkflowDecision):
        return ResultRow(
            answer.task_id, answer.run_id, -1, answer.status, None, None, None,
            attempt=attempt, kind=DECISION, extra=whole.decode(),
        )  # fmt: skip
    error = None if answer.error is None else msgspec.json.encode(answer.error).decode()
    return ResultRow(
        answer.step_id, answer.run_id, answer.seq, answer.status,
        bytes(answer.output).decode() if isinstance(answer.output, Raw) else None, error, answer.started_at,
        attempt=answer.attempt if attempt is None else attempt, token=answer.token,
        extra=None if not answer.events else msgspec.json.encode({"events": answer.events}).decode(),
    )  # fmt: skip


def answer_of(row: ResultRow, limit: int) -> Answer:
    """What the row says; a failed result in its place if it says whose it is and the rest cannot be kept, as the codec has
    it. Raises PayloadError if it is nobody's."""
    if row.kind == DECISION:
        return decode_decision((row.extra or "").encode())
    fields: dict[str, Any] = {"runId": row.run_id, "seq": row.seq, "stepId": row.step_id, "status": row.status}
    optional = {"startedAt": row.started_at, "attempt": row.attempt, "token": row.token}
    fields |= {name: value for name, value in optional.items() if value is not None}
    try:
        if row.output is not None:
            # By itself: stitched in as it is, half a text could say more than an output.
            output = _bytes(row.output)
            payload.check(output, what=f"the output of {row.step_id}", limit=limit)
            fields["output"] = Raw(output)
        if row.error is not None:
            fields["error"] = _error(_bytes(row.error))
        if row.extra is not None:
            fields["events"] = msgspec.json.decode(row.extra.encode())["events"]
    except (PayloadError, msgspec.MsgspecError, UnicodeError, RecursionError, LookupError, TypeError) as error:
        code = error.code if isinstance(error, PayloadError) else PayloadError.code
        refused = ErrorData(message=f"The result's row cannot be read: {error}", code=code, retryable=False)
        fields |= {"status": "failed", "error": refused}
        fields.pop("output", None)
    return decode_result(msgspec.json.encode(fields), limit=limit)


def _bytes(column: str | bytes) -> bytes:
    """SQLite gives back what was put in, and some put in bytes."""
    return column if isinstance(column, bytes) else column.encode()


def _error(column: bytes) -> Any:
    """Some write the bare message: then that is the error."""
    try:
        return msgspec.json.decode(column)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return column.decode("utf-8", "replace")
