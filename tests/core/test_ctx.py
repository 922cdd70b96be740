"""What workflow code can ask for: names and keys, options, types, signals, children, and the small deterministic things."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable.core import payload
from durable.core.commands import Completed, Failed, RunStep, SendTask, StartChild
from durable.core.ctx import Context
from durable.core.definition import durable_step, workflow
from durable.core.errors import DefinitionError, PayloadError, ReservedId, StepFailed, WaitTimeout
from durable.core.retry import RetryPolicy
from tests.core.driver import START, Driver


@dataclass
class Order:
    id: str
    total: int = 0


async def charge(order: Order) -> Order:
    return order


def plain(*args: Any) -> Any:
    return args


@durable_step("payments.refund", retries=7, timeout="30s", group="eu")
async def refund(order: Order) -> Order:
    return order


class Payments:
    @durable_step("payments.charge", retries=1)
    async def charge(self, order: Order) -> Order:
        return order


@workflow("child", version="7")
async def child(ctx: Context, order: Order) -> Order:
    return order


def begun(fn: Any) -> Driver:
    driver = Driver(workflow(fn))
    driver.begin()
    return driver


def asked(fn: Any) -> Any:
    """The only command of a workflow that asks for one thing."""
    driver = begun(fn)
    assert not isinstance(driver.machine.outcome, Failed), driver.machine.outcome
    (command,) = driver.machine.outstanding.values()
    driver.machine.drop()
    return command


def raised(fn: Any) -> BaseException:
    """What a ctx call raises at the call."""
    caught: list[BaseException] = []

    async def wf(ctx: Context) -> None:
        try:
            await fn(ctx)
        except Exception as error:
            caught.append(error)

    driver = begun(wf)
    assert driver.asked[1] == []
    driver.machine.drop()
    return caught[0]


def output(driver: Driver) -> Any:
    outcome = driver.machine.outcome
    assert isinstance(outcome, Completed), outcome
    driver.machine.drop()
    return payload.decode(outcome.output, Any, what="output")


# ------------------------------------------------------------------ names and keys


def keys(*names: str) -> list[str]:
    async def wf(ctx: Context) -> None:
        for name in names:
            ctx.step(name, plain)
        await ctx.sleep(1)

    driver = begun(wf)
    found = list(driver.machine.outstanding)
    driver.machine.drop()
    return found


def test_keys_are_names_then_numbers() -> None:
    """The first of a name has the name as its key, repeats get `:1`, `:2` …"""
    assert keys("a", "b", "a", "a", "b") == ["a", "b", "a:1", "a:2", "b:1"]


def test_keys_step_over_names_that_look_like_keys() -> None:
    """A step that is called `a:1` keeps that key; a repeat of `a` takes the next one."""
    assert keys("a", "a:1", "a", "a:1", "a:1:1") == ["a", "a:1", "a:2", "a:1:1", "a:1:1:1"]


@given(st.lists(st.sampled_from(["a", "a:1", "a:2", "a:1:1", "b"]), max_size=30))
def test_keys_never_collide(names: list[str]) -> None:
    """Whatever the names, each command has a key of its own, and it begins with its name."""
    given_out = keys(*names)
    assert len(set(given_out)) == len(names)
    assert all(key.startswith(name) for key, name in zip(given_out, names, strict=True))


def test_keys_and_ordinals_are_given_at_the_call() -> None:
    """In the order of calls, not of awaits, and before anything is awaited."""

    async def wf(ctx: Context) -> None:
        first, second = ctx.step("a", plain), ctx.step("a", plain)
        await second
        await first

    driver = begun(wf)
    assert [(c.key, c.ordinal) for c in driver.machine.outstanding.values()] == [("a", 0), ("a:1", 1)]
    driver.machine.drop()


@pytest.mark.parametrize("name", ["__init", "rollback:a"])
def test_reserved_names_are_refused(name: str) -> None:
    """`__` and `rollback:` belong to the engine."""
    assert isinstance(raised(lambda ctx: ctx.step(name, plain)), ReservedId)


@pytest.mark.parametrize("name", ["", " a", "a\0", "a\ud800", "x" * 201, "two\nlines"])
def test_names_that_would_wedge_something_are_refused(name: str) -> None:
    """Empty, too long, NUL, a lone surrogate: refused at the call, with a sentence."""
    for call in (
        lambda ctx: ctx.step(name, plain),
        lambda ctx: ctx.remote(name),
        lambda ctx: ctx.child(name),
        lambda ctx: ctx.wait_for_signal(name),
    ):
        assert isinstance(raised(call), DefinitionError)


def test_a_refused_call_leaves_nothing_behind() -> None:
    """Neither ordinal nor key is used up by a call that was refused."""

    async def wf(ctx: Context) -> None:
        for bad in (object(), {1, object()}):
            with pytest.raises(PayloadError):
                ctx.step("a", plain, bad)
        with pytest.raises(DefinitionError):
            ctx.step("a", plain, timeout="soon")
        await ctx.step("a", plain)

    command = asked(wf)
    assert (command.key, command.ordinal) == ("a", 0)


# ------------------------------------------------------------------ steps


def test_a_step_is_named_or_names_itself() -> None:
    """`ctx.step("n", fn, a)`, `ctx.step(fn, a)`, and a durable step by its own name and options."""

    async def wf(ctx: Context) -> None:
        order = Order("1")
        ctx.step("n", charge, order)
        ctx.step(charge, order)
        ctx.step(refund, order)
        ctx.step("other", refund, order, retries=0)
        ctx.step(Payments().charge, order)
        await ctx.step("lambda", lambda: charge(order))

    driver = begun(wf)
    steps = [c for c in driver.machine.outstanding.values() if isinstance(c, RunStep)]
    driver.machine.drop()
    assert [step.name for step in steps] == ["n", "charge", "payments.refund", "other", "payments.charge", "lambda"]
    assert [step.options.retry.max_attempts for step in steps] == [3, 3, 8, 1, 2, 3]
    assert [step.options.timeout for step in steps] == [None, None, 30.0, 30.0, None, None]
    assert [step.returns for step in steps] == [Order, Order, Order, Order, Order, Any]
    assert steps[4].body(Order("2")).close() is None


def test_retries_count_those_after_the_first() -> None:
    """`retries=3` are four attempts; a policy is taken as it is; nonsense is refused."""

    async def wf(ctx: Context) -> None:
        ctx.step("a", plain, retries=3, timeout=timedelta(minutes=1))
        await ctx.step("b", plain, retries=RetryPolicy(max_attempts=9))

    driver = begun(wf)
    first, second = [c for c in driver.machine.outstanding.values() if isinstance(c, RunStep)]
    driver.machine.drop()
    assert (first.options.retry.max_attempts, first.options.timeout) == (4, 60.0)
    assert second.options.retry.max_attempts == 9
    assert isinstance(raised(lambda ctx: ctx.step("a", plain, retries=-1)), DefinitionError)


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("fn", [generator, async_generator])
def test_generators_are_refused(fn: Any) -> None:
    """A step returns one value."""
    assert "generator" in str(raised(lambda ctx: ctx.step(fn)))


def test_what_is_no_body_is_refused() -> None:
    """A coroutine, a missing body, an unbound method, a thing without a name: each with what to do."""

    async def coroutine(ctx: Context) -> None:
        made = charge(Order("1"))
        try:
            await ctx.step("a", made)  # type: ignore[call-overload]
        finally:
            made.close()

    assert "function" in str(raised(coroutine))
    assert "body" in str(raised(lambda ctx: ctx.step("a")))
    assert "instance" in str(raised(lambda ctx: ctx.step(Payments.charge, Order("1"))))
    assert "name" in str(raised(lambda ctx: ctx.step(object())))


def test_results_have_the_type_of_the_annotation() -> None:
    """Live and replayed, a result comes back as the body's annotation says, or as `returns` says."""
    types: list[str] = []

    async def wf(ctx: Context) -> None:
        for asking in (ctx.step(charge, Order("1")), ctx.step("b", plain, returns=Order), ctx.step("c", plain)):
            types.append(type(await asking).__name__)

    driver = begun(wf)
    for key in ("charge", "b", "c"):
        driver.answer(key, Order("1"))
    driver.machine.drop()
    live, types[:] = types[:], []
    driver.replayed()[0].drop()
    assert live == types == ["Order", "Order", "dict"]


