"""Server-sent events: a run's journal as frames, from any row on; and what happens in a workspace.

A frame is sent only when its row is durable, since it is read from the store. Within a run frames come in order, without
gap or repeat, over reconnects to whatever engine. A stream of many runs has no such order: one that was interrupted begins
with a `resync` frame, which says: look at the lists again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec

from durable.core.errors import StoreUnavailable
from durable.server.errors import ApiError
from durable.server.route import Call, Service
from durable.server.views import Frame, RunStatusFrame, frame_of, iso, status_word
from durable.store.admission import EventQuery, EventRecord
from durable.store.records import RunQuery, RunRecord

T = TypeVar("T")

LOOK_EVERY = 0.25
"""Seconds between two looks at what happens in a workspace."""
PAGE = 200
OPEN = b": open\n\n"
ALIVE = b": alive\n\n"
ENDED = b": ended\n\n"
"""The last of a stream that is whole. One that closes without it was cut, by whatever stands between."""
MOVED = b": this process is stopping; go on elsewhere\n\n"


def block(event: str, id: int | str | None, data: object) -> bytes:
    """One event. JSON has no line breaks, so it is one line of data."""
    head = f"id: {id}\n" if id is not None else ""
    return f"{head}event: {event}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


def begin_after(call: Call, given: int | None) -> int:
    """Where to begin: `Last-Event-ID`, which a browser sends when it comes back, else `from`. Raises ApiError."""
    last = call.headers.get("last-event-id")
    if last is None:
        return given or 0
    if not (last.isascii() and last.isdigit() and len(last) < 19):
        raise ApiError(400, "bad_query", "Last-Event-ID is the seq of the last frame that was seen.")
    return int(last)


async def run_blocks(call: Call, run: RunRecord, after: int) -> AsyncIterator[bytes]:
    """One run's frames until it has ended."""
    async with aclosing(call.engine.watch(run.id, after, workspace=run.workspace)) as entries:  # type: ignore[type-var]
        yield OPEN
        moved = False
        async for entry in alive(call.service, entries):
            if isinstance(entry, bytes):
                moved = entry is MOVED
                yield entry
            elif (frame := frame_of(run.id, entry)) is not None:
                yield frame_block(frame)
        if not moved:
            yield ENDED


def frame_block(frame: Frame) -> bytes:
    kind = frame.__struct_config__.tag
    return block(str(kind), frame.seq, frame)


async def alive(service: Service, source: AsyncIterator[T]) -> AsyncIterator[T | bytes]:
    """What comes, and a comment where nothing does for a while; ends when this process drains."""
    every = service.settings.stream_keepalive_ms / 1000
    stopping = asyncio.Event()
    forget = service.on_drain(stopping.set)
    stopped: asyncio.Future[Any] = asyncio.ensure_future(stopping.wait())
    pending: asyncio.Future[Any] | None = None
    try:
        while not service.draining:
            if pending is None:
                pending = asyncio.ensure_future(_next(source))
            done, _ = await asyncio.wait({pending, stopped}, timeout=every, return_when=asyncio.FIRST_COMPLETED)
            if pending in done:
                try:
                    value = pending.result()
                except _Ended:
                    return
                finally:
                    pending = None
                yield value
            elif not done:
                yield ALIVE
        yield MOVED
    finally:
        forget()
        for task in (pending, stopped):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _next(source: AsyncIterator[T]) -> T:
    try:
        return await anext(source)
    except StopAsyncIteration:
        raise _Ended from None


class _Ended(Exception):
    """StopAsyncIteration cannot be a task's outcome."""


async def activity_blocks(call: Call, workspace: str, *, resumed: bool) -> AsyncIterator[bytes]:
    """All runs of a workspace from now on: a `run_status` frame whenever one's status has changed, with `workflowName`."""
    seen: dict[str, str] = {}
    async for run in _runs(call, workspace, limit=PAGE):
        seen[run.id] = _mark(run)
    yield block("resync", None, {"kind": "resync"}) if resumed else OPEN

    async def changes() -> AsyncGenerator[RunRecord, None]:
        nonlocal seen
        while True:
            await asyncio.sleep(LOOK_EVERY)
            with suppress(StoreUnavailable):
                now: dict[str, str] = {}
                fresh = []
                async for run in _runs(call, workspace, limit=PAGE):
                    now[run.id] = _mark(run)
                    if seen.get(run.id) != now[run.id]:
                        fresh.append(run)
                # Those that are too old for the page and may still change.
                older = [run_id for run_id, mark in seen.items() if run_id not in now and mark.startswith("active")]
                for found in await call.engine.deps.store.get(older[:PAGE]) if older else []:
                    if found is not None:
                        now[found.id] = _mark(found)
                        if seen.get(found.id) != now[found.id]:
                            fresh.append(found)
                seen = now
                for run in sorted(fresh, key=lambda run: (run.updated_at, run.id)):
                    yield run

    async with aclosing(changes()) as source:
        async for found in alive(call.service, source):
            if isinstance(found, bytes):
                yield found
                continue
            frame = RunStatusFrame(
                seq=found.seq,
                ts=iso(found.updated_at),
                run_id=found.id,
                status=status_word(found.status, found.activity),
            )
            named = msgspec.to_builtins(frame) | {
                "workflowName": found.workflow,
                "app": call.service.app_of(found.workspace),
            }
            yield block("run_status", None, named)


def _mark(run: RunRecord) -> str:
    return f"{run.status.value}:{run.activity.value}"


async def _runs(call: Call, workspace: str, *, limit: int) -> AsyncIterator[RunRecord]:
    page = await call.engine.find(RunQuery(limit=limit), workspace=workspace)
    for run in page.runs:
        yield run


async def event_blocks(
    call: Call, workspace: str, after: int | None, view: Callable[[EventRecord], object]
) -> AsyncIterator[bytes]:
    """Events of a workspace as they are accepted, after the given number; None: from now on."""
    store = call.engine.deps.store
    if after is None:
        newest = await store.events(EventQuery(workspace, whole=True, newest_first=True, limit=1))
        after = newest[0].number if newest else 0
    yield OPEN

    async def fresh() -> AsyncGenerator[EventRecord, None]:
        number = after or 0
        while True:
            found: list[EventRecord] = []
            with suppress(StoreUnavailable):
                found = await store.events(EventQuery(workspace, after=number, whole=True, limit=PAGE))
            for event in found:
                number = event.number
                yield event
            if len(found) < PAGE:
                await asyncio.sleep(LOOK_EVERY)

    async with aclosing(fresh()) as source:
        async for event in alive(call.service, source):
            yield event if isinstance(event, bytes) else block("event", event.number, view(event))
