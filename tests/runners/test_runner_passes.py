"""One pass of a run: what it replays, what it runs, what it reports, what it refuses."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec import Struct

from durable import Context, Event, NonRetryable, RetryPolicy, StepFailed, current_step, workflow
from durable.core.definition import durable_step
from durable.core.errors import DefinitionError
from durable.core.flow import Batch
from durable.core.registry import Registry
from durable.runners.passes import Failure, PassHandler
from durable.testing.clock import ManualClock
from tests.runners.little_engine import START, Ended, LittleEngine, asking

NOW = START + 5_000


def hash_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def handler(*flows: Any, **options: Any) -> PassHandler:
    return PassHandler(Registry(flows), ManualClock(NOW * 1_000), **options)


def engine(flow: Any, data: Any = None, **options: Any) -> LittleEngine:
    ask = asking(handler(flow))
    return LittleEngine(ask, flow.__durable_workflow__.name, data, **options)


async def one_pass(flow: Any, steps: dict[str, Any] | None = None, *, ours: bool = True, **ctx: Any) -> Any:
    """The first pass, or one with these memos, by name."""
    driver = engine(flow, ours=ours)
    for name, memo in (steps or {}).items():
        driver.memos[hash_of(name)] = memo
        driver.extra = ctx
    if ours and "seen" in ctx:
        driver.seen = ctx["seen"]
    driver.extra = ctx
    return await driver.ask(driver.invoke())


class Order(Struct):
    id: str
    amount: int


@workflow("checkout")
async def checkout(ctx: Context, order: Order) -> str:
    charge = await ctx.step("charge", lambda: f"ch-{order.id}")
    again = await ctx.step("charge", lambda: "again")
    return f"{charge} {again} {order.amount}"


@pytest.mark.parametrize("ours", [True, False])
async def test_steps_run_one_pass_each_and_only_once(ours: bool) -> None:
    """A sequential step is one pass: run, reported under the hash of its name, a repeat under `name:1`, and never run again."""
    driver = engine(checkout, {"id": "o1", "amount": 3}, ours=ours)
    assert await driver.run() == "ch-o1 again 3"
    assert [status for status, _ in driver.passes] == [206, 206, 200]
    assert [(one["op"], one["name"], one["id"], one["data"]) for one in driver.ops] == [
        ("StepRun", "charge", hash_of("charge"), "ch-o1"),
        ("StepRun", "charge:1", hash_of("charge:1"), "again"),
    ]


async def test_parallel_steps_share_a_pass() -> None:
    """All steps a pass reaches run at once, an `async def` on the loop and a plain `def` in a thread, reported together."""
    meet = threading.Barrier(2, timeout=10)
    both = asyncio.Event()

    def plain() -> str:
        meet.wait()
        return threading.current_thread().name

    async def first() -> int:
        await both.wait()
        return 1

    async def second() -> int:
        both.set()
        return 2

    @workflow("parallel")
    async def parallel(ctx: Context) -> list[Any]:
        return await asyncio.gather(
            ctx.step("a", first), ctx.step("b", second), ctx.step("c", plain), ctx.step("d", plain)
        )

    driver = engine(parallel)
    [one, two, *threads] = await driver.run()
    assert (one, two) == (1, 2)
    assert all(name.startswith("durable-step") for name in threads)
    assert [status for status, _ in driver.passes] == [206, 200]


async def test_a_failed_attempt_is_told_with_its_rules() -> None:
    """A step that raises is reported with message, stack and retry rules; it is run again, and told which attempt it is."""
    attempts = []

    async def flaky() -> str:
        attempts.append(current_step().attempt)
        if len(attempts) < 3:
            raise ValueError("not yet")
        return "done"

    @workflow("flaky")
    async def flow(ctx: Context) -> str:
        return await ctx.step("s", flaky, retries=RetryPolicy(max_attempts=5, backoff="linear", initial_delay=2.0))

    driver = engine(flow)
    assert await driver.run() == "done"
    assert attempts == [1, 2, 3]
    assert driver.now == START + 4_000
    first = driver.ops[0]
    assert first["error"]["message"] == "not yet"
    assert "in flaky" in first["error"]["stack"]
    assert first["retry"] == {
        "maxAttempts": 5,
        "backoff": "linear",
        "initialDelayMs": 2000,
        "maxDelayMs": 300000,
        "factor": 2.0,
        "jitter": 0.1,
    }
    assert "retriable" not in first


async def test_a_final_failure_comes_back_as_stepfailed() -> None:
    """NonRetryable is reported as not retriable; its memo raises StepFailed in the workflow, with code and type, and uncaught
    it is the run's failure."""

    async def refuse() -> None:
        raise NonRetryable("no funds")

    @workflow("caught")
    async def caught(ctx: Context) -> str:
        try:
            await ctx.step("s", refuse)
        except StepFailed as error:
            assert error.error is not None
            return f"{error.error.code} {error.error.type} {error.error.message}"
        return "?"

    @workflow("uncaught")
    async def uncaught(ctx: Context) -> None:
        await ctx.step("s", refuse)

    driver = engine(caught)
    assert await driver.run() == "non_retryable NonRetryable no funds"
    assert driver.ops[0]["retriable"] is False
    driver = engine(uncaught)
    with pytest.raises(Ended, match="no funds") as ended:
        await driver.run()
    assert driver.passes[-1][0] == 400
    assert ended.value.args[1]["code"] == "non_retryable"


