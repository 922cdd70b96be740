"""Remote steps: dispatched once it is recorded, counted once by task id and attempt, taken over without loss."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

import msgspec
import pytest

from durable import Context, RetryPolicy, RunCancelled, StepFailed, StepTimeout, current_step, durable_step, workflow
from durable.core.errors import DefinitionError, ErrorData, MessageRefused, PayloadError, RunNotFound
from durable.protocol.messages import RemoteTask, StepResult, Task
from durable.protocol.states import Activity, Status
from durable.protocol.token import make_token
from durable.protocol.trace import trace_id
from durable.transports.event_emitter import EventEmitterTransport
from durable.transports.pool import TransportPool
from tests.engine.broker import Broker
from tests.engine.world import Gate, World, all_results, eventually

ONCE = RetryPolicy(max_attempts=1)
QUICK = RetryPolicy(max_attempts=3, initial_delay=0.01, jitter=0.0)


@durable_step("charge")
async def charge(amount: int) -> int:
    return amount + 1


@workflow(name="shop")
async def shop(ctx: Context, amount: int) -> int:
    charged: int = await ctx.remote(charge, amount)
    return charged


@workflow(name="far")
async def far(ctx: Context) -> object:
    return await ctx.remote("far", {"n": 1}, retries=QUICK)


async def test_N4_the_event_emitter_is_the_default_and_can_be_injected(world: World) -> None:
    """Without a transport, remote steps run in this process; one that is given is used, and may be shared by engines."""
    emitter = EventEmitterTransport(name="mine")
    app = await world.engine(shop, charge, transport=emitter)
    assert app.engine.deps.transport.member("default") is emitter
    assert await app.start_and_wait(shop, 1, timeout=5) == 2

    @workflow(name="client")
    async def client(ctx: Context) -> int:
        answer: int = await ctx.remote("charge", 10)
        return answer

    served_elsewhere = await world.engine(client, transport=emitter.peer())
    assert await served_elsewhere.start_and_wait(client, timeout=5) == 11


async def test_a_step_that_nobody_serves_fails_and_says_so(world: World) -> None:
    """A name without a handler is a failed step, not retried."""

    @workflow(name="lonely")
    async def lonely(ctx: Context) -> str:
        try:
            await ctx.remote("nobody", 1)
        except StepFailed as error:
            return f"{error.attempts} {error.error.message if error.error else ''}"
        return ""

    app = await world.engine(lonely)
    assert await app.start_and_wait(lonely, timeout=5) == "1 no handler for nobody"


async def test_a_dispatch_is_durable_before_it_is_published(world: World) -> None:
    """What a worker sees is in the journal already, with the input, under the id the worker is told."""
    broker, seen = Broker(), []
    end = broker.end()
    dispatch = end.dispatch

    async def look(task: object) -> None:
        seen.extend(await world.statuses(handle.id, "remote"))
        await dispatch(task)  # type: ignore[arg-type]

    end.dispatch = look  # type: ignore[method-assign, assignment]
    app = await world.engine(far, transport=end)
    handle = await app.start(far)
    task = await broker.sent()
    assert seen == ["dispatched"]
    assert (task.step_id, task.name, task.attempt, bytes(task.input)) == (f"{handle.id}:0", "far", 1, b'{"n":1}')
    await broker.answer(task, "done")
    assert await handle.result(5) == "done"
    assert await world.statuses(handle.id, "remote") == ["dispatched", "published", "completed"]
    await world.sound(handle.id)


async def test_a_result_is_acknowledged_once_it_is_durable(world: World) -> None:
    """When the handler returns, the store has it: to the transport that is leave to forget the task."""
    broker = Broker()

    @workflow(name="then")
    async def then(ctx: Context) -> object:
        result = await ctx.remote("far")
        await ctx.wait_for_signal("never")
        return result

    app = await world.engine(then, transport=broker.end())
    handle = await app.start(then)
    await broker.answer(await broker.sent(), 5)
    lines = await world.statuses(handle.id)
    record = await world.record(handle.id)
    assert "remote far completed" in lines or record.inbox_last == 1
    await world.until_journal(handle.id, lambda lines: "remote far completed" in lines)


async def test_S7_a_result_counts_once_however_often_it_comes(world: World) -> None:
    """A doubled result is recorded as late or passed over; the workflow sees the first."""
    broker, seen = Broker(), []

    @workflow(name="doubles")
    async def doubles(ctx: Context) -> object:
        first = await ctx.remote("far")
        seen.append(first)
        return [first, await ctx.wait_for_signal("go")]

    app = await world.engine(doubles, transport=broker.end())
    handle = await app.start(doubles)
    task = await broker.sent()
    await asyncio.gather(*(broker.answer(task, n) for n in range(5)))
    await world.until_journal(handle.id, lambda lines: "remote far completed" in lines)
    await broker.answer(task, 99)
    await handle.signal("go")
    assert await handle.result(5) == [0, None]
    assert set(seen) == {0}
    assert (await world.statuses(handle.id, "remote")).count("completed") == 1
    await world.sound(handle.id)


async def test_B45_a_result_on_an_engine_that_did_not_dispatch_it_is_applied(world: World) -> None:
    """No waiter on a durable path is local to a process: any engine takes any result."""
    broker = Broker()
    first = await world.engine(far, transport=broker.end())
    handle = await first.start(far)
    task = await broker.sent()
    await world.until_journal(handle.id, lambda lines: "remote far published" in lines)
    await world.engine(far, transport=broker.end())
    await broker.answer(task, "elsewhere", through=broker.ends[1])
    assert await handle.result(5) == "elsewhere"
    await world.sound(handle.id)


async def test_B49_two_results_of_parallel_steps_reach_two_engines_at_once(world: World) -> None:
    """Both are applied, each once, and the run goes on without waiting for any poll."""
    broker = Broker()

    @workflow(name="pair")
    async def pair(ctx: Context) -> list[object]:
        return list(await asyncio.gather(ctx.remote("a"), ctx.remote("b")))

    app = await world.engine(pair, transport=broker.end(), poll_every=20)
    await world.engine(pair, transport=broker.end(), poll_every=20)
    handle = await app.start(pair)
    await broker.sent(2)
    await world.until_journal(handle.id, lambda lines: sum("published" in line for line in lines) == 2)
    await asyncio.gather(
        broker.answer(broker.tasks[0], broker.tasks[0].name, through=broker.ends[0]),
        broker.answer(broker.tasks[1], broker.tasks[1].name, through=broker.ends[1]),
    )
    assert await handle.result(5) == ["a", "b"]
    await world.sound(handle.id)


async def test_S6_a_dispatch_without_a_published_mark_is_published_again_with_the_same_id(world: World) -> None:
    """A crash between recording and publishing loses no task; the next owner sends it under the same id and attempt."""
    broker = Broker()
    end = broker.end()

    async def never(task: object) -> None:
        await asyncio.Event().wait()

    end.dispatch = never  # type: ignore[method-assign, assignment]
    app = await world.engine(far, transport=end)
    handle = await app.start(far)
    await world.until_journal(handle.id, lambda lines: "remote far dispatched" in lines)
    await world.crash(app)
    app = await world.engine(far, transport=broker.end())
    task = await broker.sent()
    assert (task.step_id, task.attempt) == (f"{handle.id}:0", 1)
    await broker.answer(task, 1)
    assert await app.run(handle.id).result(5) == 1
    assert (await world.statuses(handle.id, "remote")).count("dispatched") == 1


async def test_S6_a_published_task_is_not_sent_again_while_the_broker_holds_it(world: World) -> None:
    """After a crash the new owner asks the transport and waits; only a task the broker has lost is sent again."""
    broker = Broker()
    app = await world.engine(far, transport=broker.end())
    handle = await app.start(far)
    task = await broker.sent()
    await world.until_journal(handle.id, lambda lines: "remote far published" in lines)
    await world.crash(app)
    app = await world.engine(far, transport=broker.end())
    if not world.cold:
        await world.until(handle.id, lambda r: r.epoch > 1)
    await asyncio.sleep(0.05)
    assert len(broker.tasks) == 1
    await world.crash(app)
    broker.held.clear()  # the broker's memory is gone
    app = await world.engine(far, transport=broker.end(), lease=1.0)
    if not world.cold:
        again = await broker.sent(2)
        assert (again.step_id, again.attempt) == (task.step_id, task.attempt)
    await broker.answer(task, "at last")
    assert await app.run(handle.id).result(5) == "at last"
    await world.sound(handle.id)


async def test_S9_a_late_result_of_an_older_attempt_is_recorded_and_never_applied(world: World) -> None:
    """Attempt 1 timed out and 2 is under way: what 1 answers is `late`; 2 decides."""
    broker = Broker()

    @workflow(name="late")
    async def late(ctx: Context) -> object:
        return await ctx.remote("far", timeout=0.1, retries=QUICK)

    app = await world.engine(late, transport=broker.end())
    handle = await app.start(late)
    first = await broker.sent(1)
    second = await broker.sent(2)
    assert (first.attempt, second.attempt, first.step_id) == (1, 2, second.step_id)
    assert first.step_id in broker.cancelled, "its worker is told"
    await broker.answer(first, "old")
    await broker.answer(second, "new")
    assert await handle.result(5) == "new"
    lines = await world.statuses(handle.id, "remote")
    assert "late" in lines
    assert lines.count("completed") == 1
    await world.sound(handle.id)


async def test_S10_a_result_for_a_finished_run_is_accepted_and_changes_nothing(world: World) -> None:
    """The broker need not keep it: the handler returns, and the outcome stays."""
    broker = Broker()
    app = await world.engine(far, transport=broker.end())
    handle = await app.start(far)
    task = await broker.sent()
    await handle.cancel()
    await world.until(handle.id, lambda r: r.status is not Status.ACTIVE)
    before = await world.record(handle.id)
    await broker.answer(task, "too late")
    assert (await world.record(handle.id)) == before
    assert before.status is Status.CANCELLED


async def test_N16_a_remote_timeout_counts_from_dispatch_and_is_retried(world: World) -> None:
    """No result within the timeout is a failed attempt; after the last one the workflow gets StepTimeout."""
    broker = Broker()

    @workflow(name="silent")
    async def silent(ctx: Context) -> int:
        try:
            await ctx.remote("far", timeout=0.05, retries=RetryPolicy(2, initial_delay=0.01))
        except StepTimeout as error:
            return error.attempts
        return 0

    app = await world.engine(silent, transport=broker.end())
    assert await app.start_and_wait(silent, timeout=5) == 2
    assert [task.attempt for task in broker.tasks] == [1, 2]


async def test_N16_a_remote_error_is_retried_unless_it_says_not_to(world: World) -> None:
    """A worker's error carries `retryable` and `retryAfter`; both are obeyed."""
    broker = Broker()
    app = await world.engine(far, transport=broker.end())
    handle = await app.start(far)
    await broker.answer(await broker.sent(1), error=ErrorData(message="again", retry_after=0.05))
    task = await broker.sent(2)
    await broker.answer(task, error=ErrorData(message="never", retryable=False))
    from durable import RunFailed

    with pytest.raises(RunFailed, match="never"):
        await handle.result(5)
    entries = [entry for entry in await world.journal(handle.id) if entry.kind == "remote"]
    dispatched = [entry.at for entry in entries if entry.status == "dispatched"]
    assert dispatched[1] - dispatched[0] >= 50_000


