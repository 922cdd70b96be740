"""When a schedule is due: cron lines of five or six fields (the first of six is seconds), intervals, single moments.

Pure: moments in, moments out, all µs since the epoch. Cron lines are read in a time zone. Where the clocks change, lines of
five fields that name a time of day behave as Debian's cron: a moment that the spring skips comes right after the gap, and
one that the autumn repeats comes once (`cronsim`). Lines that go by `*`, and those of six fields, follow the clock on the wall.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from msgspec import Struct

from durable.core.clock import EPOCH, SECOND, microseconds_of
from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError

MAX_LINE = 200
"""Characters of a cron line."""
LAST_YEAR = 2200
"""Later is a slip of the pen, and no store's business."""
_ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_FIELDS = re.compile(r"[0-9A-Za-z*,/#-]+")


class Recurrence(Struct, frozen=True, omit_defaults=True):
    """When: one of `cron`, `every_us` and `at`. Make it with `cron`, `interval` or `once`, which check."""

    cron: str | None = None
    timezone: str = "UTC"
    every_us: int | None = None
    anchor: int = 0
    """An interval's first moment; later ones are whole intervals from there."""
    at: int | None = None

    def next(self, after: int) -> int | None:
        """The first moment later than `after`; None: never again."""
        if self.at is not None:
            return self.at if self.at > after else None
        if self.every_us is not None:
            if after < self.anchor:
                return self.anchor
            return self.anchor + ((after - self.anchor) // self.every_us + 1) * self.every_us
        return next(self._walk(after), None)

    def previous(self, upto: int) -> Iterator[int]:
        """Moments at or before `upto`, latest first."""
        if self.at is not None:
            if self.at <= upto:
                yield self.at
        elif self.every_us is not None:
            count = (upto - self.anchor) // self.every_us
            while count >= 0:
                yield self.anchor + count * self.every_us
                count -= 1
        else:
            # From the next whole second on: a moment that is `upto` itself counts.
            yield from self._walk(upto // SECOND * SECOND + SECOND, back=True)

    def _walk(self, start: int, *, back: bool = False) -> Iterator[int]:
        zone = ZoneInfo(self.timezone)
        moment = (EPOCH + timedelta(microseconds=start)).astimezone(zone)
        try:
            for found in CronSim(self.cron or "", moment, reverse=back):
                if not 1969 <= found.year <= LAST_YEAR:
                    return
                yield microseconds_of(found.astimezone(UTC))
        except (OverflowError, CronSimError):
            return  # past what a date can be


def cron(line: str, timezone: str = "UTC") -> Recurrence:
    """Raises DefinitionError for a line that is none, that never comes true, or a zone nobody knows."""
    if not isinstance(line, str) or len(line) > MAX_LINE:
        raise DefinitionError(f"A cron line is a text of at most {MAX_LINE} characters.")
    spelled = _ALIASES.get(line.strip().lower(), line.strip())
    fields = spelled.split()
    if len(fields) not in (5, 6) or not all(_FIELDS.fullmatch(field) for field in fields):
        raise DefinitionError(
            f"{line!r} is no cron line. Write five fields (minute, hour, day of month, month, day of week), like '30 9 * * 1-5', "
            "or six with seconds first."
        )
    zone(timezone)
    try:
        CronSim(spelled, EPOCH)
    except CronSimError as error:
        raise DefinitionError(f"{line!r} is no cron line: {str(error).lower()}.") from None
    found = Recurrence(cron=" ".join(fields), timezone=timezone)
    if found.next(0) is None:
        raise DefinitionError(f"{line!r} never comes true: no month has such a day.")
    return found


def interval(every: Duration, anchor: int) -> Recurrence:
    """Every so often, from `anchor` on. Raises DefinitionError for less than a second."""
    length = round(seconds(every) * SECOND)
    if length < SECOND:
        raise DefinitionError(
            f"An interval is a second at least, not {every!r}. For more than that, use a workflow that loops."
        )
    return Recurrence(every_us=length, anchor=anchor)


def once(moment: datetime | int) -> Recurrence:
    """At one moment, a datetime with a time zone or µs since the epoch. Raises DefinitionError."""
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            raise DefinitionError(f"A moment needs a time zone: {moment!r} has none. datetime.now(UTC) has.")
        moment = microseconds_of(moment)
    if (
        isinstance(moment, bool)
        or not isinstance(moment, int)
        or not 0 <= moment < (LAST_YEAR - 1970) * 366 * 86_400 * SECOND
    ):
        raise DefinitionError(f"{moment!r} is no moment between 1970 and {LAST_YEAR}.")
    return Recurrence(at=moment)


def zone(name: str) -> ZoneInfo:
    """Raises DefinitionError for a time zone that is not known here."""
    try:
        if not isinstance(name, str) or len(name) > 64:
            raise ValueError
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise DefinitionError(
            f"No time zone {str(name)[:64]!r} is known here. Use a name like Europe/Berlin or UTC; systems without zones need "
            "the package tzdata."
        ) from None
