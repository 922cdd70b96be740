"""What has failed for good and may be tried again: failed and dead runs, newest first. Trying again is a requeue: what had
succeeded is kept, what failed is asked again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec import Struct

from durable.core.errors import ErrorData
from durable.core.payload import decode_error
from durable.protocol.states import Status
from durable.store.records import RunPage, RunQuery, RunRecord


class Failure(Struct, frozen=True):
    """One of them."""

    delivery_id: str
    """What to retry by: the run's id."""
    run_id: str
    workflow: str
    version: str
    status: str
    """failed · dead."""
    error: ErrorData
    created_at: int
    failed_at: int
    """µs."""


async def search(
    find: Callable[[RunQuery], Awaitable[RunPage]], limit: int, cursor: str | None
) -> tuple[list[Failure], str | None]:
    """One page, and where the next begins."""
    page = await find(RunQuery(statuses=(Status.FAILED, Status.DEAD), limit=limit, cursor=cursor))
    return [failure_of(run) for run in page.runs], page.cursor


def failure_of(run: RunRecord) -> Failure:
    """A failed run as a failure."""
    error = decode_error(run.error) if run.error else ErrorData(message=f"The run is {run.status}.")
    return Failure(
        run.id,
        run.id,
        run.workflow,
        run.version,
        run.status.value,
        error,
        run.created_at,
        run.finished_at or run.updated_at,
    )
