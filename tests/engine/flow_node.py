"""An engine in a process of its own whose workflows have policies: `python -m tests.engine.flow_node URL LEDGER`.

It publishes what it is told, a list `[[event, data], …]` on each line, and answers each line with what became of it. Its steps
write into the ledger when they begin and end, by a clock that all processes of one machine share. Ends when its input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from durable import (
    Batch,
    Concurrency,
    Context,
    Debounce,
    Durable,
    Event,
    Fairness,
    Publication,
    RateLimit,
    Throttle,
    workflow,
)

THROTTLE = Throttle(5, 0.5)
RATE = RateLimit(5, 1.0)
BATCH = Batch(7, 0.3, key="key")

LEDGER = Path()


def note(what: str, workflow: str, order: Any) -> None:
    """One line, whole however many write at once."""
    line = {"what": what, "workflow": workflow, "order": order, "process": os.getpid(), "at": time.monotonic()}
    with LEDGER.open("ab", buffering=0) as ledger:
        ledger.write(json.dumps(line).encode() + b"\n")


async def work(name: str, order: dict[str, Any]) -> None:
    """Lasts as many seconds as the order says; an order with a `gate` until there is such a file beside the ledger."""
    note("begin", name, order)
    await asyncio.sleep(order.get("seconds", 0))
    while "gate" in order and not LEDGER.with_name(order["gate"]).exists():
        await asyncio.sleep(0.01)
    note("end", name, order)


@workflow(name="limited", on="limited", concurrency=3)
async def limited(ctx: Context, order: dict[str, Any]) -> None:
    await ctx.step("one", work, "limited", order)
    await ctx.step("two", work, "limited", order)


@workflow(name="keyed", on="keyed", concurrency=[Concurrency(1, key="key"), Concurrency(4)])
async def keyed(ctx: Context, order: dict[str, Any]) -> None:
    await ctx.step("one", work, "keyed", order)


@workflow(name="spaced", on="spaced", throttle=THROTTLE)
async def spaced(ctx: Context, order: dict[str, Any]) -> None:
    await ctx.step("one", work, "spaced", order)


@workflow(name="rated", on="rated", rate_limit=RATE)
async def rated(ctx: Context, order: dict[str, Any]) -> None:
    await ctx.step("one", work, "rated", order)


@workflow(name="calm", on="calm", debounce=Debounce(0.3, key="key"))
async def calm(ctx: Context, event: Event[dict[str, Any]]) -> str:
    await ctx.step("one", work, "calm", event.data)
    return event.id


@workflow(name="batched", on="batched", batch=BATCH)
async def batched(ctx: Context, orders: list[dict[str, Any]]) -> None:
    await ctx.step("one", work, "batched", {"orders": orders})


@workflow(name="lone", on="lone", singleton=True)
async def lone(ctx: Context, order: dict[str, Any]) -> None:
    await ctx.step("one", work, "lone", order)


@workflow(name="fair", on="fair", concurrency=3, weight=Fairness("who", {"big": 3}))
async def fair(ctx: Context, order: dict[str, Any]) -> None:
    await ctx.step("one", work, "fair", order)


@workflow(name="prior", on="prior", concurrency=1, priority="event.data.rank")
async def prior(ctx: Context, order: dict[str, Any]) -> None:
    await ctx.step("one", work, "prior", order)


async def main(url: str, ledger: str) -> None:
    global LEDGER
    LEDGER = Path(ledger)
    workflows = [limited, keyed, spaced, rated, calm, batched, lone, fair, prior]
    async with Durable(url, workflows=workflows, poll_every=0.2) as app:
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            answers = await app.publish([Publication(name=name, data=data) for name, data in json.loads(line)])
            said = [
                [answer.event_id, one.verdict, one.run_id, one.new] for answer in answers for one in answer.admissions
            ]
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
