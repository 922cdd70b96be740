"""The garbage collector's threshold while engines run."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from durable import Durable
from durable.engine import collector
from durable.engine.collector import THRESHOLD


@pytest.fixture(autouse=True)
def thresholds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(collector, "_engines", 0)  # engines that other tests have crashed never stop
    monkeypatch.setattr(collector, "_before", None)
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


async def test_the_threshold_is_raised_while_an_engine_runs() -> None:
    """From the first engine to the last; then it is as it was."""
    gc.set_threshold(700, 10, 10)
    async with Durable("memory://"):
        async with Durable("memory://"):
            assert gc.get_threshold()[0] == THRESHOLD
        assert gc.get_threshold()[0] == THRESHOLD
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("own", [(0, 10, 10), (50_000, 5, 5)])
async def test_a_threshold_of_the_programs_own_is_left_alone(own: tuple[int, int, int]) -> None:
    """Switched off or set higher by the program, it stays so."""
    gc.set_threshold(*own)
    async with Durable("memory://"):
        assert gc.get_threshold() == own
    assert gc.get_threshold() == own


async def test_what_the_program_sets_meanwhile_stays() -> None:
    """A threshold set while an engine runs is not overwritten when it stops."""
    gc.set_threshold(700, 10, 10)
    async with Durable("memory://"):
        gc.set_threshold(5_000, 10, 10)
    assert gc.get_threshold()[0] == 5_000
