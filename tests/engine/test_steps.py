"""Local steps: bodies run at least once, results are journaled once, and what is refused fails the step, never the engine."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest

from durable import Context, DurableError, NonRetryable, RunFailed, StepFailed, current_step, durable_step, workflow
from durable.core.errors import DefinitionError, PayloadError, StoreUnavailable
from durable.core.payload import restore
from durable.core.replay import Machine
from tests.engine.world import Gate, World


async def test_S4_a_result_is_journaled_once_and_replay_returns_it(world: World) -> None:
    """A body may run twice; what the workflow goes on with is the first committed result, before and after a crash."""
    drawn: list[float] = []
    seen: list[float] = []

    def draw() -> float:
        drawn.append(random.random())
        return drawn[-1]

    @workflow(name="draw")
    async def lottery(ctx: Context) -> float:
        number: float = await ctx.step("draw", draw)
        seen.append(number)
        await ctx.wait_for_signal("go")
        return number

    app = await world.engine(lottery)
    handle = await app.start(lottery)
    await world.until_journal(handle.id, lambda lines: "step draw completed" in lines)
    await world.crash(app)
    other = await world.engine(lottery)
    await other.run(handle.id).signal("go")
    assert await other.run(handle.id).result(5) == drawn[0]
    assert len(drawn) == 1
    assert len(seen) >= 2, "it was replayed"
    assert set(seen) == {drawn[0]}
    await world.sound(handle.id)


async def test_S4_a_body_cut_short_runs_again_and_commits_once(world: World) -> None:
    """A crash in the middle of a body: the next engine runs it again, as the same attempt, and one result is journaled."""
    gate, attempts = Gate(), []

    async def body() -> str:
        attempts.append(current_step().attempt)
        await gate()
        return f"body {gate.came}"

    @workflow(name="twice")
    async def twice(ctx: Context) -> str:
        result: str = await ctx.step("body", body)
        return result

    app = await world.engine(twice)
    handle = await app.start(twice)
    await gate.reached()
    await world.until_journal(handle.id, lambda lines: "step body started" in lines)
    await world.crash(app)
    other = await world.engine(twice)
    await gate.reached(2)
    gate.open()
    assert await other.run(handle.id).result(5) == "body 2"
    assert attempts == [1, 1]
    assert (await world.statuses(handle.id, "step")).count("completed") == 1
    await world.sound(handle.id)


async def test_a_fast_step_costs_one_row_and_the_last_one_shares_its_commit(world: World) -> None:
    """The `started` mark of a body that is faster than a commit is dropped; its result and the outcome are one commit."""

    @workflow(name="quick")
    async def quick(ctx: Context) -> int:
        total = 0
        for n in range(3):
            total += await ctx.step("add", lambda n=n: asyncio.sleep(0, n))
        return total

    app = await world.engine(quick, tick=5.0)
    handle = await app.start(quick)
    assert await handle.result(5) == 3
    assert await world.statuses(handle.id) == [
        "run started",
        "step add completed",
        "step add:1 completed",
        "step add:2 completed",
        "run completed",
    ]
    # One before each body that has something uncommitted before it, and one for the end.
    assert world.line(app).calls["commit"] == 3


async def test_no_body_begins_before_what_led_to_it_is_durable(world: World) -> None:
    """The barrier: when a body runs, every earlier result is in the store already."""
    seen: list[list[str]] = []

    async def look() -> None:
        seen.append([line for line in await world.statuses(current_step().run_id) if "completed" in line])

    @workflow(name="barrier")
    async def barrier(ctx: Context) -> None:
        await ctx.step("one", look)
        await ctx.step("two", look)
        await asyncio.gather(ctx.step("three", look), ctx.step("four", look))

    app = await world.engine(barrier)
    await app.start_and_wait(barrier, timeout=5)
    one, two = "step one completed", "step two completed"
    assert seen == [[], [one], [one, two], [one, two]]


async def test_parallel_steps_run_together_and_keep_their_keys(world: World) -> None:
    """gather, TaskGroup and repeats of a name: bodies overlap, keys are given at the call, results come to their callers."""
    gate = Gate()

    async def body(n: int) -> int:
        await gate()
        return n

    @workflow(name="fan")
    async def fan(ctx: Context) -> list[int]:
        first = await asyncio.gather(*(ctx.step("part", body, n) for n in range(3)))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ctx.step("part", body, n)) for n in range(3, 5)]
        return [*first, *(task.result() for task in tasks)]

    app = await world.engine(fan)
    handle = await app.start(fan)
    await gate.reached(3)
    gate.open()
    assert await handle.result(5) == [0, 1, 2, 3, 4]
    keys = {entry.key for entry in await world.journal(handle.id) if entry.kind == "step"}
    assert keys == {"part", "part:1", "part:2", "part:3", "part:4"}


async def test_a_plain_function_runs_in_a_thread_and_does_not_hold_the_loop(world: World) -> None:
    """A `def` body may block: others go on, and it sees a copy of the context variables of its call."""
    release, where = threading.Event(), []
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    def block() -> str:
        where.append(threading.current_thread())
        assert release.wait(5)
        return variable.get()

    @workflow(name="threads")
    async def threads(ctx: Context) -> str:
        variable.set("set")
        result: str = await ctx.step("block", block)
        return result

    @workflow(name="other")
    async def other(ctx: Context) -> str:
        return "went on"

    app = await world.engine(threads, other)
    handle = await app.start(threads)
    assert await app.start_and_wait(other, timeout=5) == "went on"
    release.set()
    assert await handle.result(5) == "set"
    assert where[0] is not threading.main_thread()


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
async def test_a_plain_remote_step_does_not_hold_the_loop_either(world: World, remote: bool) -> None:
    """A `def` step served in this process blocks its thread and nothing else, with its scope at hand."""
    release = threading.Event()

    @durable_step("block")
    def block() -> list[str]:
        assert release.wait(5)
        return [current_step().run_id, threading.current_thread().name]

    @workflow(name="blocks")
    async def blocks(ctx: Context) -> list[str]:
        result: list[str] = await (ctx.remote(block) if remote else ctx.step(block))
        return result

    app = await world.engine(blocks, block)
    handle = await app.start(blocks)
    ticks = 0
    for _ in range(20):
        await asyncio.sleep(0.002)
        ticks += 1
    release.set()
    run_id, thread = await handle.result(5)
    assert (run_id, ticks) == (handle.id, 20)
    assert thread != threading.main_thread().name


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
async def test_a_body_that_raises_stop_iteration_is_heard_of(world: World, remote: bool) -> None:
    """`next()` on nothing in a plain `def` body: a failed step, not a run that waits for ever."""

    @durable_step("stops", retries=0)
    def stops() -> int:
        return next(iter(list[int]()))

    @workflow(name="stops-run")
    async def stops_run(ctx: Context) -> str:
        try:
            await (ctx.remote(stops) if remote else ctx.step(stops))
        except StepFailed as error:
            return error.error.message if error.error else ""
        return ""

    app = await world.engine(stops_run, stops)
    assert "StopIteration" in await app.start_and_wait(stops_run, timeout=5)


async def test_a_step_by_reference_brings_its_options(world: World) -> None:
    """`ctx.step(decorated)` takes name, retries and timeout from the decorator; the call may override them."""
    tries: list[int] = []

    @durable_step("fetch", retries=0)
    async def fetch(n: int) -> int:
        tries.append(n)
        raise ValueError("no")

    @workflow(name="reference")
    async def reference(ctx: Context) -> int:
        try:
            await ctx.step(fetch, 7)
        except StepFailed as error:
            return error.attempts
        return 0

    app = await world.engine(reference)
    assert await app.start_and_wait(reference, timeout=5) == 1
    assert tries == [7]


def _generator() -> Iterator[int]:
    yield 1


async def _async_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("body", [_generator, _async_generator, 7], ids=["generator", "async-generator", "number"])
async def test_what_cannot_be_a_body_is_refused_at_the_call(world: World, body: Any) -> None:
    """A generator or a number as a step is a DefinitionError in the workflow, with what to do."""

    @workflow(name="odd")
    async def odd(ctx: Context) -> str:
        try:
            await ctx.step("odd", body)
        except DefinitionError as error:
            return str(error)
        return ""

    app = await world.engine(odd)
    message = await app.start_and_wait(odd, timeout=5)
    assert "'odd'" in message
    assert "function" in message or "Return a list" in message


async def test_a_lambda_that_makes_a_generator_fails_its_step(world: World) -> None:
    """A generator object as a result is no JSON value: the step fails with the type's name, without a retry."""
    calls: list[int] = []

    @workflow(name="hidden")
    async def hidden(ctx: Context) -> str:
        def body() -> Any:
            calls.append(1)
            return _generator()

        try:
            await ctx.step("hidden", body)
        except StepFailed as error:
            assert error.error is not None
            return f"{error.error.code}: {error.error.message}"
        return ""

    app = await world.engine(hidden)
    message = await app.start_and_wait(hidden, timeout=5)
    assert message.startswith("payload_type")
    assert "generator" in message
    assert calls == [1]


