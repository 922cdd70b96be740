"""Events: published with the runs they start, told to the runs that wait for them, looked back at by waits that open late.

An event is stored with all that it starts in one transaction. Its waiters are told after that, by inbox rows, and then it is
settled; one whose publisher died in between is found by the sweep, and told of again: a run takes each event once. What was
accepted before a wait opened, or before its time was up, is looked for in the store when the wait opens and when it ends, so no
message has to be in time (B11, B12, S19).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Raw, Struct

from durable.core.commands import SendEvent, WaitEvent
from durable.core.errors import DurableError, EngineStopped, StoreError
from durable.core.event import Fact, check_event_name, fact_of
from durable.core.journal import EMIT
from durable.core.match import holds, probes_of
from durable.core.names import check_name
from durable.core.origin import Origin
from durable.core.payload import DEFAULT_LIMIT, check, describe, encode, encode_error
from durable.core.replay import asks_for
from durable.engine.admission import trigger_of, wanted
from durable.engine.committer import Group
from durable.engine.executor import Executor
from durable.engine.residents import Arrival, Resident
from durable.engine.resume import event_arrival
from durable.engine.signals import Mail
from durable.store.admission import Admission, EventOutcome, EventQuery, EventRecord, NewEvent, Verdict, Waiter
from durable.store.records import Message, SendStatus

log = logging.getLogger("durable.events")

MARGIN = 2_048
"""Bytes of a payload that are left for what is put around an event's data."""
PAGE = 50
"""Events read at once when looking back, and in a sweep."""
RETRY_SECONDS = 0.1
CLOSE_SECONDS = 1.0
"""What an engine that stops waits for those to be told whose event it has just stored."""
SETTLED_AFTER = 1_000_000
"""µs after which a publisher is taken to have died before it told the waiters."""

_TAKEN = frozenset({Verdict.STARTED, Verdict.DEBOUNCED, Verdict.BATCHED})


class Publication(Struct, kw_only=True):
    """An event to publish."""

    name: str
    data: Any = None
    """Encoded already, and a stranger's, if it is Raw."""
    id: str | None = None
    """The caller's key: an event of the workspace that has it already is the one, and nothing new happens."""
    app: str | None = None
    runner: str | None = None
    """The runner that the runs it starts are pinned to."""
    session: str | None = None
    tags: Sequence[str] = ()
    """Of the runs it starts, beside their workflow's."""


class Published(Struct, frozen=True):
    """What became of an event."""

    event_id: str
    duplicate: bool
    """It was there before; `admissions` is what happened then."""
    woke: int
    """Runs that waited for it."""
    admissions: tuple[Admission, ...]

    def wire(self) -> dict[str, Any]:
        """As `POST /events` answers (protocol/service): flags of one function stand at the top too."""
        triggered = [_flags(one, self.duplicate) for one in self.admissions]
        top = triggered[0] if len(triggered) == 1 else dict.fromkeys(_FLAGS, False)
        answer = {"eventId": self.event_id, "woke": self.woke} | {flag: top[flag] for flag in _FLAGS}
        answer["deduped"] = self.duplicate
        if len(triggered) == 1 and "runId" in top:
            answer["runId"] = top["runId"]
        return answer | {"triggered": triggered}


_FLAGS = ("skipped", "dropped", "debounced", "batched", "deduped", "suspended")


def _flags(one: Admission, duplicate: bool) -> dict[str, Any]:
    flags: dict[str, Any] = {"workflow": one.workflow}
    if one.run_id is not None:
        flags["runId"] = one.run_id
    return flags | {
        "skipped": one.verdict is Verdict.SKIPPED,
        "dropped": one.verdict is Verdict.DROPPED,
        "debounced": one.verdict is Verdict.DEBOUNCED,
        "batched": one.verdict is Verdict.BATCHED,
        "deduped": duplicate,
        "suspended": False,
    }


