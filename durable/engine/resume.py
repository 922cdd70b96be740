"""Waking a run. Signals, children, events, cancels and results of runs elsewhere all come as inbox rows, and all inbox rows
come through here; there is no second way.

A row is taken in by journaling it, whether or not anything waits for it; which wait uses which signal is replay's
business, oldest first per name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import msgspec

from durable.core.errors import StoreError
from durable.core.event import read_fact
from durable.core.hosted import stripped
from durable.core.journal import CHILD, EVENT, LOG, REMOTE, RUN, SIGNAL
from durable.engine.executor import Executor
from durable.engine.residents import Arrival, Line, Resident
from durable.protocol.messages import WorkflowDecision
from durable.store.records import InboxRow

log = logging.getLogger("durable.resume")

RETRY_SECONDS = 0.1


class Resume:
    """Brings unread inbox rows to resident runs."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._wanted: dict[str, Resident] = {}
        self._task: asyncio.Task[None] | None = None

    def mail(self, run: Resident) -> None:
        """There may be unread rows for this run: fetch them, together with those of others."""
        if run.dropped:
            return  # a later life of the same run may be wanted under its id
        run.fetching = True
        self._wanted[run.run_id] = run
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._fetch(), name="durable-inbox")

    def take(self, run: Resident, rows: list[InboxRow]) -> None:
        """Hand rows to the run; those it knows already are passed over."""
        for row in rows:
            if row.number > run.inbox_known:
                run.inbox_known = row.number
                self._executor.arrive(run, arrival_of(row))

    async def _fetch(self) -> None:
        try:
            while self._wanted:
                runs, self._wanted = list(self._wanted.values()), {}
                while True:
                    runs = [run for run in runs if not run.dropped]
                    began = self._executor.clock.now()
                    try:
                        inboxes = await self._executor.deps.store.inbox([(run.run_id, run.inbox_known) for run in runs])
                        break
                    except Exception as error:
                        known = isinstance(error, StoreError)
                        log.warning("the inbox cannot be read, trying again: %s", error, exc_info=not known)
                    await asyncio.sleep(RETRY_SECONDS)
                for run, rows in zip(runs, inboxes, strict=True):
                    run.fetching = run.run_id in self._wanted
                    if not run.dropped:
                        run.looked_at, run.looking = began, False
                        try:
                            self.take(run, rows)
                        except Exception:
                            log.exception("the mail of run %s could not be taken in; it is given back", run.run_id)
                            self._executor.forsake(run)
                        self._executor.wake(run)
        finally:
            self._task = None


class _Report(msgspec.Struct):
    """Payload of a `report`: a result, and the lines its body wrote. One row, since neither is to come alone."""

    lines: list[msgspec.Raw]
    result: msgspec.Raw
    marks: list[int | tuple[int, str]] = []


class _Told(msgspec.Struct):
    """Payload of a `line`."""

    mark: int | tuple[int, str]
    line: msgspec.Raw


def told_of(line: Line) -> bytes:
    """The payload of a `line`."""
    return msgspec.json.encode(_Told(line.mark, msgspec.Raw(line.payload)))


def report_of(result: bytes, lines: Sequence[Line], limit: int) -> bytes | None:
    """The payload of a `report`, of the lines that fit with the result into `limit` bytes, the first ones; None if none does."""
    room = limit - len(result) - 64
    kept: list[msgspec.Raw] = []
    marks: list[int | tuple[int, str]] = []
    for line in lines:
        room -= len(line.payload) + len(msgspec.json.encode(line.mark)) + 2
        if room < 0:
            log.warning(
                "a result came with more lines than the store takes with it: %d are left out", len(lines) - len(kept)
            )
            break
        kept.append(msgspec.Raw(line.payload))
        marks.append(line.mark)
    return msgspec.json.encode(_Report(kept, msgspec.Raw(result), marks)) if kept else None


def decision_arrival(happened: int, task: str, status: str, data: bytes) -> Arrival:
    """A turn's end, as what it means to the run: the journal keeps less of a decision than the workflow is handed."""
    arrival = Arrival(happened, REMOTE, status, payload=data, task_id=task)
    if status == "completed":
        arrival.payload = stripped(msgspec.json.decode(data, type=WorkflowDecision))
        arrival.whole = data
    return arrival


def event_arrival(id: str, payload: bytes, number: int | None = None) -> Arrival:
    """An event for a run. It happened when it was accepted, whenever it was told of (S19)."""
    fact = read_fact(payload)
    return Arrival(fact.at, EVENT, "received", key=id, name=fact.name, payload=payload, number=number)


def arrival_of(row: InboxRow) -> Arrival:
    """An inbox row as what it means to the run."""
    message = row.message
    if message.kind == "signal":
        return Arrival(
            row.created_at,
            SIGNAL,
            "received",
            key=message.id,
            name=message.name,
            payload=message.payload,
            number=row.number,
        )
    if message.kind == "event":
        return event_arrival(message.id, message.payload or b"null", row.number)
    if message.kind == "cancel":
        return Arrival(row.created_at, RUN, "cancelling", payload=message.payload, number=row.number)
    if message.kind in ("pause", "resume"):
        status = "paused" if message.kind == "pause" else "resumed"
        return Arrival(row.created_at, RUN, status, payload=message.payload, number=row.number)
    if message.kind == "child":
        status = "completed" if message.name == "completed" else "failed"
        return Arrival(
            row.created_at,
            CHILD,
            status,
            key=message.key,
            ordinal=message.ordinal,
            payload=message.payload,
            child_id=message.id.removesuffix(":outcome"),
            number=row.number,
        )
    if message.kind == "line":
        assert message.payload is not None
        told = msgspec.json.decode(message.payload, type=_Told)
        line = Line(told.mark, bytes(told.line))
        return Arrival(
            row.created_at,
            LOG,
            "written",
            key=message.key,
            ordinal=line.index,
            attempt=message.attempt,
            payload=line.payload,
            line=line,
            number=row.number,
        )
    if message.kind == "decision":
        arrival = decision_arrival(row.created_at, message.id, message.name, message.payload or b"null")
        arrival.number = row.number
        return arrival
    payload = message.payload
    lines: list[Line] = []
    if message.kind == "report":
        assert message.payload is not None
        report = msgspec.json.decode(message.payload, type=_Report)
        payload = bytes(report.result)
        # One of an earlier version says nothing of marks: its lines were never told live.
        marks = report.marks or [(0, f"line {n}") for n in range(len(report.lines))]
        lines = [Line(mark, bytes(line)) for mark, line in zip(marks, report.lines, strict=True)]
    return Arrival(
        row.created_at,
        REMOTE,
        message.name,
        key=message.key,
        ordinal=message.ordinal,
        attempt=message.attempt,
        payload=payload,
        lines=lines,
        number=row.number,
    )
