"""One turn of a hosted workflow in a Python worker: what it replays, what it runs, what it asks for, what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from durable import Context, NonRetryable, RetryPolicy, StepFailed, current_step, remote_workflow, workflow
from durable.core.errors import ErrorData
from durable.core.registry import Registry
from durable.protocol.messages import (
    AwaitSignal,
    Call,
    HistoryItem,
    PendingSignal,
    RecordStep,
    RemoteTask,
    Sleep,
    StartChildRun,
    StepResult,
    WorkflowDecision,
    WorkflowTask,
)
from durable.testing.clock import ManualClock
from durable.testing.facts import eventually
from durable.worker.turns import TurnHandler, turn_groups

T = 1_767_225_600_000
"""When runs begin, ms."""
QUICK = RetryPolicy(max_attempts=3, initial_delay=0.001, jitter=0.0)


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def item(seq: int, kind: str, value: Any = None, **fields: Any) -> HistoryItem:
    if "error" not in fields:
        fields["output"] = raw(value)
    return HistoryItem(seq=seq, kind=kind, **fields)  # type: ignore[arg-type]


def task(code: Any, *history: HistoryItem, ours: bool = True, **fields: Any) -> WorkflowTask:
    """A turn; of an engine of ours its items are numbered as they stand here."""
    given: dict[str, Any] = {"at": T + 1_000, "started_at": T} if ours else {}
    items = list(history)
    if ours:
        items = [
            msgspec.structs.replace(one, order=number, at=one.at or T + number)
            for number, one in enumerate(items, start=1)
        ]
    name = code.__durable_workflow__.name
    return WorkflowTask(
        **{
            "task_id": "run:wf:00000000",
            "run_id": "run",
            "workflow": name,
            "workflow_version": "1",
            "input": raw(None),
            "history": sorted(items, key=lambda one: one.seq),
            "group": name,
            "attempt": 1,
            **given,
            **fields,
        }
    )


async def decide(code: Any, *history: HistoryItem, **fields: Any) -> WorkflowDecision:
    handler = TurnHandler(Registry([code]), ManualClock(T * 1_000))
    try:
        decision = await handler(task(code, *history, **fields))
    finally:
        handler.close()
    assert isinstance(decision, WorkflowDecision)
    return decision


def output(decision: WorkflowDecision) -> Any:
    assert decision.status == "completed", decision
    assert isinstance(decision.output, msgspec.Raw)
    return msgspec.json.decode(decision.output)


def why(decision: WorkflowDecision) -> tuple[str, str]:
    assert decision.status == "failed", decision
    assert decision.error is not None
    return decision.error.code, decision.error.message


async def test_local_steps_run_side_by_side_and_are_told_in_order_of_ending() -> None:
    """Steps begun together run together; what the code heard first is told first, since a replay delivers it so."""
    first = asyncio.Event()

    async def slow() -> str:
        await first.wait()
        return "slow"

    async def quick() -> str:
        first.set()
        return "quick"

    @workflow("w")
    async def w(ctx: Context) -> list[str]:
        return await ctx.gather(ctx.step("slow", slow), ctx.step("quick", quick))

    decision = await decide(w)
    assert output(decision) == ["slow", "quick"]
    assert [(one.seq, one.name) for one in decision.commands if isinstance(one, RecordStep)] == [
        (1, "quick"),
        (0, "slow"),
    ]


async def test_a_local_step_is_tried_as_often_as_it_may_and_told_once() -> None:
    """Its attempts are the turn's own business; its lines and times come with the record, and its scope says which attempt."""
    attempts = []

    def flaky() -> int:
        step = current_step()
        attempts.append((step.attempt, step.step_id, step.name))
        step.log("trying", attempt=step.attempt)
        if step.attempt < 3:
            raise ValueError("not yet")
        return 7

    @workflow("w")
    async def w(ctx: Context) -> int:
        return await ctx.step("flaky", flaky, retries=QUICK)

    decision = await decide(w)
    assert output(decision) == 7
    assert attempts == [(1, "run:0", "flaky"), (2, "run:0", "flaky"), (3, "run:0", "flaky")]
    (record,) = decision.commands
    assert isinstance(record, RecordStep)
    assert [(line.message, line.data) for line in record.events or []] == [
        ("trying", {"attempt": number}) for number in (1, 2, 3)
    ]
    assert (record.started_at, record.finished_at) == (T + 1_000, T + 1_000), "by the engine's clock"


class Refused(NonRetryable):
    code = "refused"


async def _cancel_itself() -> None:
    raise asyncio.CancelledError


async def _too_long() -> None:
    await asyncio.sleep(30)


def _refuse() -> None:
    raise Refused("no")


