"""Taking over: leases that end, engines that die, stand still or come back, and runs that kill whoever runs them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from durable import Context, RetryPolicy, RunDead, current_step, durable_step, workflow
from durable.core.errors import StoreUnavailable
from durable.protocol.states import Activity, Status
from durable.store.records import DEFAULT_WORKSPACE, Commit, CommitStatus, NewRun
from tests.engine.world import SHORT, Gate, World, all_results, eventually


@workflow(name="waits")
async def waits(ctx: Context) -> Any:
    return await ctx.wait_for_signal("go")


def gated(gate: Gate, name: str = "gated") -> Any:
    @workflow(name=name)
    async def run(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    return run


async def test_S1_one_owner_and_a_claim_waits_for_nobody(world: World) -> None:
    """Several engines, one run: one of them executes it; the epoch rises at each claim and never otherwise."""
    gate = Gate()
    work = gated(gate)
    apps = [await world.engine(work) for _ in range(3)]
    handle = await apps[0].start(work)
    await gate.reached()
    await asyncio.sleep(0.05)
    assert gate.came == 1
    record = await world.record(handle.id)
    assert (record.owner, record.epoch) == (apps[0].engine.incarnation, 1)
    gate.open()
    assert await handle.result(5) == 1


async def test_S1_claims_go_on_while_another_engines_store_calls_hang(world: World) -> None:
    """A claim never waits on another engine's health."""
    gate = Gate()
    work = gated(gate)
    stuck = await world.engine(work)
    await stuck.start(work)
    await gate.reached()
    world.pause(stuck)
    other = await world.engine(work)
    await other.start(work)
    await gate.reached(2)
    world.resume(stuck)
    gate.open()


async def test_S2_a_zombie_cannot_write_release_or_signal_anything_away(world: World) -> None:
    """Paused beyond its lease and back: everything it says with its old epoch is refused, and the new owner's outcome stands."""
    gate = Gate()
    work = gated(gate)
    zombie = await world.engine(work, lease=SHORT)
    handle = await zombie.start(work)
    await gate.reached()
    old = (zombie.engine.incarnation, (await world.record(handle.id)).epoch)
    world.pause(zombie)
    other = await world.engine(work, lease=5.0)
    await gate.reached(2)
    record = await world.record(handle.id)
    assert record.owner == other.engine.incarnation
    store = await world.store()
    commit = Commit(handle.id, old[1], record.seq, "zombie", [], activity=Activity.WAITING)
    assert (await store.commit([commit]))[0].status is CommitStatus.FENCED
    await store.release([(handle.id, old[1])])
    assert (await world.record(handle.id)).owner == other.engine.incarnation
    gate.open()
    assert await other.run(handle.id).result(5) in (1, 2)
    world.resume(zombie)
    await eventually(lambda: zombie.engine.incarnation != old[0], "it comes back as somebody new")
    assert await zombie.run(handle.id).result(5) in (1, 2)
    assert (await world.statuses(handle.id, "step")).count("completed") == 1
    await world.sound(handle.id)


async def test_S3_losing_the_lease_drops_the_runs_and_cancels_the_bodies(world: World) -> None:
    """When the heartbeat cannot be renewed, what is in memory is forgotten, bodies stop, and the engine is reborn."""
    gate = Gate()
    work = gated(gate)
    app = await world.engine(work, lease=0.3)
    await app.start(work)
    await gate.reached()
    before = app.engine.incarnation
    world.line(app).fault = lambda name, args: StoreUnavailable("no route to host") if name == "beat" else None
    await eventually(lambda: gate.cancelled == 1, "the body is cancelled")
    world.line(app).fault = None
    await eventually(lambda: app.engine.incarnation != before, "it is reborn")
    await gate.reached(2)
    gate.open()


async def test_S3_nothing_begins_after_two_thirds_of_the_lease(world: World) -> None:
    """Between 2/3 and the end of its lease an engine starts no body and sends no task; renewed, it goes on."""
    gate = Gate()

    @workflow(name="on-signal")
    async def on_signal(ctx: Context) -> int:
        await ctx.wait_for_signal("go")
        number: int = await ctx.step("body", gate)
        return number

    app = await world.engine(on_signal, lease=3.0, beat_every=0.05)
    handle = await app.start(on_signal)
    await world.waits(handle.id)
    lease = app.engine._executor.lease
    refused: list[str] = []

    def refuse(name: str, args: Any) -> StoreUnavailable | None:
        if name == "beat":
            refused.append(name)
            return StoreUnavailable("no")
        return None

    world.line(app).fault = refuse
    await eventually(lambda: len(refused) > 1, "no renewal is under way any more")
    lease._taken_at -= 2.2  # as if the last renewal had been so long ago
    assert not lease.safe()
    if world.cold:  # nothing is claimed without a safe lease
        await handle.signal("go")
        await asyncio.sleep(0.1)
        assert (await world.record(handle.id)).owner is None
    else:
        await handle.signal("go")
        await world.until_journal(handle.id, lambda lines: any("received" in line for line in lines))
        await asyncio.sleep(0.02)
    assert gate.came == 0
    world.line(app).fault = None
    await gate.reached()
    gate.open()
    assert await handle.result(5) == 1


