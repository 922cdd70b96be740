"""How the suite gets its stores: one builder per adapter."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from durable.store.interface import Store
from durable.store.memory import MemoryStore
from durable.store.records import Message
from durable.store.sqlite import SqliteStore
from durable.testing.clock import ManualClock

MAX_PAYLOAD = 1024 * 1024


class Clocked:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.stores: list[Store] = []

    def now(self) -> int:
        return self.clock.now()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def close(self) -> None:
        for store in self.stores:
            await store.close()


class MemoryBuilder(Clocked):
    def __init__(self) -> None:
        super().__init__()
        self.first = MemoryStore(self.clock, max_payload=MAX_PAYLOAD)

    async def connect(self) -> Store:
        store = self.first.another()
        await store.open()
        self.stores.append(store)
        return store

    async def plant_slots(self, run_id: str, epoch: int, slots: list[tuple[str, int]]) -> None:
        self.first._tables.slots.setdefault(run_id, []).extend(slots)

    async def slots(self, run_id: str) -> list[tuple[str, int]]:
        return sorted(self.first._tables.slots.get(run_id, []))

    async def waiters(self, run_id: str) -> list[str]:
        return sorted(self.first._tables.waiters.get(run_id, {}))

    def sending(self, message: Message) -> None:
        return None


class SqliteBuilder(Clocked):
    def __init__(self, path: Path, *, inline: bool = False) -> None:
        super().__init__()
        self.path = path
        self.inline = inline

    async def connect(self) -> Store:
        store = SqliteStore(self.path, clock=self.clock, inline=self.inline, max_payload=MAX_PAYLOAD)
        await store.open()
        self.stores.append(store)
        return store

    def raw(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)

    async def plant_slots(self, run_id: str, epoch: int, slots: list[tuple[str, int]]) -> None:
        cx = self.raw()
        for key, number in slots:
            cx.execute("INSERT INTO slots VALUES (?, ?, ?, ?)", (key, number, run_id, epoch))
        cx.close()

    async def slots(self, run_id: str) -> list[tuple[str, int]]:
        cx = self.raw()
        rows = cx.execute("SELECT key, number FROM slots WHERE run_id = ? ORDER BY 1, 2", (run_id,)).fetchall()
        cx.close()
        return rows

    async def waiters(self, run_id: str) -> list[str]:
        cx = self.raw()
        rows = cx.execute("SELECT id FROM event_waiters WHERE run_id = ? ORDER BY 1", (run_id,)).fetchall()
        cx.close()
        return [row[0] for row in rows]

    def sending(self, message: Message) -> AbstractAsyncContextManager[None] | None:
        return None if self.inline else self._sending(message)

    @asynccontextmanager
    async def _sending(self, message: Message) -> AsyncIterator[None]:
        cx = self.raw()
        cx.execute("BEGIN IMMEDIATE")
        cx.execute(
            "INSERT INTO inbox (run_id, number, id, created_at, workspace, kind, name, attempt)"
            " VALUES (?, 1, ?, ?, ?, ?, ?, 0)",
            (message.run_id, message.id, self.now(), message.workspace, message.kind, message.name),
        )
        cx.execute("UPDATE runs SET inbox_last = 1 WHERE id = ?", (message.run_id,))
        try:
            yield
        finally:
            await asyncio.to_thread(cx.execute, "COMMIT")
            cx.close()
