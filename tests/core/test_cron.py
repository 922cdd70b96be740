"""When schedules are due: cron lines, zones and their changes of clocks, intervals, single moments."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable.core.cron import Recurrence, cron, interval, once
from durable.core.errors import DefinitionError


def us(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * 1_000_000


def shown(moment: int | None) -> str | None:
    return None if moment is None else datetime.fromtimestamp(moment / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


GOLDEN = [
    # line, zone, after, the next moments
    ("0 9 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", ["2026-03-29T07:00:00Z", "2026-03-30T07:00:00Z"]),
    # 2:30 does not exist on 29 March 2026: right after the gap, once
    ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", ["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]),
    # 2:30 exists twice on 25 October 2026: once
    ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]),
    # what goes by the hour goes on: the hour that is there twice comes twice
    ("0 * * * *", "Europe/Berlin", "2026-10-24T23:30:00Z", ["2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z"]),
    ("0 * * * *", "Europe/Berlin", "2026-03-29T00:30:00Z", ["2026-03-29T01:00:00Z", "2026-03-29T02:00:00Z"]),
    ("30 2 * * *", "America/New_York", "2026-03-08T00:00:00Z", ["2026-03-08T07:00:00Z", "2026-03-09T06:30:00Z"]),
    ("30 1 * * *", "America/New_York", "2026-10-31T12:00:00Z", ["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"]),
    # half an hour of summer time
    ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T00:00:00Z", ["2026-10-03T15:30:00Z", "2026-10-04T15:15:00Z"]),
    ("0 0 29 2 *", "UTC", "2026-01-01T00:00:00Z", ["2028-02-29T00:00:00Z", "2032-02-29T00:00:00Z"]),
    ("*/20 * * * * *", "UTC", "2026-01-01T00:00:00Z", ["2026-01-01T00:00:20Z", "2026-01-01T00:00:40Z"]),
    ("0 0 L * *", "UTC", "2026-01-31T00:00:00Z", ["2026-02-28T00:00:00Z", "2026-03-31T00:00:00Z"]),
    ("0 9 * * 1-5", "UTC", "2026-11-20T10:00:00Z", ["2026-11-23T09:00:00Z", "2026-11-24T09:00:00Z"]),
    ("@daily", "UTC", "2026-11-20T10:00:00Z", ["2026-11-21T00:00:00Z", "2026-11-22T00:00:00Z"]),
]


@pytest.mark.parametrize(("line", "zone", "after", "expected"), GOLDEN)
def test_the_golden_table_of_clocks_that_change(line: str, zone: str, after: str, expected: list[str]) -> None:
    """Each line comes due at exactly these moments, over changes of clocks and short months (S22)."""
    when, at, found = cron(line, zone), us(after), []
    for _ in expected:
        moment = when.next(at)
        assert moment is not None
        at = moment
        found.append(shown(moment))
    assert found == expected


@given(
    st.sampled_from(["0 9 * * *", "30 2 * * *", "*/7 * * * *", "0 0 1 * *", "15,45 1-3 * * 0"]),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"]),
    st.integers(us("2025-01-01T00:00:00Z"), us("2028-01-01T00:00:00Z")),
)
def test_looking_back_finds_what_looking_ahead_said(line: str, zone: str, after: int) -> None:
    """The moments before a time, latest first, are those that come after an earlier one, in reverse."""
    when = cron(line, zone)
    ahead: list[int] = []
    at = after
    for _ in range(4):
        moment = when.next(at)
        assert moment is not None
        assert moment > at
        at = moment
        ahead.append(moment)
    assert list(islice(when.previous(ahead[-1]), 4)) == ahead[::-1]
    assert next(when.previous(ahead[-1] - 1)) == ahead[-2]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "* * * *",
        "0 0 31 2 *",
        "60 * * * *",
        "* * * * * * *",
        "x" * 1000,
        "0 0 * * *\n@reboot",
        "a b c d e",
        "*/0 * * * *",
        "0 0 0 * *",
    ],
)
def test_A36_a_line_that_is_none_is_refused(line: str) -> None:
    """A line that is none, or never comes true, is a DefinitionError at once (A36)."""
    begun = time.monotonic()
    with pytest.raises(DefinitionError):
        cron(line)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "../../etc/passwd", "x" * 1000, "/etc/passwd", "\x00"])
def test_A36_a_zone_nobody_knows_is_refused(zone: str) -> None:
    """An unknown time zone is a DefinitionError, and no file is read for it (A36)."""
    with pytest.raises(DefinitionError, match="time zone"):
        cron("0 9 * * *", zone)


def test_every_second_is_a_line() -> None:
    """Six stars are every second, and no loop."""
    assert cron("* * * * * *").next(us("2026-01-01T00:00:00Z")) == us("2026-01-01T00:00:01Z")


def test_an_interval_keeps_its_beat() -> None:
    """An interval's moments are whole lengths from its anchor, whenever one asks."""
    when = interval("90s", 1_000_000)
    assert when.next(0) == 1_000_000
    assert when.next(1_000_000) == 91_000_000
    assert when.next(500_000_000) == 541_000_000
    assert list(when.previous(200_000_000)) == [181_000_000, 91_000_000, 1_000_000]


def test_a_moment_comes_once() -> None:
    """A single moment is next until it is there, and never again."""
    when = once(datetime(2026, 1, 1, tzinfo=UTC))
    assert when.next(0) == us("2026-01-01T00:00:00Z")
    assert when.next(us("2026-01-01T00:00:00Z")) is None
    assert list(when.previous(us("2026-01-01T00:00:00Z"))) == [us("2026-01-01T00:00:00Z")]


@pytest.mark.parametrize("bad", [datetime(2026, 1, 1), -1, 10**18, True, "now"])
def test_A37_a_moment_that_is_none_is_refused(bad: object) -> None:
    """A naive datetime, a negative, endless or other number is a DefinitionError (A37)."""
    with pytest.raises(DefinitionError):
        once(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [0, "10ms", -5, float("nan"), 10**18])
def test_A37_an_interval_that_is_none_is_refused(bad: object) -> None:
    """An interval below a second, negative, endless or not a number is a DefinitionError (A37)."""
    with pytest.raises(DefinitionError):
        interval(bad, 0)  # type: ignore[arg-type]


def test_a_recurrence_survives_its_storage() -> None:
    """What is stored of a recurrence is what is read back."""
    import msgspec

    for when in (cron("0 9 * * *", "Europe/Berlin"), interval("1h", 5), once(7)):
        assert msgspec.json.decode(msgspec.json.encode(when), type=Recurrence) == when
