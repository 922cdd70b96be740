"""The door for time. Nothing else in the core or the engine asks what time it is.

Wall time is integer microseconds since the epoch (UTC) and comes from the store's clock; `monotonic` is for local
deadlines (leases), in seconds, and never compared between processes.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol

SECOND = 1_000_000
"""Microseconds."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def microseconds_of(moment: datetime) -> int:
    """An aware moment as µs since the epoch, exactly: a float of seconds would lose the last digits."""
    return (moment - EPOCH) // timedelta(microseconds=1)


class Clock(Protocol):
    """Tells the time. A test or the simulation may set it."""

    def now(self) -> int:
        """Wall time in µs."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> int:
        return time.time_ns() // 1_000

    monotonic = staticmethod(time.monotonic)


class StoreClock:
    """The store's clock, told by an offset taken at each heartbeat and advanced by the local monotonic clock.

    An engine whose own wall clock is wrong by minutes still stamps what the store would have stamped.
    """

    def __init__(self, local: Clock) -> None:
        self.monotonic = local.monotonic
        """The local one, unchanged: seconds."""
        self._told = local.now(), local.monotonic()
        """One value: the lease's thread writes it while the loop reads."""

    def synchronise(self, store_now: int, answered_at: float) -> None:
        """Take the store's `now`, whose answer came at this local monotonic instant. So this clock lags by as long as the
        answer took and never runs ahead: a timer is never early. It may step back; a run keeps its own stamps rising."""
        self._told = store_now, answered_at

    def now(self) -> int:
        base, told_at = self._told
        return base + int((self.monotonic() - told_at) * SECOND)

    def at(self, instant: float) -> int:
        """The same for an instant of `monotonic` that has just been read."""
        base, told_at = self._told
        return base + int((instant - told_at) * SECOND)
