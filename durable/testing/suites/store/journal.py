"""Journal rows, read in the two ways there are, and hints."""

from __future__ import annotations

import asyncio
import os

from durable.core.journal import Entry
from durable.store.interface import Store
from durable.store.records import Commit, Journal
from durable.testing.facts import eventually
from durable.testing.suites.store.builder import Tests, begin, commit, done, entry, new, settled
from durable.testing.suites.store.runs import ODD


class JournalTests(Tests):
    async def test_B52_every_field_of_an_entry_comes_back(self, store: Store) -> None:
        """Both ways of reading give the entry that was written, field by field."""
        full = Entry(
            seq=1,
            at=9_007_199_254_740_993,
            kind="remote",
            status="completed",
            key=ODD,
            ordinal=7,
            name="payments.charge",
            attempt=3,
            fingerprint="f0",
            payload=b'{"big":12345678901234567890,"none":[],"nested":{"empty":{}}}',
            enqueued_at=11,
            started_at=12,
            finished_at=13,
        )
        assert None not in [getattr(full, name) for name in full.__struct_fields__]
        bare = Entry(seq=2, at=0, kind="timer", status="fired")
        await begin(store, new(owner="a"))
        await done(store, _of(full, bare))
        assert await store.page("r", 0, 10) == [full, bare]
        assert await store.load(["r"]) == [Journal([full, bare], 0)]

    async def test_B57_payloads_are_bytes(self, store: Store) -> None:
        """Any bytes come back as they were: zeros, broken UTF-8, nothing at all."""
        payloads = [b"", b"\x00", b"\xff\xfe\x00", "ů🐎".encode(), b"[]", b"1e400", os.urandom(5000), None]
        rows = [entry(n + 1, payload) for n, payload in enumerate(payloads)]
        await begin(store, new(owner="a"))
        await done(store, _of(*rows))
        assert [row.payload for row in await store.page("r", 0, 100)] == payloads
        assert [row.payload for row in (await store.load(["r"]))[0].entries] == payloads

    async def test_a_payload_of_the_largest_size(self, store: Store) -> None:
        """What just fits is stored and read."""
        payload = os.urandom(store.capabilities.max_payload)
        await begin(store, new(owner="a"))
        await done(store, _of(entry(1, payload)))
        assert (await store.load(["r"]))[0].entries[0].payload == payload

    async def test_load_answers_many_runs_in_order(self, store: Store) -> None:
        """Each run's rows, in order of seq, in the order asked; an unknown run has none."""
        await begin(store, *(new(f"r{n}", owner="a") for n in range(3)))
        await store.commit([commit(f"r{n}", entries=n + 1) for n in range(3)])
        journals = await store.load(["r2", "nobody", "r0", "r1"])
        assert [[row.seq for row in journal.entries] for journal in journals] == [[1, 2, 3], [], [1], [1, 2]]
        assert await store.load([]) == []

    async def test_logs_are_left_out_of_replay_and_counted(self, store: Store) -> None:
        """Log rows are paged but not loaded; those of the root scope are counted."""
        rows = (
            entry(1),
            entry(2, kind="log", status="written"),
            entry(3, kind="log", status="written", key="step:1"),
            entry(4, kind="log", status="written"),
            entry(5),
        )
        await begin(store, new(owner="a"))
        await done(store, _of(*rows))
        assert await store.load(["r"]) == [Journal([rows[0], rows[4]], 2)]
        assert await store.page("r", 0, 10) == list(rows)

    async def test_S33_pages_have_no_gap_and_no_repeat(self, store: Store) -> None:
        """Reading on from the last seq seen gives every row once, in order."""
        await begin(store, new(owner="a"))
        await done(store, commit("r", entries=25))
        seen: list[int] = []
        while page := await store.page("r", seen[-1] if seen else 0, 10):
            assert len(page) <= 10
            seen += [row.seq for row in page]
        assert seen == list(range(1, 26))
        assert await store.page("nobody", 0, 10) == []

    async def test_B51_a_long_journal_is_read_whole(self, store: Store) -> None:
        """Five thousand rows come in one load."""
        await begin(store, new(owner="a"))
        await done(store, commit("r", entries=5000))
        assert [row.seq for row in (await store.load(["r"]))[0].entries] == list(range(1, 5001))

    async def test_S43_another_connection_is_hinted(self, store: Store, other: Store) -> None:
        """What one connection changes, the other's listener hears of; after it stopped, no more."""
        heard: list[str] = []
        stop = other.listen(lambda: heard.append("hint"))
        await settled(heard)
        await begin(store, new())
        await eventually(lambda: heard, "the other was hinted")
        stop()
        stop()
        heard.clear()
        await begin(store, new("r2"))
        await asyncio.sleep(0.05)
        assert heard == []

    async def test_S43_two_engines_on_one_store_hint_each_other(self, store: Store) -> None:
        """Engines that share one store object in a process hear of each other's changes."""
        heard_a: list[str] = []
        heard_b: list[str] = []
        stops = [store.listen(lambda: heard_a.append("a")), store.listen(lambda: heard_b.append("b"))]
        await begin(store, new(owner="a"))
        await done(store, commit("r"))
        await eventually(lambda: heard_a and heard_b, "both were hinted")
        for stop in stops:
            stop()

    async def test_close_is_idempotent(self, other: Store) -> None:
        """A store may be closed twice."""
        await other.close()
        await other.close()


def _of(*rows: Entry) -> Commit:
    return Commit("r", 1, 0, "c", list(rows))
