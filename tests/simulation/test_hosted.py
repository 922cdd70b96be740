"""Workflows that workers host, under every fault there is."""

from __future__ import annotations

import logging

import msgspec
import pytest

from durable.testing.simulation.faults import Swarm
from durable.testing.simulation.runner import judge

SEEDS = range(16)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_whose_programs_are_hosted(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Near half of the programs live in workers that crash, freeze and lose answers; nothing goes wrong, and every run ends."""
    caplog.set_level(logging.CRITICAL, "durable")
    swarm = msgspec.structs.replace(Swarm.draw(seed), hosting=True, hosts_programs=True)
    verdict = judge(swarm)
    assert verdict.found == []
