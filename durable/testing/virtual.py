"""Virtual time on the event loop there is: when everything waits, the clock jumps to the next timer.

The engine's timers, a step's timeout and a body's own `asyncio.sleep` are all timers of the loop, so moving a clock beside
it would leave most of them behind. Therefore the loop's own time is made virtual, in place, for as long as a test app is
open: any test runner, `asyncio.run` or notebook will do, and nobody has to choose a loop. Time stands still while anything
can go on. It passes as it really does while a thread works, and for a moment when a connection is open; then it jumps.

Relies on three private things of asyncio's selector loop, `_selector`, `_ssock` and `_clock_resolution`; a test pins them.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from typing import Any

from durable.core.clock import SECOND
from durable.core.errors import DurableError

LONGEST = 200 * 365 * 86_400.0
"""Seconds after which a test is said to wait for something that never comes."""
SOCKET_PATIENCE = 0.05
"""Real seconds an open connection is given to say something before time jumps."""
THREAD_LOOK = 0.05
_MARK = "_durable_virtual_time"


class NothingHappens(Exception):
    """A test waits for ever: all time there is has passed."""


class VirtualTime:
    """The time of one loop. Shared by all who ask for it on that loop; real again when the last has let go."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._users = 0
        self._now = self._began = 0.0
        self._threads = 0
        self._idle: list[asyncio.Future[None]] = []
        self._selector: Any = None

    @classmethod
    def enter(cls) -> VirtualTime:
        """Virtual time on the running loop. Raises DurableError on a loop that is not asyncio's own."""
        loop: Any = asyncio.get_running_loop()
        found = getattr(loop, _MARK, None)
        if found is None:
            if not isinstance(loop, asyncio.SelectorEventLoop) or not hasattr(loop, "_selector"):
                raise DurableError(
                    f"Virtual time needs asyncio's selector loop, and this is {type(loop).__module__}.{type(loop).__name__}. "
                    "Run the test with asyncio.SelectorEventLoop (for pytest-asyncio: its event loop settings)."
                )
            found = cls(loop)
            setattr(loop, _MARK, found)
        virtual: VirtualTime = found
        if virtual._users == 0:
            virtual._install()
        virtual._users += 1
        return virtual

    def leave(self) -> None:
        """Let go."""
        self._users -= 1
        if self._users == 0:
            self._remove()

    def time(self) -> float:
        return self._now

    async def settle(self) -> None:
        """Return when nothing can go on without time passing."""
        idle: asyncio.Future[None] = self._loop.create_future()
        self._idle.append(idle)
        await idle

    # ------------------------------------------------------------------ on the loop

    def _install(self) -> None:
        loop = self._loop
        self._now = self._began = math.ceil(loop.time())
        self._selector = loop._selector
        self._run_in_executor = loop.run_in_executor
        # Time moves by whole microseconds, and what is due in one is due together, however floats add up.
        self._resolution = loop._clock_resolution
        loop._clock_resolution = 1e-6
        loop._selector = _Selector(self._selector, self._select)
        loop.time = self.time
        loop.run_in_executor = self._in_thread

    def _remove(self) -> None:
        loop = self._loop
        loop._selector = self._selector
        loop._clock_resolution = self._resolution
        loop.run_in_executor = self._run_in_executor
        ahead = self._now - time.monotonic()
        # Never back: timers of others were set by the time they saw.
        loop.time = lambda: time.monotonic() + ahead
        delattr(loop, _MARK)

    def _in_thread(self, executor: Any, function: Any, *args: Any) -> Any:
        future = self._run_in_executor(executor, function, *args)
        self._threads += 1
        future.add_done_callback(self._thread_done)
        return future

    def _thread_done(self, _: Any) -> None:
        self._threads -= 1

    def _select(self, timeout: float | None) -> Any:
        """Stands in for the loop's wait for something to happen."""
        events = self._selector.select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if self._idle:
            idle, self._idle = self._idle, []
            for future in idle:
                if not future.done():
                    future.set_result(None)
            return events
        if self._threads:
            return self._really(THREAD_LOOK if timeout is None else min(timeout, THREAD_LOOK))
        if self._connected():
            events = self._really(SOCKET_PATIENCE if timeout is None else min(timeout, SOCKET_PATIENCE))
            if events:
                return events
        if timeout is None:
            return self._selector.select(None)
        # By a microsecond at least: in a far year less than that is rounded away, and the timer would never be due.
        self._now = round(self._now + max(timeout, 1e-6), 6)
        if self._now - self._began > LONGEST:
            self._began = self._now  # what cleans up after this needs time too
            raise NothingHappens(
                "200 years have passed in virtual time, and something still waits. Does a run wait for a signal that "
                "nobody sends? Give result() a timeout to see."
            )
        return events

    def _really(self, timeout: float) -> Any:
        before = time.monotonic()
        events = self._selector.select(timeout)
        self._now = round(self._now + time.monotonic() - before, 6)
        return events

    def _connected(self) -> bool:
        """Whether a socket is watched other than the loop's own and those that only listen."""
        own = self._loop._ssock.fileno()
        return any(key.fd != own and not _listens(key.fd) for key in self._selector.get_map().values())


class _Selector:
    """The loop's selector, with another `select`."""

    def __init__(self, inner: Any, select: Any) -> None:
        self._inner = inner
        self.select = select

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _listens(fd: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(fd)) as found:
            return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False  # a pipe, of a subprocess for instance


class VirtualClock:
    """The engine's and the store's clock in virtual time. Stands still until it is put on a loop."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._time: VirtualTime | None = None
        self._base = 0.0

    def begin(self, virtual: VirtualTime) -> None:
        self._time = virtual
        self._base = virtual.time()

    def now(self) -> int:
        return self._start + round(self._passed() * SECOND)

    def monotonic(self) -> float:
        return self._passed()

    def _passed(self) -> float:
        return 0.0 if self._time is None else self._time.time() - self._base
