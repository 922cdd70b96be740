"""A locked file per engine, beside the database: the system frees the lock when the process ends, however it ends, so
the engine's runs need not wait for its lease. Only a hint: a wrong guess costs a takeover, which the epoch makes
harmless. Without files or locks the lease alone decides.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from durable.core.clock import Clock

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

CONFIRM_S = 0.2
"""A lock must be found free twice, this far apart, before its holder counts as gone."""


class Presence:
    """This process's locks, and what it has seen of the others'."""

    def __init__(self, directory: Path | None, clock: Clock) -> None:
        self._directory = None if fcntl is None else directory
        self._clock = clock
        self._held: dict[str, int] = {}
        self._free_since: dict[str, float] = {}

    def hold(self, incarnation: str) -> None:
        """From the first heartbeat on."""
        if self._directory is None or incarnation in self._held:
            return
        with suppress(OSError):
            self._directory.mkdir(exist_ok=True)
            file = os.open(self._path(incarnation), os.O_RDWR | os.O_CREAT, 0o644)
            # Others only ever try a shared lock for an instant, so this waits no longer than that.
            fcntl.flock(file, fcntl.LOCK_EX)
            self._held[incarnation] = file

    def vanished(self, incarnations: Sequence[str]) -> list[str]:
        """Those whose lock has been free for longer than a moment."""
        if self._directory is None:
            return []
        gone = []
        now = self._clock.monotonic()
        for incarnation in incarnations:
            if incarnation in self._held or not self._is_free(incarnation):
                self._free_since.pop(incarnation, None)
            elif now - self._free_since.setdefault(incarnation, now) >= CONFIRM_S:
                gone.append(incarnation)
        return gone

    def forget(self, incarnation: str) -> None:
        """It has left, or is dead: its file goes."""
        file = self._held.pop(incarnation, None)
        self._free_since.pop(incarnation, None)
        if self._directory is not None:
            with suppress(OSError):
                self._path(incarnation).unlink()
        if file is not None:
            os.close(file)

    def close(self) -> None:
        for file in self._held.values():
            os.close(file)
        self._held.clear()

    def sweep(self) -> None:
        """At the start: files nobody holds, of engines long gone, are of no more use once their lease is over."""
        if self._directory is None or not self._directory.is_dir():
            return
        with suppress(OSError):
            for path in self._directory.glob("[!.]*"):
                age_s = self._clock.now() / 1_000_000 - path.stat().st_mtime
                if age_s > 3600 and self._is_free(path.name):
                    path.unlink()

    def _path(self, incarnation: str) -> Path:
        assert self._directory is not None
        return self._directory / incarnation.replace("/", "_").lstrip(".")

    def _is_free(self, incarnation: str) -> bool:
        try:
            file = os.open(self._path(incarnation), os.O_RDONLY)
        except OSError:
            return False  # no file, nothing known
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(file)
        return True