@pytest.mark.parametrize(
    ("body", "code"),
    [(_refuse, "refused"), (_cancel_itself, "step_cancelled"), (_too_long, "step_timeout"), (object, "payload_type")],
)
async def test_a_local_step_that_fails_is_recorded_as_failed(body: Callable[[], Any], code: str) -> None:
    """Whatever becomes of a body, the turn goes on with it, and the record says what it was."""

    @workflow("w")
    async def w(ctx: Context) -> str:
        try:
            await ctx.step("bad", body, retries=0, timeout=0.02)
        except StepFailed as error:
            assert error.error is not None
            return error.error.code
        return "never"

    decision = await decide(w)
    assert output(decision) == code
    (record,) = decision.commands
    assert isinstance(record, RecordStep)
    assert record.error is not None
    assert record.error.code == code


async def test_what_was_asked_for_before_is_not_asked_for_again() -> None:
    """`seen` says how far the turns before had come: only what new items lead to is told; without it, everything open."""

    @workflow("w")
    async def w(ctx: Context) -> Any:
        slow, bell = ctx.remote("slow"), ctx.sleep(60)
        await ctx.remote("quick")
        child = ctx.child("kid", 1)
        return await asyncio.gather(slow, bell, child)

    first = await decide(w)
    assert [type(one) for one in first.commands] == [Call, Sleep, Call]
    second = await decide(w, item(2, "call", 1, name="quick"), seen=0)
    assert second.commands == [StartChildRun(seq=3, workflow="kid", input=raw(1))]
    third = await decide(w, item(2, "call", 1), item(0, "call", 2), seen=1)
    assert (third.status, third.commands) == ("continue", [])
    other = await decide(w, item(0, "call", 2), item(2, "call", 1), ours=False)
    assert [one.seq for one in other.commands] == [1], "an engine that orders nothing is told all that is unanswered"


async def test_time_is_what_the_history_says() -> None:
    """The clock says when the run began, then when the last item came; it never goes back, and is the same in every turn."""

    @workflow("w")
    async def w(ctx: Context) -> list[float]:
        seen = [ctx.now()]
        for name in ("a", "b", "c"):
            await ctx.remote(name)
            seen.append(ctx.now())
        return [moment.timestamp() * 1_000 - T for moment in seen]

    items = [item(0, "call", at=T + 500), item(1, "call", at=T + 100), item(2, "call", at=T + 700)]
    assert output(await decide(w, *items, seen=2)) == [0, 500, 500, 700]


async def test_a_sleep_is_what_is_left_of_it() -> None:
    """One for a while counts from when it was asked for; one until a moment goes by the world's clock; none is negative."""

    async def local() -> None: ...

    @workflow("w")
    async def w(ctx: Context) -> None:
        asleep = [ctx.sleep(10), ctx.sleep_until(datetime.fromtimestamp(T / 1_000 + 60, UTC)), ctx.sleep(0.0005)]
        await ctx.remote("a")
        await asyncio.gather(*asleep, ctx.sleep(1))

    first = await decide(w)
    assert [(one.seq, one.ms) for one in first.commands if isinstance(one, Sleep)] == [(0, 10_000), (1, 60_000), (2, 1)]
    later = await decide(w, item(3, "call", at=T + 4_000), ours=True)
    left = [(one.seq, one.ms) for one in later.commands if isinstance(one, Sleep)]
    assert left == [(0, 6_000), (1, 60_000), (2, 0), (4, 1_000)]


async def test_a_signal_of_a_wait_that_was_given_up_goes_to_the_next() -> None:
    """Signals belong to names: what an engine gave to a wait that has timed out, the next wait for that name gets."""

    @workflow("w")
    async def w(ctx: Context) -> Any:
        first = await ctx.wait_for_signal("go", timeout=1, default="none")
        await ctx.remote("a")
        return [first, await ctx.wait_for_signal("go")]

    asked = await decide(w)
    assert asked.commands == [AwaitSignal(seq=0, signal="go"), Sleep(seq=1, ms=1_000)]
    decision = await decide(w, item(1, "timer"), item(0, "signal", "late", name="go"), item(2, "call"), seen=1)
    assert output(decision) == ["none", "late"]


async def test_what_the_code_has_given_up_is_passed_over() -> None:
    """The loser of a race may still be answered, and a timer that was cancelled may still fire: neither disturbs."""

    @workflow("w")
    async def w(ctx: Context) -> str:
        async with asyncio.timeout(5):
            await ctx.gather(ctx.remote("a"), ctx.remote("b"), mode="first")
        await ctx.remote("c")
        return "done"

    items = [item(1, "call", name="a"), item(2, "call", name="b"), item(0, "timer"), item(3, "call", name="c")]
    assert output(await decide(w, *items)) == "done"


