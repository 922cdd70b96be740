"""A worker, or an engine's end, in a process of its own: `python -m tests.transports.redis_node ROLE URL LEASE`. It says on its
output what happens to it, and is meant to be killed.

worker  serves the steps `quick` (returns its input) and `hang` (never returns)
engine  dispatches `quick` for the run `orphan`, and never takes an answer
app     a Durable of role worker with the same steps; hangs where a step is given its last argument
run     a Durable of role engine, on the store of its last argument, which starts the workflow `far_steps` and says its id
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from durable import Context, Durable, current_step, durable_step, workflow
from durable.protocol.messages import Answer, Task
from durable.testing.suites.transport import answer, task
from durable.transports.redis import RedisTransport


def say(*words: object) -> None:
    print(*words, flush=True)


async def handle(task: Task) -> Answer:
    say("began", task.id)
    if task.name == "hang":
        await asyncio.Event().wait()
    return answer(task)


async def deaf(result: Answer) -> None:
    say("heard", result.id)
    await asyncio.Event().wait()


@durable_step(name="quick")
async def quick(value: Any) -> Any:
    return value


@durable_step(name="hang")
async def hang(value: Any) -> Any:
    """Hangs in the first process that tries it, and in no other."""
    say("began", current_step().run_id)
    if value == sys.argv[4]:
        await asyncio.Event().wait()
    return value


@workflow(name="far_steps")
async def far_steps(ctx: Context, value: str) -> list[Any]:
    return [await ctx.remote("quick", value), await ctx.remote("hang", value), await ctx.remote("quick", 3)]


async def main(role: str, url: str, lease: float) -> None:
    transport = RedisTransport(url, lease=lease, alive_for=lease)
    if role == "app":
        async with Durable(role="worker", steps=[quick, hang], transport=transport):
            say("ready")
            await asyncio.Event().wait()
    if role == "run":
        async with Durable(sys.argv[4], workflows=[far_steps], transport=transport, lease=lease) as app:
            started = await app.start(far_steps, "x")
            say("ready")
            say(started.id)
            await asyncio.Event().wait()
    if role == "engine":
        transport.on_result(deaf)
    await transport.start()
    if role == "worker":
        await transport.serve(["quick", "hang"], handle)
    else:
        await transport.dispatch(task("orphan", name="quick"))
    say("ready")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