class Cursed:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __reduce__(self) -> Any:
        raise RuntimeError("no reduce")


class Beyond(BaseException):
    """Not an Exception, as some libraries' are."""


class CursedError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (object(), "payload_type"),
        (Cursed(), "payload_type"),
        (float("inf"), "payload_type"),
        ({"deep": "a\0b"}, "payload_text"),
        ("\udc00", "payload_text"),
    ],
    ids=["object", "cursed", "infinity", "nul", "surrogate"],
)
async def test_B33_a_result_that_cannot_be_kept_fails_its_step(world: World, value: Any, code: str) -> None:
    """A bad result is a typed failure of that step, not retried; the run goes on and settles."""
    calls: list[int] = []

    @workflow(name="bad")
    async def bad(ctx: Context) -> str:
        async def body() -> Any:
            calls.append(1)
            return value

        try:
            await ctx.step("bad", body)
        except StepFailed as error:
            assert error.error is not None
            return error.error.code
        return ""

    app = await world.engine(bad)
    assert await app.start_and_wait(bad, timeout=5) == code
    assert calls == [1]


@pytest.mark.parametrize("text", ["a\0b", "half \ud800 pair", "\\u0000 as text"])
async def test_B33_an_error_text_with_nul_or_surrogates_settles_and_is_reversible(world: World, text: str) -> None:
    """Whatever an error says, its step and its run fail with it, and the text can be had back exactly."""

    @workflow(name="text")
    async def fails(ctx: Context) -> None:
        async def body() -> None:
            raise NonRetryable(text)

        await ctx.step("body", body)

    app = await world.engine(fails)
    handle = await app.start(fails)
    with pytest.raises(RunFailed):
        await handle.result(5)
    failed = next(entry for entry in await world.journal(handle.id) if entry.status == "failed")
    assert failed.payload is not None
    assert restore(msgspec.json.decode(failed.payload)["message"]) == text


