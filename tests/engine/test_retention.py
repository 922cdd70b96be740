"""Finished runs are deleted where a rule says so, and only then; by whichever engine comes first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from durable import ChildFailed, Context, Durable, Retention, workflow
from durable.core.clock import SECOND
from durable.core.errors import DefinitionError, IdempotencyConflict, RunNotFound, StoreError, StoreUnavailable
from durable.core.ids import SeededIds
from durable.core.journal import RUN, Entry
from durable.engine.retention import LARGEST, requests
from durable.protocol.states import Status
from durable.store.memory import MemoryStore
from durable.store.records import ClaimRequest, Commit, NewRun, PruneRequest, Route, RunQuery
from durable.store.sqlite import SqliteStore
from durable.testing.virtual import VirtualClock, VirtualTime
from tests.engine.world import Line, World, eventually

DAY = 86_400.0
YEARS = 50 * 365 * DAY


@workflow(name="quick")
async def quick(ctx: Context, number: int = 0) -> int:
    return number


@workflow(name="brief", retention="1h")
async def brief(ctx: Context) -> None:
    pass


@workflow(name="precious", retention=Retention())
async def precious(ctx: Context) -> None:
    pass


@workflow(name="waits")
async def waits(ctx: Context) -> None:
    await ctx.wait_for_signal("go")


class Virtual:
    """Apps on one store, in virtual time: a day passes when everything waits."""

    def __init__(self, make_store: Callable[[VirtualClock], Any]) -> None:
        self.clock = VirtualClock(1_700_000_000 * SECOND)
        self.time = VirtualTime.enter()
        self.clock.begin(self.time)
        self.make_store = make_store
        self.apps: list[Durable] = []

    async def app(self, *things: Any, **settings: Any) -> Durable:
        line: Any = Line(self.make_store(self.clock))
        quiet: dict[str, Any] = {"lease": YEARS, "poll_every": YEARS, "reconcile": YEARS, "tick": 0.0, "threads": False}
        quiet["retention_every"] = "1h"
        ids = SeededIds(len(self.apps))
        app = Durable(line, workflows=things, clock=self.clock, ids=ids, **(quiet | settings))
        await app.open()
        self.apps.append(app)
        return app

    async def pass_by(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.time.settle()

    async def there(self, app: Durable) -> list[str]:
        return sorted(run.workflow for run in (await app.find(limit=10_000)).runs)

    async def close(self) -> None:
        for app in self.apps:
            await app.close(0)
        self.time.leave()


@pytest.fixture
async def virtual(store_kind: str, tmp_path: Path) -> AsyncIterator[Virtual]:
    shelf: list[MemoryStore] = []

    def make(clock: VirtualClock) -> Any:
        if store_kind == "sqlite":
            return SqliteStore(tmp_path / "runs.db", inline=True, clock=clock)
        if not shelf:
            shelf.append(MemoryStore(clock))
        return shelf[0].another()

    world = Virtual(make)
    yield world
    await world.close()


def prunes(app: Durable) -> int:
    return World.line(app).calls.get("prune", 0)


# ------------------------------------------------------------------ rules


async def test_finished_runs_go_when_their_age_is_reached(virtual: Virtual) -> None:
    """Kept to the day, gone within the pace of looking after it; a run that waits stays, however old."""
    app = await virtual.app(quick, waits, retention="30d")
    await app.start(waits)
    first = await app.start(quick, 1)
    assert await first.result() == 1
    await virtual.pass_by(20 * DAY)
    second = await app.start(quick, 2)
    assert await second.result() == 2
    await virtual.pass_by(9.9 * DAY)
    assert await virtual.there(app) == ["quick", "quick", "waits"]
    await virtual.pass_by(0.2 * DAY)
    assert await virtual.there(app) == ["quick", "waits"]
    with pytest.raises(RunNotFound):
        await first.result()
    assert await second.result() == 2
    await virtual.pass_by(100 * DAY)
    assert await virtual.there(app) == ["waits"]


async def test_the_newest_are_kept(virtual: Virtual) -> None:
    """`keep` leaves so many finished runs of each workflow, whatever their age."""
    app = await virtual.app(quick, brief, waits, retention=Retention(keep=3))
    for number in range(8):
        await (await app.start(quick, number)).result()
        await virtual.pass_by(1)
    await virtual.pass_by(20 * DAY)
    left = (await app.find(workflow="quick")).runs
    assert [run.input for run in left] == [b"7", b"6", b"5"]


async def test_a_workflow_s_own_rule_wins(virtual: Virtual) -> None:
    """A shorter one lets go sooner, an empty one keeps for ever, and the app's is for all others, also those that the code
    no longer has."""
    old = await virtual.app(waits)
    await (await old.start(waits)).cancel()
    app = await virtual.app(quick, brief, precious, retention="10d")
    for flow in (quick, brief, precious):
        await (await app.start(flow)).result()
    await virtual.pass_by(2 * 3600)
    assert await virtual.there(app) == ["precious", "quick", "waits"]
    await virtual.pass_by(9 * DAY)
    assert await virtual.there(app) == ["precious", "quick", "waits"]
    await virtual.pass_by(2 * DAY)
    assert await virtual.there(app) == ["precious"]
    await virtual.pass_by(100 * DAY)
    assert await virtual.there(app) == ["precious"]


async def test_a_rule_of_one_workflow_touches_no_other(virtual: Virtual) -> None:
    """Without an app's rule only the workflow that has one is pruned."""
    app = await virtual.app(quick, brief)
    for flow in (quick, brief):
        await (await app.start(flow)).result()
    await virtual.pass_by(100 * DAY)
    assert await virtual.there(app) == ["quick"]


