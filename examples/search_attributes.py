"""Search attributes: what runs say of themselves, and are found by.

python examples/search_attributes.py
"""

import asyncio

from durable import Context, Durable

app = Durable("sqlite:///.durable/examples.db")


@app.workflow
async def parcel(ctx: Context, kilos: int) -> None:
    await ctx.set_attributes(heavy=kilos > 20, place="depot")
    await ctx.wait_for_signal("arrived")
    await ctx.set_attributes(place="home", heavy=None)  # None takes one away
    await ctx.set_tags("done")


async def main() -> None:
    async with app:
        light = await app.start(parcel, 2, attributes={"customer": "ann"})
        heavy = await app.start(parcel, 30, attributes={"customer": "bob"}, tags=["fragile"])
        while len((await app.find(attributes={"place": "depot"})).runs) < 2:
            await asyncio.sleep(0.02)
        found = (await app.find(attributes={"place": "depot", "heavy": True})).runs
        print("heavy, in the depot:", [run.attributes["customer"] for run in found])
        for run in (light, heavy):
            await run.signal("arrived")
            await run.result(timeout=30)
        found = (await app.find(attributes={"place": "home"}, tag="done")).runs
        print("at home:", sorted(str(run.attributes["customer"]) for run in found))
        print("fragile is left:", (await app.find(tag="fragile")).runs != [])


if __name__ == "__main__":
    asyncio.run(main())
