"""Replay is a function: what it feeds, what it compares, what it says is new, and how a run ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest

from durable.core import payload
from durable.core.commands import Abandon, Cancelled, Completed, Failed, Patch, WriteLog
from durable.core.ctx import Context
from durable.core.definition import workflow
from durable.core.errors import ChildFailed, ErrorData, NonDeterminism, StepFailed, StepTimeout
from durable.core.journal import PATCHED, RUN, STEP, Entry
from durable.core.replay import PYTHON, Machine
from tests.core.driver import Driver, state, told

Body = Callable[[Context], Awaitable[Any]]


async def body(*args: Any) -> int:
    return 1


def begun(fn: Body) -> Driver:
    driver = Driver(workflow(fn))
    driver.begin()
    return driver


def changed(driver: Driver, fn: Body) -> Driver:
    """The same journal under other code."""
    other = Driver(workflow(fn))
    other.journal = driver.journal
    return other


def mismatch(driver: Driver, fn: Body) -> NonDeterminism:
    """Replaying the journal under `fn` is refused; the machine is good for nothing then but drop."""
    driver.machine.drop()
    other = changed(driver, fn)
    machine = other.machine
    with pytest.raises(NonDeterminism) as caught:
        machine.replay(other.journal)
    with pytest.raises(NonDeterminism):
        machine.deliver(other.append(RUN, "cancelling"))
    machine.drop()
    return caught.value


def error_of(driver: Driver) -> ErrorData:
    outcome = driver.machine.outcome
    assert isinstance(outcome, Failed), outcome
    return payload.decode_error(outcome.error)


# ------------------------------------------------------------------ what is new


def test_replay_returns_what_the_journal_does_not_show() -> None:
    """Commands without a trace are new; those with one are outstanding with it; answered ones are gone."""

    async def wf(ctx: Context) -> None:
        await asyncio.gather(ctx.step("a", body), ctx.step("b", body), ctx.step("c", body))

    driver = begun(wf)
    driver.mark(driver.machine.outstanding["b"])
    driver.answer("a", 1)
    machine, news = driver.replayed()
    assert [told(item).split()[1] for item in news] == ["c"]
    assert list(machine.outstanding) == ["b", "c"]
    assert [entry.status for entry in machine.trace("b")] == ["started"]
    assert machine.trace("c") == []
    assert state(machine) == state(driver.machine)


def test_S4_replay_returns_the_recorded_result() -> None:
    """A journaled result is what every replay hands to the code, whatever the body would return now."""

    async def wf(ctx: Context) -> Any:
        return await ctx.step("a", body)

    driver = begun(wf)
    driver.answer("a", 42)
    for _ in range(2):
        machine, news = driver.replayed()
        assert news == []
        assert machine.outcome == Completed(b"42")
        machine.drop()


def test_notes_are_told_once() -> None:
    """A marked patch, a stored log line and a journaled cancellation are not told again."""

    async def wf(ctx: Context) -> None:
        ctx.log.info("one", n=1)
        if ctx.patched("p"):
            ctx.log("two", level="error")
        step = ctx.step("a", body)
        await ctx.sleep(1)
        step.cancel()
        await ctx.sleep(1)

    driver = begun(wf)
    first = driver.issued[1]
    assert [type(item) for item in first[:3]] == [Patch, WriteLog, WriteLog]
    assert [(item.index, item.level, item.message) for item in first[1:3]] == [(0, "info", "one"), (1, "error", "two")]
    for item in first[:-1]:
        driver.mark(item)
    (abandon,) = driver.fire()
    assert isinstance(abandon, Abandon)
    assert [told(item) for item in driver.go_cold()] == [told(abandon)]
    driver.mark(abandon)
    assert driver.go_cold() == []
    driver.machine.drop()


def test_a_command_given_up_in_its_own_turn_never_was() -> None:
    """Asked for and cancelled in one turn: neither is told, only the ordinal is used up."""

    async def wf(ctx: Context) -> None:
        ctx.step("a", body).cancel()
        await ctx.step("b", body)

    driver = begun(wf)
    assert [line.split()[:3] for line in driver.asked[1]] == [["step", "b", "1"]]
    driver.machine.drop()


def test_late_results_are_ignored() -> None:
    """A late result is in the journal and never handed to the code."""

    async def wf(ctx: Context) -> None:
        with_timeout = ctx.step("a", body)
        await asyncio.wait([with_timeout], timeout=1)
        with_timeout.cancel()
        await ctx.step("b", body)

    driver = begun(wf)
    command = driver.machine.outstanding["a"]
    for item in driver.fire():
        driver.mark(item)
    driver.append(status="late", payload=b"1", **driver.of(command))
    machine, news = driver.replayed()
    assert news == []
    assert state(machine) == state(driver.machine)


def test_a_cold_wait_is_the_hot_one() -> None:
    """Timers and waits for signals survive a drop, with the same deadlines and ordinals."""

    async def wf(ctx: Context) -> None:
        ctx.sleep(50)
        await ctx.wait_for_signal("go", timeout=10)

    driver = begun(wf)
    before = state(driver.machine)
    driver.go_cold()
    assert state(driver.machine) == before
    assert driver.machine.signals_waited() == ["go"]
    driver.machine.drop()


def test_B51_five_thousand_steps_replay_in_linear_work() -> None:
    """Replaying twice as many steps delivers twice as many entries and runs twice as many callbacks, no more."""

    async def wf(ctx: Context, steps: int) -> int:
        for _ in range(steps):
            await ctx.step("a", body, 1)
        return steps

    def work(steps: int) -> int:
        definition = workflow(wf)
        driver = Driver(definition, steps)
        driver.begin()
        for index in range(steps):
            driver.answer("a" if index == 0 else f"a:{index}", 1)
        machine = driver.fresh()
        ready = machine.loop._ready = Counted()
        machine.replay(driver.journal)
        assert machine.outcome is not None
        machine.drop()
        return ready.taken

    small, large = work(500), work(5_000)
    assert 9 < large / small < 11


class Counted(deque[Any]):
    """A deque that counts what is taken from it."""

    taken = 0

    def popleft(self) -> Any:
        self.taken += 1
        return super().popleft()


def test_B43_a_step_that_was_started_is_driven_again() -> None:
    """A step whose attempt hung with its engine is outstanding after replay, with its trace: nothing waits on itself."""

    async def wf(ctx: Context) -> Any:
        return await ctx.step("a", body)

    driver = begun(wf)
    driver.mark(driver.machine.outstanding["a"])
    assert driver.go_cold() == []
    assert [entry.status for entry in driver.machine.trace("a")] == ["started"]
    driver.answer("a", 1)
    assert driver.machine.outcome == Completed(b"1")


# ------------------------------------------------------------------ journal and code disagree


async def two_steps(ctx: Context) -> None:
    await ctx.step("a", body, 1)
    await ctx.step("b", body, 2)


def recorded() -> Driver:
    driver = begun(two_steps)
    driver.answer("a", 1)
    driver.answer("b", 2)
    return driver


async def _renamed(ctx: Context) -> None:
    await ctx.step("A", body, 1)
    await ctx.step("b", body, 2)


async def _other_kind(ctx: Context) -> None:
    await ctx.remote("a", 1)
    await ctx.step("b", body, 2)


async def _other_arguments(ctx: Context) -> None:
    await ctx.step("a", body, 99)
    await ctx.step("b", body, 2)


async def _other_order(ctx: Context) -> None:
    await ctx.step("b", body, 2)
    await ctx.step("a", body, 1)


async def _inserted(ctx: Context) -> None:
    await ctx.step("new", body)
    await two_steps(ctx)


async def _removed(ctx: Context) -> None:
    await ctx.step("b", body, 2)


async def _timer_inserted(ctx: Context) -> None:
    async with asyncio.timeout(9):
        await ctx.step("a", body, 1)
    await ctx.step("b", body, 2)


async def _ends_early(ctx: Context) -> None:
    await ctx.step("a", body, 1)


async def _gives_up(ctx: Context) -> None:
    first = ctx.step("a", body, 1)
    first.cancel()
    await ctx.step("b", body, 2)


CHANGES = [
    _renamed, _other_kind, _other_arguments, _other_order, _inserted, _removed, _timer_inserted, _ends_early, _gives_up,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_S34_changed_code_is_found_before_anything_comes_of_it(change: Body) -> None:
    """Each way of changing code under a run is a NonDeterminism at the first entry that differs, and it sticks."""
    error = mismatch(recorded(), change)
    at_b = change is _ends_early
    assert error.position == (3 if at_b else 2)
    assert error.recorded.startswith("step 'b' completed" if at_b else "step 'a' completed")
    assert error.asked
    assert "ctx.patched" in str(error)
    assert "version" in str(error)


def test_S34_both_sides_are_shown() -> None:
    """The message shows what is recorded and what the code asks for, arguments included."""
    error = mismatch(recorded(), _other_arguments)
    assert "at ordinal 0 with arguments" in error.recorded
    assert error.asked.startswith("step 'a' at ordinal 0 with arguments")
    assert error.asked.split()[-1] != error.recorded.split()[-1]
    assert error.recorded in str(error)
    assert error.asked in str(error)


def test_S34_swapped_steps_of_one_name_are_found() -> None:
    """Two steps of the same name with their arguments swapped differ by fingerprint."""

    def steps(*values: int) -> Body:
        async def wf(ctx: Context) -> None:
            for value in values:
                await ctx.step("a", body, value)

        return wf

    driver = begun(steps(1, 2))
    driver.answer("a", 0)
    assert mismatch(driver, steps(2, 1)).position == 2


def test_S34_annotations_are_compared_too() -> None:
    """A `started` mark of a step that the code no longer asks for is a mismatch, before any result."""

    async def before(ctx: Context) -> None:
        await ctx.step("a", body)

    async def after(ctx: Context) -> None:
        await ctx.sleep(1)

    driver = begun(before)
    driver.mark(driver.machine.outstanding["a"])
    assert mismatch(driver, after).asked == "timer 'sleep' at ordinal 0"


def test_S34_timers_are_compared() -> None:
    """A timer that fired where the code has none, or one of another sort, is a mismatch."""

    async def sleeps(ctx: Context) -> None:
        await ctx.sleep(1)

    async def steps(ctx: Context) -> None:
        await ctx.step("a", body)

    async def waits(ctx: Context) -> None:
        await asyncio.gather(asyncio.sleep(1), ctx.step("a", body))

    def slept() -> Driver:
        driver = begun(sleeps)
        driver.fire()
        return driver

    assert mismatch(slept(), steps).asked.startswith("step 'a'")
    assert mismatch(slept(), waits).position == 2


def test_S34_cancellations_are_compared() -> None:
    """A step that was given up, and that changed code goes on waiting for, is a mismatch, and so is the reverse."""

    def wf(gives_up: bool) -> Body:
        async def code(ctx: Context) -> None:
            step = ctx.step("a", body)
            await ctx.sleep(1)
            if gives_up:
                step.cancel()
            await ctx.step("b", body)

        return code

    driver = begun(wf(True))
    for item in driver.fire():
        driver.mark(item)
    assert "still waits" in mismatch(driver, wf(False)).asked
    driver = begun(wf(False))
    driver.fire()
    driver.answer("a", 1)
    assert "no longer waits" in mismatch(driver, wf(True)).asked


def test_S34_a_live_answer_to_nothing_is_refused() -> None:
    """Also live: an answer for a command that is not outstanding never reaches the code."""
    driver = begun(two_steps)
    command = driver.machine.outstanding["a"]
    driver.answer("a", 1)
    with pytest.raises(NonDeterminism):
        driver.deliver(status="completed", payload=b"1", **driver.of(command))
    driver.machine.drop()


def test_another_python_is_named() -> None:
    """A mismatch in a run recorded on another minor version says so."""
    driver = recorded()
    driver.journal[0] = msgspec.structs.replace(driver.journal[0], payload=b'{"python":"3.2"}')
    assert "3.2" in str(mismatch(driver, _renamed))
    assert PYTHON in str(mismatch(driver, _renamed))


def test_messages_behind_the_end_are_no_mismatch() -> None:
    """Signals and run entries that were journaled with the outcome are passed over."""
    driver = recorded()
    driver.append("signal", "received", name="late", payload=b"1")
    driver.append(RUN, "cancelling")
    driver.append(RUN, "completed")
    machine, news = driver.replayed()
    assert news == []
    assert machine.outcome == Completed(b"null")


# ------------------------------------------------------------------ patched


def versions(ctx: Context, *, new: bool) -> Any:
    return ctx.step("new" if new else "old", body)


async def old_way(ctx: Context) -> None:
    await ctx.step("first", body)
    await versions(ctx, new=False)
    await ctx.step("last", body)


async def both_ways(ctx: Context) -> None:
    await ctx.step("first", body)
    await versions(ctx, new=ctx.patched("change"))
    await ctx.step("last", body)


def test_patched_is_true_on_new_ground() -> None:
    """A run that gets there live takes the new way, and its marker keeps it there."""
    driver = begun(both_ways)
    patch, step = driver.answer("first", 1)
    assert (patch, step.name) == (Patch("change"), "new")
    driver.mark(patch)
    driver.answer("new", 1)
    assert driver.go_cold()[0].name == "last"
    driver.machine.drop()


def test_patched_is_false_for_runs_that_went_the_old_way() -> None:
    """A run that has gone past with the old code keeps the old way under the new one."""
    driver = begun(old_way)
    driver.answer("first", 1)
    driver.answer("old", 1)
    machine, news = changed(driver, both_ways).replayed()
    assert [item.name for item in news] == ["last"]
    machine.drop()


def test_patched_is_false_when_the_old_command_was_only_begun() -> None:
    """A `started` mark of the old way is enough to stay on it."""
    driver = begun(old_way)
    driver.answer("first", 1)
    driver.mark(driver.machine.outstanding["old"])
    machine, news = changed(driver, both_ways).replayed()
    assert (news, list(machine.outstanding)) == ([], ["old"])
    machine.drop()


def test_patched_is_true_at_the_last_recorded_turn() -> None:
    """Where the journal shows nothing of the old way, the new one is taken."""
    driver = begun(old_way)
    driver.answer("first", 1)
    machine, news = changed(driver, both_ways).replayed()
    assert [type(item).__name__ for item in news] == ["Patch", "RunStep"]
    assert list(machine.outstanding) == ["new"]
    machine.drop()


def test_the_answer_of_patched_stays() -> None:
    """A loop that took the old way once goes on taking it, though the run has come to new ground."""

    def wf(patched: bool) -> Body:
        async def code(ctx: Context) -> None:
            for _ in range(3):
                await ctx.step("new" if patched and ctx.patched("p") else "old", body)

        return code

    driver = begun(wf(False))
    driver.answer("old", 1)
    driver.answer("old:1", 1)
    other = changed(driver, wf(True))
    machine, news = other.replayed()
    assert [item.key for item in news] == ["old:2"]
    machine.drop()


def test_a_marker_stands_before_what_follows_from_it() -> None:
    """The note comes first among a turn's commands, so that no crash leaves a trace of them without it."""

    async def wf(ctx: Context) -> None:
        early = ctx.step("early", body)
        ctx.patched("p")
        await early

    driver = begun(wf)
    assert [type(item).__name__ for item in driver.issued[1]] == ["Patch", "RunStep"]
    driver.machine.drop()