async def test_a_step_that_waits_for_its_next_attempt_is_let_be() -> None:
    """A pending memo of a step is not run, and named as still waited for."""
    ran = []

    @workflow("waits")
    async def flow(ctx: Context) -> None:
        await ctx.step("s", lambda: ran.append(1))

    status, body = await one_pass(flow, {"s": {"pending": True}})
    assert (status, body["opcodes"], body["parked"], ran) == (206, [], [hash_of("s")], [])


async def test_parked_operations_are_reported_until_they_are_settled() -> None:
    """A sleep and a child are reported in every pass, under the same id; one that is given up no longer is."""

    @workflow("parks")
    async def flow(ctx: Context) -> str:
        child = ctx.child("other", {"a": 1})
        sleep = asyncio.ensure_future(ctx.sleep("1h"))
        await ctx.step("s", lambda: 1)
        sleep.cancel()
        await ctx.step("t", lambda: 1)
        return str(await child)

    status, body = await one_pass(flow)
    assert [one["op"] for one in body["opcodes"]] == ["StepRun", "RunWorkflow", "SleepUntil"]
    pending = {"other": {"pending": True}, "sleep": {"pending": True}}
    status, body = await one_pass(flow, pending)
    assert [one["op"] for one in body["opcodes"]] == ["StepRun", "RunWorkflow", "SleepUntil"]
    assert body["opcodes"][2]["sleepUntilMs"] == START + 3_600_000
    status, body = await one_pass(flow, {**pending, "s": {"data": 1, "order": 1, "at": START + 1}}, seen=0)
    assert status == 206
    assert [(one["op"], one["name"]) for one in body["opcodes"]] == [("StepRun", "t"), ("RunWorkflow", "other")]
    assert body["parked"] == [hash_of("other")]
    assert body["opcodes"][1] | {"id": "", "seq": 0} == {
        "op": "RunWorkflow",
        "id": "",
        "name": "other",
        "seq": 0,
        "childName": "other",
        "childData": {"a": 1},
    }


async def test_a_child_nobody_waits_for_is_told_with_the_result() -> None:
    """To our engine it comes with the last answer; another engine is told of it before the run ends."""

    @workflow("lets go")
    async def flow(ctx: Context) -> str:
        ctx.start_child("other", on_parent_close="abandon")
        return "gone"

    status, body = await one_pass(flow)
    assert (status, body["data"]) == (200, "gone")
    assert [(one["op"], one["onParentClose"]) for one in body["opcodes"]] == [("RunWorkflow", "abandon")]
    status, body = await one_pass(flow, ours=False)
    assert (status, [one["op"] for one in body["opcodes"]]) == (206, ["RunWorkflow"])
    status, body = await one_pass(flow, {"other": {"pending": True}}, ours=False)
    assert (status, body["data"]) == (200, "gone")


@workflow("races")
async def races(ctx: Context) -> str:
    done, _ = await asyncio.wait(
        [asyncio.ensure_future(ctx.sleep(10)), asyncio.ensure_future(ctx.child("other"))],
        return_when=asyncio.FIRST_COMPLETED,
    )
    return str([type(one.result()).__name__ for one in done])


