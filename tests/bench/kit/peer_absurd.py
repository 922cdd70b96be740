"""The workloads on absurd: `python -m tests.bench.kit.peer_absurd URL '{"workers": 4, "concurrency": 16}'`.

Its worker has one connection, so a process may have several, each a client of its own. Who waits for a task polls; here
the end of a task is told in the process instead, and what is still to be written then is waited for before the clock stops.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import psycopg
from absurd_sdk import AsyncAbsurd

from tests.bench.kit.child import VALUE, gaps, serve, throughput

OPTIONS = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
STAMPS: list[float] = []
ENDED: dict[str, asyncio.Future[None]] = {}
NUMBERS = iter(range(1 << 62))


async def answer() -> dict[str, Any]:
    return VALUE


async def stamp() -> dict[str, Any]:
    STAMPS.append(time.perf_counter())
    return VALUE


async def five_steps(params: Any, ctx: Any) -> int:
    for number in range(5):
        await ctx.step(f"answer-{number}", answer)
    ENDED.pop(params["me"]).set_result(None)
    return 5


async def many_steps(params: Any, ctx: Any) -> int:
    for number in range(params["count"]):
        await ctx.step(f"stamp-{number}", stamp)
    ENDED.pop(params["me"]).set_result(None)
    return int(params["count"])


def client() -> AsyncAbsurd:
    one = AsyncAbsurd(sys.argv[1], queue_name="default")
    one.register_task("five_steps")(five_steps)
    one.register_task("many_steps")(many_steps)
    return one


SPAWNERS: list[AsyncAbsurd] = []


async def spawn_and_wait(name: str, **params: Any) -> None:
    number = next(NUMBERS)
    me = f"{os.getpid()}-{number}"
    ENDED[me] = ended = asyncio.get_running_loop().create_future()
    await SPAWNERS[number % len(SPAWNERS)].spawn(name, {"me": me, **params})
    await ended


async def settled() -> None:
    """Every task of this queue is completed in the database too."""
    async with await psycopg.AsyncConnection.connect(sys.argv[1], autocommit=True) as connection:
        while True:
            found = await connection.execute("SELECT 1 FROM absurd.t_default WHERE state <> 'completed' LIMIT 1")
            if await found.fetchone() is None:
                return
            await asyncio.sleep(0.005)


async def w1(seconds: float, at_once: int) -> dict[str, Any]:
    begun = time.perf_counter()
    result = await throughput(lambda: spawn_and_wait("five_steps"), seconds, at_once)
    if not OPTIONS.get("alone", True):
        return result
    await settled()
    result["seconds"] = time.perf_counter() - begun
    result["rate"] = result["workflows"] / result["seconds"]
    return result


async def w2(steps: int) -> dict[str, Any]:
    STAMPS.clear()
    await spawn_and_wait("many_steps", count=steps)
    return {"ms": gaps(STAMPS)}


async def main() -> None:
    clients = [client() for _ in range(OPTIONS.get("workers", 1))]
    SPAWNERS.extend(client() for _ in range(OPTIONS.get("spawners", 4)))
    for one in [*clients, *SPAWNERS]:
        await one.list_queues()  # connects; calls that come together would each connect
    workers = [
        asyncio.create_task(
            one.start_worker(
                worker_id=f"{os.getpid()}-{number}",
                concurrency=OPTIONS.get("concurrency", 16),
                poll_interval=OPTIONS.get("poll", 0.25),
            )
        )
        for number, one in enumerate(clients)
    ]
    await serve({"w1": w1, "w2": w2}, {"name": "absurd", "version": version("absurd-sdk")})
    for one in clients:
        one.stop_worker()
    await asyncio.wait(workers, timeout=5)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
