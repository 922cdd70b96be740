"""Rate limit: at most so many events within a period start a run; what is above is dropped, and the answer says so.

python examples/rate_limit.py
"""

import asyncio

from durable import Context, Durable, RateLimit

app = Durable("sqlite:///.durable/examples.db")


@app.workflow(on="disk.full", rate_limit=RateLimit(limit=1, period="1h", key="event.data.host"))
async def alert(ctx: Context, event: dict[str, str]) -> str:
    return f"woke somebody for {event['host']}"


async def main() -> None:
    async with app:
        for host in ("db-1", "db-1", "db-2", "db-1"):
            answer = await app.send_event("disk.full", {"host": host})
            [alerted] = answer.admissions
            print(f"{host}: {alerted.verdict}")
        print("runs:", len((await app.find(workflow="alert")).runs))


if __name__ == "__main__":
    asyncio.run(main())
