"""A hosted workflow: its code lives in a worker, in whatever language; the engine keeps its state and hands it turn by turn.
Here both ends are in one process; another transport, or another language, changes neither workflow nor engine.

    python examples/hosted_workflow.py
"""

import asyncio

from durable import Context, Durable, Worker, durable_step, remote_workflow, workflow
from durable.transports.event_emitter import EventEmitterTransport


def weigh(parcel: str) -> int:
    print(f"  worker: weighing {parcel}")
    return 10 * len(parcel)


@workflow("parcels.send")
async def send(ctx: Context, parcel: str) -> str:
    grams = await ctx.step("weigh", weigh, parcel)  # runs in the worker, in the turn that reaches it, once
    label, _ = await asyncio.gather(ctx.remote("labels.print", grams), ctx.sleep(0.1))
    courier = await ctx.wait_for_signal("picked up", type=str)
    return f"{parcel}: {label}, with {courier}"


@durable_step("labels.print")
async def print_label(grams: int) -> str:
    return f"{grams} g"


async def main() -> None:
    transport = EventEmitterTransport()
    app = Durable("sqlite:///.durable/examples.db", transport=transport)
    app.register(print_label, remote_workflow("parcels.send"))  # the engine's end: a name, no code
    async with app, Worker(workflows=[send], transport=transport.peer()):
        run = await app.start("parcels.send", "books")
        await run.signal("picked up", "ann")
        print("result:", await run.result(timeout=30))
        async for entry in run.watch():
            if entry.kind in ("step", "remote") and entry.status == "completed":
                print(f"  {entry.key}")  # turns are entries like any other


if __name__ == "__main__":
    asyncio.run(main())
