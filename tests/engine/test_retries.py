"""Retries of steps: how often, how soon, and that neither a crash nor an eviction loses or doubles an attempt (N16)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from durable import Context, NonRetryable, RetryAfter, RetryPolicy, StepFailed, current_step, workflow
from durable.core.journal import Entry
from durable.protocol.states import Activity
from tests.engine.world import Gate, World

QUICK = RetryPolicy(max_attempts=3, initial_delay=0.01, jitter=0.0)


class Teapot(ValueError):
    code = "teapot"


def delays(entries: list[Entry]) -> list[float]:
    """Seconds between each failure and the next attempt, as journaled."""
    notes = [(entry.at, msgspec.json.decode(entry.payload or b"{}")) for entry in entries if entry.status == "retrying"]
    return [(note["next_at"] - at) / 1e6 for at, note in notes]


async def _fails(world: World, policy: RetryPolicy | int, body: Callable[[], object]) -> tuple[StepFailed, list[Entry]]:
    caught: list[StepFailed] = []

    @workflow(name="fails")
    async def fails(ctx: Context) -> None:
        try:
            await ctx.step("body", body, retries=policy)
        except StepFailed as error:
            caught.append(error)

    app = await world.engine(fails)
    handle = await app.start(fails)
    await handle.result(10)
    await world.sound(handle.id)
    return caught[-1], await world.journal(handle.id)


async def test_N16_a_step_is_tried_max_attempts_times_and_then_raises_its_last_error(world: World) -> None:
    """`max_attempts` counts the first try; StepFailed carries the last error's message, code, type and the count."""
    tries: list[int] = []

    async def body() -> None:
        tries.append(current_step().attempt)
        raise Teapot(f"try {len(tries)}")

    error, entries = await _fails(world, QUICK, body)
    assert tries == [1, 2, 3]
    assert (error.key, error.attempts) == ("body", 3)
    assert error.error is not None
    assert (error.error.message, error.error.type) == ("try 3", "Teapot")
    steps = [(entry.status, entry.attempt) for entry in entries if entry.kind == "step" and entry.status != "started"]
    assert steps == [("retrying", 1), ("retrying", 2), ("failed", 3)]


async def test_N16_retries_zero_means_once(world: World) -> None:
    """`retries=0`: one try, no delay."""
    tries: list[int] = []

    async def body() -> None:
        tries.append(1)
        raise ValueError

    error, _ = await _fails(world, 0, body)
    assert (tries, error.attempts) == ([1], 1)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (RetryPolicy(4, "fixed", 0.02, jitter=0), [0.02, 0.02, 0.02]),
        (RetryPolicy(4, "linear", 0.02, jitter=0), [0.02, 0.04, 0.06]),
        (RetryPolicy(4, "exponential", 0.01, jitter=0), [0.01, 0.02, 0.04]),
        (RetryPolicy(4, "exponential", 0.01, max_delay=0.015, jitter=0), [0.01, 0.015, 0.015]),
    ],
    ids=["fixed", "linear", "exponential", "max_delay"],
)
async def test_N16_backoff_is_journaled_and_kept(world: World, policy: RetryPolicy, expected: list[float]) -> None:
    """Each delay is as the policy says, to the microsecond of the journal, and no attempt begins before its time."""
    began: list[int] = []

    async def body() -> None:
        began.append(world.apps[0].engine.clock.now())
        raise ValueError

    _, entries = await _fails(world, policy, body)
    assert delays(entries) == pytest.approx(expected, abs=0.005)
    notes = [msgspec.json.decode(entry.payload or b"{}") for entry in entries if entry.status == "retrying"]
    assert all(note["next_at"] <= moment for note, moment in zip(notes, began[1:], strict=True))


async def test_N16_jitter_stays_within_its_bounds(world: World) -> None:
    """With jitter 0.5 every delay lies between half and the whole of the base, and they differ."""

    async def body() -> None:
        raise ValueError

    _, entries = await _fails(world, RetryPolicy(9, "fixed", 0.02, jitter=0.5), body)
    found = delays(entries)
    assert len(found) == 8
    assert all(0.0099 <= delay <= 0.025 for delay in found)
    assert len({round(delay, 6) for delay in found}) > 1


