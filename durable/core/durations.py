"""Durations as people write them, turned to seconds once, at the edge.

Decides what "1h30m" means and what no duration may be. Called by decorators, ctx and configuration; everything behind
them knows seconds only. Never guesses: what it cannot read is a DefinitionError that shows a spelling that works.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta

from durable.core.errors import DefinitionError

Duration = float | int | str | timedelta

MAX_SECONDS = 100 * 365.25 * 86400.0
"""A hundred years. More is a slip of the unit, and would not fit the stores' microseconds for ever."""

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s|m|h|d|w)\s*")
_HINT = 'Write seconds (30, 0.5), text ("250ms", "30s", "5m", "1h30m", "3d", "2w") or a timedelta'


def seconds(value: Duration) -> float:
    """Seconds, 0 to a hundred years. Raises DefinitionError for anything else."""
    if isinstance(value, str):
        total = _parse(value)
    elif isinstance(value, timedelta):
        total = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        total = _number(value)
    else:
        raise DefinitionError(f"{value!r} is not a duration. {_HINT}.")
    if math.isnan(total):
        raise DefinitionError(f"NaN is not a duration. {_HINT}.")
    if total < 0:
        raise DefinitionError(f"A duration cannot be negative: {value!r}. {_HINT}.")
    if total > MAX_SECONDS:
        raise DefinitionError(f"A duration over 100 years is taken for a mistake: {_short(value)}. {_HINT}.")
    return total


def _number(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _parse(text: str) -> float:
    total, at = 0.0, 0
    stripped = text.strip()
    # Bounded before matching: a megabyte of digits is no duration.
    while at < len(stripped) <= 64:
        part = _PART.match(stripped, at)
        if part is None:
            break
        total += float(part[1]) * _UNITS[part[2]]
        at = part.end()
    if at == 0 or at < len(stripped):
        raise DefinitionError(f"{_short(text)} is not a duration. {_HINT}.")
    return total


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int too long to print
        return "a number too long to print"
    return text if len(text) <= 80 else text[:77] + "..."
