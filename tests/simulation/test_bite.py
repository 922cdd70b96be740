"""The simulation bites: without any one of the protections, some seed fails."""

from __future__ import annotations

import pytest

from tests.simulation.bite import FIRST, REMOVALS, bite


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", REMOVALS)
def test_a_removed_protection_is_noticed(name: str) -> None:
    """Taking away this one protection is noticed within a few dozen seeds."""
    assert bite(name, seeds=100, first=FIRST.get(name, 0)) is not None, (
        f"nobody noticed that {REMOVALS[name][0]} is gone"
    )