def test_a_result_that_does_not_fit_is_an_error_at_the_wait() -> None:
    """A recorded result that the annotation no longer fits raises PayloadError in the code, naming the step."""
    error: list[str] = []

    async def wf(ctx: Context) -> None:
        try:
            await ctx.step(charge, Order("1"))
        except PayloadError as refused:
            error.append(str(refused))

    driver = begun(wf)
    driver.answer("charge", 5)
    assert "step 'charge'" in error[0]


def test_fingerprints_tell_arguments_apart() -> None:
    """Other arguments, another fingerprint; the same, the same; sets whatever the order of their hashes."""

    def fingerprint(*args: Any) -> str:
        async def wf(ctx: Context) -> None:
            await ctx.step("a", plain, *args)

        return str(asked(wf).fingerprint)

    assert fingerprint(1) == fingerprint(1) != fingerprint(2)
    assert fingerprint() != fingerprint([])
    assert fingerprint({"a", "b", "c"}) == fingerprint({"c", "b", "a"})


def test_remote_by_reference_and_by_name() -> None:
    """A reference brings its name, type and options; what is given at the call wins."""

    async def wf(ctx: Context) -> None:
        ctx.remote(refund, Order("1"))
        ctx.remote(Payments.charge, Order("1"), timeout="5s", retries=0, transport="fast", priority=3)
        await ctx.remote("other", {"a": 1}, returns=Order, group="us", heartbeat_timeout=9)

    driver = begun(wf)
    first, second, third = [c for c in driver.machine.outstanding.values() if isinstance(c, SendTask)]
    driver.machine.drop()
    assert (first.name, first.input, first.options.group) == ("payments.refund", b'{"id":"1","total":0}', "eu")
    assert (first.options.retry.max_attempts, first.options.timeout, first.returns) == (8, 30.0, Order)
    assert (second.name, second.options.timeout, second.options.retry.max_attempts) == ("payments.charge", 5.0, 1)
    assert (second.options.transport, second.options.priority) == ("fast", 3)
    assert (third.name, third.input, third.returns) == ("other", b'{"a":1}', Order)
    assert (third.options.group, third.options.heartbeat_timeout) == ("us", 9.0)
    assert isinstance(raised(lambda ctx: ctx.remote(charge, Order("1"))), DefinitionError)


