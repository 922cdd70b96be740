"""Tables, and what a file says of itself: its version, who may open it, and how often it has been opened.

A column that changes with every commit (`seq`, `commit_id`, `inbox_read`, …) stands in no index. The journal has a
rowid: rows are appended where the file ends, and only the small index is written all over; measured half as fast again
as WITHOUT ROWID. Inputs too large to be rewritten with each commit of their run stand in `big_inputs`.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from contextlib import suppress
from pathlib import Path

from durable.core.clock import Clock
from durable.core.errors import StoreRestored, StoreTooNew
from durable.protocol.version import SCHEMA_VERSION
from durable.store.sqlite.connection import atomic
from durable.store.sqlite.statements import fetch_value

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

_WAITS = "owner IS NULL AND status = 'active' AND activity NOT IN ('paused', 'blocked')"

DUE = f"{_WAITS} AND lane IS NULL"
"""Word for word the condition of the due index, or SQLite does not use it."""
LANED_LATER = f"lane IS NOT NULL AND ready = 0 AND {_WAITS}"
"""The same for runs with a lane that are not known to be due yet …"""
LANED_READY = f"lane IS NOT NULL AND ready = 1 AND {_WAITS}"
"""… and for those that queue in their lane: `ready` is set once such a run is seen to be due, and cleared when it is
taken. So a claim walks neither a lane's sleepers nor the lanes that have nothing but sleepers."""

_DUE_INDEX = f"CREATE INDEX runs_due ON runs (workspace, workflow, version, priority DESC, wake_at) WHERE {DUE}"
_FINISHED_INDEX = (
    "CREATE INDEX runs_finished ON runs (workspace, workflow, finished_at, id) WHERE finished_at IS NOT NULL"
)
_FIRES_INDEX = "CREATE INDEX schedule_fires_run ON schedule_fires (run_id)"
_WAITERS_INDEX = "CREATE INDEX event_waiters_event ON event_waiters (workspace, event, probe)"

_RUN_COLUMNS = ("meta TEXT", "lane TEXT", "standing INTEGER", "ready INTEGER NOT NULL DEFAULT 0")
"""What version 3 has added to runs. `standing` is a laned run's place in its lane, smallest first (lanes.py)."""
_WAITER_COLUMNS = ("workspace TEXT NOT NULL DEFAULT 'default'", "probe TEXT NOT NULL DEFAULT ''")


def of(alias: str, condition: str) -> str:
    """One of the conditions above, of a table that has this alias."""
    return f"{alias}." + condition.replace(" AND ", f" AND {alias}.")


_SERVICE_TABLES = f"""
CREATE INDEX runs_laned ON runs (workspace, workflow, version, wake_at) WHERE {LANED_LATER};
CREATE INDEX runs_ready ON runs (workspace, workflow, version, lane, standing, id) WHERE {LANED_READY};
CREATE INDEX runs_lane ON runs (workspace, workflow, lane) WHERE lane IS NOT NULL;

CREATE TABLE run_marks (
  number INTEGER NOT NULL,
  workspace TEXT NOT NULL,
  name TEXT NOT NULL,
  type TEXT NOT NULL,
  value NOT NULL,
  PRIMARY KEY (number, name, type, value)
) WITHOUT ROWID;
CREATE INDEX run_marks_value ON run_marks (workspace, name, type, value, number);

CREATE TABLE lanes (
  workspace TEXT NOT NULL,
  workflow TEXT NOT NULL,
  key TEXT NOT NULL,
  rules TEXT NOT NULL,
  weight REAL NOT NULL,
  PRIMARY KEY (workspace, workflow, key)
) WITHOUT ROWID;

CREATE TABLE turns (
  workspace TEXT NOT NULL,
  workflow TEXT NOT NULL,
  lane TEXT NOT NULL,
  priority INTEGER NOT NULL,
  start REAL NOT NULL,
  finish REAL NOT NULL,
  PRIMARY KEY (workspace, workflow, lane, priority)
) WITHOUT ROWID;

CREATE TABLE ticks (
  kind TEXT NOT NULL,
  key TEXT NOT NULL,
  at INTEGER NOT NULL,
  run_id TEXT NOT NULL,
  until INTEGER NOT NULL,
  PRIMARY KEY (kind, key, at, run_id)
) WITHOUT ROWID;
CREATE INDEX ticks_until ON ticks (until);

CREATE TABLE gates (
  kind TEXT NOT NULL,
  key TEXT NOT NULL,
  run_id TEXT NOT NULL,
  opened_at INTEGER NOT NULL,
  members INTEGER NOT NULL,
  PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE INDEX gates_run ON gates (run_id);

CREATE TABLE events (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  workspace TEXT NOT NULL,
  name TEXT NOT NULL,
  received_at INTEGER NOT NULL,
  settled INTEGER NOT NULL,
  dedupe_id TEXT,
  meta TEXT,
  admissions TEXT,
  data BLOB
);
CREATE UNIQUE INDEX events_dedupe ON events (workspace, dedupe_id) WHERE dedupe_id IS NOT NULL;
CREATE INDEX events_name ON events (workspace, name, number);
CREATE INDEX events_received ON events (workspace, received_at);
CREATE INDEX events_unsettled ON events (number) WHERE NOT settled;

CREATE TABLE items (
  kind TEXT NOT NULL,
  workspace TEXT NOT NULL,
  id TEXT NOT NULL,
  version INTEGER NOT NULL,
  due_at INTEGER,
  expires_at INTEGER,
  updated_at INTEGER NOT NULL,
  data BLOB,
  PRIMARY KEY (kind, workspace, id)
);
CREATE INDEX items_due ON items (kind, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX items_expiry ON items (expires_at) WHERE expires_at IS NOT NULL"""

