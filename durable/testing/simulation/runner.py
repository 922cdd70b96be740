"""Many seeds on all cores: totals by kind, failures with the way to see them again, and what is left of one when shrunk.

Each worker is a process of its own, started with a fixed hash seed, so that a seed is the same wherever it runs.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from durable.testing.simulation.checker import check
from durable.testing.simulation.faults import FORGETS, KINDS, NATIVE, Swarm
from durable.testing.simulation.world import Report, World

TWICE = 100
"""One in so many seeds is run twice; the traces must agree."""
MUST = frozenset(
    {
        "run started", "run completed", "run failed", "run cancelled", "run cancelling", "run timed_out", "run requeued",
        "step started", "step completed", "step failed", "step retrying", "step cancelled",
        "remote dispatched", "remote published", "remote completed", "remote failed", "remote retrying",
        "remote cancelled", "remote late",
        "child started", "child completed", "child failed", "child cancelled",
        "wait opened", "wait looked", "wait cancelled", "event received", "emit completed",
        "timer fired", "signal received", "patched marked", "log written",
        "hosted turn", "hosted turn again", "hosted decision", "hosted decision passed over", "hosted decision refused",
        "hosted completed", "hosted failed", "hosted cancelled", "line live", "line with result",
        "broker asked", "broker missed", "broker sent again",
    }
)  # fmt: skip
"""What journals must show over many seeds: a zero means that something is not tested at all."""


class Case(msgspec.Struct, omit_defaults=True):
    """A seed, perhaps shrunk: what tests/simulation/regressions.txt has, a line each."""

    seed: int
    runs: tuple[int, ...] | None = None
    moves: tuple[int, ...] | None = None
    kinds: tuple[str, ...] | None = None
    engines: int | None = None
    store: str | None = None
    plain: bool = False
    """Without what was added later: drawn as it was when the case was kept."""
    native: bool = False
    """Without hosted programs, lines and brokers that forget: what was added after `plain`, and is off with it."""
    why: str = ""

    def swarm(self) -> Swarm:
        drawn = Swarm.draw(self.seed)
        changes: dict[str, Any] = {}
        for name in ("runs", "moves", "engines", "store"):
            if (value := getattr(self, name)) is not None:
                changes[name] = value
        if self.kinds is not None:
            changes["kinds"] = frozenset(self.kinds)
        if self.plain or self.native:
            changes = {**NATIVE, "kinds": drawn.kinds - FORGETS.keys(), **changes}
        if self.plain:
            changes = {"store": "memory", "more": False, "door": False, "partial": False, "retention": None, **changes}
        return msgspec.structs.replace(drawn, **changes)

    @classmethod
    def of(cls, swarm: Swarm, why: str = "") -> Case:
        return cls(
            swarm.seed,
            swarm.runs,
            swarm.moves,
            tuple(sorted(swarm.kinds)),
            swarm.engines,
            swarm.store,
            not swarm.more,
            swarm.native,
            why,
        )

    def text(self) -> str:
        return msgspec.json.encode(self).decode()


class Verdict(msgspec.Struct):
    """One seed, judged."""

    seed: int
    found: list[str]
    runs: int
    faults: dict[str, int]
    commands: dict[str, int]
    steps: int
    virtual: float
    bodies: int
    doubled: int
    """Bodies executed more than once for one attempt: allowed, and a sign that faults bite."""
    recovery: bool
    """A fault hit an engine that was recovering another's runs."""


def judge(swarm: Swarm, *, trace: Callable[[str], None] | None = None) -> Verdict:
    """Run one seed and check it."""
    report = World(swarm, trace=trace).run()
    found = check(report.evidence)
    if swarm.seed % TWICE == 0:
        again = World(swarm).run()
        if again.trace_hash != report.trace_hash:
            found.append("deterministic: the same seed went another way the second time")
    return verdict(report, found)


def verdict(report: Report, found: list[str]) -> Verdict:
    """What is worth telling of a report."""
    evidence = report.evidence
    began = Counter((body.step_id, body.attempt) for body in evidence.bodies)
    return Verdict(
        report.seed,
        found,
        len(evidence.runs),
        dict(report.faults),
        dict(report.commands),
        report.steps,
        evidence.ended_at,
        len(evidence.bodies),
        sum(count - 1 for count in began.values()),
        bool(report.faults["crash_recovery"]),
    )


# ------------------------------------------------------------------ many


class Totals:
    """What many seeds came to."""

    def __init__(self) -> None:
        self.seeds = 0
        self.runs = 0
        self.steps = 0
        self.virtual = 0.0
        self.bodies = 0
        self.doubled = 0
        self.recoveries = 0
        self.faults: Counter[str] = Counter()
        self.commands: Counter[str] = Counter()
        self.failed: list[Verdict] = []

    def add(self, one: Verdict) -> None:
        self.seeds += 1
        self.runs += one.runs
        self.steps += one.steps
        self.virtual += one.virtual
        self.bodies += one.bodies
        self.doubled += one.doubled
        self.recoveries += one.recovery
        self.faults.update(one.faults)
        self.commands.update(one.commands)
        if one.found:
            self.failed.append(one)

    def zeros(self) -> list[str]:
        """Kinds of fault and of journal entry that never happened."""
        silent = [kind for kind in KINDS if not self.faults[kind]]
        return silent + sorted(kind for kind in MUST if not self.commands[kind])

    def lines(self) -> Iterator[str]:
        yield (
            f"{self.seeds:,} seeds, {self.runs:,} runs, {self.faults.total():,} faults of {len(+self.faults)} kinds, "
            f"{self.virtual / 3600:,.1f} hours of virtual time, {self.steps:,} callbacks; {self.bodies:,} bodies, "
            f"{self.doubled:,} of them repeats; fault during recovery in {self.recoveries:,} seeds"
        )
        yield "faults    " + ", ".join(f"{kind} {self.faults[kind]:,}" for kind in KINDS)
        entries = sorted(kind for kind in self.commands if not kind.startswith("op "))
        yield "entries   " + ", ".join(f"{kind} {self.commands[kind]:,}" for kind in sorted({*entries, *MUST}))
        ops = sorted(kind for kind in self.commands if kind.startswith("op "))
        yield "commands  " + ", ".join(f"{kind[3:]} {self.commands[kind]:,}" for kind in ops)


