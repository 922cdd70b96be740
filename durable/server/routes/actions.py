"""What an operator does with runs: pause, resume, signal, requeue; run again whole, from a step, or otherwise; many at once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from durable.protocol.states import Status
from durable.server import views
from durable.server.errors import ApiError
from durable.server.route import Answer, Call, check_id
from durable.server.routes.runs import Done, parse_since
from durable.server.routes.workflows import Text
from durable.server.views import iso
from durable.store.records import RunQuery

Word = Annotated[str, Meta(max_length=1_000)]


class Pause(Struct, frozen=True):
    by: Word = ""
    reason: Word = ""


class Resume(Struct, frozen=True):
    """`timers`: `run`: deadlines have gone on, what is overdue is due at once; `hold`: all are later by the pause's length."""

    by: Word = ""
    timers: Literal["run", "hold"] = "run"


class Signal(Struct, frozen=True):
    """The same `id` again changes nothing."""

    name: Text
    payload: Raw | UnsetType = UNSET
    id: Text | None = None


class Replay(Struct, frozen=True, rename="camel"):
    """Without an input: the old one. The same key again finds the same new run."""

    input: Raw | UnsetType = UNSET
    idempotency_key: Text | None = None


class RetryFromStep(Struct, frozen=True, rename="camel"):
    """What comes before `step` is kept; it and what follows are asked again."""

    step: Text
    input: Raw | UnsetType = UNSET
    idempotency_key: Text | None = None


class Fork(Struct, frozen=True, rename="camel"):
    """`step` and its other `result`; or another `input`, with `fromStep` where the results before that are to be kept."""

    step: Text | None = None
    result: Raw | UnsetType = UNSET
    input: Raw | UnsetType = UNSET
    from_step: Text | None = None
    idempotency_key: Text | None = None


class NewRun(Struct, frozen=True, rename="camel"):
    run_id: str


class BulkReplay(Struct, frozen=True, rename="camel"):
    """Which finished runs, filters ANDed; `dryRun` counts them. The same `key` again makes no second run of any."""

    app: Text | None = None
    workflow: Text | None = None
    status: Literal["succeeded", "failed", "cancelled"] | None = None
    since: Word | None = None
    tag: Text | None = None
    dry_run: bool = False
    limit: Annotated[int, Meta(ge=1, le=1_000)] = 100
    cursor: Word | None = None
    key: Annotated[str, Meta(max_length=200)] = ""


class BulkOne(Struct, frozen=True, rename="camel", omit_defaults=True):
    run_id: str
    outcome: str
    new_run_id: str | None = None
    code: str = ""
    message: str = ""


class BulkAnswer(Struct, frozen=True, rename="camel"):
    """`matched`: found by this call, of a dry run all there are. `cursor`: where to go on."""

    matched: int
    run_ids: list[str]
    items: list[BulkOne]
    cursor: str | None


class Rerun(Struct, frozen=True, rename="camel"):
    run_id: Annotated[str, Meta(min_length=1, max_length=400)]
    step_id: Text | None = None
    idempotency_key: Text | None = None


class FailuresSearch(Struct, frozen=True):
    limit: Annotated[int, Meta(ge=1, le=500)] = 50
    cursor: Word | None = None


class FailureView(Struct, frozen=True, rename="camel"):
    delivery_id: str
    run_id: str
    function_id: str
    version: str
    status: str
    error: views.Error
    failed_at: str


class Failures(Struct, frozen=True):
    failures: list[FailureView]
    cursor: str | None


class FailureRef(Struct, frozen=True, rename="camel"):
    delivery_id: Annotated[str, Meta(min_length=1, max_length=400)]


class Delivered(Struct, frozen=True):
    """`settled`: this post was the first, and the wait goes on with it."""

    ok: bool
    settled: bool


async def pause(call: Call) -> Answer:
    """Begin nothing more; what is under way finishes and is recorded."""
    run = await call.run()
    body: Pause = call.body
    return Answer(
        Done(changed=await call.engine.pause(run.id, by=body.by, reason=body.reason, workspace=run.workspace))
    )


async def resume(call: Call) -> Answer:
    """Go on."""
    run = await call.run()
    body: Resume = call.body
    return Answer(
        Done(changed=await call.engine.resume(run.id, by=body.by, timers=body.timers, workspace=run.workspace))
    )


