"""How many tasks at once: as many as memory allows. Looks at the limit of the container (cgroup v2 or v1) or the machine, and
at what is used of it; no library beside the standard one. Where nothing can be read (not Linux), the bound stays where it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from durable.core.errors import DefinitionError

SYSTEM = Path("/")
LIMIT_MAX = 1 << 60
"""Bytes. cgroup v1 says no limit with a number beyond this."""


class Memory(Struct, frozen=True):
    """Bytes."""

    used: int
    limit: int


class Adaptive:
    """For `concurrency=`: at most `max` tasks, fewer while more than `memory` (a share of the limit) is used, by a quarter of
    what is under way at each look, never below `min`; one more at each look once there is room again.

    `limit`: bytes this process may have, where that is not what the container or the machine has. `every`: seconds between
    two looks.
    """

    def __init__(
        self,
        max: int = 64,
        *,
        min: int = 1,
        memory: float = 0.8,
        limit: int | None = None,
        every: float = 1.0,
        read: Callable[[], Memory | None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 1 <= min <= max:
            raise DefinitionError(f"Adaptive goes from `min` to `max`, both at least 1, not from {min} to {max}.")
        if not 0 < memory < 1:
            raise DefinitionError(f"`memory` is a share of the limit, between 0 and 1, not {memory}.")
        self.max = max
        self.min = min
        self.memory = memory
        self.bound = max
        """As of the last look."""
        self.under_way: Callable[[], int] = lambda: self.bound
        """Set by the worker: how many there are, so that a bound nobody reaches is not lowered in vain."""
        self._read = read or (lambda: read_memory(limit))
        self._every = every
        self._monotonic = monotonic
        self._next = 0.0

    def __call__(self) -> int:
        """How many there may be now. Cheap: it looks at most once in `every` seconds."""
        now = self._monotonic()
        if now >= self._next:
            self._next = now + self._every
            self._look()
        return self.bound

    def _look(self) -> None:
        memory = self._read()
        if memory is None or memory.limit <= 0:
            return
        share = memory.used / memory.limit
        if share >= self.memory:
            self.bound = max(self.min, min(self.bound, self.under_way()) * 3 // 4)
        elif share < self.memory * 0.9:
            self.bound = min(self.max, self.bound + 1)


def read_memory(limit: int | None = None, root: Path = SYSTEM) -> Memory | None:
    """What there is and what is used. With a `limit`, and where no container sets one, this process counts alone."""
    if limit is not None:
        own = _resident(root)
        return None if own is None else Memory(own, limit)
    machine = _machine(root)
    group = _group(root)
    if group is not None and (machine is None or group.limit < machine):
        return group
    own = _resident(root)
    return None if machine is None or own is None else Memory(own, machine)


def _resident(root: Path) -> int | None:
    try:
        return int((root / "proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _machine(root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _group(root: Path) -> Memory | None:
    """The tightest limit of this process' groups. What is used leaves out file pages that can go."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path is the host's, and its own group is mounted at the top.
        folder = base / path.lstrip("/")
        for place in [folder, *[up for up in folder.parents if up == base or base in up.parents]]:
            if (memory := _of(place, *names)) is not None:
                found.append(memory)
    return min(found, key=lambda memory: memory.limit - memory.used, default=None)


def _of(place: Path, limit: str, current: str, inactive: str) -> Memory | None:
    try:
        most, used = int(_text(place / limit)), int(_text(place / current))
    except ValueError:  # not there, or "max"
        return None
    if most >= LIMIT_MAX:
        return None
    stat = dict(line.split() for line in _text(place / "memory.stat").splitlines() if line.count(" ") == 1)
    return Memory(max(0, used - int(stat.get(inactive, 0))), most)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
