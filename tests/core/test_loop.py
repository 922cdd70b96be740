"""The workflow's loop, rule by rule (D6)."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import socket
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from durable.core.commands import Completed
from durable.core.ctx import Context
from durable.core.definition import workflow
from durable.core.errors import DeterminismError, ForeignAwait, Stalled
from tests.core.driver import START, Driver


async def body(value: int = 1) -> int:
    return value


def begun(fn: Any) -> Driver:
    driver = Driver(workflow(fn))
    driver.begin()
    return driver


def result(driver: Driver) -> bytes:
    outcome = driver.machine.outcome
    assert isinstance(outcome, Completed), outcome
    driver.machine.drop()
    return outcome.output


# ------------------------------------------------------------------ turns and timers


def test_a_turn_runs_until_everything_waits() -> None:
    """One entry, one turn: all that follows from it has happened when `deliver` returns."""

    async def wf(ctx: Context) -> str:
        queue: asyncio.Queue[int] = asyncio.Queue()

        async def relay() -> None:
            for _ in range(50):
                await queue.put(1)
                await asyncio.sleep(0)

        task = asyncio.create_task(relay())
        total = sum([await queue.get() for _ in range(50)])
        await task
        return f"{total} {await ctx.step(body)}"

    driver = begun(wf)
    assert list(driver.machine.outstanding) == ["body"]
    driver.answer("body", 2)
    assert result(driver) == b'"50 2"'


def test_asyncio_sleep_is_a_durable_timer() -> None:
    """`asyncio.sleep` takes an ordinal and no row; its deadline is the turn's time plus the delay."""

    async def wf(ctx: Context) -> float:
        before = asyncio.get_running_loop().time()
        await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time() - before

    driver = begun(wf)
    timer = driver.machine.next_timer()
    assert timer is not None
    assert (timer.deadline, timer.ordinal) == (START + 86_400_000_000, 0)
    assert driver.asked[1] == []
    driver.fire()
    assert result(driver) == b"86400.0"


def test_timers_and_commands_share_ordinals() -> None:
    """A timer between two steps takes the ordinal between theirs."""

    async def wf(ctx: Context) -> None:
        ctx.step("a", body)
        asyncio.get_running_loop().call_later(5, print)
        await ctx.step("b", body)

    driver = begun(wf)
    assert [c.ordinal for c in driver.machine.outstanding.values()] == [0, 2]
    timer = driver.machine.next_timer()
    assert timer is not None
    assert timer.ordinal == 1
    driver.machine.drop()


def test_timers_already_due_take_no_ordinal() -> None:
    """A delay of zero, or a moment that has passed, is a plain callback of this turn."""

    async def wf(ctx: Context) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0, lambda: None)
        loop.call_at(loop.time() - 5, lambda: None)
        await ctx.sleep(0)
        await asyncio.sleep(-1)
        await ctx.step(body)

    driver = begun(wf)
    assert driver.machine.next_timer() is None
    assert driver.machine.outstanding["body"].ordinal == 0
    driver.machine.drop()


def test_S21_the_earliest_timer_comes_first_and_equal_ones_in_order_of_asking() -> None:
    """`next_timer` is the earliest deadline; of equal ones the one that was asked for first. Each fires once."""

    async def wf(ctx: Context) -> list[str]:
        order: list[str] = []

        async def after(name: str, delay: float) -> None:
            await ctx.sleep(delay)
            order.append(name)

        await asyncio.gather(after("c", 3), after("a", 1), after("b", 1))
        return order

    driver = begun(wf)
    for _ in range(3):
        driver.fire()
    assert driver.machine.next_timer() is None
    assert result(driver) == b'["a","b","c"]'


def test_cancelled_timers_are_gone() -> None:
    """A timeout that was not needed leaves no timer, however many there were."""

    async def wf(ctx: Context) -> None:
        for _ in range(500):
            async with asyncio.timeout(1000):
                await asyncio.sleep(0)
        await ctx.sleep(5)

    driver = begun(wf)
    timer = driver.machine.next_timer()
    assert timer is not None
    assert timer.deadline == START + 5_000_000
    assert len(driver.machine.loop._by_deadline) < 100
    driver.machine.drop()


