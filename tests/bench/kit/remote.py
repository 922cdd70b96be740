"""The processes of `bench remote`: `python -m tests.bench.kit.remote URL '{"role": "engine", "carrier": "lane", "broker": URL}'`.

engine  executes workflows whose steps are remote; worker  serves the step; rounds  is the transport without an engine;
raw     is the broker's client without the transport, and raw_worker its other side.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import msgspec

from durable import Context, Durable, durable_step, workflow
from durable.protocol.messages import Answer, RemoteTask, routing_token, step_id
from tests.bench.kit.carriers import CARRIERS, rounds
from tests.bench.kit.child import VALUE, gaps, serve
from tests.bench.kit.ours import sampled

OPTIONS = json.loads(sys.argv[2])
BROKER = OPTIONS.get("broker", "")
CARRIER = CARRIERS[OPTIONS["carrier"]]
STAMPS: list[float] = []


@durable_step(name="bench.answer")
async def answer(number: int) -> dict[str, Any]:
    return VALUE


@workflow(name="far_steps")
async def far_steps(ctx: Context, count: int) -> int:
    for number in range(count):
        STAMPS.append(time.perf_counter())
        await ctx.remote("bench.answer", number)
    return count


class Engine:
    def __init__(self, app: Durable) -> None:
        self.app = app

    async def lone(self, steps: int) -> dict[str, Any]:
        """From one step's dispatch to the next one's, of one workflow alone."""
        await (await self.app.start(far_steps, 5)).result()
        STAMPS.clear()
        await (await self.app.start(far_steps, steps)).result()
        return {"ms": gaps(STAMPS)}

    async def many(self, workflows: int, steps: int) -> dict[str, Any]:
        """All at once, until the last is done."""
        begun = time.perf_counter()
        handles = await asyncio.gather(*(self.app.start(far_steps, steps) for _ in range(workflows)))
        await asyncio.gather(*(handle.result() for handle in handles))
        STAMPS.clear()
        return {"rate": workflows / (time.perf_counter() - begun)}

    async def profile(self, workflows: int, steps: int, top: int) -> dict[str, Any]:
        return await sampled(lambda: self.many(workflows, steps), workflows * steps, top)


async def transport_rounds(lone: int, seconds: float, at_once: int) -> dict[str, Any]:
    """Dispatch, and wait for the answer: all that the transport does, and no engine."""
    transport = CARRIER.build(BROKER)
    waiting: dict[str, asyncio.Future[None]] = {}

    async def take(result: Answer) -> None:
        waiting.pop(result.id).set_result(None)

    transport.on_result(take)
    await transport.start()
    number, group, data = 0, routing_token("bench.answer"), msgspec.Raw(b"1")

    async def once() -> None:
        nonlocal number
        number += 1
        run_id = f"bench-{number}"
        key = step_id(run_id, 0)
        waiting[key] = asyncio.get_running_loop().create_future()
        await transport.dispatch(
            RemoteTask(run_id=run_id, seq=0, step_id=key, name="bench.answer", group=group, input=data, attempt=1)
        )
        future = waiting.get(key)
        if future is not None:
            await future

    measured = await rounds(once, lone, seconds, at_once)
    await transport.close()
    return measured


async def raw_rounds(lone: int, seconds: float, at_once: int) -> dict[str, Any]:
    assert CARRIER.raw_client is not None
    client, data = await CARRIER.raw_client(BROKER), json.dumps(VALUE).encode()
    return await rounds(lambda: client(data), lone, seconds, at_once)


async def profile_worker(seconds: float, top: int) -> dict[str, Any]:
    return await sampled(lambda: asyncio.sleep(seconds), 1, top)


async def main() -> None:
    role, hello = OPTIONS["role"], {"name": "durable"}
    if role == "rounds":
        await serve({"rounds": transport_rounds}, hello)
    elif role == "raw":
        await serve({"rounds": raw_rounds}, hello)
    elif role == "raw_worker":
        assert CARRIER.raw_worker is not None
        working = asyncio.create_task(CARRIER.raw_worker(BROKER))
        await serve({}, hello)
        working.cancel()
    elif role == "worker":
        async with Durable(role="worker", steps=[answer], transport=CARRIER.build(BROKER)):
            await serve({"profile": profile_worker}, hello)
    else:
        here = [answer] if CARRIER.server is None else []
        app = Durable(sys.argv[1], workflows=[far_steps], steps=here, transport=CARRIER.build(BROKER))
        async with app:
            engine = Engine(app)
            await serve({"lone": engine.lone, "many": engine.many, "profile": engine.profile}, hello)


if __name__ == "__main__":
    asyncio.run(main())
