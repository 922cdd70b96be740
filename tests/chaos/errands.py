"""Steps for worker processes of the chaos tests: `durable worker tests.chaos.errands:app --transport URL`.

Every body leaves lines in the ledger (CHAOS_LEDGER), a file that no engine reads: [step id, attempt, pid, what].
"""

from __future__ import annotations

import asyncio
import json
import os

from durable import Durable, current_step

app = Durable("memory://", role="worker")


def witness(what: str) -> None:
    """Append one line, whole: O_APPEND writes of this size do not mix."""
    step = current_step()
    line = json.dumps([step.step_id, step.attempt, os.getpid(), what]) + "\n"
    ledger = os.open(os.environ.get("CHAOS_LEDGER", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(ledger, line.encode())
    finally:
        os.close(ledger)


@app.step("errands.quick")
async def quick(n: int) -> int:
    """Done at once."""
    witness("done")
    return n + 1


@app.step("errands.slow")
async def slow(seconds: float) -> int:
    """Takes its time, and says who did it."""
    witness("began")
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        witness("cancelled")
        raise
    witness("done")
    return os.getpid()


@app.step("errands.poison")
async def poison(n: int) -> int:
    """Takes its process with it."""
    witness("killed")
    os._exit(77)
