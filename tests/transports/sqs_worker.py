"""A worker process that takes one task and never comes to an end; for tests that kill it."""

from __future__ import annotations

import asyncio
import sys

from durable.protocol.messages import Answer, Task
from durable.transports.sqs import SqsTransport


async def stuck(task: Task) -> Answer:
    print(task.id, flush=True)
    await asyncio.Event().wait()
    raise AssertionError


async def main(url: str, prefix: str, group: str) -> None:
    transport = SqsTransport(endpoint_url=url, prefix=prefix, wait=1, visibility=2)
    await transport.serve([group], stuck)
    await transport.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
