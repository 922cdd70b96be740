"""Items: small named records beside the runs, one table for all kinds. Workspaces, what apps registered, runners, nodes,
schedules, approvals and seen nonces are items; each kind's owner alone knows what `data` says.

    kind        id               data                          due_at           expires_at
    workspace   its token        keys, app, environment        -                -
    function    name             what the app registered       -                -
    runner      instance         who it is, where              -                when it is stale
    node        incarnation      its internal address          -                when it is stale
    schedule    the caller's     spec, policies, next          next occurrence  -
    approval    token            what waits for a decision     -                -
    nonce       key id + nonce   -                             -                when it may be used again
"""

from __future__ import annotations

from msgspec import Struct

from durable.store.records import NewRun


class ItemKey(Struct, frozen=True):
    workspace: str
    kind: str
    id: str


class Item(Struct, frozen=True):
    """An item as stored. `version` counts its changes, from 1."""

    workspace: str
    kind: str
    id: str
    data: bytes
    version: int
    due_at: int | None
    expires_at: int | None
    """From then on nobody sees it, and prune deletes it."""
    updated_at: int


class NewItem(Struct, frozen=True):
    """An item to be written. `expected`: only over this version; 0: only where there is none (an expired one is none);
    None: whatever there is."""

    workspace: str
    kind: str
    id: str
    data: bytes
    due_at: int | None = None
    expires_in: int | None = None
    """µs from the store's now."""
    expected: int | None = None


class PutOutcome(Struct, frozen=True):
    done: bool
    version: int
    """Of what is there now; 0: nothing."""


class ItemQuery(Struct, frozen=True):
    """Items of one kind, by (workspace, id); with `due`, those whose due_at has come, earliest first."""

    kind: str
    workspace: str | None = None
    """None: of all."""
    due: bool = False
    after: ItemKey | None = None
    """Only those behind this one; not with `due`."""
    changed_since: int | None = None
    """Only those with updated_at at or above this, µs."""
    limit: int = 500


class ItemPage(Struct, frozen=True):
    items: list[Item]
    now: int
    """The store's clock, µs."""
    next_due_at: int | None = None
    """With `due`: the earliest due_at still to come, or now if the limit has cut the list."""


class Occurrence(Struct, frozen=True):
    """One time a schedule has come due, and the run it starts."""

    at: int
    run: NewRun


class Fire(Struct, frozen=True):
    """A schedule moves on: its item is replaced (`item.expected` is the version that was read) and its occurrences' runs
    are started, all or none. An occurrence that has been before starts nothing."""

    item: NewItem
    occurrences: tuple[Occurrence, ...] = ()

    @property
    def schedule_id(self) -> str:
        """Under which its occurrences are kept: ids are a workspace's own."""
        return f"{self.item.workspace}/{self.item.id}"


class FireOutcome(Struct, frozen=True):
    done: bool
    """False: another version is there by now; nothing happened."""
    started: tuple[str, ...] = ()
    """Ids of the runs that are new."""
