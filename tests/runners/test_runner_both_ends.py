"""Both ends together: the engine's driver of functions that live in apps, and a runner's passes. Programs end as native."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from durable import Durable
from durable.core.functions import AppFunction, Pass, Reply, function_workflow
from durable.core.registry import Registry
from durable.runners.runner import Runner
from durable.store.memory import MemoryStore
from durable.testing.programs import PROGRAM, generate, run_program, show, work_remotely
from durable.testing.virtual import VirtualTime
from durable.transports.event_emitter import EventEmitterTransport
from durable.worker.handler import StepHandler, groups_of
from tests.worker.test_random_turns import QUIET, START, Clock, latency, outcome, run_in, tame

PROGRAMS = int(os.environ.get("DURABLE_PROGRAMS", "200"))
BATCHES = 4


@asynccontextmanager
async def world(*, cold: bool) -> AsyncIterator[Durable]:
    """An engine whose program lives in a runner, in virtual time."""
    virtual = VirtualTime.enter()
    clock = Clock(START)
    clock.begin(virtual)
    transport = EventEmitterTransport()
    runner = Runner([run_program], app="shop.dev", clock=clock, threads=0)

    async def ask(call: Pass) -> Reply:
        return Reply(*await runner.answer(call.body))

    app = Durable(MemoryStore(clock), transport=transport, cold=cold, clock=clock, **QUIET)
    app.register(function_workflow(AppFunction(PROGRAM, "1", "default", "shop.dev", "runner", ask)))
    steps = Registry([work_remotely])
    run_step = StepHandler(steps, clock, threads=0)

    async def step(task: Any) -> Any:
        await asyncio.sleep(latency(task))
        return await run_step(task)

    peer = transport.peer()
    await peer.serve(groups_of(steps), step)
    try:
        async with app:
            await peer.start()
            yield app
            await peer.close()
    finally:
        virtual.leave()


async def run_outside(seed: int) -> Any:
    async with world(cold=seed % 2 == 0) as app:
        return await outcome(await app.start(PROGRAM, tame(generate(seed, signals=False))))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_program_in_a_runner_of_our_engine_ends_as_a_native_one(batch: int) -> None:
    """The same program, run by the engine itself and by a runner that it asks pass by pass, has the same outcome."""
    for seed in range(batch, PROGRAMS, BATCHES):
        native = asyncio.run(run_in(seed, hosted=False))
        passes = asyncio.run(run_outside(seed))
        assert passes == native, f"seed {seed}\n{show(tame(generate(seed, signals=False)))}"
