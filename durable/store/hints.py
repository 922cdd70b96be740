"""Telling the engines of one process that something changed. A hint carries nothing and may be lost: each listener
polls anyway. Used by stores that live inside the process; never blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Listener:
    """One `Store.listen`: calls back on the loop it was made on, at most once per turn of that loop."""

    def __init__(self, on_hint: Callable[[], None], source: object) -> None:
        self.source = source
        """The store object it listens at: changes made through it are no news to its only listener."""
        self._on_hint = on_hint
        self._loop = asyncio.get_running_loop()
        self._pending = False
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def hint(self) -> None:
        """From any thread."""
        if self._pending or self._closed:
            return
        self._pending = True
        try:
            if asyncio._get_running_loop() is self._loop:
                self._loop.call_soon(self._deliver)
            else:
                self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # its loop has been closed without stopping to listen
            self._closed = True

    def _deliver(self) -> None:
        self._pending = False
        if not self._closed:
            self._on_hint()


class Listeners:
    """All listeners on the same data, in this process."""

    def __init__(self) -> None:
        self._all: list[Listener] = []

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, on_hint: Callable[[], None], source: object) -> Callable[[], None]:
        listener = Listener(on_hint, source)
        self._all = [*self._all, listener]

        def stop() -> None:
            listener.close()
            self._all = [other for other in self._all if other is not listener]

        return stop

    def changed(self, source: object | None) -> None:
        """Something changed through `source` (None: through another process). A store object that one engine has to
        itself does not hint that engine; one that several share hints them all."""
        listeners = self._all
        if not listeners:
            return
        own = sum(listener.source is source for listener in listeners)
        for listener in listeners:
            if listener.source is not source or own > 1:
                listener.hint()
