"""Following a run and all below it, from a store or from a service, and drawing the tree of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from durable.cli.output import console
from durable.cli.text import clock, safe
from durable.cli.tree import Branch, Line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from durable.app import Durable
    from durable.client import Frame

Follow = Callable[[str], AsyncGenerator["Frame", None]]

EVERY = 0.12
"""Seconds between two drawings."""
LAST_WORDS = 2.0
"""Seconds that children's last frames are waited for when the run has ended."""


def from_store(app: Durable) -> Follow:
    """Frames as a service tells them, from a store's journals."""

    async def follow(run_id: str) -> AsyncGenerator[Frame, None]:
        import msgspec

        from durable.client.shapes import Frame
        from durable.server.views import frame_of

        async with aclosing(app.watch(run_id)) as entries:  # type: ignore[type-var]
            async for entry in entries:
                if (frame := frame_of(run_id, entry)) is not None:
                    yield msgspec.json.decode(msgspec.json.encode(frame), type=Frame)

    return follow


async def follow_tree(run_id: str, name: str, follow: Follow) -> Branch:
    """Watch a run to its end, and what is below it; drawn on a terminal, told line by line elsewhere."""
    root = Branch(name, run_id)
    out = console()
    if out.is_terminal:
        await _draw(out, root, follow)
    else:
        await _grow(root, follow, lambda branch, frame: _say(out, branch, frame))
    return root


async def _grow(root: Branch, follow: Follow, told: Callable[[Branch, Frame], None]) -> None:
    tasks: set[asyncio.Task[None]] = set()

    async def one(branch: Branch) -> None:
        assert branch.run_id is not None
        async with aclosing(follow(branch.run_id)) as frames:
            async for frame in frames:
                child = branch.feed(frame)
                told(branch, frame)
                if child is not None:
                    tasks.add(asyncio.create_task(one(child)))

    try:
        await one(root)
        if tasks:
            done, _ = await asyncio.wait(tasks, timeout=LAST_WORDS)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _draw(out: Console, root: Branch, follow: Follow) -> None:
    from rich.live import Live

    with Live(picture(root, out.height), console=out, auto_refresh=False, transient=True) as live:

        async def draw() -> None:
            while True:
                live.update(picture(root, out.height), refresh=True)
                await asyncio.sleep(EVERY)

        ticker = asyncio.create_task(draw())
        try:
            await _grow(root, follow, lambda branch, frame: None)
        finally:
            ticker.cancel()
    # The whole of it stays, also what had no room while it was live.
    for line in root.lines(time.time_ns() // 1_000):
        out.print(line, no_wrap=True, overflow="ellipsis")


def picture(root: Branch, height: int) -> RenderableType:
    """The tree as far as it fits: its root, and the end of what is under it."""
    from rich.console import Group
    from rich.text import Text

    first, *rest = root.lines(time.time_ns() // 1_000)
    room = max(3, height - 3)
    if len(rest) > room:
        rest = [Text(f"   … {len(rest) - room + 1} lines above", style="bright_black"), *rest[-room + 1 :]]
    for line in (first, *rest):
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(first, *rest)


def _say(out: Console, branch: Branch, frame: Frame) -> None:
    """One frame in one line."""
    at = clock(round(frame.ts.timestamp() * 1e6)) if frame.ts else ""
    if frame.kind == "log":
        line = Line(frame)
        what = f"log {line.level}: {line.text} {line.fields}".rstrip()
    elif frame.kind == "step_status":
        again = f"  attempt {frame.attempt}" if (frame.attempt or 1) > 1 else ""
        error = f"  {safe(frame.error.message)}" if frame.error else ""
        what = f"step {safe(frame.name or '')} {frame.status}{again}{error}"
    else:
        what = f"run {(frame.status or frame.kind).replace('_', ' ')}"
    out.print(f"{frame.seq:>4}  {at}  {safe(branch.name)}  {what}")