async def test_nothing_is_pruned_without_a_rule(virtual: Virtual) -> None:
    """No rule: no run goes, while what has expired is let go all the same. A rule that keeps for ever is no rule."""
    app = await virtual.app(quick, precious)
    for flow in (quick, precious):
        await (await app.start(flow)).result()
    await virtual.pass_by(30 * DAY)
    assert await virtual.there(app) == ["precious", "quick"]
    assert prunes(app) > 0


async def test_an_api_node_prunes_nothing(virtual: Virtual) -> None:
    """A node that executes nothing leaves deleting to the engines, even where it knows a rule."""
    engine = await virtual.app(quick)
    api = await virtual.app(quick, retention="1h", role="api")
    await (await engine.start(quick)).result()
    await virtual.pass_by(100 * DAY)
    assert (prunes(api), await virtual.there(api)) == (0, ["quick"])


async def test_another_workspace_s_runs_stay(virtual: Virtual) -> None:
    """An engine prunes what it sees: its own workspace."""
    ours = await virtual.app(quick, retention="1h", workspace="ours")
    theirs = await virtual.app(quick, workspace="theirs")
    for app in (ours, theirs):
        await app.start(quick)
    await virtual.pass_by(DAY)
    assert (await virtual.there(ours), await virtual.there(theirs)) == ([], ["quick"])


async def test_the_latest_version_s_rule_counts(virtual: Virtual) -> None:
    """A workflow has one rule, for runs of all its versions."""

    @workflow(name="quick", version="2", retention=Retention(keep=7))
    async def newer(ctx: Context) -> None:
        pass

    app = await virtual.app(quick, newer, brief, retention=Retention("3h", 5))
    assert requests(app.engine.deps) == [
        PruneRequest(LARGEST, workflow="brief", older_than_us=3600 * SECOND),
        PruneRequest(LARGEST, workflow="quick", keep=7),
        PruneRequest(LARGEST, but=("brief", "quick"), older_than_us=3 * 3600 * SECOND, keep=5),
    ]


def test_what_is_no_rule_is_refused() -> None:
    """A rule that cannot be meant is an error where it is written."""
    for wrong in ({"age": "a month"}, {"age": -1}, {"keep": -1}, {"keep": True}, {"keep": 1.5}):
        with pytest.raises(DefinitionError):
            Retention(**wrong)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError):
        Durable("memory://", retention="soon")
    with pytest.raises(DefinitionError):
        workflow(name="w", retention="soon")(quick)


# ------------------------------------------------------------------ what it means for others


async def test_a_key_lives_as_long_as_its_run(virtual: Virtual) -> None:
    """While the run is kept its key finds it; then the same key starts anew, with whatever input."""
    app = await virtual.app(quick, retention="1d")
    first = await app.start(quick, 1, key="order-1")
    assert await first.result() == 1
    assert (await app.start(quick, 1, key="order-1")).id == first.id
    with pytest.raises(IdempotencyConflict):
        await app.start(quick, 2, key="order-1")
    await virtual.pass_by(2 * DAY)
    second = await app.start(quick, 2, key="order-1")
    assert second.id != first.id
    assert await second.result() == 2