async def test_silence_counts_only_where_a_heartbeat_was_asked_for(world: World) -> None:
    """With `heartbeat_timeout` a beating worker is waited for and a silent one is given up; without, silence proves nothing."""
    broker = Broker()

    @workflow(name="beats")
    async def beats(ctx: Context, limit: float | None) -> object:
        return await ctx.remote("far", heartbeat_timeout=limit, retries=RetryPolicy(2, initial_delay=0.01))

    app = await world.engine(beats, transport=broker.end())
    patient = await app.start(beats, None)
    plain = await broker.sent(1)
    watched = await app.start(beats, 0.6)
    task = await broker.sent(2)
    for _ in range(40):
        broker.beat(task)
        await asyncio.sleep(0.02)
    assert len(broker.tasks) == 2, "it beats, so it is alive"
    again = await broker.sent(3)
    assert (again.step_id, again.attempt) == (task.step_id, 2)
    await broker.answer(again, "second")
    await broker.answer(plain, "patience")
    assert await watched.result(5) == "second"
    assert await patient.result(5) == "patience"


async def test_a_transport_that_refuses_is_a_failed_attempt(world: World) -> None:
    """A TransportError at dispatch counts as an attempt and is retried with backoff."""
    broker = Broker()
    broker.refusing = "the broker is full"
    app = await world.engine(far, transport=broker.end())
    handle = await app.start(far)
    await world.until_journal(handle.id, lambda lines: "remote far retrying" in lines)
    broker.refusing = None
    await broker.answer(await broker.sent(), "went")
    assert await handle.result(5) == "went"