async def test_a_race_goes_by_order_and_is_refused_without() -> None:
    """Our engine says what came first, whatever the order of calls; another does not, and a race is an error that says so."""
    status, body = await one_pass(
        races,
        {"sleep": {"order": 2, "at": START + 10_000}, "other": {"data": 1, "order": 1, "at": START + 9_000}},
        seen=0,
    )
    assert (status, body["data"]) == (200, "['int']")
    status, body = await one_pass(races, ours=False)
    assert status == 400
    assert "is a race" in body["error"]["message"]
    assert "in which order" in body["error"]["message"]


async def test_without_order_everything_is_heard_in_order_of_call() -> None:
    """What was called second and has come is not heard before what was called first."""
    heard: list[str] = []

    @workflow("in order")
    async def flow(ctx: Context) -> list[str]:
        async def one(name: str) -> None:
            await ctx.child(name)
            heard.append(name)

        heard.clear()
        await asyncio.gather(one("a"), one("b"))
        return heard

    status, body = await one_pass(flow, {"a": {"pending": True}, "b": {"data": 1}}, ours=False)
    assert (status, heard) == (206, [])
    assert [one["name"] for one in body["opcodes"]] == ["a"]
    status, body = await one_pass(flow, {"a": {"data": 1}, "b": {"data": 1}}, ours=False)
    assert (status, body["data"]) == (200, ["a", "b"])


async def test_sleeps_of_a_plain_engine_are_durations() -> None:
    """An engine that tells no time is asked to sleep for so long, or until a moment."""

    @workflow("sleeps")
    async def flow(ctx: Context) -> None:
        await ctx.sleep("90s")
        await ctx.sleep_until(datetime(2030, 1, 1, tzinfo=UTC))

    driver = engine(flow, ours=False)
    await driver.run()
    assert [(one["op"], one.get("sleepMs"), one.get("sleepUntilMs")) for one in driver.ops] == [
        ("Sleep", 90_000, None),
        ("SleepUntil", None, 1_893_456_000_000),
    ]


async def test_the_time_of_a_plain_engine_is_recorded() -> None:
    """ctx.now is the run's own where the engine tells it; else it is recorded like a step, and stays what it was."""

    @workflow("clock")
    async def flow(ctx: Context) -> str:
        now = ctx.now().isoformat()
        await ctx.step("s", lambda: 1)
        return now

    driver = engine(flow, ours=False)
    assert await driver.run() == datetime.fromtimestamp(NOW / 1_000, UTC).isoformat()
    assert [one["name"] for one in driver.ops] == ["now", "s"]
    driver = engine(flow)
    assert await driver.run() == datetime.fromtimestamp(START / 1_000, UTC).isoformat()
    assert [one["name"] for one in driver.ops] == ["s"]


@pytest.mark.parametrize("what", ["remote", "signal", "patched"])
async def test_what_the_plain_dialect_cannot_carry_is_refused_by_name(what: str) -> None:
    """Remote steps, signals and patches need our engine; elsewhere the run fails, and is told what to use instead."""

    @workflow("cannot")
    async def flow(ctx: Context) -> Any:
        if what == "patched":
            return ctx.patched("new way")
        return await (ctx.remote("charge") if what == "remote" else ctx.wait_for_signal("go"))

    status, body = await one_pass(flow, ours=False)
    assert status == 400
    assert body["error"]["retryable"] is False
    instead = {"remote": "ctx.step", "signal": "ctx.wait_for_event", "patched": "version"}
    assert instead[what] in body["error"]["message"]


async def test_remote_steps_and_signals_travel_to_our_engine() -> None:
    """Opcodes of ours carry them; a signal that a wait gave up is the next one's."""

    @durable_step("charge", timeout=5, group="eu")
    async def charge(amount: int) -> int:
        return amount

    @workflow("ours")
    async def flow(ctx: Context) -> Any:
        paid = await ctx.remote(charge, 7)
        early = await ctx.wait_for_signal("go", timeout=1, default="none")
        return [paid, early, await ctx.wait_for_signal("go", type=str)]

    status, body = await one_pass(flow)
    assert body["opcodes"][0] | {"retry": 0, "id": ""} == {
        "op": "SendTask",
        "id": "",
        "name": "charge",
        "seq": 0,
        "taskName": "charge",
        "input": 7,
        "group": "eu",
        "timeoutMs": 5000,
        "retry": 0,
    }
    memos: dict[str, Any] = {"charge": {"data": 8, "order": 1, "at": START}}
    status, body = await one_pass(flow, memos, seen=0)
    assert [(one["op"], one["name"]) for one in body["opcodes"]] == [
        ("WaitForSignal", "signal:go"),
        ("SleepUntil", "signal:go:1"),
    ]
    memos["signal:go:1"] = {"order": 2, "at": START + 1_000}
    memos["signal:go"] = {"data": "now", "order": 3, "at": START + 1_000}
    status, body = await one_pass(flow, memos, seen=1)
    assert (status, body["data"]) == (200, [8, "none", "now"])


