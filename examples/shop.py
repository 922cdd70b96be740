"""What the orders talk to: a warehouse, and a payment gateway that knows a repeated request by its idempotency key.

Both write to a ledger of their own, a file the engine knows nothing about: rows are only ever added, so it is a witness
of what really happened, however often the engine was killed.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (
  number INTEGER PRIMARY KEY, at REAL NOT NULL, pid INTEGER NOT NULL, kind TEXT NOT NULL,
  step TEXT NOT NULL, order_id TEXT NOT NULL, key TEXT, amount TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS one_charge_per_key ON facts (key) WHERE kind = 'charged';
CREATE INDEX IF NOT EXISTS facts_pid ON facts (pid, kind);
CREATE TRIGGER IF NOT EXISTS never_changed BEFORE UPDATE ON facts BEGIN SELECT raise(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS never_removed BEFORE DELETE ON facts BEGIN SELECT raise(ABORT, 'append only'); END;
"""


class Ledger:
    """Facts, in the order in which they became true."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _db(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(_TABLES)
        return db

    def write(self, kind: str, step: str, order: str, key: str | None = None, amount: Decimal | None = None) -> bool:
        """Add a fact. False: a charge with this key is in the ledger already, and none was added."""
        row = (time.time(), os.getpid(), kind, step, order, key, None if amount is None else str(amount))
        return self._db.execute("INSERT OR IGNORE INTO facts VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", row).rowcount == 1

    def ask(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of a SELECT."""
        return self._db.execute(question, values).fetchall()

    @contextmanager
    def body(self, step: str, order: str) -> Iterator[None]:
        """A step body, from `began` to `ended`."""
        self.write("began", step, order)
        yield
        self.write("ended", step, order)


class Shop:
    """The warehouse and the gateway."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    async def work(self, step: str, order: str, seconds: float) -> str:
        """Something that takes a while, and says when it began and ended."""
        with self.ledger.body(step, order):
            await asyncio.sleep(seconds)
        return f"{step}-{order}"

    async def charge(self, order: str, amount: Decimal, key: str) -> str:
        """Move money, once per key: a repeated request gets the first one's answer."""
        with self.ledger.body("charge", order):
            await asyncio.sleep(0.15)
            if not self.ledger.write("charged", "charge", order, key, amount):
                self.ledger.write("recognised", "charge", order, key)
            # The money has moved, and the answer is on its way. Who is killed here does not know it.
            await asyncio.sleep(0.25)
            [(number,)] = self.ledger.ask("SELECT number FROM facts WHERE kind = 'charged' AND key = ?", key)
        return f"ch_{number:05d}"
