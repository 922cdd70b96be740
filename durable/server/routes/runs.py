"""Runs: lists, one of them with its steps and lines, its stream, and what an operator does with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from durable.core.durations import seconds
from durable.core.errors import DurableError
from durable.core.journal import LOG, Entry
from durable.protocol.states import Activity, Status
from durable.server import views
from durable.server.errors import ApiError
from durable.server.route import Answer, Call, Stream, check_id
from durable.server.stream import activity_blocks, begin_after, run_blocks
from durable.server.views import LogLine, Progress, Run, RunStatus, Step
from durable.store.records import RunQuery, RunRecord

PAGE = 500
COUNTED = 5_000
"""Journal rows read for the counts of one list."""
SCANNED = 5_000
"""Rows looked at for one page of a filter that no index answers."""
MAX_STEPS = 50_000
"""Journal rows of a run whose steps are shown."""

Limit = Annotated[int, Meta(ge=1, le=500)]
Cursor = Annotated[str, Meta(max_length=400)]
Seq = Annotated[int, Meta(ge=0, le=2**53)]


class RunsQuery(Struct, frozen=True):
    """Filters are ANDed."""

    app: str | None = None
    workflow: str | None = None
    status: RunStatus | None = None
    since: str | None = None
    """ISO 8601, epoch milliseconds, or an age as `24h`."""
    q: Annotated[str, Meta(max_length=200)] | None = None
    """Part of an id, a workflow's name or a key; literally."""
    tag: str | None = None
    sort: Literal["startedAt", "createdAt"] = "createdAt"
    dir: Literal["asc", "desc"] = "desc"
    limit: Limit = 50
    cursor: Cursor | None = None


class SinceQuery(Struct, frozen=True):
    app: str | None = None
    workflow: str | None = None
    since: str = "24h"


class SeriesQuery(Struct, frozen=True):
    app: str | None = None
    workflow: str | None = None
    since: str = "24h"
    buckets: Annotated[int, Meta(ge=1, le=500)] = 60


class FromQuery(Struct, frozen=True, rename={"from_": "from"}):
    from_: Seq | None = None
    """The seq of the last frame that was seen; frames above it come."""


class LogsQuery(Struct, frozen=True, rename={"from_": "from"}):
    from_: Seq = 0
    limit: Limit = 100


class AppQuery(Struct, frozen=True):
    app: str | None = None


class Cancel(Struct, frozen=True):
    reason: Annotated[str, Meta(max_length=1_000)] = ""


class Done(Struct, frozen=True):
    """`changed` false: it had been asked for before."""

    ok: bool = True
    changed: bool = True


class Stats(Struct, frozen=True, rename="camel"):
    """Runs made since then, by status. `truncated`: there are more; these are the newest."""

    total: int
    by_status: dict[str, int]
    failure_rate: float
    """Share of the ended ones that did not succeed."""
    p50_ms: float | None
    p95_ms: float | None
    truncated: bool


class Bucket(Struct, frozen=True, rename="camel"):
    ts: str
    started: int
    succeeded: int
    failed: int


# ------------------------------------------------------------------ reading


async def list_runs(call: Call) -> Answer:
    """Newest first. A list has no inputs and outputs; the next page begins at `X-Next-Cursor`."""
    query: RunsQuery = call.query
    runs, cursor = await find(call, query)
    counts = await _count(call, runs)
    shown = [_view(call, run, counts.get(run.id), payloads=False) for run in runs]
    return Answer(shown, headers=next_page(cursor))


async def get_run(call: Call) -> Answer:
    """One run, with its input and what came of it."""
    return Answer(await run_shape(call, await call.run()))


async def run_shape(call: Call, run: RunRecord) -> Run:
    """A run as the API shows it alone."""
    progress = Progress(await _entries(call, run)) if run.seq <= MAX_STEPS else None
    return _view(call, run, progress)


async def get_steps(call: Call) -> Answer:
    """Its steps, in the order of their first call."""
    return Answer(await steps_of(call, await call.run()))


async def steps_of(call: Call, run: RunRecord) -> list[Step]:
    if run.seq > MAX_STEPS:
        raise ApiError(
            422, "payload_too_large", f"This run's journal has {run.seq} rows; steps are shown of up to {MAX_STEPS}."
        )
    return views.step_views(await _entries(call, run))


async def get_logs(call: Call) -> Answer:
    """Its lines above `from`, oldest first; the next page begins at `X-Next-Cursor`, which is a `from`."""
    run = await call.run()
    query: LogsQuery = call.query
    lines: list[LogLine] = []
    after, scanned = query.from_, 0
    while len(lines) < query.limit and scanned < SCANNED:
        entries = await call.engine.deps.store.page(run.id, after, PAGE)
        scanned += len(entries)
        for entry in entries:
            after = entry.seq
            if entry.kind == LOG:
                lines.append(views.log_view(run.id, entry))
                if len(lines) == query.limit:
                    break
        if len(entries) < PAGE:
            break
    more = after < run.seq and (len(lines) == query.limit or scanned >= SCANNED)
    return Answer(lines, headers=next_page(str(after) if more else None))


async def stream_run(call: Call) -> Stream:
    """Its frames above `from`, as they become durable, until it has ended."""
    run = await call.run()
    return Stream(run_blocks(call, run, begin_after(call, call.query.from_)))


async def stream_runs(call: Call) -> Stream:
    """A `run_status` frame whenever a run of the workspace has another status."""
    resumed = "last-event-id" in call.headers
    return Stream(activity_blocks(call, call.workspace(call.query.app), resumed=resumed))


