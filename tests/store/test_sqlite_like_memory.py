"""Whatever is done to both, in whatever order: SQLite answers as the memory store does."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from durable.core.clock import SECOND
from durable.protocol.states import Activity, Status
from durable.store.admission import Batch, Debounce, EventOutcome, EventQuery, NewEvent, Rate, Singleton, Trigger
from durable.store.interface import Store
from durable.store.items import Fire, ItemKey, ItemQuery, NewItem, Occurrence
from durable.store.memory import MemoryStore
from durable.store.records import (
    ClaimRequest,
    CloseWaiter,
    Commit,
    DropItem,
    Effect,
    FreeSlots,
    Lane,
    Message,
    NewRun,
    OpenWaiter,
    PruneRequest,
    PutItem,
    Route,
    Rule,
    RunQuery,
    RunRecord,
    SetAttributes,
    StartRun,
)
from durable.store.sqlite import SqliteStore
from durable.testing.clock import ManualClock
from durable.testing.suites.store.builder import entry

ENGINES = ("a", "b")
WORKFLOWS = ("checkout", "mail")
WORKSPACES = ("default", "shop.dev")


class Story:
    """A random history: every step is asked of both stores, and the answers must be the same."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.clock = ManualClock()
        self.memory = MemoryStore(self.clock, max_payload=2_500)
        self.sqlite = SqliteStore(":memory:", clock=self.clock, inline=True, max_payload=2_500)
        self.made = 0
        self.told: list[str] = []

    async def play(self, steps: int) -> None:
        await self.sqlite.open()
        names = sorted(name for name in dir(self) if name.startswith("step_"))
        for _ in range(steps):
            for engine in ENGINES:
                if self.pick.random() < 0.9:
                    assert self.memory.beat(engine, 30 * SECOND) == self.sqlite.beat(engine, 30 * SECOND)
            await getattr(self, self.pick.choice(names))()
            self.clock.advance(self.pick.choice([0.000_001, 0.5, 1, 3, 20]))
        await self.sqlite.close()

    async def both(self, what: str, ask: Callable[[Store], Any]) -> Any:
        self.told.append(what)
        wanted, got = [await ask(store) for store in (self.memory, self.sqlite)]
        assert told(got) == told(wanted), "\n".join(self.told)
        return wanted

    # ------------------------------------------------------------------ what there may be

    def id(self, kind: str) -> str:
        """Rises, as the time does: both stores have the same order among equals."""
        self.made += 1
        return f"{kind}{self.made:05}"

    def chance(self, part: float) -> bool:
        return self.pick.random() < part

    def lane(self) -> Lane | None:
        if self.chance(0.3):
            return None
        rules = [Rule("all", 4)]
        key = self.pick.choice("xyz")
        if self.chance(0.5):
            rules.append(Rule(f"slots {key}", self.pick.randint(1, 2)))
        if self.chance(0.4):
            rules.append(Rule(f"pace {key}", 2, "throttle", 5 * SECOND))
        return Lane(key, tuple(rules[self.pick.randint(0, 1) :]), self.pick.choice([1.0, 1.0, 3.0]))

    def run(self, **fields: Any) -> NewRun:
        given: dict[str, Any] = {
            "id": self.id("r"),
            "workflow": self.pick.choice(WORKFLOWS),
            "version": self.pick.choice(["1", "1", "2"]),
            "workspace": self.pick.choice(WORKSPACES),
            "input": b'{"data":[%d]}' % self.made if self.chance(0.9) else b'{"data":["%s"]}' % (b"x" * 2_100),
            "input_hash": self.pick.choice("ab"),
            "idempotency_key": self.pick.choice("klmnopq") if self.chance(0.1) else None,
            "priority": self.pick.choice([0, 0, 1]),
            "tags": self.pick.choice([(), (), ("red",), ("red", "blue")]),
            "attributes": self.pick.choice([{}, {}, {"n": 1}, {"n": 1.0, "ok": True}]),
            "wake_at": self.clock.now() + self.pick.randint(1, 20) * SECOND if self.chance(0.2) else None,
            "lane": self.lane(),
            "meta": b'{"app":"shop"}' if self.chance(0.2) else None,
        }
        return NewRun(**{**given, **fields})

    async def some_run(self, **query: Any) -> RunRecord | None:
        runs = (await self.memory.find(RunQuery(limit=40, **query))).runs
        return self.pick.choice(runs) if runs else None

    def trigger(self, workspace: str) -> Trigger:
        fields: dict[str, Any] = {}
        key = self.pick.choice("pq")
        if self.chance(0.4):
            fields["singleton"] = Singleton(f"one {key}", self.pick.choice(["skip", "cancel"]))
        match self.pick.randint(0, 3):
            case 0:
                fields["rate"] = Rate(f"rate {key}", 2, 10 * SECOND)
            case 1:
                longest = self.pick.choice([None, 6 * SECOND])
                fields["debounce"] = Debounce(f"still {key}", 3 * SECOND, longest)
            case 2:
                fields["batch"] = Batch(f"many {key}", 4, 5 * SECOND, b"7" * self.pick.choice([1, 1, 1_200]))
        return Trigger(self.run(workspace=workspace), **fields)

    # ------------------------------------------------------------------ steps

    async def step_start(self) -> None:
        runs = [self.run() for _ in range(self.pick.randint(1, 4))]
        await self.both(f"start {runs}", lambda store: store.start(runs))

    async def step_publish(self) -> None:
        events = []
        for _ in range(self.pick.randint(1, 5)):
            workspace = self.pick.choice(WORKSPACES)
            events.append(
                NewEvent(
                    self.id("e"),
                    self.pick.choice(["paid", "sent"]),
                    b"{}",
                    workspace,
                    dedupe_id=self.pick.choice("uvw") if self.chance(0.2) else None,
                    triggers=tuple(self.trigger(workspace) for _ in range(self.pick.randint(0, 2))),
                    probes=self.pick.choice([None, (), ("n=1",), ("n=1", "n=2")]),
                )
            )
        outcomes = await self.both(f"publish {events}", lambda store: store.publish(events))
        if self.chance(0.5):
            ids = [outcome.event.id for outcome in outcomes]
            await self.both("settle", lambda store: store.settle_events(ids))

    async def step_claim(self) -> None:
        routes = tuple(
            Route(workflow, version, workspace)
            for workflow in WORKFLOWS
            for version in "12"
            for workspace in WORKSPACES
            if self.chance(0.8)
        )
        blocked = self.chance(0.2)
        request = ClaimRequest(self.pick.choice(ENGINES), routes, self.pick.choice([1, 3, 50]), blocked)
        await self.both(f"claim {request}", lambda store: store.claim(request))

    step_claim_more = step_claim
    step_claim_even_more = step_claim

    async def step_commit(self) -> None:
        for engine in ENGINES:
            for run_id, _ in await self.memory.owned(engine):
                [run] = await self.memory.get([run_id])
                if run is not None and self.chance(0.6):
                    change = self.change(run)
                    await self.both(f"commit {change}", lambda store, change=change: store.commit([change]))

    step_commit_more = step_commit

    def change(self, run: RunRecord) -> Commit:
        change = Commit(run.id, run.epoch, run.seq, self.id("c"), [entry(run.seq + 1)])
        effects: list[Effect] = []
        if self.chance(0.3):
            effects.append(OpenWaiter(self.pick.choice("st"), self.pick.choice(["paid", "sent"]), probe="n=1"))
        if self.chance(0.1):
            effects.append(CloseWaiter("s"))
        if self.chance(0.2):
            effects.append(SetAttributes({"n": self.pick.choice([None, 1, 2])}, self.pick.choice([None, ("green",)])))
        if self.chance(0.2):
            effects.append(self.pick.choice([PutItem("approval", "i", b"1"), DropItem("approval", "i")]))
        if self.chance(0.2):
            effects.append(StartRun(self.run()))
        match self.pick.randint(0, 6):
            case 0 | 1 | 2:
                change.status = self.pick.choice([Status.COMPLETED, Status.DEAD, Status.FAILED])
            case 3 | 4:
                change.suspend, change.activity = True, Activity.WAITING
                change.wake_at = self.clock.now() + self.pick.randint(0, 9) * SECOND
                effects.append(FreeSlots(self.pick.choice([None, None, ("all",)])))
            case 5:
                change.suspend, change.wake_at = True, self.clock.now() + 3 * SECOND
                change.activity = self.pick.choice([Activity.SLEEPING, Activity.PAUSED, Activity.BLOCKED])
        change.effects = tuple(effects)
        return change

    async def step_release(self) -> None:
        held = [one for engine in ENGINES for one in await self.memory.owned(engine) if self.chance(0.3)]
        await self.both(f"release {held}", lambda store: store.release(held))

    async def step_send(self) -> None:
        run = await self.some_run()
        if run is not None:
            kind = self.pick.choice(["signal", "cancel"])
            messages = [Message(run.id, self.id("m"), kind, workspace=run.workspace)]
            await self.both(f"send {messages}", lambda store: store.send(messages))

    async def step_requeue(self) -> None:
        state = self.pick.choice([{"status": Status.DEAD}, {"activity": Activity.PAUSED}])
        run = await self.some_run(**state)
        if run is not None:
            fields: dict[str, Any] = {"commit_id": self.id("q"), "entry": entry(0), "activity": "queued"}
            await self.both(f"requeue {run.id}", lambda store: store.requeue(run.id, **fields))

    async def step_items(self) -> None:
        keys = [ItemKey(self.pick.choice(WORKSPACES), "schedule", self.pick.choice("fgh")) for _ in range(3)]
        soon = self.clock.now() + self.pick.randint(-5, 5) * SECOND
        items = [
            NewItem(
                key.workspace,
                key.kind,
                key.id,
                b"1",
                self.pick.choice([None, soon]),
                self.pick.choice([None, 2 * SECOND, 20 * SECOND]),
                self.pick.choice([None, None, 0, 1, 2]),
            )
            for key in keys
        ]
        await self.both(f"put {items}", lambda store: store.put_items(items))
        if self.chance(0.3):
            await self.both("delete", lambda store: store.delete_items(keys[:1]))
        fire = Fire(items[1], tuple(Occurrence(at, self.run()) for at in range(self.pick.randint(0, 3))))
        await self.both(f"fire {fire}", lambda store: store.fire([fire]))

    async def step_prune(self) -> None:
        request = PruneRequest(
            self.pick.choice([1, 100]),
            self.pick.choice(WORKSPACES),
            self.pick.choice([None, "mail"]),
            older_than_us=20 * SECOND,
        )
        await self.both(f"prune {request}", lambda store: store.prune(request))

    async def step_look(self) -> None:
        """Everything there is."""
        queries = [
            RunQuery(limit=1_000),
            RunQuery("default", tag="red", attributes={"n": 1}, oldest_first=True, limit=3),
            RunQuery("default", attributes={"n": 1.0}),
            RunQuery(tag="green", workflows=("mail",), statuses=(Status.ACTIVE, Status.DEAD)),
            RunQuery(since=self.clock.now() - 30 * SECOND, until=self.clock.now() - 5 * SECOND, text="R0"),
        ]
        for query in queries:
            page = await self.both(f"find {query}", lambda store, query=query: store.find(query))
            after = RunQuery("default", tag="red", oldest_first=True, cursor=page.cursor, limit=3)
            await self.both(f"find {after}", lambda store, after=after: store.find(after))
        for workspace in WORKSPACES:
            await self.both("limits", lambda store, workspace=workspace: store.limits(workspace))
            for query in (
                EventQuery(workspace, limit=1_000),
                EventQuery(workspace, name="paid", since=self.clock.now() - 9 * SECOND, after=3, newest_first=True),
                EventQuery(workspace, before=20, limit=4),
            ):
                await self.both(f"events {query}", lambda store, query=query: store.events(query))
        await self.both("unsettled", lambda store: store.events(EventQuery(None, unsettled=True)))
        for items in (ItemQuery("schedule"), ItemQuery("schedule", due=True, limit=1), ItemQuery("approval")):
            await self.both(f"items {items}", lambda store, items=items: store.list_items(items))
        runs = (await self.memory.find(RunQuery(limit=1_000))).runs
        await self.both("inbox", lambda store: store.inbox([(run.id, 0) for run in runs]))
        cx = self.sqlite._writer._cx  # type: ignore[attr-defined]
        slots = sorted(cx.execute("SELECT run_id, key, number FROM slots").fetchall())
        held = self.memory._tables.slots
        assert slots == sorted((run_id, *slot) for run_id, some in held.items() for slot in some), "\n".join(self.told)


def told(answer: Any) -> Any:
    """Who waits for an event is named in no order."""
    if isinstance(answer, list) and answer and isinstance(answer[0], EventOutcome):
        return [
            (one.event, one.duplicate, {(waiter.run_id, waiter.id, waiter.owner) for waiter in one.waiters})
            for one in answer
        ]
    return answer


@pytest.mark.parametrize("seed", range(12))
async def test_the_same_history_the_same_answers(seed: int) -> None:
    """A hundred random steps, of starts, events, claims, commits, mail, items and pruning: no answer differs."""
    await Story(seed).play(100)
