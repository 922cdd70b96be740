"""Events: published, listed, watched."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from durable.engine.events import Publication, Published
from durable.server.errors import ApiError
from durable.server.route import Answer, Call, Stream, check_id
from durable.server.routes.runs import Limit, Seq, next_page, parse_since
from durable.server.routes.workflows import Tags, Text
from durable.server.stream import begin_after, event_blocks
from durable.server.views import iso
from durable.store.admission import Admission, EventQuery, EventRecord, Verdict


class EventBody(Struct, frozen=True, rename="camel"):
    """`dedupeId`: an event of the workspace that has it already is the one, and nothing new happens. `runner`: the runs it
    starts are pinned to that one."""

    name: Text
    data: Raw | UnsetType = UNSET
    app: Text | None = None
    dedupe_id: Text | None = None
    runner: Text | None = None
    target_app: Text | None = None
    session: Text | None = None
    tags: Tags = []


class TriggeredRun(Struct, frozen=True, rename="camel"):
    """What became of the event for one workflow."""

    workflow: str
    run_id: str | UnsetType = UNSET
    skipped: bool = False
    dropped: bool = False
    debounced: bool = False
    batched: bool = False
    deduped: bool = False
    suspended: bool = False


class EventAnswer(Struct, frozen=True, rename="camel"):
    """What became of the event. The flags at the top are those of the one workflow it has triggered; of several, see
    `triggered`. `woke`: runs that waited for it."""

    event_id: str
    woke: int
    skipped: bool
    dropped: bool
    debounced: bool
    batched: bool
    deduped: bool
    suspended: bool
    triggered: list[TriggeredRun]
    run_id: str | UnsetType = UNSET


class EventsQuery(Struct, frozen=True):
    """Newest first."""

    app: str | None = None
    name: Annotated[str, Meta(max_length=300)] | None = None
    since: str | None = None
    limit: Limit = 50
    cursor: Annotated[str, Meta(pattern="^[0-9]{1,18}$")] | None = None


class WatchQuery(Struct, frozen=True, rename={"from_": "from"}):
    app: str | None = None
    from_: Seq | None = None
    """The number of the last event that was seen; none: from now on."""


class Event(Struct, frozen=True, rename="camel", omit_defaults=True):
    """An event as it was accepted. `number` rises with the order of acceptance, gaps allowed."""

    id: str
    name: str
    data: Raw
    app: str
    received_at: str
    number: int
    triggered: list[TriggeredRun]
    dedupe_id: str | UnsetType = UNSET
    runner: str | UnsetType = UNSET
    session: str | UnsetType = UNSET
    tags: list[str] | UnsetType = UNSET


class AppEvent(Struct, frozen=True, rename="camel"):
    """As apps in any language publish. `app`, `targetApp`: only the credential's own."""

    name: Text
    data: Raw | UnsetType = UNSET
    id: Text | None = None
    app: Text | None = None
    target_app: Text | None = None


class AppEvents(Struct, frozen=True):
    events: Annotated[list[AppEvent], Meta(min_length=1, max_length=100)]


class Accepted(Struct, frozen=True, rename="camel"):
    """The same however often the event is sent again with its id."""

    id: str
    event_id: str
    run_ids: list[str]
    triggered: list[TriggeredRun]


class AllAccepted(Struct, frozen=True):
    events: list[Accepted]


async def publish(call: Call) -> Answer:
    """Publish an event: stored, with every run it starts, when the answer comes."""
    body: EventBody = call.body
    workspace = call.workspace(body.target_app or body.app)
    publication = Publication(
        name=body.name,
        data=given(body.data),
        id=body.dedupe_id,
        app=body.app,
        runner=body.runner,
        session=body.session,
        tags=body.tags,
    )
    [found] = await call.engine.publish([publication], workspace=workspace)
    return Answer(_answer(found))


async def list_events(call: Call) -> Answer:
    """Accepted events, newest first; the next page begins at `X-Next-Cursor`."""
    query: EventsQuery = call.query
    asked = EventQuery(
        name=query.name,
        since=parse_since(call, query.since) if query.since else None,
        before=int(query.cursor) if query.cursor else None,
        newest_first=True,
        limit=query.limit,
    )
    found = await call.engine.find_events(asked, workspace=call.workspace(query.app))
    cursor = str(found[-1].number) if len(found) == query.limit else None
    return Answer([_view(call, event) for event in found], headers=next_page(cursor))


async def get_event(call: Call) -> Answer:
    """One event, and what became of it. In development without a key an app other than this process' has to be named."""
    event_id = check_id(call.params["id"])
    found = await call.engine.find_events(EventQuery(id=event_id, limit=1), workspace=call.workspace(call.query.app))
    if not found:
        raise ApiError(404, "not_found", "There is no such event in this workspace.")
    return Answer(_view(call, found[0]))


async def stream_events(call: Call) -> Stream:
    """Events as they are accepted, each as an `event` frame with its number as id."""
    workspace = call.workspace(call.query.app)
    given = call.query.from_
    after = begin_after(call, given) if given is not None or "last-event-id" in call.headers else None
    return Stream(event_blocks(call, workspace, after, lambda event: {"kind": "event"} | _plain(_view(call, event))))


async def accept(call: Call) -> Answer:
    """One event of an app."""
    return Answer((await _accept(call, [call.body]))[0])


async def accept_many(call: Call) -> Answer:
    """Up to a hundred; all are looked at before any is stored."""
    return Answer(AllAccepted(await _accept(call, call.body.events)))


async def _accept(call: Call, events: list[AppEvent]) -> list[Accepted]:
    workspace = call.workspace()
    app = call.service.app_of(workspace)
    publications = [Publication(name=one.name, data=given(one.data), id=one.id, app=app) for one in events]
    found = await call.engine.publish(publications, workspace=workspace)
    return [
        Accepted(
            one.event_id,
            one.event_id,
            [
                admission.run_id
                for admission in one.admissions
                if admission.run_id and admission.verdict is not Verdict.SKIPPED
            ],
            [_triggered(admission) for admission in one.admissions],
        )
        for one in found
    ]


def given(value: Raw | UnsetType) -> Raw | None:
    """What was sent; None where nothing was."""
    return None if isinstance(value, UnsetType) else value


def _answer(found: Published) -> EventAnswer:
    return msgspec.convert(found.wire(), EventAnswer)


def _triggered(one: Admission) -> TriggeredRun:
    return TriggeredRun(
        workflow=one.workflow,
        run_id=one.run_id or UNSET,
        skipped=one.verdict is Verdict.SKIPPED,
        dropped=one.verdict is Verdict.DROPPED,
        debounced=one.verdict is Verdict.DEBOUNCED,
        batched=one.verdict is Verdict.BATCHED,
    )


def _view(call: Call, event: EventRecord) -> Event:
    meta: dict[str, Any] = msgspec.json.decode(event.meta) if event.meta else {}
    return Event(
        id=event.id,
        name=event.name,
        data=Raw(event.data),
        app=call.service.app_of(event.workspace),
        received_at=iso(event.received_at),
        number=event.number,
        triggered=[_triggered(one) for one in event.admissions],
        dedupe_id=event.dedupe_id or UNSET,
        runner=meta.get("runner", UNSET),
        session=meta.get("session", UNSET),
        tags=meta.get("tags", UNSET),
    )


def _plain(event: Event) -> dict[str, Any]:
    return {
        field.encode_name: value
        for field in msgspec.structs.fields(event)
        if not isinstance(value := getattr(event, field.name), UnsetType)
    }
