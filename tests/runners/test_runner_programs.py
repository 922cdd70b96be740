"""Random programs in a runner: what is replayed pass by pass comes out as what an engine runs by itself."""

from __future__ import annotations

import asyncio
import os
import re
from typing import Any

import pytest

from durable.core.clock import SystemClock
from durable.core.registry import Registry
from durable.runners.passes import PassHandler
from durable.testing.programs import PROGRAM, Program, count, generate, run_program, show
from tests.runners.little_engine import Ended, LittleEngine, asking
from tests.worker.test_random_turns import run_in, tame

PROGRAMS = int(os.environ.get("DURABLE_PROGRAMS", "200"))
BATCHES = 4


async def through_a_runner(program: Program) -> Any:
    handler = PassHandler(Registry([run_program]), SystemClock(), threads=0)
    engine = LittleEngine(asking(handler), PROGRAM, program)
    try:
        result = await engine.run()
    except Ended as ended:
        assert ended.args[1]["code"] in ("step_failed", "child_failed", "error"), ended
        return ended.args[0]
    return [re.sub(r"0\.\d{6} [0-9a-f-]{36}", "drawn", line) for line in result]


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_program_in_a_runner_ends_as_a_native_one(batch: int) -> None:
    """The same program, run by the engine and by a runner that is asked pass by pass, has the same outcome: the trace of all
    that happened."""
    for seed in range(batch, PROGRAMS, BATCHES):
        program = tame(generate(seed, signals=False))
        native = asyncio.run(run_in(seed, hosted=False))
        passes = asyncio.run(through_a_runner(program))
        assert passes == native, f"seed {seed}\n{show(program)}"


def test_the_programs_use_what_the_dialect_carries() -> None:
    """What is compared has children, remote steps, timers and patches in it."""
    made = [generate(seed, signals=False) for seed in range(100)]
    assert all(sum(count(program, op) for program in made) > 20 for op in ("child", "remote", "sleep", "step", "patch"))
