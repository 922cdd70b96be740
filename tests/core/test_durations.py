"""Durations: what people may write, and what is refused."""

import math
from datetime import timedelta
from typing import Any

import pytest

from durable.core.durations import seconds
from durable.core.errors import DefinitionError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30s", 30),
        ("5m", 300),
        ("1h30m", 5400),
        ("3d", 259_200),
        ("2w", 1_209_600),
        ("250ms", 0.25),
        ("100us", 0.0001),
        ("1.5h", 5400),
        (" 1h 30m ", 5400),
        (0, 0),
        (2.5, 2.5),
        (timedelta(minutes=1), 60),
    ],
)
def test_a_duration_is_read_as_written(text: Any, expected: float) -> None:
    """Text with units, numbers of seconds and timedeltas mean what they say."""
    assert seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "value",
    [
        *[
            "",
            "30",
            "s",
            "30 x",
            "-5s",
            "1h-5m",
            "1e3s",
            "5m later",
            "5mm",
            "\u0663s",
            "9" * 5000 + "s",
            "9" * 60 + "w",
        ],
        *[-1, -0.5, math.nan, math.inf, -math.inf, True, None, b"5s", 10**400, 10**5000],
        *[101 * 365.25 * 86400, "6000w", timedelta(days=-1), timedelta.max],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_duration_is_refused_with_a_spelling_that_works(value: Any) -> None:
    """Nothing is guessed; the message is short and shows the way."""
    with pytest.raises(DefinitionError, match="1h30m") as caught:
        seconds(value)
    assert len(str(caught.value)) < 400