async def test_a_broker_that_is_away_for_a_moment_uses_up_no_retries(world: World) -> None:
    """A task that no transport takes is offered again: it is one attempt, however often it was refused."""
    broker = Broker()
    broker.refusing = "restarting"

    @workflow(name="once")
    async def once(ctx: Context) -> object:
        return await ctx.remote("far", retries=ONCE)

    app = await world.engine(once, transport=broker.end(), dispatch_patience=30)
    handle = await app.start(once)
    await world.until_journal(handle.id, lambda lines: "remote far dispatched" in lines)
    await asyncio.sleep(0.3)
    broker.refusing = None
    await broker.answer(await broker.sent(), "done")
    assert await handle.result(10) == "done"
    assert await world.statuses(handle.id, "remote") == ["dispatched", "published", "completed"]
    await world.sound(handle.id)


async def test_patience_with_a_broker_has_an_end_and_is_not_wasted_on_what_will_never_fit(world: World) -> None:
    """After `dispatch_patience` the attempt has failed, with the cause; a task too large for every transport fails at once; a
    run that is cancelled meanwhile waits no longer."""
    broker = Broker()
    broker.refusing = "gone"

    @workflow(name="fails")
    async def fails(ctx: Context, size: int) -> str:
        try:
            await ctx.remote("far", "x" * size, retries=ONCE)
        except StepFailed as error:
            return str(error)
        return ""

    app = await world.engine(fails, transport=broker.end(), dispatch_patience=0.5)
    assert "gone" in await app.start_and_wait(fails, 1, timeout=10)
    patient = await world.engine(fails, transport=EventEmitterTransport(max_message=1_000), dispatch_patience=60)
    assert "bytes" in await patient.start_and_wait(fails, 5_000, timeout=10)
    waiting = await world.engine(fails, transport=broker.end(), dispatch_patience=60)
    handle = await waiting.start(fails, 1)
    await world.until_journal(handle.id, lambda lines: "remote far dispatched" in lines)
    await handle.cancel()
    with pytest.raises(RunCancelled):
        await handle.result(5)


