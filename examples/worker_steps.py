"""Steps to be served by processes of their own, and a workflow that calls them by name.

python examples/worker_steps.py                                          all in one process
durable worker examples/worker_steps.py --transport redis://localhost    only the steps
EXAMPLE_TRANSPORT=redis://localhost python examples/worker_steps.py      only the workflow
"""

import asyncio
import os

from durable import Context, Durable, Worker, current_step, durable_step
from durable.transports.event_emitter import EventEmitterTransport

URL = os.environ.get("EXAMPLE_TRANSPORT")
here = EventEmitterTransport()
engine = Durable("sqlite:///.durable/examples.db", transport=URL or here)


@durable_step("text.count", timeout="30s")
async def count(lines: list[str]) -> int:
    step, words = current_step(), 0
    for n, line in enumerate(lines, 1):
        words += len(line.split())
        await asyncio.sleep(0.1)
        step.progress(n / len(lines))
    return words


@durable_step("text.shout")
def shout(text: str) -> str:  # a plain function runs in a thread
    current_step().raise_if_cancelled()
    return text.upper()


app = Durable(steps=[count, shout])  # what `durable worker` serves


@engine.workflow
async def report(ctx: Context, lines: list[str]) -> str:
    words = await ctx.remote("text.count", lines)
    return await ctx.remote("text.shout", f"{words} words")


async def main() -> None:
    async with engine:
        run = await engine.start(report, ["to be or not to be", "that is the question"])
        print("result:", await run.result(timeout=30))


async def all_in_one() -> None:
    async with Worker([count, shout], transport=here.peer()) as worker:
        await main()
        print("tasks:", dict(worker.counts))


if __name__ == "__main__":
    asyncio.run(main() if URL else all_in_one())
