"""Callers who go on calling whatever happens: they start runs under keys, signal those that wait for it, repeat what
nobody answered, and wait for every outcome. When they have all stopped, nothing was stuck."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from random import Random
from typing import Any

from durable import Durable, RunHandle
from durable.core.errors import StoreError
from tests.chaos.node import collect, family, load
from tests.chaos.site import Site

SIGNALS = 2
PATIENCE = 60.0
"""Seconds from healing until every caller has its outcome."""


class Traffic:
    """`callers` at once, each with one run at a time. Entered it begins; `stop` lets each finish what it has begun."""

    def __init__(
        self, site: Site, draw: Random, *, callers: int = 20, seconds: float = 0.1, app: Durable | None = None
    ) -> None:
        self.site = site
        self.app = app or site.app
        self.made: Counter[str] = Counter()
        """Runs that ended, by workflow."""
        self.unsure = 0
        """Calls nobody answered, made again."""
        self._draw = draw
        self._seconds = seconds
        self._over = asyncio.Event()
        self._callers = [asyncio.ensure_future(self._call(f"caller-{n}")) for n in range(callers)]

    async def stop(self, patience: float = PATIENCE) -> None:
        """No new runs; every one under way ends. Raises TimeoutError with what is left, and what a caller did not expect."""
        self._over.set()
        try:
            async with asyncio.timeout(patience):
                await asyncio.gather(*self._callers)
        except TimeoutError:
            left = [record for record in await self.site.records([]) if record.finished_at is None]
            raise AssertionError(f"callers wait for ever; {left}\n{self.site.said()}") from None

    async def abandon(self) -> None:
        """End at once: the test has failed already."""
        for caller in self._callers:
            caller.cancel()
        await asyncio.gather(*self._callers, return_exceptions=True)

    async def _call(self, name: str) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            workflow, input = self._draw.choice(
                [(load, self._seconds)] * 3 + [(family, self._seconds), (collect, SIGNALS)]
            )
            handle = await self._start(workflow, input, f"{name}/{number}")
            if workflow is collect:
                for payload in range(SIGNALS):
                    while not await self.site.signal(handle.id, payload, app=self.app, patience=5):
                        self.unsure += 1
            await self._outcome(handle)
            self.made[workflow.__name__] += 1

    async def _start(self, workflow: Any, input: Any, key: str) -> RunHandle[Any]:
        while (handle := await self.site.start(workflow, input, key=key, app=self.app, patience=5)) is None:
            self.unsure += 1
        return handle

    async def _outcome(self, handle: RunHandle[Any]) -> None:
        while True:
            with suppress(StoreError, TimeoutError):
                await handle.result(5)
                return
