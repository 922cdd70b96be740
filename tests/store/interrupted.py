"""Cancelling a call where it waits: at its first wait, at its second, and so on until it gets through."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any


class Interrupted:
    """Awaits `call`, and cancels the present task, as anybody might, once it waits for the `at`-th time."""

    def __init__(self, call: Coroutine[Any, Any, Any], at: int) -> None:
        self._call = call
        self._at = at
        self.waits = 0

    @types.coroutine
    def run(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        step: Callable[[], Any] = partial(self._call.send, None)
        while True:
            try:
                waits_for = step()
            except StopIteration as end:
                return end.value
            self.waits += 1
            if self.waits == self._at:
                asyncio.get_running_loop().call_soon(task.cancel)
            try:
                yield waits_for
            except BaseException as error:
                step = partial(self._call.throw, error)
            else:
                step = partial(self._call.send, None)


async def interrupt_everywhere(
    call: Callable[[], Coroutine[Any, Any, Any]], check: Callable[[], Awaitable[None]]
) -> int:
    """Make the call again and again, cancelled at each of its waits in turn, with a check after each, until it is through.
    Returns how often it was cancelled."""
    at = 0
    while True:
        at += 1
        interrupted = Interrupted(call(), at)

        async def outer(interrupted: Interrupted = interrupted) -> None:
            await interrupted.run()

        task = asyncio.create_task(outer())
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
        await check()
        if interrupted.waits < at:
            return at - 1
