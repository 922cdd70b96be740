"""Remote steps: the same call, carried by a transport to whoever serves the step. Here the default one, inside the process;
another transport moves the step to another process without touching the workflow.

    python examples/remote_step.py
"""

import asyncio
from dataclasses import dataclass

from durable import Context, Durable, current_step

app = Durable("sqlite:///.durable/examples.db")


@dataclass
class Picture:
    name: str
    width: int


@app.step("images.thumbnail", retries=2, timeout="10s")
async def thumbnail(picture: Picture) -> Picture:
    step = current_step()
    # The same for every attempt and every delivery: hand it on to whatever must not happen twice.
    print(f"  worker: {picture.name}, attempt {step.attempt}, key ends in {step.idempotency_key[-2:]}")
    step.log("scaled", width=160)
    return Picture(picture.name, 160)


@app.workflow
async def gallery(ctx: Context, names: list[str]) -> int:
    small = await asyncio.gather(*(ctx.remote(thumbnail, Picture(name, 4000)) for name in names))
    by_name = await ctx.remote("images.thumbnail", Picture("again", 80), returns=Picture)
    return sum(picture.width for picture in [*small, by_name])


async def main() -> None:
    async with app:
        run = await app.start(gallery, ["a.png", "b.png"])
        print("total width:", await run.result(timeout=30))


if __name__ == "__main__":
    asyncio.run(main())