# ------------------------------------------------------------------ how a run ends


def test_what_is_returned_is_encoded_by_its_annotation() -> None:
    """The output is bytes; one that cannot be written fails the run with a payload error."""

    async def good(ctx: Context) -> dict[str, int]:
        return {"a": 1}

    async def bad(ctx: Context) -> Any:
        return object()

    assert begun(good).machine.outcome == Completed(b'{"a":1}')
    assert error_of(begun(bad)).code == "payload_type"


def test_input_that_does_not_fit_fails_the_run() -> None:
    """Bytes that are not the workflow's input are an outcome, not an error of the engine's."""

    async def wf(ctx: Context, number: int) -> None: ...

    driver = Driver(workflow(wf), "text")
    driver.begin()
    assert error_of(driver).code == "payload_type"


def test_an_exception_is_the_error() -> None:
    """What the workflow raised is described; it has no cut."""

    async def wf(ctx: Context) -> None:
        raise ValueError("no good")

    driver = begun(wf)
    assert (error_of(driver).message, error_of(driver).type) == ("no good", "ValueError")
    assert isinstance(driver.machine.outcome, Failed)
    assert driver.machine.outcome.cut is None


@pytest.mark.parametrize("way", ["as it is", "from", "group", "caught"])
def test_the_cut_is_the_failed_entry_whose_error_came_out(way: str) -> None:
    """By identity, through `raise ... from` and out of a TaskGroup; an error that was handled is no cut."""

    async def wf(ctx: Context) -> None:
        await ctx.step("fine", body)
        match way:
            case "as it is":
                await ctx.step("a", body)
            case "from":
                try:
                    await ctx.step("a", body)
                except StepFailed as error:
                    raise ValueError("wrapped") from error
            case "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(ctx.step("a", body))
            case "caught":
                with contextlib.suppress(StepFailed):
                    await ctx.step("a", body)
                raise ValueError("of its own")

    driver = begun(wf)
    driver.answer("fine", 1)
    driver.fail("a")
    outcome = driver.machine.outcome
    assert isinstance(outcome, Failed)
    assert outcome.cut == (None if way == "caught" else 3)