async def test_S32_a_poison_run_is_dead_after_max_recovery_attempts(world: World) -> None:
    """Each crash while it executes is counted; above the limit it is dead, once, with an error that says what to do."""
    gate = Gate()
    work = gated(gate)
    app = await world.engine(work, max_recovery_attempts=2)
    handle = await app.start(work)
    for round in range(1, 4):
        await gate.reached(round)
        await world.until(handle.id, lambda r: r.activity == Activity.EXECUTING)
        await world.crash(app)
        app = await world.engine(work, max_recovery_attempts=2)
    with pytest.raises(RunDead, match="requeue") as caught:
        await app.run(handle.id).result(5)
    assert caught.value.error is not None
    assert caught.value.error.code == "run_dead"
    assert gate.came == 3
    assert (await world.statuses(handle.id, "run")).count("dead") == 1
    await world.sound(handle.id)


async def test_S32_a_poison_second_attempt_counts_too(world: World) -> None:
    """A body that kills its engine only when it is retried is found out too: the row says `executing` before it begins."""
    gate = Gate()

    async def body() -> int:
        if current_step().attempt == 1:
            raise ValueError("first")
        return await gate()

    @workflow(name="second")
    async def second(ctx: Context) -> int:
        number: int = await ctx.step("body", body, retries=RetryPolicy(initial_delay=0.01))
        return number

    app = await world.engine(second, max_recovery_attempts=1, tick=10.0)
    handle = await app.start(second)
    for round in range(1, 3):
        await gate.reached(round)
        assert (await world.record(handle.id)).activity == Activity.EXECUTING
        await world.crash(app)
        app = await world.engine(second, max_recovery_attempts=1, tick=10.0)
    with pytest.raises(RunDead):
        await app.run(handle.id).result(5)


async def test_S32_a_poison_remote_step_in_this_process_counts_too(world: World) -> None:
    """Over the in-process transport the task dies with the engine, and the engine with the task: it is counted."""
    gate = Gate()

    @durable_step("inside")
    async def inside() -> int:
        return await gate()

    @workflow(name="remote-poison")
    async def poison(ctx: Context) -> Any:
        return await ctx.remote(inside)

    app = await world.engine(poison, inside, max_recovery_attempts=1)
    handle = await app.start(poison)
    for round in range(1, 3):
        await gate.reached(round)
        await world.until_journal(handle.id, lambda lines: "remote inside published" in lines)
        await asyncio.sleep(0.05)
        await world.crash(app)
        app = await world.engine(poison, inside, max_recovery_attempts=1)
    with pytest.raises(RunDead):
        await app.run(handle.id).result(5)
    await world.sound(handle.id)


async def test_S32_progress_gives_a_fresh_budget(world: World) -> None:
    """Crashes in a row count; a step that completes between them sets the count back."""
    gates = [Gate() for _ in range(4)]

    @workflow(name="steps")
    async def steps(ctx: Context) -> int:
        for n, gate in enumerate(gates):
            await ctx.step(f"s{n}", gate)
        return len(gates)

    app = await world.engine(steps, max_recovery_attempts=1)
    handle = await app.start(steps)
    for n, gate in enumerate(gates):
        await gate.reached()
        await world.until_journal(handle.id, lambda lines, n=n: f"step s{n} started" in lines)
        await world.crash(app)
        app = await world.engine(steps, max_recovery_attempts=1)
        await gate.reached(2)
        gate.open()
    assert await app.run(handle.id).result(5) == 4


