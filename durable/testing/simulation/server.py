"""The one store behind all nodes, and each node's unreliable connection to it.

A request travels, takes effect at the server, and its answer travels back: three moments, and anything may happen between
them. What is under way when a client dies or gives up takes effect all the same. Every effect is logged, as the checker's
own record of who wrote what under which epoch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from msgspec import Struct

from durable.core.errors import StoreUnavailable
from durable.core.journal import Entry
from durable.protocol.states import TERMINAL
from durable.store.admission import EventOutcome, EventQuery, EventRecord, LimitState, NewEvent
from durable.store.interface import Capabilities, Store
from durable.store.items import Fire, FireOutcome, Item, ItemKey, ItemPage, ItemQuery, NewItem, PutOutcome
from durable.store.records import (
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
    StartOutcome,
    StartStatus,
)
from durable.testing.simulation.faults import Faults, Tripwire
from durable.testing.simulation.loop import Node, SimLoop

T = TypeVar("T")


class Wrote(Struct, frozen=True):
    """A line of the server's log."""

    at: float
    node: str
    what: str
    """commit, claim, start, send, requeue, release, leave, prune, publish, settle, fire"""
    run_id: str = ""
    epoch: int = 0
    commit_id: str = ""
    seq: int = 0
    """Of the run's last entry, afterwards."""
    status: str = ""
    ends: bool = False
    """A commit that makes the run terminal."""
    last: bool = False
    """The row's own commit_id was this very one before."""
    message_id: str = ""
    """Or an event's or schedule's id."""
    family: tuple[str, ...] = ()
    """Of a pruned run: its parent and children that were active."""


class StoreServer:
    """The database, and the network in front of it."""

    def __init__(self, loop: SimLoop, base: Store, faults: Faults, tripwire: Tripwire) -> None:
        self.loop = loop
        self.base = base
        self.faults = faults
        self.tripwire = tripwire
        self.log: list[Wrote] = []
        self.seqs: dict[str, int] = {}
        """Run id → seq of its last committed entry: the frontier a body's start is held against."""
        self.commit_ids: dict[str, str] = {}
        self.pruned: dict[str, tuple[RunRecord, list[Entry], list[InboxRow]]] = {}
        """Runs that were deleted, as they were last."""
        self._finished: dict[tuple[str, int, int], tuple[RunRecord, list[Entry], list[InboxRow]]] = {}
        self.cut: dict[Node, float] = {}
        """Node → until when it cannot be reached."""
        self.listeners: list[tuple[Connection, Callable[[], None]]] = []
        self.latest = 0.0
        """When the last call that was held up will be over; others may have queued behind it."""
        self.trace: Callable[[str], None] | None = None

    def connect(self, node: Node) -> Connection:
        """A connection for one process."""
        return Connection(self, node)

    def wrote(self, node: Node, what: str, **fields: Any) -> None:
        line = Wrote(round(self.loop.time(), 6), node.name, what, **fields)
        self.log.append(line)
        if self.trace is not None:
            self.trace(_told(line))

    def hint(self, source: Connection) -> None:
        """Something changed: tell the other connections, perhaps."""
        for connection, on_hint in self.listeners:
            if connection is not source and not connection.node.dead and not self.faults.hits("hint_lost", 10):
                self.loop.post(connection.node, self.faults.latency(), on_hint)

    def runs(self) -> list[RunRecord]:
        """All there are."""
        return at_once(self.base.find(RunQuery(limit=100_000))).runs

    def prune(self, node: Node, request: PruneRequest) -> int:
        """Delete, and keep a copy of what was deleted: nobody else could say afterwards whether it was right."""
        before = {run.id: run for run in self.runs()}
        for run in before.values():
            if run.status in TERMINAL and (run.id, run.epoch, run.seq) not in self._finished:
                journal = at_once(self.base.page(run.id, 0, 1_000_000))
                inbox = at_once(self.base.inbox([(run.id, 0)]))[0]
                self._finished[run.id, run.epoch, run.seq] = (run, journal, inbox)
        count = at_once(self.base.prune(request))
        for run_id in sorted(before.keys() - {run.id for run in self.runs()}):
            run = before[run_id]
            family = [other for other in before.values() if other.parent is not None and other.parent.run_id == run_id]
            if run.parent is not None and run.parent.run_id in before:
                family.append(before[run.parent.run_id])
            active = tuple(other.id for other in family if other.status not in TERMINAL)
            self.wrote(node, "prune", run_id=run_id, status=run.status.value, family=active)
            if run.status in TERMINAL:
                self.pruned[run_id] = self._finished[run_id, run.epoch, run.seq]
            self.commit_ids.pop(run_id, None)
        return count

    def unreachable(self, node: Node) -> bool:
        return self.cut.get(node, 0.0) > self.loop.time()


