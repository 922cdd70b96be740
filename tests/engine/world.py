"""A small world of engines on one store, in one process: any of them may crash, stand still or leave, and tests ask for facts.

A crash is what `kill -9` is to a process: the engine's calls to the store never answer again, its bodies stop, nothing is
released and nothing is signed off. A pause is SIGSTOP: calls hang and heartbeats do not go out until it goes on.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from durable import Durable, RunHandle
from durable.core.errors import StoreError, StoreUnavailable
from durable.core.journal import Entry
from durable.protocol.states import Status
from durable.store.memory import MemoryStore
from durable.store.records import Beat, RunRecord
from durable.testing.facts import eventually
from durable.transports.event_emitter import EventEmitterTransport

LEASE = 30.0
"""Long, so that no test loses one by accident; those that are about leases set their own."""
SHORT = 0.5

Fault = Callable[[str, tuple[Any, ...]], BaseException | None]


class Line:
    """One engine's connection to the store, which may be cut, held or made to fail."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.dead = False
        self.calls: dict[str, int] = {}
        self.fault: Fault | None = None
        """Asked before each call; what it returns is raised instead."""
        self.fault_after: Fault | None = None
        """Asked after each call, which has then happened: the answer is lost."""
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._beating = threading.Event()
        self._beating.set()

    def hold(self) -> None:
        self._flowing.clear()
        self._beating.clear()

    def flow(self) -> None:
        self._flowing.set()
        self._beating.set()

    def beat(self, incarnation: str, lease_us: int) -> Beat:
        self._beating.wait(10)
        if self.dead:
            raise StoreUnavailable("this engine is dead")
        self._raise(self.fault, "beat", (incarnation, lease_us))
        answer: Beat = self._store.beat(incarnation, lease_us)
        return answer

    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        def hear() -> None:
            if not self.dead and self._flowing.is_set():
                on_hint()

        stop: Callable[[], None] = self._store.listen(hear)
        return stop

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._store, name)
        if not asyncio.iscoroutinefunction(member):
            return member

        async def call(*args: Any, **options: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            await self._gate()
            self._raise(self.fault, name, args)
            await self._gate()  # the fault may have been a death
            answer = await member(*args, **options)
            await self._gate()
            self._raise(self.fault_after, name, args)
            return answer

        return call

    async def _gate(self) -> None:
        await self._flowing.wait()
        if self.dead:
            await asyncio.Event().wait()  # the dead hear nothing

    def _raise(self, fault: Fault | None, name: str, args: tuple[Any, ...]) -> None:
        error = fault(name, args) if fault is not None else None
        if error is not None:
            raise error


class World:
    """Engines on one store."""

    def __init__(self, make_store: Callable[[], Any], kind: str, cold: bool) -> None:
        self._make_store = make_store
        self.kind = kind
        self.cold = cold
        self.apps: list[Durable] = []
        self.graves: list[Any] = []
        self._store: Any = None

    async def store(self) -> Any:
        """A handle on the store that no engine has, to look with."""
        if self._store is None:
            self._store = self._make_store()
            await self._store.open()
        return self._store

    async def engine(self, *things: Any, transport: Any = None, **settings: Any) -> Durable:
        """A running app with an engine of its own. Its own transport too, unless one is given."""
        await self.store()
        settings.setdefault("lease", LEASE)
        settings.setdefault("cold", self.cold)
        settings.setdefault("poll_every", 0.5)
        settings.setdefault("dispatch_patience", 0)
        line = Line(self._make_store())
        if "transports" not in settings:
            settings["transport"] = transport or EventEmitterTransport()
        app = Durable(line, **settings)  # type: ignore[arg-type]
        app.register(*things)
        await app.open()
        self.apps.append(app)
        return app

    @staticmethod
    def line(app: Durable) -> Line:
        """An app's connection to the store."""
        line: Any = app.engine.deps.store
        return line  # type: ignore[no-any-return]

    async def crash(self, app: Durable, *, noticed: bool = True) -> None:
        """Kill an engine without any clean-up. `noticed`: its death is seen at once, as by a freed lock; otherwise the
        lease has to run out."""
        engine = app.engine
        line = self.line(app)
        line.dead = True
        line.flow()
        lease = engine._executor.lease
        lease._stop.set()
        if lease._task is not None:
            lease._task.cancel()
        for run in list(engine._executor.residents.values()):
            run.dropped = True
            for body in run.bodies.values():
                if body is not None:
                    body.cancel()
            self.graves.append(run.machine)
        engine._executor.residents.clear()
        engine._executor._ready.clear()
        engine._unhear()
        for transport in engine.deps.transport.members.values():
            self._crash_transport(transport)
        self.apps.remove(app)
        self.graves.append(app)
        await asyncio.sleep(0)
        if noticed:
            await (await self.store()).leave(lease.incarnation)

    @staticmethod
    def _crash_transport(transport: Any) -> None:
        if isinstance(transport, EventEmitterTransport):
            transport._starts = 0
            shelf = transport._shelf
            shelf.servers = [server for server in shelf.servers if server.end is not transport]
            shelf.listeners = [pair for pair in shelf.listeners if pair[0] is not transport]
            shelf.ends = [end for end in shelf.ends if end is not transport]
            for held in list(transport._under_way):
                held.dropped = True
                if held.work is not None:
                    held.work.cancel()
        elif hasattr(transport, "crashed"):
            transport.crashed()

    def pause(self, app: Durable) -> None:
        """SIGSTOP, as far as the store can tell."""
        self.line(app).hold()

    def resume(self, app: Durable) -> None:
        self.line(app).flow()

    async def close(self) -> None:
        for app in list(self.apps):
            if app._engine is None:
                continue
            line = self.line(app)
            line.flow()
            line.fault = line.fault_after = None
            if line.dead:
                await self.crash(app, noticed=False)
                continue
            try:
                async with asyncio.timeout(5):
                    await app.close(1.0)
            except (StoreError, TimeoutError) as error:  # a test that broke its store for good
                print("closing:", repr(error))
                self.graves.append(app)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            name = task.get_name() or ""
            if name.startswith(("durable-worker-", "durable-scheduler")):
                continue  # of a connection pool, which ends them
            if name.startswith("durable-") or "durable" in repr(task.get_coro()):
                task.cancel()
        loop = asyncio.get_running_loop()
        for grave in self.graves:
            if hasattr(grave, "drop"):
                loop.call_soon(grave.drop)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for grave in self.graves:
            engine = getattr(grave, "_engine", None)
            if engine is not None:  # what the system does for a dead process: its threads and files are gone
                for unlisten in engine._unlisten:
                    unlisten()
                engine._executor.steps.close()
                engine.deps.handler.close()
                await self.line(grave)._store.close()
        if self._store is not None:
            await self._store.close()

    # ------------------------------------------------------------------ facts

    async def record(self, run_id: str) -> RunRecord:
        found = (await (await self.store()).get([run_id]))[0]
        assert found is not None, f"no run {run_id}"
        record: RunRecord = found
        return record

    async def journal(self, run_id: str) -> list[Entry]:
        entries: list[Entry] = await (await self.store()).page(run_id, 0, 100_000)
        return entries

    async def statuses(self, run_id: str, kind: str | None = None, key: str | None = None) -> list[str]:
        """What the journal says, in order: `step charge completed`, or the statuses alone of one kind or key."""
        return [
            entry.status if kind or key else f"{entry.kind} {entry.key or ''} {entry.status}".replace("  ", " ")
            for entry in await self.journal(run_id)
            if (kind is None or entry.kind == kind) and (key is None or entry.key == key)
        ]

    async def until(self, run_id: str, fact: Callable[[RunRecord], object], claim: str = "") -> RunRecord:
        """Until the stored run is so."""
        deadline = asyncio.get_running_loop().time() + 10
        while True:
            record = await self.record(run_id)
            if fact(record):
                return record
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"never came true: {claim or fact}; the run is {record}")
            await asyncio.sleep(0.005)

    async def until_journal(self, run_id: str, fact: Callable[[list[str]], object], claim: str = "") -> list[str]:
        """Until the stored journal, as `kind key status` lines, is so."""
        deadline = asyncio.get_running_loop().time() + 10
        while True:
            lines = await self.statuses(run_id)
            if fact(lines):
                return lines
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"never came true: {claim or fact}; the journal is {lines}")
            await asyncio.sleep(0.005)

    async def waits(self, run_id: str) -> RunRecord:
        """Until the run does nothing but wait, and the store says so."""
        still = {"waiting", "sleeping", "retrying"}
        return await self.until(run_id, lambda r: r.activity in still or r.status != Status.ACTIVE, "it waits")

    async def sound(self, *run_ids: str) -> None:
        """What must hold of every run at any time, and of finished ones above all."""
        for run_id in run_ids:
            record, entries = await self.record(run_id), await self.journal(run_id)
            assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1)), "the journal is dense"
            assert record.seq == len(entries), "the row knows its last entry"
            assert all(a.at <= b.at for a, b in itertools.pairwise(entries)), "time never goes back"
            answered = [e.key for e in entries if e.kind in ("step", "remote", "child") and e.delivers]
            requeued = any(e.status == "requeued" for e in entries)
            assert requeued or len(answered) == len(set(answered)), f"a command was answered twice: {answered}"
            if record.status is not Status.ACTIVE:
                assert record.owner is None
                assert record.wake_at is None
                assert record.finished_at is not None
            elif record.owner is None and record.activity not in ("paused", "blocked"):
                assert record.wake_at is not None, "every suspended run has a wake time"


class Gate:
    """Something a step body does: it counts who has come, and lets them through when opened."""

    def __init__(self) -> None:
        self.came = 0
        self.cancelled = 0
        self._open = asyncio.Event()

    async def __call__(self, *_: Any) -> int:
        self.came += 1
        number = self.came
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return number

    def open(self) -> None:
        self._open.set()

    async def reached(self, count: int = 1) -> None:
        await eventually(lambda: self.came >= count, f"{count} bodies have begun")


async def all_results(handles: Sequence[RunHandle[Any]], timeout: float = 15) -> list[Any]:
    return await asyncio.gather(*(handle.result(timeout) for handle in handles))


def memory_factory() -> Callable[[], Any]:
    first = MemoryStore()
    return first.another


__all__ = ["LEASE", "SHORT", "Gate", "Line", "World", "all_results", "eventually", "memory_factory"]