async def test_lines_and_patches_are_told_once() -> None:
    """The engine says what it has: lines before are not told again, and a patch taken once is taken for good."""

    @workflow("w")
    async def w(ctx: Context) -> bool:
        ctx.log.info("began", n=1)
        await ctx.remote("a")
        patched = ctx.patched("faster")
        ctx.log.warning("going on")
        await ctx.remote("b")
        return patched

    first = await decide(w)
    assert [(line.level, line.message) for line in first.logs or []] == [("info", "began")]
    new = await decide(w, item(0, "call"), seen=0, logs=1)
    assert [(line.level, line.message) for line in new.logs or []] == [("warn", "going on")]
    assert new.patches == ["faster"]
    last = await decide(w, item(0, "call"), item(1, "call"), seen=1, logs=2, patches=["faster"])
    assert (output(last), last.logs, last.patches) == (True, None, None)
    old = await decide(w, item(0, "call"), item(1, "call"), seen=1, logs=2)
    assert output(old) is False, "a run that had been past here took the old way"


async def test_an_engine_that_orders_nothing_is_answered_in_order_of_call() -> None:
    """Without `order` an answer waits until all that was called before it are there: whatever came first, every replay is the
    same."""

    @workflow("w")
    async def w(ctx: Context) -> list[str]:
        told: list[str] = []

        async def branch(name: str) -> None:
            await ctx.remote(name)
            told.append(name)
            await ctx.step(f"{name}-done", str)

        await asyncio.gather(branch("a"), branch("b"))
        return told

    held = await decide(w, item(1, "call"), ours=False)
    assert [type(one) for one in held.commands] == [Call]
    both = await decide(w, item(0, "call"), item(1, "call"), ours=False)
    assert output(both) == ["a", "b"]
    assert [one.seq for one in both.commands] == [2, 3]
    recorded = await decide(w, item(0, "call"), item(1, "call"), item(3, "step", ""), ours=False)
    assert [one.seq for one in recorded.commands] == [2], "a recorded step is not run again, though it has to wait"


async def _first(ctx: Context) -> Any:
    return await ctx.gather(ctx.remote("a"), ctx.remote("b"), mode="first")


async def _timeout(ctx: Context) -> Any:
    async with asyncio.timeout(5):
        return await ctx.remote("a")


async def _signal(ctx: Context) -> Any:
    return await ctx.wait_for_signal("go", timeout=5)


async def _wait(ctx: Context) -> Any:
    steps = [ctx.step("a", int), ctx.step("b", int)]
    await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
    steps[1].cancel()
    return 0


async def _completed(ctx: Context) -> Any:
    for soon in asyncio.as_completed([ctx.remote("a"), ctx.remote("b")]):
        await soon


async def _caught(ctx: Context) -> Any:
    try:
        return await ctx.gather(ctx.remote("a"), ctx.remote("b"), mode="first")
    except Exception:
        return "caught away"


async def _patched(ctx: Context) -> Any:
    return ctx.patched("new")


@pytest.mark.parametrize("code", [_first, _timeout, _signal, _wait, _completed, _caught, _patched])
async def test_races_need_an_engine_that_orders(code: Any) -> None:
    """What only an order can decide is refused with a sentence, by the turn that would begin it."""
    decision = await decide(workflow("w")(code), ours=False)
    kind, message = why(decision)
    assert kind == "determinism"
    assert "this engine does not say" in message
    assert decision.error is not None
    assert not decision.error.retryable


async def test_waiting_for_all_is_no_race() -> None:
    """gather, TaskGroup and asyncio.wait for all work on any engine, also where the first error gives up the rest."""

    @workflow("w")
    async def w(ctx: Context) -> Any:
        calls = [ctx.remote("a"), ctx.sleep(1), asyncio.sleep(2)]
        done, _ = await asyncio.wait([asyncio.ensure_future(one) for one in calls])
        try:
            await ctx.gather(ctx.remote("bad"), ctx.remote("slow"))
        except StepFailed:
            async with asyncio.TaskGroup() as group:
                last = group.create_task(ctx.step("local", int))  # type: ignore[arg-type]
            return [len(done), last.result()]

    assert len((await decide(w, ours=False)).commands) == 3
    items = [item(0, "call"), item(1, "timer"), item(2, "timer"), item(3, "call", error=ErrorData("no"))]
    assert output(await decide(w, *items, ours=False)) == [3, 0]


