"""A small app for the tests of the command line: `durable dev small_app:app` runs it, `world` in conftest.py fills a store."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from durable import Context, Durable, RetryPolicy

app = Durable(os.environ.get("DURABLE_STORE", "memory://"), lease="2s")

EVIL = "\x1b[31mred\x1b[0m \u202egnp.exe\u202c \x07 <script>alert(1)</script> [bold]markup[/bold] \x9b2J"
"""What a payload or an error may hold: ANSI, bidi, bell, HTML, markup of a terminal library, C1."""


async def greet(name: str) -> str:
    return f"hello {name}"


async def explode(what: str) -> str:
    raise ValueError(f"cannot bear {what}")


async def slow(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "slept"


@app.workflow(tags=["friendly"])
async def hello(ctx: Context, name: str) -> str:
    ctx.log("greeting", who=name)
    greeting: str = await ctx.step(greet, name)
    return greeting


@app.workflow
async def broken(ctx: Context, what: str) -> str:
    result: str = await ctx.step(explode, what, retries=RetryPolicy(max_attempts=2, initial_delay=0.01))
    return result


@app.workflow
async def approval(ctx: Context, amount: int) -> Any:
    return await ctx.wait_for_signal("approve")


@app.workflow
async def family(ctx: Context, name: str) -> str:
    greeting: str = await ctx.child(hello, name)
    return greeting


@app.workflow
async def patient(ctx: Context, seconds: float) -> str:
    result: str = await ctx.step(slow, seconds)
    return result


@app.workflow
async def evil(ctx: Context) -> str:
    ctx.log(EVIL, field=EVIL)
    await ctx.step(explode, EVIL, retries=0)
    return EVIL