def test_timeouts_of_asyncio_work() -> None:
    """`asyncio.timeout`, `wait_for` and `wait(timeout=)` are durable, and cancel what they give up."""

    async def wf(ctx: Context) -> list[str]:
        seen = []
        try:
            async with asyncio.timeout(1):
                await ctx.step("a", body)
        except TimeoutError:
            seen.append("timeout")
        try:
            await asyncio.wait_for(ctx.step("b", body), 1)
        except TimeoutError:
            seen.append("wait_for")
        done, pending = await asyncio.wait([ctx.step("c", body), ctx.step("d", body)], timeout=1)
        seen.append(f"{len(done)} {len(pending)}")
        return seen

    driver = begun(wf)
    driver.fire()
    assert driver.asked[2][0].startswith("abandon step a")
    driver.fire()
    assert driver.asked[3][0].startswith("abandon step b")
    driver.answer("d", 1)
    driver.fire()
    assert result(driver) == b'["timeout","wait_for","1 1"]'


def test_a_task_may_be_made_of_a_step() -> None:
    """`tg.create_task(ctx.step(...))` and `asyncio.create_task(ctx.sleep(...))` take our futures as they are."""

    async def wf(ctx: Context) -> int:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ctx.step(body))
            asyncio.create_task(ctx.sleep(1))
        return task.result()

    driver = begun(wf)
    driver.answer("body", 4)
    assert result(driver) == b"4"


def test_create_task_passes_what_it_does_not_know() -> None:
    """Names, contexts and a newer Python's keywords (eager_start) reach the task."""

    async def wf(ctx: Context) -> list[str]:
        seen = []

        async def inner() -> None:
            task = asyncio.current_task()
            assert task is not None
            seen.append(f"{task.get_name()} {task in {task}}")

        options: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
        loop = asyncio.get_running_loop()
        if options:
            task = loop.create_task(inner(), **options)
            seen.append("after")
            await task
        await asyncio.create_task(inner(), name="named")
        return seen

    output = result(begun(wf))
    assert b"named True" in output
    if sys.version_info >= (3, 12):
        assert output.index(b"True") < output.index(b"after")


def test_names_of_tasks_are_the_same_on_every_replay() -> None:
    """A task's default name counts the run's tasks, not those of the process."""

    async def wf(ctx: Context) -> str:
        async def inner() -> str:
            task = asyncio.current_task()
            assert task is not None
            return task.get_name()

        return await asyncio.create_task(inner())

    assert result(begun(wf)) == result(begun(wf))


def test_sets_of_tasks_iterate_by_creation() -> None:
    """Tasks and futures hash by creation number, so `done` of asyncio.wait comes in that order."""

    async def wf(ctx: Context) -> list[str]:
        tasks = [asyncio.create_task(asyncio.sleep(0), name=str(i)) for i in range(20)]
        done, _ = await asyncio.wait(reversed(tasks))
        return [task.get_name() for task in done]

    driver = begun(wf)
    number = 20
    assert result(driver) == ("[" + ",".join(f'"{i}"' for i in range(number)) + "]").encode()


def test_many_loops_do_not_collide_in_asyncio_s_own_set() -> None:
    """asyncio keeps one weak set of all tasks: the first task of a thousand runs must not hash to one number there."""

    async def wf(ctx: Context) -> None:
        await ctx.sleep(1)

    drivers = [begun(wf) for _ in range(50)]
    hashes = {object.__hash__(task) for d in drivers for task in d.machine.loop.tasks.values()}
    kept = getattr(asyncio.tasks, "_all_tasks", None) or getattr(asyncio.tasks, "_scheduled_tasks", ())
    known = [hash(ref) for ref in getattr(kept, "data", ())]
    if known:
        assert len(set(known)) >= len(hashes)
    for driver in drivers:
        driver.machine.drop()


def test_tasks_are_held_strongly() -> None:
    """A task nobody keeps goes on: the collector cannot end it."""

    async def wf(ctx: Context) -> int:
        got: list[int] = []

        async def lonely() -> None:
            got.append(await ctx.step(body))

        asyncio.create_task(lonely())
        await asyncio.sleep(5)
        return got[0]

    driver = begun(wf)
    gc.collect()
    driver.answer("body", 3)
    gc.collect()
    driver.fire()
    assert result(driver) == b"3"


