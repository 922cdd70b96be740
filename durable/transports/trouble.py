"""What goes on by itself and does not work now: said once, tried ever more rarely, and said once when it works again."""

from __future__ import annotations

import asyncio
import logging

from durable.core.errors import TransportError

log = logging.getLogger("durable.transports")

PAUSE_MIN, PAUSE_MAX = 0.05, 5.0
"""Seconds between two attempts."""


class Trouble:
    """Of one loop. `what`: a sentence like "tasks cannot be claimed"; `over`: the one for its end."""

    def __init__(self, what: str, over: str) -> None:
        self._what = what
        self._over = over
        self._pause = 0.0

    async def wait(self, error: Exception) -> None:
        """Say it, and rest before the next attempt."""
        self.tell(error)
        pause, self._pause = self._pause, min(self._pause * 2, PAUSE_MAX)
        await asyncio.sleep(pause)

    def tell(self, error: Exception) -> None:
        """Say it, with where it comes from if that is no trouble of the transport's own kind."""
        if not self._pause:
            self._pause = PAUSE_MIN
            known = isinstance(error, TransportError)
            log.warning("%s, it is tried again and again: %s", self._what, error, exc_info=None if known else error)

    def over(self) -> None:
        """It works."""
        if self._pause:
            self._pause = 0.0
            log.warning("%s", self._over)
