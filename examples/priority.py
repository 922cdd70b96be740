"""Priority: who goes first where runs queue. Here by the event's own word; a number says it for all of a workflow.

python examples/priority.py
"""

import asyncio

from durable import Context, Durable

app = Durable("sqlite:///.durable/examples.db")
served: list[str] = []
doors = asyncio.Event()


async def serve(name: str) -> None:
    served.append(name)
    await doors.wait()


@app.workflow(on="guest.came", concurrency=1, priority="event.data.stars")
async def table(ctx: Context, guest: dict[str, int | str]) -> None:
    await ctx.step("serve", serve, str(guest["name"]))


async def main() -> None:
    async with app:
        runs = []
        for name, stars in (("first", 0), ("ann", 1), ("bob", 5), ("carl", 1), ("dora", 5)):
            answer = await app.send_event("guest.came", {"name": name, "stars": stars})
            runs.append(app.run(answer.admissions[0].run_id or ""))
            while not served:  # the first has the only table, and the others queue behind it
                await asyncio.sleep(0.01)
        doors.set()
        for run in runs:
            await run.result(timeout=30)
        print("served:", ", ".join(served))


if __name__ == "__main__":
    asyncio.run(main())
