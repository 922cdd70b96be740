"""Schedules: a run every second, whoever is up; a pause; one by hand.

python examples/schedules.py
"""

import asyncio

from durable import Context, Durable
from durable.store.records import RunQuery

app = Durable("sqlite:///.durable/examples.db")


@app.workflow
async def heartbeat(ctx: Context, who: str) -> str:
    return f"{who} is alive"


async def main() -> None:
    async with app:
        await app.schedules.ensure("beat", heartbeat, "the shop", cron="* * * * * *", catch_up="all")
        while len((await app.find(RunQuery(workflow="heartbeat"))).runs) < 2:
            await asyncio.sleep(0.05)
        paused = await app.schedules.pause("beat")
        print("paused after two seconds; next:", paused.next_at)
        by_hand = await app.schedules.trigger("beat")
        print("by hand:", await app.run(by_hand).result(timeout=10))
        await app.schedules.remove("beat")
        print("left:", [schedule.id for schedule in await app.schedules.list()])


if __name__ == "__main__":
    asyncio.run(main())
