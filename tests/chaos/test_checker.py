"""The verdict is to be trusted: each of its rules has a violation planted, and is the one that tells of it."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from durable.core.clock import SECOND
from durable.core.journal import Entry
from durable.protocol.states import Activity, Status
from durable.testing.simulation.world import Call, Stored
from tests.chaos.checker import RULES, Records, check
from tests.chaos.node import collect, family
from tests.chaos.site import Site, over

Plant = Callable[[Records], Any]
PLANTS: list[tuple[str, Plant]] = []


def plant(rule: str) -> Callable[[Plant], Plant]:
    def register(function: Plant) -> Plant:
        PLANTS.append((rule, function))
        return function

    return register


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """What a healthy site leaves behind, made once."""

    async def healthy() -> Records:
        directory = tmp_path_factory.mktemp("healthy")
        site = await Site(f"sqlite:///{directory / 'durable.db'}", directory).open()
        try:
            await site.node()
            handles = [*await site.load(2, 0.01), *await site.load(2, 0.01, family), *await site.load(2, 2, collect)]
            for handle in handles[-2:]:
                assert await asyncio.gather(site.signal(handle.id, "a"), site.signal(handle.id, "b")) == [True, True]
            await site.until(handles, over, "all are done")
            return await site.evidence()
        finally:
            await site.close()

    return asyncio.run(healthy())


def some(records: Records, workflow: str = "load") -> Stored:
    return next(s for s in records.runs.values() if s.run.workflow == workflow and s.run.parent is None)


def at(stored: Stored, kind: str, status: str) -> int:
    return next(n for n, entry in enumerate(stored.journal) if (entry.kind, entry.status) == (kind, status))


def change(stored: Stored, index: int, **fields: Any) -> None:
    stored.journal[index] = msgspec.structs.replace(stored.journal[index], **fields)


def insert(stored: Stored, index: int, entry: Entry) -> None:
    """Put an entry in and number all anew, so that only the planted rule has something to say."""
    stored.journal.insert(index, entry)
    for n in range(len(stored.journal)):
        change(stored, n, seq=n + 1)
    stored.run.seq = len(stored.journal)


@plant("went_on")
def an_exception(records: Records) -> None:
    records.complaints.append("KeyError: 'x'")


@plant("settled")
def a_run_that_waits_for_ever(records: Records) -> None:
    some(records).run.status, some(records).run.activity = Status.ACTIVE, Activity.WAITING


@plant("settled")
def an_acknowledged_run_that_is_lost(records: Records) -> None:
    records.history.append(Call(0, "start", 0, outcome="ok", run_id="run-nowhere", detail="some key"))


@plant("completed")
def a_run_that_died_of_others(records: Records) -> None:
    some(records).run.status = Status.DEAD


@plant("keyed_once")
def two_runs_of_one_key(records: Records) -> None:
    twin = copy.deepcopy(some(records))
    twin.run.id = "twin"
    records.runs["twin"] = twin


@plant("keyed_once")
def two_answers_for_one_key(records: Records) -> None:
    one = next(call for call in records.history if call.what == "start")
    records.history.append(msgspec.structs.replace(one, run_id=records.history[1].run_id))


@plant("keyed_once")
def a_run_nobody_asked_for(records: Records) -> None:
    some(records).run.idempotency_key = "never used"


@plant("nobody_else_wrote")
def a_body_of_no_run(records: Records) -> None:
    records.bodies.append(msgspec.structs.replace(records.bodies[0], run_id="elsewhere"))


@plant("dense")
def a_gap(records: Records) -> None:
    del some(records).journal[3]


@plant("tidy")
def an_owner_after_the_end(records: Records) -> None:
    some(records).run.owner = "somebody"


@plant("tidy")
def a_waiter_that_stayed(records: Records) -> None:
    records.leftovers.append("event_waiters of some run")


@plant("stamped")
def a_stamp_ten_minutes_off(records: Records) -> None:
    stored = some(records)
    change(stored, -1, at=stored.journal[-1].at + 600 * SECOND)


@plant("committed_once")
def a_step_with_two_results(records: Records) -> None:
    stored = some(records)
    index = at(stored, "step", "completed")
    insert(stored, index + 1, stored.journal[index])


@plant("committed_once")
def a_result_nobody_returned(records: Records) -> None:
    change(some(records), at(some(records), "step", "completed"), payload=b"7")


@plant("committed_once")
def a_second_end(records: Records) -> None:
    insert(some(records), len(some(records).journal), some(records).journal[-1])


@plant("replays")
def an_outcome_made_of_something_else(records: Records) -> None:
    some(records).run.output = b"[1,2,3,4,5,6]"


@plant("behind_the_barrier")
def a_timer_that_fired_early(records: Records) -> None:
    stored = some(records)
    change(stored, at(stored, "timer", "fired"), at=stored.journal[0].at)


@plant("signals_once")
def a_signal_used_twice(records: Records) -> None:
    stored = some(records, "collect")
    index = next(n for n, entry in enumerate(stored.journal) if entry.kind == "signal")
    insert(stored, index + 1, stored.journal[index])


@plant("signals_once")
def an_acknowledged_signal_that_is_gone(records: Records) -> None:
    run_id = some(records, "collect").run.id
    records.history.append(Call(0, "signal", 0, outcome="ok", run_id=run_id, detail="unheard"))


@plant("families")
def a_child_nobody_started(records: Records) -> None:
    stored = some(records, "family")
    child = next(s for s in records.runs.values() if s.run.parent is not None and s.run.parent.run_id == stored.run.id)
    child.run.parent = msgspec.structs.replace(child.run.parent, run_id=some(records).run.id)


@plant("families")
def a_parent_that_was_not_told(records: Records) -> None:
    some(records, "family").inbox.clear()


@plant("observed")
def a_caller_who_was_told_something_else(records: Records) -> None:
    call = next(call for call in records.history if call.what == "wait")
    call.detail = json.dumps(["failed", None])


def test_a_healthy_site_has_no_violation(evidence: Records) -> None:
    """What nothing was done to passes every rule, and there was something to judge."""
    assert check(evidence) == []
    assert len(evidence.runs) == 10
    assert {stored.run.workflow for stored in evidence.runs.values()} == {"load", "family", "collect"}
    assert len([body for body in evidence.bodies if body.outcome]) == 6 * 6 + 2


@pytest.mark.parametrize(("rule", "spoil"), PLANTS, ids=[function.__name__ for _, function in PLANTS])
def test_each_violation_is_noticed(evidence: Records, rule: str, spoil: Plant) -> None:
    """The rule that is broken tells of it."""
    spoiled = copy.deepcopy(evidence)
    spoil(spoiled)
    assert rule in {found.partition(":")[0] for found in check(spoiled)}


def test_every_rule_has_a_violation() -> None:
    """No rule is taken on trust."""
    assert {rule.__name__ for rule in RULES} == {rule for rule, _ in PLANTS}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = await Site(f"sqlite:///{tmp_path / 'durable.db'}", tmp_path).open()
    yield site
    await site.close()


async def test_complaints_are_what_nobody_expected(site: Site) -> None:
    """A trace in the nodes' log is a complaint by its last line; a store that was away is none."""
    trace = 'ERROR:durable:12:went wrong\nTraceback (most recent call last):\n  File "x", line 1\n    y()\n'
    site.log.write_text(trace + "durable.core.errors.StoreUnavailable: away\n" + trace + "KeyError: 'x'\nWARNING:z\n")
    assert site.complaints() == ["KeyError: 'x'"]