_TABLES = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE runs (
  number INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  epoch INTEGER NOT NULL,
  seq INTEGER NOT NULL,
  commit_id TEXT,
  updated_at INTEGER NOT NULL,
  inbox_last INTEGER NOT NULL DEFAULT 0,
  inbox_read INTEGER NOT NULL DEFAULT 0,
  recovery_attempts INTEGER NOT NULL DEFAULT 0,
  status TEXT NOT NULL DEFAULT 'active',
  activity TEXT NOT NULL,
  owner TEXT,
  wake_at INTEGER,
  workspace TEXT NOT NULL,
  workflow TEXT NOT NULL,
  version TEXT NOT NULL,
  priority INTEGER NOT NULL,
  idempotency_key TEXT,
  input_hash TEXT NOT NULL,
  parent_run_id TEXT,
  parent_key TEXT,
  parent_ordinal INTEGER,
  tags TEXT,
  attributes TEXT,
  created_at INTEGER NOT NULL,
  started_at INTEGER,
  finished_at INTEGER,
  input BLOB,
  output BLOB,
  error BLOB,
  {", ".join(_RUN_COLUMNS)},
  CONSTRAINT suspended_run_has_a_wake_time CHECK (
    status <> 'active' OR owner IS NOT NULL OR wake_at IS NOT NULL OR activity IN ('paused', 'blocked'))
);
CREATE UNIQUE INDEX runs_key ON runs (workspace, workflow, idempotency_key) WHERE idempotency_key IS NOT NULL;
{_DUE_INDEX};
CREATE INDEX runs_owned ON runs (owner) WHERE owner IS NOT NULL;
CREATE INDEX runs_blocked ON runs (id) WHERE activity = 'blocked' AND status = 'active';
CREATE INDEX runs_children ON runs (parent_run_id) WHERE parent_run_id IS NOT NULL;
{_FINISHED_INDEX};

CREATE TABLE big_inputs (run_id TEXT PRIMARY KEY, input BLOB NOT NULL) WITHOUT ROWID;

CREATE TABLE journal (
  run_id TEXT NOT NULL,
  seq INTEGER NOT NULL,
  at INTEGER NOT NULL,
  kind TEXT NOT NULL,
  status TEXT NOT NULL,
  key TEXT,
  ordinal INTEGER,
  name TEXT,
  attempt INTEGER NOT NULL,
  fingerprint TEXT,
  payload BLOB,
  enqueued_at INTEGER,
  started_at INTEGER,
  finished_at INTEGER,
  PRIMARY KEY (run_id, seq)
);

CREATE TABLE inbox (
  run_id TEXT NOT NULL,
  number INTEGER NOT NULL,
  id TEXT NOT NULL,
  created_at INTEGER NOT NULL,
  workspace TEXT NOT NULL,
  kind TEXT NOT NULL,
  name TEXT NOT NULL,
  payload BLOB,
  key TEXT,
  ordinal INTEGER,
  attempt INTEGER NOT NULL,
  PRIMARY KEY (run_id, number),
  UNIQUE (run_id, id)
);

CREATE TABLE event_waiters (
  run_id TEXT NOT NULL,
  id TEXT NOT NULL,
  event TEXT NOT NULL,
  match BLOB,
  expires_at INTEGER,
  {", ".join(_WAITER_COLUMNS)},
  PRIMARY KEY (run_id, id)
) WITHOUT ROWID;
{_WAITERS_INDEX};

CREATE TABLE slots (
  key TEXT NOT NULL,
  number INTEGER NOT NULL,
  run_id TEXT NOT NULL,
  epoch INTEGER NOT NULL,
  PRIMARY KEY (key, number)
) WITHOUT ROWID;
CREATE INDEX slots_holder ON slots (run_id);

CREATE TABLE schedule_fires (
  schedule_id TEXT NOT NULL,
  occurrence INTEGER NOT NULL,
  run_id TEXT NOT NULL,
  PRIMARY KEY (schedule_id, occurrence)
) WITHOUT ROWID;
{_FIRES_INDEX};