async def test_a_family_stays_together_while_one_of_it_is_active(virtual: Virtual) -> None:
    """Neither the finished child of an active parent nor the finished parent of an active child goes."""

    @workflow(name="parent")
    async def parent(ctx: Context, how: str) -> None:
        child = ctx.start_child("quick" if how == "waits" else "waits", on_parent_close="abandon")
        if how == "waits":
            await child.result()
            await ctx.wait_for_signal("go")

    app = await virtual.app(parent, quick, waits, retention="1d")
    waiting = await app.start(parent, "waits")
    done = await app.start(parent, "ends")
    await done.result()
    await virtual.pass_by(100 * DAY)
    assert await virtual.there(app) == ["parent", "parent", "quick", "waits"]
    await waiting.signal("go")
    [child] = (await app.find(workflow="waits")).runs
    await app.run(child.id).signal("go")
    await virtual.pass_by(2 * DAY)
    assert await virtual.there(app) == []


async def test_who_waits_for_a_run_that_goes_is_told(world: World) -> None:
    """A run that ended elsewhere and was deleted before this engine looked: waiting for it ends with RunNotFound."""
    app = await world.engine(waits)
    handle = await app.start(waits)
    elsewhere = await world.engine(waits, poll_every=0.05, worker=False)  # it claims nothing itself
    waiting = asyncio.ensure_future(elsewhere.run(handle.id).result(20))
    line = world.line(elsewhere)
    await eventually(lambda: line.calls.get("get", 0) >= 2, "it polls")
    line.hold()  # it sees nothing of the end
    await handle.signal("go")
    await handle.result(10)
    store = await world.store()
    assert await store.prune(PruneRequest(10, keep=0)) == 1
    line.flow()
    with pytest.raises(RunNotFound):
        await waiting


async def test_a_reopened_parent_is_told_that_its_child_has_gone(virtual: Virtual) -> None:
    """The child ended while its parent was dead, and was deleted: the requeued parent gets a failure, and hangs on
    nothing."""

    @workflow(name="parent")
    async def parent(ctx: Context) -> str:
        try:
            await ctx.child("brief2")
        except ChildFailed as error:
            return str(error)
        return "no error"

    @workflow(name="brief2", retention="1h")
    async def brief2(ctx: Context) -> None:
        await ctx.wait_for_signal("go")

    app = await virtual.app(parent, brief2)
    handle = await app.start(parent)
    await virtual.time.settle()
    [child] = (await app.find(workflow="brief2")).runs
    await _bury(app, handle.id)
    await app.run(child.id).signal("go")
    await virtual.pass_by(DAY)
    assert await virtual.there(app) == ["parent"]
    await app.requeue(handle.id)
    assert "was deleted since" in await handle.result()


async def _bury(app: Durable, run_id: str) -> None:
    """Make a waiting run dead, as its last recovery would."""
    store = app.engine.deps.store
    engine = app.engine._executor
    for run in list(engine.residents.values()):
        if run.run_id == run_id:
            engine.drop(run)
    await asyncio.sleep(0)
    record = await app.get(run_id)
    epoch = record.epoch
    if record.owner is None:
        assert store.beat("undertaker", int(YEARS) * SECOND).alive
        claim = await store.claim(ClaimRequest("undertaker", (Route(record.workflow, record.version),), 10))
        epoch = next(one.run.epoch for one in claim.runs if one.run.id == run_id)
    entry = Entry(record.seq + 1, app.engine.clock.now(), RUN, "dead", name=record.workflow)
    await store.commit([Commit(run_id, epoch, record.seq, "buried", [entry], status=Status.DEAD, error=b"{}")])
    assert (await app.get(run_id)).status is Status.DEAD


# ------------------------------------------------------------------ trouble, and company


