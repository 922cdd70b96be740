"""The parts, put together."""

from __future__ import annotations

import copy
from collections.abc import Callable

from durable.core.clock import Clock, SystemClock
from durable.store.interface import Capabilities
from durable.store.memory.claims import Claims
from durable.store.memory.commits import Commits
from durable.store.memory.events import Events
from durable.store.memory.retention import Retention
from durable.store.memory.runs import Runs
from durable.store.memory.tables import Tables


class MemoryStore(Runs, Commits, Claims, Events, Retention):
    """All runs of one process, gone with it."""

    def __init__(self, clock: Clock | None = None, *, max_payload: int = 64 * 1024 * 1024) -> None:
        self._clock: Clock = clock or SystemClock()
        self._tables = Tables()
        self._capabilities = Capabilities(
            name="memory",
            durable=False,
            durability="Nothing survives the end of this process.",
            shared=False,
            commit_with=False,
            max_payload=max_payload,
            in_flight=2,
        )

    def another(self) -> MemoryStore:
        """A second handle on the same data, as another connection would be."""
        other = copy.copy(self)
        return other

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    async def open(self) -> None:
        return None

    async def close(self) -> None:
        return None

    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        return self._tables.listeners.add(on_hint, self)
