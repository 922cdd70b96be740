"""A measured process is told what to do line by line: JSON on stdin, one JSON answer for each on stdout.

Stdlib only: the peers' processes use it too, in an environment of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

Handler = Callable[..., Awaitable[Any]]


async def serve(handlers: dict[str, Handler], hello: dict[str, Any]) -> None:
    """Say hello, then do as told until stdin ends. What else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    reader = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps(hello), file=answers)
    while line := await reader.readline():
        told = json.loads(line)
        try:
            answer = await handlers[told.pop("do")](**told)
        except Exception:
            answer = {"failed": traceback.format_exc()}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers)


async def throughput(one: Callable[[], Awaitable[Any]], seconds: float, at_once: int) -> dict[str, float]:
    """Keep `at_once` of `one()` under way until the time is up; the rate counts until the last of them is done."""
    done, begun = 0, time.perf_counter()

    async def loop() -> None:
        nonlocal done
        while time.perf_counter() - begun < seconds:
            await one()
            done += 1

    await asyncio.gather(*(loop() for _ in range(at_once)))
    took = time.perf_counter() - begun
    return {"workflows": done, "seconds": took, "rate": done / took}


def gaps(stamps: list[float]) -> list[float]:
    """Milliseconds from each stamp (seconds) to the next."""
    return [(after - before) * 1e3 for before, after in itertools.pairwise(stamps)]


VALUE = {"order": 1234567, "customer": "c-0042-a", "state": "charged", "amount": "199.90", "note": "paid in full"}
"""What every step returns: about 100 bytes as JSON."""
