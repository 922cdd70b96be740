"""The store's contract. Complete and small: no optional methods. What an adapter cannot do, its `capabilities` say, and
the shared suite (`durable/testing/suites/store.py`) reads them.

Batch first: every write, and every read that a claim needs, takes many; answers come in the order of the questions.
All methods raise `StoreError`: `StoreUnavailable` when the outcome is unknown and the same call may be repeated
(every write carries the caller's ids, so repeating is harmless), `StoreFull` and `StoreReadOnly` when nothing happened.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from msgspec import Struct

from durable.core.journal import Entry
from durable.store.admission import EventOutcome, EventQuery, EventRecord, LimitState, NewEvent
from durable.store.items import Fire, FireOutcome, Item, ItemKey, ItemPage, ItemQuery, NewItem, PutOutcome
from durable.store.records import (
    Beat,
    Claim,
    ClaimRequest,
    Commit,
    CommitOutcome,
    InboxRow,
    Journal,
    Message,
    NewRun,
    PruneRequest,
    RunPage,
    RunQuery,
    RunRecord,
    SendOutcome,
    StartOutcome,
)

AGEING_US = 60_000_000
"""How long one step of priority is worth: a run waits at most so much longer for each step that others are above it."""


class Capabilities(Struct, frozen=True):
    """What an adapter says of itself."""

    name: str
    durable: bool
    """An answered write survives the process and the machine."""
    durability: str
    """One sentence for people: what exactly survives what."""
    shared: bool
    """Several processes may use it at once."""
    commit_with: bool
    """Can run the author's SQL in the same transaction."""
    max_payload: int
    """Bytes one payload may have."""
    max_batch: int = 250
    """Commits one `commit` call takes; more is an error of the caller's."""
    in_flight: int = 1
    """Calls of one kind that are worth having under way at once."""


