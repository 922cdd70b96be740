"""Pausing a run. It begins nothing more: bodies under way finish and are recorded, nothing is delivered, no timer rings;
what comes for it waits in its inbox. Then it leaves memory, parked, until somebody resumes or cancels it.

Both requests are inbox rows. The commit that takes a `pause` in writes the activity too, so a run that has read its pause
is PAUSED in the store, by whomever it is owned. A parked run is woken by nobody's mail: whoever leaves it a word to go on
reopens it as well (`Pauser.rouse`), and a look at all paused runs now and then finds those where that did not happen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from durable.core.commands import Invoke
from durable.core.errors import DefinitionError, RunFinished, RunNotFound, StoreError
from durable.core.journal import LOG, REMOTE, RUN, STEP, Entry
from durable.engine import apply
from durable.engine.deps import Deps
from durable.engine.residents import Arrival, Resident, left
from durable.engine.signals import Mail
from durable.protocol.states import TERMINAL, Activity, Status
from durable.store.records import InboxRow, Message, RunQuery, RunRecord

if TYPE_CHECKING:
    from durable.engine.executor import Executor
    from durable.engine.settle import Settler

log = logging.getLogger("durable.pause")

Timers = Literal["run", "hold"]
"""What becomes of deadlines during a pause. `run`: they go on, and what is overdue is due at once; `hold`: all of them, the
run's own timeout included, are later by the pause's length. A remote step's own timeout goes on: its worker does."""

PATIENCE_SECONDS = 2.0
"""How long an owner may take to hear that its paused run is to go on; then the run is taken from it."""
LOOK_BEATS = 10
"""Heartbeats between two looks at all paused runs."""
LOOK_PAGE = 250


class PauseNote(Struct, frozen=True):
    """Payload of a `pause` message and of a `paused` entry."""

    by: str = ""
    reason: str = ""


class ResumeNote(Struct, frozen=True):
    """Payload of a `resume` message and of a `resumed` entry. `held` in µs, in the entry only."""

    by: str = ""
    timers: str = "run"
    held: int = 0


class HeldNote(Struct, frozen=True):
    """Payload of a `held` entry: how the body ended. Of an app's pass the whole answer, which the journal keeps nowhere else."""

    status: str
    payload: msgspec.Raw


class Pause:
    """What a paused run keeps in memory until it goes on, or leaves."""

    __slots__ = ("actions", "arrivals", "at")

    def __init__(self, at: int) -> None:
        self.at = at
        """When it was paused, µs."""
        self.actions: list[Callable[[], None]] = []
        """What was decided and did not begin."""
        self.arrivals: list[Arrival] = []
        """What came from inside this engine and is not delivered."""


# ------------------------------------------------------------------ a resident run


def begin(run: Resident, entry: Entry) -> None:
    """The `paused` entry is written, or was found in the journal."""
    run.paused = Pause(entry.at)


def end(executor: Executor, run: Resident, why: Arrival) -> None:
    """Go on, where the run is still in memory: as a new owner would, but with what is at hand."""
    pause, run.paused = run.paused, None
    assert pause is not None
    note = ResumeNote(by="cancel")
    if why.status == "resumed" and why.payload is not None:
        note = msgspec.json.decode(why.payload, type=ResumeNote)
    now = executor.clock.now()
    held = max(0, now - pause.at) if note.timers == "hold" else 0
    payload = msgspec.json.encode(ResumeNote(note.by, note.timers, held))
    executor.append(run, Arrival(now, RUN, "resumed", name=run.definition.name, payload=payload))
    if held:
        run.machine.put_off(held)
        run.put_off(held)
        apply.reopen_waits(executor, run)
        run.retries = {key: at + held for key, at in run.retries.items()}
    run.actions += pause.actions
    for arrival in pause.arrivals:
        place(run, arrival)


def place(run: Resident, arrival: Arrival) -> None:
    """Among what waits to be delivered, by when it happened. Inbox rows keep their order: they are counted."""
    for index, waiting in enumerate(run.arrivals):
        if waiting.happened > arrival.happened:
            run.arrivals.insert(index, arrival)
            return
    run.arrivals.append(arrival)


def held(run: Resident, key: str, entry: Entry) -> Arrival:
    """The end of a body that a pause has kept back, as what it means to the run now."""
    assert entry.payload is not None
    note = msgspec.json.decode(entry.payload, type=HeldNote)
    run.attempts[key] = entry.attempt
    data, whole = bytes(note.payload), None
    command = run.machine.outstanding.get(key)
    if isinstance(command, Invoke) and note.status == "completed":
        data, whole = command.strip(data), data
    return Arrival(
        entry.finished_at or entry.at,
        STEP,
        note.status,
        key,
        attempt=entry.attempt,
        payload=data,
        started_at=entry.started_at,
        finished_at=entry.finished_at,
        whole=whole,
    )