@pytest.mark.parametrize(
    "error",
    [MemoryError("much"), RecursionError("deep"), SystemExit(3), CursedError(), Beyond()],
    ids=lambda error: type(error).__name__,
)
async def test_an_odd_exception_in_a_body_fails_the_step_and_nothing_else(world: World, error: BaseException) -> None:
    """Out of memory, too deep, an exit, an error without a text: each is a failed step; the engine and its neighbours go on."""

    @workflow(name="odd")
    async def odd(ctx: Context) -> str:
        async def body() -> None:
            raise error

        try:
            await ctx.step("odd", body, retries=0)
        except StepFailed as failed:
            assert failed.error is not None
            return failed.error.type
        return ""

    app = await world.engine(odd)
    assert await app.start_and_wait(odd, timeout=5) == type(error).__name__
    assert app.engine.trouble is None
    assert await app.start_and_wait(odd, timeout=5) == type(error).__name__


async def test_arguments_that_cannot_be_kept_are_refused_at_the_call(world: World) -> None:
    """Arguments are fingerprinted, so they must be JSON: a PayloadError at the call that the workflow may catch."""

    @workflow(name="arguments")
    async def arguments(ctx: Context) -> str:
        try:
            await ctx.step("body", lambda x: x, object())
        except PayloadError as error:
            return str(error)
        return ""

    app = await world.engine(arguments)
    assert "the arguments of step 'body'" in await app.start_and_wait(arguments, timeout=5)


async def test_X7_an_oversize_result_fails_its_step_with_a_typed_error(world: World) -> None:
    """A result above the limit fails the step at once with `payload_too_large` and what to do; the run goes on."""
    calls: list[int] = []

    @workflow(name="large")
    async def large(ctx: Context) -> str:
        async def body() -> bytes:
            calls.append(1)
            return b"x" * (70 << 20)

        try:
            await ctx.step("large", body)
        except StepFailed as error:
            assert error.error is not None
            return f"{error.error.code}: {error.error.message}"
        return ""

    app = await world.engine(large)
    message = await app.start_and_wait(large, timeout=10)
    assert message.startswith("payload_too_large")
    assert "limit" in message
    assert calls == [1]


async def test_S36_an_oversize_outcome_fails_the_run_and_never_wedges_it(world: World) -> None:
    """A workflow whose result is too large fails with `payload_too_large`; the error names the limit."""

    @workflow(name="large")
    async def large(ctx: Context) -> str:
        return "x" * (70 << 20)

    app = await world.engine(large)
    with pytest.raises(RunFailed) as caught:
        await app.start_and_wait(large, timeout=10)
    assert caught.value.error is not None
    assert caught.value.error.code == "payload_too_large"