async def signal(call: Call) -> Answer:
    """Send it a signal: kept, and used once, even if nothing waits yet."""
    run = await call.run()
    body: Signal = call.body
    payload = _value(body.payload)
    sent = None if payload is UNSET else payload
    return Answer(Done(changed=await call.engine.signal(run.id, body.name, sent, id=body.id, workspace=run.workspace)))


async def requeue(call: Call) -> Answer:
    """Reopen a dead or failed run, or have a blocked one looked at again: what had succeeded is kept."""
    run = await call.run()
    return Answer(Done(changed=await call.engine.requeue(run.id, workspace=run.workspace)))


async def replay(call: Call) -> Answer:
    """A new run of a finished one's version, from the beginning."""
    run = await call.run()
    body: Replay = call.body
    new = await call.engine.replay(
        run.id, _value(body.input), idempotency_key=body.idempotency_key, workspace=run.workspace
    )
    return Answer(NewRun(new.id))


async def retry_from_step(call: Call) -> Answer:
    """A new run that keeps what came before a step."""
    run = await call.run()
    body: RetryFromStep = call.body
    new = await call.engine.rerun(
        run.id,
        from_step=body.step,
        input=_value(body.input),
        idempotency_key=body.idempotency_key,
        workspace=run.workspace,
    )
    return Answer(NewRun(new.id))


async def fork(call: Call) -> Answer:
    """A new run that begins as this one did, but for one thing."""
    run = await call.run()
    body: Fork = call.body
    edits: dict[str, Any] = {}
    for name in ("step", "from_step"):
        if (named := getattr(body, name)) is not None:
            edits[name] = named
    for name in ("result", "input"):
        if (value := _value(getattr(body, name))) is not UNSET:
            edits[name] = value
    new = await call.engine.fork(run.id, edits, idempotency_key=body.idempotency_key, workspace=run.workspace)
    return Answer(NewRun(new.id))


async def bulk_replay(call: Call) -> Answer:
    """New runs of all finished ones a filter finds, each on its own; at most `limit` in one call."""
    body: BulkReplay = call.body
    statuses = tuple(sorted(status for status, word in views.ENDED.items() if word == body.status)) or None
    query = RunQuery(
        workflow=body.workflow,
        statuses=statuses,
        since=parse_since(call, body.since) if body.since else None,
        tag=body.tag,
        cursor=check_id(body.cursor) if body.cursor else None,
    )
    found = await call.engine.bulk(
        "replay",
        query,
        dry_run=body.dry_run,
        limit=body.limit,
        workspace=call.workspace(body.app),
        key=body.key,
    )
    items = [BulkOne(one.run_id, one.outcome, one.new_run_id, one.code, one.message) for one in found.items]
    return Answer(BulkAnswer(found.matched, found.run_ids, items, found.cursor))


# ------------------------------------------------------------------ for apps in any language


async def rerun(call: Call) -> Answer:
    """Run it again: all of it, or from a step on."""
    run = await call.run()
    body: Rerun = call.body
    new = await call.engine.rerun(
        run.id, from_step=body.step_id, idempotency_key=body.idempotency_key, workspace=run.workspace
    )
    return Answer(NewRun(new.id))


async def search_failures(call: Call) -> Answer:
    """What has failed for good, newest first."""
    body: FailuresSearch = call.body
    cursor = check_id(body.cursor) if body.cursor else None
    found, after = await call.engine.failures(body.limit, cursor, workspace=call.workspace())
    shown = [
        FailureView(
            one.delivery_id,
            one.run_id,
            one.workflow,
            one.version,
            views.ENDED[Status(one.status)],
            views.Error(one.error.message, one.error.code, one.error.type),
            iso(one.failed_at),
        )
        for one in found
    ]
    return Answer(Failures(shown, after))


async def retry_failure(call: Call) -> Answer:
    """Try a failure again: what had succeeded is kept."""
    delivery = check_id(call.body.delivery_id)
    changed = await call.engine.retry_failure(delivery, workspace=call.workspace())
    return Answer(Done(changed=changed))


# ------------------------------------------------------------------ webhooks


async def hook(call: Call) -> Answer:
    """What somebody posts to a wait's address. The address is the credential."""
    token = call.params["token"]
    if len(token) > 4_000:
        raise ApiError(404, "not_found", "There is no such address.")
    return Answer(Delivered(True, await call.engine.deliver_webhook(token, call.raw)))


def _value(value: Raw | UnsetType) -> Any:
    return UNSET if isinstance(value, UnsetType) else msgspec.json.decode(value)
