"""One engine as a process, for the chaos tests: `python -m tests.chaos.node <store> <ledger> <settings as JSON>`.

Every step body leaves a line in the ledger, a file of its own that no engine reads: the witness of what really ran.
SIGTERM drains; the rest is done to it from outside. Among the settings, `skew` is how many seconds its wall clock is wrong,
and `only` names the workflows it serves.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
from functools import partial
from typing import Any

from durable import Context, DeadLetter, Durable, current_step, durable_step, workflow
from durable.core.clock import SECOND, SystemClock
from durable.core.definition import workflow_of

LEDGER = os.devnull
"""Set by `main`: whoever imports this leaves no witness."""


def witness(value: Any) -> Any:
    """Append one line, whole: O_APPEND writes of this size do not mix."""
    step = current_step()
    line = json.dumps([step.run_id, step.step_id, step.key, step.attempt, os.getpid(), value]) + "\n"
    ledger = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(ledger, line.encode())
    finally:
        os.close(ledger)
    return value


async def body(seconds: float) -> int:
    witness(None)
    await asyncio.sleep(seconds)
    value: int = witness(random.getrandbits(40))
    return value


@workflow(name="load")
async def load(ctx: Context, seconds: float) -> list[int]:
    """Steps in a row and side by side, with a sleep between: three and three."""
    values: list[int] = [await ctx.step("row", body, seconds) for _ in range(3)]
    await ctx.sleep(seconds / 2)
    return values + list(await asyncio.gather(*(ctx.step("side", body, seconds) for _ in range(3))))


@durable_step("chaos.errand")
async def errand(seconds: float) -> int:
    return await body(seconds)


@workflow(name="family")
async def family(ctx: Context, seconds: float) -> list[Any]:
    """Two children side by side, then a task over the transport."""
    values: list[Any] = list(await asyncio.gather(*(ctx.child(load, seconds) for _ in range(2))))
    return [*values, await ctx.remote(errand, seconds)]


@workflow(name="collect")
async def collect(ctx: Context, count: int) -> list[Any]:
    """As many signals as it was told to wait for, in the order they came."""
    return [await ctx.wait_for_signal("go") for _ in range(count)]


@workflow(name="bulky")
async def bulky(ctx: Context, filling: str) -> int:
    """A large input, which every claim reads."""
    value: int = await ctx.step("row", body, 0.05)
    return value


@workflow(name="poison")
async def poison(ctx: Context) -> None:
    async def kill() -> None:
        witness("killed")
        os._exit(77)

    await ctx.step("kill", kill)


@workflow(name="burial")
async def burial(ctx: Context, letter: DeadLetter) -> str:
    """The dead-letter workflow: says whose death it was told of, and leaves a witness of having been told."""
    await ctx.step("told", partial(witness, letter.run_id))
    return letter.run_id


@workflow(name="poison-turn")
async def poison_turn(ctx: Context) -> None:
    await ctx.wait_for_signal("go")
    os._exit(77)


@workflow(name="waits")
async def waits(ctx: Context) -> Any:
    return await ctx.wait_for_signal("go")


WORKFLOWS = [load, family, collect, bulky, poison, burial, poison_turn, waits]
STEPS = [errand]


class WrongClock(SystemClock):
    """A machine whose wall clock is wrong by so many seconds."""

    def __init__(self, skew: float) -> None:
        self._skew = int(skew * SECOND)

    def now(self) -> int:
        return super().now() + self._skew


async def main() -> None:
    """Serve until SIGTERM."""
    global LEDGER
    store, LEDGER, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s:%(name)s:%(process)d:%(message)s"
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    clock = WrongClock(settings.pop("skew", 0.0))
    only = settings.pop("only", None)
    workflows = [one for one in WORKFLOWS if only is None or workflow_of(one).name in only]
    async with Durable(store, workflows=workflows, steps=STEPS, clock=clock, **settings) as app:
        print("ready", app.engine.incarnation, flush=True)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())
