"""Events, and what becomes of them: rows and answers of `Store.publish`. Policies that hold a run back are its lane's
(`records.Lane`), looked at when it is claimed; those here decide at once, in the event's own transaction.

Keys are whole: who makes them puts workflow and rule into them. All times µs, by the store's clock.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from durable.store.records import DEFAULT_WORKSPACE, NewRun


class Rate(Struct, frozen=True):
    """At most `limit` admissions within any `period_us`; what is above is dropped."""

    key: str
    limit: int
    period_us: int


class Debounce(Struct, frozen=True):
    """One run once no event has come for `period_us`, or `max_wait_us` after the first. It gets the last event: the new
    run's input and meta replace those of the run that waits."""

    key: str
    period_us: int
    max_wait_us: int | None = None


class Batch(Struct, frozen=True):
    """One run for up to `max_size` events, `timeout_us` after the first of them or when it is full.

    The run's input ends in `]}`: the list its members stand in. `member` is this event's, appended to the list of the run
    that waits; the new run's own input has it already. A batch whose input would exceed the store's `max_payload` counts
    as full.
    """

    key: str
    max_size: int
    timeout_us: int
    member: bytes


class Singleton(Struct, frozen=True):
    """One unfinished run at a time: `skip` drops the new one, `cancel` asks the old one to stop (an inbox row `cancel`)."""

    key: str
    mode: str = "skip"


class Trigger(Struct, frozen=True):
    """A run that an event asks for. The policies are looked at in the order of these fields; debounce and batch exclude
    rate."""

    run: NewRun
    rate: Rate | None = None
    singleton: Singleton | None = None
    debounce: Debounce | None = None
    batch: Batch | None = None


class NewEvent(Struct, frozen=True):
    """A named fact. `id` is ours (uuid7); `dedupe_id` the caller's, unique per workspace as long as the row lives."""

    id: str
    name: str
    data: bytes
    workspace: str = DEFAULT_WORKSPACE
    dedupe_id: str | None = None
    meta: bytes | None = None
    """JSON, an object: app, runner, session, tags …"""
    triggers: tuple[Trigger, ...] = ()
    probes: tuple[str, ...] | None = None
    """What core/match.py found in it; None: too much to say, any waiter may match."""


class Verdict(StrEnum):
    STARTED = "started"
    """A run of its own. With a lane or a `wake_at` it may begin later."""
    DROPPED = "dropped"
    """Above the rate limit: no run."""
    SKIPPED = "skipped"
    """A singleton is unfinished: no run."""
    DEBOUNCED = "debounced"
    """It is in a run that waits, new or not."""
    BATCHED = "batched"


class Admission(Struct, frozen=True):
    """What became of one trigger. `run_id`: the run the event is in; of a skipped one, the run that is in its way."""

    workflow: str
    verdict: Verdict
    run_id: str | None = None
    new: bool = False
    """That run was made by this event."""
    cancelled: str | None = None
    """The unfinished run that was asked to stop."""


class Waiter(Struct, frozen=True):
    """A wait that an event may match: `match` has still to be looked at."""

    run_id: str
    id: str
    match: bytes | None
    expires_at: int | None
    owner: str | None
    """Of the run."""


class EventRecord(Struct, frozen=True):
    """An event as stored. `number` rises with the order in which they were accepted, gaps allowed."""

    id: str
    workspace: str
    name: str
    data: bytes
    number: int
    received_at: int
    dedupe_id: str | None
    meta: bytes | None
    admissions: tuple[Admission, ...]
    settled: bool
    """Its waiters have been told."""


class EventOutcome(Struct, frozen=True):
    """`duplicate`: this dedupe_id (or id) was there before; `event` is that one, and nothing new happened."""

    event: EventRecord
    duplicate: bool
    waiters: tuple[Waiter, ...] = ()
    """Of a duplicate those there are now, and only while it is not settled: whoever was to tell them may have died over it. An
    event without waiters is stored as settled."""


class EventQuery(Struct, frozen=True):
    """Events of one workspace by number, oldest first; `newest_first` turns it round. `before` and `after` are numbers."""

    workspace: str | None = DEFAULT_WORKSPACE
    """None: of all workspaces, with `unsettled` only."""
    id: str | None = None
    name: str | None = None
    since: int | None = None
    """Received at or after, µs."""
    after: int | None = None
    before: int | None = None
    unsettled: bool = False
    """Only those whose waiters may not have been told."""
    whole: bool = False
    """Only events below which no other can appear any more, for who pages by `after` and may miss none: with several
    publishers at once a lower number may be committed after a higher one."""
    newest_first: bool = False
    limit: int = 100


class LimitState(Struct, frozen=True):
    """A rule as it stands. `queued` counts the due runs that wait behind it; `next_at`: when a throttle lets the next begin."""

    workflow: str
    lane: str
    rule: str
    kind: str
    limit: int
    period_us: int
    used: int
    queued: int
    weight: float
    next_at: int | None = None
