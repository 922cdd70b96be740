"""Steps for worker processes: `durable worker tests/worker/steps_app.py --transport …`. They say live what becomes of them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from durable import Durable, NonRetryable, RetryAfter, current_step

app = Durable("sqlite:///never-opened.db")


@app.step("greet")
async def greet(name: str) -> str:
    current_step().log("greeting", who=name)
    return f"hello {name}"


@app.step("sleep")
async def sleep(seconds: float) -> int:
    """Says when it begins; returns its attempt."""
    step = current_step()
    step.progress(0.0)
    await asyncio.sleep(seconds)
    step.progress(1.0)
    return step.attempt


@app.step("first_hangs")
async def first_hangs(marker: str) -> str:
    """Hangs in the first process that tries it, and in no other: `marker` is a file that says so."""
    current_step().log("begun")
    try:
        Path(marker).touch(exist_ok=False)  # noqa: ASYNC240 - once, and at once
    except FileExistsError:
        return "done"
    await asyncio.Event().wait()
    return "never"


@app.step("spin")
def spin(_: None) -> None:
    """A plain body that ends when nobody waits for it any more."""
    step = current_step()
    step.log("begun")
    while not step.cancelled:
        time.sleep(0.005)
    print("spin saw its cancel", flush=True)
    step.raise_if_cancelled()


@app.step("broken", retries=0)
def broken(_: None) -> None:
    raise ValueError("cannot bear it")


@app.step("picky")
async def picky(mood: str) -> int:
    """Raises by its mood; else returns its attempt."""
    attempt = current_step().attempt
    if mood == "never":
        raise NonRetryable("not with me")
    if mood == "later" and attempt == 1:
        raise RetryAfter("come back", seconds=0.3)
    return attempt
