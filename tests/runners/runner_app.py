"""An app for `durable runner`: a workflow that ends at once, and one whose step waits for a file."""

from __future__ import annotations

import time
from pathlib import Path

from durable import Context, Durable

app = Durable("memory://")


@app.workflow("adds")
async def adds(ctx: Context, numbers: list[int]) -> int:
    return await ctx.step("sum", lambda: sum(numbers))


@app.workflow("waits")
async def waits(ctx: Context, place: str) -> str:
    def body() -> str:
        Path(place + ".began").touch()
        while not Path(place).exists():
            time.sleep(0.01)
        return "came"

    return await ctx.step("wait", body)
