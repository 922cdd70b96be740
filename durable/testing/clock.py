"""A clock that only the test moves."""

from __future__ import annotations

from durable.core.clock import SECOND


class ManualClock:
    """Stands still until told. Wall and monotonic time move together."""

    def __init__(self, now: int = 1_700_000_000 * SECOND) -> None:
        self._now = now
        self._monotonic = 0.0

    def now(self) -> int:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        self._now += round(seconds * SECOND)
        self._monotonic += seconds