def next_arrival(executor: Executor, run: Resident) -> Arrival | None:
    """What a paused run takes in: what is recorded and not delivered. None: nothing, or it goes on."""
    pause = run.paused
    assert pause is not None
    go_on = next((one for one in run.arrivals if one.number is not None and _goes_on(one)), None)
    if go_on is not None:
        end(executor, run, go_on)
        return None
    for arrival in [one for one in run.arrivals if one.number is None]:
        run.arrivals.remove(arrival)
        if arrival.kind == LOG or arrival.status == "published":
            return arrival
        if arrival.ack is not None:
            arrival.ack(left())  # its inbox takes it
        elif arrival.kind == STEP and not _awaited(run, arrival):
            return arrival  # recorded as late
        else:
            pause.arrivals.append(arrival)
            if arrival.kind == STEP:
                return _recorded(arrival)
    return None


def _goes_on(arrival: Arrival) -> bool:
    return arrival.kind == RUN and arrival.status in ("cancelling", "resumed")


def _awaited(run: Resident, arrival: Arrival) -> bool:
    key = arrival.key or ""
    return key in run.machine.outstanding and run.attempts.get(key, arrival.attempt) == arrival.attempt


def _recorded(arrival: Arrival) -> Arrival:
    note = HeldNote(arrival.status, msgspec.Raw(arrival.whole or arrival.payload or b"null"))
    return Arrival(
        arrival.happened,
        STEP,
        "held",
        arrival.key,
        attempt=arrival.attempt,
        payload=msgspec.json.encode(note),
        started_at=arrival.started_at,
        finished_at=arrival.finished_at,
    )


def settle(settler: Settler, run: Resident) -> None:
    """What becomes of a paused run after its turns: it leaves memory as soon as nothing of it is under way here."""
    pause = run.paused
    assert pause is not None
    pause.actions += run.actions
    run.actions = []
    if _at_rest(settler, run, pause):
        settler.commit(run, suspend=True)
    elif run.pending or run.effects or run.acks or run.activity is not Activity.PAUSED:
        settler.commit(run)


def _at_rest(settler: Settler, run: Resident, pause: Pause) -> bool:
    if any(run.bodies.values()) or run.fetching or run.asking:
        return False
    kept = {arrival.key for arrival in pause.arrivals}
    came = {arrival.ordinal for arrival in run.arrivals if arrival.kind == REMOTE}
    for key, sent in run.sent.items():
        if sent.offered and not sent.published and key not in kept:
            return False  # a publish is under way
        # A task in this process dies with its run's stay here; its answer may be in the inbox by now.
        if sent.published and sent.command.ordinal not in came and not settler.shared(sent):
            return False
    return True


# ------------------------------------------------------------------ the verbs