class Events:
    """Events of one engine."""

    def __init__(self, executor: Executor, mail: Mail) -> None:
        self._executor = executor
        self._mail = mail
        deps = executor.deps
        self._catalog, self._ids, self._store = deps.catalog, deps.ids, deps.store
        self._limit = min(DEFAULT_LIMIT, deps.store.capabilities.max_payload - MARGIN)
        most = deps.store.capabilities.max_batch
        # One call at a time: events of one publisher are accepted in its order.
        self._group: Group[NewEvent, EventOutcome] = Group(
            "events", self._publish, max_items=most, size=lambda event: len(event.data) * (1 + len(event.triggers))
        )
        self._settling: Group[str, None] = Group("settled events", self._settle, max_items=most)
        self._looking: dict[Resident, set[str]] = {}
        """Runs that are looked back for, and for which of their waits by key."""
        self._telling = 0
        self._told = asyncio.Event()
        """Set while nobody is being told of an event."""
        self._told.set()
        self._sweeping = False

    @property
    def trouble(self) -> StoreError | None:
        """Why the store takes none right now, or None."""
        return self._group.trouble

    async def publish(self, publications: Sequence[Publication], workspace: str) -> list[Published]:
        """Store events, and tell those who wait. All are looked at before any is stored. Raises DefinitionError for a name,
        PayloadError, PayloadTooLarge, EngineStopped."""
        events = [self._new(one, workspace) for one in publications]
        stored = [self._store_event(event) for event in events]
        if len(stored) == 1:
            return [await stored[0]]
        return list(await asyncio.gather(*stored))

    async def close(self) -> None:
        """Publish what is queued, and tell who waits; what cannot be told now is left to the sweep of another engine."""
        await self._group.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._told.wait()
        await self._settling.close()

    # ------------------------------------------------------------------ publishing

    def _new(self, one: Publication, workspace: str) -> NewEvent:
        check_event_name(one.name)
        what = f"the data of event {one.name!r}"
        if isinstance(one.data, Raw):
            data = bytes(one.data)
            check(data, what=what, limit=self._limit)
        else:
            data = encode(one.data, what=what, limit=self._limit)
        if one.id is not None:
            check_name(one.id, "event's id", reserved=False)
        return self._event(self._ids.run_id(), one, data, workspace)

    def _event(
        self, event_id: str, one: Publication, data: bytes, workspace: str, run_id: str | None = None
    ) -> NewEvent:
        at = self._executor.clock.now()
        value = msgspec.json.decode(data)
        plain = {"id": event_id, "name": one.name, "ts": at // 1_000, "data": value}
        origin = Origin(
            trigger_kind="event",
            event_name=one.name,
            event_id=event_id,
            app=one.app,
            runner=one.runner,
            session=one.session,
        )
        triggers = [
            trigger_of(
                definition,
                plain,
                data,
                at=at,
                run_id=self._ids.run_id(),
                workspace=workspace,
                origin=origin,
                tags=one.tags,
            )
            for definition in wanted(self._catalog.of(workspace).triggered(one.name), plain)
        ]
        said = {"app": one.app, "runner": one.runner, "session": one.session, "tags": list(one.tags), "runId": run_id}
        meta = {name: value for name, value in said.items() if value}
        return NewEvent(
            event_id,
            one.name,
            data,
            workspace,
            dedupe_id=one.id,
            meta=msgspec.json.encode(meta) if meta else None,
            triggers=tuple(triggers),
            probes=probes_of(value),
        )

    def _store_event(self, event: NewEvent) -> asyncio.Future[Published]:
        """Its waiters are told and its runs looked for whether or not anybody waits for the answer."""
        if self._group.closed:
            raise EngineStopped("The engine has been stopped; publish on another.")
        published: asyncio.Future[Published] = self._executor.loop.create_future()

        def stored(answer: EventOutcome | BaseException) -> None:
            if isinstance(answer, BaseException):
                if not published.done():
                    published.set_exception(answer)
                return
            record = answer.event
            # Ours though it was there: the reply to an earlier try was lost.
            duplicate = answer.duplicate and record.id != event.id
            if not duplicate:
                self._nudge(record.admissions)
            if record.settled:  # nobody waits for it
                if not published.done():
                    published.set_result(Published(record.id, duplicate, 0, record.admissions))
                return
            self._telling += 1
            self._told.clear()
            self._executor.keep(self._follow(answer, duplicate, published))

        self._group.submit(event, stored)
        return published

    async def _follow(self, outcome: EventOutcome, duplicate: bool, published: asyncio.Future[Published]) -> None:
        record = outcome.event
        try:
            woke = await self._tell(record, outcome.waiters)
        except DurableError as error:
            log.warning("the waiters of event %s could not be told; the sweep will: %s", record.id, error)
            woke = 0
        finally:
            self._telling -= 1
            if not self._telling:
                self._told.set()
        if not published.done():
            published.set_result(Published(record.id, duplicate, woke, record.admissions))

    def _nudge(self, admissions: Iterable[Admission]) -> None:
        for one in admissions:
            if one.run_id is not None and one.verdict in _TAKEN:
                self._executor.on_nudge(one.run_id, None)
            if one.cancelled is not None:
                self._executor.on_mailed(one.cancelled, "cancel")

    async def _tell(self, record: EventRecord, waiters: Sequence[Waiter]) -> int:
        """Leave the event for each run of which a wait asks for it. How many there are."""
        plain = _plain(record)
        runs = {waiter.run_id for waiter in waiters if _may_have(waiter, record) and holds(waiter.match)(plain)}
        payload = _fact(record)
        sent = await asyncio.gather(*(self._mail.send(_message(record, run_id, payload)) for run_id in sorted(runs)))
        self._settling.submit(record.id, lambda _: None)
        return sum(status in (SendStatus.ACCEPTED, SendStatus.DUPLICATE) for status in sent)

    async def _publish(self, events: Sequence[NewEvent]) -> list[EventOutcome]:
        return await self._store.publish(events)

    async def _settle(self, ids: Sequence[str]) -> list[None]:
        await self._store.settle_events(ids)
        return [None] * len(ids)

    async def sweep(self) -> None:
        """Tell the waiters of events whose publisher has not."""
        if self._sweeping or self._group.closed:
            return
        self._sweeping = True
        try:
            before = self._executor.clock.now() - SETTLED_AFTER
            left = await self._store.events(EventQuery(workspace=None, unsettled=True, limit=PAGE))
            for record in left:
                if record.received_at < before and not self._group.closed:
                    probes = probes_of(msgspec.json.decode(record.data))
                    again = NewEvent(
                        record.id, record.name, record.data, record.workspace, record.dedupe_id, probes=probes
                    )
                    await self._store_event(again)
        except Exception as error:
            known = isinstance(error, DurableError)
            log.warning("events that are not settled could not be looked for: %s", error, exc_info=not known)
        finally:
            self._sweeping = False

    # ------------------------------------------------------------------ for runs

    def send(self, run: Resident, command: SendEvent) -> None:
        """Publish an event of a run's. The run stays in memory meanwhile."""
        run.asking += 1
        self._executor.keep(self._send(run, command))

    async def _send(self, run: Resident, command: SendEvent) -> None:
        try:
            check(command.data, what=f"the data of event {command.name!r}", limit=self._limit)
            one = Publication(name=command.name, id=command.dedupe_id)
            workspace = command.workspace or run.workspace
            event = self._event(command.event_id, one, command.data, workspace, run.run_id)
            published = await self._store_event(event)
        except EngineStopped:
            return  # for the run's next owner
        except DurableError as error:
            status, payload = "failed", encode_error(describe(error))
        else:
            status, payload = "completed", msgspec.json.encode(published.event_id)
        run.asking -= 1
        self._executor.arrive(run, Arrival(self._executor.clock.now(), EMIT, status, key=command.key, payload=payload))

    def look_back(self, run: Resident, keys: Iterable[str]) -> None:
        """Look for events that these waits of a run ask for and that were accepted before anybody could tell it. Their waiters
        are stored: what comes from here on is told."""
        wanted = self._looking.get(run)
        if wanted is not None:
            wanted.update(keys)
        else:
            self._looking[run] = set(keys)
            self._executor.keep(self._look_back(run))

    async def _look_back(self, run: Resident) -> None:
        wanted = self._looking[run]
        try:
            while wanted and not run.dropped:
                keys, began = set(wanted), self._executor.clock.now()
                try:
                    found = await self._search(run, run.machine.events_waited())
                except Exception as error:
                    known = isinstance(error, StoreError)
                    log.warning("events cannot be looked at, trying again: %s", error, exc_info=not known)
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                if not run.dropped:
                    wanted -= keys
                    run.looked_back_at = began
                    run.unlooked -= keys
                    run.looked |= keys
                    # Before those that were told of: these are the older ones.
                    run.arrivals.extendleft(reversed(found))
        finally:
            del self._looking[run]
        self._executor.wake(run)

    async def _search(self, run: Resident, waits: Sequence[WaitEvent]) -> list[Arrival]:
        """For each wait the oldest event that it asks for and that the run has not had."""
        found: dict[str, Arrival] = {}
        if run.born is None:
            stored = (await self._store.get([run.run_id]))[0]
            run.born = 0 if stored is None else stored.created_at
        born = run.born
        for name in dict.fromkeys(wait.name for wait in waits):
            left = [wait for wait in waits if wait.name == name]
            since = min(born if wait.since is None else wait.since for wait in left)
            after: int | None = None
            while left and not run.dropped:
                query = EventQuery(workspace=run.workspace, name=name, since=since, after=after, limit=PAGE)
                page = await self._store.events(query)
                for record in page:
                    takers = self._takers(run, record, left)
                    if takers:
                        id = _message_id(record.id)
                        found[id] = event_arrival(id, _fact(record))
                        left = [wait for wait in left if wait not in takers]
                if len(page) < PAGE:
                    break
                after = page[-1].number
        return sorted(found.values(), key=lambda arrival: arrival.happened)

    def _takers(self, run: Resident, record: EventRecord, waits: Sequence[WaitEvent]) -> list[WaitEvent]:
        if _message_id(record.id) in run.machine.events_had:
            return []
        if any(one.run_id == run.run_id and one.verdict in _TAKEN for one in record.admissions):
            return []  # it has started this very run
        fact = Fact(record.id, record.name, record.received_at, record.number, Raw(record.data))
        return [
            wait
            for wait in waits
            if run.machine.outstanding.get(wait.key) is wait
            and record.received_at >= ((run.born or 0) if wait.since is None else wait.since)
            and asks_for(wait, fact)
        ]


def _may_have(waiter: Waiter, record: EventRecord) -> bool:
    return waiter.expires_at is None or record.received_at <= waiter.expires_at


def _message_id(event_id: str) -> str:
    return f"event:{event_id}"


def _fact(record: EventRecord) -> bytes:
    return fact_of(record.id, record.name, record.received_at, record.number, record.data)


def _plain(record: EventRecord) -> Mapping[str, Any]:
    data = msgspec.json.decode(record.data)
    return {"id": record.id, "name": record.name, "ts": record.received_at // 1_000, "data": data}


def _message(record: EventRecord, run_id: str, payload: bytes) -> Message:
    return Message(run_id, _message_id(record.id), "event", record.name, payload, workspace=record.workspace)