async def test_a_remote_result_of_the_wrong_type_is_an_error_in_the_workflow(world: World) -> None:
    """The annotation decides; a worker that answers otherwise gives a PayloadError at the await, live and replayed alike."""
    broker = Broker()

    @workflow(name="typed")
    async def typed(ctx: Context) -> str:
        try:
            await ctx.remote(charge, 1)
        except PayloadError as error:
            await ctx.wait_for_signal("go")
            return str(error)
        return ""

    app = await world.engine(typed, transport=broker.end())
    handle = await app.start(typed)
    await broker.answer(await broker.sent(), {"not": "a number"})
    await world.waits(handle.id)
    await handle.signal("go")
    assert "not an int" in await handle.result(5)


async def test_B19_a_long_remote_step_and_many_takeovers_do_not_kill_a_run(world: World) -> None:
    """While a task is with a worker, engines may come and go: nothing is counted against the run, and it completes."""
    broker = Broker()
    app = await world.engine(far, transport=broker.end(), max_recovery_attempts=1)
    handle = await app.start(far)
    task = await broker.sent()
    for _ in range(4):
        await world.until(handle.id, lambda r: r.activity == Activity.WAITING)
        await world.crash(app)
        app = await world.engine(far, transport=broker.end(), max_recovery_attempts=1)
    await broker.answer(task, "after all")
    assert await app.run(handle.id).result(5) == "after all"
    assert (await world.record(handle.id)).recovery_attempts == 0