class Connection:
    """One node's store. Implements the Store contract."""

    def __init__(self, server: StoreServer, node: Node) -> None:
        self.server = server
        self.node = node
        self._loop = server.loop
        self._faults = server.faults
        self._in_flight: dict[asyncio.Future[Any], None] = {}

    @property
    def capabilities(self) -> Capabilities:
        return self.server.base.capabilities

    async def open(self) -> None:
        return None

    async def close(self) -> None:
        return None

    # ------------------------------------------------------------------ a call

    async def _call(self, name: str, act: Callable[[], Coroutine[Any, Any, T]], *, effect: bool = False) -> T:
        """One request: there, its effect, and back."""
        loop, faults, server = self._loop, self._faults, self.server
        if self.node.dead:
            return await loop.never()
        reply: asyncio.Future[T] = loop.create_future()
        if server.unreachable(self.node):
            loop.post(self.node, 1.0, _fail, reply, f"{name}: the store cannot be reached")
            return await reply
        there, back = faults.latency(), faults.latency()
        if name == "start" and faults.swarm.retention is not None:
            # A start that is repeated after its run was deleted is another run: an operator's choice of age, no bug.
            loop.post(loop.world, there, self._arrive, name, act, reply, back, effect)
            return await reply
        lost = f"lost_{name}"
        if faults.hits("store_error_before"):
            loop.post(self.node, there + back, _fail, reply, f"{name}: refused")
            return await reply
        if faults.hits("store_dropped"):
            for other in list(self._in_flight):
                _fail(other, "the connection broke")
            if faults.delay(0, 1) < 0.5:
                loop.post(loop.world, there, self._arrive, name, act, None, 0.0, effect)
            loop.post(self.node, there, _fail, reply, f"{name}: the connection broke")
            return await reply
        if faults.hits("store_late"):
            gives_up = faults.delay(0.01, 1.0)
            late = gives_up + faults.delay(0.0, 2.0 * faults.swarm.lease)
            server.latest = max(server.latest, loop.time() + late)
            loop.post(loop.world, late, self._arrive, name, act, None, 0.0, effect)
            loop.post(self.node, gives_up, _fail, reply, f"{name}: no answer in time")
            return await reply
        if faults.hits("store_stall"):
            there += faults.delay(0.25, 15.0)
            back += faults.delay(0.25, 15.0)
            server.latest = max(server.latest, loop.time() + there + back)
        if lost in _LOST and faults.hits(lost, 2):
            loop.post(loop.world, there, self._arrive, name, act, None, 0.0, effect)
            loop.post(self.node, there + faults.delay(0.0, 2.0), _fail, reply, f"{name}: the answer was lost")
            return await reply
        fails = faults.hits("store_error_after")
        loop.post(loop.world, there, self._arrive, name, act, reply, back, effect, fails)
        self._in_flight[reply] = None
        try:
            return await reply
        finally:
            self._in_flight.pop(reply, None)

    def _arrive(
        self,
        name: str,
        act: Callable[[], Coroutine[Any, Any, T]],
        reply: asyncio.Future[T] | None,
        back: float,
        effect: bool,
        fails: bool = False,
    ) -> None:
        """At the server."""
        wire = self.server.tripwire
        counts = effect and not self.node.dead
        when = wire.touch(self.node, name) if counts and name != "claim" else None
        if when == "before":
            self._loop.crash(self.node)
            return
        answer: Any
        error: BaseException | None = None
        try:
            answer = at_once(act())
        except Exception as raised:
            answer, error = None, raised
        if name == "claim" and counts and isinstance(answer, Claim) and answer.runs:
            # One that gets nothing changes nothing; and vanishing just before is vanishing after what came before.
            when = wire.touch(self.node, name)
        if when is not None:
            self._loop.crash(self.node)
            return
        if wire.armed.get(self.node) == "claim" and name == "claim" and isinstance(answer, Claim) and answer.runs:
            del wire.armed[self.node]
            wire.tripped.append((wire.count, "claim", self.node))
            self._loop.crash(self.node)
            return
        if reply is None:
            return
        if fails:
            self._loop.post(self.node, back, _fail, reply, f"{name}: the answer was an error")
        elif error is not None:
            self._loop.post(self.node, back, _raise, reply, error)
        else:
            self._loop.post(self.node, back, _answer, reply, answer)

    def _started(self, new: NewRun) -> None:
        self.server.seqs[new.id] = len(new.entries)
        self.server.wrote(self.node, "start", run_id=new.id, epoch=1 if new.owner else 0, seq=len(new.entries))

    # ------------------------------------------------------------------ runs

    async def start(self, runs: Sequence[NewRun]) -> list[StartOutcome]:
        runs = list(runs)

        async def act() -> list[StartOutcome]:
            outcomes = await self.server.base.start(runs)
            for new, outcome in zip(runs, outcomes, strict=True):
                if outcome.status is StartStatus.STARTED:
                    self._started(new)
            self.server.hint(self)
            return outcomes

        return await self._call("start", act, effect=True)

    async def get(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        ids = list(run_ids)
        return await self._call("get", lambda: self.server.base.get(ids))

    async def find(self, query: RunQuery) -> RunPage:
        return await self._call("find", lambda: self.server.base.find(query))

    # ------------------------------------------------------------------ commits

    async def commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        commits = list(batch)

        async def act() -> list[CommitOutcome]:
            server = self.server
            outcomes = await server.base.commit(commits)
            for commit, outcome in zip(commits, outcomes, strict=True):
                known = server.commit_ids.get(commit.run_id) == commit.commit_id
                done = outcome.status is CommitStatus.DONE
                if done and not known:
                    server.seqs[commit.run_id] = commit.expected_seq + len(commit.entries)
                    server.commit_ids[commit.run_id] = commit.commit_id
                server.wrote(
                    self.node,
                    "commit",
                    run_id=commit.run_id,
                    epoch=commit.epoch,
                    commit_id=commit.commit_id,
                    seq=server.seqs.get(commit.run_id, 0),
                    status=outcome.status.value if outcome.failure is None else f"refused: {outcome.failure}",
                    ends=isinstance(commit.status, str) and commit.status != "active",
                    last=known,
                )
            server.hint(self)
            return outcomes

        return await self._call("commit", act, effect=True)

    async def commit_with(self, work: Callable[[Any], Awaitable[None]], commit: Commit) -> CommitOutcome:
        return await self._call("commit_with", lambda: self.server.base.commit_with(work, commit), effect=True)

    async def requeue(self, run_id: str, *, commit_id: str, entry: Entry, activity: str) -> RunRecord | None:
        async def act() -> RunRecord | None:
            record = await self.server.base.requeue(run_id, commit_id=commit_id, entry=entry, activity=activity)
            if record is not None:
                self.server.seqs[run_id] = record.seq
                self.server.commit_ids[run_id] = commit_id
                self.server.wrote(
                    self.node, "requeue", run_id=run_id, epoch=record.epoch, commit_id=commit_id, seq=record.seq
                )
            self.server.hint(self)
            return record

        return await self._call("requeue", act, effect=True)

    # ------------------------------------------------------------------ claims

    def beat(self, incarnation: str, lease_us: int) -> Beat:
        if self.node.dead or self.server.unreachable(self.node) or self._faults.hits("beat_failed", 3):
            raise StoreUnavailable("the heartbeat did not get through")
        return self.server.base.beat(incarnation, lease_us)

    async def leave(self, incarnation: str) -> None:
        async def act() -> None:
            await self.server.base.leave(incarnation)
            self.server.wrote(self.node, "leave")
            self.server.hint(self)

        return await self._call("leave", act, effect=True)

    async def claim(self, request: ClaimRequest) -> Claim:
        async def act() -> Claim:
            claim = await self.server.base.claim(request)
            for one in claim.runs:
                self.server.wrote(
                    self.node,
                    "claim",
                    run_id=one.run.id,
                    epoch=one.run.epoch,
                    seq=one.run.seq,
                    status="crashed" if one.crashed else "",
                )
            return claim

        return await self._call("claim", act, effect=True)

    async def release(self, runs: Sequence[tuple[str, int]]) -> None:
        pairs = list(runs)

        async def act() -> None:
            await self.server.base.release(pairs)
            for run_id, epoch in pairs:
                self.server.wrote(self.node, "release", run_id=run_id, epoch=epoch)
            self.server.hint(self)

        return await self._call("release", act, effect=True)

    async def owned(self, incarnation: str) -> list[tuple[str, int]]:
        return await self._call("owned", lambda: self.server.base.owned(incarnation))

    # ------------------------------------------------------------------ inbox

    async def send(self, messages: Sequence[Message]) -> list[SendOutcome]:
        sent = list(messages)

        async def act() -> list[SendOutcome]:
            outcomes = await self.server.base.send(sent)
            for message, outcome in zip(sent, outcomes, strict=True):
                self.server.wrote(
                    self.node,
                    "send",
                    run_id=message.run_id,
                    message_id=message.id,
                    status=outcome.status.value,
                )
            self.server.hint(self)
            return outcomes

        return await self._call("send", act, effect=True)

    async def unread(self, incarnation: str) -> list[str]:
        return await self._call("unread", lambda: self.server.base.unread(incarnation))

    async def inbox(self, after: Sequence[tuple[str, int]]) -> list[list[InboxRow]]:
        pairs = list(after)
        return await self._call("inbox", lambda: self.server.base.inbox(pairs))

    # ------------------------------------------------------------------ journal

    async def load(self, run_ids: Sequence[str]) -> list[Journal]:
        ids = list(run_ids)
        return await self._call("load", lambda: self.server.base.load(ids))

    async def page(self, run_id: str, after_seq: int, limit: int) -> list[Entry]:
        return await self._call("page", lambda: self.server.base.page(run_id, after_seq, limit))

    async def children(self, run_id: str) -> list[RunRecord]:
        return await self._call("children", lambda: self.server.base.children(run_id))

    # ------------------------------------------------------------------ events

    async def publish(self, events: Sequence[NewEvent]) -> list[EventOutcome]:
        given = list(events)

        async def act() -> list[EventOutcome]:
            outcomes = await self.server.base.publish(given)
            for new, outcome in zip(given, outcomes, strict=True):
                if not outcome.duplicate:
                    for trigger, admission in zip(new.triggers, outcome.event.admissions, strict=True):
                        if admission.new:
                            self._started(trigger.run)
                self.server.wrote(
                    self.node, "publish", message_id=new.id, status="duplicate" if outcome.duplicate else "accepted"
                )
            self.server.hint(self)
            return outcomes

        return await self._call("publish", act, effect=True)

    async def events(self, query: EventQuery) -> list[EventRecord]:
        return await self._call("events", lambda: self.server.base.events(query))

    async def settle_events(self, ids: Sequence[str]) -> None:
        settled = list(ids)

        async def act() -> None:
            await self.server.base.settle_events(settled)
            for event_id in settled:
                self.server.wrote(self.node, "settle", message_id=event_id)

        return await self._call("settle_events", act, effect=True)

    async def limits(self, workspace: str, workflow: str | None = None) -> list[LimitState]:
        return await self._call("limits", lambda: self.server.base.limits(workspace, workflow))

    # ------------------------------------------------------------------ items

    async def put_items(self, items: Sequence[NewItem]) -> list[PutOutcome]:
        given = list(items)

        async def act() -> list[PutOutcome]:
            outcomes = await self.server.base.put_items(given)
            self.server.hint(self)
            return outcomes

        return await self._call("put_items", act, effect=True)

    async def get_items(self, keys: Sequence[ItemKey]) -> list[Item | None]:
        wanted = list(keys)
        return await self._call("get_items", lambda: self.server.base.get_items(wanted))

    async def list_items(self, query: ItemQuery) -> ItemPage:
        return await self._call("list_items", lambda: self.server.base.list_items(query))

    async def delete_items(self, keys: Sequence[ItemKey]) -> int:
        gone = list(keys)

        async def act() -> int:
            count = await self.server.base.delete_items(gone)
            self.server.hint(self)
            return count

        return await self._call("delete_items", act, effect=True)

    async def fire(self, fires: Sequence[Fire]) -> list[FireOutcome]:
        given = list(fires)

        async def act() -> list[FireOutcome]:
            outcomes = await self.server.base.fire(given)
            for fire, outcome in zip(given, outcomes, strict=True):
                for occurrence in fire.occurrences:
                    if occurrence.run.id in outcome.started:
                        self._started(occurrence.run)
                self.server.wrote(
                    self.node, "fire", message_id=fire.schedule_id, status="done" if outcome.done else "late"
                )
            self.server.hint(self)
            return outcomes

        return await self._call("fire", act, effect=True)

    # ------------------------------------------------------------------ retention

    async def prune(self, request: PruneRequest) -> int:
        async def act() -> int:
            return self.server.prune(self.node, request)

        return await self._call("prune", act, effect=True)

    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        pair = (self, on_hint)
        self.server.listeners.append(pair)

        def stop() -> None:
            if pair in self.server.listeners:
                self.server.listeners.remove(pair)

        return stop


_LOST = frozenset({"lost_commit", "lost_claim", "lost_start", "lost_send"})


def at_once(coro: Coroutine[Any, Any, T]) -> T:
    """What a coroutine that waits for nothing returns: an operation of the server's is one moment."""
    try:
        coro.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a store in a simulation may wait for nothing")


def _answer(reply: asyncio.Future[T], answer: T) -> None:
    if not reply.done():
        reply.set_result(answer)


def _raise(reply: asyncio.Future[Any], error: BaseException) -> None:
    if not reply.done():
        reply.set_exception(error)


def _fail(reply: asyncio.Future[Any], why: str) -> None:
    _raise(reply, StoreUnavailable(why))


def _told(line: Wrote) -> str:
    fields = [f"{name}={value}" for name in Wrote.__struct_fields__[3:] if (value := getattr(line, name))]
    return f"{line.at:9.4f} {line.node:<9} {line.what:<8} {' '.join(fields)}"
