"""The rows, as the engine sees them. Names are the same in every store; times are integer µs since the epoch, UTC;
payloads are encoded JSON bytes that no store looks into."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from msgspec import UNSET, Struct, UnsetType

from durable.core.journal import Entry
from durable.protocol.states import Activity, Status

DEFAULT_WORKSPACE = "default"


class Parent(Struct, frozen=True):
    """Who started a child, and which command of the parent's is told of the outcome."""

    run_id: str
    key: str
    ordinal: int


class Rule(Struct, frozen=True):
    """One limit that a run stands under. Runs with the same `key` share it, whatever engine they are on.

    `slots`: at most `limit` runs hold one at any instant. `throttle`: at most `limit` runs begin within any `period_us`;
    the others wait.
    """

    key: str
    limit: int
    kind: str = "slots"
    period_us: int = 0


class Lane(Struct, frozen=True):
    """Where a run queues: runs of one workflow (and workspace) with the same `key` have the same rules. The newest run's
    rules and weight count for all of its lane."""

    key: str
    rules: tuple[Rule, ...]
    weight: float = 1.0
    """Under saturation lanes of one workflow are served in proportion to their weights."""


class NewRun(Struct, frozen=True, gc=False):
    """A run to be inserted. The id is the caller's, so a lost reply can be repeated.

    With `owner` the run is born claimed (epoch 1) with `entries` as its first journal rows; without, epoch 0, no
    rows unless `entries` are given (a copied prefix: seq is then theirs), due at `wake_at` (None: at once).
    """

    id: str
    workflow: str
    version: str
    input: bytes
    workspace: str = DEFAULT_WORKSPACE
    input_hash: str = ""
    idempotency_key: str | None = None
    """Unique per (workspace, workflow) for as long as the run row lives."""
    priority: int = 0
    tags: tuple[str, ...] = ()
    attributes: Mapping[str, str | int | float | bool] = {}
    parent: Parent | None = None
    owner: str | None = None
    """Refused for a run with a lane: only a claim takes slots."""
    entries: tuple[Entry, ...] = ()
    wake_at: int | None = None
    lane: Lane | None = None
    """None: nothing limits it."""
    meta: bytes | None = None
    """JSON, an object: where the run comes from, for people (core/origin.py). No store looks into it."""


class RunRecord(Struct, gc=False):
    """A run as stored."""

    id: str
    workspace: str
    workflow: str
    version: str
    status: Status
    activity: Activity
    input: bytes
    output: bytes | None
    error: bytes | None
    priority: int
    tags: tuple[str, ...]
    attributes: Mapping[str, str | int | float | bool]
    parent: Parent | None
    idempotency_key: str | None
    input_hash: str
    wake_at: int | None
    """When an unowned run is due. Every suspended run has one, paused and blocked ones excepted."""
    inbox_last: int
    inbox_read: int
    owner: str | None
    epoch: int
    seq: int
    """Of the last journal entry."""
    commit_id: str | None
    recovery_attempts: int
    created_at: int
    started_at: int | None
    """When an engine first took it."""
    finished_at: int | None
    updated_at: int
    lane: str | None = None
    """The key of its lane. Such a run holds its slots from the claim to the commit that frees them (FreeSlots), suspends
    or ends it; a release frees them too."""
    meta: bytes | None = None


class StartStatus(StrEnum):
    STARTED = "started"
    EXISTING = "existing"
    """The same id, or the same key with the same input: nothing new was made."""
    CONFLICT = "conflict"
    """The same key with another input."""


class StartOutcome(Struct, frozen=True, gc=False):
    status: StartStatus
    run_id: str
    """The run that has the key: the new one, or the one there was."""


# ------------------------------------------------------------------ inbox


