"""Finished runs are let go, with everything that hangs on them."""

from __future__ import annotations

import asyncio
from typing import Any

from durable.core.clock import SECOND
from durable.protocol.states import Activity, Status
from durable.store.interface import Store
from durable.store.items import ItemQuery, NewItem
from durable.store.records import (
    AddFire,
    CommitStatus,
    Journal,
    Message,
    NewRun,
    OpenWaiter,
    Parent,
    PruneRequest,
    RunQuery,
    RunRecord,
    SendStatus,
    StartStatus,
)
from durable.testing.suites.store.builder import (
    FAR,
    StoreBuilder,
    Tests,
    begin,
    claim,
    commit,
    done,
    entry,
    new,
    one,
    read,
    suspend,
)

ALL = PruneRequest(100, keep=0)
"""Whatever is finished goes."""


class RetentionTests(Tests):
    async def test_runs_go_by_age(self, store: Store, builder: StoreBuilder) -> None:
        """What finished longer ago than the age goes; what finished exactly that long ago stays. When a run began is
        nobody's business."""
        await begin(store, *(new(f"r{n}", owner="a") for n in range(4)))
        for n in range(4):
            await done(store, commit(f"r{n}", status=Status.COMPLETED))
            builder.advance(10)
        # They finished 40, 30, 20 and 10 seconds ago.
        assert await store.prune(PruneRequest(100, older_than_us=30 * SECOND)) == 1
        assert await _there(store) == ["r1", "r2", "r3"]
        assert await store.prune(PruneRequest(100, older_than_us=30 * SECOND - 1)) == 1
        assert await _there(store) == ["r2", "r3"]

    async def test_the_newest_of_each_workflow_are_kept(self, store: Store, builder: StoreBuilder) -> None:
        """`keep` counts the finished runs of each workflow by itself; active runs do not count."""
        for n in range(4):
            await _finish(store, new(f"c{n}"), new(f"f{n}", workflow="refund"))
            builder.advance(1)
        await _finish(store, new("only", workflow="rare"))
        await begin(store, new("active"))
        assert await store.prune(PruneRequest(100, keep=2)) == 4
        assert await _there(store) == ["active", "c2", "c3", "f2", "f3", "only"]
        assert await store.prune(PruneRequest(100, keep=2)) == 0
        assert await store.prune(PruneRequest(100, keep=0)) == 5
        assert await _there(store) == ["active"]

    async def test_either_bound_lets_a_run_go(self, store: Store, builder: StoreBuilder) -> None:
        """With age and count given, a run goes that is too old, however few there are, or one too many, however young."""
        await _finish(store, new("old"), new("old2", workflow="refund"))
        builder.advance(100)
        for n in range(3):
            await _finish(store, new(f"c{n}"))
            builder.advance(1)
        both = PruneRequest(100, older_than_us=50 * SECOND, keep=2)
        assert await store.prune(both) == 3
        assert await _there(store) == ["c1", "c2"]

    async def test_no_bound_lets_nothing_go(self, store: Store) -> None:
        """A request without age and count deletes nothing."""
        await _finish(store, new())
        assert await store.prune(PruneRequest(100)) == 0
        assert await _there(store) == ["r"]

    async def test_a_workflow_of_its_own_and_all_but_some(self, store: Store) -> None:
        """`workflow` prunes that one; without it, those in `but` are passed over."""
        await _finish(store, *(new(name, workflow=name) for name in ("w1", "w2", "w3", "w4")))
        assert await store.prune(PruneRequest(100, workflow="w1", keep=0)) == 1
        assert await store.prune(PruneRequest(100, workflow="nobody's", keep=0)) == 0
        assert await _there(store) == ["w2", "w3", "w4"]
        assert await store.prune(PruneRequest(100, but=("w2", "w4", "nobody's"), keep=0)) == 1
        assert await _there(store) == ["w2", "w4"]

    async def test_only_the_workspace_asked_for(self, store: Store, builder: StoreBuilder) -> None:
        """Another workspace's runs stay, and do not count among those kept."""
        for n in range(2):
            await _finish(store, new(f"d{n}"), new(f"o{n}", workspace="other"))
            builder.advance(1)
        assert await store.prune(PruneRequest(100, keep=1)) == 1
        assert await _there(store) == ["d1", "o0", "o1"]
        assert await store.prune(PruneRequest(100, workspace="other", older_than_us=0)) == 2
        assert await store.prune(PruneRequest(100, workspace="nobody's", keep=0)) == 0
        assert await _there(store) == ["d1"]

    async def test_active_runs_never_go(self, store: Store, builder: StoreBuilder) -> None:
        """No run that is active goes, however old, whatever it does; every run that is not does."""
        await begin(store, new("queued"), new("later", wake_at=builder.now() + FAR))
        owned = ("executing", "waiting", "paused", "blocked", *(str(status) for status in Status))
        await begin(store, *(new(run_id, owner="a") for run_id in owned))
        await done(store, suspend("waiting", builder.now() + FAR))
        await done(store, suspend("paused", None, activity=Activity.PAUSED))
        await done(store, suspend("blocked", None, activity=Activity.BLOCKED, error=b"{}"))
        terminal = [status for status in Status if status is not Status.ACTIVE]
        for status in terminal:
            await done(store, commit(str(status), status=status))
        builder.advance(1000)
        assert await store.prune(PruneRequest(100, older_than_us=0, keep=0)) == len(terminal)
        assert await _there(store) == sorted(["active", "blocked", "executing", "later", "paused", "queued", "waiting"])

    async def test_a_reopened_run_stays(self, store: Store, builder: StoreBuilder) -> None:
        """A dead run that was reopened is active, and does not count; when it has ended again, its new end counts."""
        await _finish(store, new("again"), status=Status.DEAD)
        builder.advance(10)
        await _finish(store, new("r"))
        await store.requeue("again", commit_id="q", entry=entry(0), activity="queued")
        builder.advance(10)
        assert await store.prune(PruneRequest(100, keep=1)) == 0
        assert await store.prune(PruneRequest(100, older_than_us=0)) == 1
        assert await _there(store) == ["again"]
        run = await read(store, "again")
        await done(store, commit(run, status=Status.DEAD, commit_id="end"))
        assert await store.prune(PruneRequest(100, older_than_us=5 * SECOND)) == 0
        builder.advance(10)
        assert await store.prune(PruneRequest(100, older_than_us=5 * SECOND)) == 1

    async def test_a_child_stays_while_its_parent_is_active(self, store: Store) -> None:
        """A finished child is there for as long as its parent runs; a parent nobody has any more holds nothing."""
        await begin(store, new("p", owner="a"))
        await _finish(
            store,
            new("c", parent=Parent("p", "c", 0)),
            new("orphan", parent=Parent("gone", "c", 0)),
            new("grandchild", parent=Parent("c", "c", 0)),
        )
        assert await store.prune(ALL) == 2
        assert await _there(store) == ["c", "p"]
        await done(store, commit("p", status=Status.FAILED))
        assert await store.prune(ALL) == 2
        assert await _there(store) == []

    async def test_a_parent_stays_while_a_child_is_active(self, store: Store) -> None:
        """A finished parent stays while any one of its children runs; then both may go, and in whichever order."""
        await _finish(store, new("p"))
        await begin(store, new("c1", parent=Parent("p", "c", 0), owner="a"), new("c2", parent=Parent("p", "c", 1)))
        await done(store, commit("c1", status=Status.COMPLETED))
        assert await store.prune(ALL) == 1
        assert await _there(store) == ["c2", "p"]
        assert [run.id for run in await store.children("p")] == ["c2"]
        await store.send([Message("c2", "m", "signal")])
        run = (await store.get(["c2"]))[0]
        assert run is not None
        await done(store, commit(run, status=Status.CANCELLED))
        assert await store.prune(PruneRequest(1, keep=0)) == 1
        assert await store.prune(PruneRequest(2, keep=0)) == 1
        assert await store.children("p") == []

    async def test_what_their_family_keeps_does_not_stop_the_others(self, store: Store, builder: StoreBuilder) -> None:
        """Kept runs at the old end use up no part of the limit."""
        await begin(store, new("p", owner="a"))
        await _finish(store, *(new(f"c{n}", parent=Parent("p", "c", n)) for n in range(5)))
        builder.advance(1)
        await _finish(store, *(new(f"r{n}") for n in range(3)))
        assert await store.prune(PruneRequest(2, keep=0)) == 2
        assert await store.prune(PruneRequest(2, keep=0)) == 1
        assert await _there(store) == ["c0", "c1", "c2", "c3", "c4", "p"]

    async def test_the_limit_bounds_a_call_and_the_oldest_go_first(self, store: Store, builder: StoreBuilder) -> None:
        """A call deletes at most so many, across workflows by the time they finished, by id where that is equal, and
        says how many."""
        for n in (3, 1, 0, 2):
            await _finish(store, new(f"b{n}", workflow=f"w{n % 2}"), new(f"a{n}", workflow="w2"))
            builder.advance(1)
        order = ["a3", "b3", "a1", "b1", "a0", "b0", "a2", "b2"]
        request = PruneRequest(3, older_than_us=0)
        assert await store.prune(PruneRequest(0, older_than_us=0)) == 0
        assert await store.prune(request) == 3
        assert await _there(store) == sorted(order[3:])
        assert await store.prune(request) == 3
        assert await _there(store) == sorted(order[6:])
        assert await store.prune(request) == 2
        assert await store.prune(request) == 0

    async def test_where_ends_are_equal_ids_decide_who_is_kept(self, store: Store) -> None:
        """Of runs that finished at one instant, exactly `keep` stay: those with the last ids."""
        await _finish(store, *(new(f"r{n}") for n in (4, 0, 3, 1, 2)))
        assert await store.prune(PruneRequest(100, keep=2)) == 3
        assert await _there(store) == ["r3", "r4"]

    async def test_everything_that_hangs_on_it_is_gone(self, store: Store, builder: StoreBuilder) -> None:
        """Row, input, journal, mail, waits, slots and occurrence: no window of the store shows any of it, and a neighbour
        keeps all of its own."""
        for run_id in ("r", "neighbour"):
            await begin(store, new(run_id, owner="a", input=b"i" * 5000, entries=(entry(1),)))
            await store.send([Message(run_id, "m", "signal", "s", b"1")])
            await done(store, commit(run_id, seq=1, effects=(AddFire(run_id, 1, new(f"{run_id}-fired", owner="a")),)))
        await done(store, commit("r", seq=2, status=Status.COMPLETED, output=b"1"))
        await done(store, commit("r-fired", status=Status.COMPLETED))
        await done(store, commit("neighbour", seq=2, effects=(OpenWaiter("w", "paid"),)))
        for run_id in ("r", "neighbour"):
            await builder.plant_slots(run_id, 1, [(f"k-{run_id}", 0)])
        assert await store.prune(ALL) == 2
        assert await store.get(["r"]) == [None]
        assert await store.load(["r"]) == [Journal([])]
        assert await store.page("r", 0, 10) == []
        assert await store.inbox([("r", 0)]) == [[]]
        assert await builder.waiters("r") == []
        assert await builder.slots("r") == []
        assert (await store.find(RunQuery(cursor="r"))).runs == []
        kept = await read(store, "neighbour")
        assert (kept.input, kept.seq, kept.inbox_last) == (b"i" * 5000, 3, 1)
        assert len(await store.page("neighbour", 0, 10)) == 3
        assert len((await store.inbox([("neighbour", 0)]))[0]) == 1
        assert await builder.waiters("neighbour") == ["w"]
        assert await builder.slots("neighbour") == [("k-neighbour", 0)]
        # The same id begins from nothing: no row of the old one, none of its occurrences, is met again.
        await begin(store, new("r", owner="a"))
        fresh = await read(store, "r")
        assert (fresh.input, fresh.seq, fresh.inbox_last, fresh.output) == (b"{}", 0, 0, None)
        [outcome] = await store.send([Message("r", "m", "signal", "s", b"2")])
        assert outcome.status is SendStatus.ACCEPTED
        await done(store, commit("r", commit_id="x", effects=(AddFire("r", 1, new("r-fired")),)))
        assert (await read(store, "r-fired")).status is Status.ACTIVE

    async def test_expired_items_go_with_a_prune(self, store: Store, builder: StoreBuilder) -> None:
        """They are no runs and are not counted; what has not expired stays."""
        items = [NewItem("w", "nonce", one, b"", expires_in=n * SECOND) for n, one in ((1, "old"), (9, "young"))]
        await store.put_items([*items, NewItem("w", "nonce", "always", b"")])
        builder.advance(5)
        assert await store.prune(ALL) == 0
        page = await store.list_items(ItemQuery("nonce"))
        assert [item.id for item in page.items] == ["always", "young"]

    async def test_a_key_lives_as_long_as_its_run(self, store: Store) -> None:
        """After the run has gone, the same key starts anew, with whatever input."""
        key = {"idempotency_key": "order-1"}
        await _finish(store, new("r1", input_hash="h1", **key))
        assert (await store.start([new("r2", input_hash="h2", **key)]))[0].status is StartStatus.CONFLICT
        assert await store.prune(ALL) == 1
        await begin(store, new("r2", input_hash="h2", **key))
        [again] = await store.start([new("r3", input_hash="h2", **key)])
        assert (again.status, again.run_id) == (StartStatus.EXISTING, "r2")

    async def test_a_message_that_comes_too_late_finds_nobody(self, store: Store) -> None:
        """To a run that has gone a message is NOT_FOUND, also one that it had; an effect's message is passed over, and a
        commit is fenced."""
        await begin(store, new(owner="a"), new("sender", owner="a"))
        message = Message("r", "m", "signal")
        await store.send([message])
        last = commit("r", status=Status.COMPLETED)
        await done(store, last)
        assert await store.prune(ALL) == 1
        for late in (message, Message("r", "m2", "signal")):
            [outcome] = await store.send([late])
            assert outcome.status is SendStatus.NOT_FOUND
        assert (await one(store, last)).status is CommitStatus.FENCED
        assert await store.requeue("r", commit_id="q", entry=entry(0), activity="queued") is None
        assert await store.get(["r"]) == [None]

    async def test_claims_pass_over_what_has_gone(self, store: Store, builder: StoreBuilder) -> None:
        """Runs that were due, claimed and finished leave nothing behind that a claim could stumble over."""
        later = [new(f"l{n}", wake_at=builder.now() + (n + 1) * SECOND) for n in range(3)]
        await begin(store, *later, new("r"))
        for run_id in ("r", "l0", "l1"):
            run = await _claimed(store, run_id)
            await done(store, suspend(run, builder.now() + FAR))
            await store.send([Message(run_id, "m", "signal")])
            run = await _claimed(store, run_id)
            await done(store, commit(run, status=Status.COMPLETED, commit_id=f"{run_id}-end"))
            builder.advance(1)
        assert await store.prune(ALL) == 3
        builder.advance(10_000)
        assert store.beat("c", FAR).alive
        assert (await _claimed(store, "l2", "c")).id == "l2"

    async def test_two_stores_at_once(self, store: Store, other: Store) -> None:
        """Engines that prune together delete each run once, and together say how many there were."""
        await _finish(store, *(new(f"r{n:03}") for n in range(200)))

        async def drain(mine: Store) -> int:
            total = 0
            while count := await mine.prune(PruneRequest(7, keep=10)):
                total += count
            return total

        counts = await asyncio.gather(drain(store), drain(other), drain(store))
        assert sum(counts) == 190
        assert await _there(store) == [f"r{n}" for n in range(190, 200)]

    async def test_pruning_beside_work(self, store: Store, other: Store) -> None:
        """While one store prunes, the other starts and finishes runs under the same keys: every start is answered by a run
        that is there or has been, and in the end all have gone."""
        started = 0

        async def work() -> None:
            nonlocal started
            for n in range(60):
                made = new(f"r{n}", owner="a", idempotency_key=f"k{n % 3}", input_hash="h")
                [outcome] = await store.start([made])
                if outcome.status is StartStatus.STARTED:
                    started += 1
                    outcomes = await store.commit([commit(f"r{n}", status=Status.COMPLETED, entries=3)])
                    assert outcomes[0].status is CommitStatus.DONE
                await asyncio.sleep(0)

        gone = 0
        working = asyncio.create_task(work())
        while not working.done():
            gone += await other.prune(PruneRequest(2, keep=0))
            await asyncio.sleep(0)
        await working
        gone += await other.prune(ALL)
        assert gone == started >= 3
        assert await _there(store) == []


async def _finish(store: Store, *runs: NewRun, status: Status = Status.COMPLETED, **fields: Any) -> None:
    """Start these and end them at once."""
    await begin(store, *(_owned(run) for run in runs))
    for run in runs:
        await done(store, commit(run.id, status=status, **fields))


def _owned(run: NewRun) -> NewRun:
    return NewRun(**{**{name: getattr(run, name) for name in NewRun.__struct_fields__}, "owner": "a"})


async def _there(store: Store) -> list[str]:
    return sorted(run.id for run in (await store.find(RunQuery(limit=1000))).runs)


async def _claimed(store: Store, run_id: str, incarnation: str = "a") -> RunRecord:
    [claimed] = await claim(store, incarnation)
    assert claimed.run.id == run_id
    return claimed.run
