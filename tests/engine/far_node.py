"""A pod in a process of its own: `python -m tests.engine.far_node URL`. It executes, and says on its output what its step body
sees. Ends when its input does."""

from __future__ import annotations

import asyncio
import sys

from durable import Context, Durable, workflow


def say(word: str) -> None:
    print(word, flush=True)


async def work() -> None:
    say("began")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        say("cancelled")
        raise


@workflow(name="far")
async def far(ctx: Context) -> None:
    await ctx.step("work", work)


async def main(url: str) -> None:
    async with Durable(url, workflows=[far], poll_every=30):
        say("ready")
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
