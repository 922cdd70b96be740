"""Seeds: the whole engine under faults, each seed with at least 3 engines, 20 runs and 5 faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from durable.testing.simulation.faults import KINDS, MOVES, Swarm
from durable.testing.simulation.runner import Case, Totals, regressions, run_cases, run_many

HERE = Path(__file__).parent
SEEDS = 2_000
ENOUGH = 500


def told(totals: Totals) -> str:
    """What to do about failures."""
    lines = [
        f"python -m durable.testing.simulation --seed {one.seed} --shrink   # {one.found[0]}" for one in totals.failed
    ]
    return "\n".join(lines[:10])


def test_regressions_stay_fixed() -> None:
    """Every seed that once found a bug passes."""
    for case, found in run_cases(regressions(HERE / "regressions.txt")):
        assert not found, f"{case.why}: {found}\npython -m durable.testing.simulation --case '{case.text()}' --trace"


@pytest.mark.timeout(1800)
def test_many_seeds(budget: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing wrong ever happens, everything ends after healing, and every kind of fault and entry has been seen."""
    for case, found in run_cases(regressions(HERE / "regressions.txt")):
        assert not found, f"{case.why}: {found}"
    seconds = None if budget.seconds is None else max(10.0, 0.7 * budget.seconds)
    totals = run_many(budget.start, SEEDS, seconds=seconds)
    with capsys.disabled():
        print("\n" + "\n".join(totals.lines()))
    assert not totals.failed, told(totals)
    assert totals.seeds < ENOUGH or not totals.zeros(), f"never happened: {totals.zeros()}"


def test_a_seed_is_big_enough() -> None:
    """A seed has at least 3 engines, 20 runs and 5 faults of its nemesis, whatever was drawn."""
    for seed in range(300):
        swarm = Swarm.draw(seed)
        assert swarm.engines >= 3
        assert len(swarm.runs) >= 20
        assert len(swarm.moves) >= 5
        assert swarm.kinds <= set(KINDS)
        assert swarm.kinds & set(MOVES)


def test_a_seed_is_the_same_in_every_process() -> None:
    """Two processes take a seed the same way, callback by callback."""
    cases = [Case(seed) for seed in range(3)]
    first, second = ([(v.steps, v.virtual, v.commands) for v in _verdicts(cases)] for _ in range(2))
    assert first == second


def _verdicts(cases: list[Case]) -> list[Any]:
    seen: list[Any] = []
    for case in cases:
        run_many(case.seed, 1, processes=1, on_verdict=seen.append)
    return seen
