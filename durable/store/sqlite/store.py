"""The contract, on one SQLite file. Each method names an operation and who runs it; nothing here knows SQL."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from durable.core.clock import Clock, SystemClock
from durable.core.errors import StoreError
from durable.core.journal import Entry
from durable.store.admission import EventOutcome, EventQuery, EventRecord, LimitState, NewEvent
from durable.store.checks import (
    check_batch,
    check_event,
    check_events,
    check_item,
    check_message,
    check_run,
    commit_storable,
    refusal,
)
from durable.store.hints import Listeners
from durable.store.interface import Capabilities
from durable.store.items import Fire, FireOutcome, Item, ItemKey, ItemPage, ItemQuery, NewItem, PutOutcome
from durable.store.records import (
    Beat,
    Claim,
    ClaimRequest,
    Commit,
    CommitOutcome,
    CommitStatus,
    InboxRow,
    Journal,
    Message,
    NewRun,
    PruneRequest,
    RunPage,
    RunQuery,
    RunRecord,
    SendOutcome,
    SendStatus,
    StartOutcome,
    StartStatus,
)
from durable.store.sqlite import (
    claims,
    commits,
    events,
    inbox,
    items,
    journal,
    lanes,
    retention,
    runs,
    schema,
    search,
)
from durable.store.sqlite.connection import Location, connect, translated
from durable.store.sqlite.lending import Lender
from durable.store.sqlite.presence import Presence
from durable.store.sqlite.runner import Inline, Operation, Pace, Runner, Threaded
from durable.store.sqlite.statements import fetch_value
from durable.store.sqlite.turn import Turn

T = TypeVar("T")

HINT_EVERY_S = 0.02
"""How often a listening store looks whether another process has written."""

SMALL = 65_536
"""Bytes of payload up to which a single write may be done at once (runner.py)."""

BEAT_TIMEOUT_S = 1.0


class SqliteStore:
    """All runs in one file. Several processes on one machine may use it at once. Beside the file stand SQLite's own
    `-wal` and `-shm`, `.generation` (how often it was opened: tells a restored copy) and `.engines/` (locks of living
    engines and of writers); none but the first two is ever needed to read it.

    `inline=True` runs every statement in the caller, with no thread: for tests under virtual time, and the only way for
    `:memory:`. It sees no other process's writes until it polls, knows no presence, and lends no transaction.
    """

    def __init__(
        self,
        path_or_url: str | Path,
        *,
        allow_weak_durability: bool = False,
        accept_restore: bool = False,
        clock: Clock | None = None,
        inline: bool = False,
        busy_timeout_s: float = 5.0,
        max_payload: int = 64 * 1024 * 1024,
    ) -> None:
        self._location = Location(path_or_url)
        if self._location.path is None and not inline:
            raise StoreError(":memory: lives in one connection; pass inline=True, or give a file")
        self._clock: Clock = clock or SystemClock()
        self._allow_weak = allow_weak_durability
        self._accept_restore = accept_restore
        self._inline = inline
        self._busy_timeout_s = busy_timeout_s
        self._listeners = _neighbours(self._location.path) if inline else Listeners()
        self._presence = Presence(None if inline else self._location.beside, self._clock)
        self._writer: Runner = _Closed(self._location)
        self._reader: Runner = self._writer
        self._beats: Inline | None = None
        self._lender: Lender | None = None
        self._abroad = Pace(HINT_EVERY_S)
        self._data_version: int | None = None
        self._capabilities = Capabilities(
            name="sqlite",
            durable=self._location.path is not None and not self._is_weak(),
            durability=self._durability(),
            shared=self._location.path is not None,
            commit_with=not inline,
            max_payload=max_payload,
        )

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def _is_weak(self) -> bool:
        return self._location.synchronous in ("off", "normal")

    def _durability(self) -> str:
        if self._location.path is None:
            return "Nothing survives the end of this process."
        if self._is_weak():
            return "A commit survives the process; the last ones may be lost when the machine stops."
        return "A commit survives the process and the machine: write-ahead log, synced at every commit."

    # ------------------------------------------------------------------ life

    async def open(self) -> None:
        if not isinstance(self._writer, _Closed):
            return
        if self._location.path is not None:
            with suppress(OSError):  # the sentence for it comes from opening
                self._location.path.parent.mkdir(exist_ok=True)
        if self._inline:
            cx = self._connect()
            self._prepare(cx)
            runner = Inline(cx, self._location)
            self._writer = self._reader = runner
            self._beats = runner
            return
        writing, reading, beating = await asyncio.to_thread(self._connect_all)
        self._presence.sweep()
        self._writer = Threaded(
            writing,
            self._location,
            "durable-sqlite-writer",
            folds=True,
            turn=Turn(self._location.beside, self._busy_timeout_s),
            busy_timeout_s=self._busy_timeout_s,
            idle=self._look_abroad,
        )
        self._reader = Threaded(reading, self._location, "durable-sqlite-reader", folds=False)
        self._beats = Inline(beating, self._location, Turn(self._location.beside, BEAT_TIMEOUT_S))
        self._lender = Lender(self._connect)

    async def close(self) -> None:
        writer, reader, beats = self._writer, self._reader, self._beats
        self._writer = self._reader = _Closed(self._location)
        self._beats = None
        await writer.close()
        await reader.close()
        if self._lender is not None:
            self._lender.close()
        if beats is not None:
            beats.end()
        self._presence.close()

    def _connect(self, timeout_s: float | None = None) -> sqlite3.Connection:
        return connect(self._location, timeout_s or self._busy_timeout_s, self._allow_weak)

    def _connect_all(self) -> tuple[sqlite3.Connection, ...]:
        opened = []
        try:
            for timeout_s in (None, None, BEAT_TIMEOUT_S):
                opened.append(self._connect(timeout_s))
                if len(opened) == 1:
                    with closing(Turn(self._location.beside, self._busy_timeout_s)) as turn, turn:
                        self._prepare(opened[0])
            opened[1].execute("PRAGMA query_only = 1")
        except BaseException:
            for cx in opened:
                cx.close()
            raise
        return tuple(opened)

    def _prepare(self, cx: sqlite3.Connection) -> None:
        try:
            with translated(self._location):
                schema.prepare(cx, self._location.path, self._accept_restore, self._clock)
        except BaseException:
            cx.close()
            raise

    # ------------------------------------------------------------------ runs

    async def start(self, runs_: Sequence[NewRun]) -> list[StartOutcome]:
        for new in runs_:
            check_run(new, self._capabilities.max_payload)
        small = len(runs_) == 1 and len(runs_[0].input) <= SMALL
        outcomes = await self._writer.call(lambda cx: runs.start(cx, runs_, self._clock.now()), small=small)
        if any(outcome.status is StartStatus.STARTED for outcome in outcomes):
            self._listeners.changed(self)
        return outcomes

    async def get(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        return await self._reader.call(lambda cx: runs.get(cx, run_ids))

    async def find(self, query: RunQuery) -> RunPage:
        return await self._reader.call(lambda cx: search.find(cx, query))

    # ------------------------------------------------------------------ commits

    async def commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        check_batch(batch, self._capabilities.max_batch)
        return await commit_storable(batch, self._capabilities.max_payload, self._commit)

    async def _commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        small = len(batch) == 1 and batch[0].size <= SMALL
        outcomes = await self._writer.call(lambda cx: commits.commit(cx, batch, self._clock.now()), small=small)
        self._listeners.changed(self)
        return outcomes

    async def commit_with(self, work: Callable[[Any], Awaitable[None]], commit: Commit) -> CommitOutcome:
        if self._lender is None:
            raise StoreError("an inline SQLite store lends no transaction; open it without inline=True")
        failure = refusal(commit, self._capabilities.max_payload)
        if failure is not None:
            return CommitOutcome(CommitStatus.FENCED, failure=failure)
        outcome = await self._lender.commit_with(self._writer, work, commit, self._clock)
        self._listeners.changed(self)
        return outcome

    async def requeue(self, run_id: str, *, commit_id: str, entry: Entry, activity: str) -> RunRecord | None:
        run = await self._writer.call(
            lambda cx: commits.requeue(cx, run_id, commit_id, entry, activity, self._clock.now())
        )
        self._listeners.changed(self)
        return run

    # ------------------------------------------------------------------ claims

    def beat(self, incarnation: str, lease_us: int) -> Beat:
        if self._beats is None:
            raise StoreError(f"{self._location} is closed")
        self._presence.hold(incarnation)
        return self._beats.run(lambda cx: claims.beat(cx, incarnation, lease_us, self._clock.now()))

    async def leave(self, incarnation: str) -> None:
        await self._writer.call(lambda cx: claims.leave(cx, incarnation))
        self._presence.forget(incarnation)
        self._listeners.changed(self)

    async def claim(self, request: ClaimRequest) -> Claim:
        taken = await self._writer.call(
            lambda cx: claims.claim(cx, request, self._clock.now(), self._presence.vanished)
        )
        for incarnation in taken.dead:
            self._presence.forget(incarnation)
        return taken.claim

    async def release(self, runs_: Sequence[tuple[str, int]]) -> None:
        if await self._writer.call(lambda cx: claims.release(cx, runs_, self._clock.now())):
            self._listeners.changed(self)

    async def owned(self, incarnation: str) -> list[tuple[str, int]]:
        return await self._reader.call(lambda cx: claims.owned(cx, incarnation))

    # ------------------------------------------------------------------ inbox

    async def send(self, messages: Sequence[Message]) -> list[SendOutcome]:
        for message in messages:
            check_message(message, self._capabilities.max_payload)
        small = len(messages) == 1 and len(messages[0].payload or b"") <= SMALL
        outcomes = await self._writer.call(lambda cx: inbox.send(cx, messages, self._clock.now()), small=small)
        if any(outcome.status is SendStatus.ACCEPTED for outcome in outcomes):
            self._listeners.changed(self)
        return outcomes

    async def unread(self, incarnation: str) -> list[str]:
        return await self._reader.call(lambda cx: inbox.unread(cx, incarnation))

    async def inbox(self, after: Sequence[tuple[str, int]]) -> list[list[InboxRow]]:
        return await self._reader.call(lambda cx: inbox.read(cx, after))

    # ------------------------------------------------------------------ journal

    async def load(self, run_ids: Sequence[str]) -> list[Journal]:
        return await self._reader.call(lambda cx: journal.load(cx, run_ids))

    async def page(self, run_id: str, after_seq: int, limit: int) -> list[Entry]:
        return await self._reader.call(lambda cx: journal.page(cx, run_id, after_seq, limit))

    async def children(self, run_id: str) -> list[RunRecord]:
        return await self._reader.call(lambda cx: runs.children(cx, run_id))

    # ------------------------------------------------------------------ retention

    async def prune(self, request: PruneRequest) -> int:
        # Alone: whoever shared the transaction would wait for all these deletions.
        return await self._writer.call(lambda cx: retention.prune(cx, request, self._clock.now()), alone=True)

    # ------------------------------------------------------------------ events

    async def publish(self, events_: Sequence[NewEvent]) -> list[EventOutcome]:
        most = self._capabilities.max_payload
        for event in events_:
            check_event(event, most)
        small = len(events_) == 1 and len(events_[0].data) <= SMALL
        outcomes = await self._writer.call(lambda cx: events.publish(cx, events_, self._clock.now(), most), small=small)
        if not all(outcome.duplicate for outcome in outcomes):
            self._listeners.changed(self)
        return outcomes

    async def events(self, query: EventQuery) -> list[EventRecord]:
        check_events(query)
        return await self._reader.call(lambda cx: events.find(cx, query))

    async def settle_events(self, ids: Sequence[str]) -> None:
        await self._writer.call(lambda cx: events.settle(cx, ids))

    async def limits(self, workspace: str, workflow: str | None = None) -> list[LimitState]:
        return await self._reader.call(lambda cx: lanes.limits(cx, workspace, workflow, self._clock.now()))

    # ------------------------------------------------------------------ items

    async def put_items(self, items_: Sequence[NewItem]) -> list[PutOutcome]:
        for item in items_:
            check_item(item, self._capabilities.max_payload)
        outcomes = await self._writer.call(lambda cx: items.put(cx, items_, self._clock.now()), small=len(items_) == 1)
        if any(outcome.done for outcome in outcomes):
            self._listeners.changed(self)
        return outcomes

    async def get_items(self, keys: Sequence[ItemKey]) -> list[Item | None]:
        return await self._reader.call(lambda cx: items.get(cx, keys, self._clock.now()))

    async def list_items(self, query: ItemQuery) -> ItemPage:
        return await self._reader.call(lambda cx: items.page(cx, query, self._clock.now()))

    async def delete_items(self, keys: Sequence[ItemKey]) -> int:
        count = await self._writer.call(lambda cx: items.delete(cx, keys, self._clock.now()))
        if count:
            self._listeners.changed(self)
        return count

    async def fire(self, fires: Sequence[Fire]) -> list[FireOutcome]:
        for one in fires:
            check_item(one.item, self._capabilities.max_payload)
            for occurrence in one.occurrences:
                check_run(occurrence.run, self._capabilities.max_payload)
        outcomes = await self._writer.call(lambda cx: items.fire(cx, fires, self._clock.now()))
        if any(outcome.done for outcome in outcomes):
            self._listeners.changed(self)
        return outcomes

    # ------------------------------------------------------------------ hints

    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        stop = self._listeners.add(on_hint, self)
        if isinstance(self._writer, Threaded):
            self._writer.nudge()
        return stop

    def _look_abroad(self, cx: sqlite3.Connection) -> float | None:
        """In the writer's thread. Its own connection's data_version moves only when another connection has written,
        so this store's own commits are no news."""
        if not self._listeners:
            self._data_version = None
            return None
        left = self._abroad.left()
        if left:
            return left
        version = fetch_value(cx, "PRAGMA data_version")
        if self._data_version is not None and version != self._data_version:
            self._listeners.changed(None)
        self._data_version = version
        return HINT_EVERY_S


_inline_listeners: WeakValueDictionary[Path, Listeners] = WeakValueDictionary()


def _neighbours(path: Path | None) -> Listeners:
    """Inline stores on one file run in one process, with no thread to look at the file: they tell each other."""
    return Listeners() if path is None else _inline_listeners.setdefault(path, Listeners())


class _Closed:
    """Stands where a runner will be, or was."""

    def __init__(self, location: Location) -> None:
        self._location = location

    async def call(self, operation: Operation[T], *, alone: bool = False, small: bool = False) -> T:
        raise StoreError(f"{self._location} is not open; await store.open() first")

    async def close(self) -> None:
        return None
