"""Workflows: what there is, and starting one by hand."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from durable.core.origin import Origin, meta_of
from durable.server.route import Answer, Call

Tags = Annotated[list[Annotated[str, Meta(min_length=1, max_length=200)]], Meta(max_length=50)]
Text = Annotated[str, Meta(min_length=1, max_length=300)]


class Workflow(Struct, frozen=True, rename="camel", omit_defaults=True):
    app: str
    name: str
    version: str
    tags: list[str]
    category: str | None = None
    timeout_ms: float | None = None
    triggers: list[TriggerView] = []


class TriggerView(Struct, frozen=True, rename="camel", omit_defaults=True):
    """An event of this name (and condition), or the clock, starts it."""

    event: str | None = None
    condition: str | None = None
    cron: str | None = None
    timezone: str | None = None


class TriggerBody(Struct, frozen=True, rename="camel"):
    """`dedupeId`: the same one and input again find the run there is."""

    input: Raw | UnsetType = UNSET
    event_name: Text | None = None
    dedupe_id: Text | None = None
    runner: Text | None = None
    tags: Tags = []
    version: Text | None = None


class Triggered(Struct, frozen=True, rename="camel"):
    run_id: str


async def list_workflows(call: Call) -> Answer:
    """What can be started in this workspace, by name and version."""
    workspace = call.workspace(call.query.app)
    app = call.service.app_of(workspace)
    definitions = call.engine.deps.catalog.of(workspace).workflows()
    return Answer(
        [
            Workflow(
                app=app,
                name=one.name,
                version=one.version,
                tags=sorted(one.tags),
                category=one.category,
                timeout_ms=one.timeout * 1000 if one.timeout else None,
                triggers=[
                    TriggerView(each.event, each.where, each.cron, each.timezone if each.cron else None)
                    for each in one.triggers
                ],
            )
            for one in definitions
        ]
    )


async def trigger(call: Call) -> Answer:
    """Start one run of this workflow."""
    body: TriggerBody = call.body
    workspace = call.path_workspace()
    origin = Origin(
        trigger_kind="manual",
        event_name=body.event_name,
        app=call.service.app_of(workspace),
        runner=body.runner,
    )
    handle = await call.engine.start_run(
        call.params["name"],
        None if isinstance(body.input, UnsetType) else body.input,
        key=body.dedupe_id,
        tags=body.tags,
        version=body.version,
        workspace=workspace,
        meta=meta_of(origin),
    )
    return Answer(Triggered(handle.id))
