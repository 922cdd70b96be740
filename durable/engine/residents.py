"""Runs in memory. A `Resident` is one run with its machine, what it has not committed yet, and what is under way for it.

Only its owner touches it, from the application's loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from durable.core.commands import SendTask
from durable.core.definition import WorkflowDefinition
from durable.core.errors import DurableError
from durable.core.journal import Entry
from durable.core.replay import Machine
from durable.protocol.states import Activity, Status
from durable.store.records import Effect, Journal, Parent

if TYPE_CHECKING:
    from durable.engine.pause import Pause


class Line(Struct, frozen=True, gc=False):
    """Something a body told of itself, for the journal."""

    mark: int | tuple[int, str]
    """Which line of its attempt it is: its index; of a worker that does not count, when it was told and its text."""
    payload: bytes

    @property
    def index(self) -> int | None:
        return self.mark if isinstance(self.mark, int) else None


class Arrival(Struct, gc=False):
    """Something that happened to a run and is not journaled yet. Fields as in Entry; `happened` orders it (µs)."""

    happened: int
    kind: str
    status: str
    key: str | None = None
    ordinal: int | None = None
    name: str | None = None
    attempt: int = 0
    payload: bytes | None = None
    enqueued_at: int | None = None
    started_at: int | None = None
    finished_at: int | None = None
    child_id: str | None = None
    """Whose outcome it is: the command may have started another child since, after a requeue."""
    lines: Sequence[Line] = ()
    """Of a result: what its body told of itself. Journaled before it, under its step, but for what was told live."""
    line: Line | None = None
    """Of a log entry: told live by a worker; it comes again with the result."""
    task_id: str | None = None
    """Of a hosted run's turn: which attempt of which turn it answers."""
    whole: bytes | None = None
    """What the workflow is handed where the journal keeps less."""
    number: int | None = None
    """Its inbox row, if it came that way."""
    ack: Callable[[BaseException | None], None] | None = None
    """Told once it is durable (None), or why it will not be."""


class Sent(Struct):
    """A remote task under way. Times are µs."""

    command: SendTask
    attempt: int
    dispatched_at: int
    deadline: int | None = None
    offered: bool = False
    """It is being published, or was."""
    published: bool = False
    transport: str | None = None
    """The member of the pool that accepted it; None: not known (yet)."""
    avoid: str | None = None
    """The member that let the attempt before down."""
    last_beat: int = 0
    beaten: bool = False
    """Somebody is, or was, at it."""
    lines: int = 0
    """Live lines of this attempt that were journaled here."""
    asking: bool = False
    """Its transport is being asked after it: the run stays until there is an answer."""
    asked_at: int = 0
    """When its transport was last asked after it."""
    missed: bool = False
    """It did not hold it then."""

    def silent_at(self) -> int | None:
        """When silence alone says that the attempt is lost; None where it never does."""
        limit = self.command.options.heartbeat_timeout
        return None if limit is None else self.last_beat + int(limit * 1_000_000)


class Final(Struct):
    """How a run ended, on its way to the store."""

    status: Status
    output: bytes | None = None
    error: bytes | None = None


