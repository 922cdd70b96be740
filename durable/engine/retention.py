"""Deletes finished runs that a rule lets go: every now and then, in small batches, with pauses that leave the store to
those who work. Engines know nothing of each other here: who comes second finds less to do."""

from __future__ import annotations

import asyncio
import logging

from msgspec.structs import replace

from durable.core.errors import StoreError
from durable.core.retention import Retention
from durable.engine.deps import Deps
from durable.store.records import PruneRequest

log = logging.getLogger("durable.retention")

LARGEST = 500
"""Runs in one batch at most."""
SMALLEST = 5
AIM_S = 0.05
"""How long a batch should take. Runs differ by thousands of journal rows, so the next batch is made by the last one's time."""
PAUSE_S = 0.05
"""Between two batches at least; and four times as long as the last one took."""


def requests(deps: Deps) -> list[PruneRequest]:
    """What the rules ask of the store: a workflow's own rule, that of its latest version, comes before the app's."""
    asked = []
    for workspace in deps.catalog.workspaces():
        registry = deps.catalog.of(workspace)
        names = sorted({definition.name for definition in registry.workflows()})
        own = {name: rule for name in names if (rule := registry.latest(name).retention) is not None}
        asked += [_request(rule, workspace, workflow=name) for name, rule in own.items() if not rule.for_ever]
        rule = deps.settings.retention
        if rule is not None and not rule.for_ever:
            asked.append(_request(rule, workspace, but=tuple(own)))
    return asked


def _request(rule: Retention, workspace: str, workflow: str | None = None, but: tuple[str, ...] = ()) -> PruneRequest:
    return PruneRequest(LARGEST, workspace, workflow, but, rule.age_us, rule.keep)


class Pruner:
    """One engine's part in it."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._size = LARGEST // 5
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin. What other workspaces register later stands under the application's rule."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="durable-retention")

    async def stop(self) -> None:
        """Delete nothing more. A batch under way need not be waited for: it happens or not, as a whole."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _run(self) -> None:
        every, random = self._deps.settings.retention_every, self._deps.ids.random
        await asyncio.sleep(every * random())  # engines that start together do not look together
        while True:
            try:
                # Without a rule no run goes; what has expired does, whatever is asked for.
                for request in requests(self._deps) or [PruneRequest(LARGEST, self._deps.settings.workspace)]:
                    await self._prune(request)
            except StoreError as error:
                log.warning("cannot delete finished runs, trying again later: %s", error)
            except Exception:
                log.exception("deleting finished runs went wrong, trying again later")
            await asyncio.sleep(every * (0.75 + 0.5 * random()))

    async def _prune(self, request: PruneRequest) -> None:
        """All that one rule lets go now."""
        store, clock = self._deps.store, self._deps.clock
        total = 0
        while True:
            size = self._size
            began = clock.monotonic()
            count = await store.prune(replace(request, limit=size))
            took = clock.monotonic() - began
            total += count
            if count < size:
                break
            self._size = min(size * 2, LARGEST) if took < AIM_S else max(size // 2, SMALLEST)
            await asyncio.sleep(max(PAUSE_S, 4 * took))
        if total:
            log.info("deleted %d finished runs", total)
