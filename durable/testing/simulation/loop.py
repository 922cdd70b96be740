"""A deterministic event loop with virtual time, on which several simulated processes live.

Which ready callback runs next is drawn from a seed; when none is ready, time jumps to the next timer. Every callback
belongs to the node (a simulated process) under which it was scheduled, so that a node can be crashed, which is to
vanish: its callbacks never run again, nothing is cancelled, no `finally` runs; or paused: its callbacks are kept and run
when it goes on, as after SIGSTOP.
"""

from __future__ import annotations

import asyncio
import heapq
from asyncio import events
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from random import Random
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class Deadlock(Exception):
    """Nothing is scheduled, and the simulation has not ended: something waits for ever."""


class Livelock(Exception):
    """Too many callbacks: something spins."""


class Node:
    """One process. Whatever is scheduled while its callbacks run is its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.paused = False
        self.held: list[_Handle] = []
        """What became ready while it was paused."""
        self.grave: list[object] = []
        """What it left behind. Kept to the end, so that no destructor runs its `finally` blocks in between."""

    def __repr__(self) -> str:
        return f"Node({self.name})"


class _Handle(asyncio.Handle):
    __slots__ = ("node",)
    node: Node


class _TimerHandle(asyncio.TimerHandle):
    __slots__ = ("node",)
    node: Node


class SimFuture(asyncio.Future[T]):
    """Hashes by creation: a set of futures iterates alike in every process."""

    def __init__(self, number: int, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._number = number

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimTask(asyncio.Task[T]):
    """A task that knows its node: whoever wakes it, it runs there."""

    def __init__(
        self,
        number: int,
        node: Node,
        coro: Coroutine[Any, Any, T],
        *,
        loop: asyncio.AbstractEventLoop,
        name: str | None,
        context: Context | None,
    ) -> None:
        self._number = number
        self.node = node
        super().__init__(coro, loop=loop, name=name or f"task-{number}", context=context)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimLoop(asyncio.AbstractEventLoop):
    """`order`: "any" draws among all ready callbacks; "fifo" draws the node and keeps the order within it."""

    def __init__(self, seed: int | str, *, order: str = "any", max_steps: int = 5_000_000) -> None:
        self.random = Random(f"loop/{seed}")
        self.world = Node("world")
        self.node = self.world
        self.steps = 0
        self.max_steps = max_steps
        self.unhandled: list[tuple[Node, dict[str, Any]]] = []
        """What `call_exception_handler` was told, and whose it was."""
        self._fifo = order == "fifo"
        self._now = 0.0
        self._ready: list[Any] = []
        self._timers: list[tuple[float, int, Any]] = []
        self._count = 0
        self._running = False
        self._closed = False

    # ------------------------------------------------------------------ running

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `main()` in the world's own node to its end."""
        events._set_running_loop(self)
        self._running = True
        try:
            task = self.spawn(self.world, main())
            while not task.done():
                self._step()
            return task.result()
        finally:
            self._running = False
            events._set_running_loop(None)

    def _step(self) -> None:
        while not self._ready:
            self._advance()
        handle = self._draw()
        node: Node = handle.node
        if handle.cancelled():
            return
        if node.dead:
            node.grave.append(handle)
            return
        if node.paused:
            node.held.append(handle)
            return
        self.steps += 1
        if self.steps > self.max_steps:
            raise Livelock(f"{self.steps} callbacks and no end at {self._now:.3f} s; the last: {handle!r}")
        self.node = node
        try:
            handle._run()
        finally:
            self.node = self.world

    def _draw(self) -> Any:
        ready = self._ready
        n = len(ready)
        if n == 1:
            return ready.pop()
        index = int(self.random.random() * n)
        if self._fifo:
            node = ready[index].node
            for index in range(n):
                if ready[index].node is node:
                    break
            return ready.pop(index)
        handle = ready[index]
        last = ready.pop()
        if last is not handle:
            ready[index] = last
        return handle

    def _advance(self) -> None:
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not timers:
            raise Deadlock(f"nothing is scheduled at {self._now:.3f} s")
        self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            handle = heapq.heappop(timers)[2]
            if handle.cancelled():
                continue
            if handle.node.dead:
                handle.node.grave.append(handle)
            else:
                self._ready.append(handle)

    # ------------------------------------------------------------------ nodes

    def spawn(self, node: Node, coro: Coroutine[Any, Any, T]) -> SimTask[T]:
        """A task of that node."""
        before, self.node = self.node, node
        try:
            return self.create_task(coro)
        finally:
            self.node = before

    def post(self, node: Node, delay: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """Call back in that node, after `delay` seconds."""
        before, self.node = self.node, node
        try:
            return self.call_at(self._now + delay, callback, *args, context=Context())
        finally:
            self.node = before

    def crash(self, node: Node) -> None:
        """Vanish."""
        node.dead = True
        node.paused = False
        node.grave.extend(node.held)
        node.held = []

    def pause(self, node: Node) -> None:
        """Stand still. Its clock goes on."""
        node.paused = not node.dead

    def resume(self, node: Node) -> None:
        """Go on with everything that has become ready meanwhile."""
        node.paused = False
        self._ready.extend(node.held)
        node.held = []

    def never(self) -> Awaitable[NoReturn]:
        """What a dead process waits for."""
        future: SimFuture[NoReturn] = self._future()
        self.node.grave.append(future)
        return future

    # ------------------------------------------------------------------ asyncio's loop

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        handle.node = self._node_of(callback)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = _TimerHandle(when, callback, args, self, context)
        handle.node = self._node_of(callback)
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, handle))
        return handle

    def _node_of(self, callback: Callable[..., object]) -> Node:
        owner = getattr(callback, "__self__", None)
        return owner.node if type(owner) is SimTask else self.node

    def create_future(self) -> asyncio.Future[Any]:
        return self._future()

    def _future(self) -> SimFuture[Any]:
        self._count += 1
        return SimFuture(self._count, loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: Context | None = None
    ) -> SimTask[T]:
        self._count += 1
        task = SimTask(self._count, self.node, coro, loop=self, name=name, context=context)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> NoReturn:  # type: ignore[override]
        raise AssertionError("a thread in a simulation: Settings(threads=False) rules them out")

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._closed:
            self.unhandled.append((self.node, context))

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Nothing is told any more, whatever destructors have to say."""
        self._closed = True
        self._ready.clear()
        self._timers.clear()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are passed over when they are met."""
