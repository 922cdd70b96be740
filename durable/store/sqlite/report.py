"""What a file tells of itself without being opened as a store: nothing is created, migrated or counted. For `doctor`."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from msgspec import Struct

from durable.core.errors import StoreError
from durable.store.sqlite.connection import Location, translated


class EngineSeen(Struct, frozen=True):
    """A heartbeat row."""

    incarnation: str
    expires_at: int
    dead: bool


class Report(Struct, frozen=True):
    """A file as found. Times in µs."""

    path: str
    bytes: int
    log_bytes: int
    """Of the write-ahead log beside it."""
    journal_mode: str
    schema_version: int
    generation: int
    runs: dict[str, int]
    """By status."""
    journal_rows: int
    engines: list[EngineSeen]


def report(path: Path) -> Report:
    """Read it. Raises StoreError with what to do."""
    with translated(Location(path)), closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as cx:
        cx.execute("BEGIN")
        if not cx.execute("SELECT 1 FROM sqlite_schema WHERE name = 'meta'").fetchall():
            raise StoreError(f"{path} is an SQLite database, but no store of durable: give another path")
        meta = dict(cx.execute("SELECT name, value FROM meta").fetchall())
        return Report(
            path=str(path),
            bytes=_size(path),
            log_bytes=_size(path.with_name(path.name + "-wal")),
            journal_mode=cx.execute("PRAGMA journal_mode").fetchone()[0],
            schema_version=int(meta["schema_version"]),
            generation=int(meta["generation"]),
            runs=dict(cx.execute("SELECT status, count(*) FROM runs GROUP BY status").fetchall()),
            journal_rows=cx.execute("SELECT coalesce(max(rowid), 0) FROM journal").fetchone()[0],
            engines=[
                EngineSeen(incarnation, expires_at, bool(dead))
                for incarnation, expires_at, dead in cx.execute(
                    "SELECT incarnation, expires_at, dead FROM engines ORDER BY expires_at DESC LIMIT 50"
                ).fetchall()
            ],
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
