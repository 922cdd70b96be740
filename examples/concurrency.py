"""Concurrency: at most so many runs under way, over all engines, for each customer and in all. The others wait as rows.

python examples/concurrency.py
"""

import asyncio
from collections import Counter

from durable import Concurrency, Context, Durable

app = Durable("sqlite:///.durable/examples.db")
now: Counter[str] = Counter()
most: Counter[str] = Counter()


async def render(customer: str) -> None:
    for who in (customer, "in all"):
        now[who] += 1
        most[who] = max(most[who], now[who])
    await asyncio.sleep(0.05)
    now.subtract((customer, "in all"))


@app.workflow(on="video.uploaded", concurrency=[Concurrency(2, key="event.data.customer"), Concurrency(3)])
async def transcode(ctx: Context, video: dict[str, str]) -> str:
    await ctx.step("render", render, video["customer"])
    await ctx.sleep("50ms")  # whoever only waits holds no place
    return video["customer"]


async def main() -> None:
    async with app:
        handles = []
        for number in range(12):
            answer = await app.send_event("video.uploaded", {"customer": "ann" if number % 3 else "bob"})
            handles.append(app.run(answer.admissions[0].run_id or ""))
        # A start by hand stands in the same lanes.
        handles.append(await app.start(transcode, {"customer": "bob"}))
        limits = {limit.rule.rpartition("/")[2] or "all": limit.limit for limit in await app.engine.flow_state()}
        print("limits:", dict(sorted(limits.items())))
        done = Counter([await handle.result(timeout=30) for handle in handles])
        print("done:", dict(sorted(done.items())))
        print("never more than the limits:", most["ann"] <= 2 and most["bob"] <= 2 and most["in all"] <= 3)


if __name__ == "__main__":
    asyncio.run(main())
