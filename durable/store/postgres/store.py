"""The production store: one PostgreSQL database, any number of engines.

Everything that changes something is one call of a function in the database (`migrations/`): one statement, one round trip,
one transaction, no lock left behind by a client that is stopped. Hints go by LISTEN/NOTIFY, after the fact and never as
part of a commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import psycopg

from durable.core.errors import StoreError, StoreReadOnly, WeakDurability
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
from durable.store.interface import Capabilities
from durable.store.items import Fire, FireOutcome, Item, ItemKey, ItemPage, ItemQuery, NewItem, PutOutcome
from durable.store.postgres import claims, commits, events, inbox, items, journal, runs
from durable.store.postgres.connection import Address, Database, ask, translate
from durable.store.postgres.heart import Heart
from durable.store.postgres.hints import Hints
from durable.store.postgres.migrate import check_schema, migrate
from durable.store.postgres.retention import MONTHS_AHEAD, Retention
from durable.store.records import (
    AddFire,
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
    StartRun,
)

T = TypeVar("T")

TOMBSTONE_US = 30 * 24 * 3600 * 1_000_000
"""How long an engine that has expired is remembered as gone."""


class PostgresStore:
    """Runs in the schema `schema` of the database that `url` names.

    `notifications=False` behind a transaction-mode pooler: no LISTEN, no advisory lock, no prepared statement, nothing that
    lives on a session; work is then found by polling, and a dead engine by its lease.
    """

    def __init__(
        self,
        url: str,
        *,
        schema: str = "durable",
        notifications: bool = True,
        allow_weak_durability: bool = False,
        pool_max: int = 8,
        max_payload: int = 64 * 1024 * 1024,
    ) -> None:
        self._address = Address(url, pooler=not notifications)
        self._schema = check_schema(schema)
        self._notifications = notifications
        self._allow_weak = allow_weak_durability
        self._db = Database(self._address, pool_max)
        self._heart: Heart | None = None
        self._hints = Hints(self._address, self._db, self._schema, notifications=notifications)
        self._retention = Retention(self._db, self._schema)
        self._max_payload = max_payload
        self._capabilities = self._described(durable=True)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def _described(self, *, durable: bool) -> Capabilities:
        return Capabilities(
            name="postgres",
            durable=durable,
            durability="A commit survives the process and the machine: the server syncs its log at every commit."
            if durable
            else "A commit survives the process; the last ones may be lost when the server's machine stops.",
            shared=True,
            commit_with=True,
            max_payload=self._max_payload,
            in_flight=2,
        )

    @property
    def schema(self) -> str:
        """Where its tables are."""
        return self._schema

    @property
    def notifications(self) -> bool:
        """Whether the address bears what lives on a session: a control plane may be on it too."""
        return self._notifications

    async def connect(self) -> psycopg.AsyncConnection[Any]:
        """A connection of the caller's own, in autocommit, beside the pool. Raises StoreError."""
        return await self._address.connect()

    # ------------------------------------------------------------------ life

    async def open(self) -> None:
        if self._heart is not None:
            return
        connection = await self._address.connect()
        try:
            await self._check_durability(connection)
            await migrate(connection, self._schema, str(self._address))
            await self._make_partitions(connection)
            # Engines that said long ago that they are gone need no tombstone any more.
            await connection.execute(
                f"DELETE FROM {self._schema}.engines WHERE expires_at < {self._schema}.now_us() - {TOMBSTONE_US}"
            )
        except psycopg.Error as error:
            raise translate(error, str(self._address)) from error
        finally:
            await connection.close()
        await self._db.open()
        loop = asyncio.get_running_loop()

        def silence(seconds: float) -> None:
            with suppress(RuntimeError):  # the loop has gone
                loop.call_soon_threadsafe(self._db.distrust, seconds)

        self._heart = Heart(self._address, self._schema, presence=self._notifications, on_silence=silence)

    async def _make_partitions(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Nothing depends on it: rows of a month without a partition stand in the default one."""
        with suppress(psycopg.errors.LockNotAvailable, psycopg.errors.InsufficientPrivilege):
            await ask(connection, f"SELECT {self._schema}.make_partitions(now(), %s)", [MONTHS_AHEAD])

    async def _check_durability(self, connection: psycopg.AsyncConnection[Any]) -> None:
        rows = await ask(
            connection,
            "SELECT current_setting('fsync'), current_setting('synchronous_commit'), pg_is_in_recovery(),"
            " current_setting('transaction_read_only')",
        )
        fsync, synchronous_commit, standby, read_only = rows[0]
        if standby:
            raise StoreReadOnly(f"{self._address} takes no writes: it is a standby; give the address of the primary")
        if read_only == "on":
            raise StoreReadOnly(
                f"{self._address} takes no writes: default_transaction_read_only is on; turn it off for this user or database"
            )
        weak = [
            f"{name} = off"
            for name, value in (("fsync", fsync), ("synchronous_commit", synchronous_commit))
            if value == "off"
        ]
        self._capabilities = self._described(durable=not weak)
        if weak and not self._allow_weak:
            raise WeakDurability(
                f"{self._address} may lose the last commits when its machine stops ({', '.join(weak)}). Turn it on for"
                " this user or database, or pass allow_weak_durability=True"
            )

    async def close(self) -> None:
        heart, self._heart = self._heart, None
        try:
            await self._hints.close()
        finally:
            try:
                await self._db.close()
            finally:
                if heart is not None:
                    await asyncio.to_thread(heart.close)

    # ------------------------------------------------------------------ runs

    async def start(self, runs_: Sequence[NewRun]) -> list[StartOutcome]:
        for new in runs_:
            check_run(new, self._max_payload)
        outcomes = await self._guard(runs.start(self._db, self._schema, runs_))
        if any(run.owner is None for run in runs_):
            self._hints.everywhere()
        else:
            self._hints.here()
        return outcomes

    async def get(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        return await self._guard(runs.get(self._db, self._schema, run_ids))

    async def find(self, query: RunQuery) -> RunPage:
        return await self._guard(runs.find(self._db, self._schema, query))

    # ------------------------------------------------------------------ commits

    async def commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        check_batch(batch, self._capabilities.max_batch)
        return await commit_storable(batch, self._max_payload, self._commit)

    async def _commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        outcomes = await commits.commit(self._db, self._schema, batch, self._hints.abroad)
        self._hint_of(batch, outcomes)
        return outcomes

    async def commit_with(self, work: Callable[[Any], Awaitable[None]], commit: Commit) -> CommitOutcome:
        failure = refusal(commit, self._max_payload)
        if failure is not None:
            return CommitOutcome(CommitStatus.FENCED, failure=failure)
        outcome = await commits.commit_with(self._db, self._schema, work, commit, self._hints.abroad)
        self._hint_of([commit], [outcome])
        return outcome

    def _hint_of(self, batch: Sequence[Commit], outcomes: Sequence[CommitOutcome]) -> None:
        """Runs that were started, and mail for runs that others own, are news to others."""
        self._hints.here()
        if not any(one.effects for one in batch):
            return
        mine = self._heart.incarnations if self._heart is not None else frozenset()
        for one, outcome in zip(batch, outcomes, strict=True):
            if not mine.issuperset(outcome.wake) or any(isinstance(e, (StartRun, AddFire)) for e in one.effects):
                self._hints.abroad()
                return

    async def requeue(self, run_id: str, *, commit_id: str, entry: Entry, activity: str) -> RunRecord | None:
        run = await self._guard(commits.requeue(self._db, self._schema, run_id, commit_id, entry, activity))
        self._hints.everywhere()
        return run

    # ------------------------------------------------------------------ claims

    def beat(self, incarnation: str, lease_us: int) -> Beat:
        if self._heart is None:
            raise StoreError(f"{self._address} is not open; await store.open() first")
        return self._heart.beat(incarnation, lease_us)

    async def leave(self, incarnation: str) -> None:
        await self._guard(claims.leave(self._db, self._schema, incarnation))
        if self._heart is not None:
            await asyncio.to_thread(self._heart.forget, incarnation)
        self._hints.everywhere()

    async def claim(self, request: ClaimRequest) -> Claim:
        return await self._guard(claims.claim(self._db, self._schema, request))

    async def release(self, runs_: Sequence[tuple[str, int]]) -> None:
        if await self._guard(claims.release(self._db, self._schema, runs_)):
            self._hints.everywhere()

    async def owned(self, incarnation: str) -> list[tuple[str, int]]:
        return await self._guard(claims.owned(self._db, self._schema, incarnation))

    # ------------------------------------------------------------------ inbox

    async def send(self, messages: Sequence[Message]) -> list[SendOutcome]:
        for message in messages:
            check_message(message, self._max_payload)
        outcomes = await self._guard(inbox.send(self._db, self._schema, messages))
        if any(outcome.status is SendStatus.ACCEPTED for outcome in outcomes):
            self._hints.everywhere()
        return outcomes

    async def unread(self, incarnation: str) -> list[str]:
        return await self._guard(inbox.unread(self._db, self._schema, incarnation))

    async def inbox(self, after: Sequence[tuple[str, int]]) -> list[list[InboxRow]]:
        return await self._guard(inbox.read(self._db, self._schema, after))

    # ------------------------------------------------------------------ journal

    async def load(self, run_ids: Sequence[str]) -> list[Journal]:
        return await self._guard(journal.load(self._db, self._schema, run_ids))

    async def page(self, run_id: str, after_seq: int, limit: int) -> list[Entry]:
        return await self._guard(journal.page(self._db, self._schema, run_id, after_seq, limit))

    async def children(self, run_id: str) -> list[RunRecord]:
        return await self._guard(runs.children(self._db, self._schema, run_id))

    # ------------------------------------------------------------------ retention

    async def prune(self, request: PruneRequest) -> int:
        return await self._guard(self._retention.prune(request))

    # ------------------------------------------------------------------ events

    async def publish(self, events_: Sequence[NewEvent]) -> list[EventOutcome]:
        for event in events_:
            check_event(event, self._max_payload)
        outcomes = await self._guard(events.publish(self._db, self._schema, events_, self._max_payload))
        if not all(outcome.duplicate for outcome in outcomes):
            self._hints.everywhere()
        return outcomes

    async def events(self, query: EventQuery) -> list[EventRecord]:
        check_events(query)
        return await self._guard(events.find(self._db, self._schema, query))

    async def settle_events(self, ids: Sequence[str]) -> None:
        await self._guard(events.settle(self._db, self._schema, ids))

    async def limits(self, workspace: str, workflow: str | None = None) -> list[LimitState]:
        return await self._guard(claims.limits(self._db, self._schema, workspace, workflow))

    # ------------------------------------------------------------------ items

    async def put_items(self, items_: Sequence[NewItem]) -> list[PutOutcome]:
        for item in items_:
            check_item(item, self._max_payload)
        outcomes = await self._guard(items.put(self._db, self._schema, items_))
        if any(outcome.done for outcome in outcomes):
            self._hints.everywhere()
        return outcomes

    async def get_items(self, keys: Sequence[ItemKey]) -> list[Item | None]:
        return await self._guard(items.get(self._db, self._schema, keys))

    async def list_items(self, query: ItemQuery) -> ItemPage:
        return await self._guard(items.listed(self._db, self._schema, query))

    async def delete_items(self, keys: Sequence[ItemKey]) -> int:
        count = await self._guard(items.delete(self._db, self._schema, keys))
        if count:
            self._hints.everywhere()
        return count

    async def fire(self, fires: Sequence[Fire]) -> list[FireOutcome]:
        for one in fires:
            check_item(one.item, self._max_payload)
            for occurrence in one.occurrences:
                check_run(occurrence.run, self._max_payload)
        outcomes = await self._guard(items.fire(self._db, self._schema, fires))
        if any(outcome.done for outcome in outcomes):
            self._hints.everywhere()
        return outcomes

    # ------------------------------------------------------------------ hints

    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        return self._hints.listen(on_hint)

    async def _guard(self, call: Awaitable[T]) -> T:
        """The driver's errors leave as ours."""
        try:
            return await call
        except (psycopg.Error, UnicodeEncodeError) as error:
            raise translate(error, str(self._address)) from error
