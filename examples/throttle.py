"""Throttle: at most so many runs begin within a period, say because somebody's API allows no more. The others wait; none is lost.

python examples/throttle.py
"""

import asyncio
import time

from durable import Context, Durable, Throttle

app = Durable("sqlite:///.durable/examples.db")
began: list[float] = []


async def call(number: int) -> int:
    began.append(time.monotonic())
    return number


@app.workflow(throttle=Throttle(limit=2, period="500ms"))
async def ask(ctx: Context, number: int) -> int:
    return await ctx.step("call", call, number)


async def main() -> None:
    async with app:
        handles = [await app.start(ask, number) for number in range(6)]
        print("all of them ran:", sorted([await handle.result(timeout=30) for handle in handles]))
        third, fifth = began[2] - began[0], began[4] - began[0]
        print(f"the third had to wait: {third > 0.25}; the fifth for two periods: {fifth > 0.7}")


if __name__ == "__main__":
    asyncio.run(main())