def run_many(
    first: int,
    count: int,
    *,
    processes: int | None = None,
    seconds: float | None = None,
    on_verdict: Callable[[Verdict], None] = lambda _: None,
) -> Totals:
    """Judge seeds `first` to `first + count - 1`, fewer if the seconds are over before."""
    processes = max(1, min(processes or os.cpu_count() or 1, count))
    totals = Totals()
    deadline = None if seconds is None else time.time() + seconds
    command = [sys.executable, "-m", "durable.testing.simulation", "--worker"]
    workers = [
        subprocess.Popen(
            [
                *command,
                f"{first + n}:{first + count}:{processes}",
                *([] if deadline is None else ["--until", str(deadline)]),
            ],
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        for n in range(processes)
    ]
    try:
        for line in _lines(workers):
            one = msgspec.json.decode(line, type=Verdict)
            totals.add(one)
            on_verdict(one)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            with worker:
                worker.wait()
    broken = [worker.returncode for worker in workers if worker.returncode]
    if broken:
        raise RuntimeError(f"simulation workers ended with {broken}; their output is above")
    return totals


def environment() -> dict[str, str]:
    """Of a worker: a fixed hash seed, and this very package."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": path}


def _lines(workers: Sequence[subprocess.Popen[str]]) -> Iterator[str]:
    """Lines of all workers as they come."""
    import queue
    import threading

    lines: queue.Queue[str | None] = queue.Queue()

    def read(worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.put(line)
        lines.put(None)

    for worker in workers:
        threading.Thread(target=read, args=(worker,), daemon=True).start()
    open_ = len(workers)
    while open_:
        line = lines.get()
        if line is None:
            open_ -= 1
        else:
            yield line


def quiet() -> None:
    """Make ready for many seeds in this process."""
    logging.getLogger("durable.workflow").setLevel(logging.CRITICAL + 1)  # what programs do wrong, they do on purpose
    # What vanished processes leave behind is collected between seeds; while a seed runs, the world hears of both.
    warnings.simplefilter("ignore", RuntimeWarning)
    sys.unraisablehook = lambda _: None
    gc.freeze()  # what is loaded by now need not be looked at after each seed


def work(seeds: range, until: float | None, tell: Callable[[str], None]) -> None:
    """A worker's life: judge seeds, tell each verdict as a line of JSON."""
    quiet()
    for n, seed in enumerate(seeds):
        if until is not None and n and time.time() > until:
            return
        tell(msgspec.json.encode(judge(Swarm.draw(seed))).decode())


def run_cases(cases: Sequence[Case]) -> list[tuple[Case, list[str]]]:
    """What each case finds, in a process with the hash seed that seeds are run under."""
    command = [sys.executable, "-m", "durable.testing.simulation", "--cases"]
    text = "\n".join(case.text() for case in cases)
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, env=environment(), text=True, check=True)
    found = [msgspec.json.decode(line, type=list[str]) for line in done.stdout.splitlines()]
    return list(zip(cases, found, strict=True))


# ------------------------------------------------------------------ shrinking


def shrink(swarm: Swarm, *, tries: int = 120, tell: Callable[[str], None] = lambda _: None) -> tuple[Swarm, list[str]]:
    """The same failure with fewer runs, moves, kinds and engines, and what it then says."""
    found = check(World(swarm).run().evidence)
    names = {what.split(":")[0] for what in found}
    left = tries

    def fails(candidate: Swarm) -> bool:
        nonlocal left, found
        if left <= 0:
            return False
        left -= 1
        again = check(World(candidate).run().evidence)
        if names.intersection(what.split(":")[0] for what in again):
            found = again
            return True
        return False

    for field in ("runs", "moves", "kinds"):
        items: list[Any] = sorted(getattr(swarm, field))
        size = max(1, len(items) // 2)
        while items and left > 0:
            start = 0
            while start < len(items):
                fewer = items[:start] + items[start + size :]
                candidate = msgspec.structs.replace(swarm, **{field: _like(getattr(swarm, field), fewer)})
                if fails(candidate):
                    swarm, items = candidate, fewer
                    tell(f"{len(swarm.runs)} runs, {len(swarm.moves)} moves, {len(swarm.kinds)} kinds")
                else:
                    start += size
            if size == 1:
                break
            size //= 2
    while swarm.engines > 1 and fails(msgspec.structs.replace(swarm, engines=swarm.engines - 1)):
        swarm = msgspec.structs.replace(swarm, engines=swarm.engines - 1)
    return swarm, found


def _like(old: Any, items: list[Any]) -> Any:
    return frozenset(items) if isinstance(old, frozenset | set) else tuple(items)


def regressions(path: Path) -> list[Case]:
    """Cases kept for ever: one JSON object a line; lines that begin with # are for people."""
    cases = []
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            cases.append(msgspec.convert(json.loads(line), Case))
    return cases
