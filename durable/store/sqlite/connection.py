"""Opening a file, what it promises, and its errors in our words."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

from durable.core.errors import (
    DurableError,
    PayloadText,
    PayloadTooLarge,
    StoreError,
    StoreFull,
    StoreReadOnly,
    StoreUnavailable,
    WeakDurability,
)

OLDEST_SQLITE = (3, 35, 0)
"""UPDATE … FROM and the JSON functions."""

_SYNCHRONOUS = {"off": 0, "normal": 1, "full": 2, "extra": 3}


def contains(text: str | None, part: str) -> bool:
    """In SQL: whether `part`, in small letters already, stands in `text`, small and capital letters alike."""
    return text is not None and part in text.lower()


class Location:
    """Where the file is and how to open it: a path, `sqlite:///relative.db`, `sqlite:////absolute.db`, `:memory:`.

    Of the query, `synchronous` is ours; the rest (`mode`, `vfs`, …) goes to SQLite.
    """

    def __init__(self, path_or_url: str | Path) -> None:
        text = str(path_or_url)
        query: dict[str, str] = {}
        if text.startswith("sqlite:"):
            text, _, rest = text.removeprefix("sqlite:").removeprefix("//").partition("?")
            text = unquote(text.removeprefix("/"))
            query = dict(parse_qsl(rest))
        self.synchronous = query.pop("synchronous", "full").lower()
        if self.synchronous not in _SYNCHRONOUS:
            raise StoreError(f"synchronous={self.synchronous}: choose one of {', '.join(_SYNCHRONOUS)}")
        self.path = None if text in ("", ":memory:") else Path(text).absolute()
        if self.path is None:
            self.uri = ":memory:"
        else:
            self.uri = f"file:{quote(str(self.path))}" + (f"?{urlencode(query)}" if query else "")

    @property
    def beside(self) -> Path | None:
        """The directory for the locks of engines and writers."""
        return None if self.path is None else self.path.with_name(self.path.name + ".engines")

    def __str__(self) -> str:
        return ":memory:" if self.path is None else str(self.path)


def connect(location: Location, busy_timeout_s: float, allow_weak: bool) -> sqlite3.Connection:
    """A connection with every promise asked for and checked. Raises WeakDurability and what `translated` gives."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise StoreError(f"this Python carries SQLite {sqlite3.sqlite_version}; 3.35 or newer is needed")
    if location.path is not None:
        # The default's `.durable/` does not exist in a fresh project. One level only: a mistyped path makes no tree.
        with suppress(OSError):
            location.path.parent.mkdir(exist_ok=True)
    with translated(location):
        cx = sqlite3.connect(
            location.uri,
            timeout=busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
            uri=True,
        )
        try:
            cx.create_function("contains", 2, contains, deterministic=True)
            mode = _ask_for_wal(cx, busy_timeout_s)
            cx.execute(f"PRAGMA synchronous = {location.synchronous}")
            if sys.platform == "darwin":  # pragma: no cover - fsync there does not reach the disk
                cx.execute("PRAGMA fullfsync = 1")
                cx.execute("PRAGMA checkpoint_fullfsync = 1")
            cx.execute("PRAGMA temp_store = MEMORY")
            cx.execute("PRAGMA cache_size = -32768")
            cx.execute("PRAGMA wal_autocheckpoint = 4000")
            cx.execute("PRAGMA journal_size_limit = 67108864")
            if location.path is not None and not allow_weak:
                _refuse_weak(cx, location, mode)
        except BaseException:
            cx.close()
            raise
    return cx


def _ask_for_wal(cx: sqlite3.Connection, busy_timeout_s: float) -> str:
    """Changing to WAL wants the file for a moment, and SQLite does not wait for it by itself."""
    deadline = time.monotonic() + busy_timeout_s
    while True:
        try:
            return str(cx.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _refuse_weak(cx: sqlite3.Connection, location: Location, mode: str) -> None:
    synchronous = int(cx.execute("PRAGMA synchronous").fetchone()[0])
    if mode != "wal":
        raise WeakDurability(
            f"{location}: this file system gives no write-ahead log (journal mode {mode}), so several processes would"
            " block each other and a network file system may lose commits. Put the file on a local disk, or pass"
            " allow_weak_durability=True"
        )
    if synchronous < _SYNCHRONOUS["full"]:
        raise WeakDurability(
            f"{location}: synchronous={location.synchronous} may lose the last commits when the machine stops. Use"
            " full, or pass allow_weak_durability=True"
        )


@contextmanager
def atomic(cx: sqlite3.Connection) -> Iterator[None]:
    """All or none: a transaction that has the write lock from the start, or a savepoint inside one."""
    nested = cx.in_transaction
    cx.execute("SAVEPOINT part" if nested else "BEGIN IMMEDIATE")
    try:
        yield
        cx.execute("RELEASE part" if nested else "COMMIT")
    except BaseException:
        if cx.in_transaction:  # SQLite has already rolled all of it back when the disk is full
            if nested:
                cx.execute("ROLLBACK TO part")
                cx.execute("RELEASE part")
            else:
                cx.execute("ROLLBACK")
        raise


@contextmanager
def translated(location: Location) -> Iterator[None]:
    """Errors of the driver leave as ours."""
    try:
        yield
    except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
        raise translate(error, location) from error


def translate(error: BaseException, location: Location | str = "the store") -> DurableError:
    match _code(error):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED | sqlite3.SQLITE_PROTOCOL:
            return StoreUnavailable(f"{location} is locked by another process for too long; the call may be repeated")
        case sqlite3.SQLITE_FULL:
            return StoreFull(f"{location}: the disk is full; nothing was written. Free some space, then repeat")
        case sqlite3.SQLITE_READONLY:
            return StoreReadOnly(
                f"{location} cannot be written; check the owner and mode of the file and its directory"
            )
        case sqlite3.SQLITE_CANTOPEN:
            return StoreError(f"{location} cannot be opened; check that its directory exists and may be written")
        case sqlite3.SQLITE_NOTADB:
            return StoreError(f"{location} is not an SQLite database; give another path, or move that file away")
        case sqlite3.SQLITE_CORRUPT:
            return StoreError(f"{location} is damaged ({error}); restore a backup, or save what is left with .recover")
        case sqlite3.SQLITE_TOOBIG:
            return PayloadTooLarge(f"a value is above what SQLite takes ({error})")
        case sqlite3.SQLITE_IOERR:
            return StoreUnavailable(f"{location}: reading or writing failed ({error}); the call may be repeated")
    if isinstance(error, UnicodeEncodeError):
        return PayloadText(f"text that cannot be written as UTF-8 ({error.reason}): replace lone surrogates")
    if isinstance(error, OverflowError):
        return StoreError("a number is above 64 bits, which SQLite cannot keep")
    return StoreError(f"SQLite: {error}")


def is_culprit(error: BaseException) -> bool:
    """Whether one row is to blame rather than the file, the disk or a neighbour."""
    if isinstance(error, (OverflowError, UnicodeEncodeError, sqlite3.IntegrityError, sqlite3.InterfaceError)):
        return True
    return _code(error) in (sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_CONSTRAINT)


def _code(error: BaseException) -> int:
    """The primary result code."""
    return int(getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
