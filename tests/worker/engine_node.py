"""An engine in a process of its own: `python -m tests.worker.engine_node STORE TRANSPORT`. It runs `relay`, says when it is up,
and ends when its input does."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from durable import Context, Durable, RetryPolicy, workflow


@workflow(name="relay")
async def relay(ctx: Context, given: list[Any]) -> Any:
    """Calls one step by name."""
    name, value = given
    return await ctx.remote(name, value, retries=RetryPolicy(max_attempts=3, initial_delay=0.0, jitter=0.0))


async def main(store: str, transport: str) -> None:
    async with Durable(store, workflows=[relay], transport=transport):
        print("up", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
