"""What becomes of events, for whatever comes in whatever order: every one is in exactly one run, or declared dropped."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from durable.core.clock import SECOND
from durable.protocol.states import Status
from durable.store.admission import Admission, Batch, Debounce, NewEvent, Rate, Singleton, Trigger, Verdict
from durable.store.memory import MemoryStore
from durable.store.records import ClaimRequest, Commit, NewRun, Route, RunQuery
from durable.testing.clock import ManualClock
from durable.testing.simulation.server import at_once

_ALL = RunQuery(limit=1000)
MAX_PAYLOAD = 60
"""Small, so that batches come to it."""


class Publish(Struct, frozen=True):
    key: str
    twice: bool
    size: int


class Wait(Struct, frozen=True):
    us: int


class Work(Struct, frozen=True):
    """Claim, and end some of what runs."""

    claims: int
    ends: int


class Policy(Struct, frozen=True):
    kind: str
    limit: int
    period_us: int
    max_wait_us: int | None
    singleton: str | None

    def of(self, key: str, member: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.kind == "rate":
            found["rate"] = Rate(key, self.limit, self.period_us)
        elif self.kind == "debounce":
            found["debounce"] = Debounce(key, self.period_us, self.max_wait_us)
        elif self.kind == "batch":
            found["batch"] = Batch(key, self.limit, self.period_us, member)
        if self.singleton is not None:
            found["singleton"] = Singleton(key, self.singleton)
        return found


class Told(Struct, frozen=True):
    """An event that was accepted."""

    n: int
    key: str
    at: int
    admission: Admission
    unfinished: frozenset[str]
    """Runs that had not ended just before."""


class World:
    """A store, and what was said to it."""

    def __init__(self, policy: Policy) -> None:
        self.clock = ManualClock()
        self.store = MemoryStore(self.clock, max_payload=MAX_PAYLOAD)
        self.policy = policy
        self.told: list[Told] = []
        self.began: dict[str, tuple[int, bytes]] = {}
        """When a run was claimed, and its input then."""
        self.ended: set[str] = set()

    def publish(self, key: str, twice: bool, size: int) -> None:
        n = len(self.told)
        member = json.dumps([n, "x" * size], separators=(",", ":")).encode()
        data = b'{"data":[' + member + b"]}"
        run = NewRun(f"r{n}", "f", "1", data)
        event = NewEvent(
            f"e{n}", "n", member, dedupe_id=f"d{n}", triggers=(Trigger(run, **self.policy.of(key, member)),)
        )
        unfinished = frozenset({one.run_id for one in self._runs()} - self.ended)
        [outcome] = at_once(self.store.publish([event]))
        if twice:  # a lost reply, asked again
            [again] = at_once(self.store.publish([event]))
            assert again.duplicate
            assert again.event == outcome.event
        [admission] = outcome.event.admissions
        self.told.append(Told(n, key, self.clock.now(), admission, unfinished))

    def work(self, claims: int, ends: int) -> None:
        self.store.beat("a", 10 * SECOND)
        claim = at_once(self.store.claim(ClaimRequest("a", (Route("f", "1"),), claims)))
        for one in claim.runs:
            assert one.run.id not in self.began
            self.began[one.run.id] = (self.clock.now(), one.run.input)
        for run_id in [run_id for run_id in self.began if run_id not in self.ended][:ends]:
            [run] = at_once(self.store.get([run_id]))
            assert run is not None
            change = Commit(run_id, run.epoch, run.seq, f"end-{run_id}", [], status=Status.COMPLETED)
            at_once(self.store.commit([change]))
            self.ended.add(run_id)

    def _runs(self) -> list[Any]:
        return [_Made(one.admission.run_id) for one in self.told if one.admission.new and one.admission.run_id]

    def members(self) -> dict[str, list[Told]]:
        found: dict[str, list[Told]] = defaultdict(list)
        for one in self.told:
            if one.admission.verdict in (Verdict.STARTED, Verdict.DEBOUNCED, Verdict.BATCHED):
                assert one.admission.run_id is not None
                found[one.admission.run_id].append(one)
        return found

    def inputs(self) -> dict[str, list[int]]:
        """Run → numbers of the events in its input."""
        found = {}
        for run_id in self.members():
            [run] = at_once(self.store.get([run_id]))
            assert run is not None
            assert self.began.get(run_id, (0, run.input))[1] == run.input, "what has begun changes no more"
            found[run_id] = [n for n, _ in json.loads(run.input)["data"]]
        return found


class _Made(Struct, frozen=True):
    run_id: str


moves = st.lists(
    st.one_of(
        st.builds(Publish, st.sampled_from("kl"), st.booleans(), st.integers(0, 30)),
        st.builds(Publish, st.just("k"), st.just(False), st.just(0)),
        st.builds(Wait, st.integers(0, 4 * SECOND)),
        st.builds(Work, st.integers(0, 3), st.integers(0, 2)),
    ),
    max_size=40,
)
policies = st.builds(
    Policy,
    st.sampled_from(("none", "rate", "debounce", "batch")),
    st.integers(1, 4),
    st.integers(1, 6 * SECOND),
    st.none() | st.integers(1, 10 * SECOND),
    st.none() | st.sampled_from(("skip", "cancel")),
)


@settings(max_examples=300, deadline=None)
@given(policies, moves)
def test_S28_every_event_is_in_exactly_one_run_or_declared_dropped(policy: Policy, script: list[Any]) -> None:
    """B38: no event is lost, none is in two runs, no run has one that was not answered so, and each verdict is true."""
    world = World(policy)
    for move in script:
        match move:
            case Publish(key, twice, size):
                world.publish(key, twice, size)
            case Wait(us):
                world.clock.advance(us / SECOND)
            case Work(claims, ends):
                world.work(claims, ends)
    members, inputs = world.members(), world.inputs()
    runs = [run.id for run in at_once(world.store.find(_ALL)).runs]
    assert sorted(runs) == sorted(members), "each run is of some event"
    for run_id, told in members.items():
        assert [one.admission.new for one in told] == [True] + [False] * (len(told) - 1)
        if policy.kind == "batch":
            assert inputs[run_id] == [one.n for one in told], "a batch has all of its events, in order"
        else:
            assert inputs[run_id] == [told[-1].n], "a run has its last event"
    _check_drops(world)
    _check_singletons(world)
    if policy.kind == "debounce":
        _check_debounce(world, members)
    elif policy.kind == "batch":
        _check_batch(world, members)


def _check_drops(world: World) -> None:
    """A rate lets in `limit` of any period, and drops only what is above."""
    rule, admitted = world.policy, defaultdict[str, list[int]](list)
    for one in world.told:
        inside = sum(at > one.at - rule.period_us for at in admitted[one.key])
        if one.admission.verdict is Verdict.DROPPED:
            assert rule.kind == "rate"
            assert inside == rule.limit
        elif one.admission.verdict is Verdict.STARTED and rule.kind == "rate":
            assert inside < rule.limit
            admitted[one.key].append(one.at)


def _check_singletons(world: World) -> None:
    """Who is skipped or cancelled for: a run of the same key that had not ended."""
    of_key = {one.admission.run_id: one.key for one in world.told if one.admission.new}
    stopped: Counter[str] = Counter()
    for one in world.told:
        if one.admission.verdict is Verdict.SKIPPED:
            assert world.policy.singleton == "skip"
            assert one.admission.run_id in one.unfinished
            assert of_key[one.admission.run_id] == one.key
        if one.admission.cancelled is not None:
            assert world.policy.singleton == "cancel"
            assert one.admission.cancelled in one.unfinished
            assert of_key[one.admission.cancelled] == one.key
            stopped[one.admission.cancelled] += 1
        if world.policy.singleton == "skip" and one.admission.new:
            assert not [run_id for run_id in one.unfinished if of_key[run_id] == one.key]
    assert all(count == 1 for count in stopped.values())


def _check_debounce(world: World, members: dict[str, list[Told]]) -> None:
    """A run begins a period after its last event, or when it has waited as long as it may; never sooner."""
    rule = world.policy
    for run_id, told in members.items():
        due = told[-1].at + rule.period_us
        if rule.max_wait_us is not None:
            due = min(due, told[0].at + rule.max_wait_us)
        [run] = at_once(world.store.get([run_id]))
        assert run is not None
        stopped = any(one.admission.cancelled == run_id for one in world.told)
        assert all(one.at < due for one in told)
        if not stopped:
            assert run.started_at is None or run.started_at >= due
            assert run.wake_at in (due, None)


def _check_batch(world: World, members: dict[str, list[Told]]) -> None:
    """No more than its size, nobody after its window, and it is due when it is full or the window is over."""
    rule = world.policy
    for run_id, told in members.items():
        [run] = at_once(world.store.get([run_id]))
        assert run is not None
        assert len(told) <= rule.limit
        assert len(run.input) <= MAX_PAYLOAD
        assert all(one.at < told[0].at + rule.period_us for one in told)
        if run.wake_at is not None:
            assert run.wake_at <= told[0].at + rule.period_us
        if len(told) == rule.limit and run.started_at is None and run.status is Status.ACTIVE:
            assert run.wake_at == told[-1].at
