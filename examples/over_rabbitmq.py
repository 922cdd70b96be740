"""Steps over RabbitMQ: an engine and a worker that share nothing but queues. Here both in one process, to be seen at once;
two processes are the same two objects.

    python examples/over_rabbitmq.py      with AMQP_URL, or a broker on this machine
"""

import asyncio
import os

from durable import Context, Durable, current_step
from durable.core.errors import TransportError
from durable.transports.rabbitmq import RabbitMqTransport

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


def rabbit() -> RabbitMqTransport:
    return RabbitMqTransport(URL, prefix="durable-example")


engine = Durable("sqlite:///.durable/over_rabbitmq.db", transport=rabbit())
worker = Durable("sqlite:///.durable/over_rabbitmq.db", transport=rabbit(), role="worker")


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
    except TransportError as error:
        print(f"{error} Start one (apt install rabbitmq-server), or name one as AMQP_URL.")


if __name__ == "__main__":
    asyncio.run(main())
