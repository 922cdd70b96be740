"""Singleton: one unfinished run at a time. Another event is skipped, replaces the run there is, or waits its turn.

python examples/singleton.py
"""

import asyncio

from durable import Context, Durable, RunCancelled, Singleton

app = Durable("sqlite:///.durable/examples.db")


async def sync(ctx: Context, shop: dict[str, str]) -> str:
    await ctx.wait_for_signal("go")
    return f"synced {shop['shop']}"


for mode in ("skip", "cancel", "queue"):
    app.workflow(mode, on=mode, singleton=Singleton(key="event.data.shop", mode=mode))(sync)


async def main() -> None:
    async with app:
        for mode in ("skip", "cancel", "queue"):
            first, second = [(await app.send_event(mode, {"shop": "graz"})).admissions[0] for _ in range(2)]
            print(f"{mode}: {first.verdict}, then {second.verdict}", end="; ")
            for run_id in dict.fromkeys([first.run_id or "", second.run_id or ""]):
                run = app.run(run_id)
                try:
                    if second.cancelled != run_id:
                        await run.signal("go", None)
                    print(await run.result(timeout=30), end="; ")
                except RunCancelled:
                    print("cancelled", end="; ")
            print()


if __name__ == "__main__":
    asyncio.run(main())
