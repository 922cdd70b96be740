"""This engine's lease: one heartbeat row for all its runs, and the watch over its own loop (D7).

Beats go out from a thread with a connection of its own, so a busy loop does not look like death; but a loop that is
blocked for longer than 2/3 of the lease is named and the beats stop: an engine that cannot act must not hold its runs.
Correctness never depends on any of this: a commit with an old epoch is refused whatever the clocks say.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from durable.core.clock import SECOND, Clock, StoreClock
from durable.core.errors import StoreError
from durable.store.interface import Store

log = logging.getLogger("durable.lease")

SAFE_SHARE = 2 / 3
"""A body starts and a task is sent only within this share of the lease, by the monotonic clock."""


class Lease:
    """Keeps one incarnation alive in the store's eyes."""

    def __init__(
        self,
        store: Store,
        clock: StoreClock,
        local: Clock,
        incarnation: str,
        *,
        seconds: float,
        every: float,
        threads: bool,
        executing: Callable[[], str | None],
        on_beat: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.incarnation = incarnation
        self._store = store
        self._clock = clock
        self._local = local
        self._seconds = seconds
        self._every = every
        self._threads = threads
        self._executing = executing
        self._on_beat = on_beat
        self._on_lost = on_lost
        self._taken_at = -1e18
        self._asked_at: float | None = None
        """Since when the loop owes a sign of life; None: it owes none. Not a time it was last seen: a slow beat is no
        fault of the loop's."""
        self._lost = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def safe(self) -> bool:
        """Whether something may be begun under this lease."""
        return self.safe_at(self._local.monotonic())

    def safe_at(self, instant: float) -> bool:
        """The same at an instant of the monotonic clock."""
        return not self._lost and instant < self._taken_at + self._seconds * SAFE_SHARE

    async def start(self) -> None:
        """Take the lease, then keep it. Raises StoreError if the store cannot be reached now."""
        self._loop = asyncio.get_running_loop()
        if self._threads:
            await self._loop.run_in_executor(None, self._beat)
            self._thread = threading.Thread(target=self._watch, name="durable-lease", daemon=True)
            self._thread.start()
        else:
            self._beat()
            self._task = self._loop.create_task(self._keep(), name="durable-lease")

    async def stop(self) -> None:
        """Stop beating. The row stays until `Store.leave`."""
        self._stop.set()
        if self._task is not None:
            self._task.cancel()
        if self._thread is not None:
            thread, self._thread = self._thread, None
            await asyncio.get_running_loop().run_in_executor(None, thread.join)

    def _beat(self) -> None:
        asked = self._local.monotonic()
        beat = self._store.beat(self.incarnation, int(self._seconds * SECOND))
        if not beat.alive:
            self._lose("the store has declared it dead")
            return
        self._clock.synchronise(beat.now, self._local.monotonic())
        self._taken_at = asked

    def _once(self) -> None:
        """One beat, with every way it can go wrong."""
        try:
            self._beat()
        except StoreError as error:
            log.warning("heartbeat failed, trying again: %s", error)
        except Exception:
            log.exception("heartbeat failed, trying again")
        if self._local.monotonic() > self._taken_at + self._seconds:
            self._lose("its heartbeat could not be renewed in time")

    def _lose(self, why: str) -> None:
        if self._lost or self._stop.is_set():
            return
        self._lost = True
        log.error("engine %s has lost its lease: %s", self.incarnation, why)
        self._call(self._on_lost, why)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        if self._loop is None or self._loop.is_closed():
            return
        if self._threads:
            try:
                self._loop.call_soon_threadsafe(function, *args)
            except RuntimeError:  # closed between the look and the call
                return
        else:
            function(*args)

    async def _keep(self) -> None:
        while not self._lost:
            await asyncio.sleep(self._every)
            self._once()
            if not self._lost:
                self._on_beat()

    def _watch(self) -> None:
        """The thread: beat, and see that the loop still turns."""
        named = False
        # A failed beat is tried again well before the lease is over, whatever the interval.
        while not self._lost and not self._stop.wait(self._every if self.safe() else min(self._every, 0.1)):
            asked_at = self._asked_at
            if asked_at is None:
                asked_at = self._asked_at = self._local.monotonic()
                self._call(self._seen)
            blocked_for = self._local.monotonic() - asked_at
            if blocked_for > self._seconds * SAFE_SHARE:
                if not named:
                    named = True
                    log.error(
                        "the event loop has been blocked for %.1f s, while run %s had a turn; heartbeats stop so that "
                        "another engine can take over. Move blocking work into a plain `def` step (it gets a thread).",
                        blocked_for,
                        self._executing() or "(none)",
                    )
                if self._local.monotonic() > self._taken_at + self._seconds:
                    self._lose("its event loop was blocked")
                continue
            named = False
            self._once()
            if not self._lost:
                self._call(self._on_beat)

    def _seen(self) -> None:
        self._asked_at = None
