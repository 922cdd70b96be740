"""What a run's journal is made of. One truth: replay reads it, watchers tail it, the determinism check compares with it.

An entry is written once, by the run's owner, at a dense `seq` from 1. `(kind, status)` says what happened:

    run      started · completed · failed · cancelled · dead · cancelling · timed_out · blocked · unblocked · requeued ·
             paused · resumed · forked
    step     started · retrying · held · completed · failed · cancelled · late   a local body (ctx.step, ctx.side_effect)
    remote   dispatched · published · retrying · completed · failed · cancelled · late
    child    started · completed · failed · cancelled · late
    timer    fired                                                       keyed by ordinal; setting one writes nothing
    signal   received                                                    whether or not anything waits for it
    wait     opened · looked · cancelled                                 for an event; `looked`: at those that came before
    event    received                                                    one that a wait asked for
    emit     completed · failed · cancelled · late                       an event of the run's own
    patched  marked
    log      written

Delivered entries (`Entry.delivers`) are handed to the workflow, one at a time, a full turn for each, in journal
order, live and on replay alike. The rest are annotations: replay keeps them as the trace of their command.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

RUN = "run"
STEP = "step"
REMOTE = "remote"
CHILD = "child"
TIMER = "timer"
SIGNAL = "signal"
WAIT = "wait"
EVENT = "event"
EMIT = "emit"
PATCHED = "patched"
LOG = "log"

NOT_REPLAYED = frozenset({LOG})
"""Kinds that `Store.load` leaves out. Everything else is loaded."""

COMMAND_KINDS = frozenset({STEP, REMOTE, CHILD, WAIT, EMIT})
MAIL_KINDS = frozenset({SIGNAL, EVENT})
"""What others send a run, whatever it is doing: it stays when a requeue asks the rest again."""

_DELIVERED = frozenset(
    {
        (RUN, "started"),
        (RUN, "cancelling"),
        (RUN, "timed_out"),
        (STEP, "completed"),
        (STEP, "failed"),
        (REMOTE, "completed"),
        (REMOTE, "failed"),
        (CHILD, "completed"),
        (CHILD, "failed"),
        (TIMER, "fired"),
        (SIGNAL, "received"),
        (EVENT, "received"),
        (EMIT, "completed"),
        (EMIT, "failed"),
    }
)

_HOLDING = frozenset({"resumed", "forked"})


class Entry(Struct, frozen=True, gc=False):
    """One journal row. Times are integer microseconds since the epoch, UTC; payloads are encoded JSON bytes.

    `payload` by kind and status:
      run started    `{"python": "3.11", "seed"?}`: the minor version the run was recorded on; whose random numbers it draws
                     if not its own: a copy's are its original's
      run blocked    an ErrorData; its details `{"position", "recorded", "asked"}` are both sides of the mismatch
      run requeued   `{"from": seq}`: replay passes over what was recorded from that seq up to here, signals excepted
      run paused     `{"by", "reason"}`
      run resumed    `{"by", "held"}`: by so many µs all pending deadlines are later from here on, the run's timeout included
      run forked     `{"of", "from", "held"}`: what is before it was copied from that run; `held` as above
      step held      `{"status", "payload"}`: a body's end, recorded while the run was paused and delivered when it goes on
      * completed    the output;   * failed    an ErrorData
      * retrying     `{"error": ErrorData, "next_at": µs}`
      remote dispatched    `{"input", "deadline"}`
      remote published     `{"transport"}`: the id of the pool's member that accepted it
      run failed, run dead   `{"cut": seq}`, or None: from where a requeue asks again
      child started  `{"run_id", "workflow", "version", "on_parent_close"}`
      signal         what was sent
      wait opened    `{"condition"?, "until"?}`: of core/match.py; the deadline in µs
      event          a Fact (core/event.py)
      emit completed the event's id
      log            `{"level", "message", "fields"}`
    """

    seq: int
    at: int
    kind: str
    status: str
    key: str | None = None
    """The command's key; a signal's or an event's message id; None where there is none."""
    ordinal: int | None = None
    """The command's or timer's position by first call; for a log its index within its scope."""
    name: str | None = None
    attempt: int = 0
    fingerprint: str | None = None
    """Of the command's arguments; compared on replay."""
    payload: bytes | None = None
    enqueued_at: int | None = None
    started_at: int | None = None
    finished_at: int | None = None

    @property
    def held(self) -> int:
        """By how many µs this entry puts off all deadlines that are pending where it stands."""
        if self.kind != RUN or self.status not in _HOLDING or self.payload is None:
            return 0
        return int(msgspec.json.decode(self.payload).get("held") or 0)

    @property
    def delivers(self) -> bool:
        """Whether this entry is handed to the workflow and gets a turn of its own."""
        return (self.kind, self.status) in _DELIVERED
