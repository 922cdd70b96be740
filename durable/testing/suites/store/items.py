"""Items: small named records, one table for all kinds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable.core.clock import SECOND
from durable.core.errors import PayloadTooLarge
from durable.protocol.states import Status
from durable.store.interface import Store
from durable.store.items import ItemKey, ItemQuery, NewItem, PutOutcome
from durable.store.records import DropItem, PutItem
from durable.testing.suites.store.builder import StoreBuilder, Tests, begin, commit, done, fenced, new

ODD = "Žlu\" 🐎 '; DROP TABLE items; -- %_\\"


class ItemTests(Tests):
    async def test_an_item_comes_back_as_it_was_put(self, store: Store, builder: StoreBuilder) -> None:
        """Every field, odd names and empty data included; None for what nobody put, in the order asked."""
        now = builder.now()
        given = item(ODD, data=b"\x00\xff", due_at=now + 7, expires_in=9 * SECOND)
        assert await store.put_items([given, item("empty", data=b"")]) == [PutOutcome(True, 1), PutOutcome(True, 1)]
        found, nobody, empty = await store.get_items([key(ODD), key("nobody"), key("empty")])
        assert found is not None
        assert empty is not None
        assert nobody is None
        assert (found.workspace, found.kind, found.id, found.data) == ("w", "k", ODD, b"\x00\xff")
        assert (found.version, found.due_at, found.expires_at, found.updated_at) == (1, now + 7, now + 9 * SECOND, now)
        assert (empty.data, empty.due_at, empty.expires_at) == (b"", None, None)

    async def test_kind_and_workspace_keep_items_apart(self, store: Store) -> None:
        """The same id in another kind or workspace is another item."""
        await store.put_items(
            [item("i", data=b"1"), item("i", workspace="v", data=b"2"), item("i", kind="l", data=b"3")]
        )
        found = await store.get_items([key("i"), ItemKey("v", "k", "i"), ItemKey("w", "l", "i")])
        assert [one and (one.data, one.version) for one in found] == [(b"1", 1), (b"2", 1), (b"3", 1)]
        assert await store.delete_items([key("i")]) == 1
        assert [one.data for one in (await store.list_items(ItemQuery("k"))).items] == [b"2"]

    async def test_a_put_replaces_the_whole_item(self, store: Store, builder: StoreBuilder) -> None:
        """Version up by one, times as given now and not as they were."""
        await store.put_items([item("i", due_at=1, expires_in=SECOND)])
        builder.advance(0.5)
        assert await store.put_items([item("i", data=b"2")]) == [PutOutcome(True, 2)]
        [found] = await store.get_items([key("i")])
        assert found is not None
        assert (found.data, found.due_at, found.expires_at, found.updated_at) == (b"2", None, None, builder.now())

    async def test_an_expected_version_is_compared(self, store: Store) -> None:
        """Over that version alone; 0 where there must be none; who comes too late is told what is there, and changes
        nothing. Neighbours in the call are unharmed."""
        assert await store.put_items([item("i", expected=3)]) == [PutOutcome(False, 0)]
        answers = await store.put_items([item("i", expected=0), item("i", data=b"no", expected=0), item("j")])
        assert answers == [PutOutcome(True, 1), PutOutcome(False, 1), PutOutcome(True, 1)]
        assert await store.put_items([item("i", data=b"2", expected=1)]) == [PutOutcome(True, 2)]
        assert await store.put_items([item("i", data=b"no", expected=1)]) == [PutOutcome(False, 2)]
        [found] = await store.get_items([key("i")])
        assert found is not None
        assert found.data == b"2"

    async def test_one_of_many_wins_a_version(self, store: Store, other: Store) -> None:
        """Writers over two connections with the same expectation: exactly one is done."""
        for version in range(5):
            puts = [item("i", data=b"%d" % n, expected=version) for n in range(6)]
            answers = await asyncio.gather(*((store, other)[n % 2].put_items([put]) for n, put in enumerate(puts)))
            assert sorted(answer.done for [answer] in answers) == [False] * 5 + [True]
            [found] = await store.get_items([key("i")])
            assert found is not None
            assert found.version == version + 1
            assert answers[int(found.data)] == [PutOutcome(True, version + 1)]

    async def test_an_expired_item_is_none(self, store: Store, builder: StoreBuilder) -> None:
        """From its instant on it is not read, listed, due, or deleted, and may be put where there must be none (A13)."""
        await store.put_items([item("i", due_at=builder.now(), expires_in=2 * SECOND)])
        builder.advance(1.999_999)
        assert await store.put_items([item("i", expected=0)]) == [PutOutcome(False, 1)]
        builder.advance(0.000_001)
        assert await store.get_items([key("i")]) == [None]
        for due in (False, True):
            page = await store.list_items(ItemQuery("k", due=due))
            assert (page.items, page.next_due_at) == ([], None)
        assert await store.delete_items([key("i")]) == 0
        await store.put_items([item("i", expires_in=SECOND)])
        builder.advance(1)
        assert await store.put_items([item("i", expected=1)]) == [PutOutcome(False, 0)]
        assert await store.put_items([item("i", expected=0)]) == [PutOutcome(True, 1)]
        [found] = await store.get_items([key("i")])
        assert found is not None
        assert found.expires_at is None

    async def test_a_kind_is_listed_in_order(self, store: Store, builder: StoreBuilder) -> None:
        """By workspace, then id, by code points; pages meet each once; nothing of other kinds."""
        ids = ["A", "Z", "a", "a b", "a-b", "b", "é", "ž"]
        puts = [item(one, workspace=w) for w in ("W", "v", "v2") for one in reversed(ids)]
        await store.put_items([*puts, item("a", kind="other")])
        wanted = [(w, one) for w in ("W", "v", "v2") for one in ids]
        page = await store.list_items(ItemQuery("k"))
        assert [(one.workspace, one.id) for one in page.items] == wanted
        assert (page.now, page.next_due_at) == (builder.now(), None)
        seen: list[tuple[str, str]] = []
        after = None
        while page := await store.list_items(ItemQuery("k", after=after, limit=5)):
            seen += [(one.workspace, one.id) for one in page.items]
            if len(page.items) < 5:
                break
            last = page.items[-1]
            after = ItemKey(last.workspace, last.kind, last.id)
        assert seen == wanted
        mine = await store.list_items(ItemQuery("k", workspace="v", after=ItemKey("v", "k", "b")))
        assert [one.id for one in mine.items] == ["é", "ž"]

    async def test_what_changed_since_is_found(self, store: Store, builder: StoreBuilder) -> None:
        """Only items written at that time or after it."""
        await store.put_items([item("old"), item("renewed")])
        builder.advance(1)
        await store.put_items([item("renewed"), item("new")])
        for since, wanted in ((0, ["new", "old", "renewed"]), (builder.now(), ["new", "renewed"])):
            page = await store.list_items(ItemQuery("k", changed_since=since))
            assert [one.id for one in page.items] == wanted
        assert (await store.list_items(ItemQuery("k", changed_since=builder.now() + 1))).items == []

    async def test_S21_due_items_come_earliest_first(self, store: Store, builder: StoreBuilder) -> None:
        """By the store's clock, of one workspace or all, and when the next falls due; now, if the limit cut the list."""
        now = builder.now()
        await store.put_items([item("never"), item("c", due_at=now - 1), item("a", due_at=now), item("b", due_at=now)])
        await store.put_items([item("later", due_at=now + 5), item("theirs", workspace="v", due_at=now + 3)])
        page = await store.list_items(ItemQuery("k", due=True))
        assert ([one.id for one in page.items], page.next_due_at) == (["c", "a", "b"], now + 3)
        page = await store.list_items(ItemQuery("k", due=True, workspace="w"))
        assert ([one.id for one in page.items], page.next_due_at) == (["c", "a", "b"], now + 5)
        page = await store.list_items(ItemQuery("k", due=True, limit=2))
        assert ([one.id for one in page.items], page.next_due_at) == (["c", "a"], now)
        builder.advance(0.000_005)
        page = await store.list_items(ItemQuery("k", due=True))
        assert ([one.id for one in page.items], page.next_due_at) == (["c", "a", "b", "theirs", "later"], None)

    async def test_deleted_items_are_counted(self, store: Store) -> None:
        """How many there were; again: none."""
        await store.put_items([item("i"), item("j")])
        assert await store.delete_items([key("i"), key("j"), key("nobody")]) == 2
        assert await store.delete_items([key("i"), key("j")]) == 0
        assert await store.delete_items([]) == 0
        assert await store.put_items([item("i")]) == [PutOutcome(True, 1)]

    async def test_an_item_too_large_is_refused(self, store: Store) -> None:
        """A typed error, and nothing of the call is stored."""
        big = b"x" * (store.capabilities.max_payload + 1)
        with pytest.raises(PayloadTooLarge):
            await store.put_items([item("small"), item("big", data=big)])
        assert await store.get_items([key("small"), key("big")]) == [None, None]

    async def test_B46_items_change_with_a_commit(self, store: Store, builder: StoreBuilder) -> None:
        """Put and dropped in the run's workspace with its commit, whatever version is there, or not at all."""
        await store.put_items(
            [item("there", workspace="w1"), item("gone", workspace="w1"), item("gone", workspace="w2")]
        )
        await begin(store, new(owner="a", workspace="w1"))
        until = builder.now() + SECOND
        effects = (
            PutItem("k", "there", b"2"),
            PutItem("k", "new", b"n", until),
            DropItem("k", "gone"),
            DropItem("k", "no"),
        )
        await fenced(store, commit("r", epoch=7, effects=effects))
        [there, fresh, gone] = await store.get_items([ItemKey("w1", "k", one) for one in ("there", "new", "gone")])
        assert (there and there.version, fresh, gone and gone.version) == (1, None, 1)
        await done(store, commit("r", status=Status.COMPLETED, effects=effects))
        [there, fresh, gone] = await store.get_items([ItemKey("w1", "k", one) for one in ("there", "new", "gone")])
        assert there is not None
        assert fresh is not None
        assert (there.version, there.data, fresh.version, fresh.expires_at, gone) == (2, b"2", 1, until, None)
        assert (await store.get_items([ItemKey("w2", "k", "gone")]))[0] is not None

    async def test_an_item_too_large_is_one_commits_failure(self, store: Store) -> None:
        """Only the commit that puts it is refused."""
        await begin(store, new("r1", owner="a"), new("r2", owner="a"))
        big = PutItem("k", "big", b"x" * (store.capabilities.max_payload + 1))
        bad, good = await store.commit([commit("r1", effects=(big,)), commit("r2", effects=(PutItem("k", "s", b""),))])
        assert isinstance(bad.failure, PayloadTooLarge)
        assert good.failure is None
        page = await store.list_items(ItemQuery("k"))
        assert [one.id for one in page.items] == ["s"]


def item(item_id: str, **fields: Any) -> NewItem:
    return NewItem(**{"workspace": "w", "kind": "k", "id": item_id, "data": b"1", **fields})


def key(item_id: str) -> ItemKey:
    return ItemKey("w", "k", item_id)