async def test_a_cancelled_wait_tells_the_worker_and_a_late_result_is_recorded(world: World) -> None:
    """A remote step given up inside the run: journaled cancelled, the worker told, its late answer noted and not delivered."""
    broker = Broker()

    @workflow(name="gives-up")
    async def gives_up(ctx: Context) -> str:
        try:
            async with asyncio.timeout(0.05):
                await ctx.remote("far")
        except TimeoutError:
            await ctx.wait_for_signal("go")
        return "went on"

    app = await world.engine(gives_up, transport=broker.end())
    handle = await app.start(gives_up)
    task = await broker.sent()
    await world.until_journal(handle.id, lambda lines: "remote far cancelled" in lines)
    await eventually(lambda: task.step_id in broker.cancelled)
    await broker.answer(task, "late")
    await world.until_journal(handle.id, lambda lines: "remote late" in " ".join(lines).replace(" far", ""))
    await handle.signal("go")
    assert await handle.result(5) == "went on"
    await world.sound(handle.id)


async def test_a_remote_step_in_this_process_dies_with_it_and_is_sent_again(world: World) -> None:
    """Over the in-process transport a crash takes the task along; the next engine runs it anew."""
    gate = Gate()

    @durable_step("inside")
    async def inside() -> int:
        return await gate()

    @workflow(name="in-process")
    async def in_process(ctx: Context) -> object:
        return await ctx.remote(inside)

    app = await world.engine(in_process, inside)
    handle = await app.start(in_process)
    await gate.reached()
    await world.until_journal(handle.id, lambda lines: "remote inside published" in lines)
    await world.crash(app)
    app = await world.engine(in_process, inside)
    await gate.reached(2)
    gate.open()
    assert await app.run(handle.id).result(5) == 2
    await world.sound(handle.id)


async def test_a_remote_step_knows_itself_and_logs(world: World) -> None:
    """`current_step()` works on a worker; its lines come back with the result."""

    @durable_step("tell")
    async def tell() -> str:
        step = current_step()
        step.log("working", level="info", n=1)
        return step.step_id

    @workflow(name="told")
    async def told(ctx: Context) -> str:
        answer: str = await ctx.remote(tell)
        return answer

    app = await world.engine(told, tell)
    handle = await app.start(told)
    assert await handle.result(5) == f"{handle.id}:0"


