"""Lanes: what limits runs, and whose turn it is. The rules stand in durable/store/lanes.py."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from durable.core.clock import SECOND
from durable.core.errors import StoreError
from durable.protocol.states import Activity, Status
from durable.store.admission import LimitState
from durable.store.interface import AGEING_US, Store
from durable.store.records import (
    Claim,
    ClaimedRun,
    ClaimRequest,
    FreeSlots,
    Lane,
    NewRun,
    Route,
    Rule,
    RunRecord,
    StartRun,
)
from durable.testing.facts import eventually
from durable.testing.suites.store.builder import (
    FAR,
    LEASE,
    ROUTE,
    StoreBuilder,
    Tests,
    begin,
    claim,
    claimed_ids,
    commit,
    done,
    entry,
    later,
    new,
    read,
    settled,
    suspend,
)

MINUTE = 60 * SECOND


class LaneTests(Tests):
    async def test_a_lane_is_part_of_its_run(self, store: Store) -> None:
        """The key comes back, before and after a claim; without one it is None."""
        await begin(store, limited("r1", 1), new("r2"))
        assert [run and run.lane for run in await store.get(["r1", "r2"])] == ["lane", None]
        assert {claimed.run.lane for claimed in await claim(store)} == {"lane", None}

    async def test_a_run_with_a_lane_is_never_born_claimed(self, store: Store) -> None:
        """Only a claim takes slots: an owner is refused, by start and as a commit's effect."""
        with pytest.raises(StoreError):
            await store.start([new("ok"), limited("r", 1, owner="a")])
        assert await store.get(["ok", "r"]) == [None, None]
        await begin(store, new("p", owner="a"))
        [outcome] = await store.commit([commit("p", effects=(StartRun(limited("r", 1, owner="a")),))])
        assert isinstance(outcome.failure, StoreError)

    async def test_S25_no_more_than_its_limit_are_taken(self, store: Store, builder: StoreBuilder) -> None:
        """Three of five, and no fourth before a slot is free; the rest wait their turn, by when they fell due."""
        now = builder.now()
        await begin(store, *(limited(f"r{n}", 3, wake_at=now - n) for n in range(5)))
        answer = await store.claim(ClaimRequest("a", (ROUTE,), 10))
        assert [claimed.run.id for claimed in answer.runs] == ["r4", "r3", "r2"]
        assert answer.next_due_at is None, "who waits for a slot is not due at any time"
        assert sorted(await holders(builder, 5)) == ["r2", "r3", "r4"]
        assert await claimed_ids(store, "b") == []
        await end(store, answer.runs[1])
        assert await claimed_ids(store, "b") == ["r1"]
        waiting = await read(store, "r0")
        assert (waiting.activity, waiting.owner, waiting.epoch) == (Activity.QUEUED, None, 0)

    async def test_B32_never_above_the_limit_however_many_claim(self, store: Store, other: Store) -> None:
        """S25: eight engines claim a limited queue at once over two connections, end some and release some: never one
        too many, and never one too few while there are any."""
        for n in range(8):
            store.beat(f"e{n}", LEASE)
        await begin(store, *(limited(f"r{n:02}", 3) for n in range(30)))
        running: dict[str, ClaimedRun] = {}
        left = 30
        for step in range(60):
            asked = [(store, other)[n % 2].claim(ClaimRequest(f"e{n}", (ROUTE,), 2)) for n in range(8)]
            for answer in await asyncio.gather(*asked):
                for claimed in answer.runs:
                    assert claimed.run.id not in running
                    running[claimed.run.id] = claimed
            assert len(running) == min(3, left)
            if not left:
                break
            claimed = running.pop(min(running))
            if step % 3 == 2:
                await store.release([(claimed.run.id, claimed.run.epoch)])
            else:
                await end(other, claimed)
                left -= 1
        assert left == 0

    async def test_S25_lanes_share_a_rule_by_its_key(self, store: Store, builder: StoreBuilder) -> None:
        """One rule for all of a workflow and one for each customer: both hold, and a full customer holds up no other."""
        whole = Rule("whole", 3)
        for customer in "abc":
            rules = (whole, Rule(f"customer {customer}", 2))
            await begin(store, *(new(f"{customer}{n}", lane=Lane(customer, rules)) for n in range(3)))
        first = await claim(store)
        assert Counter(claimed.run.id[0] for claimed in first) == {"a": 1, "b": 1, "c": 1}
        await end(store, first[0])
        [taken] = await claim(store)
        assert taken.run.id[0] == first[0].run.id[0]
        for claimed in (first[1], first[2], taken):
            await end(store, claimed)
        assert len(await claim(store)) == 3
        assert len(await builder.slots("a2")) in (0, 2)

    async def test_a_full_lane_holds_up_no_other(self, store: Store) -> None:
        """However many stand in it, and however old: the next lane and runs without one are taken within the same limit."""
        await begin(store, *(limited(f"full{n:02}", 1, key="full") for n in range(40)))
        await begin(store, limited("other", 1, key="other"), new("free"))
        assert sorted(await claimed_ids(store, limit=3)) == ["free", "full00", "other"]

    async def test_a_slot_is_taken_by_all_or_none(self, store: Store, builder: StoreBuilder) -> None:
        """A run that cannot have all its slots takes none."""
        await begin(store, new("r1", lane=Lane("one", (Rule("shared", 1),))))
        assert await claimed_ids(store) == ["r1"]
        await begin(store, new("r2", lane=Lane("two", (Rule("own", 1), Rule("shared", 1)))))
        assert await claimed_ids(store) == []
        assert await builder.slots("r2") == []
        await begin(store, new("r3", lane=Lane("three", (Rule("own", 1),))))
        assert await claimed_ids(store) == ["r3"]

    async def test_other_versions_wait_for_their_own(self, store: Store) -> None:
        """B32: a run that nobody here serves holds up nobody behind it, and takes no slot."""
        await begin(store, limited("v2", 1, version="2"), limited("v1", 1))
        assert await claimed_ids(store) == ["v1"]
        [taken] = await store.get(["v1"])
        assert taken is not None
        await done(store, commit(taken, status=Status.COMPLETED))
        answer = await store.claim(ClaimRequest("a", (Route("checkout", "2"),), 9))
        assert [claimed.run.id for claimed in answer.runs] == ["v2"]

    async def test_workspaces_have_lanes_of_their_own(self, store: Store) -> None:
        """The same lane's key in another workspace is another lane, with its own rules."""
        await begin(store, new("ours", lane=Lane("k", (Rule("default slot", 1),))))
        await begin(store, *(new(f"t{n}", workspace="v", lane=Lane("k", (Rule("v slot", 2),))) for n in range(3)))
        routes = (ROUTE, Route("checkout", "1", "v"))
        answer = await store.claim(ClaimRequest("a", routes, 9))
        assert sorted(claimed.run.id for claimed in answer.runs) == ["ours", "t0", "t1"]

    async def test_the_newest_rules_count(self, store: Store) -> None:
        """For runs that waited already too. A lower limit takes nothing from who has a slot."""
        await begin(store, limited("r1", 1), limited("r2", 1))
        first = await claim(store)
        assert len(first) == 1
        await begin(store, limited("r3", 3))
        assert await claimed_ids(store) == ["r2", "r3"]
        await begin(store, limited("r4", 1))
        await end(store, first[0])
        assert await claimed_ids(store) == []
        assert [run and run.owner for run in await store.get(["r2", "r3"])] == ["a", "a"]

    # ------------------------------------------------------------------ freeing

    async def test_S26_slots_are_free_with_the_commit_that_frees_them(
        self, store: Store, builder: StoreBuilder
    ) -> None:
        """At the run's end, with FreeSlots, at a release: the next is taken at once. A mere suspension keeps them."""
        await begin(store, *(limited(f"r{n}", 1, wake_at=builder.now() - 9 + n) for n in range(5)))
        [r0] = await claim(store)
        run = await done(store, suspend(r0.run, builder.now() + FAR))
        assert await claimed_ids(store) == [], "it is suspended, and keeps its slot"
        later(store, builder, FAR / SECOND)
        [r0] = await claim(store)
        assert r0.run.id == "r0", "and is taken again with it"
        run = await done(store, suspend(r0.run, builder.now() + FAR, effects=(FreeSlots(),)))
        assert await builder.slots(run.id) == []
        [r1] = await claim(store)
        assert r1.run.id == "r1"
        await done(store, commit(r1.run, effects=(FreeSlots(("slot lane",)),)))
        [r2] = await claim(store)
        assert r2.run.id == "r2"
        await store.release([("r2", r2.run.epoch)])
        [r2] = await claim(store, "b")
        assert r2.run.id == "r2", "it has begun, so it goes before new ones"
        await end(store, r2)
        assert await claimed_ids(store) == ["r3"]

    async def test_B10_the_owners_death_frees_its_slots_in_the_end(self, store: Store, builder: StoreBuilder) -> None:
        """The holder of a limit of 1 dies: once its lease is over the run itself goes on, with its slot, and then the
        next. B05: the lane is not blocked."""
        await begin(store, limited("r1", 1), limited("r2", 1))
        assert await claimed_ids(store) == ["r1"]
        builder.advance(LEASE / SECOND - 0.000_001)
        store.beat("b", LEASE)
        assert await claimed_ids(store, "b") == []
        builder.advance(0.000_001)
        [taken] = await claim(store, "b")
        assert (taken.run.id, taken.run.epoch, taken.crashed) == ("r1", 2, True)
        assert await builder.slots("r1") == [("slot lane", 0)]
        assert await builder.slots("r2") == []
        await end(store, taken)
        assert await claimed_ids(store, "b") == ["r2"]

    async def test_S25_a_takeover_takes_no_second_slot(self, store: Store, builder: StoreBuilder) -> None:
        """While owners die one after the other, holders are as many as the limit, and the waiting wait."""
        await begin(store, *(limited(f"r{n}", 2) for n in range(4)))
        assert await claimed_ids(store) == ["r0", "r1"]
        for engine in ("c", "d", "e"):
            builder.advance(LEASE / SECOND)
            store.beat(engine, LEASE)
            assert sorted(await claimed_ids(store, engine)) == ["r0", "r1"]
            assert await holders(builder, 4) == ["r0", "r1"]

    async def test_an_orphan_without_slots_queues_again(self, store: Store, builder: StoreBuilder) -> None:
        """Its owner died while it waited without slots: it is due, and takes its turn; nobody gets above the limit."""
        await begin(store, limited("r1", 1), limited("r2", 1))
        [r1] = await claim(store)
        await done(store, commit(r1.run, activity=Activity.WAITING, effects=(FreeSlots(),)))
        builder.advance(LEASE / SECOND)
        store.beat("b", 3 * LEASE)
        [taken] = await claim(store, "b")
        assert (taken.run.id, taken.run.recovery_attempts) == ("r1", 0), "it has begun before, so it is first"
        assert taken.run.epoch > r1.run.epoch
        assert await claimed_ids(store, "b") == []
        await end(store, taken)
        assert await claimed_ids(store, "b") == ["r2"]

    async def test_B10_a_parked_run_of_a_dead_owner_keeps_no_slot(self, store: Store, builder: StoreBuilder) -> None:
        """Nobody goes on with it by itself, so it holds up nobody."""
        await begin(store, limited("r1", 1), limited("r2", 1))
        [r1] = await claim(store)
        await done(store, commit(r1.run, activity=Activity.PAUSED))
        builder.advance(LEASE / SECOND)
        store.beat("b", LEASE)
        assert await claimed_ids(store, "b") == ["r2"]
        assert await builder.slots("r1") == []

    async def test_a_requeued_run_queues_again(self, store: Store, builder: StoreBuilder) -> None:
        """A dead run that is reopened, and a paused one that is woken, hold nothing and take their turn, as ones that
        have begun."""
        await begin(store, *(limited(f"r{n}", 1, wake_at=builder.now() - 9 + n) for n in range(3)))
        [r0] = await claim(store)
        await end(store, r0, status=Status.DEAD)
        [r1] = await claim(store)
        await done(store, suspend(r1.run, None, activity=Activity.PAUSED))
        assert await claimed_ids(store) == []
        for run_id in ("r1", "r0"):
            assert await store.requeue(run_id, commit_id="q", entry=entry(0), activity=Activity.QUEUED) is not None
            assert await builder.slots(run_id) == []
        for run_id in ("r0", "r1", "r2"):
            [taken] = await claim(store)
            assert taken.run.id == run_id
            await end(store, taken)

    async def test_blocked_runs_take_their_turn(self, store: Store, builder: StoreBuilder) -> None:
        """After a start with new code: one that holds its slots is taken; one that lacks them queues for them."""
        await begin(store, *(limited(f"r{n}", 1, key=f"k{n // 2}") for n in range(4)))
        first = {claimed.run.id: claimed.run for claimed in await claim(store)}
        assert sorted(first) == ["r0", "r2"]
        await done(store, suspend(first["r0"], None, activity=Activity.BLOCKED, error=b"e"))
        await done(store, suspend(first["r2"], None, activity=Activity.BLOCKED, error=b"e", effects=(FreeSlots(),)))
        [r3] = await claim(store)
        assert r3.run.id == "r3"
        assert await claimed_ids(store, blocked=True) == ["r0"]
        assert await claimed_ids(store) == []
        await end(store, r3)
        assert await claimed_ids(store) == ["r2"]

    async def test_S43_a_freed_slot_is_hinted(self, store: Store, other: Store) -> None:
        """Whoever waits for a slot on another connection hears that one is free: by FreeSlots, a release and an end."""
        await begin(store, limited("r", 1))
        [taken] = await claim(store)
        heard: list[str] = []
        stop = other.listen(lambda: heard.append("hint"))
        for how in ("effect", "release", "end"):
            await settled(heard)
            if how == "effect":
                await done(store, commit(taken.run, activity=Activity.WAITING, effects=(FreeSlots(),)))
            elif how == "release":
                await store.release([("r", taken.run.epoch)])
            else:
                [taken] = await claim(store)
                await end(store, taken)
            await eventually(lambda: heard, f"the other was hinted: {how}")
        stop()

    # ------------------------------------------------------------------ throttle

    async def test_S27_a_throttle_spaces_beginnings(self, store: Store, builder: StoreBuilder) -> None:
        """At most so many begin within any period; the others wait, and the claim says until when. B09: nothing is kept
        but in the store."""
        await begin(store, *(throttled(f"r{n}", 2, 10) for n in range(6)))
        began = []
        for wait in (0, 4, 5.999_999, 0.000_001, 4, 6):
            later(store, builder, wait)
            answer = await store.claim(ClaimRequest("a", (ROUTE,), 1 if wait in (0, 4) else 9))
            began.append(len(answer.runs))
            last = answer.next_due_at
            for claimed in answer.runs:
                await end(store, claimed)
        # At 0, 4, 9.999999, 10, 14 and 20 seconds: two at most in any ten.
        assert began == [1, 1, 0, 1, 1, 1]
        assert last == builder.now() + 4 * SECOND

    async def test_a_throttle_that_will_open_is_told(self, store: Store, builder: StoreBuilder) -> None:
        """When the next may begin, beside runs that fall due; now, if the limit cut the list; not while a slot lacks too."""
        now = builder.now()
        await begin(store, *(throttled(f"r{n}", 1, 10) for n in range(2)))
        assert await ids_and_next(store, 1) == (["r0"], now + 10 * SECOND)
        await begin(store, new("soon", wake_at=now + SECOND))
        assert await ids_and_next(store) == ([], now + SECOND)
        rules = (Rule("slot", 1), Rule("pace", 1, "throttle", SECOND))
        await begin(store, *(new(f"b{n}", workflow="both", lane=Lane("k", rules)) for n in range(2)))
        answer = await store.claim(ClaimRequest("a", (Route("both", "1"),), 9))
        assert ([one.run.id for one in answer.runs], answer.next_due_at) == (["b0"], None)
        await end(store, answer.runs[0])
        assert await store.claim(ClaimRequest("a", (Route("both", "1"),), 9)) == Claim([], now + SECOND)

    async def test_a_throttle_counts_beginnings_alone(self, store: Store, builder: StoreBuilder) -> None:
        """A run that has begun goes on when it is due, whatever the throttle; taken over or released it begins no second
        time."""
        await begin(store, throttled("r1", 1, 100), throttled("r2", 1, 100))
        [r1] = await claim(store)
        for _ in range(3):
            await done(store, suspend(r1.run, builder.now()))
            [r1] = await claim(store)
            assert r1.run.id == "r1"
        await store.release([("r1", r1.run.epoch)])
        assert await claimed_ids(store) == ["r1"]
        builder.advance(LEASE / SECOND)
        store.beat("b", FAR)
        assert await claimed_ids(store, "b") == ["r1"]
        builder.advance(100 - LEASE / SECOND)
        assert await claimed_ids(store, "b") == ["r2"]

    async def test_S27_a_throttle_holds_over_engines_and_lanes(
        self, store: Store, other: Store, builder: StoreBuilder
    ) -> None:
        """Claims at once over two connections, of two lanes under one key: never one too many in any window."""
        rule = (Rule("t", 5, "throttle", 10 * SECOND),)
        await begin(store, *(new(f"r{n}", lane=Lane(f"k{n % 2}", rule)) for n in range(20)))
        began: list[int] = []
        while len(began) < 20:
            asked = [(store, other)[n % 2].claim(ClaimRequest("ab"[n % 2], (ROUTE,), 2)) for n in range(6)]
            answers = await asyncio.gather(*asked)
            began += [builder.now()] * sum(len(answer.runs) for answer in answers)
            assert sum(at > builder.now() - 10 * SECOND for at in began) <= 5
            later(store, builder, 2.5)
        assert began[-1] - began[0] == 30 * SECOND, "and never one too few"

    # ------------------------------------------------------------------ whose turn it is

    async def test_resumed_before_new(self, store: Store, builder: StoreBuilder) -> None:
        """One that has begun goes before older ones that have not, in its lane (E5)."""
        await begin(store, limited("r1", 1))
        [r1] = await claim(store)
        await begin(store, limited("older", 1, wake_at=builder.now() - FAR), limited("vip", 1, priority=9))
        await done(store, suspend(r1.run, builder.now(), effects=(FreeSlots(),)))
        [again] = await claim(store)
        assert again.run.id == "r1"

    async def test_higher_priority_first_within_a_lane(self, store: Store, builder: StoreBuilder) -> None:
        """Then by when they fell due."""
        now = builder.now()
        order = [("c", 5, now - 1), ("a", 5, now), ("d", 0, now - 9), ("b", 0, now), ("e", -1, now)]
        await begin(store, *(limited(i, 9, priority=p, wake_at=at) for i, p, at in sorted(order)))
        assert await claimed_ids(store) == [run_id for run_id, _, _ in order]

    async def test_S29_whoever_waits_is_served_in_the_end(self, store: Store, builder: StoreBuilder) -> None:
        """A step of priority is worth AGEING_US of waiting: under a steady stream of higher priority the old one goes
        as soon as it has waited that much longer."""
        await begin(store, limited("old", 1, priority=0))
        later(store, builder, 2 * AGEING_US / SECOND + 0.000_001)
        await begin(store, limited("vip1", 1, priority=2), limited("vip1 too", 1, priority=2))
        [taken] = await claim(store)
        assert taken.run.id == "old"
        await end(store, taken)
        await begin(store, limited("new", 1, priority=0))
        later(store, builder, 2 * AGEING_US / SECOND - 0.000_001)
        await begin(store, limited("vip2", 1, priority=2))
        for run_id in ("vip1", "vip1 too", "vip2", "new"):
            [taken] = await claim(store)
            assert taken.run.id == run_id
            await end(store, taken)

    async def test_S29_priority_ages_between_lanes_too(self, store: Store, builder: StoreBuilder) -> None:
        """The lane of higher priority goes first, until the other has waited long enough."""
        rule = (Rule("whole", 1),)
        await begin(store, new("low", lane=Lane("low", rule)))
        later(store, builder, AGEING_US / SECOND / 2)
        await begin(store, new("high", lane=Lane("high", rule), priority=1))
        [taken] = await claim(store)
        assert taken.run.id == "high"
        await end(store, taken)
        later(store, builder, AGEING_US / SECOND)
        await begin(store, new("high2", lane=Lane("high", rule), priority=1))
        assert await claimed_ids(store) == ["low"]

    async def test_X5_lanes_are_served_by_weight(self, store: Store) -> None:
        """Under saturation three to one, whatever the claims' limits, within a tenth; the queue of the heavier is no
        older."""
        rule = (Rule("whole", 4),)
        await begin(store, *(new(f"light{n:03}", lane=Lane("light", rule, 1.0)) for n in range(120)))
        await begin(store, *(new(f"heavy{n:03}", lane=Lane("heavy", rule, 3.0)) for n in range(120)))
        served: Counter[str] = Counter()
        while served.total() < 120:
            for claimed in await claim(store, limit=1 + served.total() % 3):
                served[claimed.run.id[:5]] += 1
                await end(store, claimed)
        assert 0.9 * 3 <= served["heavy"] / served["light"] <= 1.1 * 3

    async def test_X5_weights_count_without_any_limit(self, store: Store) -> None:
        """A lane may have no rule: who asks for few at a time gets them by weight, and within one claim too."""
        await begin(store, *(new(f"light{n:02}", lane=Lane("light", (), 1.0)) for n in range(20)))
        await begin(store, *(new(f"heavy{n:02}", lane=Lane("heavy", (), 3.0)) for n in range(20)))
        served = Counter(run_id[:5] for run_id in await claimed_ids(store, limit=16))
        assert served == {"heavy": 12, "light": 4}

    async def test_a_lane_that_was_empty_catches_nothing_up(self, store: Store) -> None:
        """It begins where the others are: for the time it had no runs it gets nothing extra, and is not punished either."""
        await begin(store, *(new(f"busy{n:02}", lane=Lane("busy", (), 1.0)) for n in range(60)))
        assert len(await claimed_ids(store, limit=30)) == 30
        await begin(store, *(new(f"late{n:02}", lane=Lane("late", (), 1.0)) for n in range(20)))
        served = Counter(run_id[:4] for run_id in await claimed_ids(store, limit=20))
        assert 9 <= served["late"] <= 11

    async def test_many_small_queues_beat_one_flood(self, store: Store) -> None:
        """Behind a thousand runs of one customer the first of each other customer is served with the next few."""
        await begin(store, *(new(f"flood{n:04}", lane=Lane("flood", ())) for n in range(1000)))
        assert len(await claimed_ids(store, limit=5)) == 5
        await begin(store, *(new(f"small{n}", lane=Lane(f"customer {n}", ())) for n in range(8)))
        served = await claimed_ids(store, limit=10)
        assert sum(run_id.startswith("small") for run_id in served) == 8

    async def test_runs_without_a_lane_are_not_held_up(self, store: Store, builder: StoreBuilder) -> None:
        """Between workflows, and beside free runs, the lowest rank goes first."""
        now = builder.now()
        await begin(store, limited("l1", 9, wake_at=now - 4), limited("l2", 9, wake_at=now - 2))
        await begin(store, new("f1", wake_at=now - 3), new("f2", wake_at=now - 1))
        await begin(store, new("o1", workflow="other", wake_at=now - 5, lane=Lane("k", (Rule("o", 1),))))
        answer = await store.claim(ClaimRequest("a", (ROUTE, Route("other", "1")), 9))
        assert [claimed.run.id for claimed in answer.runs] == ["o1", "l1", "f1", "l2", "f2"]

    async def test_the_limit_cuts_and_says_so(self, store: Store, builder: StoreBuilder) -> None:
        """With more to take than was asked for, the next claim is due now."""
        await begin(store, *(limited(f"r{n}", 2) for n in range(3)))
        assert await ids_and_next(store, 1) == (["r0"], builder.now())
        assert await ids_and_next(store, 1) == (["r1"], None)

    # ------------------------------------------------------------------ looking

    async def test_limits_are_shown(self, store: Store, builder: StoreBuilder) -> None:
        """X2: how full each rule is, how many wait behind it, and when a throttle opens."""
        rules = (Rule("slot", 2), Rule("pace", 2, "throttle", 10 * SECOND))
        await begin(store, *(new(f"r{n}", lane=Lane("k", rules, 2.0)) for n in range(5)))
        await begin(store, new("later", lane=Lane("k", rules, 2.0), wake_at=builder.now() + FAR))
        await begin(store, limited("else", 1, workflow="refund"), limited("theirs", 1, workspace="v"))
        assert await states(store) == [
            LimitState("checkout", "k", "pace", "throttle", 2, 10 * SECOND, 0, 5, 2.0, None),
            LimitState("checkout", "k", "slot", "slots", 2, 0, 0, 5, 2.0),
            LimitState("refund", "lane", "slot lane", "slots", 1, 0, 0, 1, 1.0),
        ]
        first = await claim(store, limit=1)
        builder.advance(1)
        [second] = await claim(store)
        await done(store, suspend(second.run, builder.now(), effects=(FreeSlots(),)))
        assert await states(store, "checkout") == [
            LimitState("checkout", "k", "pace", "throttle", 2, 10 * SECOND, 2, 3, 2.0, builder.now() + 9 * SECOND),
            LimitState("checkout", "k", "slot", "slots", 2, 0, 1, 4, 2.0),
        ]
        await end(store, first[0])
        assert await store.limits("nowhere") == []

    async def test_a_lane_shows_for_as_long_as_it_says_something(self, store: Store, builder: StoreBuilder) -> None:
        """With no run left, only a throttle that still counts is shown."""
        rules = (Rule("slot", 2), Rule("pace", 2, "throttle", 10 * SECOND))
        await begin(store, new("r", lane=Lane("k", rules)))
        [taken] = await claim(store)
        await end(store, taken)
        assert [(state.rule, state.used) for state in await states(store)] == [("pace", 1)]
        builder.advance(10)
        assert await states(store) == []


