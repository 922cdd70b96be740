"""A pod in a process of its own: `python -m tests.engine.far_node URL [CONTROL_PLANE POLL_SECONDS]`. It executes, and says on
its output what its step body sees. Ends when its input does."""

from __future__ import annotations

import asyncio
import sys

from durable import Context, Durable, workflow
from durable.store.postgres import PostgresStore


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


async def main(url: str, control_plane: str | None = None, poll_every: str = "30") -> None:
    # With a control plane given, the database's own pushes would prove nothing.
    store = PostgresStore(url, notifications=False) if control_plane else url
    async with Durable(store, workflows=[far], control_plane=control_plane, poll_every=float(poll_every)):
        say("ready")
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
