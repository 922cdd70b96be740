"""Waiting for facts: a test says what must become true and never how long that takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PATIENCE = 20.0
"""Seconds after which a fact is said to be missing. Nothing passes because of it."""
PAUSE = 0.005


async def eventually(fact: Callable[[], object], claim: str = "", *, timeout: float = PATIENCE) -> None:
    """Return as soon as `fact()` holds; fail with the claim when it never does."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while not fact():
        if loop.time() > deadline:
            raise AssertionError(f"never came true: {claim or fact}")
        await asyncio.sleep(PAUSE)
