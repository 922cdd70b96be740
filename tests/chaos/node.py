"""One engine as a process, for the chaos tests: `python -m tests.chaos.node <store> <ledger> <settings as JSON>`.

Every step body leaves a line in the ledger, a file of its own that no engine reads: the witness of what really ran.
SIGTERM drains; the rest is done to it from outside.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
from typing import Any

from durable import Context, Durable, current_step, workflow

LEDGER = sys.argv[2] if len(sys.argv) > 2 else os.devnull


def witness(value: Any) -> Any:
    """Append one line, whole: O_APPEND writes of this size do not mix."""
    step = current_step()
    line = json.dumps([step.run_id, step.key, step.attempt, os.getpid(), value]) + "\n"
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


@workflow(name="poison")
async def poison(ctx: Context) -> None:
    async def kill() -> None:
        witness("killed")
        os._exit(77)

    await ctx.step("kill", kill)


@workflow(name="poison-turn")
async def poison_turn(ctx: Context) -> None:
    await ctx.wait_for_signal("go")
    os._exit(77)


@workflow(name="waits")
async def waits(ctx: Context) -> Any:
    return await ctx.wait_for_signal("go")


WORKFLOWS = [load, poison, poison_turn, waits]


async def main() -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with Durable(sys.argv[1], workflows=WORKFLOWS, **json.loads(sys.argv[3])) as app:
        print("ready", app.engine.incarnation, flush=True)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())
