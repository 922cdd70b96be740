"""The loop that workflows run on: deterministic, driven turn by turn, with no I/O, no thread and no clock of its own (D6).

A turn runs until nothing is ready, so the engine knows exactly when a run waits and on what. Plain `asyncio.gather`,
`TaskGroup`, `wait`, `timeout`, `Event`, `Queue` work on it and are durable; `call_later` is a durable timer.

Called by core/replay.py only. It never calls the application's loop, and refuses whatever would.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import logging
import math
import sys
import threading
import types
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, NoReturn

from durable.core.errors import DeterminismError, ForeignAwait, Stalled, Unwound

log = logging.getLogger("durable.workflow")

MAX_CALLBACKS = 100_000
"""Callbacks one turn may run: 5,000 steps asked for at once need about 20,000."""
MAX_UNWINDING_ROUNDS = 50
"""How often a coroutine that refuses to be unwound is asked again."""


class TurnFuture(asyncio.Future[Any]):
    """A future that hashes by creation number: sets of futures iterate by hash, and addresses differ on replay."""

    def __init__(self, loop: TurnLoop) -> None:
        self.number = loop.next_number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number

    def cancel(self, msg: Any | None = None) -> bool:
        return False if self.get_loop().unwinding else super().cancel(msg)  # type: ignore[attr-defined]


class TurnTask(asyncio.Task[Any]):
    """A task that hashes by creation number, and that cannot be cancelled while its run is being unwound: a TaskGroup
    would turn Unwound into CancelledError, which authors do catch."""

    def __init__(self, coro: Coroutine[Any, Any, Any], *, loop: TurnLoop, number: int, **options: Any) -> None:
        self.number = number
        self.inner = coro
        super().__init__(_guarded(coro, loop), loop=loop, **options)

    def __hash__(self) -> int:
        return self.number

    def cancel(self, msg: Any | None = None) -> bool:
        return False if self.get_loop().unwinding else super().cancel(msg)  # type: ignore[attr-defined]

    def where(self) -> str:
        """file:line at which it waits."""
        at: Any = self.inner
        place = repr(at)
        while at is not None:
            frame = getattr(at, "cr_frame", None) or getattr(at, "gi_frame", None) or getattr(at, "ag_frame", None)
            if frame is None:
                break
            place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
            at = getattr(at, "cr_await", None) or getattr(at, "gi_yieldfrom", None) or getattr(at, "ag_await", None)
        return place


@types.coroutine
def _guarded(coro: Coroutine[Any, Any, Any], loop: TurnLoop) -> Generator[Any, Any, Any]:
    """Run a coroutine, and see to it that it awaits nothing but what lives on this loop."""
    send, throw = coro.send, coro.throw
    try:
        waits_on = send(None)
        while True:
            if waits_on is not None and getattr(waits_on, "_loop", None) is not loop:
                waits_on = throw(loop.foreign(f"await {waits_on!r:.200}"))
                continue
            try:
                yield waits_on
            except BaseException as error:
                waits_on = throw(error)
            else:
                waits_on = send(None)
    except StopIteration as stop:
        return stop.value
    finally:
        coro.close()


class TurnLoop(asyncio.AbstractEventLoop):
    """One run's loop."""

    def __init__(self, next_ordinal: Callable[[], int]) -> None:
        self._next_ordinal = next_ordinal
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[int, int, asyncio.TimerHandle]] = []
        self._armed: dict[int, asyncio.TimerHandle] = {}
        self._numbers = 0
        self._turning = False
        self._thread = 0
        self._generators: list[AsyncGenerator[Any, Any]] = []
        self.tasks: dict[int, TurnTask] = {}
        """The living ones, in creation order, held strongly."""
        self.now = 0
        """µs: the time of the turn."""
        self.epoch = 0
        """µs: what `time()` counts from, so that floats stay exact."""
        self.unwinding = False
        self.error: DeterminismError | None = None
        """Sticks: the turn fails with it even if the code caught it."""

    # ------------------------------------------------------------------ a turn

    def turn(self) -> None:
        """Run until nothing is ready. Raises what sticks, and Stalled if it does not come to rest."""
        before = asyncio._get_running_loop()
        swap = getattr(asyncio.tasks, "_swap_current_task", None) if sys.version_info >= (3, 14) else None
        outer_task = swap(before, None) if swap is not None and before is not None else None
        hooks = sys.get_asyncgen_hooks()
        asyncio._set_running_loop(self)
        sys.set_asyncgen_hooks(firstiter=self._generators.append, finalizer=_never)
        self._turning = True
        self._thread = threading.get_ident()
        try:
            self._drain()
        finally:
            self._turning = False
            sys.set_asyncgen_hooks(*hooks)
            asyncio._set_running_loop(before)
            if swap is not None and before is not None:
                swap(before, outer_task)
        if self.error is not None and not self.unwinding:
            raise self.error

    def _drain(self) -> None:
        ready = self._ready
        left = MAX_CALLBACKS
        while ready:
            handle = ready.popleft()
            if handle._cancelled:  # type: ignore[attr-defined]
                continue
            left -= 1
            if left == 0:
                ready.clear()
                raise Stalled(f"A turn did not come to rest in {MAX_CALLBACKS} callbacks. {self.places()}")
            try:
                handle._run()  # type: ignore[attr-defined]
            except SystemExit:
                continue  # the task has it too, and fails with it

    def within(self, function: Callable[[], None]) -> None:
        """Do something that only a turn may do, before one."""
        self._turning = True
        self._thread = threading.get_ident()
        try:
            function()
        finally:
            self._turning = False

    def places(self) -> str:
        """Where each living task waits."""
        return "Waiting: " + "; ".join(task.where() for task in self.tasks.values()) + "."

    # ------------------------------------------------------------------ timers

    def next_timer(self) -> tuple[int, int] | None:
        """(deadline µs, ordinal) of the earliest."""
        timers = self._timers
        while timers:
            deadline, ordinal, handle = timers[0]
            if not handle.cancelled():
                return deadline, ordinal
            heapq.heappop(timers)
            self._armed.pop(ordinal, None)
        return None

    def fire(self, ordinal: int) -> bool:
        """Let a timer ring in the coming turn. False: there is none by that ordinal."""
        handle = self._armed.pop(ordinal, None)
        if handle is None or handle.cancelled():
            return False
        self._timers = [timer for timer in self._timers if timer[1] != ordinal] if self._timers[0][1] != ordinal else self._timers
        if self._timers and self._timers[0][1] == ordinal:
            heapq.heappop(self._timers)
        else:
            heapq.heapify(self._timers)
        self._ready.append(handle)
        return True

    # ------------------------------------------------------------------ asyncio's side

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def time(self) -> float:
        return (self.now - self.epoch) / 1_000_000

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        raise self.foreign("set_debug()")

    def is_running(self) -> bool:
        return self._turning

    def is_closed(self) -> bool:
        return False

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        if not self._turning or threading.get_ident() != self._thread:
            raise self.foreign("a callback from outside the run")
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self._timer(self.now + math.ceil(delay * 1_000_000), callback, args, context)

    def call_at(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self._timer(self.epoch + math.ceil(when * 1_000_000), callback, args, context)

    def _timer(
        self, deadline: int, callback: Any, args: tuple[Any, ...], context: contextvars.Context | None
    ) -> asyncio.TimerHandle:
        if not self._turning or threading.get_ident() != self._thread:
            raise self.foreign("a timer from outside the run")
        handle = asyncio.TimerHandle((deadline - self.epoch) / 1_000_000, callback, args, self, context)
        if deadline <= self.now:
            self._ready.append(handle)
        else:
            ordinal = self._next_ordinal()
            heapq.heappush(self._timers, (deadline, ordinal, handle))
            self._armed[ordinal] = handle
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Looked at when it comes to the front."""

    def create_future(self) -> asyncio.Future[Any]:
        return TurnFuture(self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        if not self._turning or threading.get_ident() != self._thread:
            if asyncio.iscoroutine(coro):
                coro.close()
            raise self.foreign("a task from outside the run")
        if _by_as_completed(sys._getframe(1)):
            coro.close()
            raise self.foreign(
                "asyncio.as_completed over bare coroutines, which starts them in the order of their addresses. "
                "Give it tasks or steps: as_completed([asyncio.ensure_future(c) for c in ...])"
            )
        if isinstance(coro, asyncio.Future):
            coro = _await(coro)
        number = self.next_number()
        task = TurnTask(coro, loop=self, number=number, **options)
        self.tasks[number] = task
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        assert isinstance(task, TurnTask)
        if self.unwinding or task.cancelled() or not task._log_traceback:  # type: ignore[attr-defined]
            self.tasks.pop(task.number, None)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.unwinding:
            log.warning("in a workflow: %s", context.get("message"), exc_info=context.get("exception"))

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def get_task_factory(self) -> None:
        return None

    async def shutdown_asyncgens(self) -> None:
        """Closed at the end of the run, in the order they were begun."""

    def foreign(self, what: str) -> ForeignAwait:
        """The error for something that is not of this loop. It sticks."""
        error = ForeignAwait(
            f"A workflow may not use {what}. Whatever talks to the outside — sockets, drivers, threads, other loops — "
            "belongs in a step: `await ctx.step('name', function, ...)`."
        )
        if not self.unwinding:
            self.error = self.error or error
        return error

    # ------------------------------------------------------------------ the end

    def cancel_living(self) -> None:
        """Cancel tasks in creation order."""
        for task in list(self.tasks.values()):
            task.cancel()

    def close_generators(self) -> None:
        """Close what was begun and not finished, in order."""
        generators, self._generators = self._generators, []
        for generator in generators:
            self.create_task(generator.aclose())

    def unretrieved(self) -> list[BaseException]:
        """Errors of tasks that nobody asked for, found by walking, never by the garbage collector."""
        errors = []
        for task in list(self.tasks.values()):
            if task.done():
                del self.tasks[task.number]
                if not task.cancelled() and task._log_traceback:  # type: ignore[attr-defined]
                    error = task.exception()
                    if error is not None:
                        errors.append(error)
        return errors

    def unwind(self) -> list[str]:
        """Raise Unwound at every wait until all tasks are done. Returns where those wait that refuse."""
        self.unwinding = True
        self._timers.clear()
        self._armed.clear()
        for _ in range(MAX_UNWINDING_ROUNDS):
            try:
                self.within(self._fail_waits)
                self.turn()
            except Stalled:
                break
            self.tasks = {number: task for number, task in self.tasks.items() if not task.done()}
            if not self.tasks:
                if not self._generators:
                    return []
                self.within(self.close_generators)
        stubborn = []
        for task in self.tasks.values():
            if not task.done():
                stubborn.append(task.where())
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                _ABANDONED.append(task)
        self._ready.clear()
        self.tasks.clear()
        return stubborn

    def _fail_waits(self) -> None:
        for task in list(self.tasks.values()):
            waits_on = task._fut_waiter  # type: ignore[attr-defined]
            if waits_on is not None and not isinstance(waits_on, asyncio.Task) and not waits_on.done():
                waits_on.set_exception(Unwound())
                waits_on._log_traceback = False


_ABANDONED: list[TurnTask] = []
"""Coroutines that refused to be unwound. Kept, so that the garbage collector does not run their `finally` some day."""


def _never(generator: AsyncGenerator[Any, Any]) -> None:
    """The loop holds generators itself; the garbage collector finds none."""


async def _await(future: asyncio.Future[Any]) -> Any:
    return await future


_AS_COMPLETED = asyncio.as_completed.__code__ if hasattr(asyncio.as_completed, "__code__") else None


def _by_as_completed(frame: types.FrameType | None) -> bool:
    """Whether `ensure_future` is asked for a task by `as_completed` itself."""
    depth = 0
    while frame is not None and depth < 5 and frame.f_globals is vars(asyncio.tasks):
        if frame.f_code.co_name in ("as_completed", "__init__") and "todo" not in frame.f_code.co_name:
            if frame.f_code.co_name == "as_completed" or "as_completed" in frame.f_code.co_qualname.lower() or "AsCompleted" in frame.f_code.co_qualname:
                return True
        frame = frame.f_back
        depth += 1
    return False


def _refuse(name: str) -> Callable[..., NoReturn]:
    def method(self: TurnLoop, *args: Any, **options: Any) -> NoReturn:
        raise self.foreign(f"loop.{name}()")

    method.__name__ = name
    return method


_OURS = set(vars(TurnLoop))
for _name, _member in list(vars(asyncio.AbstractEventLoop).items()):
    if callable(_member) and not _name.startswith("__") and _name not in _OURS:
        setattr(TurnLoop, _name, _refuse(_name))
TurnLoop.__abstractmethods__ = frozenset()