def test_errors_are_built_from_data() -> None:
    """A failed step, a timed-out one and a failed child raise their classes, with key, error and attempts."""
    seen: list[Any] = []

    async def wf(ctx: Context) -> None:
        for asked in (ctx.step("a", body), ctx.step("b", body), ctx.child("c")):
            try:
                await asked
            except StepFailed as error:
                seen.append(error)

    driver = begun(wf)
    driver.fail("a", "boom")
    driver.fail("b", "slow", code="step_timeout")
    driver.fail("c", "sad")
    assert [type(error) for error in seen] == [StepFailed, StepTimeout, ChildFailed]
    assert [(error.key, error.attempts, error.error.message) for error in seen] == [
        ("a", 2, "boom"), ("b", 2, "slow"), ("c", 2, "sad"),
    ]  # fmt: skip
    assert "boom" in str(seen[0])


def cancelling(fn: Body, status: str = "cancelling") -> Driver:
    driver = begun(fn)
    driver.deliver(RUN, status)
    return driver


async def waits(ctx: Context) -> int:
    await ctx.step("a", body)
    return 1


async def cleans_up(ctx: Context) -> int:
    try:
        await ctx.step("a", body)
    finally:
        await ctx.step("clean_up", body)
    return 1


async def swallows(ctx: Context) -> int:
    try:
        await ctx.step("a", body)
    except asyncio.CancelledError:
        return await ctx.step("instead", body)
    return 0


