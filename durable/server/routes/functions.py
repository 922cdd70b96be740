"""What apps in any language ask for, one POST each, signed both ways (wire.md section 4)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from durable.server.route import Answer, Call
from durable.server.routes import runs
from durable.server.routes.runs import Cursor
from durable.server.views import Run, RunStatus, Step


class RunsSearch(Struct, frozen=True, rename="camel"):
    function_id: Annotated[str, Meta(max_length=300)] | None = None
    status: RunStatus | None = None
    cursor: Cursor | None = None
    limit: Annotated[int, Meta(ge=1, le=500)] = 50


class RunsFound(Struct, frozen=True, rename="camel"):
    runs: list[Run]
    cursor: str | None


class RunRef(Struct, frozen=True, rename="camel"):
    run_id: Annotated[str, Meta(min_length=1, max_length=400)]


class RunWithSteps(Struct, frozen=True, rename="camel"):
    run: Run
    steps: list[Step]


class Ok(Struct, frozen=True):
    ok: bool = True


async def search_runs(call: Call) -> Answer:
    """Runs of the app, newest first."""
    body: RunsSearch = call.body
    query = runs.RunsQuery(workflow=body.function_id, status=body.status, cursor=body.cursor, limit=body.limit)
    found, cursor = await runs.find(call, query)
    return Answer(RunsFound([await runs.run_shape(call, run) for run in found], cursor))


async def get_run(call: Call) -> Answer:
    """One run with its steps."""
    run = await call.run()
    return Answer(RunWithSteps(await runs.run_shape(call, run), await runs.steps_of(call, run)))


async def cancel_run(call: Call) -> Answer:
    """Ask it to stop."""
    run = await call.run()
    await call.engine.cancel(run.id, "", workspace=run.workspace)
    return Answer(Ok())
