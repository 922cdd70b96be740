"""What a commit does beside its run: with it, or not at all."""

from __future__ import annotations

from typing import get_args

from durable.protocol.states import Activity, Status
from durable.store.interface import Store
from durable.store.records import (
    AddFire,
    CloseWaiter,
    CommitStatus,
    DropItem,
    Effect,
    FreeSlots,
    Message,
    OpenWaiter,
    Parent,
    PutItem,
    PutMessage,
    SetAttributes,
    StartRun,
)
from durable.testing.suites.store.builder import (
    FAR,
    StoreBuilder,
    Tests,
    begin,
    claimed_ids,
    commit,
    done,
    entry,
    new,
    one,
    read,
    suspend,
)


class EffectTests(Tests):
    async def test_every_effect_is_tried(self) -> None:
        """The closed list is the one this suite knows; a new effect makes this test fail first."""
        known = {StartRun, PutMessage, OpenWaiter, CloseWaiter, SetAttributes, AddFire, FreeSlots}
        known |= {PutItem, DropItem}  # items.py
        assert set(get_args(Effect)) == known

    async def test_B47_a_child_starts_with_the_commit(self, store: Store, builder: StoreBuilder) -> None:
        """The child is there, with its rows and its parent, exactly when the parent's commit is."""
        child = new("c", parent=Parent("r", "child:1", 0), owner="a", entries=(entry(1),), input=b"i" * 5000)
        await begin(store, new(owner="a"))
        outcome = await one(store, commit("r", epoch=9, effects=(StartRun(child),)))
        assert outcome.status is CommitStatus.FENCED
        assert await store.get(["c"]) == [None]
        await done(store, commit("r", effects=(StartRun(child),)))
        [found] = await store.children("r")
        assert (found.id, found.seq, found.owner, found.input) == ("c", 1, "a", b"i" * 5000)
        assert await store.page("c", 0, 10) == [entry(1)]

    async def test_B47_continue_as_new_is_one_commit(self, store: Store) -> None:
        """The old run's end and the new run's start: both, in one commit."""
        await begin(store, new(owner="a"))
        await done(store, commit("r", status=Status.COMPLETED, effects=(StartRun(new("next")),)))
        assert await claimed_ids(store) == ["next"]

    async def test_starting_what_exists_leaves_it_alone(self, store: Store) -> None:
        """An id or key that is taken is no failure of the commit."""
        await begin(store, new(owner="a"), new("c", priority=5), new("k", idempotency_key="key", input_hash="1"))
        again = (StartRun(new("c")), StartRun(new("k2", idempotency_key="key", input_hash="2")), StartRun(new("n")))
        await done(store, commit("r", effects=again))
        assert (await read(store, "c")).priority == 5
        assert await store.get(["k2"]) == [None]
        assert (await read(store, "n")).status is Status.ACTIVE

    async def test_B48_the_parent_is_told_in_the_same_commit(self, store: Store, builder: StoreBuilder) -> None:
        """The child's end and the message to its parent are one; the sleeping parent is due, its owner would be named."""
        await begin(store, new("p", owner="a"), new("awake", owner="b"), new("c", owner="a"))
        await done(store, suspend("p", builder.now() + FAR))
        told = Message("p", "c", "child", "completed", b"1", "child:1", 0)
        other = Message("awake", "c", "child", "completed", b"1", "child:1", 0)
        outcome = await one(store, commit("c", status=Status.COMPLETED, effects=(PutMessage(told), PutMessage(other))))
        assert outcome.wake in (("b",), ())
        parent = await read(store, "p")
        assert (parent.inbox_last, parent.wake_at) == (1, builder.now())
        [[row], [other_row]] = await store.inbox([("p", 0), ("awake", 0)])
        assert (row.message, other_row.message) == (told, other)
        assert await store.unread("b") == ["awake"]

    async def test_B46_all_effects_or_none(self, store: Store, builder: StoreBuilder) -> None:
        """A commit that is refused leaves no trace of any of its effects."""
        await begin(store, new(owner="a"), new("p", owner="a"))
        await done(store, commit("r", effects=(OpenWaiter("open", "paid"), SetAttributes({"n": 1}, ("t",)))))
        await builder.plant_slots("r", 1, [("k", 0)])
        run = await read(store)
        everything: tuple[Effect, ...] = (
            StartRun(new("c")),
            PutMessage(Message("p", "m", "signal")),
            OpenWaiter("w", "shipped"),
            CloseWaiter("open"),
            SetAttributes({"n": 2}, ()),
            AddFire("s", 1, new("fired")),
            FreeSlots(),
        )
        assert (await one(store, commit(run, commit_id="x", effects=everything))).status is CommitStatus.DONE
        assert await builder.waiters("r") == ["w"]
        for change in (
            commit("r", epoch=1, seq=0, commit_id="old", effects=everything),
            commit("r", epoch=5, seq=2, commit_id="zombie", effects=everything),
        ):
            change.effects = (
                StartRun(new("c2")),
                PutMessage(Message("p", "m2", "signal")),
                OpenWaiter("w2", "shipped"),
                CloseWaiter("w"),
                SetAttributes({"n": 3}, ("u",)),
                AddFire("s", 2, new("fired2")),
            )
            assert (await one(store, change)).status is CommitStatus.FENCED
        assert await store.get(["c2", "fired2"]) == [None, None]
        assert (await read(store, "p")).inbox_last == 1
        assert await builder.waiters("r") == ["w"]
        run = await read(store)
        assert (dict(run.attributes), run.tags) == ({"n": 2}, ())

    async def test_S18_a_message_effect_counts_once(self, store: Store) -> None:
        """The same message id again, by effect or by send, changes nothing; unknown and finished recipients are passed
        over."""
        await begin(store, new(owner="a"), new("p"), new("over", owner="a"))
        await done(store, commit("over", status=Status.COMPLETED))
        puts = tuple(PutMessage(Message(run_id, "m", "signal")) for run_id in ("p", "p", "over", "nobody"))
        await done(store, commit("r", effects=puts))
        await store.send([Message("p", "m", "signal")])
        assert (await read(store, "p")).inbox_last == 1
        assert (await read(store, "over")).inbox_last == 0

    async def test_a_message_to_a_child_born_in_the_same_commit(self, store: Store) -> None:
        """Starts come before messages, in whatever order the effects are named."""
        await begin(store, new(owner="a"))
        await done(store, commit("r", effects=(PutMessage(Message("c", "m", "signal")), StartRun(new("c")))))
        assert (await read(store, "c")).inbox_last == 1

    async def test_a_message_to_a_batch_mate_that_suspends(self, store: Store, builder: StoreBuilder) -> None:
        """A batch in which one run suspends and another writes to it leaves it due."""
        for n, mates in enumerate((("x", "y"), ("y", "x"))):
            ids = {name: f"{name}{n}" for name in mates}
            await begin(store, *(new(run_id, owner="a") for run_id in ids.values()))
            changes = {
                "x": suspend(ids["x"], builder.now() + FAR),
                "y": commit(ids["y"], effects=(PutMessage(Message(ids["x"], "m", "signal")),)),
            }
            outcomes = await store.commit([changes[name] for name in mates])
            assert {outcome.status for outcome in outcomes} == {CommitStatus.DONE}
            run = await read(store, ids["x"])
            assert (run.inbox_last, run.wake_at) == (1, builder.now())

    async def test_S19_waiters_open_and_close(self, store: Store, builder: StoreBuilder) -> None:
        """Waits are opened once per id, closed by id, the last word of a commit counts, and the run's end closes all."""
        await begin(store, new(owner="a"), new("bystander", owner="a"))
        await done(store, commit("bystander", effects=(OpenWaiter("w1", "paid"),)))
        opened = (OpenWaiter("w1", "paid", b'{"id":1}', builder.now()), OpenWaiter("w2", "paid"), OpenWaiter("w1", "x"))
        run = await done(store, commit("r", effects=opened))
        assert await builder.waiters("r") == ["w1", "w2"]
        run = await done(store, commit(run, effects=(CloseWaiter("w1"), CloseWaiter("never opened"))))
        assert await builder.waiters("r") == ["w2"]
        run = await done(store, commit(run, effects=(CloseWaiter("w2"), OpenWaiter("w2", "again"))))
        assert await builder.waiters("r") == ["w2"]
        await done(store, commit(run, status=Status.COMPLETED, effects=(OpenWaiter("w3", "too late"),)))
        assert await builder.waiters("r") == []
        assert await builder.waiters("bystander") == ["w1"]

    async def test_attributes_are_set_and_removed(self, store: Store) -> None:
        """Given names are set, None removes, others stay; tags are replaced when given."""
        await begin(store, new(owner="a", attributes={"keep": 1, "drop": True}, tags=("old",)))
        run = await done(store, commit("r", effects=(SetAttributes({"drop": None, "add": 2.5, "big": 2**53 + 1}),)))
        assert (dict(run.attributes), run.tags) == ({"keep": 1, "add": 2.5, "big": 2**53 + 1}, ("old",))
        run = await done(store, commit(run, effects=(SetAttributes(tags=("new", "er")), SetAttributes({"add": ""}))))
        assert (run.attributes["add"], run.tags) == ("", ("new", "er"))

    async def test_S22_an_occurrence_fires_once(self, store: Store, other: Store) -> None:
        """One run per schedule and occurrence, whoever asks; what fired before is left alone with its run."""
        await begin(store, new("one", owner="a"), new("two", owner="b"))
        await done(store, commit("one", effects=(AddFire("s", 100, new("f1")),)))
        fires = (AddFire("s", 100, new("f2")), AddFire("s", 200, new("f3")), AddFire("t", 100, new("f4")))
        outcome = await one(other, commit("two", effects=fires))
        assert outcome.status is CommitStatus.DONE
        assert [run and run.id for run in await store.get(["f1", "f2", "f3", "f4"])] == ["f1", None, "f3", "f4"]

    async def test_S26_slots_are_freed_with_the_commit(self, store: Store, builder: StoreBuilder) -> None:
        """Named keys, or all, are freed by the effect; the run's end frees the rest; nobody else's are touched."""
        await begin(store, new(owner="a"), new("bystander", owner="a"))
        await builder.plant_slots("r", 1, [("k1", 0), ("k1", 1), ("k2", 0), ("k3", 0)])
        await builder.plant_slots("bystander", 1, [("k1", 2)])
        run = await done(store, commit("r", effects=(FreeSlots(("k1", "unheld")),)))
        assert await builder.slots("r") == [("k2", 0), ("k3", 0)]
        run = await done(store, commit(run, effects=(FreeSlots(),)))
        assert await builder.slots("r") == []
        await builder.plant_slots("r", 1, [("k4", 0)])
        await done(store, commit(run, status=Status.CANCELLED, activity=Activity.CANCELLING))
        assert await builder.slots("r") == []
        assert await builder.slots("bystander") == [("k1", 2)]

    async def test_many_effects_in_a_batch(self, store: Store) -> None:
        """A hundred runs that each start three children and tell one mailbox: everything is there, numbered densely."""
        await begin(store, new("mailbox"), *(new(f"r{n}", owner="a") for n in range(100)))
        batch = [
            commit(
                f"r{n}",
                effects=(
                    *(StartRun(new(f"c{n}.{k}", parent=Parent(f"r{n}", f"c:{k}", k))) for k in range(3)),
                    PutMessage(Message("mailbox", f"m{n}", "signal")),
                ),
            )
            for n in range(100)
        ]
        assert {outcome.status for outcome in await store.commit(batch)} == {CommitStatus.DONE}
        assert all(await store.get([f"c{n}.{k}" for n in range(100) for k in range(3)]))
        [rows] = await store.inbox([("mailbox", 0)])
        assert [row.number for row in rows] == list(range(1, 101))
        assert {row.message.id for row in rows} == {f"m{n}" for n in range(100)}
