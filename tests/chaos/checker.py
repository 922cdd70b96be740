"""Whether it went right with real processes: the rules of the simulation that fit, and a few of our own, over three
records that know nothing of each other. Pure functions; each has a planted violation in test_checker.py.

`history` is what callers were told, `bodies` the ledger, `runs` the store at the end. There is no log of the store's own,
so rules that need one are left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from durable.core.clock import SECOND
from durable.protocol.states import Status
from durable.testing.simulation import checker as simulated
from durable.testing.simulation.world import Evidence


class Records(Evidence, kw_only=True):
    """What there is to judge by, in the simulation's form, so that its rules can read it."""

    began_at: float
    """When all this began, by the store's clock, in seconds; `ended_at` likewise."""


def check(evidence: Records) -> list[str]:
    """Every violation, in words. Empty: all is well."""
    return [f"{rule.__name__}: {what}" for rule in RULES for what in rule(evidence)]


def bodies_again(evidence: Records) -> int:
    """How many bodies ran more than once: allowed, and told."""
    began = Counter((body.run_id, body.step_id) for body in evidence.bodies if not body.outcome)
    return sum(count - 1 for count in began.values())


def completed(evidence: Records) -> Iterator[str]:
    """Nothing here fails by itself: every run completes, whatever was done to those who ran it."""
    for run_id, stored in evidence.runs.items():
        if stored.run.status is not Status.COMPLETED:
            yield f"{run_id} ({stored.run.workflow}) is {stored.run.status.value}: {stored.run.error!r}"


def keyed_once(evidence: Records) -> Iterator[str]:
    """S24: however often and through whomever a key was used, there is one run of it; and none without a caller."""
    calls: dict[str, set[str]] = defaultdict(set)
    for call in evidence.history:
        if call.what == "start" and call.outcome != "fail":
            calls[call.detail] |= {call.run_id} if call.outcome == "ok" else set()
    made: dict[str, list[str]] = defaultdict(list)
    for run_id, stored in evidence.runs.items():
        if stored.run.parent is None:
            made[stored.run.idempotency_key or ""].append(run_id)
    for key, told in calls.items():
        if len(told) > 1:
            yield f"key {key!r} gave {sorted(told)}"
    for key, run_ids in made.items():
        if key not in calls:
            yield f"nobody asked for {run_ids}"
        elif len(run_ids) > 1:
            yield f"key {key!r} made {run_ids}"


def stamped(evidence: Records) -> Iterator[str]:
    """S31: stamps are the store's time, however wrong an engine's own clock is."""
    for run_id, stored in evidence.runs.items():
        for entry in stored.journal:
            at = entry.at / SECOND
            if not evidence.began_at - 1 <= at <= evidence.ended_at + 1:
                yield f"{run_id}: entry {entry.seq} is stamped {at - evidence.began_at:+.1f} s from the beginning"


def nobody_else_wrote(evidence: Records) -> Iterator[str]:
    """Every run in the ledger is in the store."""
    for run_id in {body.run_id for body in evidence.bodies} - evidence.runs.keys():
        yield f"bodies ran for {run_id}, which does not exist"


RULES = (
    simulated.went_on,
    simulated.settled,
    completed,
    keyed_once,
    nobody_else_wrote,
    simulated.dense,
    simulated.tidy,
    stamped,
    simulated.committed_once,
    simulated.replays,
    simulated.behind_the_barrier,
    simulated.signals_once,
    simulated.families,
    simulated.observed,
)
