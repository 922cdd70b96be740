"""A crash before and after every durable effect of every scenario, and pairs of crashes."""

from __future__ import annotations

import time
from typing import Any

import pytest

from durable.testing.simulation.crashes import MODES, SCENARIOS, course, sample, singles


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_single_crash(scenario: str, mode: str) -> None:
    """Wherever a process vanishes, the run ends as if it had not."""
    tripped = 0
    for crashes, one in singles(scenario, mode=mode):
        tripped += one.tripped
        assert not one.what, f"crashes {crashes}: {one.what}"
    assert tripped >= 4


@pytest.mark.timeout(1800)
def test_pairs_of_crashes(budget: Any) -> None:
    """A second crash inside the recovery from the first one changes nothing either. Drawn here; `python -m
    durable.testing.simulation.crashes` takes every pair there is."""
    seconds = 60.0 if budget.seconds is None else 0.1 * budget.seconds
    began = time.monotonic()
    for scenario, mode, pair in sample(budget.start):
        one = course(scenario, pair, mode=mode)
        assert not one.what, f"{scenario}, {mode}, crashes {pair}: {one.what}"
        if time.monotonic() - began > seconds:
            return