async def test_a_patch_is_taken_on_new_ground_only() -> None:
    """ctx.patched is True where no answered pass has been, and then reported; False behind; and stays what was reported."""

    @workflow("patches")
    async def flow(ctx: Context) -> str:
        await ctx.step("s", lambda: 1)
        new = ctx.patched("p")
        await ctx.step("t", lambda: 1)
        return "new" if new else "old"

    done: dict[str, Any] = {"s": {"data": 1, "order": 1, "at": START}}
    _, body = await one_pass(flow, done, seen=0)
    assert body["patches"] == ["p"]
    done["t"] = {"data": 1, "order": 2, "at": START}
    _, body = await one_pass(flow, done, seen=1)
    assert (body["data"], body.get("patches")) == ("old", None)
    _, body = await one_pass(flow, done, seen=1, patches=["p"])
    assert body["data"] == "new"


async def test_code_that_has_changed_is_told_from_code_that_waits() -> None:
    """A memo of an operation the code does not ask for is a disagreement, final, with what to do."""
    status, body = await one_pass(checkout_stub, {"gone": {"data": 1, "order": 1, "at": START}}, seen=0)
    assert (status, body["error"]["code"]) == (400, "non_determinism")
    assert "ctx.patched" in body["error"]["message"]


@workflow("stub")
async def checkout_stub(ctx: Context) -> None:
    await ctx.step("here", lambda: 1)


async def test_logs_have_scope_and_index_and_repeat() -> None:
    """The workflow's lines come with every pass, numbered from 0; a step's come once, under its own scope for each attempt."""

    def body() -> None:
        current_step().log("inside", part=1)
        current_step().log("more")

    @workflow("talks")
    async def flow(ctx: Context) -> None:
        ctx.log("first", a=1)
        await ctx.step("s", body)
        ctx.log.warning("second")

    driver = engine(flow)
    await driver.run()
    first, second = (body["logs"] for _, body in driver.passes)
    assert first[0] == {
        "level": "info",
        "message": "first",
        "scope": "root",
        "index": 0,
        "tsMs": START,
        "fields": {"a": 1},
    }
    assert [(line["scope"], line["index"], line["message"]) for line in first[1:]] == [
        ("step:s", 0, "inside"),
        ("step:s", 1, "more"),
    ]
    assert [(line["scope"], line["index"], line["level"]) for line in second] == [
        ("root", 0, "info"),
        ("root", 1, "warn"),
    ]


async def test_a_cancelled_run_may_clean_up() -> None:
    """Told that the run is being cancelled, the code hears CancelledError, may run steps, and the result says cancelled."""
    undone = []

    @workflow("cleans up")
    async def flow(ctx: Context) -> None:
        try:
            await ctx.sleep("1h")
        finally:
            await ctx.step("undo", lambda: undone.append(1))

    cancelling = {"order": 1, "at": START + 5}
    status, body = await one_pass(flow, {"sleep": {"pending": True}}, seen=0, cancelling=cancelling)
    assert [(one["op"], one["name"]) for one in body["opcodes"]] == [("StepRun", "undo")]
    assert body["parked"] == []
    done = {"undo": {"order": 2, "at": START + 6}}
    status, body = await one_pass(flow, done, seen=1, cancelling=cancelling)
    assert (status, body["error"]["code"], undone) == (400, "run_cancelled", [1])


async def test_on_failure_runs_with_what_failed() -> None:
    """A workflow's on_failure is invoked with the error and the input, and may use steps."""

    async def clean_up(ctx: Context, failure: Failure) -> str:
        return await ctx.step("tell", lambda: f"{failure.error.message}: {failure.input['id']}")

    handle = handler(checkout, on_failure={checkout: clean_up})
    driver = LittleEngine(asking(handle), "checkout", {"id": "o1", "amount": 3})
    driver.extra = {"onFailure": True, "error": {"message": "no funds"}}
    assert await driver.run() == "no funds: o1"
    with pytest.raises(DefinitionError, match="async function"):
        handler(checkout, on_failure={"checkout": lambda ctx: None})


