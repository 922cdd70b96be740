"""Sleep: a durable timer. The engine is stopped while the run sleeps; the next one wakes it when the time has come.

python examples/sleep.py
"""

import asyncio

from durable import Context, Durable

app = Durable("sqlite:///.durable/examples.db")


@app.workflow
async def reminder(ctx: Context, text: str) -> str:
    asked = ctx.now()
    await ctx.sleep("1s")  # "3d" costs no more: a row in a table, and nothing in memory
    late = (ctx.now() - asked).total_seconds()
    return f"{text} (after {late:.0f} s)"


async def main() -> None:
    async with app:
        run = await app.start(reminder, "drink water")
        while (await run.get()).activity != "sleeping":
            await asyncio.sleep(0.02)
        print("the run sleeps; the engine stops")

    async with app:
        print("a new engine is up")
        print("result:", await app.run(run.id).result(timeout=30))


if __name__ == "__main__":
    asyncio.run(main())