async def stats(call: Call) -> Answer:
    """How many runs there were, and how they ended."""
    runs, truncated = await _since(call)
    by_status: dict[str, int] = {}
    for run in runs:
        word = views.status_word(run.status, run.activity)
        by_status[word] = by_status.get(word, 0) + 1
    ended = [run for run in runs if run.finished_at is not None]
    bad = sum(run.status is not Status.COMPLETED for run in ended)
    took = sorted((run.finished_at or 0) - (run.started_at or run.created_at) for run in ended)
    return Answer(
        Stats(len(runs), by_status, bad / len(ended) if ended else 0.0, _rank(took, 0.5), _rank(took, 0.95), truncated)
    )


async def timeseries(call: Call) -> Answer:
    """The same over time, in equal stretches from `since` to now."""
    query: SeriesQuery = call.query
    runs, _ = await _since(call)
    now = call.engine.clock.now()
    begin = parse_since(call, query.since)
    width = max(1, math.ceil((now - begin) / query.buckets))
    started, succeeded, failed = ([0] * query.buckets for _ in range(3))

    def add(column: list[int], at: int | None) -> None:
        if at is not None and at >= begin:
            column[min(query.buckets - 1, (at - begin) // width)] += 1

    for run in runs:
        add(started, run.created_at)
        if run.status is Status.COMPLETED:
            add(succeeded, run.finished_at)
        elif run.finished_at is not None and run.status is not Status.CANCELLED:
            add(failed, run.finished_at)
    rows = zip(started, succeeded, failed, strict=True)
    return Answer([Bucket(views.iso(begin + n * width), *row) for n, row in enumerate(rows)])


# ------------------------------------------------------------------ doing


async def cancel(call: Call) -> Answer:
    """Ask it to stop. It may clean up; its stream tells when it has ended."""
    run = await call.run()
    changed = await call.engine.cancel(run.id, call.body.reason, workspace=run.workspace)
    return Answer(Done(changed=changed))


# ------------------------------------------------------------------ inside


async def find(call: Call, query: Any) -> tuple[list[RunRecord], str | None]:
    """The page a query means, and where the next begins. A status of ours may be several of the store's."""
    workspace = call.workspace(query.app)
    statuses, activities = _meant(query.status)
    asked = RunQuery(
        workflow=query.workflow,
        statuses=tuple(sorted(statuses)) if statuses is not None else None,
        activity=next(iter(activities))
        if activities is not None and statuses == {Status.ACTIVE} and len(activities) == 1
        else None,
        since=parse_since(call, query.since) if query.since else None,
        text=query.q,
        tag=query.tag,
        oldest_first=query.dir == "asc",
        cursor=check_id(query.cursor) if query.cursor else None,
        limit=query.limit,
    )
    found: list[RunRecord] = []
    scanned = 0
    while True:
        page = await call.engine.find(asked, workspace=workspace)
        scanned += len(page.runs)
        for run in page.runs:
            if query.status is None or views.status_word(run.status, run.activity) == query.status:
                found.append(run)
                if len(found) == query.limit:
                    more = page.cursor is not None or run.id != page.runs[-1].id
                    return found, run.id if more else None
        if page.cursor is None or scanned >= SCANNED:
            return found, page.cursor
        asked = msgspec.structs.replace(asked, cursor=page.cursor)


def _meant(word: str | None) -> tuple[set[Status] | None, set[Activity] | None]:
    """The store's words for one of ours; those not among them are sorted out afterwards."""
    if word is None:
        return None, None
    statuses = {status for status, told in views.ENDED.items() if told == word}
    activities = {activity for activity, told in views.ACTIVE.items() if told == word}
    return statuses | ({Status.ACTIVE} if activities else set()), activities or None


def parse_since(call: Call, text: str) -> int:
    """A moment in µs. Raises ApiError."""
    from datetime import UTC, datetime

    now = call.engine.clock.now()
    try:
        if text.isascii() and text.isdigit() and len(text) < 17:
            return int(text) * 1_000
        if text[:1].isdigit() and "-" not in text:
            return max(0, now - int(seconds(text) * 1_000_000))
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)
    except (ValueError, OverflowError, DurableError):
        raise ApiError(
            400, "bad_query", "A moment is ISO 8601, milliseconds since the epoch, or an age as 24h."
        ) from None


def next_page(cursor: str | None) -> Mapping[str, str]:
    return {} if cursor is None else {"x-next-cursor": cursor}


def _view(call: Call, run: RunRecord, progress: Progress | None, *, payloads: bool = True) -> Run:
    own = run.workspace == call.engine.deps.settings.workspace
    return views.run_view(run, progress, payloads=payloads, local_app=call.service.local_app if own else None)


async def _entries(call: Call, run: RunRecord) -> list[Entry]:
    return (await call.engine.deps.store.load([run.id]))[0].entries


async def _count(call: Call, runs: list[RunRecord]) -> dict[str, Progress]:
    """What journals say of these runs, as far as they are short enough together."""
    chosen, rows = [], 0
    for run in runs:
        if rows + run.seq <= COUNTED:
            rows += run.seq
            chosen.append(run.id)
    journals = await call.engine.deps.store.load(chosen) if chosen else []
    return {run_id: Progress(journal.entries) for run_id, journal in zip(chosen, journals, strict=True)}


async def _since(call: Call) -> tuple[list[RunRecord], bool]:
    query = call.query
    asked = RunQuery(workflow=query.workflow, since=parse_since(call, query.since), limit=PAGE)
    workspace = call.workspace(query.app)
    found: list[RunRecord] = []
    while True:
        page = await call.engine.find(asked, workspace=workspace)
        found += page.runs
        if page.cursor is None or len(found) >= SCANNED:
            return found, page.cursor is not None
        asked = msgspec.structs.replace(asked, cursor=page.cursor)


def _rank(took: list[int], share: float) -> float | None:
    return took[min(len(took) - 1, math.floor(share * len(took)))] / 1000 if took else None