@pytest.mark.parametrize(
    ("error", "policy"),
    [
        (NonRetryable("never"), QUICK),
        (Teapot("by class"), msgspec.structs.replace(QUICK, non_retryable=("Teapot",))),
        (RetryAfter("by code", seconds=0.01), msgspec.structs.replace(QUICK, non_retryable=("retry_after",))),
    ],
    ids=["NonRetryable", "class", "code"],
)
async def test_N16_non_retryable_ends_it_at_once(world: World, error: Exception, policy: RetryPolicy) -> None:
    """NonRetryable itself, a class name or a code in the policy: one try."""
    tries: list[int] = []

    async def body() -> None:
        tries.append(1)
        raise error

    failed, _ = await _fails(world, policy, body)
    assert (tries, failed.attempts) == ([1], 1)


async def test_N16_retry_after_is_a_lower_bound(world: World) -> None:
    """RetryAfter says when to come back, above what the policy would have waited."""

    async def body() -> None:
        raise RetryAfter("busy", seconds=0.05)

    _, entries = await _fails(world, QUICK, body)
    assert delays(entries) == pytest.approx([0.05, 0.05], abs=0.005)


async def test_N16_nothing_is_held_while_a_retry_waits(world: World) -> None:
    """In a long delay there is no body and no thread; evicted, there is not even a run in memory, and it says `retrying`."""

    async def body() -> None:
        raise ValueError

    @workflow(name="patient")
    async def patient(ctx: Context) -> None:
        await ctx.step("body", body, retries=RetryPolicy(initial_delay=3600, max_delay=7200))

    app = await world.engine(patient, hot_for=0.0)
    handle = await app.start(patient)
    record = await world.until(handle.id, lambda r: r.activity == Activity.RETRYING and r.owner is None)
    assert app.engine._executor.residents == {}
    assert record.wake_at is not None
    assert record.wake_at > app.engine.clock.now() + 3_000_000_000


async def test_N16_a_crash_in_the_delay_loses_and_doubles_no_attempt(world: World) -> None:
    """The next engine goes on with the next attempt, at its time; three attempts in all, over three engines."""
    tries: list[int] = []

    async def body() -> None:
        tries.append(current_step().attempt)
        raise ValueError(str(current_step().attempt))

    @workflow(name="durable-retries")
    async def retries(ctx: Context) -> str:
        try:
            await ctx.step("body", body, retries=RetryPolicy(initial_delay=0.2, backoff="fixed", jitter=0))
        except StepFailed as error:
            return f"{error.attempts} {error.error.message if error.error else ''}"
        return ""

    app = await world.engine(retries)
    handle = await app.start(retries)
    for count in (1, 2):
        await world.until_journal(handle.id, lambda lines, count=count: lines.count("step body retrying") == count)
        await world.waits(handle.id)
        await world.crash(app)
        app = await world.engine(retries)
    assert await app.run(handle.id).result(5) == "3 3"
    assert tries == [1, 2, 3]
    assert (await world.record(handle.id)).recovery_attempts == 0, "waiting is no crash of the run's"


async def test_N16_a_crash_in_an_attempt_repeats_that_attempt(world: World) -> None:
    """An attempt that was cut short is no failure of the body's: the same attempt runs again."""
    gate, tries = Gate(), []

    async def body() -> str:
        tries.append(current_step().attempt)
        if current_step().attempt == 1:
            raise ValueError
        await gate()
        return "done"

    @workflow(name="cut")
    async def cut(ctx: Context) -> str:
        result: str = await ctx.step("body", body, retries=QUICK)
        return result

    app = await world.engine(cut)
    handle = await app.start(cut)
    await gate.reached()
    await world.crash(app)
    app = await world.engine(cut)
    await gate.reached(2)
    gate.open()
    assert await app.run(handle.id).result(5) == "done"
    assert tries == [1, 2, 2]
    await world.sound(handle.id)


async def test_N16_retries_of_parallel_steps_are_each_its_own(world: World) -> None:
    """Two steps that fail at different times retry at their own times; neither delays the other."""
    tries: dict[str, int] = {"a": 0, "b": 0}

    async def body(name: str, good: int) -> int:
        tries[name] += 1
        if tries[name] < good:
            raise ValueError
        return tries[name]

    @workflow(name="pair")
    async def pair(ctx: Context) -> list[int]:
        policy = RetryPolicy(5, "fixed", 0.01, jitter=0)
        return list(await asyncio.gather(*(ctx.step(n, body, n, g, retries=policy) for n, g in (("a", 2), ("b", 4)))))

    app = await world.engine(pair)
    assert await app.start_and_wait(pair, timeout=5) == [2, 4]
