"""Runs and journal entries as JSON: the names of the wire, times in ISO 8601 UTC, payloads as they were stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from durable.cli.text import iso, raw

if TYPE_CHECKING:
    from durable.core.journal import Entry
    from durable.store.records import RunRecord


def run_shape(run: RunRecord, *, payloads: bool = True) -> dict[str, Any]:
    """A run's row. A list leaves the input and the output out."""
    active = run.status == "active"
    shape: dict[str, Any] = {
        "id": run.id,
        "workspace": run.workspace,
        "workflow": run.workflow,
        "version": run.version,
        "status": run.status,
        "activity": run.activity if active else None,
        "idempotencyKey": run.idempotency_key,
        "priority": run.priority,
        "tags": list(run.tags),
        "attributes": dict(run.attributes),
        "parent": None
        if run.parent is None
        else {"runId": run.parent.run_id, "key": run.parent.key, "ordinal": run.parent.ordinal},
        "origin": raw(run.meta),
        "owner": run.owner,
        "epoch": run.epoch,
        "seq": run.seq,
        "unread": run.inbox_last - run.inbox_read,
        "recoveryAttempts": run.recovery_attempts,
        "wakeAt": iso(run.wake_at),
        "createdAt": iso(run.created_at),
        "startedAt": iso(run.started_at),
        "finishedAt": iso(run.finished_at),
        "updatedAt": iso(run.updated_at),
        "error": raw(run.error),
    }
    if payloads:
        shape |= {"input": raw(run.input), "output": raw(run.output)}
    return shape


def entry_shape(run_id: str, entry: Entry) -> dict[str, Any]:
    """A journal row."""
    return {
        "runId": run_id,
        "seq": entry.seq,
        "ts": iso(entry.at),
        "kind": entry.kind,
        "status": entry.status,
        "key": entry.key,
        "ordinal": entry.ordinal,
        "name": entry.name,
        "attempt": entry.attempt,
        "payload": raw(entry.payload),
        "enqueuedAt": iso(entry.enqueued_at),
        "startedAt": iso(entry.started_at),
        "finishedAt": iso(entry.finished_at),
    }
