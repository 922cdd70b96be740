"""Calls step bodies: an `async def` on the loop, a plain `def` in a thread of a bounded pool (D12). A thread cannot be
cancelled; whoever waits for it may go on without it."""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from durable.worker.threads import BodyThreads, Late


class Bodies:
    """Calls bodies. `threads` 0: plain ones run in place, as the simulation wants it."""

    def __init__(self, threads: int) -> None:
        self._threads = BodyThreads(threads) if threads else None

    def call(
        self,
        body: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        is_async: bool | None = None,
        late: Late | None = None,
    ) -> Awaitable[Any]:
        """What the body returns, once it has. `is_async`: where the callable itself does not show it. `late`: told of a
        plain body that ended after its caller had given it up."""
        if _is_async(body) if is_async is None else is_async:
            return body(*args)  # type: ignore[no-any-return]
        return self._plain(body, args, late)

    def close(self) -> None:
        """Let the threads go. One that never returns is not waited for."""
        if self._threads is not None:
            self._threads.close()

    async def _plain(self, body: Callable[..., Any], args: tuple[Any, ...], late: Late | None) -> Any:
        if self._threads is None:
            result = body(*args)
        else:
            result = await self._threads.run(partial(contextvars.copy_context().run, body, *args), late)
        # A lambda or a partial around an async function hands back a coroutine.
        return await result if inspect.isawaitable(result) else result


def _is_async(body: Callable[..., Any]) -> bool:
    """Whether calling it on the loop cannot block: an `async def`, seen by its flag; anything else is looked at closer."""
    code = getattr(body, "__code__", None)
    return (code is not None and bool(code.co_flags & inspect.CO_COROUTINE)) or inspect.iscoroutinefunction(body)
