"""Schedules: items that move on, and the runs of their occurrences."""

from __future__ import annotations

import asyncio

import pytest

from durable.core.errors import PayloadTooLarge
from durable.store.interface import Store
from durable.store.items import Fire, FireOutcome, ItemKey, NewItem, Occurrence
from durable.testing.suites.store.builder import StoreBuilder, Tests, begin, claimed_ids, new, read


class ScheduleTests(Tests):
    async def test_a_schedule_moves_on_with_its_runs(self, store: Store, builder: StoreBuilder) -> None:
        """The item is replaced and the occurrences' runs are there, in one."""
        await store.put_items([schedule(0)])
        runs = (Occurrence(100, new("r1")), Occurrence(200, new("r2", wake_at=builder.now() + 50)))
        assert await store.fire([Fire(schedule(1, due_at=300), runs)]) == [FireOutcome(True, ("r1", "r2"))]
        [found] = await store.get_items([KEY])
        assert found is not None
        assert (found.version, found.due_at) == (2, 300)
        assert await claimed_ids(store) == ["r1"]
        assert (await read(store, "r2")).wake_at == builder.now() + 50

    async def test_S22_the_slower_engine_starts_nothing(self, store: Store, builder: StoreBuilder) -> None:
        """Over another version than was read nothing happens, neither to the item nor a run; B47: both or neither."""
        await store.put_items([schedule(0)])
        assert await store.fire([Fire(schedule(1), (Occurrence(100, new("r1")),))]) == [FireOutcome(True, ("r1",))]
        for occurrence in (Occurrence(100, new("r2")), Occurrence(200, new("r3"))):
            assert await store.fire([Fire(schedule(1, data=b"late"), (occurrence,))]) == [FireOutcome(False)]
        assert await store.get(["r2", "r3"]) == [None, None]
        [found] = await store.get_items([KEY])
        assert found is not None
        assert (found.version, found.data) == (2, b"1")
        missing = NewItem("w", "schedule", "missing", b"", expected=1)
        assert await store.fire([Fire(missing, (Occurrence(1, new("r4")),))]) == [FireOutcome(False)]
        assert await store.get(["r4"]) == [None]

    async def test_S22_an_occurrence_that_has_been_starts_nothing(self, store: Store) -> None:
        """Also at the right version, as after a restored item; the new ones among them start."""
        await store.put_items([schedule(0)])
        await store.fire([Fire(schedule(1), (Occurrence(100, new("r1")),))])
        again = (Occurrence(100, new("again")), Occurrence(200, new("r2")))
        assert await store.fire([Fire(schedule(2), again)]) == [FireOutcome(True, ("r2",))]
        assert await store.get(["again"]) == [None]

    async def test_S22_one_run_for_an_occurrence_however_many_engines(self, store: Store, other: Store) -> None:
        """Engines that fire the same version at once: one moves it on, and each occurrence has one run."""
        await store.put_items([schedule(0)])
        for version in range(1, 6):
            fires = [Fire(schedule(version), (Occurrence(version, new(f"r{version}-{n}")),)) for n in range(6)]
            answers = await asyncio.gather(*((store, other)[n % 2].fire([fire]) for n, fire in enumerate(fires)))
            assert sorted(answer.done for [answer] in answers) == [False] * 5 + [True]
            runs = await store.get([f"r{version}-{n}" for n in range(6)])
            assert [run.id for run in runs if run] == [one for [answer] in answers for one in answer.started]
        assert len(await claimed_ids(store)) == 5

    async def test_each_schedule_by_itself(self, store: Store) -> None:
        """One that is late does no harm to the others in the call; ids are a workspace's own; a run that exists is not
        new."""
        await begin(store, new("there"))
        theirs = NewItem("v", "schedule", "s", b"1", expected=0)
        answers = await store.fire(
            [
                Fire(schedule(5), (Occurrence(100, new("late")),)),
                Fire(theirs, (Occurrence(100, new("r1")),)),
                Fire(schedule(0), (Occurrence(100, new("r2")), Occurrence(200, new("there")))),
            ]
        )
        assert answers == [FireOutcome(False), FireOutcome(True, ("r1",)), FireOutcome(True, ("r2",))]

    async def test_without_occurrences_it_merely_moves_on(self, store: Store) -> None:
        """Missed occurrences that the policy skips."""
        await store.put_items([schedule(0, due_at=1)])
        assert await store.fire([Fire(schedule(1, due_at=9))]) == [FireOutcome(True)]
        [found] = await store.get_items([KEY])
        assert found is not None
        assert found.due_at == 9

    async def test_a_run_too_large_is_refused(self, store: Store) -> None:
        """A typed error: the schedule stays where it is."""
        await store.put_items([schedule(0)])
        big = new("big", input=b"x" * (store.capabilities.max_payload + 1))
        with pytest.raises(PayloadTooLarge):
            await store.fire([Fire(schedule(1), (Occurrence(1, big),))])
        [found] = await store.get_items([KEY])
        assert found is not None
        assert found.version == 1


KEY = ItemKey("w", "schedule", "s")


def schedule(expected: int, due_at: int | None = None, data: bytes = b"1") -> NewItem:
    return NewItem("w", "schedule", "s", data, due_at=due_at, expected=expected)
