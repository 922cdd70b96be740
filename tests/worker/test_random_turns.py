"""Random programs, hosted: what a worker replays turn by turn comes out as what an engine runs by itself."""

from __future__ import annotations

import asyncio
import os
import re
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import msgspec
import pytest

from durable import Durable, RunFailed, RunHandle, remote_workflow
from durable.core.errors import RunFinished
from durable.core.registry import Registry
from durable.protocol.messages import Answer, Task, WorkflowDecision, WorkflowTask
from durable.store.memory import MemoryStore
from durable.testing.programs import (
    PROGRAM,
    Program,
    count,
    generate,
    nodes,
    run_program,
    show,
    work_remotely,
)
from durable.testing.virtual import VirtualClock, VirtualTime
from durable.transports.event_emitter import EventEmitterTransport
from durable.worker.handler import StepHandler, groups_of
from durable.worker.turns import TurnHandler, turn_groups

PROGRAMS = int(os.environ.get("DURABLE_PROGRAMS", "200"))
BATCHES = 4
START = 1_767_225_600_000_000
_YEAR = 365 * 86_400.0
QUIET: dict[str, Any] = {
    "lease": 100 * _YEAR,
    "poll_every": 10 * _YEAR,
    "reconcile": 10 * _YEAR,
    "retention_every": 10 * _YEAR,
    "tick": 0.0,
    "threads": False,
}


def latency(task: Task) -> float:
    """A remote step takes longer than anything local and less than any timer, and no two take the same."""
    return 0.0001 + zlib.crc32(f"{task.seq} {task.run_id.partition('.')[2]}".encode()) % 9_973 * 1e-7


class Clock(VirtualClock):
    """Cut off where an engine's own is: with a store that says due and an engine that says not yet, time would stand still."""

    def now(self) -> int:
        return START + int(self.monotonic() * 1_000_000)


class World:
    """An engine, a worker of steps, and a worker that hosts `run_program`, in virtual time."""

    def __init__(self, app: Durable, clock: VirtualClock, transport: EventEmitterTransport) -> None:
        self.app = app
        self.clock = clock
        self.transport = transport
        self.turns: list[tuple[WorkflowTask, WorkflowDecision]] = []


@asynccontextmanager
async def world(*, hosted: bool, chaos: Random | None = None, cold: bool = False) -> AsyncIterator[World]:
    virtual = VirtualTime.enter()
    clock = Clock(START)
    clock.begin(virtual)
    transport = EventEmitterTransport()
    app = Durable(MemoryStore(clock), transport=transport, cold=cold, clock=clock, **QUIET)
    app.register(remote_workflow(PROGRAM, turn_timeout=5) if hosted else run_program)
    steps, turns = Registry([work_remotely]), Registry([run_program])
    run_step = StepHandler(steps, clock, threads=0)
    take_turn = TurnHandler(turns, clock, threads=0)
    here = World(app, clock, transport)

    async def step(task: Task) -> Answer:
        await asyncio.sleep(latency(task) if chaos is None else chaos.choice([0.0, 0.001, 0.01, 0.06]))
        return await run_step(task)

    async def turn(task: Task) -> Answer:
        assert isinstance(task, WorkflowTask)
        if chaos is not None:
            await asyncio.sleep(chaos.choice([0.0, 0.0, 0.002, 0.02]))
        decision = await take_turn(task)
        assert isinstance(decision, WorkflowDecision)
        if chaos is not None and chaos.random() < 0.15:
            # It never gets there; a worker would go on to answer under an id that is no longer awaited.
            return msgspec.structs.replace(decision, task_id=f"{task.run_id}:wf:ffffffff")
        here.turns.append((task, decision))
        return decision

    peer = transport.peer()
    await peer.serve(groups_of(steps), step)
    await peer.serve(turn_groups(turns), turn)
    try:
        async with app:
            await peer.start()
            yield here
            await peer.close()
    finally:
        virtual.leave()


async def outcome(run: RunHandle[Any]) -> Any:
    """What it returned, or the error it failed with. A program may fail of a step; a run may not fail of being hosted."""
    try:
        result = await run.result(100_000)
    except RunFailed as error:
        assert error.error is not None
        assert error.error.code in ("step_failed", "child_failed", "error"), error
        return error.error.message
    # Random numbers follow from the run's id, which is another one each time.
    return [re.sub(r"0\.\d{6} [0-9a-f-]{36}", "drawn", line) for line in result]


def tame(program: Program) -> Program:
    """Without what is a tie in one world and none in the other: every timer has a length of its own, a child does nothing in its
    first moment, and a local step has one attempt, in place."""
    for node in list(nodes(program)):
        if node.get("ms"):
            node["ms"] = 1_000 * node["ms"] + 7 * node["id"] % 997
        if "failures" in node:
            node["failures"] = 0
            node["async"] = True
        if "program" in node:
            first = {"op": "sleep", "id": 1_000 + node["id"], "ms": 100 + 13 * node["id"] % 89, "plain": True}
            node["program"]["root"]["body"].insert(0, first)
    return program


async def run_in(seed: int, *, hosted: bool) -> Any:
    program = tame(generate(seed, signals=False))
    async with world(hosted=hosted, cold=seed % 2 == 0) as here:
        return await outcome(await here.app.start(PROGRAM, program))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_hosted_program_ends_as_a_native_one(batch: int) -> None:
    """The same program, run by the engine and hosted by a worker, has the same outcome: the trace of all that happened."""
    for seed in range(batch, PROGRAMS, BATCHES):
        native = asyncio.run(run_in(seed, hosted=False))
        hosted = asyncio.run(run_in(seed, hosted=True))
        assert hosted == native, f"seed {seed}\n{show(tame(generate(seed, signals=False)))}"


async def chaotic(seed: int) -> None:
    program = generate(seed)
    chaos = Random(f"turns {seed}")
    async with world(hosted=True, chaos=chaos, cold=seed % 2 == 0) as here:
        run = await here.app.start(PROGRAM, program)
        for name, value in program["signals"]:
            await asyncio.sleep(chaos.choice([0.0, 0.001, 0.03]))
            try:
                await run.signal(name, value)
            except RunFinished:
                break
        await outcome(run)
        # Whatever a turn has answered, it answers again: nothing is kept between turns but what the engine says.
        again = TurnHandler(Registry([run_program]), here.clock, threads=0)
        for task, decision in here.turns[-3:]:
            if decision.status == "completed":
                repeated = await again(task)
                assert isinstance(repeated, WorkflowDecision)
                assert repeated.output == decision.output


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_turn_agrees_with_the_turns_before(batch: int) -> None:
    """Any program ends completed, however slow its steps, however late its signals, whatever decisions are lost: no turn ever
    finds a history that its code would not have made."""
    for seed in range(batch, PROGRAMS, BATCHES):
        try:
            asyncio.run(chaotic(seed))
        except BaseException:
            print(f"seed {seed}\n{show(generate(seed))}")
            raise


def test_the_programs_use_children_and_signals() -> None:
    """What is compared has children, remote steps, timers and signals in it."""
    made = [generate(seed) for seed in range(100)]
    assert all(
        sum(count(program, op) for program in made) > 20 for op in ("child", "remote", "sleep", "signal", "patch")
    )
