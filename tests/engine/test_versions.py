"""Code that changed under a run: found before any side effect, told with both sides, parked, and taken up after a fix (N17)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
import pytest

from durable import Context, workflow
from durable.core.errors import StoreUnavailable, UnknownVersion
from durable.protocol.states import Activity, Status
from tests.engine.world import SHORT, World, eventually

RAN: list[str] = []


def variant(steps: list[str], *, version: str = "1", wait_after: int = 1) -> Any:
    @workflow(name="changing", version=version)
    async def changing(ctx: Context) -> list[str]:
        done = []
        for n, step in enumerate(steps):
            if n == wait_after:
                await ctx.wait_for_signal("go")
            done.append(await ctx.step(step, lambda step=step: RAN.append(step) or step))
        return done

    return changing


@pytest.fixture(autouse=True)
def clear() -> None:
    RAN.clear()


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.ERROR)
    return caplog


async def parked(world: World, old: Any) -> str:
    """A run of the old code that has done its first step, its engine gone."""
    app = await world.engine(old)
    handle = await app.start(old)
    await world.waits(handle.id)
    await world.crash(app)
    return handle.id


async def test_S34_a_mismatch_blocks_the_run_before_any_side_effect(world: World, quiet: Any) -> None:
    """The first differing position is found on replay: no body runs, both sides are told, the run is blocked, not failed."""
    run_id = await parked(world, variant(["charge", "ship"]))
    app = await world.engine(variant(["refund", "ship"]))
    await app.run(run_id).signal("go")
    record = await world.until(run_id, lambda r: r.activity == Activity.BLOCKED)
    assert RAN == ["charge"]
    assert (record.status, record.owner) == (Status.ACTIVE, None)
    assert record.error is not None
    error = msgspec.json.decode(record.error)
    assert error["code"] == "non_determinism"
    assert "charge" in error["details"]["recorded"]
    assert error["details"]["position"] == 2
    assert "refund" in error["details"]["asked"] or "nothing" in error["details"]["asked"]
    assert "patched" in error["message"]


async def test_S34_a_blocked_run_takes_mail_in_and_stays_put(world: World, quiet: Any) -> None:
    """Signals to a blocked run are kept; no engine with the same code tries it again and again."""
    run_id = await parked(world, variant(["charge", "ship"]))
    app = await world.engine(variant(["refund"]), poll_every=0.02)
    await app.run(run_id).signal("go")
    record = await world.until(run_id, lambda r: r.activity == Activity.BLOCKED)
    await app.run(run_id).signal("more")
    await asyncio.sleep(0.15)
    after = await world.record(run_id)
    assert (after.activity, after.epoch) == (Activity.BLOCKED, record.epoch)
    assert after.inbox_last == 2


async def test_N17_a_blocked_run_goes_on_after_a_fix(world: World, quiet: Any) -> None:
    """An engine with code that fits looks at it once when it starts: it goes on where it stopped, nothing runs twice."""
    run_id = await parked(world, variant(["charge", "ship"]))
    app = await world.engine(variant(["refund"]))
    await app.run(run_id).signal("go")
    await world.until(run_id, lambda r: r.activity == Activity.BLOCKED)
    await app.close()
    fixed = await world.engine(variant(["charge", "ship", "thank"]))
    assert await fixed.run(run_id).result(5) == ["charge", "ship", "thank"]
    assert RAN == ["charge", "ship", "thank"]
    record = await world.record(run_id)
    assert record.error is None
    await world.sound(run_id)


async def test_N17_a_lost_lease_does_not_lose_the_look_at_blocked_runs(world: World, quiet: Any) -> None:
    """The lease ends between claiming blocked runs and reading them: under its new name the engine looks once more."""
    run_id = await parked(world, variant(["charge", "ship"]))
    app = await world.engine(variant(["refund"]))
    await app.run(run_id).signal("go")
    await world.until(run_id, lambda r: r.activity == Activity.BLOCKED)
    await app.close()
    fixed = await world.engine(variant(["charge", "ship", "thank"]), lease=SHORT)
    # Before its scheduler has had a turn.
    cut_off = ("load", "beat")
    world.line(fixed).fault = lambda name, args: StoreUnavailable("not now") if name in cut_off else None
    first, lease = fixed.engine.incarnation, fixed.engine._executor.lease
    await world.until(run_id, lambda r: r.owner == first)
    await eventually(lambda: lease._lost)
    world.line(fixed).fault = None
    assert await fixed.run(run_id).result(10) == ["charge", "ship", "thank"]
    assert fixed.engine.incarnation != first


async def test_N17_requeue_has_a_blocked_run_looked_at_again(world: World, quiet: Any) -> None:
    """The operator's way: requeue; with the same code it is blocked again, with good code it goes on."""
    run_id = await parked(world, variant(["charge", "ship"]))
    bad = await world.engine(variant(["refund"]))
    await bad.run(run_id).signal("go")
    await world.until(run_id, lambda r: r.activity == Activity.BLOCKED)
    await bad.requeue(run_id)
    await world.until_journal(run_id, lambda lines: lines.count("run blocked") == 2)
    await world.crash(bad)
    good = await world.engine(variant(["charge", "ship"]))
    assert await good.run(run_id).result(5) == ["charge", "ship"]


