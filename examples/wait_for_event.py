"""Wait for an event: a run goes on when something happens elsewhere, to its own order, in time or not.

python examples/wait_for_event.py
"""

import asyncio
from dataclasses import dataclass

from durable import Context, Durable, WaitTimeout

app = Durable("sqlite:///.durable/examples.db")


@dataclass
class Payment:
    order: str
    amount: int


@app.workflow
async def deliver(ctx: Context, order: str) -> str:
    try:
        paid = await ctx.wait_for_event("paid", match={"order": order}, type=Payment, timeout="1s")
    except WaitTimeout:
        return f"{order}: nobody paid"
    # An expression says what equality cannot; early=False passes over what came before this moment.
    weather = await ctx.wait_for_event("weather", where="event.data.wind < 10", timeout="5s")
    return f"{order}: paid {paid.data.amount}, flown at wind {weather.data['wind']}"


async def main() -> None:
    async with app:
        first, second = await app.start(deliver, "kite"), await app.start(deliver, "anvil")
        published = await app.send_event("paid", Payment("kite", 30))  # early or not, the run gets it once
        print("an event of no trigger starts", len(published.admissions), "runs")
        await app.send_event("weather", {"wind": 60})
        await app.send_event("weather", {"wind": 5})
        print(await first.result(timeout=30))
        print(await second.result(timeout=30))


if __name__ == "__main__":
    asyncio.run(main())