def test_cancelling_lets_the_code_unwind_with_steps() -> None:
    """A cancelled run may do steps in its `finally`, and is cancelled when they are done."""
    driver = cancelling(cleans_up)
    assert [line.split()[0] for line in driver.asked[2]] == ["abandon", "step"]
    assert driver.machine.outcome is None
    driver.answer("clean_up", 1)
    assert isinstance(driver.machine.outcome, Cancelled)
    driver.go_cold()
    assert isinstance(driver.machine.outcome, Cancelled)


def test_a_cancellation_let_through_is_cancelled() -> None:
    """Code that does nothing about it is cancelled at once, and what it waited for is given up."""
    driver = cancelling(waits)
    assert isinstance(driver.machine.outcome, Cancelled)
    assert driver.machine.outstanding == {}


def test_a_swallowed_cancellation_is_completed() -> None:
    """Code that catches it and returns has completed."""
    driver = cancelling(swallows)
    driver.answer("instead", 7)
    assert driver.machine.outcome == Completed(b"7")


def test_a_timeout_let_through_is_failed() -> None:
    """`timed_out` unwinds like a cancellation and ends as run_timeout, cut at its entry."""
    driver = cancelling(cleans_up, "timed_out")
    driver.answer("clean_up", 1)
    assert error_of(driver).code == "run_timeout"
    outcome = driver.machine.outcome
    assert isinstance(outcome, Failed)
    assert outcome.cut == 2