class Resident:
    """One run in memory."""

    __slots__ = (
        "acks",
        "actions",
        "activity",
        "alarm",
        "armed",
        "arrivals",
        "asking",
        "attempts",
        "bodies",
        "born",
        "cancel_deadline",
        "committing",
        "deadline",
        "definition",
        "dropped",
        "effects",
        "ended",
        "epoch",
        "fetching",
        "final",
        "flushing",
        "held",
        "holds",
        "idle",
        "inbox_known",
        "inbox_read",
        "inbox_written",
        "lane",
        "last_at",
        "logs",
        "looked",
        "looked_at",
        "looked_back_at",
        "looking",
        "machine",
        "marks",
        "opening",
        "parent",
        "paused",
        "pending",
        "progressed",
        "queued",
        "recovery_attempts",
        "refused",
        "retries",
        "run_id",
        "sent",
        "seq",
        "spent",
        "suspending",
        "tail",
        "timed_out",
        "told",
        "tree_cancelled",
        "unlooked",
        "workspace",
    )

    def __init__(
        self,
        run_id: str,
        workspace: str,
        definition: WorkflowDefinition,
        machine: Machine,
        parent: Parent | None,
        epoch: int,
        seq: int,
        activity: Activity,
        inbox_read: int = 0,
        recovery_attempts: int = 0,
        *,
        born: int | None = None,
        lane: str | None = None,
    ) -> None:
        self.run_id = run_id
        self.workspace = workspace
        self.definition = definition
        self.machine = machine
        self.parent = parent
        self.epoch = epoch
        self.seq = seq
        """Of the last committed entry."""
        self.tail = seq
        """Of the last entry there is, committed or not."""
        self.last_at = 0
        self.activity = activity
        """As stored."""
        self.recovery_attempts = recovery_attempts
        self.born = born
        """When it was started by the store's clock, µs: the first moment whose events are its business. None: not read yet."""
        self.lane = lane
        """The key of its lane: it holds slots while anything is under way for it."""

        self.arrivals: deque[Arrival] = deque()
        self.pending: list[Entry] = []
        """Entries not committed yet."""
        self.effects: list[Effect] = []
        self.actions: list[Callable[[], None]] = []
        """What waits behind the barrier: done once everything in `pending` is committed (D4)."""
        self.acks: list[Callable[[BaseException | None], None]] = []
        self.inbox_read = inbox_read
        self.inbox_written = inbox_read
        """As stored."""
        self.inbox_known = inbox_read
        """Rows up to here are in memory or journaled."""
        self.looking = False
        """A timer is due, and waits until the inbox has been read; and so does everything behind it."""
        self.looked_at = 0
        """When its inbox was last read, µs: everything stored by then is known."""
        self.unlooked: set[str] = set()
        """Waits for events, by key, for which events that came before are still to be looked at. Meanwhile no event and no
        timer is delivered: an older one may be found."""
        self.looked: set[str] = set()
        """Those that have been looked for, and the journal does not say so yet: that rides with the next commit."""
        self.looked_back_at = 0
        """When the last look back began, µs: every event accepted by then is known."""
        self.progressed = False
        self.refused = False
        """A commit of it was one the store never takes; it fails with the reason, and with nothing else."""

        self.bodies: dict[str, asyncio.Task[Any] | None] = {}
        """Local bodies by key; None while one waits behind the barrier."""
        self.marks: dict[str, int] = {}
        """When bodies began whose `started` is not written yet, µs: that rides with the next commit, or is dropped when the
        body is faster."""
        self.attempts: dict[str, int] = {}
        self.spent: dict[int, int] = {}
        """Attempts of tasks made before the last requeue, by ordinal: they count against nothing any more."""
        self.retries: dict[str, int] = {}
        """When the next attempt of a step is due, µs."""
        self.sent: dict[str, Sent] = {}
        self.logs: dict[str, int] = {}
        """Lines written by step scope."""
        self.told: dict[str, set[tuple[int, int | tuple[int, str]]]] = {}
        """By key of a remote step: the lines of its bodies that are journaled, as attempt and mark."""
        self.deadline: int | None = None
        """Of the run's own timeout."""
        self.cancel_deadline: int | None = None
        self.tree_cancelled = False
        """It is being cancelled with everything it has started."""
        self.timed_out: int | None = None
        """Seq of the entry that says the run took longer than its timeout."""

        self.paused: Pause | None = None
        self.holds: list[tuple[int, int]] = []
        """By seq: by how many µs an entry of the replayed journal puts off what was pending there."""

        self.queued = False
        self.committing = False
        self.suspending = False
        self.fetching = False
        self.asking = 0
        """Questions under way for it, whose answers it stays for: how a child ended, an event to be published."""
        self.flushing = False
        self.ended = False
        self.dropped = False
        self.held = False
        """Suspected of killing engines: waits for its turn alone."""
        self.idle = False
        self.opening: Journal | None = None
        """What is to be replayed before anything else."""
        self.final: Final | None = None
        self.armed: int | None = None
        """When its alarm rings, µs."""
        self.alarm: asyncio.TimerHandle | None = None

    def put_off(self, microseconds: int) -> None:
        """The run's own deadlines are so much later: it stood still meanwhile."""
        if self.deadline is not None:
            self.deadline += microseconds
        if self.cancel_deadline is not None:
            self.cancel_deadline += microseconds

    def held_since(self, seq: int) -> int:
        """By how many µs what was pending at that entry was put off since."""
        return sum(held for at, held in self.holds if at > seq)

    def next_wake(self) -> int | None:
        """The earliest moment, µs, at which something is due for this run by the clock alone."""
        alarms = self.machine.loop.alarms
        if not (alarms or self.retries or self.sent) and self.deadline is None and self.cancel_deadline is None:
            return None  # the usual case, asked several times a step
        timer = self.machine.next_timer() if alarms else None
        wake = timer.deadline if timer is not None else None
        if self.retries:
            wake = _earlier(wake, min(self.retries.values()))
        for sent in self.sent.values():
            # Most tasks have neither, and this is asked several times a step.
            if sent.deadline is not None:
                wake = _earlier(wake, sent.deadline)
            if sent.command.options.heartbeat_timeout is not None:
                wake = _earlier(wake, sent.silent_at())
        if self.deadline is None and self.cancel_deadline is None:
            return wake
        wake = _earlier(wake, self.deadline)
        return _earlier(wake, self.cancel_deadline)


def _earlier(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


class Left(DurableError):
    """The run left this engine before what arrived for it was committed."""


def left() -> Left:
    """Why something that arrived is not taken."""
    return Left("The run has left this engine; send it again.")


def tell(acks: list[Callable[[BaseException | None], None]], why: BaseException | None) -> None:
    """Answer acknowledgements: durable (None), or why not."""
    for ack in acks:
        ack(why)
    acks.clear()
