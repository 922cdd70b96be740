"""Remote steps over Redis: the workflow runs here, its step in another process that this one starts.

REDIS_URL=redis://localhost:6379/0 python examples/over_redis.py
"""

import asyncio
import contextlib
import os
import sys

from durable import Context, Durable, current_step
from durable.core.errors import TransportError
from durable.transports.redis import RedisTransport

REDIS = os.environ.get("REDIS_URL", "redis://localhost:6379/0")


def lane() -> RedisTransport:
    return RedisTransport(REDIS, namespace="example")


app = Durable("memory://", transport=lane())
worker = Durable(role="worker", transport=lane())


@worker.step("shop.charge", retries=2)
async def charge(number: int) -> str:
    return (
        f"order {number} charged under {current_step().idempotency_key[-2:]} by another process: {os.getpid() != MAIN}"
    )


@app.workflow
async def orders(ctx: Context, count: int) -> list[str]:
    return list(await asyncio.gather(*(ctx.remote("shop.charge", n, returns=str) for n in range(count))))


async def work() -> None:
    with contextlib.suppress(TransportError):  # the other process says it
        async with worker:
            await asyncio.to_thread(sys.stdin.read)  # until the other process ends


async def main() -> None:
    other = await asyncio.create_subprocess_exec(sys.executable, __file__, str(MAIN), stdin=asyncio.subprocess.PIPE)
    try:
        async with app:
            for line in await (await app.start(orders, 3)).result(timeout=20):
                print(line)
    except TransportError as error:
        print(f"No Redis at {REDIS}: start one, or name another as REDIS_URL. ({error})")
    finally:
        other.stdin.close()
        await other.wait()


if __name__ == "__main__":
    MAIN = int(sys.argv[1]) if len(sys.argv) > 1 else os.getpid()
    asyncio.run(work() if len(sys.argv) > 1 else main())