async def test_an_unknown_workflow_may_be_known_elsewhere() -> None:
    """A runner that has not the workflow, or not the version, says so retriably."""
    driver = LittleEngine(asking(handler(checkout)), "chekout")
    status, body = await driver.ask(driver.invoke())
    assert (status, body["error"]["code"]) == (500, "unknown_workflow")
    driver = LittleEngine(asking(handler(checkout)), "checkout")
    driver.extra = {"workflowVersion": "7"}
    status, body = await driver.ask(driver.invoke())
    assert (status, body["error"]["code"]) == (500, "unknown_version")


async def test_an_input_that_does_not_fit_is_final() -> None:
    """400, with the place that does not fit."""
    driver = engine(checkout, {"id": 7})
    status, body = await driver.ask(driver.invoke())
    assert (status, body["error"]["code"]) == (400, "payload_type")


@workflow("waits for events")
async def waits_for_events(ctx: Context, order: str) -> Any:
    paid = await ctx.wait_for_event("order.paid", match={"order": order}, timeout="1h", default=None)
    if paid is None:
        return "nobody paid"
    await ctx.send_event("order.done", {"order": order})
    return [paid.name, paid.data]


@pytest.mark.parametrize("ours", [True, False])
async def test_events_are_waited_for_and_sent(ours: bool) -> None:
    """One operation with its timeout: the event's data, or null when none came; sent ones have an id of their own. The same
    with an engine that knows nothing of ours."""
    driver = engine(waits_for_events, "o1", ours=ours)
    driver.events = [(5_000, "order.paid", {"order": "o1"})]
    assert await driver.run() == ["order.paid", {"order": "o1"}]
    wait, emit = driver.ops
    assert (wait["op"], wait["eventName"], wait["timeoutMs"]) == ("WaitForEvent", "order.paid", 3_600_000)
    assert wait["eventIf"] == 'event.data.order == "o1"'
    assert wait.get("untilMs") == (START + 3_600_000 if ours else None)
    assert (emit["op"], emit["eventName"], emit["data"]) == ("Emit", "order.done", {"order": "o1"})
    assert emit["dedupeId"] == f"run-1.event.{emit['seq']}"
    driver = engine(waits_for_events, "o2", ours=ours)
    assert await driver.run() == "nobody paid"
    assert driver.now == START + 3_600_000


async def test_an_event_whose_data_is_null_is_an_event() -> None:
    """Our engine says which event it was; so null is no timeout."""
    memo = {"data": None, "event": {"id": "e1", "name": "order.paid", "at": START}, "order": 1, "at": START}
    driver = engine(waits_for_events, "o1")
    driver.memos[hash_of("event:order.paid")] = memo
    driver.seen = 0
    _, body = await driver.ask(driver.invoke())
    assert [one["op"] for one in body["opcodes"]] == ["Emit"]


async def test_what_no_expression_says_needs_our_engine() -> None:
    """A list in a match travels to our engine as it is; for another the author is told what to write instead."""

    @workflow("lists")
    async def flow(ctx: Context) -> None:
        await ctx.wait_for_event("e", match={"tags": ["a"]}, early=False)

    _, body = await one_pass(flow)
    assert body["opcodes"][0]["match"] == {"tags": ["a"]}
    assert body["opcodes"][0]["sinceMs"] == START
    status, body = await one_pass(flow, ours=False)
    assert status == 400
    assert "where=" in body["error"]["message"]


async def test_an_event_may_be_the_input() -> None:
    """Code that asks for the event gets the event; other code its data; a batch its list."""

    @workflow("whole", on="order.paid")
    async def whole(ctx: Context, event: Event[Order]) -> str:
        return f"{event.id} {event.name} {event.data.amount}"

    @workflow("batch", on="order.paid", batch=Batch(10, "1s"))
    async def batch(ctx: Context, orders: list[Order]) -> int:
        return sum(order.amount for order in orders)

    order = {"id": "o1", "amount": 3}
    driver = engine(whole, order)
    invoke = driver.invoke()
    invoke["event"] = {"name": "order.paid", "data": order, "id": "e1"}
    assert (await driver.ask(invoke))[1]["data"] == "e1 order.paid 3"
    driver = engine(batch, [order, order])
    assert await driver.run() == 6
