"""Threads for plain `def` step bodies. Daemons: nobody can cancel a thread, so one that never returns must not hold the
process back at its end, as those of concurrent.futures would. It knows nothing of runs.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Late = Callable[[BaseException | None, Any], None]
"""Told of a body that nobody waits for any more: what it raised, or what it returned."""


class BodyThreads:
    """At most `limit` threads, made when they are needed and kept until `close`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._made = 0

    async def run(self, function: Callable[[], T], late: Late | None = None) -> T:
        """Call it in a thread and wait. Cancelled, it is not begun any more; one that has begun goes on, and `late` is told
        how it ended, on the loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                result = function()
            except StopIteration as error:
                # No future takes it: the body would never be heard of again.
                wrong = RuntimeError("the body raised StopIteration")
                wrong.__cause__ = error
                _tell(loop, future, wrong, None, late)
            except BaseException as error:
                _tell(loop, future, error, None, late)
            else:
                _tell(loop, future, None, result, late)

        self._work.put(work)
        if not self._idle.acquire(blocking=False) and self._made < self._limit:
            self._made += 1
            threading.Thread(target=self._serve, name=f"durable-step-{self._made}", daemon=True).start()
        return await future

    def close(self) -> None:
        """Let idle threads end; what waits for one is not begun."""
        for _ in range(self._made):
            self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work
            self._idle.release()


def _tell(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[T],
    error: BaseException | None,
    result: T | None,
    late: Late | None,
) -> None:
    def settle() -> None:
        if future.done():
            if asyncio.iscoroutine(result):
                result.close()  # a lambda around an async function, and nobody waits for it
            elif late is not None:
                loop.call_soon(late, error, result)  # behind whoever is just being told that it was cancelled
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:
        return  # the loop is closed: nobody is left to hear of it
