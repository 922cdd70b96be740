"""Cancel: a run is asked to stop, and may put things in order first. Its clean-up is as durable as the rest.

python examples/cancel.py
"""

import asyncio

from durable import Context, Durable, RunCancelled

app = Durable("sqlite:///.durable/examples.db")


async def reserve(room: str) -> str:
    return f"{room}-17"


async def release(booking: str) -> None:
    print(f"  released {booking}")


@app.workflow
async def holiday(ctx: Context, room: str) -> str:
    booking = await ctx.step(reserve, room)
    try:
        await ctx.sleep("30d")
    except asyncio.CancelledError:
        await ctx.step(release, booking)
        raise
    return booking


async def main() -> None:
    async with app:
        run = await app.start(holiday, "sea-view")
        while (await run.get()).activity != "sleeping":
            await asyncio.sleep(0.02)
        print("first request:", await run.cancel("plans have changed"))
        try:
            await run.result(timeout=30)
        except RunCancelled:
            print("the run is", (await run.get()).status)


if __name__ == "__main__":
    asyncio.run(main())
