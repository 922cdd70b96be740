"""`Adaptive`: as many tasks at once as memory allows. Told numbers, told files, and one real process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from durable import Adaptive
from durable.core.errors import DefinitionError
from durable.worker.adaptive import Memory, read_memory

MB = 1 << 20


class Machine:
    """What there is, and the time."""

    def __init__(self) -> None:
        self.used = 0
        self.now = 0.0

    def adaptive(self, max: int = 16, **options: int) -> Adaptive:
        return Adaptive(max, **options, read=lambda: Memory(self.used, 100), monotonic=lambda: self.now)

    def look(self, adaptive: Adaptive, used: int) -> int:
        self.used = used
        self.now += 1.0
        return adaptive()


def test_the_bound_falls_in_steps_and_rises_slowly() -> None:
    """A quarter less at each look while more than four fifths are used, never below the least; then one more at a time."""
    machine = Machine()
    adaptive = machine.adaptive(min=2)
    assert machine.look(adaptive, 10) == 16
    assert [machine.look(adaptive, 85) for _ in range(7)] == [12, 9, 6, 4, 3, 2, 2]
    assert machine.look(adaptive, 75) == 2, "near the limit it stays"
    assert [machine.look(adaptive, 40) for _ in range(3)] == [3, 4, 5]
    assert [machine.look(adaptive, 40) for _ in range(20)][-1] == 16


def test_a_bound_nobody_reaches_is_lowered_to_what_there_is() -> None:
    """With 4 tasks under way of 64, the first step down is 3: it has an effect at once."""
    machine = Machine()
    adaptive = machine.adaptive(64)
    adaptive.under_way = lambda: 4
    assert machine.look(adaptive, 90) == 3


def test_it_looks_once_a_second() -> None:
    """Transports ask before each task; the numbers are read now and then."""
    looks: list[int] = []

    def read() -> Memory:
        looks.append(1)
        return Memory(0, 100)

    adaptive = Adaptive(read=read, monotonic=lambda: 5.0)
    assert [adaptive() for _ in range(100)] == [64] * 100
    assert len(looks) == 1


def test_where_nothing_can_be_read_the_bound_stays() -> None:
    """No /proc, no group: it is a number like any other."""
    assert Adaptive(9, read=lambda: None)() == 9


@pytest.mark.parametrize("options", [{"max": 0}, {"min": 5, "max": 4}, {"memory": 0.0}, {"memory": 80}])
def test_what_makes_no_sense_is_refused(options: dict[str, int]) -> None:
    """Bounds the wrong way round, a share that is none."""
    with pytest.raises(DefinitionError):
        Adaptive(**options)  # type: ignore[arg-type]


def files(root: Path, **texts: str) -> Path:
    """A machine's files, `/` as `__`."""
    for name, text in texts.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = f"MemTotal: {8 * 1024 * 1024} kB\nMemFree: 5 kB\n"
STATM = "5000 2500 100 1 0 1 0\n"


def test_a_container_of_today(tmp_path: Path) -> None:
    """cgroup v2: the group's limit, and what it uses without the file pages that can go; the tightest of its parents."""
    root = files(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__statm=STATM,
        proc__self__cgroup="0::/pods/web\n",
        sys__fs__cgroup__pods__memory_DOT_max=f"{900 * MB}\n",
        sys__fs__cgroup__pods__memory_DOT_current=f"{100 * MB}\n",
        sys__fs__cgroup__pods__web__memory_DOT_max=f"{512 * MB}\n",
        sys__fs__cgroup__pods__web__memory_DOT_current=f"{300 * MB}\n",
        sys__fs__cgroup__pods__web__memory_DOT_stat=f"anon 5\ninactive_file {100 * MB}\n",
    )
    assert read_memory(root=root) == Memory(200 * MB, 512 * MB)


def test_a_container_of_yesterday(tmp_path: Path) -> None:
    """cgroup v1, mounted at the top while the path is the host's."""
    root = files(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__statm=STATM,
        proc__self__cgroup="9:cpu:/docker/7f\n5:memory:/docker/7f\n",
        sys__fs__cgroup__memory__memory_DOT_limit_in_bytes=f"{256 * MB}\n",
        sys__fs__cgroup__memory__memory_DOT_usage_in_bytes=f"{64 * MB}\n",
        sys__fs__cgroup__memory__memory_DOT_stat=f"total_inactive_file {MB}\n",
    )
    assert read_memory(root=root) == Memory(63 * MB, 256 * MB)


def test_a_machine_without_limits(tmp_path: Path) -> None:
    """No group sets one, or one that is none: this process, of all there is."""
    own = 2500 * 4096
    root = files(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__statm=STATM,
        proc__self__cgroup="0::/\n",
        sys__fs__cgroup__memory_DOT_max="max\n",
        sys__fs__cgroup__memory_DOT_current="77\n",
    )
    assert read_memory(root=root) == Memory(own, 8 << 30)
    assert read_memory(limit=MB, root=root) == Memory(own, MB)
    assert read_memory(root=tmp_path / "nothing") is None


SCRIPT = """
from durable import Adaptive
from durable.worker.adaptive import read_memory
now = 0.0
before = read_memory(limit=1).used
adaptive = Adaptive(8, limit=before + (200 << 20), memory=0.8, monotonic=lambda: now)
print(adaptive())
heap = bytearray(b"x") * (400 << 20)
for now in (1.0, 2.0, 3.0): print(adaptive())
del heap
for now in (4.0, 5.0): print(adaptive())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_real_process_that_fills_its_memory_and_frees_it() -> None:
    """400 MB over a limit of 200 MB more than it had: the bound falls, and rises when they are freed."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.split() == ["8", "6", "4", "3", "4", "5"]