async def test_a_pending_signal_is_a_hint_that_is_used() -> None:
    """An engine that sends unused signals along spares its run a turn; one for another wait is left alone."""

    @workflow("w")
    async def w(ctx: Context) -> Any:
        return await ctx.wait_for_signal("go")

    hint = PendingSignal(seq=0, signal="go", payload=raw("now"))
    assert output(await decide(w, ours=False, pending_signals=[hint])) == "now"
    other = PendingSignal(seq=0, signal="stop", payload=raw(1))
    assert (await decide(w, ours=False, pending_signals=[other])).status == "continue"


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("kind", ["step", "timer", "signal", "child"])
async def test_a_history_of_other_code_is_refused(kind: str, ours: bool) -> None:
    """Another kind, another name, or more than the code has asked for: non-determinism, told with both sides."""

    @workflow("w")
    async def w(ctx: Context) -> Any:
        await ctx.remote("a")
        return await ctx.wait_for_signal("never")

    assert why(await decide(w, item(0, kind, name="a"), ours=ours))[0] == "non_determinism"
    code, message = why(await decide(w, item(0, "call", name="b"), ours=ours))
    assert code == "non_determinism"
    assert "Recorded: call b. The code asks for: call 'a'" in message
    if ours:
        assert why(await decide(w, item(7, kind)))[0] == "non_determinism"


async def test_code_that_breaks_the_rules_fails_its_run() -> None:
    """Waiting for nothing, awaiting what is foreign, an input that does not fit: each is a decision with its own code."""

    @workflow("stuck")
    async def stuck(ctx: Context) -> None:
        await asyncio.get_running_loop().create_future()

    @workflow("foreign")
    async def foreign(ctx: Context) -> None:
        asyncio.get_running_loop().run_in_executor(None, print)

    @workflow("typed")
    async def typed(ctx: Context, n: int) -> int:
        return n

    @workflow("raises")
    async def raises(ctx: Context) -> None:
        await ctx.step("before", int)
        raise KeyError("x")

    assert why(await decide(stuck))[0] == "stalled"
    assert why(await decide(foreign))[0] == "foreign_await"
    assert why(await decide(typed, input=raw("text")))[0] == "payload_type"
    failed = await decide(raises)
    assert why(failed) == ("error", "'x'")
    assert [type(one) for one in failed.commands] == [RecordStep], "what was done is told"


async def test_who_has_not_the_code_says_so() -> None:
    """An unknown workflow or version is answered with a code that leaves the turn to others; an engine's entry is no code."""

    @workflow("w")
    async def w(ctx: Context) -> None: ...

    assert why(await decide(w, workflow="v"))[0] == "unknown_workflow"
    assert why(await decide(w, workflow_version="2"))[0] == "unknown_version"
    registry = Registry([remote_workflow("w"), remote_workflow("v", "2")])
    assert turn_groups(registry) == []
    handler = TurnHandler(registry, ManualClock())
    decision = await handler(task(w))
    assert isinstance(decision, WorkflowDecision)
    assert why(decision)[0] == "unknown_step"
    step = RemoteTask(run_id="r", seq=0, step_id="r:0", name="w", group="w", input=raw(1), attempt=1)
    result = await handler(step)
    assert isinstance(result, StepResult)
    assert result.status == "failed"


def test_groups_are_the_workflows_names() -> None:
    """Each workflow has a queue of its own, whatever its versions; a worker of a partition serves there only."""

    @workflow("a:b")
    async def one(ctx: Context) -> None: ...

    @workflow("a:b", "2")
    async def two(ctx: Context) -> None: ...

    registry = Registry([one, two])
    assert turn_groups(registry) == ["a-b"]
    assert turn_groups(registry, "eu") == ["a-b@eu"]


async def test_a_call_inherits_the_workers_partition() -> None:
    """A worker of a partition sends the steps of its workflows there, unless the call says another."""

    @workflow("w")
    async def w(ctx: Context) -> None:
        await asyncio.gather(ctx.remote("a"), ctx.remote("b", group="us"))

    handler = TurnHandler(Registry([w]), ManualClock(), partition="eu")
    decision = await handler(task(w))
    assert isinstance(decision, WorkflowDecision)
    assert [one.group for one in decision.commands if isinstance(one, Call)] == ["eu", "us"]


async def test_a_cancelled_turn_leaves_nothing_behind() -> None:
    """Its bodies are cancelled, its code is unwound, and no `finally` of it does anything durable."""
    began, ended = asyncio.Event(), []

    async def body() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("body")

    @workflow("w")
    async def w(ctx: Context) -> None:
        try:
            await ctx.step("long", body)
        finally:
            ended.append("code")

    handler = TurnHandler(Registry([w]), ManualClock())
    turn = asyncio.create_task(handler(task(w)))  # type: ignore[arg-type]
    await began.wait()
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    await eventually(lambda: sorted(ended) == ["body", "code"], "both are over")


async def test_a_step_nobody_waits_for_any_more_is_cancelled() -> None:
    """The loser of a race between local steps is told, and not recorded."""
    cancelled = asyncio.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    @workflow("w")
    async def w(ctx: Context) -> Any:
        return await ctx.gather(ctx.step("slow", slow), ctx.step("quick", int), mode="first")

    decision = await decide(w)
    assert output(decision) == 0
    assert [one.seq for one in decision.commands] == [1]
    await asyncio.wait_for(cancelled.wait(), 5)
