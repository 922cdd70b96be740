"""One file, nothing to install: the embedded default. The map of this folder:

    store         the contract, each method forwarded to an operation below
    runner        who runs the operations: a writer thread and a reader thread, or the caller itself
    connection    opening a file, its promises, its errors in our words
    schema        tables, versions, generation
    statements    many rows in one statement
    runs, commits, claims, inbox, journal     the operations: plain functions of a connection
    lending       a transaction shared with the author's own SQL
    turn          writers queue fairly, over threads and processes
    presence      a locked file per engine, so that a death is seen before its lease ends

One rule shapes it all: Python's sqlite3 lets go of the GIL at every step of a statement, and under a busy event loop
getting it back takes up to 5 ms. A row fetched or executed by itself is a step; so everything is done in few statements
of many rows, and every answer comes back as one row.
"""

from __future__ import annotations

from durable.store.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