def test_cancelling_oneself_is_no_cancellation_of_the_run() -> None:
    """A CancelledError that nobody asked for fails the run and says what happened."""

    async def wf(ctx: Context) -> None:
        task = asyncio.create_task(asyncio.sleep(5))
        task.cancel()
        await task

    assert "cancelled itself" in error_of(begun(wf)).message


# ------------------------------------------------------------------ requeue


def requeued(driver: Driver, cut: int | None) -> list[Any]:
    driver.append(RUN, "failed")
    driver.append(RUN, "requeued", payload=None if cut is None else msgspec.json.encode({"from": cut}))
    driver.machine.drop()
    machine, news = driver.replayed()
    driver.machine = machine
    return news


def test_B53_a_requeued_run_asks_again_for_what_failed_it() -> None:
    """What was recorded from the cut on is passed over; the failed step is asked for as if for the first time."""

    async def wf(ctx: Context) -> Any:
        return [await ctx.step("a", body), await ctx.step("b", body)]

    driver = begun(wf)
    driver.answer("a", 1)
    command = driver.machine.outstanding["b"]
    driver.mark(command)
    driver.append(status="retrying", attempt=1, **driver.of(command))
    driver.fail("b")
    outcome = driver.machine.outcome
    assert isinstance(outcome, Failed)
    news = requeued(driver, outcome.cut)
    assert [told(item) for item in news] == [told(command)]
    assert driver.machine.trace("b") == []
    driver.answer("b", 2)
    assert driver.machine.outcome == Completed(b"[1,2]")