CREATE TABLE engines (incarnation TEXT PRIMARY KEY, expires_at INTEGER NOT NULL, dead INTEGER NOT NULL) WITHOUT ROWID;
{_SERVICE_TABLES}
"""


_MIGRATIONS: tuple[tuple[int, tuple[str, ...]], ...] = (
    # Engines claim for their workspace alone; finished runs are found to be pruned. (Version 3 makes the due index anew.)
    (2, ("DROP INDEX IF EXISTS runs_due", _FINISHED_INDEX, _FIRES_INDEX)),
    # Events, items, lanes; runs are found by their tags and attributes. A program of version 2 that has the file open goes
    # on, slower, for its due index is gone; of lanes it knows nothing.
    (
        3,
        (
            *(f"ALTER TABLE runs ADD COLUMN {column}" for column in _RUN_COLUMNS),
            *(f"ALTER TABLE event_waiters ADD COLUMN {column}" for column in _WAITER_COLUMNS),
            "DROP INDEX IF EXISTS runs_due",
            _DUE_INDEX,
            "DROP INDEX event_waiters_event",
            _WAITERS_INDEX,
            *(statement.strip() for statement in _SERVICE_TABLES.split(";")),
            "INSERT OR IGNORE INTO run_marks SELECT r.number, r.workspace, '', 'tag', t.value"
            " FROM runs r, json_each(r.tags) t WHERE json_valid(r.tags)",
            "INSERT OR IGNORE INTO run_marks SELECT r.number, r.workspace, a.key, a.type, a.value"
            " FROM runs r, json_each(r.attributes) a WHERE json_valid(r.attributes)",
        ),
    ),
)
"""In order: the version that is reached, and the statements that lead to it from the one before. Only additions and indexes,
so that an older program which has the file open goes on working; where it could not, MIN_ENGINE_VERSION rises too."""

MIN_ENGINE_VERSION = 1
"""The oldest version of the tables whose programs work with these."""


def prepare(cx: sqlite3.Connection, path: Path | None, accept_restore: bool, clock: Clock) -> None:
    """Create, check or migrate the tables and raise the generation, all or none. Raises StoreTooNew, StoreRestored."""
    with atomic(cx):
        if not fetch_value(cx, "SELECT 1 FROM sqlite_schema WHERE name = 'meta'"):
            _create(cx)
            fresh = True
        else:
            _migrate(cx, _checked_version(cx))
            fresh = False
        generation = int(fetch_value(cx, "SELECT value FROM meta WHERE name = 'generation'"))
        seen = 0 if fresh or path is None else _generation_seen(path)
        if generation < seen and not accept_restore:
            raise StoreRestored(
                f"{path} is an older copy: it was opened {generation} times, and a copy opened {seen} times has been"
                " here before. Work done since then is missing. If you restored a backup on purpose, open it once with"
                " accept_restore=True"
            )
        generation = max(generation, seen) + 1
        cx.execute("UPDATE meta SET value = ? WHERE name = 'generation'", (str(generation),))
        # Engines that said long ago that they are gone need no tombstone any more.
        cx.execute("DELETE FROM engines WHERE expires_at < ?", (clock.now() - 24 * 3600 * 1_000_000,))
    if path is not None:
        _remember_generation(path, generation, forget=fresh)


def _create(cx: sqlite3.Connection) -> None:
    for statement in _TABLES.split(";"):
        if statement.strip():
            cx.execute(statement.strip())
    cx.execute(
        "INSERT INTO meta VALUES ('schema_version', ?), ('min_engine_version', ?), ('store_id', ?), ('generation', '0')",
        (str(SCHEMA_VERSION), str(MIN_ENGINE_VERSION), uuid.uuid4().hex),
    )


def _migrate(cx: sqlite3.Connection, found: int) -> None:
    for version, statements in _MIGRATIONS:
        if version > found:
            for statement in statements:
                cx.execute(statement)
            cx.execute("UPDATE meta SET value = ? WHERE name = 'schema_version'", (str(version),))


def _checked_version(cx: sqlite3.Connection) -> int:
    """The version of the tables there are. Raises StoreTooNew."""
    found = int(fetch_value(cx, "SELECT value FROM meta WHERE name = 'schema_version'"))
    if found > SCHEMA_VERSION:
        raise StoreTooNew(
            f"this file has tables of version {found}, and this program knows {SCHEMA_VERSION}: upgrade durable here, or"
            " open the file with the newer program that wrote it"
        )
    needed = int(fetch_value(cx, "SELECT value FROM meta WHERE name = 'min_engine_version'"))
    if needed > SCHEMA_VERSION:
        raise StoreTooNew(
            f"this file asks for engines that know tables of version {needed}, and this one knows {SCHEMA_VERSION}:"
            " upgrade durable here"
        )
    return found


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".generation")


def _generation_seen(path: Path) -> int:
    with suppress(OSError, ValueError):
        return int(_sidecar(path).read_text())
    return 0


def _remember_generation(path: Path, generation: int, *, forget: bool) -> None:
    """After the commit, so that a crash between the two leaves the lower number here: no false alarm. Losing this file
    only means that a restore goes unnoticed, so a directory that refuses it is no error."""
    with suppress(OSError), open(os.open(_sidecar(path), os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        if not forget and text.isdigit() and int(text) >= generation:
            return
        file.seek(0)
        file.truncate()
        file.write(str(generation))
        file.flush()
        os.fsync(file.fileno())