def test_finished_tasks_are_let_go() -> None:
    """A run of a million tasks does not keep a million tasks."""

    async def wf(ctx: Context) -> None:
        while True:
            await asyncio.gather(*(asyncio.sleep(0) for _ in range(50)))
            await ctx.sleep(1)

    driver = begun(wf)
    for _ in range(20):
        driver.fire()
    assert len(driver.machine.loop.tasks) < 200
    driver.machine.drop()


def test_a_run_starts_in_an_empty_context() -> None:
    """What the engine keeps in context variables is not seen by the workflow; its own variables reach step bodies."""
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("the engine's")

    async def wf(ctx: Context) -> str:
        seen = variable.get()
        variable.set("the workflow's")
        await ctx.step(body)
        return seen

    driver = begun(wf)
    command: Any = driver.machine.outstanding["body"]
    assert command.variables[variable] == "the workflow's"
    driver.answer("body", 1)
    assert result(driver) == b'"unset"'
    assert variable.get() == "the engine's"


async def test_a_turn_inside_a_task_leaves_it_as_it_was() -> None:
    """Running loop, current task and async-generator hooks are put back, also when a turn fails."""
    loop, task, hooks = asyncio.get_running_loop(), asyncio.current_task(), sys.get_asyncgen_hooks()

    async def wf(ctx: Context) -> None:
        assert asyncio.get_running_loop() is not loop
        assert asyncio.current_task() is not task
        await asyncio.get_running_loop().run_in_executor(None, print)

    with pytest.raises(ForeignAwait):
        begun(wf)
    assert asyncio.get_running_loop() is loop
    assert asyncio.current_task() is task
    assert sys.get_asyncgen_hooks() == hooks


# ------------------------------------------------------------------ as_completed


@pytest.mark.filterwarnings("ignore:coroutine")
def test_as_completed_over_coroutines_is_refused() -> None:
    """Bare coroutines would start in address order; the error says what to give instead."""

    async def wf(ctx: Context) -> str:
        coros = [asyncio.sleep(1), asyncio.sleep(1)]
        try:
            for soon in asyncio.as_completed(coros):
                await soon
        except DeterminismError as error:
            return str(error)
        finally:
            for coro in coros:
                coro.close()
        return "accepted"

    assert b"asyncio.create_task" in result(begun(wf))


def test_as_completed_over_tasks_and_steps_works() -> None:
    """Tasks and steps come in the order in which they end."""

    async def wf(ctx: Context) -> list[int]:
        asked = [ctx.step("a", body), asyncio.create_task(asyncio.sleep(1, 9)), ctx.step("c", body)]
        return [await soon for soon in asyncio.as_completed(asked)]

    driver = begun(wf)
    driver.answer("c", 3)
    driver.fire()
    driver.answer("a", 1)
    assert result(driver) == b"[3,9,1]"


# ------------------------------------------------------------------ what is foreign


def refused(fn: Any) -> str:
    """The turn fails with ForeignAwait, again at the next try, though the code caught it."""
    driver = Driver(workflow(fn))
    with pytest.raises(ForeignAwait) as caught:
        driver.begin()
    with pytest.raises(ForeignAwait):
        driver.signal("any")
    driver.machine.drop()
    assert "ctx.step" in str(caught.value)
    return str(caught.value)


def test_a_socket_is_refused() -> None:
    """Opening a connection raises, and the error sticks though the code caught it."""

    async def wf(ctx: Context) -> None:
        try:
            await asyncio.open_connection("localhost", 1)
        except Exception:
            await ctx.step(body)

    assert "getaddrinfo" in refused(wf) or "create_connection" in refused(wf)


def test_socket_calls_are_refused() -> None:
    """So are the loop's own socket calls."""

    async def wf(ctx: Context) -> None:
        with socket.socket() as sock:
            sock.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_recv(sock, 1)
            except Exception:
                await ctx.sleep(1)

    refused(wf)


