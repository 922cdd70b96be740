"""Shows that the simulation bites: takes one protection away at a time, and says which seed noticed, and by what.

    python tests/simulation/bite.py             all of them
    python tests/simulation/bite.py epoch       one of them, at most 300 seeds

The product is never touched: a removal is a store or a method put in its place for as long as it lasts.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

import msgspec  # noqa: E402

from durable.core.commands import Record, TakeTurn  # noqa: E402
from durable.core.journal import STEP  # noqa: E402
from durable.engine import apply, attempts, executor, lines  # noqa: E402
from durable.engine.dispatch import Dispatch  # noqa: E402
from durable.engine.events import Events  # noqa: E402
from durable.engine.executor import Executor  # noqa: E402
from durable.engine.residents import Arrival  # noqa: E402
from durable.engine.steps import LocalSteps  # noqa: E402
from durable.store.memory import MemoryStore  # noqa: E402
from durable.store.records import Commit, CommitOutcome, RunRecord  # noqa: E402
from durable.testing.simulation.checker import check  # noqa: E402
from durable.testing.simulation.faults import Swarm  # noqa: E402
from durable.testing.simulation.runner import quiet  # noqa: E402
from durable.testing.simulation.world import World  # noqa: E402
from durable.worker import turns  # noqa: E402


class WithoutEpoch(MemoryStore):
    """Takes every commit for one of the epoch the run is at."""

    def _commit(self, commit: Commit, now: int) -> CommitOutcome:
        run = self._tables.runs.get(commit.run_id)
        if run is not None:
            commit = msgspec.structs.replace(commit, epoch=run.epoch)
        return super()._commit(commit, now)


class WithoutFamily(MemoryStore):
    """Deletes finished runs, whoever of their family is active."""

    def _family_active(self, run: RunRecord) -> bool:
        return False


class WithoutCommitId(MemoryStore):
    """Does not know its own last commit again."""

    def _commit(self, commit: Commit, now: int) -> CommitOutcome:
        run = self._tables.runs.get(commit.run_id)
        if run is not None and run.commit_id == commit.commit_id:
            run.commit_id = None
            try:
                return super()._commit(commit, now)
            finally:
                run.commit_id = commit.commit_id
        return super()._commit(commit, now)


class WithoutCounter(MemoryStore):
    """Suspends a run without a look at its unread mail."""

    def _commit(self, commit: Commit, now: int) -> CommitOutcome:
        run = self._tables.runs.get(commit.run_id)
        if run is None or not commit.suspend:
            return super()._commit(commit, now)
        last, run.inbox_last = run.inbox_last, 0
        try:
            return super()._commit(commit, now)
        finally:
            run.inbox_last = last


@contextmanager
def without_barrier() -> Iterator[None]:
    """A body or a dispatch begins in the turn that asks for it."""

    def at_once(method: Any) -> Any:
        def instead(self: Any, run: Any, command: Any, attempt: int) -> None:
            method(self, run, command, attempt)
            run.actions.pop()()

        return instead

    with (
        patch.object(LocalSteps, "launch", at_once(LocalSteps.launch)),
        patch.object(Dispatch, "send", at_once(Dispatch.send)),
    ):
        yield


@contextmanager
def out_of_order() -> Iterator[None]:
    """Of two entries that are ready together, the second is delivered first; the journal has them in order."""
    take = Executor._take

    def instead(self: Any, run: Any, arrival: Any) -> None:
        if not run.arrivals:
            return take(self, run, arrival)
        machine = run.machine
        deliver = machine.deliver
        entries: list[Any] = []
        machine.deliver = lambda entry: entries.append(entry) or []
        try:
            take(self, run, arrival)
            take(self, run, run.arrivals.popleft())
        finally:
            machine.deliver = deliver
        for entry in reversed(entries):
            if machine.outcome is None:
                apply.apply(self, run, deliver(entry))
        return None

    with patch.object(Executor, "_take", instead):
        yield


@contextmanager
def any_decision() -> Iterator[None]:
    """A decision counts for whatever turn the run awaits, whichever it was made for."""

    def instead(self: Any, run: Any, task: str) -> str | None:
        return next((key for key, sent in run.sent.items() if isinstance(sent.command, TakeTurn)), None)

    with patch.object(Dispatch, "turn_of", instead):
        yield


@contextmanager
def in_pieces() -> Iterator[None]:
    """A decision's recorded steps are journaled a moment after it."""
    at_once = apply._record

    def instead(executor: Any, run: Any, command: Record) -> None:
        if command.failed:
            return at_once(executor, run, command)
        arrival = Arrival(
            executor.clock.now(), STEP, "completed", key=command.key, attempt=1, payload=command.payload or b"null"
        )
        asyncio.get_running_loop().call_later(0.001, executor.arrive, run, arrival)
        return None

    with patch.dict(apply._APPLY, {Record: instead}):
        yield


