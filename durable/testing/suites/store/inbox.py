"""Messages to runs: kept, numbered, counted once."""

from __future__ import annotations

import asyncio

import pytest

from durable.core.errors import PayloadTooLarge
from durable.protocol.states import Activity, Status
from durable.store.interface import Store
from durable.store.records import InboxRow, Message, SendOutcome, SendStatus
from durable.testing.suites.store.builder import (
    FAR,
    StoreBuilder,
    Tests,
    begin,
    claimed_ids,
    commit,
    done,
    new,
    read,
    suspend,
)
from durable.testing.suites.store.runs import ODD


class InboxTests(Tests):
    async def test_B52_every_field_of_a_message_comes_back(self, store: Store, builder: StoreBuilder) -> None:
        """What was sent is what is read, field by field."""
        full = Message("r", ODD, "result", ODD, b'{"n":9007199254740993,"e":[]}', "charge:1", 4, 2, "shop:prod")
        bare = Message("r", "m2", "cancel", workspace="shop:prod")
        defaults = dict(zip(full.__struct_fields__[-6:], full.__struct_defaults__, strict=True))
        assert all(getattr(full, name) != default for name, default in defaults.items())
        await begin(store, new(workspace="shop:prod"))
        await store.send([full, bare])
        assert await store.inbox([("r", 0)]) == [[InboxRow(1, builder.now(), full), InboxRow(2, builder.now(), bare)]]

    async def test_messages_are_numbered_densely_and_read_from_anywhere(self, store: Store) -> None:
        """Numbers begin at 1 per run and have no gaps; reading asks per run for what lies above."""
        await begin(store, new("r1"), new("r2"))
        await store.send([Message(f"r{1 + n % 2}", f"m{n}", "signal") for n in range(6)])
        await store.send([Message("r1", "last", "signal")])
        answers = await store.inbox([("r2", 1), ("nobody", 0), ("r1", 3), ("r1", 0), ("r1", 9)])
        assert [[row.number for row in rows] for rows in answers] == [[2, 3], [], [4], [1, 2, 3, 4], []]
        assert (await read(store, "r1")).inbox_last == 4
        assert await store.inbox([]) == []

    async def test_S18_sending_again_changes_nothing(self, store: Store) -> None:
        """The same id to the same run is a duplicate: in the same call, later, and after the run has ended."""
        await begin(store, new(owner="a"))
        message = Message("r", "m", "signal", "go", b"1")
        statuses = [outcome.status for outcome in await store.send([message, message])]
        assert statuses == [SendStatus.ACCEPTED, SendStatus.DUPLICATE]
        await done(store, commit("r", status=Status.COMPLETED))
        assert (await store.send([message]))[0].status is SendStatus.DUPLICATE
        assert (await store.send([Message("r", "m2", "signal")]))[0].status is SendStatus.FINISHED
        assert (await read(store)).inbox_last == 1

    async def test_B25_one_message_id_for_two_recipients(self, store: Store) -> None:
        """Ids are unique per recipient: both get theirs."""
        await begin(store, new("r1"), new("r2"))
        outcomes = await store.send([Message("r1", "m", "signal"), Message("r2", "m", "signal")])
        assert [outcome.status for outcome in outcomes] == [SendStatus.ACCEPTED] * 2

    async def test_A10_another_workspace_finds_nobody(self, store: Store) -> None:
        """A message of one workspace to a run of another is refused as if the run did not exist."""
        await begin(store, new(workspace="w1"))
        assert (
            await store.send([Message("r", "m", "signal", workspace="w2"), Message("nobody", "m", "signal")])
            == [SendOutcome(SendStatus.NOT_FOUND)] * 2
        )
        assert (await read(store)).inbox_last == 0

    async def test_the_owner_is_named(self, store: Store) -> None:
        """The sender learns whom to nudge, and the owner finds the run among its unread ones."""
        await begin(store, new(owner="a"), new("r2"), new("r3", owner="a"))
        outcomes = await store.send([Message("r", "m", "signal"), Message("r2", "m", "signal")])
        assert [outcome.owner for outcome in outcomes] == ["a", None]
        assert await store.unread("a") == ["r"]
        assert await store.unread("b") == []
        await done(store, commit("r", inbox_read=1))
        assert await store.unread("a") == []

    async def test_S16_mail_wakes_a_sleeping_run(self, store: Store, builder: StoreBuilder) -> None:
        """An unowned run becomes due now; one that was due before keeps its place."""
        await begin(store, new(owner="a"), new("due", wake_at=builder.now() - 5))
        await done(store, suspend("r", builder.now() + FAR, activity=Activity.SLEEPING))
        await store.send([Message("r", "m", "signal"), Message("due", "m", "signal")])
        assert (await read(store)).wake_at == builder.now()
        assert (await read(store, "due")).wake_at == builder.now() - 5
        assert await claimed_ids(store) == ["due", "r"]

    async def test_a_scheduled_run_begins_no_sooner_for_its_mail(self, store: Store, builder: StoreBuilder) -> None:
        """A run that is not to begin yet keeps a signal for then; a cancel is no beginning, and reaches it now."""
        later = builder.now() + FAR
        await begin(store, new(wake_at=later), new("cancelled", wake_at=later))
        await store.send([Message("r", "m", "signal"), Message("cancelled", "m", "cancel")])
        assert ((await read(store)).wake_at, (await read(store)).inbox_last) == (later, 1)
        assert (await read(store, "cancelled")).wake_at == builder.now()
        assert await claimed_ids(store) == ["cancelled"]

    async def test_parked_runs_take_mail_and_stay_put(self, store: Store) -> None:
        """Paused and blocked runs keep the message for later."""
        await begin(store, new("paused", owner="a"), new("blocked", owner="a"))
        for run_id, activity in (("paused", Activity.PAUSED), ("blocked", Activity.BLOCKED)):
            await done(store, suspend(run_id, None, activity=activity))
            [outcome] = await store.send([Message(run_id, "m", "signal")])
            assert outcome.status is SendStatus.ACCEPTED
            run = await read(store, run_id)
            assert (run.inbox_last, run.wake_at) == (1, None)
        assert await claimed_ids(store) == []

    async def test_B49_concurrent_senders_lose_nothing(self, store: Store, other: Store) -> None:
        """Forty messages over two connections at once: forty numbers, forty ids."""
        await begin(store, new())
        sends = [(store, other)[n % 2].send([Message("r", f"m{n}", "signal")]) for n in range(40)]
        assert {outcome.status for [outcome] in await asyncio.gather(*sends)} == {SendStatus.ACCEPTED}
        [rows] = await store.inbox([("r", 0)])
        assert [row.number for row in rows] == list(range(1, 41))
        assert {row.message.id for row in rows} == {f"m{n}" for n in range(40)}

    async def test_S36_a_message_above_the_limit_is_refused(self, store: Store) -> None:
        """Too large a payload is a typed error, and nothing of that call is stored; the largest comes back."""
        limit = store.capabilities.max_payload
        await begin(store, new())
        with pytest.raises(PayloadTooLarge):
            await store.send([Message("r", "m1", "signal"), Message("r", "m2", "signal", payload=b"x" * (limit + 1))])
        assert (await read(store)).inbox_last == 0
        await store.send([Message("r", "m3", "signal", payload=b"\xfe" * limit)])
        [[row]] = await store.inbox([("r", 0)])
        assert row.message.payload == b"\xfe" * limit

    async def test_sending_nothing(self, store: Store) -> None:
        """An empty call is answered with an empty list."""
        assert await store.send([]) == []