async def test_a_store_that_fails_is_tried_again(virtual: Virtual, caplog: pytest.LogCaptureFixture) -> None:
    """An error is a warning, once a look; when the store answers again, what was due goes. Nothing else is disturbed."""
    app = await virtual.app(quick, retention="1d")
    await (await app.start(quick)).result()
    line = World.line(app)
    errors: list[Exception] = [StoreUnavailable("gone"), StoreError("odd"), RuntimeError("odder")]
    line.fault = lambda name, args: errors.pop() if name == "prune" and errors else None
    await virtual.pass_by(0.9 * DAY)
    assert (errors, prunes(app) > 3) == ([], True)
    assert [record.levelname for record in caplog.records if record.name == "durable.retention"] == [
        "ERROR",
        "WARNING",
        "WARNING",
    ]
    assert await (await app.start(quick, 5)).result() == 5
    await virtual.pass_by(0.2 * DAY)
    assert await virtual.there(app) == ["quick"]
    await virtual.pass_by(DAY)
    assert await virtual.there(app) == []


async def test_a_lost_answer_does_no_harm(virtual: Virtual) -> None:
    """A batch that happened although its answer was lost is not missed, and nothing is done twice."""
    app = await virtual.app(quick, retention="1d")
    await (await app.start(quick)).result()
    await virtual.pass_by(0.9 * DAY)
    lost: list[str] = []

    def lose(name: str, args: tuple[Any, ...]) -> StoreUnavailable | None:
        if name != "prune":
            return None
        lost.append(name)
        return StoreUnavailable("the answer was lost")

    World.line(app).fault_after = lose
    await virtual.pass_by(0.2 * DAY)
    assert lost
    assert await virtual.there(app) == []


async def test_many_go_in_batches(virtual: Virtual) -> None:
    """Two thousand runs due at once go within one look, none of whose batches is above the bound."""
    app = await virtual.app(quick, retention="1d")
    sizes: list[int] = []

    def note(name: str, args: tuple[Any, ...]) -> None:
        if name == "prune":
            sizes.append(args[0].limit)

    World.line(app).fault = note
    store = app.engine.deps.store
    runs = [NewRun(f"r{n:04}", "quick", "1", b"0", owner="somebody") for n in range(2000)]
    await store.start(runs)
    for start in range(0, 2000, 250):
        ends = [Commit(run.id, 1, 0, "c", [], status=Status.COMPLETED) for run in runs[start : start + 250]]
        await store.commit(ends)
    await virtual.pass_by(0.9 * DAY)
    sizes.clear()
    assert len((await store.find(RunQuery(limit=5000))).runs) == 2000
    await virtual.pass_by(0.2 * DAY)
    assert await virtual.there(app) == []
    assert max(sizes) == LARGEST
    assert len(sizes) < 15


async def test_two_engines_prune_side_by_side(virtual: Virtual) -> None:
    """Engines that share a store and a rule delete each run once, at times of their own, and disturb nothing."""
    apps = [await virtual.app(quick, waits, retention=Retention(keep=1), retention_every=60) for _ in range(3)]
    kept = await apps[0].start(waits)
    for number in range(30):
        assert await (await apps[number % 3].start(quick, number)).result() == number
        await virtual.pass_by(30)
    await virtual.pass_by(200)
    assert await virtual.there(apps[0]) == ["quick", "waits"]
    assert all(prunes(app) >= 10 for app in apps)
    await kept.signal("go")
    await kept.result()


async def test_drain_stops_it(virtual: Virtual) -> None:
    """A draining engine deletes nothing more and waits for no batch under way, even with the store away."""
    app = await virtual.app(quick, retention=Retention(keep=0))
    line = World.line(app)
    await (await app.start(quick)).result()
    line.hold()
    await virtual.pass_by(2 * 3600)
    assert prunes(app) == 1
    pruning = app.engine._pruner._task
    assert pruning is not None
    await app.engine._pruner.stop()
    assert pruning.done()
    line.flow()
    await app.close(0)
    await virtual.pass_by(DAY)
    assert line.calls["prune"] == 1
    assert "durable-retention" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_runs_go_while_others_come(world: World) -> None:
    """In real time, on both stores, hot and cold: engines that prune all the time lose no result of work under way."""
    rule = {"retention": Retention(keep=5), "retention_every": 0.02}
    apps = [await world.engine(quick, **rule) for _ in range(2)]
    for number in range(60):
        assert await (await apps[number % 2].start(quick, number, key=f"k{number}")).result(10) == number
    store = await world.store()

    async def left() -> int:
        return len((await store.find(RunQuery(limit=100))).runs)

    while await left() > 5:
        await asyncio.sleep(0.01)
    assert await left() == 5
    assert sum(prunes(app) for app in apps) > 0
