"""Every route, with what it asks for: credential, role, what it is about, limits. A request that has no row here has no
handler; a test looks for routes that stand in the application and not in this table."""

from __future__ import annotations

from typing import Any

from durable.server.route import Nothing, Route
from durable.server.routes import flow, functions, health, runs, workflows, workspaces
from durable.server.routes.runs import AppQuery
from durable.server.views import LogLine, Run, Step

STREAM = "stream"
READ: dict[str, Any] = {"method": "GET", "auth": "key", "role": "read"}
WRITE: dict[str, Any] = {"method": "POST", "auth": "key", "role": "full"}
ADMIN: dict[str, Any] = {"auth": "admin", "role": "admin", "scope": "service", "cost": 5.0}
OPEN: dict[str, Any] = {"method": "GET", "auth": "none", "role": "read", "scope": "service"}
APP: dict[str, Any] = {"method": "POST", "auth": "app", "max_body": 1 << 20}

ROUTES: tuple[Route, ...] = (
    # -- the process
    Route(path="/healthz", handler=health.healthz, summary="Is the process alive", answer=health.Health, **OPEN),
    Route(path="/readyz", handler=health.readyz, summary="May it be asked", answer=health.Ready, **OPEN),
    Route(path="/openapi.json", handler=health.openapi, summary="This document", answer=dict[str, Any], **OPEN),
    # -- runs
    Route(
        path="/runs",
        handler=runs.list_runs,
        summary="List runs",
        scope="workspace",
        cost=5.0,
        query=runs.RunsQuery,
        answer=list[Run],
        **READ,
    ),
    Route(
        path="/runs/stats",
        handler=runs.stats,
        summary="Count runs by status",
        scope="workspace",
        cost=20.0,
        query=runs.SinceQuery,
        answer=runs.Stats,
        **READ,
    ),
    Route(
        path="/runs/timeseries",
        handler=runs.timeseries,
        summary="Count runs over time",
        scope="workspace",
        cost=20.0,
        query=runs.SeriesQuery,
        answer=list[runs.Bucket],
        **READ,
    ),
    Route(
        path="/runs/stream",
        handler=runs.stream_runs,
        summary="Watch all runs",
        scope="workspace",
        cost=5.0,
        query=AppQuery,
        answer=STREAM,
        **READ,
    ),
    Route(path="/runs/{id}", handler=runs.get_run, summary="Get a run", scope="run", answer=Run, **READ),
    Route(
        path="/runs/{id}/steps",
        handler=runs.get_steps,
        summary="List a run's steps",
        scope="run",
        cost=2.0,
        answer=list[Step],
        **READ,
    ),
    Route(
        path="/runs/{id}/logs",
        handler=runs.get_logs,
        summary="List a run's log lines",
        scope="run",
        cost=2.0,
        query=runs.LogsQuery,
        answer=list[LogLine],
        **READ,
    ),
    Route(
        path="/runs/{id}/stream",
        handler=runs.stream_run,
        summary="Watch a run",
        scope="run",
        cost=2.0,
        query=runs.FromQuery,
        answer=STREAM,
        **READ,
    ),
    Route(
        path="/runs/{id}/cancel",
        handler=runs.cancel,
        summary="Cancel a run",
        scope="run",
        body=runs.Cancel,
        answer=runs.Done,
        **WRITE,
    ),
    # -- workflows and limits
    Route(
        path="/workflows",
        handler=workflows.list_workflows,
        summary="List workflows",
        scope="workspace",
        query=AppQuery,
        answer=list[workflows.Workflow],
        **READ,
    ),
    Route(
        path="/workflows/{app}/{name}/trigger",
        handler=workflows.trigger,
        summary="Start a run of a workflow",
        scope="workspace",
        body=workflows.TriggerBody,
        answer=workflows.Triggered,
        **WRITE,
    ),
    Route(
        path="/flow-state",
        handler=flow.flow_state,
        summary="How full the limits are",
        scope="workspace",
        cost=5.0,
        query=AppQuery,
        answer=list[flow.FlowState],
        **READ,
    ),
    # -- apps and workspaces
    Route(
        path="/apps",
        handler=workspaces.list_apps,
        summary="List apps",
        scope="workspace",
        cost=5.0,
        answer=list[workspaces.AppView],
        **READ,
    ),
    Route(
        path="/api/apps",
        method="POST",
        handler=workspaces.create_app,
        summary="Make a workspace, or find it",
        body=workspaces.NewApp,
        answer=workspaces.AppKey,
        **ADMIN,
    ),
    Route(
        path="/workspaces",
        method="GET",
        handler=workspaces.list_workspaces,
        summary="List workspaces",
        answer=list[workspaces.WorkspaceView],
        **ADMIN,
    ),
    Route(
        path="/workspaces/{id}/rotate",
        method="POST",
        handler=workspaces.rotate,
        summary="Give it a new key",
        body=workspaces.Rotation,
        answer=workspaces.NewKey,
        **ADMIN,
    ),
    Route(
        path="/workspaces/{id}/readers",
        method="POST",
        handler=workspaces.add_reader,
        summary="Give it a read-only key",
        body=Nothing,
        answer=workspaces.NewKey,
        **ADMIN,
    ),
    Route(
        path="/workspaces/{id}/keys/{key}",
        method="DELETE",
        handler=workspaces.end_key,
        summary="End a key",
        status=204,
        **ADMIN,
    ),
    # -- apps in any language, one POST for each thing
    Route(
        path="/runs/search",
        handler=functions.search_runs,
        summary="List runs (apps)",
        role="read",
        scope="workspace",
        cost=5.0,
        body=functions.RunsSearch,
        answer=functions.RunsFound,
        **APP,
    ),
    Route(
        path="/runs/get",
        handler=functions.get_run,
        summary="Get a run with its steps (apps)",
        role="read",
        scope="run",
        body=functions.RunRef,
        answer=functions.RunWithSteps,
        **APP,
    ),
    Route(
        path="/runs/cancel",
        handler=functions.cancel_run,
        summary="Cancel a run (apps)",
        role="full",
        scope="run",
        body=functions.RunRef,
        answer=functions.Ok,
        **APP,
    ),
)
