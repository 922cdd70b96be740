"""What a store's author gives the suite, and the few words its tests are written in."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import pytest

from durable.core.clock import SECOND
from durable.core.journal import Entry
from durable.protocol.states import Activity
from durable.store.interface import Store
from durable.store.records import (
    ClaimedRun,
    ClaimRequest,
    Commit,
    CommitOutcome,
    CommitStatus,
    Message,
    NewRun,
    Route,
    RunRecord,
    StartStatus,
)

LEASE = 10 * SECOND
FAR = 3600 * SECOND
ROUTE = Route("checkout", "1")


class StoreBuilder(Protocol):
    """Builds stores on one fresh set of data, moves their clock, and looks where the contract has no window.

    Give the stores a `max_payload` of a megabyte or so: the suite writes payloads of that size.
    """

    async def connect(self) -> Store:
        """An open store. Each call is another connection to the same data. The builder closes them."""
        ...

    def now(self) -> int:
        """The stores' clock, which stands still."""
        ...

    def advance(self, seconds: float) -> None: ...

    async def plant_slots(self, run_id: str, epoch: int, slots: list[tuple[str, int]]) -> None:
        """Give the run these flow-control slots, (key, number), as a claim will one day."""
        ...

    async def slots(self, run_id: str) -> list[tuple[str, int]]: ...

    async def waiters(self, run_id: str) -> list[str]:
        """Ids of the run's open event waits, sorted."""
        ...

    def sending(self, message: Message) -> AbstractAsyncContextManager[None] | None:
        """A sender in the middle of its transaction: rows written and locked, committed at the exit. None where
        operations cannot overlap."""
        ...


class Tests:
    """Fixtures, and how tests speak."""

    @pytest.fixture
    async def store(self, builder: StoreBuilder) -> Store:
        """A store in which the engines `a` and `b` live."""
        store = await builder.connect()
        for engine in ("a", "b"):
            assert store.beat(engine, LEASE).alive
        return store

    @pytest.fixture
    async def other(self, builder: StoreBuilder, store: Store) -> Store:
        """Another connection to the same data."""
        return await builder.connect()


def new(run_id: str = "r", **fields: Any) -> NewRun:
    return NewRun(**{"id": run_id, "workflow": ROUTE.workflow, "version": ROUTE.version, "input": b"{}", **fields})


def entry(seq: int, payload: bytes | None = b"1", **fields: Any) -> Entry:
    return Entry(**{"seq": seq, "at": seq, "kind": "step", "status": "completed", "payload": payload, **fields})


def commit(run: RunRecord | str, *, epoch: int = 1, seq: int = 0, entries: int = 1, **fields: Any) -> Commit:
    """A commit of `entries` rows on top of the run as read, or of a fresh owned run of that id."""
    if isinstance(run, RunRecord):
        run_id, epoch, seq = run.id, run.epoch, run.seq
    else:
        run_id = run
    rows = [entry(seq + 1 + n) for n in range(entries)]
    made: dict[str, Any] = {"commit_id": f"{run_id}-{epoch}-{seq}", "entries": rows, **fields}
    return Commit(run_id=run_id, epoch=epoch, expected_seq=seq, **made)


def suspend(run: RunRecord | str, wake_at: int | None, **fields: Any) -> Commit:
    return commit(run, **{"suspend": True, "wake_at": wake_at, "activity": Activity.WAITING, **fields})


async def begin(store: Store, *runs: NewRun) -> None:
    outcomes = await store.start(runs)
    assert [outcome.status for outcome in outcomes] == [StartStatus.STARTED] * len(runs)


def later(store: Store, builder: StoreBuilder, seconds: float) -> None:
    """So much later, with the engines `a` and `b` still alive for a lease."""
    builder.advance(seconds)
    for engine in ("a", "b"):
        store.beat(engine, LEASE)


async def read(store: Store, run_id: str = "r") -> RunRecord:
    [run] = await store.get([run_id])
    assert run is not None
    return run


async def claim(store: Store, incarnation: str = "a", limit: int = 100, **fields: Any) -> list[ClaimedRun]:
    return (await store.claim(ClaimRequest(incarnation, (ROUTE,), limit, **fields))).runs


async def claimed_ids(store: Store, incarnation: str = "a", limit: int = 100, **fields: Any) -> list[str]:
    return [claimed.run.id for claimed in await claim(store, incarnation, limit, **fields)]


async def one(store: Store, change: Commit) -> CommitOutcome:
    [outcome] = await store.commit([change])
    if outcome.failure is not None:
        raise outcome.failure
    return outcome


async def done(store: Store, change: Commit) -> RunRecord:
    outcome = await one(store, change)
    assert outcome.status is CommitStatus.DONE
    return await read(store, change.run_id)


async def fenced(store: Store, change: Commit) -> None:
    before = await store.get([change.run_id])
    outcome = await one(store, change)
    assert outcome.status is CommitStatus.FENCED
    assert await store.get([change.run_id]) == before


async def settled(heard: list[str]) -> None:
    """Whatever was changed before listening began may be heard now; the test is about what comes after."""
    await asyncio.sleep(0.05)
    heard.clear()