def test_side_effects_are_steps_without_retries() -> None:
    """`ctx.side_effect(fn)` is journaled once and never tried again."""

    async def wf(ctx: Context) -> int:
        return await ctx.side_effect(lambda: 4)

    command = asked(wf)
    assert isinstance(command, RunStep)
    assert (command.name, command.options.retry.max_attempts) == ("side_effect", 1)


# ------------------------------------------------------------------ children


def test_a_child_has_an_id_of_its_parent_s() -> None:
    """`<run>.child.<ordinal>`; a reference brings name, version and types."""

    async def wf(ctx: Context) -> Any:
        ctx.step("a", plain)
        handle = ctx.start_child(child, Order("1"), on_parent_close="abandon")
        assert handle.run_id == "run-1.child.1"
        by_name = await ctx.child("other", 5, version="2", returns=int)
        return [type(await handle.result()).__name__, type(await handle.result()).__name__, by_name]

    driver = begun(wf)
    first, second = [c for c in driver.machine.outstanding.values() if isinstance(c, StartChild)]
    assert (first.workflow, first.version, first.input) == ("child", "7", b'{"id":"1","total":0}')
    assert (first.options.awaited, first.options.on_parent_close) == (False, "abandon")
    assert (second.workflow, second.version, second.child_id) == ("other", "2", "run-1.child.2")
    assert second.options.awaited
    driver.answer("child", Order("1"))
    driver.answer("other", 5)
    assert output(driver) == ["Order", "Order", 5]


def test_giving_up_the_wait_leaves_a_started_child_alone() -> None:
    """Only `handle.cancel()` ends it."""

    async def wf(ctx: Context) -> str:
        handle = ctx.start_child(child, Order("1"))
        try:
            async with asyncio.timeout(1):
                await handle.result()
        except TimeoutError:
            await ctx.sleep(1)
            handle.cancel()
            await ctx.sleep(1)
        return "ended"

    driver = begun(wf)
    driver.fire()
    assert list(driver.machine.outstanding) == ["child"]
    driver.fire()
    assert driver.asked[3][0].startswith("abandon child")
    driver.fire()
    assert output(driver) == "ended"


def test_a_started_child_outlives_a_run_that_returns() -> None:
    """It stays outstanding: what becomes of it is the engine's to say, by on_parent_close."""

    async def wf(ctx: Context) -> None:
        ctx.start_child(child, Order("1"))

    driver = begun(wf)
    assert driver.machine.outcome == Completed(b"null")
    assert list(driver.machine.outstanding) == ["child"]
    driver.machine.drop()


# ------------------------------------------------------------------ signals


