"""Steps over SQS: an engine and a worker that share nothing but queues. Here both in one process, to be seen at once; two
processes are the same two objects.

    python examples/over_sqs.py      with SQS_ENDPOINT_URL for a local server, or the usual AWS variables
"""

import asyncio
import os

from durable import Context, Durable, current_step
from durable.core.errors import TransportError
from durable.transports.sqs import SqsTransport

for name, local in {
    "AWS_DEFAULT_REGION": "eu-west-1",
    "AWS_ACCESS_KEY_ID": "local",
    "AWS_SECRET_ACCESS_KEY": "local",
}.items():
    if "SQS_ENDPOINT_URL" in os.environ:  # a local server asks for credentials and takes any
        os.environ.setdefault(name, local)


def sqs() -> SqsTransport:
    return SqsTransport(prefix="durable-example", wait=2)


engine = Durable("sqlite:///.durable/over_sqs.db", transport=sqs())
worker = Durable("sqlite:///.durable/over_sqs.db", transport=sqs(), role="worker")


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
        print(f"There is no SQS: {error}")


if __name__ == "__main__":
    asyncio.run(main())
