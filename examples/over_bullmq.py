"""Steps over BullMQ: an engine and a worker that share nothing but a Redis. Here both in one process, to be seen at once; two
processes are the same two objects, and the worker may as well be written in another language.

    python examples/over_bullmq.py      with REDIS_URL, or a Redis on this machine
"""

import asyncio
import os

from durable import Context, Durable, current_step
from durable.core.errors import TransportError
from durable.transports.bullmq import BullMQTransport

URL = os.environ.get("REDIS_URL", "redis://localhost:6379")


def bullmq() -> BullMQTransport:
    return BullMQTransport(URL, prefix="durable-example")


queues = bullmq()
engine = Durable("sqlite:///.durable/over_bullmq.db", transport=queues)
worker = Durable(transport=bullmq(), role="worker")


@worker.step("images.thumbnail", retries=2)
async def thumbnail(name: str) -> str:
    print(f"  worker: {name}, attempt {current_step().attempt}")
    return f"{name}, 160 px wide"


@engine.workflow
async def gallery(ctx: Context, names: list[str]) -> list[str]:
    return await asyncio.gather(*(ctx.remote("images.thumbnail", name, returns=str) for name in names))


async def main() -> None:
    try:
        async with engine, worker:
            run = await engine.start(gallery, ["a.png", "b.png", "c.png"])
            print("gallery:", "; ".join(await run.result(timeout=30)))
            for alive in await queues.workers():
                print(f"alive: {alive.group}, {(alive.descriptor or {}).get('runtime')}")
    except TransportError as error:
        print(f"{error} Start a Redis, or name one as REDIS_URL.")


if __name__ == "__main__":
    asyncio.run(main())
