"""How the suite gets its stores: one builder per adapter."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psycopg

from durable.store.interface import Store
from durable.store.memory import MemoryStore
from durable.store.postgres import PostgresStore
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
        for key, number in slots:
            self.first._hold(run_id, key, number)

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


class PostgresBuilder(Clocked):
    """On a database of its own. Its clock is put in the place of the server's: a function in the schema."""

    def __init__(self, url: str, pooled_url: str | None = None) -> None:
        """With the address of a pooler before it, stores go through that."""
        super().__init__()
        self.url = url
        self.pooled_url = pooled_url
        self.fixed = False

    async def connect(self) -> Store:
        store = PostgresStore(
            self.pooled_url or self.url, notifications=self.pooled_url is None, max_payload=MAX_PAYLOAD
        )
        await store.open()
        self.stores.append(store)
        if not self.fixed:
            self.fixed = True
            with self.raw() as cx:
                cx.execute("CREATE TABLE durable.test_clock (now bigint)")
                cx.execute("INSERT INTO durable.test_clock VALUES (%s)", [self.now()])
                cx.execute(
                    "CREATE OR REPLACE FUNCTION durable.now_us() RETURNS bigint LANGUAGE sql"
                    " BEGIN ATOMIC SELECT now FROM durable.test_clock; END"
                )
        return store

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        with self.raw() as cx:
            cx.execute("UPDATE durable.test_clock SET now = %s", [self.now()])

    def raw(self) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.url, autocommit=True)

    async def plant_slots(self, run_id: str, epoch: int, slots: list[tuple[str, int]]) -> None:
        with self.raw() as cx:
            for key, number in slots:
                cx.execute("INSERT INTO durable.slots VALUES (%s, %s, %s, %s)", (key, number, run_id, epoch))

    async def slots(self, run_id: str) -> list[tuple[str, int]]:
        with self.raw() as cx:
            return cx.execute(
                "SELECT key, number FROM durable.slots WHERE run_id = %s ORDER BY 1, 2", [run_id]
            ).fetchall()  # type: ignore[return-value]

    async def waiters(self, run_id: str) -> list[str]:
        with self.raw() as cx:
            rows = cx.execute("SELECT id FROM durable.event_waiters WHERE run_id = %s ORDER BY 1", [run_id]).fetchall()
        return [row[0] for row in rows]

    def sending(self, message: Message) -> AbstractAsyncContextManager[None] | None:
        return self._sending(message)

    @asynccontextmanager
    async def _sending(self, message: Message) -> AsyncIterator[None]:
        with self.raw() as cx:
            cx.execute("BEGIN")
            cx.execute("SELECT * FROM durable.send_messages(%s::jsonb)", [msgspec.json.encode([message]).decode()])
            try:
                yield
            finally:
                cx.execute("COMMIT")