class Message(Struct, frozen=True):
    """Something for a run. `id` is the sender's and unique per recipient: the same id again changes nothing.

    kind     name              payload
    signal   the signal's      what was sent
    cancel   ""                `{"reason"}` or None
    child    outcome status    output or error; `key` and `ordinal` name the parent's command
    result   step status       output or error; `key`, `ordinal`, `attempt` name the command
    decision turn status       a hosted run's WorkflowDecision, or the error why there is none; `id` is the turn's task id
    event    the event's       an EventFact; `id` is `event:<event id>`, so a run gets an event once
    pause    ""                `{"by", "reason"}`
    resume   ""                `{"by", "timers"}`: a paused run goes on
    report   step status       `{"lines", "result"}`: a result, and the payloads of the log lines that came with it
    line     ""                `{"mark", "line"}`: a log line told live; `key`, `ordinal`, `attempt` name the command
    """

    run_id: str
    id: str
    kind: str
    name: str = ""
    payload: bytes | None = None
    key: str | None = None
    ordinal: int | None = None
    attempt: int = 0
    workspace: str = DEFAULT_WORKSPACE
    """Refused as NOT_FOUND if the run lives in another."""


class InboxRow(Struct, frozen=True):
    """A stored message. `number` is dense per run, from 1."""

    number: int
    created_at: int
    message: Message


class SendStatus(StrEnum):
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    NOT_FOUND = "not_found"
    FINISHED = "finished"
    """The run is terminal; nothing was stored."""


class SendOutcome(Struct, frozen=True):
    status: SendStatus
    owner: str | None = None
    """The incarnation to nudge, if any."""


# ------------------------------------------------------------------ commit


class StartRun(Struct, frozen=True):
    """Effect: insert a run (child, continue-as-new, dead letter). An id or key that exists already is left alone."""

    run: NewRun


class PutMessage(Struct, frozen=True):
    """Effect: leave a message in another run's inbox. A finished or unknown recipient is passed over."""

    message: Message


class OpenWaiter(Struct, frozen=True):
    """Effect: this run waits for an event. `id` is the run's key of the wait; `match` and `probe` are core/match.py's."""

    id: str
    event: str
    match: bytes | None = None
    expires_at: int | None = None
    probe: str = ""
    """Only events that have this among their probes can match; empty: any may."""


class CloseWaiter(Struct, frozen=True):
    """Effect: this run's wait `id` is over."""

    id: str


class SetAttributes(Struct, frozen=True):
    """Effect: set (or, with None, remove) search attributes and replace tags of this run."""

    attributes: Mapping[str, str | int | float | bool | None] = {}
    tags: tuple[str, ...] | None = None


class AddFire(Struct, frozen=True):
    """Effect: a schedule's occurrence, unique, with the run it starts. Exists already: neither is inserted."""

    schedule_id: str
    occurrence: int
    run: NewRun


class FreeSlots(Struct, frozen=True):
    """Effect: free the flow-control slots this run holds (all, or those of the given keys). A run that suspends without
    it keeps its slots."""

    keys: tuple[str, ...] | None = None


class PutItem(Struct, frozen=True):
    """Effect: keep an item in this run's workspace, whatever version is there (store/items.py)."""

    kind: str
    id: str
    data: bytes
    expires_at: int | None = None


class DropItem(Struct, frozen=True):
    """Effect: this run's workspace has no such item any more."""

    kind: str
    id: str


Effect = StartRun | PutMessage | OpenWaiter | CloseWaiter | SetAttributes | AddFire | FreeSlots | PutItem | DropItem


class Commit(Struct, gc=False):
    """The only way a run changes. Applied as a whole, or refused as a whole if `epoch` or `expected_seq` moved or the
    run is terminal. Refused by seq while the row carries this very `commit_id`: it had succeeded before.

    `entries` are numbered `expected_seq + 1` upwards. Fields left UNSET keep what the row has.
    """

    run_id: str
    epoch: int
    expected_seq: int
    commit_id: str
    entries: list[Entry]
    effects: tuple[Effect, ...] = ()
    status: Status | UnsetType = UNSET
    """Set to a terminal status, it ends the run: owner, wake_at cleared, finished_at stamped, waiters and slots gone."""
    activity: Activity | UnsetType = UNSET
    output: bytes | None = None
    """Written with a terminal status."""
    error: bytes | None = None
    """Written with a terminal status, or with activity `blocked`; cleared by any other activity."""
    inbox_read: int | UnsetType = UNSET
    progressed: bool = False
    """Set recovery_attempts back to 0."""
    suspend: bool = False
    """Give up ownership: owner cleared, `wake_at` written as given, or as the store's now if the row's inbox_last is
    above inbox_read (after this commit) and the activity is not a parked one."""
    wake_at: int | None = None
    """With `suspend` only. None is refused unless the run is parked or has unread mail: nothing would wake it."""

    @property
    def size(self) -> int:
        """Bytes of payload, for bounding a batch."""
        total = 96 * len(self.entries) + len(self.output or b"") + len(self.error or b"")
        for entry in self.entries:
            if entry.payload:
                total += len(entry.payload)
        return total