async def test_S34_changed_arguments_are_a_mismatch_too(world: World, quiet: Any) -> None:
    """Two steps of one name that swapped their arguments are caught by the fingerprint."""

    def pay(first: str, second: str) -> Any:
        @workflow(name="pays")
        async def pays(ctx: Context) -> None:
            await ctx.step("pay", RAN.append, first)
            await ctx.wait_for_signal("go")
            await ctx.step("pay", RAN.append, second)

        return pays

    app = await world.engine(pay("kim", "lee"))
    handle = await app.start("pays")
    await world.waits(handle.id)
    await world.crash(app)
    app = await world.engine(pay("lee", "kim"))
    await app.run(handle.id).signal("go")
    await world.until(handle.id, lambda r: r.activity == Activity.BLOCKED)
    assert RAN == ["kim"]


async def test_S34_code_that_ends_too_early_is_a_mismatch(world: World, quiet: Any) -> None:
    """The journal goes on where the code has returned: blocked, not completed."""
    run_id = await parked(world, variant(["charge", "ship"]))
    app = await world.engine(variant([]))
    await app.run(run_id).signal("go")
    record = await world.until(run_id, lambda r: r.activity == Activity.BLOCKED or r.status != Status.ACTIVE)
    assert record.status is Status.ACTIVE


async def test_S34_a_blocked_run_may_be_cancelled(world: World, quiet: Any) -> None:
    """The cancel is kept and takes effect when good code looks at it."""
    run_id = await parked(world, variant(["charge", "ship"]))
    app = await world.engine(variant(["refund"]))
    await app.run(run_id).signal("go")
    await world.until(run_id, lambda r: r.activity == Activity.BLOCKED)
    await app.run(run_id).cancel()
    await world.crash(app)
    await world.engine(variant(["charge", "ship", "more"], wait_after=1))
    record = await world.until(run_id, lambda r: r.status is not Status.ACTIVE)
    assert record.status in (Status.CANCELLED, Status.COMPLETED)


async def test_B54_a_version_that_is_not_here_is_refused_and_never_replaced(world: World) -> None:
    """A start with an unknown version raises; a run of one waits for an engine that has it, and no other touches it."""
    first = await world.engine(variant(["charge", "ship"], version="1"))
    with pytest.raises(UnknownVersion, match="no version 3"):
        await first.start("changing", version="3")
    handle = await first.start("changing")
    await world.waits(handle.id)
    await world.crash(first)
    second = await world.engine(variant(["refund"], version="2"))
    await second.run(handle.id).signal("go")
    await asyncio.sleep(0.05)
    record = await world.record(handle.id)
    assert (record.version, record.status) == ("1", Status.ACTIVE)
    assert record.activity != Activity.BLOCKED
    assert RAN == ["charge"]
    assert not second.engine._executor.residents
    third = await world.engine(variant(["charge", "ship"], version="1"), variant(["refund"], version="2"))
    assert await third.run(handle.id).result(5) == ["charge", "ship"]


async def test_N17_old_and_new_versions_run_side_by_side(world: World) -> None:
    """A run resumes on the version it began on; new starts get the latest."""
    old, new = variant(["old", "old2"], version="1"), variant(["new", "new2"], version="2")
    app = await world.engine(old)
    began = await app.start("changing")
    await world.waits(began.id)
    await world.crash(app)
    app = await world.engine(old, new)
    fresh = await app.start("changing")
    for handle in (app.run(began.id), fresh):
        await handle.signal("go")
    assert await app.run(began.id).result(5) == ["old", "old2"]
    assert await fresh.result(5) == ["new", "new2"]


async def test_patched_keeps_old_runs_on_the_old_path(world: World) -> None:
    """A run that had passed the place replays without the new step; one that had not, and new ones, take it; each for ever."""

    def before(ctx: Context) -> Any:
        return ctx.step("charge", lambda: RAN.append("charge"))

    @workflow(name="patch")
    async def old(ctx: Context) -> str:
        await before(ctx)
        await ctx.wait_for_signal("go")
        return "done"

    @workflow(name="patch")
    async def new(ctx: Context) -> str:
        if ctx.patched("check-fraud"):
            await ctx.step("fraud", lambda: RAN.append("fraud"))
        await before(ctx)
        await ctx.wait_for_signal("go")
        return "done, checked" if ctx.patched("check-fraud") else "done"

    app = await world.engine(old)
    handle = await app.start(old)
    await world.waits(handle.id)
    await world.crash(app)
    app = await world.engine(new)
    fresh = await app.start(new)
    await world.waits(fresh.id)
    await world.crash(app)
    app = await world.engine(new)
    for run_id in (handle.id, fresh.id):
        await app.run(run_id).signal("go")
    assert await app.run(handle.id).result(5) == "done"
    assert await app.run(fresh.id).result(5) == "done, checked"
    assert RAN == ["charge", "fraud", "charge"]
    assert (await world.statuses(fresh.id, "patched")) == ["marked"]
    assert (await world.statuses(handle.id, "patched")) == []
    await world.sound(handle.id, fresh.id)