@contextmanager
def lines_told_twice() -> Iterator[None]:
    """A result writes all of its lines, whatever was told live."""
    write = attempts._write_lines

    def instead(executor: Any, run: Any, key: str, arrival: Any) -> None:
        run.told.pop(key, None)
        write(executor, run, key, arrival)

    with patch.object(attempts, "_write_lines", instead):
        yield


@contextmanager
def lines_forgotten() -> Iterator[None]:
    """A new owner does not look which lines are journaled."""

    async def instead(*_: Any) -> dict[str, Any]:
        return {}

    with patch.object(lines, "told", instead):
        yield


@contextmanager
def by_the_workers_clock() -> Iterator[None]:
    """A worker tells its own wall clock's time, minutes off."""
    with patch.object(turns._Turn, "_now", lambda self: self._clock.now() // 1_000):
        yield


@contextmanager
def never_asked() -> Iterator[None]:
    """No transport is ever asked after what is out."""
    with patch.object(Dispatch, "look_after", lambda self: None), patch.object(Dispatch, "ask_at", lambda *_: None):
        yield


@contextmanager
def nothing() -> Iterator[None]:
    yield


Removal = tuple[str, type[MemoryStore], Callable[[], Any]]


@contextmanager
def looks_never_back() -> Iterator[None]:
    """A wait hears of events that come while it is open, and of no other."""

    async def nothing_there(events: Events, run: Any, waits: Any) -> list[Arrival]:
        return []

    with patch.object(Events, "_search", nothing_there):
        yield


@contextmanager
def events_told_twice() -> Iterator[None]:
    """An event that was found looking back, and told of by a message too, counts twice."""
    with patch.object(executor, "EVENT", "no kind at all"):
        yield


REMOVALS: dict[str, Removal] = {
    "epoch": ("the epoch compared inside the commit", WithoutEpoch, nothing),
    "commit_id": ("the commit_id that knows a commit again", WithoutCommitId, nothing),
    "inbox": ("the inbox counter looked at when a run suspends", WithoutCounter, nothing),
    "barrier": ("the barrier before side effects", MemoryStore, without_barrier),
    "family": ("the look at the family before a run is deleted", WithoutFamily, nothing),
    "task_id": ("that only the decision of the awaited task counts", MemoryStore, any_decision),
    "decision": ("that a decision and what it recorded are one commit", MemoryStore, in_pieces),
    "lines": ("the index by which a line told live is known again", MemoryStore, lines_told_twice),
    "told": ("a new owner's look at the lines that are journaled", MemoryStore, lines_forgotten),
    "clock": ("the engine's time in a worker's turn", MemoryStore, by_the_workers_clock),
    "asking": ("asking brokers after lost tasks", MemoryStore, never_asked),
    "order": ("delivery in journal order", MemoryStore, out_of_order),
    "look_back": ("the look at events that came before their wait", MemoryStore, looks_never_back),
    "once": ("that an event comes to a run once", MemoryStore, events_told_twice),
}


FIRST = {"once": 140}
"""Where a removal is rarely noticed: near a seed that does, so that no time goes by on those before."""


def bite(name: str, *, seeds: int = 300, first: int = 0, seconds: float | None = None) -> tuple[int, str] | None:
    """The first seed that notices the removal, and what it says. None: nobody did."""
    _, store, patched = REMOVALS[name]
    began = time.monotonic()
    with patched():
        for seed in range(first, first + seeds):
            found = check(World(Swarm.draw(seed), base=store).run().evidence)
            if found:
                return seed, found[0]
            if seconds is not None and time.monotonic() - began > seconds:
                return None
    return None


def main(names: list[str]) -> int:
    unnoticed = 0
    quiet()
    for name in names or list(REMOVALS):
        caught = bite(name)
        if caught is None:
            unnoticed += 1
            print(f"{name:<10} without {REMOVALS[name][0]}: NOT NOTICED", flush=True)
        else:
            seed, what = caught
            print(f"{name:<10} without {REMOVALS[name][0]}: seed {seed} noticed\n           {what:.300}", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
