"""Leases of engines, epochs of runs."""

from __future__ import annotations

import asyncio

from durable.core.clock import SECOND
from durable.protocol.states import Activity, Status
from durable.store.interface import Store
from durable.store.records import Claim, ClaimRequest, Commit, CommitStatus, Parent, Route, StartRun
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
    fenced,
    new,
    read,
    suspend,
)


class ClaimTests(Tests):
    async def test_a_claim_takes_the_run_at_its_next_epoch(self, store: Store, builder: StoreBuilder) -> None:
        """The claimed run is mine, one epoch up, started now, and executing: a crash from here on counts."""
        await begin(store, new())
        [taken] = await claim(store)
        assert not taken.crashed
        assert (taken.run.owner, taken.run.epoch, taken.run.activity) == ("a", 1, Activity.EXECUTING)
        assert taken.run.started_at == builder.now()
        assert taken.run == await read(store)
        assert await store.owned("a") == [("r", 1)]
        assert await store.owned("b") == []

    async def test_S1_one_claimer_wins(self, store: Store, other: Store) -> None:
        """Two engines claim at once over two connections: every run goes to exactly one of them."""
        await begin(store, *(new(f"r{n}") for n in range(60)))
        claims = await asyncio.gather(
            *((store, other)[n % 2].claim(ClaimRequest("ab"[n % 2], (ROUTE,), 10)) for n in range(8))
        )
        taken = [claimed.run for answer in claims for claimed in answer.runs]
        assert sorted(run.id for run in taken) == sorted(f"r{n}" for n in range(60))
        assert {run.epoch for run in taken} == {1}
        owned = await store.owned("a") + await store.owned("b")
        assert sorted(owned) == sorted((run.id, 1) for run in taken)

    async def test_only_served_routes_are_claimed(self, store: Store) -> None:
        """Another workflow or version stays where it is; no route, nothing."""
        await begin(store, new("r1"), new("r2", version="2"), new("r3", workflow="refund"))
        assert await store.claim(ClaimRequest("a", (), 10)) == Claim([], None)
        answer = await store.claim(ClaimRequest("a", (Route("checkout", "2"), Route("refund", "1")), 10))
        assert sorted(claimed.run.id for claimed in answer.runs) == ["r2", "r3"]
        assert await claimed_ids(store) == ["r1"]

    async def test_other_workspaces_runs_are_left_alone(self, store: Store, builder: StoreBuilder) -> None:
        """Same workflow, same version, another workspace: due, orphaned and blocked runs are neither claimed nor counted."""
        now = builder.now()
        theirs, there = {"workspace": "theirs"}, Route("checkout", "1", "theirs")
        await begin(store, new("due", **theirs), new("sleeping", wake_at=now + 10, **theirs))
        await begin(store, new("orphan", owner="gone", **theirs), new("parked", owner="gone", **theirs))
        await done(store, commit("parked", activity=Activity.PAUSED))
        await begin(store, new("blocked", owner="b", **theirs))
        await done(store, suspend("blocked", None, activity=Activity.BLOCKED))
        before = await store.get(["due", "sleeping", "orphan", "parked", "blocked"])
        assert await store.claim(ClaimRequest("a", (ROUTE,), 10)) == Claim([], None)
        assert await claimed_ids(store, blocked=True) == []
        assert await store.get(["due", "sleeping", "orphan", "parked", "blocked"]) == before
        await begin(store, new("mine"))
        assert await claimed_ids(store) == ["mine"]
        answer = await store.claim(ClaimRequest("a", (ROUTE, there), 10))
        assert sorted(claimed.run.id for claimed in answer.runs) == ["due", "orphan"]
        assert {claimed.run.workspace for claimed in answer.runs} == {"theirs"}
        assert answer.next_due_at == now + 10
        [taken] = (await store.claim(ClaimRequest("a", (there,), 10, blocked=True))).runs
        assert taken.run.id == "blocked"

    async def test_a_dead_engine_of_another_workspace_is_left_to_its_own(
        self, store: Store, builder: StoreBuilder
    ) -> None:
        """An expired engine is declared dead by who claims from it, and nobody of another workspace does."""
        await begin(store, new(owner="a", workspace="theirs"))
        builder.advance(LEASE / SECOND)
        store.beat("b", LEASE)
        assert await claimed_ids(store, "b") == []
        assert store.beat("a", LEASE).alive

    async def test_a_reopened_run_stays_in_its_workspace(self, store: Store) -> None:
        """After a requeue, and for a child started with a commit, only engines of that workspace get it."""
        await begin(store, new(owner="a", workspace="theirs"))
        child = new("child", workspace="theirs", parent=Parent("r", "c", 0))
        await done(store, commit("r", status=Status.FAILED, error=b"{}", effects=(StartRun(child),)))
        await store.requeue("r", commit_id="again", entry=entry(0), activity=Activity.QUEUED.value)
        assert await claimed_ids(store) == []
        answer = await store.claim(ClaimRequest("a", (Route("checkout", "1", "theirs"),), 10))
        assert sorted(claimed.run.id for claimed in answer.runs) == ["child", "r"]

    async def test_higher_priority_first_then_older(self, store: Store, builder: StoreBuilder) -> None:
        """Priority descending, then wake time, over all routes, and the limit cuts the end of that order."""
        now = builder.now()
        order = [("e", 9, now), ("b", 5, now - 2), ("d", 5, now - 1), ("a", 0, now - 9), ("c", 0, now), ("f", -1, now)]
        for n, (run_id, priority, wake_at) in enumerate(sorted(order)):
            await begin(store, new(run_id, priority=priority, wake_at=wake_at, version=str(n % 2)))
        routes = (Route("checkout", "0"), Route("checkout", "1"))
        taken: list[str] = []
        for limit in (1, 2, 3):
            answer = await store.claim(ClaimRequest("a", routes, limit))
            taken += [claimed.run.id for claimed in answer.runs]
        assert taken == [run_id for run_id, _, _ in order]

    async def test_the_next_due_time_is_told(self, store: Store, builder: StoreBuilder) -> None:
        """The earliest wake time still to come of my routes, or now when the limit cut the list."""
        now = builder.now()
        await begin(store, new("soon", wake_at=now + 10), new("later", wake_at=now + 20, priority=5))
        await begin(store, new("foreign", wake_at=now + 1, version="2"), new("r1"), new("r2"))
        assert (await store.claim(ClaimRequest("a", (ROUTE,), 1))).next_due_at == now
        assert (await store.claim(ClaimRequest("a", (ROUTE,), 1))).next_due_at == now + 10
        await store.start([new("sooner", wake_at=now + 5, priority=-1)])
        assert (await store.claim(ClaimRequest("a", (ROUTE,), 1))) == Claim([], now + 5)
        assert (await store.claim(ClaimRequest("a", (Route("checkout", "9"),), 1))) == Claim([], None)

    async def test_S21_due_is_by_the_stores_clock(self, store: Store, builder: StoreBuilder) -> None:
        """A thousand wake times: after each step of the clock exactly those that have come are claimed."""
        now = builder.now()
        await begin(store, *(new(f"r{n}", wake_at=now + n * 1000) for n in range(1, 1001)))
        claimed = 0
        for step in (1, 249, 250, 500):
            builder.advance(step / 1000)
            ids = await claimed_ids(store, limit=1000)
            assert len(ids) == step
            claimed += step
            assert await claimed_ids(store, limit=1000) == []
        assert claimed == 1000

    # ------------------------------------------------------------------ heartbeats

    async def test_a_beat_tells_the_time(self, store: Store, builder: StoreBuilder) -> None:
        """It answers with the store's clock, and with life."""
        beat = store.beat("a", LEASE)
        assert (beat.now, beat.alive) == (builder.now(), True)

    async def test_a_beat_comes_from_a_thread(self, store: Store) -> None:
        """Heartbeats from other threads go through while the loop commits."""
        await begin(store, *(new(f"r{n}", owner="a") for n in range(50)))
        beats = asyncio.gather(*(asyncio.to_thread(store.beat, "a", LEASE) for _ in range(20)))
        for seq in range(10):
            await store.commit([commit(f"r{n}", seq=seq) for n in range(50)])
        assert all(beat.alive for beat in await beats)

    async def test_an_engine_that_never_beat_claims_nothing(self, store: Store) -> None:
        """Without a heartbeat its runs would be anyone's, so it gets none."""
        await begin(store, new())
        assert await claimed_ids(store, "stranger") == []

    async def test_S3_an_expired_claimer_gets_nothing_until_it_beats(self, store: Store, builder: StoreBuilder) -> None:
        """An engine whose lease ran out claims nothing; it lives on if nobody has buried it."""
        await begin(store, new())
        builder.advance(LEASE / SECOND)
        assert await claimed_ids(store, "a") == []
        assert store.beat("a", LEASE).alive
        assert await claimed_ids(store, "a") == ["r"]

    async def test_B06_runs_of_an_engine_without_a_row_are_found(self, store: Store) -> None:
        """The orphan search does not depend on the engine's row: no row is dead."""
        await begin(store, new(owner="never-seen"))
        assert await claimed_ids(store) == ["r"]

    async def test_an_engine_that_left_frees_its_runs_at_once(self, store: Store) -> None:
        """After `leave` its runs are claimable with no wait for the lease, and they count as crashed if executing."""
        await begin(store, new("r1", owner="a"), new("r2"))
        assert await claimed_ids(store, "a") == ["r2"]
        assert await claimed_ids(store, "b") == []
        await store.leave("a")
        taken = await claim(store, "b")
        assert sorted((claimed.run.id, claimed.run.epoch, claimed.crashed) for claimed in taken) == [
            ("r1", 2, True),
            ("r2", 2, True),
        ]

    async def test_S1_an_expired_owner_is_dead_for_ever(self, store: Store, builder: StoreBuilder) -> None:
        """The claim that takes its runs marks it dead: it never beats, claims or writes again."""
        await begin(store, new(owner="a"), new("fresh", wake_at=builder.now() + FAR))
        builder.advance((LEASE - 1) / SECOND)
        store.beat("b", 10 * FAR)
        assert await claimed_ids(store, "b") == [], "not a moment before the lease ends"
        builder.advance(1 / SECOND)
        assert await claimed_ids(store, "b") == ["r"]
        assert not store.beat("a", LEASE).alive
        builder.advance(FAR / SECOND)
        assert not store.beat("a", LEASE).alive
        assert await claimed_ids(store, "a") == []
        await fenced(store, commit("r", epoch=1))
        assert await claimed_ids(store, "b") == ["fresh"]

    async def test_B04_two_incarnations_on_one_host(self, store: Store, builder: StoreBuilder) -> None:
        """A process restarts while the old one drains: the new incarnation takes nothing of the old, then everything."""
        await begin(store, new(owner="host-1"))
        store.beat("host-1", LEASE)
        store.beat("host-2", LEASE)
        assert await claimed_ids(store, "host-2") == []
        await done(store, commit("r"))
        await store.leave("host-1")
        [taken] = await claim(store, "host-2")
        assert (taken.run.owner, taken.run.epoch, taken.run.seq) == ("host-2", 2, 1)
        assert await store.owned("host-1") == []

    async def test_an_engine_does_not_rob_itself(self, store: Store, builder: StoreBuilder) -> None:
        """Its own runs are in `owned`, not in its claims."""
        await begin(store, new(owner="a"))
        assert await claimed_ids(store, "a") == []
        assert await store.owned("a") == [("r", 1)]

    async def test_S1_a_lost_claim_reply_strands_nothing(self, store: Store) -> None:
        """The engine never heard of its claim: asking again gives nothing new, `owned` shows it, release returns it."""
        await begin(store, new())
        await claim(store)
        assert await claimed_ids(store) == []
        assert await store.owned("a") == [("r", 1)]
        await store.release(await store.owned("a"))
        assert await claimed_ids(store, "b") == ["r"]

    # ------------------------------------------------------------------ recovery

    async def test_S32_only_executing_runs_count_as_crashed(self, store: Store, builder: StoreBuilder) -> None:
        """Of a dead engine's runs, those in a turn or body are suspects; waiting and sleeping ones are not (B19, B21)."""
        for activity in Activity:
            await begin(store, new(activity, owner="a"))
            await done(store, commit(activity, activity=activity))
        builder.advance(LEASE / SECOND)
        store.beat("b", LEASE)
        taken = {claimed.run.id: claimed for claimed in await claim(store, "b")}
        assert set(taken) == set(Activity) - {Activity.PAUSED, Activity.BLOCKED}
        for run_id, claimed in taken.items():
            suspect = run_id == Activity.EXECUTING
            assert claimed.crashed is suspect
            assert claimed.run.recovery_attempts == (1 if suspect else 0)
            assert claimed.run.activity == (Activity.QUEUED if suspect else Activity.EXECUTING)

    async def test_S32_a_suspect_counts_again_only_once_it_executes(self, store: Store, builder: StoreBuilder) -> None:
        """A suspect that waits for its turn alone is `queued`: another crash does not count until its engine has begun it."""
        await begin(store, new(owner="a"))
        for engine, attempts in (("b", 1), ("c", 1), ("d", 2)):
            builder.advance(LEASE / SECOND)
            store.beat(engine, LEASE)
            [claimed] = await claim(store, engine)
            assert claimed.run.recovery_attempts == attempts
            if engine == "c":
                run = claimed.run
                begun = Commit(run.id, run.epoch, run.seq, "begun", [], activity=Activity.EXECUTING)
                [answer] = await store.commit([begun])
                assert answer.status is CommitStatus.DONE

    async def test_B21_claiming_and_suspending_is_no_crash(self, store: Store, builder: StoreBuilder) -> None:
        """Two hundred ordinary claims leave the recovery count at 0."""
        await begin(store, new())
        for _ in range(200):
            [taken] = await claim(store)
            assert (taken.crashed, taken.run.recovery_attempts) == (False, 0)
            await done(store, suspend(taken.run, builder.now(), activity=Activity.QUEUED, entries=1))

    async def test_S38_release_is_no_crash(self, store: Store, builder: StoreBuilder) -> None:
        """A released run is unowned, queued if it was executing, due now, and goes to the next with no blame."""
        await begin(store, new(owner="a"), new("asleep", owner="a"), new("paused", owner="a"))
        await done(store, commit("asleep", activity=Activity.SLEEPING))
        await done(store, commit("paused", activity=Activity.PAUSED))
        builder.advance(1)
        await store.release([("r", 1), ("asleep", 1), ("paused", 1), ("nobody", 1)])
        runs = {run.id: run for run in await store.get(["r", "asleep", "paused"]) if run}
        assert [run.owner for run in runs.values()] == [None] * 3
        assert runs["r"].activity is Activity.QUEUED
        assert runs["asleep"].activity is Activity.SLEEPING
        assert (runs["paused"].activity, runs["paused"].wake_at) == (Activity.PAUSED, None)
        assert runs["r"].wake_at == runs["asleep"].wake_at == builder.now()
        taken = await claim(store, "b")
        assert sorted((claimed.run.id, claimed.crashed) for claimed in taken) == [("asleep", False), ("r", False)]
        await store.release([])

    async def test_a_release_counts_once(self, store: Store) -> None:
        """A repeated release, or one of a finished run, changes nothing."""
        await begin(store, new(owner="a"), new("over", owner="a"))
        ended = await done(store, commit("over", status=Status.COMPLETED))
        await store.release([("r", 1), ("over", 1)])
        first = await read(store)
        await store.release([("r", 1)])
        assert await read(store) == first
        assert await read(store, "over") == ended

    # ------------------------------------------------------------------ parked runs

    async def test_parked_runs_are_not_claimed(self, store: Store, builder: StoreBuilder) -> None:
        """Paused and blocked runs stay put, with a wake time or without, also when their owner has died."""
        for n, activity in enumerate((Activity.PAUSED, Activity.BLOCKED)):
            await begin(store, *(new(f"{kind}{n}", owner="a") for kind in ("bare", "timed", "orphan")))
            await done(store, suspend(f"bare{n}", None, activity=activity))
            await done(store, suspend(f"timed{n}", builder.now(), activity=activity))
            await done(store, commit(f"orphan{n}", activity=activity))
        builder.advance(LEASE / SECOND)
        store.beat("b", LEASE)
        assert (await store.claim(ClaimRequest("b", (ROUTE,), 10))) == Claim([], None)
        for n in range(2):
            orphan = await read(store, f"orphan{n}")
            assert (orphan.owner, orphan.epoch) == (None, 2), "freed of its dead owner, under a new epoch"

    async def test_blocked_runs_are_claimed_when_asked_for(self, store: Store, builder: StoreBuilder) -> None:
        """After a start with new code: blocked runs of my routes, in id order, from a given id on."""
        await begin(store, *(new(f"r{n}", owner="a") for n in range(5)), new("v2", version="2", owner="a"))
        for run_id in ("r0", "r1", "r2", "r3", "v2"):
            await done(store, suspend(run_id, None, activity=Activity.BLOCKED))
        await done(store, suspend("r4", None, activity=Activity.PAUSED))
        assert await claimed_ids(store, blocked=True, limit=2) == ["r0", "r1"]
        await store.release([("r0", 2), ("r1", 2)])
        assert await claimed_ids(store, blocked=True, after="r0", limit=2) == ["r1", "r2"]
        answer = await store.claim(ClaimRequest("a", (ROUTE,), 9, blocked=True, after="r2"))
        assert [(claimed.run.id, claimed.crashed) for claimed in answer.runs] == [("r3", False)]
        assert answer.next_due_at is None

    async def test_S34_blocked_runs_of_a_dead_engine_are_claimed(self, store: Store, builder: StoreBuilder) -> None:
        """A blocked run still held by an engine that died is not stranded."""
        await begin(store, new(owner="gone"))
        await done(store, commit("r", activity=Activity.BLOCKED))
        [taken] = await claim(store, blocked=True)
        assert (taken.run.owner, taken.crashed) == ("a", False)