def test_S16_early_signals_are_kept_and_taken_oldest_first() -> None:
    """A signal sent before its wait is buffered; each name has its own queue."""

    async def wf(ctx: Context) -> list[Any]:
        await ctx.step("a", plain)
        return [await ctx.wait_for_signal(name) for name in ("x", "y", "x")]

    driver = begun(wf)
    for name, value in (("x", 1), ("x", 2), ("y", 3)):
        driver.signal(name, value)
    driver.answer("a")
    assert output(driver) == [1, 3, 2]


def test_S17_a_signal_is_consumed_once_by_the_oldest_wait() -> None:
    """Two waits of one name get one signal each, in the order in which they asked."""

    async def wf(ctx: Context) -> list[Any]:
        return await ctx.gather(ctx.wait_for_signal("x"), ctx.wait_for_signal("x"))

    driver = begun(wf)
    assert driver.machine.signals_waited() == ["x", "x"]
    driver.signal("x", 1)
    assert driver.machine.signals_waited() == ["x"]
    driver.signal("x", 2)
    assert output(driver) == [1, 2]


def test_a_cancelled_wait_takes_no_signal() -> None:
    """The next wait gets it, and giving up a wait writes nothing."""

    async def wf(ctx: Context) -> Any:
        first = ctx.wait_for_signal("x", timeout="1h")
        await ctx.sleep(1)
        first.cancel()
        return await ctx.wait_for_signal("x")

    driver = begun(wf)
    driver.fire()
    assert [line.split()[:2] for line in driver.asked[2]] == [["signal", "signal:x:1"]]
    assert driver.machine.next_timer() is None
    driver.signal("x", 5)
    assert output(driver) == 5


def test_signals_time_out() -> None:
    """WaitTimeout, which is a TimeoutError; or the default; and a signal that comes later is kept."""

    async def wf(ctx: Context) -> list[Any]:
        with pytest.raises(WaitTimeout) as caught:
            await ctx.wait_for_signal("x", timeout=1)
        assert isinstance(caught.value, TimeoutError)
        default = await ctx.wait_for_signal("x", timeout="1s", default=None)
        return [default, await ctx.wait_for_signal("x", timeout=0, default="none"), await ctx.wait_for_signal("x")]

    driver = begun(wf)
    driver.fire()
    driver.fire()
    assert driver.machine.next_timer() is None
    driver.signal("x", 9)
    assert output(driver) == [None, "none", 9]


def test_signals_are_typed() -> None:
    """`type` decides what comes back; one that does not fit is an error at the wait, and is consumed."""

    async def wf(ctx: Context) -> list[Any]:
        first = await ctx.wait_for_signal("x", type=Order)
        assert isinstance(first, Order)
        with pytest.raises(PayloadError, match="signal"):
            await ctx.wait_for_signal("x", type=Order)
        return [await ctx.wait_for_signal("x", type=int)]

    driver = begun(wf)
    for value in (Order("1"), "no order", 3):
        driver.signal("x", value)
    assert output(driver) == [3]


# ------------------------------------------------------------------ time and chance


def test_sleep_reads_durations() -> None:
    """Seconds, text and timedeltas; sleep_until takes an aware moment, and one that has passed is no wait."""

    async def wf(ctx: Context) -> None:
        for duration in (1.5, "2s", timedelta(milliseconds=5)):
            await ctx.sleep(duration)
        await ctx.sleep_until(datetime(2000, 1, 1, tzinfo=UTC))
        await ctx.sleep_until(ctx.now() + timedelta(days=1))

    driver = begun(wf)
    at = START
    for delay in (1_500_000, 2_000_000, 5_000, 86_400_000_000):
        at += delay
        timer = driver.machine.next_timer()
        assert timer is not None
        assert timer.deadline == at
        driver.fire()
    assert output(driver) is None
    assert isinstance(raised(lambda ctx: ctx.sleep("soon")), DefinitionError)
    assert isinstance(raised(lambda ctx: ctx.sleep_until(datetime(2030, 1, 1))), DefinitionError)


def test_a_cancelled_sleep_takes_its_timer_away() -> None:
    """Cancelling the future is enough."""

    async def wf(ctx: Context) -> None:
        ctx.sleep(1).cancel()
        await ctx.sleep(5)

    driver = begun(wf)
    timer = driver.machine.next_timer()
    assert timer is not None
    assert timer.ordinal == 1
    driver.machine.drop()


