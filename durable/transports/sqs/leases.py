"""Messages in our hands stay invisible to others, for as long as we are alive and work on them (S12).

A message that was received is ours for its visibility; each third of it, it is prolonged. SQS ends this after 12 hours from
the receipt, so a little before that the message is handed on. Whoever works on a message that could not be prolonged is told
at once, since another may soon have it.

    held ──prolonged each third──→ held ──answered──→ ended
      ├── refused, or not confirmed in time ──→ lost: another may have it
      └── 11 h 30 since the receipt ──→ due: given back, for another receipt with 12 hours of its own
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from durable.transports.sqs.batches import EntryRefused

log = logging.getLogger("durable.transports")

HELD_MAX = 11.5 * 3600
"""Seconds a message is held. SQS allows 12 hours from its receipt."""


class Lease:
    """One message in our hands."""

    def __init__(self, url: str, receipt: str, now: float, visibility: float, held_max: float) -> None:
        self.url = url
        self.receipt = receipt
        self.until = now + visibility
        self.due = now + visibility / 3
        self.last = now + held_max
        self.prolonging: asyncio.Task[None] | None = None
        self.lost = False
        """Another may have it: leave the message alone."""
        self.over = False
        """Lost, or handed on: whoever works on it shall stop."""
        self.on_over: Callable[[], None] | None = None


class Leases:
    """All messages in our hands. `change(url, receipt, seconds)` sets a visibility and raises what went wrong."""

    def __init__(
        self, change: Callable[[str, str, int], Awaitable[None]], *, visibility: int, held_max: float = HELD_MAX
    ) -> None:
        self._change = change
        self._visibility = visibility
        self._held_max = held_max
        self._held: dict[Lease, None] = {}
        self._prolonging: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None

    def take(self, url: str, receipt: str) -> Lease:
        """A message that came just now."""
        loop = asyncio.get_running_loop()
        lease = Lease(url, receipt, loop.time(), self._visibility, self._held_max)
        self._held[lease] = None
        if self._keeper is None:
            self._keeper = loop.create_task(self._keep(), name="durable-sqs-leases")
        return lease

    def end(self, lease: Lease) -> None:
        """It is deleted, given back, or left to come again by itself."""
        self._held.pop(lease, None)

    async def settle(self, lease: Lease) -> None:
        """End it, and let a call under way come to its end: it must not undo the visibility that is set next."""
        self.end(lease)
        if lease.prolonging is not None:
            await asyncio.wait({lease.prolonging})

    async def close(self) -> None:
        """Prolong nothing more."""
        self._held.clear()
        going = [*self._prolonging, *([self._keeper] if self._keeper is not None else [])]
        for task in going:
            task.cancel()
        await asyncio.gather(*going, return_exceptions=True)

    async def _keep(self) -> None:
        """One task for all; it ends when there are none."""
        loop = asyncio.get_running_loop()
        tick = self._visibility / 6
        try:
            while self._held:
                await asyncio.sleep(tick)
                now = loop.time()
                for lease in list(self._held):
                    if now >= lease.last:
                        self._stop(lease, "it was held for as long as SQS allows, and is handed on", lost=False)
                    elif now >= lease.until - tick / 2:
                        self._stop(lease, "it could not be prolonged in time", lost=True)
                    elif now >= lease.due and lease.prolonging is None:
                        lease.prolonging = loop.create_task(self._prolong(lease))
                        self._prolonging.add(lease.prolonging)
                        lease.prolonging.add_done_callback(self._prolonging.discard)
        finally:
            self._keeper = None

    async def _prolong(self, lease: Lease) -> None:
        now = asyncio.get_running_loop().time()
        try:
            await self._change(lease.url, lease.receipt, self._visibility)
        except EntryRefused as error:
            if error.ours and lease in self._held:
                self._stop(lease, f"SQS does not prolong it: {error}", lost=True)
        except Exception as error:
            log.debug("a message was not prolonged, which is tried again: %r", error)
        else:
            lease.until = now + self._visibility
            lease.due = now + self._visibility / 3
        finally:
            lease.prolonging = None

    def _stop(self, lease: Lease, why: str, *, lost: bool) -> None:
        log.warning("a message is no longer ours: %s", why)
        self.end(lease)
        lease.over = True
        lease.lost = lost
        if lease.on_over is not None:
            lease.on_over()