def test_B53_a_failed_child_is_started_anew_under_a_new_id() -> None:
    """The failed child's recorded id is not taken for a child that is still running."""

    async def wf(ctx: Context) -> Any:
        first = await ctx.child("one")
        return [first, await ctx.child("two")]

    driver = begun(wf)
    driver.mark(driver.machine.outstanding["one"])
    for item in driver.answer("one", 1):
        driver.mark(item)
    driver.fail("two")
    news = requeued(driver, driver.machine.outcome.cut)  # type: ignore[union-attr]
    assert [item.child_id for item in news] == ["run-1.child.1.1"]
    driver.mark(news[0])
    driver.fail("two")
    news = requeued(driver, driver.machine.outcome.cut)  # type: ignore[union-attr]
    assert [item.child_id for item in news] == ["run-1.child.1.2"]
    driver.mark(news[0])
    assert driver.go_cold() == []
    (child,) = driver.machine.outstanding.values()
    assert child.child_id == "run-1.child.1.2"  # type: ignore[attr-defined]
    driver.machine.drop()


def test_B53_siblings_given_up_by_the_failure_are_asked_again() -> None:
    """A sibling that the failure cancelled is asked for again; one that had answered before is not."""

    async def wf(ctx: Context) -> None:
        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(ctx.step(name, body))

    driver = begun(wf)
    driver.mark(driver.machine.outstanding["b"])
    driver.answer("a", 1)
    for item in driver.fail("c"):
        driver.mark(item)
    news = requeued(driver, driver.machine.outcome.cut)  # type: ignore[union-attr]
    assert [item.key for item in news] == ["b", "c"]
    driver.machine.drop()


def test_signals_outlive_a_requeue() -> None:
    """Signals received in the passed-over stretch are delivered, in order."""

    async def wf(ctx: Context) -> Any:
        await ctx.step("a", body)
        return [await ctx.wait_for_signal("s"), await ctx.wait_for_signal("s")]

    driver = begun(wf)
    driver.signal("s", 1)
    driver.fail("a")
    driver.append("signal", "received", name="s", payload=b"2")
    requeued(driver, driver.machine.outcome.cut)  # type: ignore[union-attr]
    driver.answer("a", 0)
    assert driver.machine.outcome == Completed(b"[1,2]")


def test_a_dead_run_that_is_requeued_keeps_everything() -> None:
    """Without a cut nothing is passed over; only children started from now on have the generation in their id."""

    async def wf(ctx: Context) -> None:
        await ctx.child("one")
        await ctx.child("two")

    driver = begun(wf)
    driver.mark(driver.machine.outstanding["one"])
    assert requeued(driver, None) == []
    assert driver.machine.generation == 1
    assert driver.machine.outstanding["one"].child_id == "run-1.child.0"  # type: ignore[attr-defined]
    (two,) = driver.answer("one", 1)
    assert two.child_id == "run-1.child.1.1"
    driver.machine.drop()


def test_patches_of_the_passed_over_stretch_are_forgotten() -> None:
    """A marker behind the cut is gone with what followed from it."""
    driver = begun(both_ways)
    for item in driver.fail("first"):
        driver.mark(item)
    driver.append(PATCHED, "marked", name="change", key="change")
    requeued(driver, 2)
    patch, step = driver.answer("first", 1)
    assert (patch, step.name) == (Patch("change"), "new")
    driver.machine.drop()


def test_the_contract_of_a_machine() -> None:
    """What ARCHITECTURE.md promises of a Machine is there."""

    async def wf(ctx: Context) -> None:
        await ctx.sleep(1)

    machine = Machine(Driver(workflow(wf)).definition, run_id="r", input=b"null", generation=2, logs=3)
    entries: Sequence[Entry] = [Entry(1, 5, RUN, "started")]
    assert machine.replay(entries) == []
    assert machine.now == 5
    timer = machine.next_timer()
    assert timer is not None
    assert (timer.deadline, timer.ordinal, timer.name) == (1_000_005, 0, "sleep")
    assert (machine.outstanding, machine.trace("x"), machine.outcome) == ({}, [], None)
    assert STEP == "step"
    machine.drop()