async def test_S32_waiting_runs_are_not_counted(world: World) -> None:
    """Engines die around a run that only waits: nothing is held against it."""
    app = await world.engine(waits, max_recovery_attempts=1)
    handle = await app.start(waits)
    await world.waits(handle.id)
    for _ in range(4):
        await world.crash(app)
        app = await world.engine(waits, max_recovery_attempts=1)
        if not world.cold:
            await world.until(handle.id, lambda r, app=app: r.owner == app.engine.incarnation)
            await world.waits(handle.id)
    assert (await world.record(handle.id)).recovery_attempts == 0
    await app.run(handle.id).signal("go", "fine")
    assert await app.run(handle.id).result(5) == "fine"


async def test_S32_many_innocent_runs_go_on_together_after_a_crash(world: World) -> None:
    """A crash makes a suspect of everything that executed; below its last attempt none waits for another's turn."""
    gate = Gate()
    work = gated(gate)
    app = await world.engine(work)
    handles = [await app.start(work) for _ in range(20)]
    await gate.reached(20)
    await world.crash(app)
    other = await world.engine(work)
    await gate.reached(40)
    records = await (await world.store()).get([handle.id for handle in handles])
    assert {(record.activity, record.recovery_attempts) for record in records} == {(Activity.EXECUTING, 1)}
    gate.open()
    assert len(await all_results([other.run(handle.id) for handle in handles])) == 20


async def test_S32_a_suspect_that_comes_to_rest_is_cleared(world: World) -> None:
    """A run that was caught executing, and then waits, was not what killed its engine: the count is set back."""
    gate = Gate()

    @workflow(name="rests")
    async def rests(ctx: Context) -> Any:
        waiting = asyncio.ensure_future(ctx.wait_for_signal("go"))
        try:
            async with asyncio.timeout(0.3):
                await ctx.step("body", gate)
        except TimeoutError:
            pass
        return await waiting

    app = await world.engine(rests, max_recovery_attempts=1)
    handle = await app.start(rests)
    await gate.reached()
    await world.crash(app)
    app = await world.engine(rests, max_recovery_attempts=1)
    await world.waits(handle.id)
    assert (await world.record(handle.id)).recovery_attempts == 0
    await app.run(handle.id).signal("go", 1)
    assert await app.run(handle.id).result(5) == 1


async def test_S32_a_poison_run_does_not_take_its_neighbours_along(world: World) -> None:
    """Suspects are tried one at a time: only the one that kills is dead, all others complete."""
    poison, harmless = Gate(), Gate()
    bad, good = gated(poison, "bad"), gated(harmless, "good")
    settings: dict[str, Any] = {"max_recovery_attempts": 2}
    app = await world.engine(bad, good, **settings)
    victim = await app.start(bad)
    handles = [await app.start(good) for _ in range(5)]
    await harmless.reached(5)
    await poison.reached()
    for run_id in (victim.id, *(h.id for h in handles)):
        await world.until(run_id, lambda r: r.activity == Activity.EXECUTING)
    harmless.open()  # from now on only the poison is stuck; but the crash comes first
    for round in range(2, 20):
        await world.crash(app)
        app = await world.engine(bad, good, **settings)
        done = asyncio.ensure_future(app.run(victim.id).result(5))
        reached = asyncio.ensure_future(poison.reached(round))
        await asyncio.wait({done, reached}, return_when=asyncio.FIRST_COMPLETED)
        reached.cancel()
        if done.done():
            assert isinstance(done.exception(), RunDead)
            break
        done.cancel()
    for handle in handles:
        assert isinstance(await app.run(handle.id).result(5), int)
    await world.sound(victim.id, *(h.id for h in handles))


async def test_B02_a_run_that_was_requeued_meanwhile_is_not_executed_by_the_old_list(world: World) -> None:
    """Between finding a stale owner and executing, a peer takes the run: only one of them has it, by the epoch."""
    gate = Gate()
    work = gated(gate)
    app = await world.engine(work)
    handle = await app.start(work)
    await gate.reached()
    await world.crash(app)
    first, second = await asyncio.gather(world.engine(work), world.engine(work))
    await gate.reached(2)
    await asyncio.sleep(0.05)
    assert gate.came == 2, "one of the two"
    holders = [a for a in (first, second) if handle.id in a.engine._executor.residents]
    assert len(holders) == 1
    gate.open()
    assert await first.run(handle.id).result(5) == 2
    await world.sound(handle.id)


