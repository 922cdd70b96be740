"""A run that begins with a part of another's journal: random programs, cut at any of their steps, go on as they did."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from durable.core import payload, prefix
from durable.core.commands import Abandon, StartChild
from durable.core.journal import LOG, Entry
from durable.core.replay import Machine
from durable.testing.programs import generate, show
from tests.core.driver import ProgramDriver, told

PROGRAMS = int(os.environ.get("DURABLE_PROGRAMS", "200")) // 2
BATCHES = 4


def begun_with(driver: ProgramDriver, entries: tuple[Entry, ...]) -> tuple[Machine, list[Any]]:
    logs = sum(entry.kind == LOG and entry.key is None for entry in entries)
    machine = Machine(driver.definition, run_id="run-again", input=driver.input, logs=logs)
    return machine, machine.replay([entry for entry in entries if entry.kind != LOG])


def said(item: Any) -> str:
    """As `told`; a child's id is of the run."""
    if isinstance(item, Abandon):
        return f"abandon {said(item.command)}"
    return told(item).replace(f" {item.child_id}", "") if isinstance(item, StartChild) else told(item)


def goes_on(driver: ProgramDriver, key: str) -> None:
    """Cut at this step, given what the original was given from there on: it asks for the same and ends the same."""
    start = prefix.before(driver.journal, key)
    entries = prefix.copied(start, driver.run_id, key, driver.journal[len(start) - 1].at)
    assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
    assert entries[-1].held == 0
    machine, _ = begun_with(driver, entries)
    assert key in machine.outstanding, f"{key} is asked again"
    for command in machine.outstanding.values():
        assert not machine.trace(command.key), "nothing says that it had begun"
        assert not isinstance(command, StartChild) or command.child_id.startswith("run-again.")
    seq = len(entries)
    for entry in driver.journal[len(start) :]:
        if entry.delivers:
            seq += 1
            issued = machine.deliver(replace(entry, seq=seq))
            assert [said(item) for item in issued] == [said(item) for item in driver.issued[entry.seq]]
    ended, original = machine.outcome, driver.machine.outcome
    assert type(ended) is type(original)
    assert getattr(ended, "output", None) == getattr(original, "output", None)
    machine.drop()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_rerun_from_any_step_ends_like_the_original(batch: int) -> None:
    """Cut at any step, remote step or child, a random program asks that step again, and given the same answers ends the same;
    its random numbers are the original's."""
    for seed in range(batch, PROGRAMS, BATCHES):
        driver = ProgramDriver(generate(seed), seed)
        driver.play()
        try:
            for key in prefix.steps(driver.journal):
                goes_on(driver, key)
        except BaseException:
            print(f"seed {seed}\n{show(generate(seed))}")
            raise
        driver.machine.drop()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_an_edited_result_is_what_the_code_gets(batch: int) -> None:
    """With another result for any step that completed, the copy replays, and nothing behind that step is in it."""
    for seed in range(batch, PROGRAMS // 2, BATCHES):
        driver = ProgramDriver(generate(seed), seed)
        driver.play()
        for entry in driver.journal:
            if entry.key is None or entry.kind not in ("step", "remote") or entry.status != "completed":
                continue
            data = payload.encode(1_000_003, what="result")
            edited = prefix.with_result(driver.journal, entry.key, data)
            assert (edited[-1].key, edited[-1].payload) == (entry.key, data)
            entries = prefix.copied(edited, driver.run_id, entry.key, entry.at + 5)
            assert entries[-1].held == 5
            machine, _ = begun_with(driver, entries)
            assert entry.key not in machine.outstanding
            machine.drop()
        driver.machine.drop()


def test_a_copy_of_a_copy_draws_the_first_ones_numbers() -> None:
    """Whose random numbers are drawn is handed on."""
    driver = ProgramDriver(generate(3), 3)
    driver.play()
    key = prefix.steps(driver.journal)[-1]
    once = prefix.copied(prefix.before(driver.journal, key), "first", key, 0)
    twice = prefix.copied(prefix.before([*once, *driver.journal[len(once) - 1 :]], key), "second", key, 0)
    assert msgspec.json.decode(twice[0].payload or b"")["seed"] == "first"
    driver.machine.drop()


def test_an_unknown_step_is_a_key_error() -> None:
    """A step the journal does not know cannot be cut at."""
    driver = ProgramDriver(generate(1), 1)
    driver.play()
    with pytest.raises(KeyError):
        prefix.before(driver.journal, "nobody")
    driver.machine.drop()
