"""What a turn asks for. Pure data: `engine/apply.py` has one function for each.

Every command but notes (`Patch`, `WriteLog`, `Settled`, `Abandon` …) takes the next ordinal and a key at the call, synchronously.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context as Variables
from typing import Any

from msgspec import Struct

from durable.core.options import ChildOptions, RemoteOptions, StepOptions
from durable.protocol.messages import HistoryItem


class Command(Struct):
    """Something the run asked for and may be waiting on."""

    ordinal: int
    key: str
    name: str
    fingerprint: str

    kind = ""


class RunStep(Command):
    """Run a body on the application's loop (or, a plain `def`, in a thread) and journal what it returns."""

    body: Callable[..., Any]
    args: tuple[Any, ...]
    options: StepOptions
    returns: Any
    """The annotation the result is decoded to; `Any` when there is none."""
    variables: Variables
    """A copy of the context variables at the call; the body runs in it."""

    kind = "step"


class Invoke(RunStep):
    """Ask an app for a pass of its function. The body gives the answer's bytes; the journal keeps `strip` of them, the
    workflow is handed the whole."""

    strip: Callable[[bytes], bytes]


class SendTask(Command):
    """Send a `RemoteTask` over a transport and wait for its result."""

    input: bytes
    options: RemoteOptions
    returns: Any

    kind = "remote"


class TakeTurn(SendTask):
    """Send a hosted run's next turn to a worker and wait for its decision. What the worker is told is put together when the
    task is published, and again for each attempt: the journal does not hold it twice."""

    number: int
    """Of the turn, from 0."""
    history: list[HistoryItem]
    """The run's own list, which grows: this turn is told the first `upto`."""
    upto: int
    seen: int | None
    """How many of these the turns before knew; None: this is the first turn."""
    started_at: int
    """When the run began, µs."""
    logs: int
    patches: tuple[str, ...]


class Record(Command):
    """Write down a step that a worker has run in its turn. Answered at once, in the same commit. `output` and `error` are
    what the worker said, and None on replay: then the entry behind it has it."""

    payload: bytes | None
    failed: bool
    lines: list[bytes]
    """What the body told of itself, as payloads of log entries."""
    started_at: int | None
    finished_at: int | None
    """µs."""

    kind = "step"


class Label(Command):
    """Set the run's search attributes (None removes one) and, if given, its tags. Done with the commit that journals it, and
    answered at once."""

    attributes: dict[str, str | int | float | bool | None]
    tags: tuple[str, ...] | None

    kind = "step"


class AppStep(Command):
    """A step that an app runs within its passes, and tells of: `Report`. Asking for it writes nothing."""

    kind = "step"


class StartChild(Command):
    """Start another run, told of by the same commit. Its outcome comes back through the inbox."""

    workflow: str
    version: str | None
    input: bytes
    child_id: str
    options: ChildOptions
    returns: Any
    meta: bytes | None = None
    """The child's origin (core/origin.py)."""
    workspace: str | None = None
    """Another one than the run's."""

    kind = "child"


class WaitSignal(Command):
    """Wait for a signal by name. Writes nothing; shown by `why` and in the activity."""

    kind = "signal"


class AskApproval(WaitSignal):
    """Wait for somebody's decision, which comes as a signal. While it waits, an item of kind `approval` tells people of it."""

    item_id: str
    item: bytes
    expires_at: int | None = None
    """When the wait gives up, µs."""


class WaitEvent(Command):
    """Wait for an event. Events are journaled as they come, as signals are, and given to every wait that asks for them."""

    condition: bytes | None
    """Of core/match.py; None: any of that name."""
    since: int | None
    """Only events accepted at or after this moment, µs; None: since the run began."""
    deadline: int | None
    """Only events accepted up to this moment, µs."""

    kind = "wait"


class SendEvent(Command):
    """Publish an event and be answered with its id. Done again after a crash, under the same id: there is one event."""

    event_id: str
    dedupe_id: str | None
    data: bytes
    workspace: str | None = None
    """Another one than the run's."""

    kind = "emit"


class Settled(Struct):
    """A wait for an event is over: it came, or its time is up."""

    command: WaitEvent


class Abandon(Struct):
    """The wait on `command` was cancelled inside the run: journal it, tell the body, worker or child."""

    command: Command


class Report(Struct):
    """What came of an attempt of an `AppStep`. On replay the entry behind it has it."""

    command: AppStep
    status: str
    """completed, failed or retrying."""
    attempt: int
    payload: bytes
    """The result; an encoded ErrorData; of `retrying` a RetryNote."""
    lines: list[bytes]
    started_at: int | None = None
    finished_at: int | None = None
    """µs."""


class CloseApproval(Struct):
    """Nobody waits for this decision any more: its item goes."""

    command: AskApproval


class Patch(Struct):
    """`ctx.patched(id)` was reached live for the first time: leave the marker."""

    id: str


class WriteLog(Struct):
    """A line of `ctx.log`, told once however often the body replays. `index` counts the run's root-scope lines from 0."""

    index: int
    level: str
    message: str
    fields: bytes | None


Note = Abandon | Report | CloseApproval | Settled | Patch | WriteLog


class Completed(Struct):
    """The workflow returned."""

    output: bytes


class Failed(Struct):
    """The workflow raised. `error` is an encoded ErrorData."""

    error: bytes
    cut: int | None = None
    """The seq of the failed entry whose error came out, if it was one: a requeue asks again from there."""


class Cancelled(Struct):
    """The workflow let a cancellation through."""

    error: bytes | None = None


Outcome = Completed | Failed | Cancelled
