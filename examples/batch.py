"""Batch: one run for several events, once there are enough of them or the first has waited long enough.

python examples/batch.py
"""

import asyncio

from durable import Batch, Context, Durable

app = Durable("sqlite:///.durable/examples.db")


@app.workflow(on="page.viewed", batch=Batch(max_size=3, timeout="700ms"))
async def count(ctx: Context, views: list[dict[str, str]]) -> str:
    return f"{len(views)} views: {', '.join(view['page'] for view in views)}"


async def main() -> None:
    async with app:
        runs: list[str] = []
        for page in ("/", "/docs", "/", "/price"):
            answer = await app.send_event("page.viewed", {"page": page})
            [one] = answer.admissions
            print(f"{page}: {one.verdict}")
            runs.append(one.run_id or "")
        for run_id in dict.fromkeys(runs):
            print(await app.run(run_id).result(timeout=30))


if __name__ == "__main__":
    asyncio.run(main())