def test_a_thread_is_refused() -> None:
    """`asyncio.to_thread` raises, and the error sticks."""

    async def wf(ctx: Context) -> None:
        try:
            await asyncio.to_thread(print)
        except Exception:
            await ctx.sleep(1)

    assert "run_in_executor" in refused(wf)


def test_a_subprocess_and_signal_handlers_are_refused() -> None:
    """Whatever else a loop can do is refused by name."""

    async def wf(ctx: Context) -> None:
        try:
            await asyncio.create_subprocess_exec("true")
        except Exception:
            asyncio.get_running_loop().add_signal_handler(15, print)

    assert "subprocess_exec" in refused(wf)


async def test_a_future_of_another_loop_is_refused() -> None:
    """Awaiting the application's future ends the turn at once; the code does not get to see the error."""
    foreign = asyncio.get_running_loop().create_future()
    seen = []

    async def wf(ctx: Context) -> None:
        try:
            await foreign
        except BaseException as error:
            seen.append(type(error).__name__)
            raise

    driver = Driver(workflow(wf))
    with pytest.raises(ForeignAwait, match="different loop"):
        driver.begin()
    assert seen == []
    driver.machine.drop()
    assert seen == ["Unwound"]


async def test_a_future_of_another_loop_is_refused_within_others() -> None:
    """Also inside a timeout and a gather."""
    foreign = [asyncio.get_running_loop().create_future() for _ in range(2)]

    async def waits(ctx: Context) -> None:
        async with asyncio.timeout(5):
            await foreign[0]

    async def gathers(ctx: Context) -> None:
        await asyncio.gather(foreign[1])

    for fn in (waits, gathers):
        driver = Driver(workflow(fn))
        with pytest.raises(ForeignAwait):
            driver.begin()
        driver.machine.drop()


def test_other_frameworks_are_refused() -> None:
    """A coroutine of trio or curio yields something that asyncio does not know."""

    class Trap:
        def __await__(self) -> Any:
            yield "trap"

    async def wf(ctx: Context) -> None:
        try:
            await Trap()
        except Exception:
            await ctx.sleep(1)

    assert "bad yield" in refused(wf)


def test_a_call_from_another_thread_is_refused_and_sticks() -> None:
    """A thread that resolves a workflow's future gets the error, and so does the run's next turn."""
    futures: list[Any] = []
    errors: list[BaseException] = []

    async def wf(ctx: Context) -> None:
        future = asyncio.get_running_loop().create_future()
        futures.append(future)
        ctx.step(body)
        await future

    driver = begun(wf)

    def meddle() -> None:
        try:
            futures[0].set_result(1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=meddle)
    thread.start()
    thread.join()
    assert isinstance(errors[0], ForeignAwait)
    with pytest.raises(ForeignAwait):
        driver.answer("body", 1)
    driver.machine.drop()


def test_ctx_outside_the_turn_is_refused_where_it_is_called() -> None:
    """A step body that uses ctx gets an error that says so; the run itself has done nothing wrong and goes on."""
    kept: list[Any] = []

    async def wf(ctx: Context) -> int:
        kept.append(ctx)
        answer: int = await ctx.step(body)
        return answer

    driver = begun(wf)
    with pytest.raises(ForeignAwait, match="step body"):
        kept[0].step(body)
    driver.answer("body", 1)
    assert driver.machine.outcome is not None
    driver.machine.drop()


def test_touching_the_loop_from_outside_the_turn_sticks() -> None:
    """A step body that sets the workflow's event has changed the workflow behind the journal's back: the turn fails."""
    kept: list[asyncio.Event] = []

    async def wf(ctx: Context) -> None:
        kept.append(asyncio.Event())
        asyncio.create_task(kept[0].wait())
        await ctx.step(body)

    driver = begun(wf)
    with pytest.raises(ForeignAwait):
        kept[0].set()
    with pytest.raises(ForeignAwait):
        driver.answer("body", 1)
    driver.machine.drop()


# ------------------------------------------------------------------ bounds


