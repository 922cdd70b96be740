"""A store, a ledger, engines as processes on them, and a caller who writes down what it is told: for every chaos test,
whatever the store. Nodes may come to the store by another way than the caller: through a proxy."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from durable import Durable, RunHandle
from durable.core.definition import workflow_of
from durable.core.errors import DurableError, StoreError
from durable.protocol.states import Status
from durable.store.records import RunRecord
from durable.testing.simulation.witness import Body
from durable.testing.simulation.world import Call, Stored
from tests.chaos.checker import Records, bodies_again, check
from tests.chaos.node import STEPS, WORKFLOWS, load

ROOT = Path(__file__).resolve().parents[2]
LEASE = 2.0
GRACE = 2.0
"""Seconds on top of the lease until everything goes on."""
MANY = 200
"""Runs read at once."""

T = TypeVar("T")
Fact = Callable[[RunRecord], object]


def over(record: RunRecord) -> bool:
    """The run has ended."""
    return record.status is not Status.ACTIVE


def share(times: Sequence[float], part: float) -> float:
    """The time that this part of them stays within: `share(times, 0.99)` is p99."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


async def patiently(read: Callable[[], Awaitable[T]], timeout: float = 20) -> T:
    """What it reads, once the store is there; a connection that ended while it lay idle is heard of only when it is used."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return await read()
        except StoreError:
            assert time.monotonic() < deadline, "the store never came back"
            await asyncio.sleep(0.02)


class Node:
    """One process."""

    def __init__(self, site: Site, url: str, **settings: Any) -> None:
        settings = {"lease": LEASE, "poll_every": 0.2, **settings}
        with site.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.node", url, str(site.ledger), json.dumps(settings)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.incarnation = ""
        """At its start: who loses the lease and comes back is somebody new."""

    async def came_up(self) -> bool:
        """Once it serves; false if it ended before."""
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        word, _, self.incarnation = line.strip().partition(" ")
        return word == "ready"

    async def ready(self) -> Node:
        assert await self.came_up(), "the node did not start"
        return self

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    async def ended(self, timeout: float = 20) -> int:
        return await asyncio.to_thread(self.process.wait, timeout)


class Site:
    """Where it happens. `url` is the caller's way to the store, and the nodes' unless they are given another."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        self.ledger = directory / "ledger.jsonl"
        self.log = directory / "nodes.log"
        self.nodes: list[Node] = []
        self.history: list[Call] = []
        self.began_at = time.time()
        self.app = self.caller(url)

    @staticmethod
    def caller(url: str) -> Durable:
        """An app that starts runs, waits for them, and executes none."""
        return Durable(url, workflows=WORKFLOWS, steps=STEPS, worker=False, lease=LEASE, poll_every=0.1)

    async def open(self) -> Site:
        await self.app.open()
        return self

    async def close(self) -> None:
        for node in self.nodes:
            if node.alive:
                node.process.kill()
            node.process.wait()
            if node.process.stdout is not None:
                node.process.stdout.close()
        await self.app.close(1)

    # ------------------------------------------------------------------ engines

    def launch(self, via: str | None = None, **settings: Any) -> Node:
        """A process that may or may not come up."""
        node = Node(self, via or self.url, **settings)
        self.nodes.append(node)
        return node

    async def node(self, via: str | None = None, **settings: Any) -> Node:
        """A process that serves, `via` another URL if need be."""
        return await self.launch(via, **settings).ready()

    async def several(self, count: int, **settings: Any) -> list[Node]:
        return list(await asyncio.gather(*(self.node(**settings) for _ in range(count))))

    def said(self) -> str:
        """The last that the nodes' loggers said."""
        return "".join(self.log.read_text().splitlines(keepends=True)[-30:]) if self.log.exists() else ""

    # ------------------------------------------------------------------ the caller

    async def start(
        self,
        workflow: Any,
        input: Any = None,
        *,
        key: str | None = None,
        app: Durable | None = None,
        patience: float = 30,
    ) -> RunHandle[Any] | None:
        """Start a run under a key, and write down what came of it. None: nobody knows."""
        key = key or f"key-{len(self.history)}"
        call = Call(len(self.history), "start", time.time(), detail=key)
        self.history.append(call)
        try:
            async with asyncio.timeout(patience):
                handle = await (app or self.app).start(workflow, input, key=key)
        except (StoreError, TimeoutError):
            return None
        except DurableError:
            call.outcome = "fail"
            raise
        finally:
            call.ended = time.time()
        call.outcome, call.run_id = "ok", handle.id
        return handle

    async def load(self, count: int, seconds: float, workflow: Any = load) -> list[RunHandle[Any]]:
        """So many runs, all acknowledged."""
        handles = await asyncio.gather(*(self.start(workflow, seconds) for _ in range(count)))
        assert None not in handles, "a start was not acknowledged"
        return [handle for handle in handles if handle is not None]

    async def signal(self, run_id: str, payload: Any, *, app: Durable | None = None, patience: float = 30) -> bool:
        """Send `go`, the same until somebody acknowledges it. False: nobody did."""
        call = Call(len(self.history), "signal", time.time(), run_id=run_id, detail=f"{run_id}/{payload}")
        self.history.append(call)
        try:
            async with asyncio.timeout(patience):
                await (app or self.app).run(run_id).signal("go", payload, id=call.detail)
        except (StoreError, TimeoutError):
            return False
        call.outcome = "ok"
        return True

    # ------------------------------------------------------------------ what is so

    async def records(self, handles: Sequence[RunHandle[Any]]) -> list[RunRecord]:
        """The runs as stored."""
        found: list[RunRecord] = []
        for begin in range(0, len(handles), MANY):
            some = await self.app.engine.deps.store.get([handle.id for handle in handles[begin : begin + MANY]])
            found += [record for record in some if record is not None]
        return found

    async def found(self, workflow: str, count: int, timeout: float = 20) -> list[RunHandle[Any]]:
        """The runs of a workflow, once there are so many; fails when there are more."""
        deadline = time.monotonic() + timeout
        while True:
            page = await patiently(lambda: self.app.find(workflow=workflow, limit=MANY))
            assert len(page.runs) <= count, (
                f"{len(page.runs)} runs of {workflow}: {[(r.input, r.status, r.id) for r in page.runs]}"
            )
            if len(page.runs) == count:
                return [self.app.run(record.id) for record in page.runs]
            assert time.monotonic() < deadline, f"there are only {len(page.runs)} runs of {workflow}\n{self.said()}"
            await asyncio.sleep(0.03)

    async def until(
        self, handles: Sequence[RunHandle[Any]], fact: Fact, claim: str, timeout: float = 40
    ) -> list[RunRecord]:
        """All of them, once it is so of each; fails with the claim when that never comes. A store that is away is waited for."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                records = await self.records(handles)
            except StoreError:
                records = []
            left = [(record.id, record.activity, record.owner) for record in records if not fact(record)]
            if len(records) == len(handles) and not left:
                return records
            assert time.monotonic() < deadline, f"never came true: {claim}; {len(left)} left, {left[:3]}\n{self.said()}"
            await asyncio.sleep(0.03)

    async def progress(
        self, handles: Sequence[RunHandle[Any]], before: dict[str, RunRecord], since: float, timeout: float = 40
    ) -> list[float]:
        """Seconds from `since` (monotonic) until each of them had gone on from what it was before."""
        times: list[float] = []
        left = list(handles)
        while left:
            try:
                records = {record.id: record for record in await self.records(left)}
            except StoreError:
                records = {}
            now = time.monotonic() - since
            on = {run_id for run_id, r in records.items() if over(r) or r.seq > before[run_id].seq}
            times += [now] * len(on)
            left = [handle for handle in left if handle.id not in on]
            assert now < timeout, (
                f"{len(left)} runs never went on, {[records.get(h.id) for h in left[:2]]}\n{self.said()}"
            )
            await asyncio.sleep(0.02)
        return times

    # ------------------------------------------------------------------ the verdict

    async def judge(self, handles: Sequence[RunHandle[Any]] | None = None) -> int:
        """Nothing lost, nothing committed twice, nothing invented. Returns how many bodies ran more than once.

        Without `handles`: everything there is."""
        records = await self.evidence(handles)
        found = check(records)
        assert not found, "\n".join([f"{len(found)} violations:", *found[:20], self.said()])
        return bodies_again(records)

    async def evidence(self, handles: Sequence[RunHandle[Any]] | None = None) -> Records:
        """The three records as they stand."""
        ids = await self._everything() if handles is None else {handle.id for handle in handles}
        runs = await self._stored(sorted(ids))
        for run_id, stored in runs.items():
            if over(stored.run):
                told = await patiently(lambda run_id=run_id: self.app.engine.wait(run_id, 5))
                detail = json.dumps([told.status.value, json.loads(told.output or b"null")])
                self.history.append(Call(len(self.history), "wait", 0, outcome="ok", run_id=run_id, detail=detail))
        return Records(
            swarm=None,  # type: ignore[arg-type]  # no rule here asks for it
            plans={},
            runs=runs,
            bodies=[body for body in self.witnessed() if handles is None or body.run_id in ids],
            history=[call for call in self.history if handles is None or call.run_id in ids],
            log=[],
            leftovers=leftovers(self.url),
            complaints=self.complaints(),
            began_at=self.began_at,
            ended_at=time.time(),
            workflows={workflow_of(one).name: one for one in WORKFLOWS},
        )

    async def _everything(self) -> set[str]:
        ids: set[str] = set()
        cursor: str | None = None
        while True:
            page = await patiently(lambda cursor=cursor: self.app.find(cursor=cursor, limit=MANY))
            ids |= {record.id for record in page.runs}
            cursor = page.cursor
            if cursor is None:
                return ids

    async def _stored(self, ids: Sequence[str]) -> dict[str, Stored]:
        store = self.app.engine.deps.store
        found: dict[str, Stored] = {}
        for begin in range(0, len(ids), MANY):
            some = ids[begin : begin + MANY]
            records = await patiently(lambda some=some: store.get(some))
            journals = await patiently(lambda some=some: store.load(some))  # all of it: nothing here writes logs
            inboxes = await patiently(lambda some=some: store.inbox([(run_id, 0) for run_id in some]))
            for run_id, record, journal, inbox in zip(some, records, journals, inboxes, strict=True):
                if record is not None:
                    found[run_id] = Stored(record, journal.entries, inbox)
        return found

    def witnessed(self) -> list[Body]:
        """The ledger: each body when it began (no outcome) and when it got to its end."""
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        bodies = []
        for run_id, step_id, key, attempt, pid, value in map(json.loads, lines):
            outcome = "" if value is None else "completed"
            bodies.append(
                Body(run_id, key, step_id, attempt, str(pid), 0.0, sys.maxsize, False, value, outcome=outcome)
            )
        return bodies

    def complaints(self) -> list[str]:
        """Exceptions that the nodes did not expect, from what their loggers said."""
        text = self.log.read_text() if self.log.exists() else ""
        found = []
        for trace in re.findall(r"^Traceback .*?^\S*(?:Error|Exception)\b[^\n]*", text, re.M | re.S):
            last = trace.splitlines()[-1]
            found.append(last if "StoreUnavailable" not in last else "")
        return [complaint for complaint in found if complaint]


def leftovers(url: str) -> list[str]:
    """S26: rows that hang on runs which have ended. The names are the same in every store."""
    ended = "SELECT run_id FROM {} WHERE run_id NOT IN (SELECT id FROM runs WHERE status = 'active')"
    questions = {table: ended.format(table) for table in ("event_waiters", "slots")}
    if url.startswith("sqlite"):
        cx = sqlite3.connect(url.removeprefix("sqlite:///"))
        try:
            return [f"{table} of {row[0]}" for table, sql in questions.items() for row in cx.execute(sql)]
        finally:
            cx.close()
    import psycopg

    with psycopg.connect(url, options="-c search_path=durable,public") as direct:
        return [f"{table} of {row[0]}" for table, sql in questions.items() for row in direct.execute(sql)]


def owners(records: Sequence[RunRecord]) -> Counter[str]:
    """How many runs each incarnation has."""
    return Counter(record.owner for record in records if record.owner is not None)