async def test_B03_a_store_that_fails_during_recovery_only_delays_it(world: World) -> None:
    """250 runs to take over, and the store goes away in the middle of it: all finish."""
    app = await world.engine(waits, max_running=1_000)
    handles = await asyncio.gather(*(app.start(waits) for _ in range(250)))
    for handle in handles:
        await world.waits(handle.id)
    await world.crash(app)
    left = 12

    def flaky(name: str, args: Any) -> StoreUnavailable | None:
        nonlocal left
        if name in ("claim", "load", "inbox", "commit", "unread", "owned") and left > 0:
            left -= 1
            return StoreUnavailable("the database system is starting up")
        return None

    other = await world.engine(waits, poll_every=0.05)
    world.line(other).fault = flaky
    await asyncio.gather(*(other.run(handle.id).signal("go", 1) for handle in handles))
    assert await all_results([other.run(handle.id) for handle in handles]) == [1] * 250
    assert left == 0
    await world.sound(*(handle.id for handle in handles[:20]))


async def test_B04_an_engine_that_drains_and_one_that_starts_never_share_an_identity(world: World) -> None:
    """Identities are per start: the same app opened twice is two incarnations, and nothing is stranded between them."""
    app = await world.engine(waits)
    first = app.engine.incarnation
    handle = await app.start(waits)
    await world.waits(handle.id)
    other = await world.engine(waits)
    assert other.engine.incarnation != first
    await app.close()
    await app.open()
    assert app.engine.incarnation not in (first, other.engine.incarnation)
    await other.run(handle.id).signal("go", "found")
    assert await other.run(handle.id).result(5) == "found"


async def test_B05_a_recovered_run_between_two_steps_goes_on(world: World) -> None:
    """The part that exists before limits: a run taken over between step 2 and 3 makes progress within lease and poll.
    (Slots of a limit-1 queue come with flow control.)"""
    gate, ran = Gate(), []

    @workflow(name="three")
    async def three(ctx: Context) -> int:
        for n in (1, 2):
            await ctx.step(f"s{n}", lambda n=n: ran.append(n))
        await ctx.step("s3", gate)
        return len(ran)

    app = await world.engine(three, lease=SHORT)
    handle = await app.start(three)
    await gate.reached()
    await world.until_journal(handle.id, lambda lines: "step s3 started" in lines)
    await world.crash(app, noticed=False)
    other = await world.engine(three, lease=SHORT, poll_every=0.2)
    await gate.reached(2)
    gate.open()
    assert await other.run(handle.id).result(5) == 2
    assert ran == [1, 2]


async def test_B06_runs_of_an_engine_whose_row_is_gone_are_found(world: World) -> None:
    """The scan for orphans does not depend on the dead engine's heartbeat row."""
    gate = Gate()
    work = gated(gate)
    app = await world.engine(work)
    handle = await app.start(work)
    await gate.reached()
    await world.crash(app, noticed=False)
    await (await world.store()).leave(app._engine.incarnation)  # type: ignore[union-attr]
    other = await world.engine(work)
    await gate.reached(2)
    gate.open()
    assert await other.run(handle.id).result(5) == 2


async def test_B08_what_is_due_is_found_by_claiming_alone(world: World) -> None:
    """The part that exists before queues: taking a run off the due list and owning it are one transaction, so a run that
    was claimed by an engine that died in the same moment is claimed again."""
    api = await world.engine(waits, worker=False)
    handle = await api.start(waits)
    app = await world.engine(worker=True)  # serves nothing
    doomed = await world.engine(waits)
    line = world.line(doomed)
    await world.until(handle.id, lambda r: r.owner == doomed.engine.incarnation or r.epoch > 0)
    line.dead = True
    await world.crash(doomed)
    saviour = await world.engine(waits)
    await saviour.run(handle.id).signal("go", 1)
    assert await saviour.run(handle.id).result(5) == 1
    assert app.engine._executor.residents == {}


async def test_B08_a_claim_whose_reply_was_lost_strands_nothing(world: World) -> None:
    """The store says the runs are mine and I never heard: after a heartbeat they are let go and taken again."""
    api = await world.engine(waits, worker=False)
    app = await world.engine(waits, beat_every=0.05)
    lost: list[int] = []

    def lose(name: str, args: Any) -> StoreUnavailable | None:
        if name == "claim" and not lost:
            lost.append(1)
            return StoreUnavailable("connection reset after the statement was sent")
        return None

    world.line(app).fault_after = lose
    handle = await api.start(waits)
    await api.run(handle.id).signal("go", "found")
    assert await api.run(handle.id).result(8) == "found"
    assert lost


