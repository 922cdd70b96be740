"""Workflow code that runs outside an engine: what a worker's turns and a runner's passes have in common.

The code runs on the same machine as in an engine. What came of its operations is told by somebody else; if they say in which
order, everything works as there. If not, it is delivered in order of call, and what would be a race is refused.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, NoReturn, TypeVar

import msgspec

from durable.core.clock import microseconds_of
from durable.core.commands import Failed, Outcome, RunStep, WaitSignal
from durable.core.ctx import Context
from durable.core.definition import WorkflowDefinition
from durable.core.errors import DeterminismError, ErrorData, PayloadError, StepFailed, StepTimeout
from durable.core.loop import Alarm
from durable.core.loop import WorkflowTask as MainTask
from durable.core.payload import describe, encode_error, through
from durable.core.replay import Asked, Machine
from durable.core.step import StepObserver, StepScope, enter_step
from durable.worker.bodies import Bodies

R = TypeVar("R")

_SLEEPS = frozenset({"_ring", "_set_result_unless_cancelled"})
"""What a timer calls that is a sleep and nothing else."""


class Ordinals(Iterator[int]):
    """Counts operations, and may be asked how many there were."""

    def __init__(self) -> None:
        self.next = 0

    def __next__(self) -> int:
        self.next += 1
        return self.next - 1


class HostedContext(Context):
    """ctx of a workflow outside an engine."""

    _machine: HostedMachine

    def now(self) -> datetime:
        if self._machine.timed:
            return super().now()
        self._loop.admit()
        return self._machine.record_now()

    def sleep_until(self, moment: datetime) -> asyncio.Future[None]:
        ordinal = self._machine.ordinals.next
        promise = super().sleep_until(moment)
        if ordinal in self._loop.alarms:  # one that has passed is no timer
            self._machine.moments[ordinal] = microseconds_of(moment)
        return promise

    def gather(self, *awaitables: Any, mode: str = "all") -> Any:
        if mode == "first" and not self._machine.ordered:
            self._machine.refuse(race("ctx.gather(mode='first')"))
        return super().gather(*awaitables, mode=mode)  # type: ignore[call-overload]

    def patched(self, id: str) -> bool:
        if not self._machine.timed:
            self._machine.refuse(
                DeterminismError(
                    f"ctx.patched({id!r}): this engine does not say how far a run had come, so nobody can tell which way is "
                    "right. Register the new code under another version instead."
                )
            )
        return super().patched(id)


class HostedMachine(Machine):
    """One replay."""

    ordered = False
    """The engine says in which order things happened."""
    timed = False
    """And when."""

    def __init__(self, definition: WorkflowDefinition, *, run_id: str, input: bytes, logs: int = 0) -> None:
        super().__init__(definition, run_id=run_id, input=input, logs=logs)
        self.ordinals = self.loop.ordinals = Ordinals()  # type: ignore[assignment]
        self.moments: dict[int, int] = {}
        """Timers that end at a time, µs, whenever they began; by ordinal."""

    def record_now(self) -> datetime:
        """The time, recorded: this engine does not tell it."""
        raise NotImplementedError

    def _outcome_of(self, main: MainTask) -> Outcome:
        """A step's error that nobody caught is told as it came: an engine finds the step by it."""
        error = None if main.cancelled() else main.exception()
        if isinstance(error, StepFailed) and error.error is not None:
            return Failed(encode_error(error.error))
        return super()._outcome_of(main)

    def refuse(self, error: DeterminismError) -> NoReturn:
        """A broken rule sticks: code cannot catch it away."""
        self.loop.error = self.loop.error or error
        raise error

    def check_races(self) -> None:
        """Raises DeterminismError if the code waits for whichever comes first, and nobody will say which did."""
        if not self.ordered:
            for found in self._races():
                raise race(found)

    def _races(self) -> Iterator[str]:
        if any(map(self.is_raced, self.loop.alarms.values())):
            yield "a timeout"
        for future in (*self._promises.values(), *self.loop.living()):
            for callback, _ in future._callbacks or ():
                yield from _race_in(callback)

    def is_raced(self, alarm: Alarm) -> bool:
        """Whether a timer is more than a sleep."""
        return getattr(alarm._callback, "__name__", "") not in _SLEEPS

    def behind(self, is_behind: bool) -> None:
        """Whether the code is on ground that was covered before."""
        self._behind = is_behind

    def wait_signal(self, command: WaitSignal, *arguments: Any) -> Asked:
        if not self.ordered and arguments[1] is not None:
            self.refuse(race(f"ctx.wait_for_signal({command.name!r}, timeout=...)"))
        return super().wait_signal(command, *arguments)


def _race_in(callback: Any) -> Iterator[str]:
    """asyncio.wait and as_completed leave a callback with every future they wait for."""
    name = getattr(callback, "__qualname__", "")
    if name.startswith(("as_completed.", "_AsCompletedIterator.")):
        yield "asyncio.as_completed"
    elif name == "_wait.<locals>._on_completion":
        held = dict(zip(callback.__code__.co_freevars, callback.__closure__, strict=True))
        if "return_when" in held and held["return_when"].cell_contents == asyncio.FIRST_COMPLETED:
            yield "asyncio.wait(return_when=FIRST_COMPLETED)"


def race(what: str) -> DeterminismError:
    """Why a race is refused."""
    return DeterminismError(
        f"{what} is a race, and this engine does not say in which order things happened: a replay could have another winner. "
        "Wait for one thing after the other, or for all of them."
    )


def plainly(work: Callable[..., R], *arguments: Any) -> asyncio.Future[R]:
    """Run workflow code: from a plain callback, never inside a task."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[R] = loop.create_future()

    def call() -> None:
        if done.done():
            return
        try:
            done.set_result(work(*arguments))
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            done.set_exception(error)

    loop.call_soon(call, context=contextvars.Context())
    return done


def drop_soon(machine: Machine) -> None:
    """Unwind the code, as soon as no task is under way."""
    asyncio.get_running_loop().call_soon(machine.drop, context=contextvars.Context())


async def run_attempt(
    command: RunStep, scope: StepScope, bodies: Bodies, on_step: StepObserver | None, given_up: Callable[[], bool]
) -> bytes | ErrorData:
    """One attempt of a step: what it came to, or why it failed. Raises CancelledError if whoever runs it was cancelled;
    `given_up` says that the workflow has, which is no failure either."""
    try:
        return await _attempt(command, scope, bodies, on_step)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if given_up() or (task is not None and task.cancelling() > 0):
            raise
        return ErrorData(message="The step cancelled itself.", code="step_cancelled")
    except PayloadError as refused:
        return msgspec.structs.replace(describe(refused), retryable=False)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as failure:
        return describe(failure)


async def _attempt(command: RunStep, scope: StepScope, bodies: Bodies, on_step: StepObserver | None) -> bytes:
    enter_step(scope, on_step)
    limit = asyncio.timeout(command.options.timeout)
    try:
        async with limit:
            result = await bodies.call(command.body, command.args)
    except TimeoutError:
        if limit.expired():
            raise StepTimeout(f"The step took longer than its timeout of {command.options.timeout} s.") from None
        raise
    output, _ = through(result, command.returns, what=f"the result of step {command.key!r}")
    return output