class CommitStatus(StrEnum):
    DONE = "done"
    FENCED = "fenced"
    """Another epoch, another seq, or the run is terminal. The engine drops the run; it never retries."""


class CommitOutcome(Struct, frozen=True, gc=False):
    """The answer to one commit. `failure` is set when this commit alone was refused by the store (too large for a
    column, a broken payload): a typed error, its batch-mates unharmed. Look at it first: `status` is FENCED then."""

    status: CommitStatus
    inbox_last: int = 0
    """The row's counter, so that an owner sees mail that no hint told it of."""
    wake: tuple[str, ...] = ()
    """Incarnations to nudge: owners of runs this commit left messages for. May be empty: hints are hints."""
    failure: Exception | None = None


# ------------------------------------------------------------------ claims


class Route(Struct, frozen=True):
    """What an engine serves."""

    workflow: str
    version: str
    workspace: str = DEFAULT_WORKSPACE


class ClaimRequest(Struct, frozen=True):
    """Ask for runs that are due, or whose owner is gone. `blocked` asks for blocked runs instead (once, after a start
    with new code), in id order after the given id."""

    incarnation: str
    routes: tuple[Route, ...]
    limit: int
    blocked: bool = False
    after: str = ""


class ClaimedRun(Struct, frozen=True):
    """A run that is now mine, at its new epoch."""

    run: RunRecord
    crashed: bool
    """It was `executing` under an owner that is gone: `recovery_attempts` has been raised by this claim."""


class Claim(Struct, frozen=True):
    runs: list[ClaimedRun]
    next_due_at: int | None
    """The earliest wake_at still to come among unowned runs of these routes, or now if the limit cut the list."""


class Beat(Struct, frozen=True):
    """The answer to a heartbeat."""

    now: int
    """The store's clock, µs."""
    alive: bool
    """False: this incarnation was declared dead and never lives again."""


class Journal(Struct, frozen=True):
    """What replay needs of one run: its entries in order (logs left out), and how many root-scope log lines there are."""

    entries: list[Entry]
    logs: int = 0


class RunQuery(Struct, frozen=True):
    """Filters are ANDed; newest first; `cursor` is the last id of the page before."""

    workspace: str | None = None
    workflow: str | None = None
    status: Status | None = None
    activity: Activity | None = None
    tag: str | None = None
    idempotency_key: str | None = None
    parent: str | None = None
    attributes: Mapping[str, str | int | float | bool] = {}
    """Search attributes that must all be so, type and value."""
    workflows: tuple[str, ...] | None = None
    """Any of these."""
    statuses: tuple[Status, ...] | None = None
    since: int | None = None
    """Created at or after, µs."""
    until: int | None = None
    """Created before, µs."""
    text: str | None = None
    """The run's id, workflow's name or idempotency key contains it, literally; small and capital letters alike."""
    oldest_first: bool = False
    cursor: str | None = None
    limit: int = 50


class RunPage(Struct, frozen=True):
    runs: list[RunRecord]
    cursor: str | None
    """Where the next page begins; None at the end."""


class PruneRequest(Struct, frozen=True):
    """Which finished runs may be deleted, oldest first. Both bounds given: a run goes that either lets go."""

    limit: int
    """Runs deleted by one call at most."""
    workspace: str = DEFAULT_WORKSPACE
    workflow: str | None = None
    """None: every workflow that is not in `but`."""
    but: tuple[str, ...] = ()
    """Workflows with a rule of their own, passed over where `workflow` is None."""
    older_than_us: int | None = None
    """Goes if it finished longer ago than this, by the store's clock."""
    keep: int | None = None
    """Goes if at least this many runs of its workflow finished after it."""
