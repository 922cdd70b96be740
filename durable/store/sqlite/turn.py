"""Writers take turns. SQLite's write lock goes to whoever happens to ask while it is free, and those who wait sleep up to
0.1 s between two looks: under one busy writer a heartbeat, or another process, can wait for seconds.

Two file locks make it fair. Who wants to write holds `next` until it has `turn`, and `turn` until it has committed; so
the one that has just written must queue behind the one that waits. The system frees both when a process dies. Only a
courtesy: SQLite's own lock keeps the data right, also against programs that know nothing of this.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

from durable.core.errors import StoreUnavailable

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

LOOK_EVERY_S = 0.0005


class Turn:
    """`with turn:` around a transaction. One object per thread."""

    def __init__(self, directory: Path | None, wait_s: float) -> None:
        self._wait_s = wait_s
        self._files: tuple[int, int] | None = None
        if directory is not None and fcntl is not None:
            try:
                directory.mkdir(exist_ok=True)
                self._files = (_open(directory / ".next"), _open(directory / ".turn"))
            except OSError:
                self._files = None

    def __enter__(self) -> None:
        if self._files is not None:
            deadline = time.monotonic() + self._wait_s
            following, turn = self._files
            _lock(following, deadline)
            try:
                _lock(turn, deadline)
            finally:
                fcntl.flock(following, fcntl.LOCK_UN)

    def take_at_once(self) -> bool:
        """Take the turn if nobody has it or waits for it. True: `give_back` it."""
        if self._files is None:
            return True
        following, turn = self._files
        if not _lock_at_once(following):
            return False
        try:
            return _lock_at_once(turn)
        finally:
            fcntl.flock(following, fcntl.LOCK_UN)

    def give_back(self) -> None:
        """After `take_at_once`."""
        self.__exit__(None, None, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._files is not None:
            fcntl.flock(self._files[1], fcntl.LOCK_UN)

    def close(self) -> None:
        files, self._files = self._files, None
        for file in files or ():
            os.close(file)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _lock_at_once(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(file: int, deadline: float) -> None:
    while not _lock_at_once(file):
        if time.monotonic() > deadline:
            raise StoreUnavailable(
                "other processes have kept the database locked for too long; the call may be repeated"
            )
        time.sleep(LOOK_EVERY_S)