def limited(run_id: str, limit: int, key: str = "lane", **fields: Any) -> NewRun:
    return new(run_id, lane=Lane(key, (Rule(f"slot {key}", limit),)), **fields)


def throttled(run_id: str, limit: int, seconds: int, **fields: Any) -> NewRun:
    return new(run_id, lane=Lane("lane", (Rule("t", limit, "throttle", seconds * SECOND),)), **fields)


async def end(store: Store, claimed: ClaimedRun, status: Status = Status.COMPLETED) -> RunRecord:
    run = await read(store, claimed.run.id)
    return await done(store, commit(run, status=status, commit_id=f"end-{run.id}-{run.epoch}"))


async def holders(builder: StoreBuilder, runs: int) -> list[str]:
    """Those of r0, r1 … that hold a slot, and no two the same."""
    found = [(f"r{n}", slot) for n in range(runs) for slot in await builder.slots(f"r{n}")]
    assert len({slot for _, slot in found}) == len(found)
    return [run_id for run_id, _ in found]


async def ids_and_next(store: Store, limit: int = 9) -> tuple[list[str], int | None]:
    answer = await store.claim(ClaimRequest("a", (ROUTE,), limit))
    return [claimed.run.id for claimed in answer.runs], answer.next_due_at


async def states(store: Store, workflow: str | None = None) -> list[LimitState]:
    found = await store.limits("default", workflow)
    return sorted(found, key=lambda state: (state.workflow, state.lane, state.rule))
