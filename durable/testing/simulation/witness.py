"""What really happened, written down outside the engine: every step body appends, and nobody else reads it before the end."""

from __future__ import annotations

import asyncio

from msgspec import Struct, field

from durable.core.step import current_step
from durable.testing.simulation.loop import SimLoop


class Body(Struct):
    """One execution of a body, begun and perhaps finished."""

    run_id: str
    key: str
    """The command's key; for a remote step its name."""
    step_id: str
    attempt: int
    node: str
    began: float
    frontier: int
    """Seq of the run's last committed entry when it began: everything journaled before must be at or below."""
    remote: bool
    value: str
    """What it returns if it succeeds: nobody else's."""
    ended: float | None = None
    outcome: str = ""
    said: list[str] = field(default_factory=list)
    """The lines it told."""


class Witness:
    """The ledger of one simulation."""

    def __init__(self, loop: SimLoop, seqs: dict[str, int]) -> None:
        self.loop = loop
        self.seqs = seqs
        self.bodies: list[Body] = []
        self.sleeps: dict[tuple[str, int], float] = {}
        """Seconds that hosted code asked to sleep for, by run and ordinal."""

    def begin(self, *, remote: bool) -> Body:
        """In a step body: it runs."""
        scope = current_step()
        node = self.loop.node.name
        body = Body(
            scope.run_id,
            scope.key,
            scope.step_id,
            scope.attempt,
            node,
            self.loop.time(),
            self.seqs.get(scope.run_id, 0),
            remote,
            f"{scope.step_id}#{scope.attempt}@{node}/{len(self.bodies)}",
        )
        self.bodies.append(body)
        return body


_CURRENT: list[Witness] = []


def install(witness: Witness | None) -> None:
    """Make it the one that bodies of this process write to."""
    _CURRENT[:] = [] if witness is None else [witness]


def witness_time() -> float | None:
    """Now, in a simulation."""
    return _CURRENT[0].loop.time() if _CURRENT else None


def witness_sleep(run_id: str, ordinal: int | None, seconds: float) -> None:
    """Hosted code is about to sleep, as its operation of that number. The shortest counts: a turn that was lost may have
    numbered its operations otherwise."""
    if _CURRENT and ordinal is not None:
        sleeps = _CURRENT[0].sleeps
        sleeps[run_id, ordinal] = min(seconds, sleeps.get((run_id, ordinal), seconds))


class Planned(Exception):
    """A failure that the program asked for."""


class PlannedFinal(Exception):
    """The same, never to be tried again."""


async def body(plan: dict[str, float], *, remote: bool) -> str:
    """What every step of a program does: witness, take its time, fail as planned."""
    seen = _CURRENT[0].begin(remote=remote)
    try:
        takes = plan.get("takes", 0.0)
        says = int(plan.get("says", 0))
        for n in range(says):
            seen.said.append(f"{seen.value} says {n}")
            current_step().log(seen.said[-1])
            if takes:
                await asyncio.sleep(takes / (says + 1))
        if takes:
            await asyncio.sleep(takes / (says + 1))
        if seen.attempt <= plan.get("fails", 0):
            seen.outcome = "failed"
            raise Planned(f"attempt {seen.attempt} fails as planned")
        if plan.get("final"):
            seen.outcome = "failed"
            raise PlannedFinal("fails for good as planned")
        seen.outcome = "completed"
        return seen.value
    except asyncio.CancelledError:
        seen.outcome = "cancelled"
        raise
    finally:
        seen.ended = _CURRENT[0].loop.time() if _CURRENT else None
