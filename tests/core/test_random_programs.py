"""Random programs: hot = cold at every wait = after a crash at any prefix = in another process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from durable.core.commands import Abandon, Command, Patch, WriteLog
from durable.core.journal import LOG, Entry
from durable.core.replay import Machine
from durable.testing.programs import generate, show, shrink
from tests.core.driver import ProgramDriver, state, told

PROGRAMS = int(os.environ.get("DURABLE_PROGRAMS", "200"))
BATCHES = 8
ROOT = Path(__file__).parents[2]


def played(seed: int, *, cold: bool = False) -> ProgramDriver:
    driver = ProgramDriver(generate(seed), seed, cold=cold)
    driver.play()
    return driver


def crash(driver: ProgramDriver, upto: int) -> None:
    """Replay a prefix of the journal; the machine must stand where the live one stood, and ask for what is not shown."""
    machine, news = driver.replayed(upto)
    prefix = driver.journal[:upto]
    turn = max(entry.seq for entry in prefix if entry.delivers)
    assert state(machine) == driver.states[turn], f"after a crash behind seq {upto}"
    shown = {(entry.kind, entry.key) for entry in prefix if entry.status != "cancelled"}
    given_up = {entry.key for entry in prefix if entry.status == "cancelled"}
    logs = sum(entry.kind == LOG for entry in prefix)
    expected = []
    for seq, items in driver.issued.items():
        for item in items if seq <= turn else ():
            if isinstance(item, Command):
                new = item.key in machine.outstanding and (item.kind, item.key) not in shown
            elif isinstance(item, Abandon):
                new = item.command.key not in given_up
            elif isinstance(item, Patch):
                new = ("patched", item.id) not in shown
            else:
                new = isinstance(item, WriteLog) and item.index >= logs
            if new:
                expected.append(told(item))
    assert [told(item) for item in news] == expected, f"after a crash behind seq {upto}"
    machine.drop()


def check(seed: int) -> None:
    hot = played(seed)
    hot.machine.drop()
    cold = played(seed, cold=True)
    cold.machine.drop()
    assert cold.journal == hot.journal
    assert cold.asked == hot.asked
    assert cold.states == hot.states
    for upto in sorted(hot.rng.sample(range(1, len(hot.journal) + 1), min(6, len(hot.journal)))):
        crash(hot, upto)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_hot_cold_and_crashed_runs_are_the_same(batch: int) -> None:
    """A random program asks for the same hot, replayed at every wait, and replayed from any prefix of its journal."""
    for seed in range(batch, PROGRAMS, BATCHES):
        try:
            check(seed)
        except BaseException:
            print(f"seed {seed}\n{show(generate(seed))}")
            raise


def test_another_process_asks_for_the_same(tmp_path: Path) -> None:
    """A journal replays in another process, with other string hashes and addresses, turn by turn to the same commands."""
    recorded = []
    for seed in range(min(PROGRAMS, 300)):
        driver = played(seed)
        driver.machine.drop()
        recorded.append((seed, driver.journal, {str(seq): asked for seq, asked in driver.asked.items()}))
    file = tmp_path / "journals"
    file.write_bytes(msgspec.msgpack.encode(recorded))
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.test_random_programs", str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_programs_use_everything() -> None:
    """The generator reaches every kind of node and every kind of command."""
    from durable.testing.programs import _INNER, count, nodes

    kinds = {node["op"] for seed in range(400) for node in nodes(generate(seed))}
    leaves = {"step", "remote", "sleep", "yield", "draw", "log", "patch", "signal", "child", "handle"}
    assert kinds == set(_INNER) | leaves
    asked = {text.split()[0] for seed in range(60) for lines in played(seed).asked.values() for text in lines}
    assert {"step", "remote", "child", "signal", "abandon"} <= asked
    assert count(generate(5), "step") > 0


def test_programs_shrink() -> None:
    """A failing program shrinks to the nodes that make it fail."""
    from durable.testing.programs import count, nodes

    small = shrink(generate(5), lambda program: count(program, "remote") > 0)
    assert count(small, "remote") == 1
    assert sum(1 for _ in nodes(small)) <= 4


def replay_elsewhere(file: str) -> None:
    recorded = msgspec.msgpack.decode(Path(file).read_bytes(), type=list[tuple[int, list[Entry], dict[str, list[str]]]])
    ballast = []
    for seed, journal, asked in recorded:
        driver = ProgramDriver(generate(seed), seed)
        machine: Machine = driver.machine
        for entry in journal:
            ballast.append([object() for _ in range(seed * 7 % 50)])
            if len(ballast) % 3 == 0:
                ballast.pop(0)
            if entry.seq % 50 == 0:
                gc.collect()
            if entry.delivers:
                issued = [told(item) for item in machine.deliver(entry)]
                assert issued == asked[str(entry.seq)], (seed, entry.seq, issued, asked[str(entry.seq)])
        machine.drop()


if __name__ == "__main__":
    replay_elsewhere(sys.argv[1])
