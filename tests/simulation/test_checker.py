"""The checker notices: each of its checks has a violation planted, and is the one that tells of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from durable.core.journal import Entry
from durable.protocol.states import Activity, Status
from durable.testing.simulation.checker import CHECKS, check
from durable.testing.simulation.faults import Swarm
from durable.testing.simulation.server import Wrote
from durable.testing.simulation.world import Call, Evidence, Stored, World

SEEDS = range(40)
Plant = Callable[[Evidence], bool]
"""Spoils the evidence; False if this evidence has nothing to spoil that way."""

PLANTS: dict[str, list[Plant]] = {}


def plant(check_name: str) -> Callable[[Plant], Plant]:
    def register(function: Plant) -> Plant:
        PLANTS.setdefault(check_name, []).append(function)
        return function

    return register


def entries(evidence: Evidence, kind: str, status: str) -> Iterator[tuple[Stored, int, Entry]]:
    for stored in evidence.runs.values():
        if any(entry.status == "requeued" for entry in stored.journal):
            continue
        for index, entry in enumerate(stored.journal):
            if (entry.kind, entry.status) == (kind, status):
                yield stored, index, entry


def change(entry: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(entry, **fields)


@plant("went_on")
def an_unexpected_error(evidence: Evidence) -> bool:
    evidence.complaints.append("e0.1: something broke")
    return True


@plant("went_on")
def a_deadlock(evidence: Evidence) -> bool:
    evidence.stuck = "Deadlock: nothing is scheduled"
    return True


@plant("pruned_rightly")
def an_active_run_deleted(evidence: Evidence) -> bool:
    evidence.log.append(Wrote(99.0, "e0.1", "prune", next(iter(evidence.runs)), status="active"))
    return True


@plant("pruned_rightly")
def a_child_deleted_under_its_parent(evidence: Evidence) -> bool:
    line = Wrote(99.0, "e0.1", "prune", next(iter(evidence.runs)), status="completed", family=("run-above",))
    evidence.log.append(line)
    return True


@plant("pruned_rightly")
def a_deleted_run_that_is_claimed(evidence: Evidence) -> bool:
    run_id = next(iter(evidence.runs))
    evidence.log += [
        Wrote(99.0, "e0.1", "prune", run_id, status="completed"),
        Wrote(99.5, "e0.1", "claim", run_id, epoch=99),
    ]
    return True


@plant("settled")
def a_run_that_waits_for_ever(evidence: Evidence) -> bool:
    stored = next(iter(evidence.runs.values()))
    stored.run.status, stored.run.activity = Status.ACTIVE, Activity.WAITING
    return True


@plant("settled")
def an_acknowledged_run_that_is_lost(evidence: Evidence) -> bool:
    evidence.history.append(Call(0, "start", 0.0, 1.0, "ok", "run-nowhere"))
    return True


@plant("started_once")
def two_runs_of_one_key(evidence: Evidence) -> bool:
    number = next((n for n, p in evidence.plans.items() if p.key is not None), None)
    if number is None:
        return False
    twin = copy.deepcopy(next(iter(evidence.runs.values())))
    for name in ("one", "two"):
        other = copy.deepcopy(twin)
        other.run.tags = (f"plan-{number}",)
        evidence.runs[f"run-{name}"] = other
    return True


@plant("fenced")
def a_commit_of_an_old_owner(evidence: Evidence) -> bool:
    claim = next((line for line in evidence.log if line.what == "claim" and line.epoch > 1), None)
    if claim is None:
        return False
    stale = change(claim, what="commit", epoch=claim.epoch - 1, status="done", commit_id="stale")
    evidence.log.insert(evidence.log.index(claim) + 1, stale)
    return True


@plant("fenced")
def an_epoch_given_out_twice(evidence: Evidence) -> bool:
    claim = next((line for line in evidence.log if line.what == "claim"), None)
    if claim is None:
        return False
    evidence.log.insert(evidence.log.index(claim) + 1, claim)
    return True


@plant("absorbing")
def a_commit_after_the_end(evidence: Evidence) -> bool:
    end = next(line for line in evidence.log if line.what == "commit" and line.ends and line.status == "done")
    evidence.log.insert(evidence.log.index(end) + 1, change(end, commit_id="later", ends=False))
    return True


@plant("ambiguous")
def a_commit_denied_after_it_happened(evidence: Evidence) -> bool:
    done = next(line for line in evidence.log if line.what == "commit" and line.status == "done")
    evidence.log.append(change(done, last=True, status="fenced"))
    return True


@plant("dense")
def a_gap_in_a_journal(evidence: Evidence) -> bool:
    stored = next(stored for stored in evidence.runs.values() if len(stored.journal) > 2)
    del stored.journal[1]
    return True


@plant("dense")
def a_stamp_that_goes_back(evidence: Evidence) -> bool:
    stored = next(stored for stored in evidence.runs.values() if len(stored.journal) > 2)
    stored.journal[1] = change(stored.journal[1], at=stored.journal[0].at - 1)
    return True


@plant("in_time")
def a_stamp_of_a_wrong_clock(evidence: Evidence) -> bool:
    for stored in evidence.runs.values():
        stored.journal[-1] = change(stored.journal[-1], at=stored.journal[-1].at + 600_000_000)
    return True


@plant("watched")
def an_entry_a_watcher_missed(evidence: Evidence) -> bool:
    for seen in evidence.streams.values():
        if len(seen) > 2:
            del seen[1]
            return True
    return False


@plant("tidy")
def a_row_left_behind(evidence: Evidence) -> bool:
    evidence.leftovers.append("waiter of run-1")
    return True


@plant("tidy")
def an_owner_of_a_finished_run(evidence: Evidence) -> bool:
    next(iter(evidence.runs.values())).run.owner = "somebody"
    return True


@plant("committed_once")
def a_result_committed_twice(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "step", "completed"):
        stored.journal.insert(index + 1, entry)
        return True
    return False


@plant("committed_once")
def a_result_nobody_returned(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "step", "completed"):
        if not (entry.name or "").startswith("side_effect"):
            stored.journal[index] = change(entry, payload=b'"invented"')
            return True
    return False


@plant("committed_once")
def a_run_that_ends_twice(evidence: Evidence) -> bool:
    stored, _, entry = next(entries(evidence, "run", "completed"))
    stored.journal.append(change(entry, status="failed"))
    return True


@plant("retried_by_policy")
def an_attempt_too_many(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "step", "completed"):
        stored.journal[index] = change(entry, attempt=4)
        return True
    return False


@plant("retried_by_policy")
def an_attempt_left_out(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "step", "retrying"):
        if entry.attempt == 1:
            stored.journal[index] = change(entry, attempt=2)
            return True
    return False


@plant("retried_by_policy")
def a_retry_before_its_time(evidence: Evidence) -> bool:
    for stored, _, entry in entries(evidence, "step", "retrying"):
        for body in evidence.bodies:
            if body.step_id == f"{stored.run.id}:{entry.ordinal}" and body.attempt == entry.attempt + 1:
                body.began = 0.0
                return True
    return False


@plant("replays")
def an_output_of_another_journal(evidence: Evidence) -> bool:
    stored, _, _ = next(entries(evidence, "run", "completed"))
    stored.run.output = b'["other"]'
    return True


@plant("replays")
def an_order_that_never_was(evidence: Evidence) -> bool:
    stored, index, _ = next(entries(evidence, "step", "completed"))
    stored.journal.insert(0, stored.journal.pop(index))  # answered before the run had begun to ask
    return True


@plant("replays")
def a_blocked_run(evidence: Evidence) -> bool:
    stored, index, entry = next(entries(evidence, "run", "completed"))
    stored.journal.insert(index, change(entry, status="blocked"))
    return True


@plant("behind_the_barrier")
def a_body_before_its_cause_was_committed(evidence: Evidence) -> bool:
    for stored, _, entry in entries(evidence, "step", "completed"):
        for body in evidence.bodies:
            if body.step_id == f"{stored.run.id}:{entry.ordinal}":
                body.frontier = 0
                return True
    return False


@plant("behind_the_barrier")
def a_timer_that_fires_early(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "timer", "fired"):
        stored.journal[index] = change(entry, at=stored.journal[0].at)
        return True
    return False


def turns(evidence: Evidence) -> Iterator[tuple[Stored, int, Entry]]:
    for stored, index, entry in entries(evidence, "remote", "completed"):
        if entry.name == "turn":
            yield stored, index, entry


@plant("decided_once")
def a_decision_of_another_turn(evidence: Evidence) -> bool:
    for stored, index, entry in turns(evidence):
        stored.journal[index] = change(entry, attempt=entry.attempt + 1)
        return True
    return False


@plant("decided_once")
def a_decision_committed_apart_from_its_steps(evidence: Evidence) -> bool:
    for stored, index, entry in turns(evidence):
        if stored.journal[index + 1].kind in ("step", "log") and b"recordStep" in (entry.payload or b""):
            evidence.log.append(Wrote(1.0, "e0.1", "commit", stored.run.id, seq=entry.seq, status="done"))
            return True
    return False


@plant("slept_enough")
def a_hosted_timer_that_rang_early(evidence: Evidence) -> bool:
    for stored, _, entry in turns(evidence):
        for command in msgspec.json.decode(entry.payload or b"{}")["commands"]:
            if command["kind"] == "sleep" and (stored.run.id, command["seq"]) in evidence.sleeps:
                evidence.sleeps[stored.run.id, command["seq"]] = 1_000.0
                return True
    return False


@plant("hosted_agrees")
def an_end_its_code_does_not_come_to(evidence: Evidence) -> bool:
    for stored, _, _ in turns(evidence):
        if stored.run.status is Status.COMPLETED:
            stored.run.output = b'["something else"]'
            return True
    return False


def lines_of(evidence: Evidence) -> Iterator[tuple[Stored, int, Entry]]:
    for stored, index, entry in entries(evidence, "log", "written"):
        ends = ("remote", "completed", entry.key, entry.attempt)
        if entry.attempt and any((e.kind, e.status, e.key, e.attempt) == ends for e in stored.journal[index:]):
            yield stored, index, entry


@plant("lines_once")
def a_line_told_twice(evidence: Evidence) -> bool:
    for stored, index, entry in lines_of(evidence):
        stored.journal.insert(index + 1, entry)
        return True
    return False


@plant("lines_once")
def a_line_that_is_lost(evidence: Evidence) -> bool:
    for stored, index, _ in lines_of(evidence):
        del stored.journal[index]
        return True
    return False


@plant("lines_once")
def a_line_nobody_said(evidence: Evidence) -> bool:
    for stored, index, entry in lines_of(evidence):
        stored.journal[index] = change(entry, payload=b'{"message":"hear, hear"}')
        return True
    return False


@plant("lines_once")
def a_line_behind_the_end_of_its_attempt(evidence: Evidence) -> bool:
    for stored, _, entry in lines_of(evidence):
        stored.journal.append(change(entry, ordinal=(entry.ordinal or 0) + 100))
        return True
    return False


@plant("signals_once")
def a_signal_taken_twice(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "signal", "received"):
        stored.journal.insert(index + 1, entry)
        return True
    return False


@plant("signals_once")
def a_signal_nobody_sent(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "signal", "received"):
        stored.journal[index] = change(entry, key="signal:invented")
        return True
    return False


@plant("signals_once")
def a_signal_acknowledged_and_lost(evidence: Evidence) -> bool:
    call = next((c for c in evidence.history if c.what == "signal" and c.outcome == "ok"), None)
    if call is None:
        return False
    evidence.runs[call.run_id].inbox.clear()
    return True


@plant("cancels_count")
def a_cancel_acknowledged_and_lost(evidence: Evidence) -> bool:
    call = next((c for c in evidence.history if c.what == "cancel" and c.outcome == "ok"), None)
    if call is None:
        return False
    evidence.runs[call.run_id].inbox.clear()
    return True


@plant("cancels_count")
def a_cancel_read_and_forgotten(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "run", "cancelling"):
        stored.journal[index] = change(entry, status="unblocked")
        return True
    return False


@plant("events_once")
def an_event_taken_twice(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "event", "received"):
        stored.journal.insert(index + 1, entry)
        return True
    return False


@plant("events_once")
def an_event_nobody_published(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "event", "received"):
        stored.journal[index] = change(entry, key="event:invented")
        return True
    return False


@plant("events_once")
def an_event_of_another_name(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "event", "received"):
        stored.journal[index] = change(entry, name="sim.other")
        return True
    return False


@plant("events_once")
def an_event_from_before_the_run(evidence: Evidence) -> bool:
    for stored, _, entry in entries(evidence, "event", "received"):
        event_id = str(entry.key).removeprefix("event:")
        early = stored.run.created_at - 5_000_000
        evidence.events[event_id] = change(evidence.events[event_id], received_at=early)
        return True
    return False


@plant("events_once")
def an_event_nobody_waited_for(evidence: Evidence) -> bool:
    for stored, _, _ in entries(evidence, "event", "received"):
        stored.journal[:] = [entry for entry in stored.journal if entry.kind != "wait"]
        return True
    return False


@plant("events_once")
def a_runs_own_event_that_is_lost(evidence: Evidence) -> bool:
    for _, _, entry in entries(evidence, "emit", "completed"):
        del evidence.events[msgspec.json.decode(entry.payload or b"null")]
        return True
    return False


@plant("events_once")
def an_acknowledged_event_that_is_lost(evidence: Evidence) -> bool:
    call = next((c for c in evidence.history if c.what == "publish" and c.outcome == "ok"), None)
    if call is None or len(evidence.events) < 2:
        return False
    evidence.events = {id: event for id, event in evidence.events.items() if event.dedupe_id != call.detail}
    return True


@plant("events_once")
def an_event_whose_waiters_were_never_told(evidence: Evidence) -> bool:
    for event_id, event in evidence.events.items():
        evidence.events[event_id] = change(event, settled=False)
        return True
    return False


@plant("families")
def a_child_that_was_never_started(evidence: Evidence) -> bool:
    run_id = next((run_id for run_id, stored in evidence.runs.items() if stored.run.parent is not None), None)
    if run_id is None:
        return False
    del evidence.runs[run_id]
    return True


@plant("families")
def a_parent_that_was_not_told(evidence: Evidence) -> bool:
    for stored in evidence.runs.values():
        if stored.run.parent is not None:
            parent = evidence.runs[stored.run.parent.run_id]
            before = len(parent.inbox)
            parent.inbox[:] = [row for row in parent.inbox if not row.message.id.endswith(":outcome")]
            if len(parent.inbox) < before:
                return True
    return False


@plant("families")
def a_child_nobody_asked_for(evidence: Evidence) -> bool:
    for stored, index, entry in entries(evidence, "child", "started"):
        stored.journal[index] = change(entry, payload=b'{"run_id":"' + stored.run.id.encode() + b'"}')
        return True
    return False


@plant("observed")
def an_end_told_otherwise(evidence: Evidence) -> bool:
    call = next((c for c in evidence.history if c.what == "wait" and c.outcome == "ok"), None)
    if call is None or any(line.what == "requeue" and line.run_id == call.run_id for line in evidence.log):
        return False
    call.detail = '["completed","something else"]'
    return True


@plant("dead_by_count")
def a_death_without_a_cause(evidence: Evidence) -> bool:
    next(iter(evidence.runs.values())).run.status = Status.DEAD
    return True


@pytest.fixture(scope="module")
def found() -> list[Evidence]:
    """Evidence of a few seeds in which nothing is wrong."""
    return []


def evidence_of(seed: int, cache: list[Evidence]) -> Evidence:
    while len(cache) <= seed:
        evidence = World(Swarm.draw(len(cache))).run().evidence
        assert check(evidence) == []
        cache.append(evidence)
    return copy.deepcopy(cache[seed])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [(name, spoil) for name, spoils in PLANTS.items() for spoil in spoils],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_planted_violation_is_found(name: str, spoil: Plant, found: list[Evidence]) -> None:
    """The named check tells of what was planted."""
    for seed in SEEDS:
        evidence = evidence_of(seed, found)
        if spoil(evidence):
            named = {what.split(":")[0] for what in check(evidence)}
            assert name in named, f"seed {seed}: only {named or 'nobody'} noticed"
            return
    pytest.fail("no seed has anything to spoil that way")


def test_every_check_has_a_plant() -> None:
    """No check goes unproven."""
    assert {one.__name__ for one in CHECKS} == set(PLANTS)