def test_a_loop_without_waiting_is_stalled() -> None:
    """`while True: await asyncio.sleep(0)` fails the turn, which names the line of each living task."""

    async def wf(ctx: Context) -> None:
        asyncio.create_task(asyncio.sleep(99), name="sleeper")
        while True:
            await asyncio.sleep(0)

    driver = Driver(workflow(wf))
    driver.machine.loop._max_callbacks = 1_000
    with pytest.raises(Stalled, match="1000 callbacks") as caught:
        driver.begin()
    assert "main at " in str(caught.value)
    assert "sleeper at " in str(caught.value)
    assert f"test_loop.py:{wf.__code__.co_firstlineno + 3}" in str(caught.value)
    driver.machine.drop()


def test_waiting_for_nothing_is_stalled() -> None:
    """A turn that ends with nothing outstanding fails, naming where it waits."""

    async def wf(ctx: Context) -> None:
        await ctx.step(body)
        await asyncio.Event().wait()

    driver = begun(wf)
    with pytest.raises(Stalled, match="nothing that can happen") as caught:
        driver.answer("body", 1)
    assert f"test_loop.py:{wf.__code__.co_firstlineno + 2}" in str(caught.value)
    driver.machine.drop()


def test_ten_thousand_steps_at_once_are_no_stall() -> None:
    """The bound is far above what a large gather needs."""

    async def wf(ctx: Context) -> int:
        async with asyncio.TaskGroup() as group:
            for _ in range(10_000):
                group.create_task(ctx.step(body))
        return 1

    driver = begun(wf)
    assert len(driver.machine.outstanding) == 10_000
    driver.machine.drop()


# ------------------------------------------------------------------ the end of the main task


def test_living_tasks_are_cancelled_in_creation_order_and_may_ask_for_nothing() -> None:
    """When the main task ends, the others are cancelled in the order they were made; a ctx call of theirs is refused."""
    seen: list[str] = []

    async def wf(ctx: Context) -> int:
        async def other(name: str) -> None:
            try:
                await ctx.step(name, body)
            finally:
                seen.append(name)
                try:
                    ctx.step("late", body)
                except BaseException as error:
                    seen.append(type(error).__name__)
                    raise

        for name in ("x", "y"):
            asyncio.create_task(other(name))
        await ctx.step("main", body)
        return 5

    driver = begun(wf)
    driver.answer("main", 1)
    assert seen == ["x", "Unwound", "y", "Unwound"]
    assert [line.split()[:3] for line in driver.asked[2]] == [["abandon", "step", "x"], ["abandon", "step", "y"]]
    assert driver.machine.outstanding == {}
    assert result(driver) == b"5"


def test_steps_nobody_awaited_are_abandoned() -> None:
    """A step that was asked for and is unanswered when the run returns is given up; one of the last turn never was."""

    async def wf(ctx: Context) -> None:
        ctx.step("early", body)
        await ctx.step(body)
        ctx.step("late", body)

    driver = begun(wf)
    driver.answer("body", 1)
    assert [line.split()[:3] for line in driver.asked[2]] == [["abandon", "step", "early"]]


def test_errors_nobody_asked_for_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A failed task and a failed step that were never awaited are told of when the run ends."""

    async def wf(ctx: Context) -> None:
        async def fails() -> None:
            raise ValueError("unseen")

        asyncio.create_task(fails(), name="careless")
        ctx.step("unwatched", body)
        await ctx.sleep(1)

    driver = begun(wf)
    driver.fail("unwatched", "unseen too")
    with caplog.at_level(logging.WARNING, "durable.workflow"):
        driver.fire()
    assert "careless failed" in caplog.text
    assert "unseen too" in caplog.text
    result(driver)


def test_system_exit_is_an_outcome() -> None:
    """`sys.exit()` in a workflow fails the run, and not the engine."""

    async def wf(ctx: Context) -> None:
        sys.exit(3)

    driver = begun(wf)
    assert "SystemExit" in repr(driver.machine.outcome)
    driver.machine.drop()


def test_async_generators_are_held_until_the_end() -> None:
    """A generator left half way is closed by nobody but the run's end, so the collector decides nothing."""
    seen = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            seen.append("closed")

    async def wf(ctx: Context) -> int:
        taken = 0
        async for number in numbers():
            taken = number
            break
        gc.collect()
        await ctx.sleep(1)
        gc.collect()
        return taken

    driver = begun(wf)
    driver.fire()
    assert seen == []
    assert result(driver) == b"1"
    assert seen == ["closed"]