def test_now_is_the_turn_s_time() -> None:
    """Aware, UTC, still within a turn, and the same on replay."""
    seen: list[datetime] = []

    async def wf(ctx: Context) -> None:
        seen.extend([ctx.now(), ctx.now()])
        await ctx.sleep(60)
        seen.append(ctx.now())

    driver = begun(wf)
    driver.fire()
    live, seen[:] = seen[:], []
    driver.replayed()[0].drop()
    driver.machine.drop()
    assert live == seen
    assert live[0] == live[1] == datetime.fromtimestamp(START / 1e6, UTC)
    assert live[2] - live[0] == timedelta(minutes=1)


def test_random_and_uuid_come_from_the_run() -> None:
    """The same on every replay, different between runs, and no rows."""

    async def wf(ctx: Context) -> list[str]:
        return [str(ctx.random()), str(ctx.uuid()), str(ctx.uuid())]

    driver = begun(wf)
    assert driver.asked[1] == []
    first = output(driver)
    assert first == output(begun(wf))
    other = Driver(workflow(wf), run_id="another")
    other.begin()
    assert set(output(other)).isdisjoint(first)
    assert first[1] != first[2]
    assert first[1][14] == "4"


# ------------------------------------------------------------------ gather and log


def test_gather_all_gives_up_the_rest_on_the_first_error() -> None:
    """Results in order; the first error comes out and the others are abandoned."""

    async def good(ctx: Context) -> Any:
        return await ctx.gather(ctx.step("a", plain), ctx.step("b", plain))

    driver = begun(good)
    driver.answer("b", 2)
    driver.answer("a", 1)
    assert output(driver) == [1, 2]

    async def bad(ctx: Context) -> str:
        with pytest.raises(StepFailed):
            await ctx.gather(ctx.step("a", plain), ctx.step("b", plain), ctx.sleep(9))
        await ctx.step("c", plain)
        return "gone on"

    driver = begun(bad)
    driver.fail("b")
    assert [line.split()[0] for line in driver.asked[2]] == ["abandon", "step"]
    assert driver.machine.next_timer() is None
    driver.answer("c")
    assert output(driver) == "gone on"


def test_gather_settled_waits_for_all() -> None:
    """Results and errors, in order."""

    async def wf(ctx: Context) -> list[str]:
        results = await ctx.gather(ctx.step("a", plain), ctx.step("b", plain), mode="settled")
        return [type(result).__name__ for result in results]

    driver = begun(wf)
    driver.fail("a")
    driver.answer("b", 1)
    assert output(driver) == ["StepFailed", "int"]


def test_B15_gather_first_tears_the_losers_down() -> None:
    """A race of a signal and a step: the step wins, the wait is gone, and the run ends at once."""

    async def wf(ctx: Context) -> Any:
        return await ctx.gather(ctx.wait_for_signal("x", timeout="1d"), ctx.step("a", plain), mode="first")

    driver = begun(wf)
    driver.answer("a", 5)
    assert driver.machine.outstanding == {}
    assert driver.machine.next_timer() is None
    assert output(driver) == 5


def test_gather_of_nothing() -> None:
    """Nothing to wait for is done; a race of nothing, or an unknown mode, is refused."""

    async def wf(ctx: Context) -> Any:
        return [await ctx.gather(), await ctx.gather(mode="settled")]

    assert output(begun(wf)) == [[], []]
    assert isinstance(raised(lambda ctx: ctx.gather(mode="first")), DefinitionError)
    assert isinstance(raised(lambda ctx: ctx.gather(mode="some")), DefinitionError)


def test_log_lines_count_from_zero_and_are_told_once() -> None:
    """Lines that are stored already are not told again, however often the body is replayed."""

    async def wf(ctx: Context) -> None:
        ctx.log.debug("a")
        ctx.log.warning("b", value=1)
        await ctx.sleep(1)
        ctx.log.error("c")

    driver = begun(wf)
    assert [(note.index, note.level, note.fields) for note in driver.issued[1]] == [
        (0, "debug", None), (1, "warn", b'{"value":1}'),
    ]  # fmt: skip
    machine = driver.fresh(logs=1)
    assert [note.message for note in machine.replay(driver.journal)] == ["b"]
    machine.drop()
    assert isinstance(raised(lambda ctx: asyncio.sleep(0, ctx.log.info("x", bad=object()))), PayloadError)
    driver.machine.drop()


def test_a_context_says_whose_it_is() -> None:
    """Run id, workflow and version."""

    async def wf(ctx: Context) -> list[str]:
        return [ctx.run_id, ctx.workflow, ctx.version]

    assert output(begun(wf)) == ["run-1", "wf", "1"]
