"""Schedules: runs that start by the clock."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from durable.engine.schedules import Schedule
from durable.server.route import Answer, Call, check_id
from durable.server.routes.runs import AppQuery
from durable.server.routes.workflows import Tags, Text
from durable.server.views import iso


class ScheduleBody(Struct, frozen=True, rename="camel"):
    """One of `cron` (with `timezone`), `everySeconds` and `at`."""

    workflow: Text
    input: Raw | UnsetType = UNSET
    cron: Annotated[str, Meta(max_length=200)] | None = None
    timezone: Annotated[str, Meta(max_length=64)] = "UTC"
    every_seconds: Annotated[float, Meta(ge=1)] | None = None
    at: datetime | None = None
    version: Text | None = None
    catch_up: Literal["last", "skip", "all"] = "last"
    catch_up_max: Annotated[int, Meta(ge=1, le=1000)] = 100
    overlap: Literal["allow", "skip", "cancel", "queue"] = "allow"
    priority: Annotated[int, Meta(ge=-1_000_000, le=1_000_000)] | None = None
    tags: Tags = []
    paused: bool | None = None
    """None: as it is; a new one is not."""


class ScheduleView(Struct, frozen=True, rename="camel", omit_defaults=True):
    """A schedule as it stands. `skipped`: occurrences that started no run, by policy or for the `error`."""

    id: str
    workflow: str
    paused: bool
    catch_up: str
    overlap: str
    fired: int
    skipped: int
    cron: str | None = None
    timezone: str | None = None
    every_seconds: float | None = None
    at: str | None = None
    version: str | None = None
    input: Any = None
    tags: list[str] = []
    next_at: str | None = None
    last_at: str | None = None
    last_run: str | None = None
    error: str | None = None


class ScheduleRun(Struct, frozen=True, rename="camel"):
    run_id: str


async def list_schedules(call: Call) -> Answer:
    """All of the workspace, by id."""
    found = await call.engine.schedules.list(workspace=call.workspace(call.query.app))
    return Answer([view(one) for one in found])


async def get_schedule(call: Call) -> Answer:
    """One of them."""
    id, workspace = _meant(call)
    return Answer(view(await call.engine.schedules.get(id, workspace=workspace)))


async def put_schedule(call: Call) -> Answer:
    """See that there is this schedule; the same again changes nothing."""
    body: ScheduleBody = call.body
    id, workspace = _meant(call)
    made = await call.engine.schedules.ensure(
        id,
        body.workflow,
        None if isinstance(body.input, UnsetType) else body.input,
        cron=body.cron,
        every=body.every_seconds,
        at=body.at,
        timezone=body.timezone,
        version=body.version,
        catch_up=body.catch_up,
        catch_up_max=body.catch_up_max,
        overlap=body.overlap,
        priority=body.priority,
        tags=body.tags,
        paused=body.paused,
        workspace=workspace,
    )
    return Answer(view(made))


async def pause_schedule(call: Call) -> Answer:
    """Let nothing come due."""
    id, workspace = _meant(call)
    return Answer(view(await call.engine.schedules.pause(id, workspace=workspace)))


async def resume_schedule(call: Call) -> Answer:
    """Go on from now."""
    id, workspace = _meant(call)
    return Answer(view(await call.engine.schedules.resume(id, workspace=workspace)))


async def trigger_schedule(call: Call) -> Answer:
    """Start a run of it now, beside its occurrences."""
    id, workspace = _meant(call)
    return Answer(ScheduleRun(await call.engine.schedules.trigger(id, workspace=workspace)))


async def remove_schedule(call: Call) -> Answer:
    """No more of it; its runs stay."""
    id, workspace = _meant(call)
    await call.engine.schedules.remove(id, workspace=workspace)
    return Answer(None, status=204)


def view(schedule: Schedule) -> ScheduleView:
    when = schedule.when
    return ScheduleView(
        id=schedule.id,
        workflow=schedule.workflow,
        paused=schedule.paused,
        catch_up=schedule.catch_up,
        overlap=schedule.overlap,
        fired=schedule.fired,
        skipped=schedule.skipped,
        cron=when.cron,
        timezone=when.timezone if when.cron is not None else None,
        every_seconds=None if when.every_us is None else when.every_us / 1_000_000,
        at=_moment(when.at),
        version=schedule.version,
        input=schedule.input,
        tags=list(schedule.tags),
        next_at=_moment(schedule.next_at),
        last_at=_moment(schedule.last_at),
        last_run=schedule.last_run,
        error=schedule.error,
    )


def _moment(us: int | None) -> str | None:
    return None if us is None else iso(us)


def _meant(call: Call) -> tuple[str, str]:
    """The schedule's id and its workspace. A workflow's own begin with a dollar."""
    id = call.params["id"]
    check_id(id.removeprefix("$"))
    query: AppQuery = call.query
    return id, call.workspace(query.app)
