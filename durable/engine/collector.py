"""Python's garbage collector while an engine runs.

An engine keeps many small objects alive for a moment each; by default the collector looks through them after every few
hundred allocations, which costs a fifth of all CPU time and finds next to nothing, since the engine leaves no cycles. So it
looks less often. A threshold that the program has set itself is left alone, and the default comes back with the last engine.
"""

from __future__ import annotations

import gc

THRESHOLD = 10_000
_DEFAULT_MOST = 2_000
"""Of the first threshold, in any CPython so far."""

_engines = 0
_before: tuple[int, int, int] | None = None


def relax() -> None:
    """An engine starts."""
    global _engines, _before
    _engines += 1
    before = gc.get_threshold()
    if _engines == 1 and 0 < before[0] <= _DEFAULT_MOST:
        _before = before
        gc.set_threshold(THRESHOLD, before[1], before[2])


def restore() -> None:
    """An engine has stopped."""
    global _engines, _before
    _engines -= 1
    if _engines == 0 and _before is not None:
        if gc.get_threshold()[0] == THRESHOLD:
            gc.set_threshold(*_before)
        _before = None
