"""A crash before and after every durable effect of a scenario, and pairs of crashes with the second one inside recovery.

A scenario is run once undisturbed, which counts its effects: commits, claims, starts, messages, dispatches, replies,
acknowledgements. Then once for each effect and side, the process on whose behalf it happens vanishing there; then, for
each of those, again with a second crash at each effect that followed. Every run is checked like any other seed.

    python -m durable.testing.simulation.crashes [SCENARIO ...]     all of them: some minutes
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgspec
from msgspec import Struct

from durable.testing.simulation.checker import check
from durable.testing.simulation.faults import Swarm, Tripwire
from durable.testing.simulation.programs import Op, Plan
from durable.testing.simulation.runner import quiet
from durable.testing.simulation.world import World

Crash = tuple[int, str]
"""(effect number from 1, "before" or "after")."""


def _step(name: str = "a", **plan: float) -> Op:
    return {"op": "step", "name": name, "plan": plan}


def _remote(timeout: float | None = None, **plan: float) -> Op:
    return {"op": "remote", "plan": plan, "timeout": timeout}


def _child(*ops: Op) -> Op:
    return {"op": "child", "workflow": "sim.program", "ops": list(ops)}


SCENARIOS: dict[str, Callable[[], Plan]] = {
    "sequential steps": lambda: Plan.fixed([_step("a"), _step("b"), _step("c")]),
    "parallel steps": lambda: Plan.fixed(
        [{"op": "gather", "branches": [[_step("a")], [_step("b", takes=0.05)], [_step("c", takes=0.5)]]}]
    ),
    "remote step": lambda: Plan.fixed([_remote(), _step("b")]),
    "remote steps at once": lambda: Plan.fixed(
        [{"op": "group", "branches": [[_remote(takes=0.05)], [_remote(takes=0.05)]]}]
    ),
    "child": lambda: Plan.fixed([_child(_step("a"))]),
    "grandchild": lambda: Plan.fixed([_child(_child(_step("a")), _step("b")), _step("c")]),
    "child left behind": lambda: Plan.fixed(
        [
            {
                "op": "start_child",
                "workflow": "sim.program",
                "ops": [_step("a", takes=0.5)],
                "close": "abandon",
                "joins": False,
                "meanwhile": [_step("b")],
            },
        ]
    ),
    "child given up": lambda: Plan.fixed([{"op": "within", "seconds": 0.3, "ops": [_child(_step("a", takes=2.0))]}]),
    "signal before the wait": lambda: Plan.fixed(
        [{"op": "sleep", "seconds": 0.3}, {"op": "signal", "name": "x"}], signals=["x"], delays=[0.0]
    ),
    "signal after the wait": lambda: Plan.fixed([{"op": "signal", "name": "x"}], signals=["x"], delays=[0.5]),
    "signal or not": lambda: Plan.fixed(
        [{"op": "signal_or_not", "name": "x", "timeout": 0.5}, _step("a")], signals=["x"], delays=[0.5]
    ),
    "sleep": lambda: Plan.fixed([_step("a"), {"op": "sleep", "seconds": 2.0}, _step("b")]),
    "retry": lambda: Plan.fixed([_step("a", fails=2), _step("b")]),
    "remote retry": lambda: Plan.fixed([_remote(fails=2)]),
    "remote timeout": lambda: Plan.fixed([{"op": "attempt", "ops": [_remote(timeout=0.3, takes=0.6)]}, _step("b")]),
    "cancel during a step": lambda: Plan.fixed(
        [{"op": "cleanup", "ops": [_step("a", takes=2.0)], "after": [_step("undo")]}], cancel_at=0.5
    ),
    "cancel during a remote step": lambda: Plan.fixed(
        [{"op": "cleanup", "ops": [_remote(takes=2.0)], "after": [_step("undo")]}], cancel_at=0.5
    ),
    "run timeout": lambda: Plan.fixed([_step("a"), {"op": "signal", "name": "x"}], workflow="sim.deadline"),
    "race": lambda: Plan.fixed([{"op": "race", "branches": [[_remote(takes=1.0)], [{"op": "sleep", "seconds": 0.2}]]}]),
    "requeue": lambda: Plan.fixed([_step("a"), _remote(fails=3), _step("b")], requeues=True),
    "requeue after a child": lambda: Plan.fixed([_child(_remote(fails=3)), _step("b")], requeues=True),
    "bad deploy, and a fix": lambda: Plan.fixed(
        [{"op": "fickle"}, {"op": "sleep", "seconds": 1.0}, _step("b")], blocks=True, waits=False
    ),
    "two starts with one key": lambda: Plan.fixed([_step("a")], doubled=True),
    "start for later": lambda: Plan.fixed([_step("a")], later=True),
}


class Found(Struct):
    """A scenario that did not survive its crashes."""

    scenario: str
    mode: str
    crashes: tuple[Crash, ...]
    what: list[str]

    def __str__(self) -> str:
        return f"{self.scenario} ({self.mode}), crashes {self.crashes}: {self.what[0]}"


class Course(Struct):
    """One run of a scenario."""

    effects: list[str]
    tripped: int
    what: list[str]


MODES: dict[str, dict[str, Any]] = {
    "hot": {},
    "cold": {"cold": True},
    "local": {"shared": False},
    "sqlite": {"store": "sqlite"},
    "hosted": {"hosting": True},
}
"""Worlds a scenario is run in: what differs from the first."""


def swarm(mode: str) -> Swarm:
    """A calm world for two engines and two workers."""
    calm = Swarm(
        seed=0,
        runs=(0,),
        moves=(),
        kinds=frozenset(),
        engines=2,
        workers=2,
        lease=1.0,
        safety=12.0,
        rate=0.0,
        order="fifo",
        store="memory",
        shared=True,
        holds=True,
        latency=0.0005,
        drift=0.0,
        cold=False,
        hot_for=0.2,
        hot_limit=1000,
        tick=0.005,
        poll_every=0.5,
        max_running=100,
        cancel_grace=1.0,
    )
    return msgspec.structs.replace(calm, **MODES[mode])


def course(
    scenario: str, crashes: tuple[Crash, ...] = (), *, mode: str = "hot", trace: Callable[[str], None] | None = None
) -> Course:
    """Run a scenario with these crashes."""
    wire = Tripwire()
    wire.at = dict(crashes)
    plan = SCENARIOS[scenario]()
    if swarm(mode).hosting:
        plan.host()
    world = World(swarm(mode), plans={0: plan}, tripwire=wire, trace=trace)
    report = world.run()
    return Course(wire.names, len(wire.tripped), check(report.evidence))


def singles(scenario: str, *, mode: str) -> Iterator[tuple[tuple[Crash, ...], Course]]:
    """Undisturbed, then every single crash."""
    calm = course(scenario, mode=mode)
    yield (), calm
    for number in range(1, len(calm.effects) + 1):
        for when in ("before", "after"):
            if calm.effects[number - 1] == "claim" and when == "before":
                continue
            crash = ((number, when),)
            yield crash, course(scenario, crash, mode=mode)


def pairs(scenario: str, *, mode: str) -> list[tuple[Crash, Crash]]:
    """Every pair whose second crash lies behind the first one."""
    found: list[tuple[Crash, Crash]] = []
    for crashes, first in singles(scenario, mode=mode):
        if not crashes or not first.tripped:
            continue
        number, when = crashes[0]
        for second in range(number + 1, len(first.effects) + 1):
            found.append(((number, when), (second, "before")))
            found.append(((number, when), (second, "after")))
    return found


def sample(seed: int) -> Iterator[tuple[str, str, tuple[Crash, Crash]]]:
    """Pairs without end, drawn: (scenario, mode, pair)."""
    draw = Random(f"pairs/{seed}")
    while True:
        name, mode = draw.choice(list(SCENARIOS)), draw.choice(list(MODES))
        calm = course(name, mode=mode)
        first = (draw.randint(1, len(calm.effects)), draw.choice(("before", "after")))
        once = course(name, (first,), mode=mode)
        if len(once.effects) > first[0]:
            second = (draw.randint(first[0] + 1, len(once.effects)), draw.choice(("before", "after")))
            yield name, mode, (first, second)


def main(argv: list[str]) -> int:
    """Every single crash and every pair of every scenario, or of those named."""
    quiet()
    bad = 0
    for name in argv or list(SCENARIOS):
        for mode in MODES:
            every: list[tuple[Crash, ...]] = [crashes for crashes, _ in singles(name, mode=mode)]
            every += pairs(name, mode=mode)
            for crashes in every:
                if what := course(name, crashes, mode=mode).what:
                    bad += 1
                    sys.stdout.write(f"{Found(name, mode, crashes, what)}\n")
            sys.stdout.write(f"{name} ({mode}): {len(every)} runs\n")
            sys.stdout.flush()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