class Store(Protocol):
    """All runs of one deployment."""

    @property
    def capabilities(self) -> Capabilities: ...

    async def open(self) -> None:
        """Connect, create or migrate tables. Raises StoreTooNew, StoreReadOnly, StoreRestored, WeakDurability."""
        ...

    async def close(self) -> None:
        """Finish what was accepted and let go. Idempotent."""
        ...

    # -- runs
    async def start(self, runs: Sequence[NewRun]) -> list[StartOutcome]:
        """Insert runs, each on its own: one conflict never refuses its neighbours. All-or-none against a crash. Raises
        PayloadTooLarge: nothing of this call was stored."""
        ...

    async def get(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        """The runs of these ids, in the order asked; None for an id nobody has."""
        ...

    async def find(self, query: RunQuery) -> RunPage:
        """One page of the runs a query matches."""
        ...

    # -- commits
    async def commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        """One transaction for all, each fenced and answered on its own. At most one commit per run in a batch. Raises
        StoreError for a batch above `max_batch`, or with two commits of one run: nothing happened then."""
        ...

    async def commit_with(self, work: Callable[[Any], Awaitable[None]], commit: Commit) -> CommitOutcome:
        """Run `work(connection)` and one commit in one transaction; fenced: neither happened."""
        ...

    async def requeue(self, run_id: str, *, commit_id: str, entry: Entry, activity: str) -> RunRecord | None:
        """Reopen a dead or failed run, or wake a blocked or paused one: epoch + 1, `entry` at seq + 1 (its own seq is ignored),
        recovery_attempts 0, output and error cleared, due now, unowned. None: no such run, or not in such a state.
        The same commit_id again answers with the run as it is."""
        ...

    # -- claims
    def beat(self, incarnation: str, lease_us: int) -> Beat:
        """Write this engine's heartbeat row, good for `lease_us` from the store's now. Synchronous, and safe to call
        from a thread of its own: it must not share a connection or a lock with the other methods for long."""
        ...

    async def leave(self, incarnation: str) -> None:
        """This engine has stopped: forget its heartbeat row. Runs it still owns become claimable at once."""
        ...

    async def claim(self, request: ClaimRequest) -> Claim:
        """Take due unowned runs, and runs whose owner is expired, dead or has no row, raising each epoch. An expired
        incarnation is marked dead in the same transaction. Raises recovery_attempts of runs that were `executing`
        under such an owner. Writes `executing`, so that a crash from here on counts; `queued` for a run with recovery
        attempts, which waits for its turn alone; blocked runs stay blocked. Order: priority descending, then wake_at. An
        incarnation that is dead, expired or has never beaten claims nothing. Parked runs of a gone owner are merely freed,
        under a new epoch.

        A run with a lane is taken only with all its slots, in this transaction, and if it is new, only as its throttles let
        it; one that holds its slots still (its owner died) keeps them. Among due runs of a workflow's lanes the order is by
        rank: wake_at of its first turn minus priority times AGEING_US, so that a higher priority goes first and nobody waits
        for ever; within a lane those that have begun before go first; between lanes of equal priority the least served by
        weight. A lane that is full is passed over, and holds up no other."""
        ...

    async def release(self, runs: Sequence[tuple[str, int]]) -> None:
        """Give up ownership of (run_id, epoch): due now, queued if it was executing; a parked run stays put. Another
        epoch: nothing happens."""
        ...

    async def owned(self, incarnation: str) -> list[tuple[str, int]]:
        """(run_id, epoch) of all runs the store says are this engine's."""
        ...

    # -- inbox
    async def send(self, messages: Sequence[Message]) -> list[SendOutcome]:
        """Add inbox rows and raise inbox_last, together. An unowned, unparked run becomes due now. A repeated message
        is a DUPLICATE also after its run has ended. Raises PayloadTooLarge: nothing of this call was stored."""
        ...

    async def unread(self, incarnation: str) -> list[str]:
        """Ids of this engine's runs with inbox_last above inbox_read."""
        ...

    async def inbox(self, after: Sequence[tuple[str, int]]) -> list[list[InboxRow]]:
        """For each (run_id, number): the rows above that number, in order."""
        ...

    # -- journal
    async def load(self, run_ids: Sequence[str]) -> list[Journal]:
        """What replay needs, for many runs at once."""
        ...

    async def page(self, run_id: str, after_seq: int, limit: int) -> list[Entry]:
        """Journal rows of every kind above `after_seq`, in order."""
        ...

    async def children(self, run_id: str) -> list[RunRecord]:
        """Runs whose parent this is, oldest first."""
        ...

    # -- retention
    async def prune(self, request: PruneRequest) -> int:
        """Delete finished runs with everything that hangs on them: journal, inbox, keys. How many there were; fewer
        than `limit` means that no more may go now. A run stays while its parent or one of its children is active. Safe to
        call from many engines at once."""
        ...

    # -- events
    async def publish(self, events: Sequence[NewEvent]) -> list[EventOutcome]:
        """Accept events, each in full or not at all, with the runs they start: its own policies decide in the same
        transaction. An id or dedupe_id that is there already changes nothing; not settled yet, it is answered with
        its waiters again. In the order given. A waiter that is opened at the same time is among those answered, or the event is
        seen by a read that begins after the commit that opened it. Raises PayloadTooLarge:
        nothing of this call was stored."""
        ...

    async def events(self, query: EventQuery) -> list[EventRecord]:
        """Accepted events."""
        ...

    async def settle_events(self, ids: Sequence[str]) -> None:
        """The waiters of these events have been told."""
        ...

    async def limits(self, workspace: str, workflow: str | None = None) -> list[LimitState]:
        """Every rule that has a run, or had one lately: how full it is."""
        ...

    # -- items
    async def put_items(self, items: Sequence[NewItem]) -> list[PutOutcome]:
        """Write items, each on its own. One transaction."""
        ...

    async def get_items(self, keys: Sequence[ItemKey]) -> list[Item | None]:
        """In the order asked. None: there is none, or it has expired."""
        ...

    async def list_items(self, query: ItemQuery) -> ItemPage:
        """One page of a kind."""
        ...

    async def delete_items(self, keys: Sequence[ItemKey]) -> int:
        """How many there were."""
        ...

    async def fire(self, fires: Sequence[Fire]) -> list[FireOutcome]:
        """Move schedules on, each on its own."""
        ...

    # -- hints
    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        """Call `on_hint` on this loop when another process or engine may have changed something. Returns the way to
        stop. Losing every hint costs latency and nothing else. The only listener on a store object hears nothing of
        changes made through that object; engines that share one object hear of each other's."""
        ...
