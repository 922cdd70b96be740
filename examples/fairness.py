"""Fairness: customers are served in turn, by their weights, however many runs one of them has queued before the others came.

python examples/fairness.py
"""

import asyncio

from durable import Concurrency, Context, Durable, Fairness, Publication

app = Durable("sqlite:///.durable/examples.db")
served: list[str] = []
doors = asyncio.Event()


async def send(customer: str) -> None:
    served.append(customer)
    await doors.wait()


@app.workflow(
    on="mail.queued", concurrency=Concurrency(1), weight=Fairness("event.data.customer", {"gold": 2.0}, default=1.0)
)
async def mail(ctx: Context, message: dict[str, str]) -> None:
    await ctx.step("send", send, message["customer"])


async def main() -> None:
    async with app:
        crowd = ["huge"] + ["huge"] * 8 + ["small"] * 4 + ["gold"] * 8
        events = [Publication(name="mail.queued", data={"customer": customer}) for customer in crowd]
        answers = await app.publish(events[:1])
        while not served:  # the first is under way, and the others queue behind it
            await asyncio.sleep(0.01)
        answers += await app.publish(events[1:])
        doors.set()
        for answer in answers:
            await app.run(answer.admissions[0].run_id or "").result(timeout=30)
        shares = {who: served[1:13].count(who) for who in ("huge", "small", "gold")}
        print("the next twelve turns:", shares)


if __name__ == "__main__":
    asyncio.run(main())
