"""Signals: something from outside, kept for the run even if it comes before anybody waits. Here an approval with a timeout.

python examples/signals.py
"""

import asyncio
from dataclasses import dataclass

from durable import Context, Durable, WaitTimeout

app = Durable("sqlite:///.durable/examples.db")


@dataclass
class Decision:
    by: str
    approved: bool


@app.workflow
async def expense(ctx: Context, amount: int) -> str:
    try:
        decision = await ctx.wait_for_signal("decision", type=Decision, timeout="1s")
    except WaitTimeout:
        return f"{amount}: nobody decided, sent to the manager"
    return f"{amount}: {'approved' if decision.approved else 'refused'} by {decision.by}"


async def main() -> None:
    async with app:
        answered = await app.start(expense, 120)
        forgotten = await app.start(expense, 80)
        first = await answered.signal("decision", Decision("ann", True), id="click-1")
        again = await answered.signal("decision", Decision("ann", True), id="click-1")
        print(f"sent: {first}, the same id again: {again}")
        print(await answered.result(timeout=30))
        print(await forgotten.result(timeout=30))


if __name__ == "__main__":
    asyncio.run(main())
