"""Many things at once, with plain asyncio: gather, TaskGroup, timeout. Order and winners are the same on every replay.

python examples/gather.py
"""

import asyncio

from durable import Context, Durable

app = Durable("sqlite:///.durable/examples.db")


async def quote(shop: str) -> int:
    await asyncio.sleep({"slow": 5.0, "dear": 0.02, "cheap": 0.04}[shop])
    return {"slow": 1, "dear": 30, "cheap": 20}[shop]


@app.workflow
async def best_price(ctx: Context) -> str:
    prices = await asyncio.gather(ctx.step("dear", quote, "dear"), ctx.step("cheap", quote, "cheap"))
    try:
        async with asyncio.timeout(0.3):  # a durable timer; the step is cancelled when it fires
            prices.append(await ctx.step("slow", quote, "slow"))
    except TimeoutError:
        ctx.log("no answer from the slow shop")
    winner = await ctx.gather(ctx.step("race", quote, "cheap"), ctx.step("race", quote, "dear"), mode="first")
    return f"best of {prices}: {min(prices)}; first to answer: {winner}"


async def main() -> None:
    async with app:
        run = await app.start(best_price)
        print(await run.result(timeout=30))


if __name__ == "__main__":
    asyncio.run(main())
