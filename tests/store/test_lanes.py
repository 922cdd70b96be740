"""Whose turn it is, as a function: what holds for whatever lanes, limits, weights and histories there are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from durable.core.clock import SECOND
from durable.store.interface import AGEING_US
from durable.store.lanes import (
    SLOTS,
    THROTTLE,
    Choice,
    Free,
    LaneId,
    Ledger,
    Pick,
    Queue,
    Waiting,
    choose,
    lacking,
    opens_at,
    rank,
)
from durable.store.records import Rule

NOW = 1_000 * SECOND
KEYS = ("s1", "s2", "s3")
PACES = ("t1", "t2")


@dataclass
class Deployment:
    """What a store keeps, in plain dicts; `take` is a claim."""

    free: list[Free]
    lanes: dict[LaneId, tuple[tuple[Rule, ...], float]]
    waiting: dict[LaneId, list[Waiting]]
    used: Counter[str] = field(default_factory=Counter)
    begun: dict[str, list[int]] = field(default_factory=dict)
    finish: dict[tuple[LaneId, int], float] = field(default_factory=dict)
    clock: dict[tuple[tuple[str, str], int], float] = field(default_factory=dict)

    def ask(self, limit: int, now: int = NOW) -> Choice:
        queues = [Queue(lane, *self.lanes[lane], runs) for lane, runs in self.waiting.items()]
        return choose(self.free, queues, Ledger(self.used, self.begun, self.finish, self.clock), limit, now)

    def take(self, limit: int, now: int = NOW) -> Choice:
        choice = self.ask(limit, now)
        for pick in choice.picks:
            self.apply(pick, now)
        return choice

    def apply(self, pick: Pick, now: int) -> None:
        if pick.lane is None:
            self.free = [one for one in self.free if one.run_id != pick.run_id]
            return
        self.waiting[pick.lane] = [one for one in self.waiting[pick.lane] if one.run_id != pick.run_id]
        self.used.update(pick.takes)
        for key in pick.begins:
            self.begun.setdefault(key, []).append(now)
        self.finish[pick.lane, pick.priority] = pick.finish
        self.clock[pick.lane[:2], pick.priority] = pick.start


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    ids = (f"r{n:03}" for n in range(1000))
    wake = st.integers(NOW - 5 * AGEING_US, NOW)
    slots = {key: draw(st.integers(0, 4)) for key in KEYS}
    paces = {key: draw(st.integers(0, 3)) for key in PACES}
    lanes: dict[LaneId, tuple[tuple[Rule, ...], float]] = {}
    waiting: dict[LaneId, list[Waiting]] = {}
    for n in range(draw(st.integers(0, 6))):
        lane = ("w", f"f{n % 2}", f"lane{n}")
        rules = [Rule(key, slots[key]) for key in draw(st.lists(st.sampled_from(KEYS), unique=True))]
        rules += [
            Rule(key, paces[key], THROTTLE, 10 * SECOND) for key in draw(st.lists(st.sampled_from(PACES), unique=True))
        ]
        lanes[lane] = (tuple(rules), draw(st.sampled_from((0.5, 1.0, 3.0))))
        runs = []
        for _ in range(draw(st.integers(0, 5))):
            kind, priority = draw(st.integers(0, 2)), draw(st.integers(-1, 2))
            held = draw(st.lists(st.sampled_from(KEYS), min_size=1)) if kind == 0 else []
            one = Waiting(next(ids), priority, rank(draw(wake), priority), lacking(rules, held), kind == 2)
            runs.append((kind, one.rank, one.run_id, one))
        waiting[lane] = [one for *_, one in sorted(runs, key=lambda run: run[:3])]
    free = [Free(next(ids), draw(st.integers(-1, 2)), draw(wake)) for _ in range(draw(st.integers(0, 4)))]
    free.sort(key=lambda one: (-one.priority, one.wake_at, one.run_id))
    begun = {key: sorted(draw(st.lists(st.integers(NOW - 20 * SECOND, NOW), max_size=5))) for key in PACES}
    used = Counter({key: draw(st.integers(0, 4)) for key in KEYS})
    return Deployment(free, lanes, waiting, used, begun)


@settings(max_examples=150, deadline=None)
@given(deployments(), st.integers(0, 20))
def test_S25_no_key_gets_above_its_limit(deployment: Deployment, limit: int) -> None:
    """Whoever was above it (a limit that was lowered) gets no one more."""
    before = Counter(deployment.used)
    picks = deployment.take(limit).picks
    assert len(picks) <= limit
    for rules, _ in deployment.lanes.values():
        for rule in rules:
            if rule.kind == SLOTS:
                assert deployment.used[rule.key] <= max(rule.limit, before[rule.key])


@settings(max_examples=150, deadline=None)
@given(deployments(), st.lists(st.tuples(st.integers(0, 15 * SECOND), st.integers(1, 9)), max_size=8))
def test_S27_no_window_has_more_beginnings_than_its_throttle_lets(
    deployment: Deployment, claims: list[tuple[int, int]]
) -> None:
    """Over any claims at any times: of what began here, never above the limit within a period."""
    old = {key: len(times) for key, times in deployment.begun.items()}
    now = NOW
    for wait, limit in claims:
        now += wait
        deployment.take(limit, now)
    for rules, _ in deployment.lanes.values():
        for rule in rules:
            if rule.kind == THROTTLE:
                times = deployment.begun.get(rule.key, [])
                for n, at in enumerate(times[old.get(rule.key, 0) :], old.get(rule.key, 0)):
                    assert sum(at - rule.period_us < other for other in times[: n + 1]) <= rule.limit


@settings(max_examples=150, deadline=None)
@given(deployments(), st.integers(0, 20))
def test_nobody_overtakes_in_a_lane(deployment: Deployment, limit: int) -> None:
    """What is taken of a lane is its first runs, in their order; free runs likewise; nobody twice."""
    before = {lane: [run.run_id for run in runs] for lane, runs in deployment.waiting.items()}
    free = [one.run_id for one in deployment.free]
    picks = deployment.ask(limit).picks
    for lane, runs in [*before.items(), (None, free)]:
        taken = [pick.run_id for pick in picks if pick.lane == lane]
        assert taken == runs[: len(taken)]


@settings(max_examples=150, deadline=None)
@given(deployments(), st.integers(0, 20))
def test_nothing_that_fits_is_left(deployment: Deployment, limit: int) -> None:
    """Fewer than the limit: no head fits any more, no free run is left, and `more` says whether the limit cut."""
    whole = deployment.ask(100)
    choice = deployment.take(limit)
    assert choice.more is (len(whole.picks) > limit)
    if not choice.more:
        assert deployment.free == []
        assert deployment.ask(100).picks == []


@settings(max_examples=150, deadline=None)
@given(deployments(), st.lists(st.integers(0, 5), max_size=8))
def test_how_claims_are_cut_makes_no_difference(deployment: Deployment, limits: list[int]) -> None:
    """Many small claims take what one large claim takes, in the same order: nothing is decided twice or forgotten."""
    whole = [pick.run_id for pick in deployment.ask(sum(limits)).picks]
    assert [pick.run_id for limit in limits for pick in deployment.take(limit).picks] == whole


@settings(max_examples=150, deadline=None)
@given(deployments())
def test_the_time_told_is_when_the_next_begins(deployment: Deployment) -> None:
    """A microsecond before it nothing more begins; at that time something does, if the limit is above 0 at all."""
    deployment.take(100)
    told = deployment.ask(100).opens_at
    waits = [rule for rules, _ in deployment.lanes.values() for rule in rules if rule.kind == THROTTLE]
    if told is None:
        assert deployment.ask(100, NOW + 100 * SECOND).picks == []
    elif all(rule.limit for rule in waits):
        assert deployment.ask(100, told - 1).picks == []
        assert deployment.ask(100, told).picks != []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.2, 8), min_size=2, max_size=5),
    st.integers(1, 200),
    st.integers(1, 7),
    st.integers(1, 4),
)
def test_X5_service_follows_the_weights(weights: list[float], turns: int, limit: int, slots: int) -> None:
    """Lanes that always have runs: at any moment their shares, by weight, differ by no more than a turn of each."""
    rules = (Rule("whole", slots),)
    lanes = {("w", "f", f"lane{n}"): (rules, weight) for n, weight in enumerate(weights)}
    waiting = {
        lane: [Waiting(f"{lane[2]}-{n:04}", 0, NOW + n, ("whole",), True) for n in range(turns + limit)]
        for lane in lanes
    }
    deployment = Deployment([], lanes, waiting)
    served: Counter[LaneId] = Counter()
    while served.total() < turns:
        for pick in deployment.take(limit).picks:
            assert pick.lane is not None
            served[pick.lane] += 1
            deployment.used["whole"] -= 1
            shares = {lane: served[lane] / weight for lane, (_, weight) in lanes.items()}
            for one, (_, w1) in lanes.items():
                for other, (_, w2) in lanes.items():
                    assert abs(shares[one] - shares[other]) <= 1 / w1 + 1 / w2 + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(5, 30))
def test_S29_the_wait_under_a_steady_higher_load_is_bounded(above: int, lanes: int, every: int) -> None:
    """One slot, and in every step a new run of higher priority in each other lane, which is more than is served: the low
    one lets those go first that came within its priority's worth of waiting, and no other."""
    rules = (Rule("whole", 1),)
    step = every * SECOND
    ids = {("w", "f", f"lane{n}"): (rules, 1.0) for n in range(lanes + 1)}
    low = ("w", "f", "lane0")
    deployment = Deployment([], ids, {low: [Waiting("low", 0, rank(NOW, 0), ("whole",), True)]})
    worth = above * AGEING_US // step
    for n in range(lanes * (worth + 2) + 1):
        now = NOW + n * step
        for lane in ids:
            if lane != low:
                fresh = Waiting(f"{lane[2]}-{n:05}", above, rank(now, above), ("whole",), True)
                deployment.waiting.setdefault(lane, []).append(fresh)
        [pick] = deployment.take(1, now).picks
        if pick.run_id == "low":
            assert n >= worth, "and it jumped no queue"
            return
        deployment.used["whole"] -= 1
    raise AssertionError("it starved")


def test_a_throttle_opens_when_its_oldest_leaves_the_window() -> None:
    """By the limit-th last beginning; more history than that says nothing; a limit of 0 opens never."""
    rule = Rule("t", 2, THROTTLE, 10)
    for begun, opens in (([], None), ([95], None), ([90, 95], None), ([91, 95], 101), ([50, 94, 95], 104)):
        assert opens_at(rule, begun, 100) == opens
    never = opens_at(Rule("t", 0, THROTTLE, 10), [], 100)
    assert never is not None
    assert never > 1_000_000_000
