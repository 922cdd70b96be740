"""The fence, the batch, and what a commit does to its run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable.core.errors import PayloadTooLarge, StoreError
from durable.protocol.states import Activity, Status
from durable.store.interface import Store
from durable.store.records import Commit, CommitStatus, Message, PutMessage, SendStatus, StartRun
from durable.testing.suites.store.builder import (
    FAR,
    LEASE,
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
    one,
    read,
    suspend,
)


class CommitTests(Tests):
    async def test_a_commit_appends_and_moves_seq(self, store: Store, builder: StoreBuilder) -> None:
        """Its rows are in the journal, the run's seq, commit id and time have moved, nothing else."""
        await begin(store, new(owner="a"))
        before = await read(store)
        builder.advance(1)
        after = await done(store, commit(before, entries=3))
        assert [row.seq for row in await store.page("r", 0, 10)] == [1, 2, 3]
        assert (after.seq, after.commit_id, after.updated_at) == (3, "r-1-0", builder.now())
        before.seq, before.commit_id, before.updated_at = after.seq, after.commit_id, after.updated_at
        assert after == before

    async def test_B52_every_field_of_a_commit_is_kept(self, store: Store, builder: StoreBuilder) -> None:
        """Each field does what its line says; a field nobody knows here makes this test fail first."""
        known = {
            *("run_id", "epoch", "expected_seq", "commit_id", "entries", "effects"),
            *("status", "activity", "output", "error", "inbox_read", "progressed", "suspend", "wake_at"),
        }
        assert set(Commit.__struct_fields__) == known, "a new field: try it here, and in every store"
        await begin(store, new(owner="a"))
        await store.send([Message("r", f"m{n}", "signal") for n in range(3)])
        run = await done(store, commit("r", activity=Activity.WAITING, inbox_read=2))
        assert (run.activity, run.inbox_read, run.inbox_last, run.owner) == (Activity.WAITING, 2, 3, "a")
        run = await done(store, commit(run, activity=Activity.BLOCKED, error=b'"why"', output=b"ignored"))
        assert (run.error, run.output) == (b'"why"', None)
        run = await done(store, commit(run))
        assert (run.activity, run.inbox_read, run.error) == (Activity.BLOCKED, 2, b'"why"'), "UNSET keeps"
        run = await done(store, commit(run, activity=Activity.EXECUTING))
        assert run.error is None, "no longer blocked, no longer an error"
        run = await done(store, commit(run, inbox_read=3, suspend=True, wake_at=7 + builder.now()))
        assert (run.owner, run.wake_at, run.status) == (None, 7 + builder.now(), Status.ACTIVE)
        run = await done(store, commit(run, status=Status.FAILED, output=b"o", error=b"e"))
        assert (run.status, run.output, run.error, run.wake_at) == (Status.FAILED, b"o", b"e", None)

    async def test_a_commit_without_entries(self, store: Store) -> None:
        """A commit may change the run and write no row; its id still makes it count once."""
        await begin(store, new(owner="a"))
        change = commit("r", entries=0, activity=Activity.WAITING)
        assert (await done(store, change)).activity is Activity.WAITING
        await done(store, commit("r", entries=0, activity=Activity.RETRYING, commit_id="other"))
        assert (await one(store, commit("r", entries=0, commit_id="other"))).status is CommitStatus.DONE
        assert (await read(store)).activity is Activity.RETRYING

    async def test_S2_an_old_epoch_is_fenced(self, store: Store, builder: StoreBuilder) -> None:
        """Once another engine has claimed the run, its old owner can neither write, end, nor release it."""
        await begin(store, new(owner="a"))
        old = await read(store)
        builder.advance(LEASE)
        store.beat("b", 10 * LEASE)
        assert await claimed_ids(store, "b") == ["r"]
        for zombie in (commit(old), commit(old, status=Status.COMPLETED), suspend(old, builder.now())):
            await fenced(store, zombie)
        before = await read(store)
        await store.release([("r", old.epoch)])
        assert await read(store) == before
        assert before.owner == "b"
        assert await store.page("r", 0, 10) == []

    async def test_S2_an_old_seq_is_fenced(self, store: Store) -> None:
        """Two commits on the same seq: the first wins, the second is refused whole."""
        await begin(store, new(owner="a"))
        await done(store, commit("r"))
        await fenced(store, commit("r", commit_id="second"))
        await fenced(store, commit("r", seq=5, commit_id="too far ahead"))
        assert len(await store.page("r", 0, 10)) == 1

    async def test_a_commit_for_nobody_is_fenced(self, store: Store) -> None:
        """An unknown run is no error of the batch."""
        await fenced(store, commit("nobody"))

    async def test_S23_terminal_is_absorbing(self, store: Store, builder: StoreBuilder) -> None:
        """The first terminal commit wins; whatever comes later for that run is fenced."""
        for n, status in enumerate(Status):
            if status is Status.ACTIVE:
                continue
            await begin(store, new(f"r{n}", owner="a"))
            ended = await done(store, commit(f"r{n}", status=status, output=b"1", error=b"2"))
            assert (ended.status, ended.owner, ended.wake_at, ended.finished_at) == (status, None, None, builder.now())
            assert (ended.output, ended.error) == (b"1", b"2")
            for late in (
                commit(ended, commit_id="x"),
                commit(ended, commit_id="y", status=Status.COMPLETED),
                suspend(ended, builder.now(), commit_id="z"),
            ):
                await fenced(store, late)
            [sent] = await store.send([Message(f"r{n}", "m", "signal")])
            assert sent.status is SendStatus.FINISHED
        assert await claimed_ids(store) == []

    async def test_S23_cancel_and_complete_race(self, store: Store, other: Store) -> None:
        """Two terminal commits at once: one done, one fenced, and the run is what the first said."""
        for n in range(10):
            await begin(store, new(f"r{n}", owner="a"))
            status = (Status.COMPLETED, Status.CANCELLED)
            outcomes = await asyncio.gather(
                one(store, commit(f"r{n}", status=status[0], commit_id="complete")),
                one(other, commit(f"r{n}", status=status[1], commit_id="cancel")),
            )
            won = [outcome.status for outcome in outcomes].index(CommitStatus.DONE)
            assert outcomes[1 - won].status is CommitStatus.FENCED
            assert (await read(store, f"r{n}")).status is status[won]

    async def test_S39_a_repeated_commit_counts_once(self, store: Store, builder: StoreBuilder) -> None:
        """A commit whose reply was lost is sent again: done, and applied once, whatever kind it was."""
        await begin(store, *(new(run_id, owner="a") for run_id in ("plain", "asleep", "over", "empty")))
        batch = [
            commit("plain", entries=2),
            commit("empty", entries=0, activity=Activity.WAITING),
            suspend("asleep", builder.now() + FAR),
            commit("over", status=Status.COMPLETED, output=b"1"),
        ]
        first = await store.commit(batch)
        before = await store.get(["plain", "asleep", "over", "empty"])
        builder.advance(1)
        again = await store.commit(batch)
        alone = [await one(store, change) for change in batch]
        assert [outcome.status for outcome in first + again + alone] == [CommitStatus.DONE] * 12
        assert await store.get(["plain", "asleep", "over", "empty"]) == before
        assert len(await store.page("plain", 0, 10)) == 2

    async def test_S39_a_repeated_commit_after_the_next_is_fenced(self, store: Store) -> None:
        """Only the last commit can still be told from a foreign one; an older one is refused, never applied twice."""
        await begin(store, new(owner="a"))
        first = commit("r")
        run = await done(store, first)
        await done(store, commit(run))
        await fenced(store, first)

    async def test_a_batch_is_answered_one_by_one(self, store: Store) -> None:
        """Done, fenced and repeated stand side by side, in order, and do not touch each other."""
        await begin(store, *(new(f"r{n}", owner="a") for n in range(5)))
        repeated = commit("r3")
        await done(store, repeated)
        outcomes = await store.commit(
            [
                commit("r0"),
                commit("r1", epoch=9),
                commit("r2", status=Status.COMPLETED),
                repeated,
                commit("nobody"),
                commit("r4", entries=4),
            ]
        )
        d, f = CommitStatus.DONE, CommitStatus.FENCED
        assert [outcome.status for outcome in outcomes] == [d, f, d, d, f, d]
        assert [run and run.seq for run in await store.get(["r0", "r1", "r2", "r3", "r4"])] == [1, 0, 1, 1, 4]

    async def test_a_full_batch(self, store: Store) -> None:
        """As many commits as capabilities say, of every kind, with several rows each."""
        size = store.capabilities.max_batch
        await begin(store, *(new(f"r{n}", owner="a") for n in range(size)))
        batch = [commit(f"r{n}", entries=n % 4) for n in range(size)]
        for change in batch[::3]:
            change.activity = Activity.WAITING
        assert {outcome.status for outcome in await store.commit(batch)} == {CommitStatus.DONE}
        runs = await store.get([f"r{n}" for n in range(size)])
        assert [run and run.seq for run in runs] == [n % 4 for n in range(size)]

    async def test_an_impossible_batch_is_the_callers_mistake(self, store: Store) -> None:
        """Too many commits, or two for one run, raise and change nothing."""
        await begin(store, new(owner="a"))
        with pytest.raises(StoreError):
            await store.commit([commit("r"), commit("r", commit_id="2")])
        with pytest.raises(StoreError):
            await store.commit([commit(f"n{n}") for n in range(store.capabilities.max_batch + 1)])
        assert (await read(store)).seq == 0
        assert await store.commit([]) == []

    @pytest.mark.parametrize("poison", ["payload", "output", "gap", "sleepless", "child", "message"])
    async def test_one_poisoned_commit_fails_alone(self, store: Store, poison: str) -> None:
        """Among 200 commits one cannot be stored: it gets its typed error and leaves nothing, the others are done."""
        await begin(store, *(new(f"r{n}", owner="a") for n in range(200)))
        batch = [commit(f"r{n}") for n in range(200)]
        batch[137] = self._poisoned(store, poison)
        outcomes = await store.commit(batch)
        failure = outcomes[137].failure
        assert isinstance(failure, (StoreError, PayloadTooLarge))
        assert [n for n, outcome in enumerate(outcomes) if outcome.failure is not None] == [137]
        assert {outcome.status for n, outcome in enumerate(outcomes) if n != 137} == {CommitStatus.DONE}
        runs = await store.get([f"r{n}" for n in range(200)])
        assert [run.seq for run in runs if run] == [0 if n == 137 else 1 for n in range(200)]
        assert await store.page("r137", 0, 10) == []
        assert await store.get(["before"]) == [None]
        assert (await done(store, commit("r137", commit_id="mended"))).seq == 1

    @staticmethod
    def _poisoned(store: Store, poison: str) -> Commit:
        large = b"x" * (store.capabilities.max_payload + 1)
        fields: dict[str, dict[str, Any]] = {
            "payload": {"entries": 1},
            "output": {"status": Status.COMPLETED, "output": large},
            "gap": {"entries": 1},
            "sleepless": {"suspend": True, "wake_at": None, "activity": Activity.WAITING},
            "child": {"effects": (StartRun(new("before")), StartRun(new("child", input=large)))},
            "message": {"effects": (StartRun(new("before")), PutMessage(Message("r1", "m", "signal", payload=large)))},
        }
        change = commit("r137", **fields[poison])
        if poison == "payload":
            change.entries = [entry(1, large)]
        elif poison == "gap":
            change.entries = [entry(2)]
        return change

    # ------------------------------------------------------------------ suspending

    async def test_a_suspended_run_wakes_at_its_time_and_never_before(
        self, store: Store, builder: StoreBuilder
    ) -> None:
        """S21: a timer is never early by the store's clock, and never lost."""
        await begin(store, new(owner="a"))
        run = await done(store, suspend("r", builder.now() + 5_000_000, activity=Activity.SLEEPING))
        assert (run.owner, run.activity, run.wake_at) == (None, Activity.SLEEPING, builder.now() + 5_000_000)
        builder.advance(4.999_999)
        assert await claimed_ids(store) == []
        builder.advance(0.000_001)
        assert await claimed_ids(store) == ["r"]
        assert await claimed_ids(store) == []

    async def test_B07_every_suspended_run_has_a_wake_time(self, store: Store, builder: StoreBuilder) -> None:
        """A suspending commit without a wake time is refused whole, unless the run is parked."""
        await begin(store, new(owner="a"), new("parked", owner="a"), new("blocked", owner="a"))
        with pytest.raises(StoreError):
            await one(store, suspend("r", None))
        run = await read(store)
        assert (run.owner, run.seq) == ("a", 0)
        for run_id, activity in (("parked", Activity.PAUSED), ("blocked", Activity.BLOCKED)):
            parked = await done(store, suspend(run_id, None, activity=activity))
            assert (parked.owner, parked.wake_at) == (None, None)

    async def test_S16_mail_that_came_before_leaves_the_run_due(self, store: Store, builder: StoreBuilder) -> None:
        """A message between the turn and the suspending commit makes the run due now, whatever wake time it asked."""
        await begin(store, new(owner="a"), new("read", owner="a"), new("paused", owner="a"))
        for run_id in ("r", "read", "paused"):
            await store.send([Message(run_id, "m", "signal", "go")])
        run = await done(store, suspend("r", builder.now() + FAR))
        assert run.wake_at == builder.now()
        run = await done(store, suspend("read", builder.now() + FAR, inbox_read=1))
        assert run.wake_at == builder.now() + FAR, "what the run has taken in wakes it no more"
        run = await done(store, suspend("paused", None, activity=Activity.PAUSED))
        assert run.wake_at is None, "a parked run takes mail in and stays put"
        assert await claimed_ids(store) == ["r"]

    async def test_S16_unread_mail_is_a_wake_time_too(self, store: Store, builder: StoreBuilder) -> None:
        """With unread mail a suspending commit needs no wake time of its own."""
        await begin(store, new(owner="a"))
        await store.send([Message("r", "m", "signal")])
        assert (await done(store, suspend("r", None))).wake_at == builder.now()

    async def test_B11_a_send_and_a_suspend_at_once_lose_nothing(
        self, store: Store, other: Store, builder: StoreBuilder
    ) -> None:
        """In whatever order the two land, the run is due at once or the owner is told of its mail."""
        for n in range(20):
            await begin(store, new(f"r{n}", owner="a"))
            change, message = suspend(f"r{n}", builder.now() + FAR), Message(f"r{n}", "m", "signal")
            if n % 2:
                [outcome], [sent] = await asyncio.gather(store.commit([change]), other.send([message]))
            else:
                [sent], [outcome] = await asyncio.gather(other.send([message]), store.commit([change]))
            assert (outcome.status, sent.status) == (CommitStatus.DONE, SendStatus.ACCEPTED)
            run = await read(store, f"r{n}")
            assert (run.inbox_last, run.wake_at) == (1, builder.now())
        assert len(await claimed_ids(store)) == 20

    async def test_B11_a_sender_in_mid_transaction(self, store: Store, builder: StoreBuilder) -> None:
        """A suspending commit that waits for a sender's row lock sees that sender's message once it has the lock."""
        await begin(store, new(owner="a"))
        sender = builder.sending(Message("r", "m", "signal"))
        if sender is None:
            pytest.skip("operations of this store cannot overlap")
        async with sender:
            suspending = asyncio.ensure_future(one(store, suspend("r", builder.now() + FAR)))
            await asyncio.wait({suspending}, timeout=0.05)
            assert not suspending.done(), "it waits for the sender"
        assert (await suspending).status is CommitStatus.DONE
        assert (await read(store)).wake_at == builder.now()
        assert await claimed_ids(store) == ["r"]

    async def test_an_outcome_tells_of_mail(self, store: Store) -> None:
        """`inbox_last` is the row's counter, so an owner learns of mail no hint told it of."""
        await begin(store, new(owner="a"))
        assert (await one(store, commit("r"))).inbox_last == 0
        await store.send([Message("r", "m1", "signal"), Message("r", "m2", "signal")])
        outcome = await one(store, commit("r", seq=1))
        assert outcome.inbox_last == 2

    async def test_progress_clears_the_recovery_count(self, store: Store, builder: StoreBuilder) -> None:
        """`progressed` sets it to 0; without it the count stays."""
        await begin(store, new(owner="a"))
        builder.advance(LEASE)
        store.beat("b", 10 * LEASE)
        [taken] = await claim(store, "b")
        assert taken.run.recovery_attempts == 1
        assert (await done(store, commit(taken.run))).recovery_attempts == 1
        assert (await done(store, commit(await read(store), progressed=True))).recovery_attempts == 0

    # ------------------------------------------------------------------ with the author's own SQL

    async def test_commit_with_is_said_or_done(self, store: Store) -> None:
        """Work and commit are one transaction: both, or, when fenced or raising, neither. A store that cannot says so."""
        await begin(store, new(owner="a"))
        worked = []

        async def work(connection: Any) -> None:
            worked.append(connection)

        async def broken(connection: Any) -> None:
            raise ValueError("the author's own")

        if not store.capabilities.commit_with:
            with pytest.raises(StoreError):
                await store.commit_with(work, commit("r"))
            assert (await read(store)).seq == 0
            return
        assert (await store.commit_with(work, commit("r", epoch=7))).status is CommitStatus.FENCED
        assert worked == []
        with pytest.raises(ValueError, match="the author's own"):
            await store.commit_with(broken, commit("r"))
        assert (await read(store)).seq == 0
        assert (await store.commit_with(work, commit("r"))).status is CommitStatus.DONE
        assert (len(worked), (await read(store)).seq) == (1, 1)

    # ------------------------------------------------------------------ reopening

    @pytest.mark.parametrize("status", [Status.DEAD, Status.FAILED])
    async def test_B20_requeue_reopens_with_a_fresh_budget(
        self, store: Store, builder: StoreBuilder, status: Status
    ) -> None:
        """A dead or failed run is active again: next epoch, one more entry, no old outcome, due now; once per id."""
        await begin(store, new(owner="a"))
        builder.advance(LEASE)
        store.beat("b", 10 * LEASE)
        [taken] = await claim(store, "b")
        old = await done(store, commit(taken.run, status=status, output=b"o", error=b"e"))
        marker = entry(0, b'{"from":1}', kind="run", status="requeued")
        run = await store.requeue("r", commit_id="q1", entry=marker, activity=Activity.QUEUED)
        assert run is not None
        assert (run.status, run.activity, run.owner) == (Status.ACTIVE, Activity.QUEUED, None)
        assert (run.epoch, run.seq, run.recovery_attempts) == (old.epoch + 1, old.seq + 1, 0)
        assert (run.output, run.error, run.finished_at, run.wake_at) == (None, None, None, builder.now())
        assert (await store.page("r", 1, 10))[0] == entry(2, b'{"from":1}', at=0, kind="run", status="requeued")
        again = await store.requeue("r", commit_id="q1", entry=marker, activity=Activity.QUEUED)
        assert again == run == await read(store)
        await fenced(store, commit(old, commit_id="zombie"))
        [taken] = await claim(store, "b")
        assert not taken.crashed

    async def test_requeue_wakes_a_blocked_run(self, store: Store, builder: StoreBuilder) -> None:
        """A blocked run, even one still held by an engine, goes on under a new epoch."""
        await begin(store, new(owner="a"), new("held", owner="a"))
        await done(store, suspend("r", None, activity=Activity.BLOCKED, error=b"e"))
        await done(store, commit("held", activity=Activity.BLOCKED, error=b"e"))
        for run_id in ("r", "held"):
            marker = entry(0, kind="run", status="unblocked")
            run = await store.requeue(run_id, commit_id="q", entry=marker, activity=Activity.QUEUED)
            assert run is not None
            assert (run.epoch, run.owner, run.error, run.wake_at) == (2, None, None, builder.now())
        assert sorted(await claimed_ids(store)) == ["held", "r"]

    async def test_requeue_wakes_a_paused_run(self, store: Store, builder: StoreBuilder) -> None:
        """A paused run, suspended or still held, goes on under a new epoch, and what was in its inbox is still unread."""
        await begin(store, new(owner="a"), new("held", owner="a"))
        await store.send([Message("r", "m", "signal")])
        await done(store, suspend("r", None, activity=Activity.PAUSED))
        await done(store, commit("held", activity=Activity.PAUSED))
        for run_id in ("r", "held"):
            marker = entry(0, kind="run", status="resumed")
            run = await store.requeue(run_id, commit_id="q", entry=marker, activity=Activity.QUEUED)
            assert run is not None
            assert (run.epoch, run.owner, run.activity, run.wake_at) == (2, None, Activity.QUEUED, builder.now())
        assert (await read(store)).inbox_last == 1
        assert sorted(await claimed_ids(store)) == ["held", "r"]

    async def test_requeue_refuses_everything_else(self, store: Store) -> None:
        """A living, completed, cancelled or unknown run is not reopened."""
        await begin(store, new("living", owner="a"), new("completed", owner="a"), new("cancelled", owner="a"))
        await done(store, commit("completed", status=Status.COMPLETED))
        await done(store, commit("cancelled", status=Status.CANCELLED))
        for run_id in ("living", "completed", "cancelled", "nobody"):
            before = await store.get([run_id])
            assert await store.requeue(run_id, commit_id="q", entry=entry(0), activity=Activity.QUEUED) is None
            assert await store.get([run_id]) == before