async def test_a_result_for_another_workspaces_run_is_refused(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """An engine of another workspace does not write to a run, says so, and has the result delivered again, to its own."""
    broker = Broker()
    app = await world.engine(far, transport=broker.end())
    handle = await app.start(far)
    task = await broker.sent()
    await world.until_journal(handle.id, lambda lines: "remote far published" in lines)
    await world.engine(far, transport=broker.end(), workspace="stranger")
    result = StepResult(
        run_id=task.run_id,
        seq=task.seq,
        step_id=task.step_id,
        status="completed",
        output=msgspec.Raw(b'"forged"'),
        attempt=1,
    )
    astray = broker.ends[1].results
    assert astray is not None
    with pytest.raises(RunNotFound, match="another workspace"):
        await astray(result)
    assert "its run is of workspace 'default', and this engine serves 'stranger'" in caplog.text
    assert (await world.record(handle.id)).inbox_last == 0
    await broker.answer(task, "true", through=broker.ends[0])
    assert await handle.result(5) == "true"
    assert await astray(result) is None, "too late: superfluous, and not sent again for ever"
    assert await astray(msgspec.structs.replace(result, run_id="nobody")) is None


async def test_workspaces_share_an_in_process_transport(world: World) -> None:
    """Results go to the engines in turn; one that meets a stranger hands it on, so none is lost."""
    emitter = EventEmitterTransport()
    apps = [await world.engine(shop, charge, transport=emitter, workspace=name) for name in ("one", "two")]
    handles = [await app.start(shop, n) for n in range(6) for app in apps]
    assert await all_results(handles) == [n + 1 for n in range(6) for _ in apps]


@pytest.mark.parametrize("cold", [False, True])
async def test_B18_a_task_that_its_broker_has_lost_is_sent_again(world: World, cold: bool) -> None:
    """After a FLUSHALL a step without any timeout is asked after and sent again under the same id and attempt, whether its run
    is in memory or not."""
    broker = Broker()
    app = await world.engine(far, transport=broker.end(), ask_every=0.1, lease=0.3, cold=cold, poll_every=0.05)
    handle = await app.start(far)
    first = await broker.sent()
    await world.until_journal(handle.id, lambda lines: "remote far published" in lines)
    broker.held.clear()
    again = await broker.sent(2)
    assert (again.step_id, again.attempt) == (first.step_id, first.attempt)
    await broker.answer(again, "found")
    assert await handle.result(5) == "found"
    await world.sound(handle.id)


async def test_a_task_that_is_held_is_asked_after_and_left_alone(world: World) -> None:
    """However often its transport is asked, what it still has is not sent again."""
    broker = Broker()
    end = broker.end()
    questions: list[str] = []
    holding = end.holding

    async def ask(task_ids: Sequence[str]) -> Collection[str]:
        questions.extend(task_ids)
        return await holding(task_ids)

    end.holding = ask  # type: ignore[method-assign]
    app = await world.engine(far, transport=end, ask_every=0.05, lease=0.3)
    handle = await app.start(far)
    task = await broker.sent()
    await eventually(lambda: len(questions) >= 3, "it was asked again and again")
    assert len(broker.tasks) == 1
    await broker.answer(task, "done")
    assert await handle.result(5) == "done"


async def test_N19_a_task_carries_the_trace_of_its_run(world: World) -> None:
    """`traceparent` is W3C's; attempts and children share their first run's trace, and each attempt is a span of its own."""
    broker = Broker()

    @workflow(name="parent")
    async def parent(ctx: Context) -> object:
        return await ctx.child(far)

    app = await world.engine(far, parent, transport=broker.end())
    handle = await app.start(parent)
    first = await broker.sent()
    await broker.answer(first, error=ErrorData(message="again"))
    second = await broker.sent(2)
    await broker.answer(second, 1)
    assert await handle.result(5) == 1
    parts = [(task.traceparent or "").split("-") for task in (first, second)]
    assert [(version, len(trace), len(span), flags) for version, trace, span, flags in parts] == [
        ("00", 32, 16, "01")
    ] * 2
    assert parts[0][1] == parts[1][1] == trace_id(handle.id)
    assert parts[0][2] != parts[1][2]


async def test_A12_the_same_result_a_thousand_times_at_once_is_one_commit(world: World) -> None:
    """A thousand copies of one answer, at once: each is acknowledged, one is applied, and the journal does not grow by them."""
    broker = Broker()

    @workflow(name="waits")
    async def waits(ctx: Context) -> object:
        first = await ctx.remote("far")
        await ctx.wait_for_signal("go")
        return first

    app = await world.engine(waits, transport=broker.end())
    handle = await app.start(waits)
    task = await broker.sent()
    await asyncio.gather(*(broker.answer(task, n) for n in range(1_000)))
    await handle.signal("go")
    assert await handle.result(5) == 0
    statuses = await world.statuses(handle.id, "remote")
    assert statuses.count("completed") == 1
    await world.sound(handle.id)


@pytest.mark.parametrize("signed", [False, True])
async def test_A44_a_forged_result_is_refused_and_the_real_one_counts(world: World, signed: bool) -> None:
    """With a key, a result with another task's token is refused, and where the transport demands tokens one without any."""
    broker = Broker()
    end = broker.end()
    end.signed = signed
    app = await world.engine(far, transport=end, task_key="secret")
    handle = await app.start(far)
    task = await broker.sent()
    assert task.token is not None
    forged = StepResult(
        run_id=task.run_id, seq=task.seq, step_id=task.step_id, status="completed", output=msgspec.Raw(b'"forged"')
    )
    assert end.results is not None
    with pytest.raises(MessageRefused):
        await end.results(msgspec.structs.replace(forged, attempt=1, token="0" * 32))
    if signed:
        with pytest.raises(MessageRefused):
            await end.results(msgspec.structs.replace(forged, attempt=1))
    await end.results(msgspec.structs.replace(forged, attempt=1, output=msgspec.Raw(b'"real"'), token=task.token))
    assert await handle.result(5) == "real"


async def test_A09_a_token_is_good_for_its_own_task_and_attempt(world: World) -> None:
    """Another run's token, an edited or cut one, one of another attempt, one made with another key: refused, and nothing is
    written. What another tenant may read of its own tasks opens nothing here."""
    broker = Broker()
    end = broker.end()
    end.signed = True
    app = await world.engine(far, transport=end, task_key="secret")
    mine, others = await app.start(far), await app.start(far)
    await broker.sent(2)
    task, foreign = sorted(broker.tasks, key=lambda one: one.run_id != mine.id)
    await world.until_journal(mine.id, lambda lines: "remote far published" in lines)
    assert task.token is not None
    assert foreign.token is not None
    flipped = ("1" if task.token[0] != "1" else "2") + task.token[1:]
    before = await world.statuses(mine.id)
    own = StepResult(
        run_id=task.run_id,
        seq=task.seq,
        step_id=task.step_id,
        status="completed",
        output=msgspec.Raw(b'"mine"'),
        attempt=1,
        token=task.token,
    )
    assert end.results is not None
    for changes in (
        {"token": foreign.token},
        {"token": flipped},
        {"token": task.token[:-1]},
        {"token": task.token.upper()},
        {"token": ""},
        {"attempt": 2},
        {"run_id": others.id, "step_id": foreign.step_id},
        {"token": make_token("another", task.run_id, task.seq, 1)},
    ):
        with pytest.raises(MessageRefused):
            await end.results(msgspec.structs.replace(own, **changes))
    assert await world.statuses(mine.id) == before
    assert (await world.record(mine.id)).inbox_last == 0
    await end.results(own)
    assert await mine.result(5) == "mine"
    await end.results(
        msgspec.structs.replace(
            own, run_id=others.id, step_id=foreign.step_id, output=msgspec.Raw(b'"theirs"'), token=foreign.token
        )
    )
    assert await others.result(5) == "theirs"
    await world.sound(mine.id, others.id)


def test_a_transport_that_demands_tokens_needs_a_key() -> None:
    """Without a key nothing could be signed: that is said before anything is started."""
    end = Broker().end()
    end.signed = True
    with pytest.raises(DefinitionError, match="task_key"):
        TransportPool({"default": end})


async def test_an_engine_may_leave_its_steps_to_workers(world: World) -> None:
    """With `serve_steps=False` an engine knows a step by reference and does not run it: whoever serves it does."""
    broker = Broker()
    end = broker.end()
    app = await world.engine(shop, charge, transport=end, serve_steps=False)
    assert end.served == []
    handle = await app.start(shop, 1)
    await broker.answer(await broker.sent(), 41)
    assert await handle.result(5) == 41


@pytest.mark.parametrize("cold", [False, True])
async def test_B17_an_answer_that_is_faster_than_the_mark_of_its_dispatch_counts(world: World, cold: bool) -> None:
    """(S8) The worker answers before the transport has even said that it took the task: the answer finds who waits for it."""
    broker = Broker()
    end = broker.end()
    dispatch = end.dispatch

    async def answer_first(task: Task) -> None:
        assert isinstance(task, RemoteTask)
        answering = asyncio.create_task(broker.answer(task, "early"))
        await asyncio.sleep(0.02)
        await dispatch(task)
        await answering

    end.dispatch = answer_first  # type: ignore[method-assign]
    app = await world.engine(far, transport=end, cold=cold, poll_every=0.05)
    handle = await app.start(far)
    assert await handle.result(5) == "early"
    assert (await world.statuses(handle.id, "remote")).count("completed") == 1
    await world.sound(handle.id)


async def test_B29_a_body_that_outlives_its_timeout_is_told_and_counts_no_more(world: World) -> None:
    """The step times out while its body runs: that body's worker is told, a second one is begun, and one answer is applied,
    whichever comes first after that."""
    broker = Broker()

    @workflow(name="timed")
    async def timed(ctx: Context) -> object:
        result = await ctx.remote("far", timeout=0.15, retries=QUICK)
        await ctx.wait_for_signal("go")
        return result

    app = await world.engine(timed, transport=broker.end())
    handle = await app.start(timed)
    first = await broker.sent()
    second = await broker.sent(2)
    assert broker.cancelled == [first.step_id]
    await asyncio.gather(broker.answer(first, "old"), broker.answer(second, "new"))
    await handle.signal("go")
    assert await handle.result(5) == "new"
    statuses = await world.statuses(handle.id, "remote")
    assert statuses.count("completed") == 1
    await world.sound(handle.id)


async def test_A11_answers_that_nobody_waits_for_are_taken_and_change_nothing(world: World) -> None:
    """For a run there never was, one that has finished or was cancelled, a step never asked for, another attempt: each is
    acknowledged, so that it does not come again, and no run changes by it."""
    broker = Broker()

    @workflow(name="waits-on")
    async def waits_on(ctx: Context) -> object:
        return await ctx.remote("far")

    app = await world.engine(far, waits_on, transport=broker.end())
    done = await app.start(far)
    task = await broker.sent()
    await broker.answer(task, "done")
    assert await done.result(5) == "done"
    given_up = await app.start(waits_on)
    dropped = await broker.sent(2)
    await given_up.cancel()
    with pytest.raises(RunCancelled):
        await given_up.result(5)
    open_run = await app.start(waits_on)
    awaited = await broker.sent(3)
    before = {handle.id: (await world.record(handle.id)).status for handle in (done, given_up)}

    unknown = msgspec.structs.replace(task, run_id="never", step_id="never:0")
    other_step = msgspec.structs.replace(awaited, seq=7, step_id=f"{open_run.id}:7")
    other_attempt = msgspec.structs.replace(awaited, attempt=9)
    for stray in (unknown, task, dropped, other_step, other_attempt):
        await broker.answer(stray, "stray")

    assert {handle.id: (await world.record(handle.id)).status for handle in (done, given_up)} == before
    assert await done.result(5) == "done"
    await broker.answer(awaited, "mine")
    assert await open_run.result(5) == "mine"
    await world.sound(done.id, given_up.id, open_run.id)