class Pauser:
    """Asks runs to pause and to go on, from anywhere."""

    def __init__(self, deps: Deps, mail: Mail, now: Callable[[], int], nudge: Callable[[str], None]) -> None:
        self._deps = deps
        self._mail = mail
        self._now = now
        self._nudge = nudge
        self._beats = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking = False

    async def pause(self, run_id: str, by: str, reason: str, workspace: str) -> bool:
        """True if this was the first request since the run last went on. Raises RunNotFound, RunFinished."""
        record = await self._record(run_id, workspace)
        if record.activity is Activity.PAUSED:
            return False
        life, _ = _life((await self._deps.store.load([run_id]))[0].entries)
        payload = msgspec.json.encode(PauseNote(by, reason))
        return await self._mail.must_send(
            Message(run_id, f"pause:{life}", "pause", payload=payload, workspace=workspace)
        )

    async def resume(self, run_id: str, by: str, timers: Timers, workspace: str) -> bool:
        """True if the run was paused, or about to be. Raises RunNotFound, RunFinished."""
        if timers not in ("run", "hold"):
            raise DefinitionError(
                f"timers is 'run' (deadlines go on during a pause) or 'hold' (they are later by it), not {timers!r}."
            )
        record = await self._record(run_id, workspace)
        if record.activity is not Activity.PAUSED:
            rows = (await self._deps.store.inbox([(run_id, record.inbox_read)]))[0]
            if not any(row.message.kind == "pause" for row in rows):
                return False
        life, _ = _life((await self._deps.store.load([run_id]))[0].entries)
        payload = msgspec.json.encode(ResumeNote(by, timers))
        new = await self._mail.must_send(
            Message(run_id, f"resume:{life}", "resume", payload=payload, workspace=workspace)
        )
        return await self.rouse(run_id) or new

    async def rouse(self, run_id: str) -> bool:
        """Have a paused run go on that has a word to do so in its inbox. An owner that still has bodies of it under way reads
        that word by itself; it is given a moment. False: it is not paused, or has no such word."""
        waited = 0.0
        while True:
            record = (await self._deps.store.get([run_id]))[0]
            if record is None or record.status in TERMINAL or record.activity is not Activity.PAUSED:
                return False
            if record.owner is None or waited >= PATIENCE_SECONDS:
                return await self._reopen(record)
            await asyncio.sleep(0.02)
            waited += 0.02

    def rouse_soon(self, run_id: str) -> None:
        """As `rouse`, beside what is going on."""
        self._spawn(self._rouse(run_id))

    def beaten(self) -> None:
        """After each heartbeat: now and then look for paused runs that have been told to go on and were not roused, since
        whoever told them died over it."""
        self._beats += 1
        if self._beats % LOOK_BEATS == 0 and not self._looking:
            self._looking = True
            self._spawn(self._look())

    async def close(self) -> None:
        """Let go of what is under way; the next engine's look finds it."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _rouse(self, run_id: str) -> None:
        try:
            await self.rouse(run_id)
        except StoreError as error:
            log.warning("run %s could not be roused, a later look will do it: %s", run_id, error)

    async def _look(self) -> None:
        try:
            cursor: str | None = None
            while True:
                query = RunQuery(status=Status.ACTIVE, activity=Activity.PAUSED, cursor=cursor, limit=LOOK_PAGE)
                page = await self._deps.store.find(query)
                for record in page.runs:
                    if record.owner is None and record.inbox_last > record.inbox_read:
                        await self._reopen(record)
                cursor = page.cursor
                if cursor is None:
                    return
        except StoreError as error:
            log.warning("cannot look at paused runs, trying again later: %s", error)
        finally:
            self._looking = False

    async def _reopen(self, record: RunRecord) -> bool:
        store = self._deps.store
        rows = (await store.inbox([(record.id, record.inbox_read)]))[0]
        word = next((row for row in rows if row.message.kind in ("cancel", "resume")), None)
        if word is None:
            return False
        _, since = _life((await store.load([record.id]))[0].entries)
        now = self._now()
        entry = Entry(0, now, RUN, "resumed", name=record.workflow, payload=_resumed(word, now, since))
        reopened = await store.requeue(
            record.id, commit_id=self._deps.ids.unique(), entry=entry, activity=Activity.QUEUED.value
        )
        if reopened is not None:
            self._nudge(record.id)
        return reopened is not None

    async def _record(self, run_id: str, workspace: str) -> RunRecord:
        record = (await self._deps.store.get([run_id]))[0]
        if record is None or record.workspace != workspace:
            raise RunNotFound(f"There is no run {run_id!r} here. Is it another workspace's?", run_id=run_id)
        if record.status in TERMINAL:
            raise RunFinished(
                f"Run {run_id!r} is {record.status}: it can neither be paused nor resumed.", run_id=run_id
            )
        return record

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work, name="durable-rouse")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def paused_by(entries: Sequence[Entry]) -> PauseNote | None:
    """Who has paused a run, and why; None if it is not paused."""
    for entry in reversed(entries):
        if entry.kind == RUN and entry.status == "paused":
            return msgspec.json.decode(entry.payload or b"{}", type=PauseNote)
        if entry.kind == RUN and entry.status in ("resumed", "requeued"):
            return None
    return None


def _life(entries: Sequence[Entry]) -> tuple[int, int | None]:
    """Since which seq the run has been going on, which names its pause and the word to go on; and since when it stands
    still, µs."""
    life, since = 0, None
    for entry in entries:
        if entry.kind == RUN and entry.status in ("resumed", "requeued"):
            life, since = entry.seq, None
        elif entry.kind == RUN and entry.status == "paused":
            since = entry.at
    return life, since


def _resumed(word: InboxRow, now: int, since: int | None) -> bytes:
    note = ResumeNote(by="cancel")
    if word.message.kind == "resume" and word.message.payload is not None:
        note = msgspec.json.decode(word.message.payload, type=ResumeNote)
    length = max(0, now - since) if note.timers == "hold" and since is not None else 0
    return msgspec.json.encode(ResumeNote(note.by, note.timers, length))