async def test_B34_an_error_that_looks_like_the_stores_is_the_steps_own(world: World) -> None:
    """A body that raises StoreUnavailable fails its step like any other error; the committer does not retry it."""

    @workflow(name="inner")
    async def inner(ctx: Context) -> None:
        raise StoreUnavailable("database is locked")

    @workflow(name="outer")
    async def outer(ctx: Context) -> list[str]:
        codes = []
        for body in (ctx.step("step", _unavailable, retries=0), ctx.child(inner)):
            try:
                await body
            except StepFailed as error:
                assert error.error is not None
                codes.append(error.error.code)
        return codes

    app = await world.engine(inner, outer)
    handle = await app.start(outer)
    assert await handle.result(5) == ["store_unavailable", "store_unavailable"]
    assert app.engine.trouble is None
    await world.sound(handle.id)


async def _unavailable() -> None:
    raise StoreUnavailable("connection reset by peer")


async def test_ctx_in_a_body_is_refused(world: World) -> None:
    """A body that reaches for its workflow's ctx gets an error that says so; nothing is journaled by it."""

    @workflow(name="reach")
    async def reach(ctx: Context) -> str:
        async def body() -> str:
            try:
                await ctx.step("inner", lambda: 1)
            except DurableError as error:
                return str(error)
            return ""

        result: str = await ctx.step("outer", body)
        return result

    app = await world.engine(reach)
    handle = await app.start(reach)
    assert "step body" in await handle.result(5)
    assert "inner" not in {entry.key for entry in await world.journal(handle.id)}


async def test_a_step_knows_itself(world: World) -> None:
    """`current_step()` tells run, key, attempt and an idempotency key that is the same for every attempt."""
    told: list[tuple[str, str, int, str]] = []

    async def body() -> None:
        step = current_step()
        told.append((step.run_id, step.key, step.attempt, step.idempotency_key))
        if step.attempt == 1:
            raise ValueError

    from durable import RetryPolicy

    @workflow(name="self")
    async def itself(ctx: Context) -> None:
        await ctx.step("body", body, retries=RetryPolicy(initial_delay=0.001))

    app = await world.engine(itself)
    handle = await app.start(itself)
    await handle.result(5)
    assert told == [(handle.id, "body", 1, f"{handle.id}:0"), (handle.id, "body", 2, f"{handle.id}:0")]
    with pytest.raises(DurableError, match="outside a step body"):
        current_step()


async def test_B51_five_thousand_steps_replay_in_linear_time_from_one_read(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A long journal is read once when it is taken over, and replaying five times the steps costs about five times as much."""

    @workflow(name="long")
    async def long(ctx: Context, count: int) -> int:
        parts = await asyncio.gather(*(ctx.step("part", _nothing) for _ in range(count)))
        await ctx.wait_for_signal("go")
        return len(parts)

    caplog.set_level(logging.WARNING)
    app = await world.engine(long)
    handles = {count: await app.start(long, count) for count in (1_000, 5_000)}
    for handle in handles.values():
        await world.until(handle.id, lambda r: r.activity == "waiting")
    await world.crash(app)
    other = await world.engine(long)
    for count, handle in handles.items():
        await other.run(handle.id).signal("go")
        assert await other.run(handle.id).result(15) == count
    store: Any = await world.store()
    if not world.cold:
        assert world.line(other).calls["load"] <= 2

    def replay(count: int) -> int:
        """Function calls a replay makes: work, whatever else the machine is doing."""
        calls = 0

        def counts(*_: object) -> None:
            nonlocal calls
            calls += 1

        machine = Machine(other.registry.latest("long"), run_id=handles[count].id, input=b"%d" % count)
        sys.setprofile(counts)
        try:
            machine.replay(asyncio_journals[count])
        finally:
            sys.setprofile(None)
        machine.drop()
        return calls

    asyncio_journals = {}
    for count, handle in handles.items():
        (journal,) = await store.load([handle.id])
        asyncio_journals[count] = [
            entry for entry in journal.entries if entry.kind != "run" or entry.status == "started"
        ]
    ratios: list[float] = []
    done = asyncio.Event()

    def measure() -> None:
        ratios.append(replay(5_000) / replay(1_000))
        done.set()

    asyncio.get_running_loop().call_soon(measure)
    await done.wait()
    assert ratios[0] < 7, "quadratic would be 25"


async def _nothing() -> None: ...
