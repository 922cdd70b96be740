"""Versions: changing a workflow while runs of the old code are under way. `ctx.patched` keeps both ways apart; a new
`version=` keeps whole functions apart.

    python examples/patched.py
"""

import asyncio

from durable import Context, Durable

STORE = "sqlite:///.durable/examples.db"
yesterday, today = Durable(STORE), Durable(STORE)


async def pack(what: str) -> str:
    return f"{what} packed"


async def insure(what: str) -> str:
    return f"{what}, insured"


@yesterday.workflow(name="parcel")
async def parcel_as_it_was(ctx: Context, what: str) -> str:
    packed = await ctx.step(pack, what)
    await ctx.wait_for_signal("go")
    return packed


@today.workflow(name="parcel")
async def parcel(ctx: Context, what: str) -> str:
    insured = ctx.patched("insure-first")  # False for a run that went past here without it
    if insured:
        what = await ctx.step(insure, what)
    packed = await ctx.step(pack, what)
    await ctx.wait_for_signal("go")
    return packed


async def main() -> None:
    async with yesterday:
        old = await yesterday.start("parcel", "the lamp")
        while (await old.get()).activity != "waiting":
            await asyncio.sleep(0.02)
    async with today:  # the deploy
        new = await today.start("parcel", "the vase")
        for run_id in (old.id, new.id):
            await today.run(run_id).signal("go")
            print(await today.run(run_id).result(timeout=30))


if __name__ == "__main__":
    asyncio.run(main())
