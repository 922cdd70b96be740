"""The loop that workflow code runs on: deterministic, driven turn by turn, with no clock, socket or thread of its own.

Decides in which order workflow code runs, what a timer is, and what code may not wait for. Driven by `core/replay.py`
from a plain callback. A turn runs until nothing is ready, so whoever drives it knows that the run now waits. Never
does I/O, never reads a clock: `now` is set from outside, and timers only say when they are due.

Sets of tasks iterate by hash, and asyncio keeps such sets (TaskGroup, wait), so tasks and futures of this loop hash
by creation number. They are held strongly, so that the garbage collector decides nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import heapq
import itertools
import logging
import sys
from asyncio import tasks
from asyncio.events import _get_running_loop, _set_running_loop
from collections import deque
from collections.abc import Callable, Coroutine
from threading import get_ident
from types import AsyncGeneratorType, CodeType, FrameType
from typing import Any, NoReturn

from msgspec import Struct

from durable.core.errors import DeterminismError, ForeignAwait, Stalled, Unwound

logger = logging.getLogger("durable.workflow")

MAX_CALLBACKS = 250_000
"""Callbacks one turn may run: well under a second of work, far more than any turn that ends."""
MAX_REFUSALS = 100
"""Waits that a coroutine being dropped may try before it is abandoned."""
MAX_REFUSED_CALLS = 1_000
"""ctx calls of a run being dropped that raise; later ones hand out a wait that never ends, to stop a sync loop."""

_ASYNCIO = asyncio.__path__[0]
_HERE = __file__.rpartition("loop.py")[0]

_ABANDONED: list[object] = []
"""Coroutines that would not end. Kept for good: collected, they would run user code at any moment, in any thread."""


class Promise(asyncio.Future[Any]):
    """A future of this loop. `release`, where there is one, hears of a cancellation at once."""

    __slots__ = ("number", "release")  # asyncio's future has a dict too, made when something is put into it

    def __init__(self, loop: Loop, release: Callable[[Promise], None] | None = None) -> None:
        super().__init__(loop=loop)
        self.number = next(loop.numbers)
        self.release = release

    def __hash__(self) -> int:
        return self.number

    def cancel(self, msg: Any | None = None) -> bool:
        if not super().cancel(msg):
            return False
        release, self.release = self.release, None
        if release is not None:
            release(self)
        return True


class WorkflowTask(asyncio.Task[Any]):
    """A task of this loop."""

    __slots__ = ("home", "number", "variables")

    def __init__(
        self, coro: Coroutine[Any, Any, Any], *, loop: Loop, number: int, context: contextvars.Context, **options: Any
    ) -> None:
        self.home = loop
        self.variables = context
        # An eager one's body runs before this returns, and may put it into a set.
        self.number: int | None = number if options.get("eager_start") else None
        # asyncio's own weak set of all tasks hashes the task here. It is shared by all loops: numbers, small and the
        # same in each, would collide there by the thousand. So until then the hash is the usual one.
        super().__init__(coro, loop=loop, context=context, **options)
        self.number = number
        self._log_destroy_pending = False

    def __hash__(self) -> int:
        return object.__hash__(self) if self.number is None else self.number

    def cancel(self, msg: Any | None = None) -> bool:
        # While a run is dropped, TaskGroup would turn the unwinding into a CancelledError that code may catch.
        return False if self.home.dropping else super().cancel(msg)


class Callback(Struct, eq=False):
    """A call to be made in this turn: an `asyncio.Handle` by its looks, at a third of what making one costs."""

    _callback: Callable[..., Any]
    _args: tuple[Any, ...]
    _context: contextvars.Context
    _cancelled: bool = False

    def cancel(self) -> None:
        self._cancelled = True

    def cancelled(self) -> bool:
        return self._cancelled

    def __repr__(self) -> str:
        return f"<Callback {self._callback!r}>"


class Alarm(asyncio.TimerHandle):
    """A durable timer. It has an ordinal, no row: only its firing is journaled."""

    __slots__ = ("_home", "deadline", "name", "ordinal")

    def __init__(
        self,
        home: Loop,
        deadline: int,
        ordinal: int,
        name: str,
        callback: Callable[..., Any],
        args: tuple[Any, ...],
        context: contextvars.Context,
    ) -> None:
        self._home = home
        self.deadline = deadline
        self.ordinal = ordinal
        self.name = name
        self._callback = callback
        self._args = args
        self._context = context
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self._home.alarms.pop(self.ordinal, None)

    def release(self, _promise: Promise) -> None:
        self.cancel()

    def when(self) -> float:
        return self.deadline / 1e6

    def __repr__(self) -> str:
        return f"<Alarm {self.ordinal} {self.name} at {self.deadline}>"


class Loop(asyncio.AbstractEventLoop):
    """One run's loop. `ordinals` is shared with the run's commands."""

    def __init__(self, *, max_callbacks: int = MAX_CALLBACKS) -> None:
        self.now = 0
        """The turn's time, µs since the epoch."""
        self.ordinals = itertools.count()
        self.numbers = itertools.count()
        self.tasks: dict[int, WorkflowTask] = {}
        """Every task that lives or has an error nobody asked for, by creation number."""
        self.alarms: dict[int, Alarm] = {}
        """Pending timers by ordinal."""
        self.error: DeterminismError | None = None
        """A broken rule. It sticks: code cannot catch it away."""
        self.closing = False
        """The main task has ended: the rest winds up, and may ask for nothing."""
        self.dropping = False
        """The run is leaving memory."""
        self._ready: deque[Callback | Alarm] = deque()
        self._by_deadline: list[tuple[int, int]] = []
        self._generators: list[Any] = []
        self._tidy_at = 64
        self._thread = 0
        self._refused = 0
        self._max_callbacks = max_callbacks

    # ------------------------------------------------------------------ turns

    def turn(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action`, and then all that became ready, until everything waits. Raises what broke the run's rules."""
        outside = self._enter()
        try:
            action(*args)
            ready = self._ready
            left = self._max_callbacks
            while ready and self.error is None:
                handle = ready.popleft()
                if handle._cancelled:
                    continue
                if not left:
                    self._busy()
                left -= 1
                try:
                    handle._context.run(handle._callback, *handle._args)
                except Exception as error:
                    if isinstance(error, DeterminismError):
                        raise
                    logger.warning("an error in %r of a workflow", handle, exc_info=error)
                except SystemExit:
                    pass  # the task that raised it keeps it as its outcome
        finally:
            self._leave(outside)
        if self.error is not None:
            raise self.error
        if len(self.tasks) + len(self._generators) > self._tidy_at:
            self._tidy()

    def _enter(self) -> tuple[Any, ...]:
        """Make this the running loop. Returns what was running, for `_leave` to put back."""
        outer = _get_running_loop()
        outside = (outer, _park(outer) if _PARKS else None, sys.get_asyncgen_hooks())
        self._thread = get_ident()
        _set_running_loop(self)
        sys.set_asyncgen_hooks(self._generators.append, _ignore)
        return outside

    def _leave(self, outside: tuple[Any, ...]) -> None:
        outer, task, hooks = outside
        sys.set_asyncgen_hooks(*hooks)
        _set_running_loop(outer)
        self._thread = 0
        if _PARKS:
            _unpark(outer, task)

    def _busy(self) -> NoReturn:
        self.error = Stalled(
            f"A turn did not end within {self._max_callbacks} callbacks. Something loops without waiting for anything "
            f"durable; wait with ctx.sleep, a step or a signal. Living tasks: {self.whereabouts()}"
        )
        raise self.error

    def stalled(self) -> NoReturn:
        """The turn ended, the workflow did not, and nothing is outstanding that could wake it."""
        self.error = Stalled(
            "The workflow waits, but for nothing that can happen: no step, timer, child or signal is outstanding. "
            f"Living tasks: {self.whereabouts()}"
        )
        raise self.error

    def whereabouts(self) -> str:
        """Each living task's name and line."""
        return "; ".join(f"{task.get_name()} at {_line_of(task)}" for task in self.living()) or "none"

    def living(self) -> list[WorkflowTask]:
        """Tasks that are not done, in order of creation."""
        return [task for task in self.tasks.values() if not task.done()]

    def _tidy(self) -> None:
        """Let go of what is over. A task with an error that nobody asked for stays, to be told of at the end."""
        self.tasks = {number: task for number, task in self.tasks.items() if not task.done() or task._log_traceback}
        self._generators = [agen for agen in self._generators if agen.ag_frame is not None]
        self._tidy_at = 2 * (len(self.tasks) + len(self._generators)) + 64

    # ------------------------------------------------------------------ callbacks and timers

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        if get_ident() != self._thread:
            return self._called_from_outside(callback, args)
        handle = Callback(callback, args, contextvars.copy_context() if context is None else context)
        if type(callback) is _StepWrapper and (refusal := _refusal_in(callback)) is not None:
            # A task's step that carries an exception: asyncio is about to throw its RuntimeError for a foreign
            # future into the code. The code shall not see it, so that it cannot go on.
            self._foreign(f"Workflow code waited for something foreign: {refusal}")
        if not self.dropping:
            self._ready.append(handle)
        return handle  # type: ignore[return-value]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at_microsecond(self.now + round(delay * 1e6), "timer", callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at_microsecond(round(when * 1e6), "timer", callback, *args, context=context)

    def call_at_microsecond(
        self,
        deadline: int,
        name: str,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Alarm:
        """A durable timer: the next ordinal, no row. One already due is a plain `call_soon` without ordinal."""
        if self.closing:
            self.refuse()
        context = contextvars.copy_context() if context is None else context
        if deadline <= self.now or self.closing:
            alarm = Alarm(self, deadline, -1, name, callback, args, context)
            if get_ident() != self._thread:
                self._called_from_outside(callback, args)
            elif not self.closing:
                self._ready.append(alarm)
            return alarm
        if get_ident() != self._thread:
            self._called_from_outside(callback, args)
        alarm = Alarm(self, deadline, next(self.ordinals), name, callback, args, context)
        self.alarms[alarm.ordinal] = alarm
        heapq.heappush(self._by_deadline, (deadline, alarm.ordinal))
        return alarm

    def sleep_until(self, deadline: int) -> Promise:
        """A durable sleep. Cancelling the promise takes the timer away."""
        promise = Promise(self)
        promise.release = self.call_at_microsecond(deadline, "sleep", _ring, promise).release
        return promise

    def fire(self, alarm: Alarm) -> None:
        """Make a pending timer's call ready."""
        del self.alarms[alarm.ordinal]
        self._ready.append(alarm)

    def next_alarm(self) -> Alarm | None:
        """The earliest pending timer; of equal ones the first asked for."""
        heap, alarms = self._by_deadline, self.alarms
        while heap and heap[0][1] not in alarms:
            heapq.heappop(heap)
        if len(heap) > 2 * len(alarms) + 64:  # cancelled ones further down
            heap[:] = [(alarm.deadline, alarm.ordinal) for alarm in alarms.values()]
            heapq.heapify(heap)
        return alarms[heap[0][1]] if heap else None

    def put_off(self, microseconds: int) -> None:
        """Every pending timer rings so much later."""
        for alarm in self.alarms.values():
            alarm.deadline += microseconds
        self._by_deadline[:] = [(alarm.deadline, alarm.ordinal) for alarm in self.alarms.values()]
        heapq.heapify(self._by_deadline)

    def time(self) -> float:
        return self.now / 1e6

    # ------------------------------------------------------------------ tasks and futures

    def create_future(self) -> Promise:
        return Promise(self)

    def create_task(
        self, coro: Any, *, name: object = None, context: contextvars.Context | None = None, **options: Any
    ) -> WorkflowTask:
        if get_ident() != self._thread:
            self._called_from_outside(coro, ())
        if self.dropping:
            _discard(coro)
            self.refuse()
        if isinstance(coro, asyncio.Future):
            coro = _wait_for(coro)
        elif _from_as_completed(sys._getframe(1)):
            _discard(coro)
            raise DeterminismError(
                "asyncio.as_completed starts bare coroutines in the order of their addresses, which differs between "
                "runs. Give it tasks (asyncio.create_task, in a list) or steps (ctx.step(...))."
            )
        number = next(self.numbers)
        if context is None:
            context = contextvars.copy_context()
        task = WorkflowTask(coro, loop=self, number=number, context=context, **options)
        # The default name counts tasks of the whole process.
        task.set_name(f"task-{number}" if name is None else name)
        self.tasks[number] = task
        return task

    # ------------------------------------------------------------------ what is refused

    def _foreign(self, message: str) -> NoReturn:
        error = ForeignAwait(f"{message}. Do I/O and threads in a step: await ctx.step('name', fn, ...).")
        if self.error is None:
            self.error = error
        raise error

    def _called_from_outside(self, callback: object, args: tuple[Any, ...]) -> NoReturn:
        where = "another thread" if self._thread else "outside its turn"
        self._foreign(
            f"A workflow's loop was called from {where} ({callback!r}). A step body may not touch the workflow's "
            "futures, events or queues; return a value, or send a signal"
        )

    def admit(self) -> None:
        """Let a ctx call pass, or raise: ForeignAwait outside of a turn, Unwound when the run is over."""
        if get_ident() != self._thread:
            # Refused where it was called; the run has done nothing wrong, so nothing sticks to it.
            raise ForeignAwait(
                "ctx belongs to workflow code: it cannot be used in a step body, in a thread, or after the run. Return a "
                "value from the step, or send a signal."
            )
        if self.closing:
            self.refuse()

    def refuse(self) -> None:
        """Raise Unwound: nothing durable can be done now. Code that asks on and on is let through in the end, and
        then gets waits that never end: a loop around a call that raises would hold the thread for good."""
        self._refused += 1
        if self._refused <= MAX_REFUSED_CALLS:
            raise Unwound("The run is leaving memory, or is over: ctx calls and timers are refused.")

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        # asyncio tells of errors nobody retrieved here, when the garbage collector finds them. No user code runs.
        logger.warning("%s", context.get("message", "an error in a workflow"), exc_info=context.get("exception"))

    # ------------------------------------------------------------------ the end

    def finish(self) -> None:
        """The main task is over: cancel the others in order of creation, and let them wind up in a last turn."""
        self.closing = True
        self.alarms.clear()
        if self.living():
            self.turn(self._cancel_living)

    def _cancel_living(self) -> None:
        for task in self.living():
            task.cancel()

    def tell_unretrieved(self, main: WorkflowTask | None) -> None:
        """Log the errors nobody asked for, found by walking the tasks."""
        for task in self.tasks.values():
            if task.done() and not task.cancelled() and task._log_traceback:
                task._log_traceback = False
                error = task.exception()
                if task is not main and not isinstance(error, Unwound):
                    logger.warning("%s failed and nobody asked for its result", task.get_name(), exc_info=error)

    def drop(self) -> None:
        """Unwind every coroutine without a trace: each wait raises Unwound until the code has ended.

        Not by `cancel()`, which code may catch, count and turn into something else, and not by the tasks' own
        machinery, which would need turns. The coroutines are thrown into directly, in order of creation.
        """
        self.closing = self.dropping = True
        self._ready.clear()
        self.alarms.clear()
        if self._generators or self.living():
            outside = self._enter()
            try:
                self._unwind()
            finally:
                self._leave(outside)
        for task in self.tasks.values():
            task._log_traceback = False
        self.tasks.clear()
        self._generators.clear()
        self._ready.clear()

    def _unwind(self) -> None:
        for task in self.living():
            coro = task.get_coro()
            tasks._enter_task(self, task)
            try:
                ended = coro is None or _throw_until_done(coro, task.variables)
            finally:
                tasks._leave_task(self, task)
            if not ended:
                self._abandon(task, f"{task.get_name()} at {_line_of(task)}")
        for agen in self._generators:
            if agen.ag_frame is not None and not _close(agen):
                self._abandon(agen, f"async generator {agen.__qualname__}")

    def _abandon(self, stubborn: object, what: str) -> None:
        _ABANDONED.append(stubborn)
        logger.warning(
            "%s refused to end after %d tries while its run left memory, and stays there. "
            "Let BaseException pass in `except` and `finally`.",
            what,
            MAX_REFUSALS,
        )

    # ------------------------------------------------------------------ small answers asyncio needs

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._thread != 0

    def is_closed(self) -> bool:
        return self.dropping


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Loop, *args: Any, **kwargs: Any) -> NoReturn:
        self._foreign(f"Workflow code called loop.{name}, which would leave its own loop")

    refuse.__name__ = name
    return refuse


# Everything else a loop can do touches the world: sockets, threads, processes, signals.
for _name in dir(asyncio.AbstractEventLoop):
    if not _name.startswith("_") and _name not in Loop.__dict__:
        setattr(Loop, _name, _refusing(_name))


# ------------------------------------------------------------------ what we rely on inside asyncio, pinned by a test


async def _nothing() -> None: ...


def _step_wrapper() -> type[Any]:
    """The class of the callbacks in which asyncio's C tasks schedule their own steps."""

    class Probe(asyncio.AbstractEventLoop):
        seen: type[Any] = type(None)

        def get_debug(self) -> bool:
            return False

        def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
            Probe.seen = type(callback)

    coro = _nothing()
    task = asyncio.Task(coro, loop=Probe())  # type: ignore[abstract]
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coro.close()
    return Probe.seen


_StepWrapper = _step_wrapper()


def _refusal_in(step: object) -> BaseException | None:
    """The exception that a scheduled step will throw into its coroutine: asyncio only ever puts a refusal there."""
    for held in gc.get_referents(step):
        if isinstance(held, BaseException):
            return held
    return None


_ENSURE_FUTURE: set[CodeType] = {
    function.__code__
    for name in ("ensure_future", "_ensure_future")
    if (function := getattr(tasks, name, None)) is not None
}


def _from_as_completed(frame: FrameType | None) -> bool:
    if frame is None or frame.f_code not in _ENSURE_FUTURE:
        return False
    for _ in range(5):
        frame = frame.f_back
        if frame is None or frame.f_code.co_filename != tasks.__file__:
            return False
        if "as_completed" in frame.f_code.co_name or "AsCompleted" in frame.f_code.co_qualname:
            return True
    return False


_PARKS = sys.version_info >= (3, 14)
"""One current task per thread there, and entering another while one is current is refused."""

if sys.version_info >= (3, 14):

    def _park(loop: asyncio.AbstractEventLoop | None) -> Any:
        return None if loop is None else tasks._swap_current_task(loop, None)

    def _unpark(loop: asyncio.AbstractEventLoop | None, task: Any) -> None:
        if loop is not None and task is not None:
            tasks._swap_current_task(loop, task)
else:

    def _park(loop: asyncio.AbstractEventLoop | None) -> Any:
        return None

    def _unpark(loop: asyncio.AbstractEventLoop | None, task: Any) -> None:
        pass


# ------------------------------------------------------------------ coroutines by hand


def _ring(promise: Promise) -> None:
    if not promise.done():
        promise.release = None
        promise.set_result(None)


async def _wait_for(future: asyncio.Future[Any]) -> Any:
    return await future


def _ignore(_agen: object) -> None:
    """The finalizer of async generators: they are held until the run ends, so it has nothing to do."""


def _discard(coro: object) -> None:
    """Close a coroutine that never began; no code of it runs."""
    if asyncio.iscoroutine(coro):
        coro.close()


def _throw_until_done(coro: Any, variables: contextvars.Context) -> bool:
    """Throw Unwound at every wait until the coroutine has ended. False: it would not."""
    for _ in range(MAX_REFUSALS):
        try:
            variables.run(coro.throw, Unwound("The run is leaving memory."))
        except KeyboardInterrupt:
            raise
        except BaseException:
            return True
    return False


def _close(agen: AsyncGeneratorType[Any, Any]) -> bool:
    """The same for an async generator left half way. It may yield, it may wait."""
    for _ in range(MAX_REFUSALS):
        waiting = agen.athrow(Unwound("The run is leaving memory."))
        try:
            waiting.send(None)
            if _throw_until_done(waiting, contextvars.Context()) and agen.ag_frame is None:
                return True
        except StopIteration:
            continue  # it answered with another value
        except KeyboardInterrupt:
            raise
        except BaseException:
            return agen.ag_frame is None
    return False


def _line_of(task: WorkflowTask) -> str:
    """file:line of the innermost frame that is the author's."""
    found = "?"
    at: Any = task.get_coro()
    while at is not None:
        frame = getattr(at, "cr_frame", None) or getattr(at, "gi_frame", None) or getattr(at, "ag_frame", None)
        if frame is not None and not frame.f_code.co_filename.startswith((_ASYNCIO, _HERE)):
            found = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        at = getattr(at, "cr_await", None) or getattr(at, "gi_yieldfrom", None) or getattr(at, "ag_await", None)
    return found
