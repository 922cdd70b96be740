"""Starting, reading, finding."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable.core.clock import SECOND
from durable.core.errors import PayloadTooLarge, StoreError
from durable.core.journal import Entry
from durable.protocol.states import Activity, Status
from durable.store.interface import Store
from durable.store.records import (
    CommitStatus,
    Lane,
    Parent,
    Rule,
    RunQuery,
    RunRecord,
    SetAttributes,
    StartOutcome,
    StartRun,
    StartStatus,
)
from durable.testing.suites.store.builder import (
    FAR,
    StoreBuilder,
    Tests,
    begin,
    claim,
    claimed_ids,
    commit,
    done,
    entry,
    new,
    read,
)

ODD = 'Žluťoučký 🐎 \'; DROP TABLE runs; -- %_\\ \t\n\x7f\u2028 "{}"'


class RunTests(Tests):
    async def test_a_new_run_is_due_at_once(self, store: Store, builder: StoreBuilder) -> None:
        """A run started without an owner is active, queued, unowned, at epoch 0, and due now."""
        await begin(store, new())
        run = await read(store)
        assert (run.status, run.activity, run.owner, run.epoch, run.seq) == (
            Status.ACTIVE,
            Activity.QUEUED,
            None,
            0,
            0,
        )
        assert run.wake_at == run.created_at == run.updated_at == builder.now()
        assert run.started_at is None

    async def test_a_run_for_later_is_scheduled(self, store: Store, builder: StoreBuilder) -> None:
        """A run with a wake time to come is shown as scheduled, and is not claimed before."""
        await begin(store, new(wake_at=builder.now() + FAR))
        assert (await read(store)).activity is Activity.SCHEDULED
        assert await claimed_ids(store) == []

    async def test_a_run_may_be_born_claimed(self, store: Store, builder: StoreBuilder) -> None:
        """With an owner, the run is executing at epoch 1 with its first rows, and nobody else gets it."""
        first = Entry(1, 5, "run", "started", payload=b'{"python":"3.11"}')
        await begin(store, new(owner="a", entries=(first,)))
        run = await read(store)
        assert (run.owner, run.epoch, run.seq, run.activity, run.started_at) == (
            "a",
            1,
            1,
            Activity.EXECUTING,
            builder.now(),
        )
        assert await store.page("r", 0, 10) == [first]
        assert await claimed_ids(store, "b") == []

    async def test_B52_every_field_of_a_new_run_comes_back(self, store: Store, builder: StoreBuilder) -> None:
        """What was given to start is what is read, field by field, none dropped, none at its default."""
        given = new(
            workspace="shop:prod",
            input=b'{"n":9007199254740993,"e":[],"o":{}}',
            input_hash="sha:1",
            idempotency_key=ODD,
            priority=-3,
            tags=("vip", ODD),
            attributes={"text": ODD, "big": 9_007_199_254_740_993, "float": 0.1, "yes": True, "no": False, "zero": 0},
            parent=Parent("p", "child:1", 4),
            wake_at=builder.now() + 5,
            lane=Lane("customer 7", (Rule("slots", 3), Rule("pace", 2, "throttle", 60)), 2.5),
            meta=b'{"appName":"shop"}',
        )
        unlike_default = {"owner", "entries"}  # a run that is born claimed has its own test
        for name, default in zip(
            given.__struct_fields__[-len(given.__struct_defaults__) :], given.__struct_defaults__, strict=True
        ):
            assert name in unlike_default or getattr(given, name) != default, f"{name} is not tried"
        await begin(store, given)
        run = await read(store)
        stored = {name: getattr(run, name) for name in given.__struct_fields__ if hasattr(run, name)}
        assert stored == {**{name: getattr(given, name) for name in stored}, "lane": "customer 7"}
        assert len(stored) == len(given.__struct_fields__) - 1, "entries is the only field that is no column"
        assert {name: type(value) for name, value in run.attributes.items()} == {
            name: type(value) for name, value in given.attributes.items()
        }

    async def test_a_large_float_stays_a_float(self, store: Store) -> None:
        """Attributes keep their type also where a number's shortest form has no point, at a start and in a commit."""
        given = {"a": 1e22, "b": -1e16, "c": 1.5e300, "d": 2.0, "e": 1e-9, "f": 10**16}
        await begin(store, new(owner="a", attributes=given))
        for name in ("at the start", "set"):
            found = (await read(store)).attributes
            assert {k: (type(v), v) for k, v in found.items()} == {k: (type(v), v) for k, v in given.items()}, name
            if name == "at the start":
                await done(store, commit("r", effects=(SetAttributes(given),)))

    async def test_a_run_may_begin_with_a_copied_prefix(self, store: Store) -> None:
        """Without an owner but with rows: they are its journal, seq is theirs, it is due at epoch 0, and goes on from there."""
        rows = tuple(entry(n + 1) for n in range(3))
        await begin(store, new(entries=rows), new("later", entries=rows[:1], wake_at=1))
        run = await read(store)
        assert (run.owner, run.epoch, run.seq, run.activity, run.started_at) == (None, 0, 3, Activity.QUEUED, None)
        assert await store.page("r", 0, 10) == list(rows)
        [later, taken] = await claim(store)
        assert (taken.run.seq, taken.run.epoch, later.run.seq) == (3, 1, 1)
        assert (await done(store, commit(taken.run))).seq == 4
        with pytest.raises(StoreError):
            await store.start([new("gap", entries=(entry(2),))])

    async def test_starting_the_same_id_again_makes_nothing(self, store: Store) -> None:
        """A start whose reply was lost can be repeated."""
        await begin(store, new())
        assert await store.start([new()]) == [StartOutcome(StartStatus.EXISTING, "r")]

    async def test_S24_same_key_same_input_is_the_same_run(self, store: Store) -> None:
        """A key finds its run while the row lives, finished or not; another input is a conflict that names the run."""
        key = {"idempotency_key": "order-1", "input_hash": "h1"}
        await begin(store, new("r1", owner="a", **key))
        await done(store, commit("r1", status=Status.COMPLETED))
        assert await store.start([new("r2", **key), new("r3", **{**key, "input_hash": "h2"})]) == [
            StartOutcome(StartStatus.EXISTING, "r1"),
            StartOutcome(StartStatus.CONFLICT, "r1"),
        ]
        assert await store.get(["r2", "r3"]) == [None, None]

    async def test_S24_keys_belong_to_a_workspace_and_a_workflow(self, store: Store) -> None:
        """The same key elsewhere is another key."""
        await begin(store, new("r1", idempotency_key="k"))
        await begin(store, new("r2", idempotency_key="k", workspace="w2"))
        await begin(store, new("r3", idempotency_key="k", workflow="refund"))

    async def test_one_conflict_harms_no_neighbour(self, store: Store) -> None:
        """In one call, each start is answered on its own, in order, also against its neighbours."""
        await begin(store, new("r0", idempotency_key="taken", input_hash="x"))
        outcomes = await store.start(
            [
                new("r1"),
                new("r2", idempotency_key="taken", input_hash="y"),
                new("r3", idempotency_key="fresh"),
                new("r4", idempotency_key="fresh"),
                new("r1"),
            ]
        )
        assert outcomes == [
            StartOutcome(StartStatus.STARTED, "r1"),
            StartOutcome(StartStatus.CONFLICT, "r0"),
            StartOutcome(StartStatus.STARTED, "r3"),
            StartOutcome(StartStatus.EXISTING, "r3"),
            StartOutcome(StartStatus.EXISTING, "r1"),
        ]

    async def test_one_start_given_twice_has_one_journal(self, store: Store) -> None:
        """The same born run twice in one call, or as the effect of two commits of one batch, is made once, with one set of
        rows; its neighbours with theirs."""
        first, second = new("r1", owner="a", entries=(entry(1),)), new("r2", owner="a", entries=(entry(1), entry(2)))
        outcomes = await store.start([first, second, first])
        assert [outcome.status for outcome in outcomes] == [
            StartStatus.STARTED,
            StartStatus.STARTED,
            StartStatus.EXISTING,
        ]
        effects = (StartRun(new("r3", owner="a", entries=(entry(1),))),)
        batch = [commit("r1", seq=1, effects=effects), commit("r2", seq=2, effects=effects)]
        assert [outcome.status for outcome in await store.commit(batch)] == [CommitStatus.DONE, CommitStatus.DONE]
        journals = await store.load(["r1", "r2", "r3"])
        assert [len(journal.entries) for journal in journals] == [2, 3, 1]

    async def test_B24_fifty_concurrent_starts_with_one_key_are_one_run(self, store: Store, other: Store) -> None:
        """Over two connections, fifty starts with one key and fifty ids make one run, and all learn which."""
        starts = [
            (store, other)[n % 2].start([new(f"r{n}", idempotency_key="once", input_hash="h")]) for n in range(50)
        ]
        outcomes = [outcome for [outcome] in await asyncio.gather(*starts)]
        assert sum(outcome.status is StartStatus.STARTED for outcome in outcomes) == 1
        assert len({outcome.run_id for outcome in outcomes}) == 1
        assert len((await store.find(RunQuery(limit=100))).runs) == 1

    async def test_a_thousand_starts_in_one_call(self, store: Store) -> None:
        """A call takes as many as it is given."""
        await begin(store, *(new(f"r{n}") for n in range(1000)))
        assert all(await store.get([f"r{n}" for n in range(1000)]))

    async def test_get_answers_in_order(self, store: Store) -> None:
        """Unknown ids are None, repeated ones repeated."""
        await begin(store, new("r1"), new("r2"))
        answers = await store.get(["r2", "nobody", "r1", "r2"])
        assert [run and run.id for run in answers] == ["r2", None, "r1", "r2"]
        assert await store.get([]) == []

    async def test_a_read_run_is_a_copy(self, store: Store) -> None:
        """Changing what was read changes nothing stored."""
        await begin(store, new())
        run = await read(store)
        run.activity = Activity.BLOCKED
        assert (await read(store)).activity is Activity.QUEUED

    async def test_S36_an_input_above_the_limit_is_refused(self, store: Store) -> None:
        """A payload that does not fit is a typed error and leaves nothing; one that just fits comes back."""
        limit = store.capabilities.max_payload
        with pytest.raises(PayloadTooLarge):
            await store.start([new("big", input=b"x" * (limit + 1)), new("small")])
        assert await store.get(["big", "small"]) == [None, None]
        await begin(store, new("just", input=b"x" * limit))
        assert (await read(store, "just")).input == b"x" * limit

    async def test_a_large_input_outlives_commits(self, store: Store) -> None:
        """The input is what it was, however large and however often its run changes."""
        inputs = {f"r{size}": b"\x00\xff" * (size // 2) for size in (0, 1998, 2000, 2002, 100_000)}
        await begin(store, *(new(run_id, input=given, owner="a") for run_id, given in inputs.items()))
        for run_id in inputs:
            await done(store, commit(run_id))
        assert {run.id: run.input for run in await store.get(list(inputs)) if run} == inputs

    async def test_find_filters_and_is_newest_first(self, store: Store, builder: StoreBuilder) -> None:
        """Each filter alone gives the runs that match it, newest first; together they are ANDed."""
        await begin(store, new("r1", workspace="w1", tags=("red",)))
        builder.advance(1)
        await begin(store, new("r2", workflow="refund", idempotency_key="k", parent=Parent("r1", "c", 0)))
        builder.advance(1)
        await begin(store, new("r3", workspace="w1", tags=("red", "blue"), owner="a"))
        await done(store, commit("r3", status=Status.FAILED, error=b"{}"))
        for query, expected in (
            (RunQuery(), ["r3", "r2", "r1"]),
            (RunQuery(workspace="w1"), ["r3", "r1"]),
            (RunQuery(workflow="refund"), ["r2"]),
            (RunQuery(status=Status.FAILED), ["r3"]),
            (RunQuery(status=Status.ACTIVE, activity=Activity.QUEUED), ["r2", "r1"]),
            (RunQuery(tag="red"), ["r3", "r1"]),
            (RunQuery(tag="blue", workspace="w1"), ["r3"]),
            (RunQuery(idempotency_key="k"), ["r2"]),
            (RunQuery(parent="r1"), ["r2"]),
            (RunQuery(tag="red", workflow="refund"), []),
        ):
            assert [run.id for run in (await store.find(query)).runs] == expected, query

    async def test_find_by_attributes_times_and_sets(self, store: Store, builder: StoreBuilder) -> None:
        """Attributes by type and value, workflows and statuses by membership, creation between two times; all ANDed."""
        began = builder.now()
        for n, value in enumerate((1, 1.0, True, "1", 0, False, "")):
            await begin(store, new(f"r{n}", attributes={"a": value, "b": n}, workflow=f"w{n % 3}"))
            builder.advance(1)
        await begin(store, new("plain", owner="a"))
        await done(store, commit("plain", status=Status.DEAD))
        every = ["plain", "r6", "r5", "r4", "r3", "r2", "r1", "r0"]
        for n, value in enumerate((1, 1.0, True, "1", 0, False, "")):
            assert await _found(store, attributes={"a": value}) == [f"r{n}"], repr(value)
        second = began + SECOND
        for fields, expected in (
            ({"attributes": {"a": 1, "b": 0}}, ["r0"]),
            ({"attributes": {"a": 1, "b": 1}}, []),
            ({"attributes": {"none": 1}}, []),
            ({"workflows": ("w1", "checkout")}, ["plain", "r4", "r1"]),
            ({"workflows": ()}, []),
            ({"workflows": ("w1", "w2"), "workflow": "w2"}, ["r5", "r2"]),
            ({"statuses": (Status.DEAD, Status.FAILED)}, ["plain"]),
            ({"statuses": (Status.DEAD, Status.ACTIVE)}, every),
            ({"statuses": ()}, []),
            ({"since": second, "until": second + 2 * SECOND}, ["r2", "r1"]),
            ({"since": second + 1, "until": second + 2 * SECOND + 1}, ["r3", "r2"]),
            ({"oldest_first": True}, every[::-1]),
            ({"oldest_first": True, "limit": 2, "workflows": ("w0",)}, ["r0", "r3"]),
        ):
            assert await _found(store, **fields) == expected, fields

    async def test_A14_text_is_literal(self, store: Store) -> None:
        """Id, workflow's name or idempotency key contain it, small and capital letters alike; `%`, `_`, quotes and
        backslashes match themselves only."""
        await begin(
            store, new("Order-7", idempotency_key="a%b"), new("x1", workflow="Send_Mail", idempotency_key="A_B")
        )
        await begin(store, new("x2", idempotency_key="a\\'\"b"), new("x3", tags=("order",), input=b'"order"'))
        for text, expected in (
            ("ORDER-", ["Order-7"]),
            ("send_m", ["x1"]),
            ("sendxm", []),
            ("%", ["Order-7"]),
            ("a_", ["x1"]),
            ("\\", ["x2"]),
            ("'\"", ["x2"]),
            ("check", ["x3", "x2", "Order-7"]),
            ("", ["x3", "x2", "x1", "Order-7"]),
        ):
            assert await _found(store, text=text) == expected, text

    async def test_find_pages_oldest_first_too(self, store: Store) -> None:
        """Following cursors meets every run once, those started meanwhile at the end."""
        for n in range(7):
            await begin(store, new(f"r{n}", tags=("odd",) if n % 2 else ()))
        seen: list[str] = []
        cursor = None
        while True:
            page = await store.find(RunQuery(limit=2, cursor=cursor, oldest_first=True, tag="odd"))
            seen += [run.id for run in page.runs]
            cursor = page.cursor
            if cursor is None:
                break
            if len(seen) == 2:
                await begin(store, new("late", tags=("odd",)))
        assert seen == ["r1", "r3", "r5", "late"]

    async def test_A14_filters_are_literal(self, store: Store) -> None:
        """`%`, `_`, quotes and brackets match themselves only."""
        for n, text in enumerate(("a%", "a_", "ab", 'a"', "a']", "a\\")):
            await begin(store, new(f"r{n}", workspace=text, tags=(text,), idempotency_key=text))
        for n, text in enumerate(("a%", "a_", "ab", 'a"', "a']", "a\\")):
            for query in (RunQuery(workspace=text), RunQuery(tag=text), RunQuery(idempotency_key=text)):
                assert [run.id for run in (await store.find(query)).runs] == [f"r{n}"], query

    async def test_find_pages_to_the_end(self, store: Store) -> None:
        """Following cursors meets every run once; a run started meanwhile does not shift the pages."""
        for n in range(7):
            await begin(store, new(f"r{n}"))
        seen: list[RunRecord] = []
        cursor = None
        for n in range(10):
            page = await store.find(RunQuery(limit=3, cursor=cursor))
            seen += page.runs
            cursor = page.cursor
            if cursor is None:
                break
            await begin(store, new(f"late{n}"))
        assert [run.id for run in seen] == [f"r{n}" for n in reversed(range(7))]

    async def test_children_are_listed_oldest_first(self, store: Store, builder: StoreBuilder) -> None:
        """All runs whose parent this is, and nobody else's."""
        for n in (2, 1, 3):
            await begin(store, new(f"c{n}", parent=Parent("p", f"c:{n}", n)))
            builder.advance(1)
        await begin(store, new("stranger", parent=Parent("q", "c", 0)))
        assert [run.id for run in await store.children("p")] == ["c2", "c1", "c3"]
        assert await store.children("nobody") == []


async def _found(store: Store, **fields: Any) -> list[str]:
    return [run.id for run in (await store.find(RunQuery(**fields))).runs]
