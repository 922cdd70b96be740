"""A loop on which nothing waits for real: when nothing is ready, the time is that of the next timer."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__(_Impatient(self))
        self.instant = 0.0

    def time(self) -> float:
        return self.instant


class _Impatient(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout:
            self._loop.instant += timeout
        return super().select(0)


def in_virtual_time(main: Callable[[], Awaitable[object]]) -> object:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())  # type: ignore[arg-type]