async def test_B09_nothing_that_waits_is_kept_in_memory_only(world: World) -> None:
    """The part that exists before rate limits: runs beyond `max_running` are parked in the store; the engine dies and
    another finds every one of them."""
    gate = Gate()
    work = gated(gate)
    app = await world.engine(work, max_running=2)
    handles = [await app.start(work) for _ in range(6)]
    await gate.reached(2)
    await world.crash(app)
    gate.open()
    other = await world.engine(work, max_running=2)
    assert len(set(await all_results([other.run(handle.id) for handle in handles]))) == 6
    await world.sound(*(handle.id for handle in handles))


async def test_B10_after_a_kill_the_next_engine_goes_on_within_the_lease(world: World) -> None:
    """The part that exists before keys: the holder is killed and nobody notices; after its lease another engine has the run."""
    gate = Gate()
    work = gated(gate)
    app = await world.engine(work, lease=SHORT)
    handle = await app.start(work)
    await gate.reached()
    await world.crash(app, noticed=False)
    began = asyncio.get_running_loop().time()
    other = await world.engine(work, lease=SHORT, poll_every=0.1)
    await gate.reached(2)
    assert asyncio.get_running_loop().time() - began < SHORT + 2
    gate.open()
    assert await other.run(handle.id).result(5) == 2
    await world.sound(handle.id)


async def test_B21_two_hundred_starts_count_as_no_crash(world: World) -> None:
    """Starting, queueing, claiming and completing many runs leaves every recovery count at 0."""

    @workflow(name="noop")
    async def noop(ctx: Context) -> None: ...

    app = await world.engine(noop, max_running=20)
    await world.engine(noop, max_running=20)
    handles = await asyncio.gather(*(app.start(noop) for _ in range(200)))
    await all_results(handles)
    records = await (await world.store()).get([handle.id for handle in handles])
    assert {record.recovery_attempts for record in records} == {0}


async def test_B46_a_crash_around_the_commit_that_takes_a_signal_in_loses_nothing(world: World) -> None:
    """Between the decision's arrival and what it causes there is one commit; before and after it the run has a wake source."""
    ran: list[str] = []

    @workflow(name="decides")
    async def decides(ctx: Context) -> Any:
        answer = await ctx.wait_for_signal("decision")
        await ctx.step("act", lambda: ran.append(answer))
        return answer

    for happened in (True, False):
        app = await world.engine(decides)
        handle = await app.start(decides)
        await world.waits(handle.id)
        line = world.line(app)
        died: list[int] = []

        def die(name: str, args: Any, line: Any = line, died: list[int] = died) -> None:
            if name == "commit" and any(e.kind == "signal" for c in args[0] for e in c.entries):
                died.append(1)
                line.dead = True

        if happened:
            line.fault_after = die
            line.fault = None
        else:
            line.fault = die
        await (await world.engine(decides, worker=False)).run(handle.id).signal("decision", "yes")
        await eventually(lambda died=died: died)
        await world.crash(app)
        other = await world.engine(decides)
        assert await other.run(handle.id).result(5) == "yes"
        await world.sound(handle.id)
        await world.crash(other)
    assert ran.count("yes") >= 2


async def test_S30_the_journal_is_the_order_of_commits(world: World) -> None:
    """Dense numbers, rising times, over crashes, pauses and many writers; a watcher sees the same order."""

    @workflow(name="busy")
    async def busy(ctx: Context) -> int:
        parts = [ctx.step("part", lambda n=n: n) for n in range(10)]
        total: int = sum(await asyncio.gather(*parts))
        await ctx.wait_for_signal("go")
        await ctx.sleep(0.01)
        return total

    app = await world.engine(busy)
    handles = [await app.start(busy) for _ in range(5)]
    for handle in handles:
        await world.waits(handle.id)
    await world.crash(app)
    other = await world.engine(busy)
    for handle in handles:
        await other.run(handle.id).signal("go")
    assert await all_results([other.run(handle.id) for handle in handles]) == [45] * 5
    await world.sound(*(handle.id for handle in handles))
    seen = [entry.seq async for entry in other.watch(handles[0].id)]
    assert seen == list(range(1, len(seen) + 1))


async def test_a_run_nobody_here_serves_is_left_alone(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Claims ask only for routes this engine serves; a foreign run in the store does no harm."""
    caplog.set_level(logging.ERROR)
    app = await world.engine(waits)
    store = await world.store()
    await store.start([NewRun("stranger", "unknown-here", "9", b"null", DEFAULT_WORKSPACE)])
    handle = await app.start(waits)
    await handle.signal("go", 1)
    assert await handle.result(5) == 1
    record = await world.record("stranger")
    assert (record.status, record.owner, record.epoch) == (Status.ACTIVE, None, 0)
    assert not caplog.records
