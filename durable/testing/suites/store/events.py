"""Events: accepted once, each trigger answered for, and those who wait for them found."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from durable.core.clock import SECOND
from durable.core.errors import PayloadTooLarge, StoreError
from durable.protocol.states import Activity, Status
from durable.store.admission import (
    Admission,
    Batch,
    Debounce,
    EventOutcome,
    EventQuery,
    EventRecord,
    NewEvent,
    Rate,
    Singleton,
    Trigger,
    Verdict,
    Waiter,
)
from durable.store.interface import Store
from durable.store.items import Fire, NewItem, Occurrence
from durable.store.records import CloseWaiter, Lane, Message, OpenWaiter, PruneRequest, Rule
from durable.testing.facts import eventually
from durable.testing.suites.store.builder import (
    FAR,
    StoreBuilder,
    Tests,
    begin,
    claim,
    claimed_ids,
    commit,
    done,
    later,
    new,
    read,
    settled,
    suspend,
)


class EventTests(Tests):
    async def test_an_event_is_stored_as_it_was(self, store: Store, builder: StoreBuilder) -> None:
        """Every field comes back, in the answer and in the list; numbers rise."""
        given = NewEvent("e1", "order.paid ☂", b'{"n":1}', "shop.dev", "d1", b'{"app":"shop"}')
        [outcome] = await store.publish([given])
        event = outcome.event
        assert not outcome.duplicate
        assert outcome.waiters == ()
        assert (event.id, event.name, event.data, event.workspace) == ("e1", "order.paid ☂", b'{"n":1}', "shop.dev")
        assert (event.dedupe_id, event.meta, event.received_at) == ("d1", b'{"app":"shop"}', builder.now())
        assert (event.admissions, event.settled) == ((), True)
        assert await store.events(EventQuery("shop.dev")) == [event]
        assert await store.events(EventQuery()) == []
        [later] = await publish(store, NewEvent("e2", "n", b"1", "shop.dev"))
        assert later.event.number > event.number

    async def test_S23_an_event_is_accepted_once(self, store: Store, builder: StoreBuilder) -> None:
        """The same id, or the same dedupe_id in its workspace, changes nothing and is answered with the event there is."""
        first = NewEvent("e1", "n", b"1", dedupe_id="d", triggers=(Trigger(new("r1")),))
        [outcome] = await publish(store, first)
        later(store, builder, 1)
        again = NewEvent("e2", "other", b"2", dedupe_id="d", triggers=(Trigger(new("r2")),))
        same = NewEvent("e1", "n", b"1", triggers=(Trigger(new("r3")),))
        assert await store.publish([first, again, same]) == [EventOutcome(outcome.event, True)] * 3
        assert await store.get(["r2", "r3"]) == [None, None]
        assert await store.events(EventQuery()) == [outcome.event]
        [elsewhere] = await publish(store, NewEvent("e3", "n", b"1", "v", dedupe_id="d"))
        assert not elsewhere.duplicate

    async def test_a_dedupe_id_counts_within_one_call(self, store: Store) -> None:
        """The second of a pair in one call is the first's duplicate; the order given is the order of numbers."""
        events = [NewEvent(f"e{n}", "n", b"1", dedupe_id=f"d{n // 2}", triggers=go(f"r{n}")) for n in range(6)]
        outcomes = await store.publish(events)
        assert [outcome.duplicate for outcome in outcomes] == [False, True] * 3
        assert [outcome.event.id for outcome in outcomes] == ["e0", "e0", "e2", "e2", "e4", "e4"]
        assert sorted(await claimed_ids(store)) == ["r0", "r2", "r4"]

    async def test_S23_publishers_race_for_a_dedupe_id(self, store: Store, other: Store) -> None:
        """Many at once over two connections: one event, one run, and everybody is told of that one."""
        for n in range(10):
            events = [NewEvent(f"e{n}.{k}", "n", b"1", dedupe_id=f"d{n}", triggers=go(f"r{n}.{k}")) for k in range(6)]
            answers = await asyncio.gather(*((store, other)[k % 2].publish([one]) for k, one in enumerate(events)))
            assert sorted(answer.duplicate for [answer] in answers) == [False] + [True] * 5
            assert len({answer.event.id for [answer] in answers}) == 1
        assert len(await claimed_ids(store)) == 10

    async def test_a_trigger_starts_its_run(self, store: Store, builder: StoreBuilder) -> None:
        """Without policies each trigger is a run of its own, due at once, or when it says."""
        triggers = (Trigger(new("r1", meta=b"{}")), Trigger(new("r2", workflow="refund", wake_at=builder.now() + 5)))
        [outcome] = await publish(store, NewEvent("e", "n", b"1", triggers=triggers))
        assert outcome.event.admissions == (
            Admission("checkout", Verdict.STARTED, "r1", True),
            Admission("refund", Verdict.STARTED, "r2", True),
        )
        assert await store.events(EventQuery()) == [outcome.event]
        assert await claimed_ids(store) == ["r1"]
        assert (await read(store, "r2")).activity is Activity.SCHEDULED

    async def test_a_trigger_whose_key_is_taken_names_that_run(self, store: Store) -> None:
        """A run with its id or idempotency key is the one the event is in, and is not new."""
        await begin(store, new("there", idempotency_key="k", input_hash="h"))
        trigger = Trigger(new("r", idempotency_key="k", input_hash="h"))
        [outcome] = await publish(store, NewEvent("e", "n", b"1", triggers=(trigger,)))
        assert outcome.event.admissions == (Admission("checkout", Verdict.STARTED, "there", False),)
        assert await store.get(["r"]) == [None]

    async def test_an_event_too_large_is_refused(self, store: Store) -> None:
        """Data, or a run's input: a typed error, and nothing of the call is stored."""
        big = b"x" * (store.capabilities.max_payload + 1)
        small = NewEvent("small", "n", b"1", triggers=go("r1"))
        for bad in (NewEvent("e", "n", big), NewEvent("e", "n", b"1", triggers=(Trigger(new("r2", input=big)),))):
            with pytest.raises(PayloadTooLarge):
                await store.publish([small, bad])
        assert await store.get(["r1", "r2"]) == [None, None]
        assert await store.events(EventQuery()) == []

    async def test_S43_an_events_run_is_hinted(self, store: Store, other: Store) -> None:
        """Another connection hears of a run that an event starts, and of one that a schedule starts."""
        heard: list[str] = []
        stop = other.listen(lambda: heard.append("hint"))
        await settled(heard)
        await publish(store, NewEvent("e", "n", b"1", triggers=go("r1")))
        await eventually(lambda: heard, "the other was hinted of the event's run")
        await settled(heard)
        await store.fire([Fire(NewItem("w", "schedule", "s", b"1"), (Occurrence(1, new("r2")),))])
        await eventually(lambda: heard, "the other was hinted of the schedule's run")
        stop()

    # ------------------------------------------------------------------ rate

    async def test_S27_a_rate_drops_what_is_above(self, store: Store, builder: StoreBuilder) -> None:
        """At most so many in any period that slides; a drop is declared and uses nothing up."""
        rate = Rate("rate", 2, 10 * SECOND)
        seen = []
        for n, wait in enumerate((0, 4, 4, 1.999_999, 0.000_001, 0, 4, 0)):
            later(store, builder, wait)
            [outcome] = await publish(store, NewEvent(f"e{n}", "n", b"1", triggers=(Trigger(new(f"r{n}"), rate=rate),)))
            [admission] = outcome.event.admissions
            seen.append(admission.verdict is Verdict.STARTED)
            assert admission.run_id == (f"r{n}" if seen[-1] else None)
            assert admission.new is seen[-1]
        # At 0, 4, 8, 9.999999, 10, 10, 14 and 14 seconds.
        assert seen == [True, True, False, False, True, False, True, False]
        assert sorted(await claimed_ids(store)) == ["r0", "r1", "r4", "r6"]

    async def test_rates_are_by_key(self, store: Store) -> None:
        """Another key's admissions are nobody's business; of several triggers each has its own verdict; 0 lets none in."""
        triggers = tuple(Trigger(new(f"r{n}"), rate=Rate(f"k{n % 2}", n % 2, SECOND)) for n in range(4))
        [outcome] = await publish(store, NewEvent("e", "n", b"1", triggers=triggers))
        verdicts = [admission.verdict for admission in outcome.event.admissions]
        assert verdicts == [Verdict.DROPPED, Verdict.STARTED, Verdict.DROPPED, Verdict.DROPPED]

    async def test_S27_a_rate_holds_for_publishers_at_once(self, store: Store, other: Store) -> None:
        """Over two connections at once never one too many is let in, and never one too few."""
        for round_ in range(5):
            rate = Rate(f"k{round_}", 7, SECOND)
            triggers = [(Trigger(new(f"r{round_}.{n}"), rate=rate),) for n in range(20)]
            events = [NewEvent(f"e{round_}.{n}", "n", b"1", triggers=one) for n, one in enumerate(triggers)]
            await asyncio.gather(*((store, other)[n % 2].publish([one]) for n, one in enumerate(events)))
            runs = await store.get([f"r{round_}.{n}" for n in range(20)])
            assert sum(run is not None for run in runs) == 7

    # ------------------------------------------------------------------ singleton

    async def test_a_singleton_skips_while_one_is_unfinished(self, store: Store) -> None:
        """The one in the way is named; when it has ended the next begins; keys are apart."""
        assert (await admit(store, "r1", singleton=Singleton("k"))).verdict is Verdict.STARTED
        skipped = await admit(store, "r2", singleton=Singleton("k"))
        assert skipped == Admission("checkout", Verdict.SKIPPED, "r1")
        assert (await admit(store, "r3", singleton=Singleton("k2"))).verdict is Verdict.STARTED
        assert await store.get(["r2"]) == [None]
        for claimed in await claim(store):
            await done(store, commit(claimed.run, status=Status.FAILED))
        assert (await admit(store, "r4", singleton=Singleton("k"))).new

    async def test_a_singleton_skips_and_uses_no_rate(self, store: Store) -> None:
        """What is skipped was not admitted; what is above the rate is dropped before anything else is asked."""
        policies: dict[str, Any] = {"rate": Rate("k", 2, SECOND), "singleton": Singleton("k")}
        assert (await admit(store, "r1", **policies)).verdict is Verdict.STARTED
        assert (await admit(store, "r2", **policies)).verdict is Verdict.SKIPPED
        [claimed] = await claim(store)
        await done(store, commit(claimed.run, status=Status.COMPLETED))
        assert (await admit(store, "r3", **policies)).verdict is Verdict.STARTED
        assert (await admit(store, "r4", **policies)).verdict is Verdict.DROPPED

    async def test_a_singleton_asks_the_old_one_to_stop(self, store: Store, builder: StoreBuilder) -> None:
        """`cancel`: the new run begins, the old one has a cancel in its inbox and is due; once it has ended it is let be."""
        mode = Singleton("k", "cancel")
        assert (await admit(store, "r1", singleton=mode)).cancelled is None
        [claimed] = await claim(store)
        await done(store, suspend(claimed.run, builder.now() + FAR))
        assert await admit(store, "r2", singleton=mode) == Admission("checkout", Verdict.STARTED, "r2", True, "r1")
        [[row]] = await store.inbox([("r1", 0)])
        assert (row.message.kind, row.message.id, row.message.run_id) == ("cancel", "singleton:r2", "r1")
        assert row.message.payload is not None
        assert list(json.loads(row.message.payload)) == ["reason"]
        assert (await read(store, "r1")).wake_at == builder.now()
        assert await admit(store, "r3", singleton=mode) == Admission("checkout", Verdict.STARTED, "r3", True, "r2")
        for run in await claim(store):
            await done(store, commit(run.run, status=Status.CANCELLED))
        assert (await admit(store, "r4", singleton=mode)).cancelled is None

    async def test_a_singleton_is_one_for_publishers_at_once(self, store: Store, other: Store) -> None:
        """Two connections at once: one run, the others are told of it."""
        for round_ in range(8):
            asked = [
                admit((store, other)[n % 2], f"r{round_}.{n}", singleton=Singleton(f"k{round_}")) for n in range(6)
            ]
            answers = await asyncio.gather(*asked)
            assert sorted(answer.new for answer in answers) == [False] * 5 + [True]
            assert len({answer.run_id for answer in answers}) == 1

    # ------------------------------------------------------------------ debounce

    async def test_S28_a_debounced_run_gets_the_last_event(self, store: Store, builder: StoreBuilder) -> None:
        """Each event moves the run by a period and replaces its input and meta; then the next begins another."""
        rule = Debounce("k", 10 * SECOND)
        for n in range(3):
            answer = await admit(store, f"r{n}", debounce=rule, input=b'{"n":%d}' % n, meta=b'{"m":%d}' % n)
            assert answer == Admission("checkout", Verdict.DEBOUNCED, "r0", n == 0)
            run = await read(store, "r0")
            assert (run.activity, run.wake_at) == (Activity.SCHEDULED, builder.now() + 10 * SECOND)
            assert (run.input, run.meta) == (b'{"n":%d}' % n, b'{"m":%d}' % n)
            later(store, builder, 9.999_999)
        assert await claimed_ids(store) == []
        assert await store.get(["r1", "r2"]) == [None, None]
        later(store, builder, 0.000_001)
        # It is due, so it is nobody's to change, claimed or not.
        assert await admit(store, "r3", debounce=rule, input=b"3") == Admission(
            "checkout", Verdict.DEBOUNCED, "r3", True
        )
        [claimed] = await claim(store)
        assert (claimed.run.id, claimed.run.input) == ("r0", b'{"n":2}')
        assert (await admit(store, "r4", debounce=rule)).run_id == "r3"

    async def test_S28_a_debounce_waits_no_longer_than_it_may(self, store: Store, builder: StoreBuilder) -> None:
        """`max_wait_us` after the first event the run is due, whatever comes."""
        rule, first = Debounce("k", 10 * SECOND, 15 * SECOND), builder.now()
        wakes = []
        for n in range(4):
            await admit(store, f"r{n}", debounce=rule)
            wakes.append(((await read(store, "r0")).wake_at or 0) - first)
            later(store, builder, 4)
        assert wakes == [10 * SECOND, 14 * SECOND, 15 * SECOND, 15 * SECOND]
        assert await claimed_ids(store) == ["r0"]
        short = Debounce("k2", 10 * SECOND, 3 * SECOND)
        await admit(store, "s", debounce=short)
        assert (await read(store, "s")).wake_at == builder.now() + 3 * SECOND

    async def test_debounces_are_by_key(self, store: Store) -> None:
        """Another key, another run."""
        ids = [(await admit(store, f"r{n}", debounce=Debounce(f"k{n % 2}", SECOND))).run_id for n in range(4)]
        assert ids == ["r0", "r1", "r0", "r1"]

    async def test_a_debounced_run_that_was_cancelled_takes_no_event(self, store: Store) -> None:
        """A run that is due to be cancelled, or is over, is not joined."""
        rule = Debounce("k", 10 * SECOND)
        await admit(store, "r0", debounce=rule)
        await store.send([Message("r0", "stop", "cancel")])
        assert (await admit(store, "r1", debounce=rule)).run_id == "r1"

    async def test_S28_debounce_under_publishers_at_once(self, store: Store, other: Store) -> None:
        """Two connections at once: one run has them all, and the last of them is its input."""
        for n in range(8):
            rule = Debounce(f"k{n}", SECOND)
            asked = [admit((store, other)[k % 2], f"r{n}.{k}", debounce=rule, input=b"%d" % k) for k in range(6)]
            answers = await asyncio.gather(*asked)
            assert sorted(answer.new for answer in answers) == [False] * 5 + [True]
            [run_id] = {answer.run_id for answer in answers}
            last = (await store.events(EventQuery(newest_first=True, limit=1)))[0]
            assert run_id is not None
            assert last.id == f"e-r{n}.{(await read(store, run_id)).input.decode()}"

    async def test_a_singleton_lets_an_event_join_its_run(self, store: Store) -> None:
        """The waiting run of a debounce is in nobody's way; once it has begun it is."""
        policies: dict[str, Any] = {"debounce": Debounce("k", 10 * SECOND), "singleton": Singleton("k")}
        await admit(store, "r0", **policies)
        assert (await admit(store, "r1", **policies)).verdict is Verdict.DEBOUNCED
        await store.send([Message("r0", "stop", "cancel")])
        assert await admit(store, "r2", **policies) == Admission("checkout", Verdict.SKIPPED, "r0")

    async def test_a_batch_too_large_is_in_its_singletons_way(self, store: Store) -> None:
        """An event that does not fit into the batch that waits cannot join it, so that one is an unfinished run like any
        other; it is due, for nothing more comes to it."""
        text = "x" * (store.capabilities.max_payload // 2)
        for mode, verdict in (("skip", Verdict.SKIPPED), ("cancel", Verdict.BATCHED)):
            answers = [
                await admit(
                    store,
                    f"{mode}{n}",
                    batch=Batch(mode, 9, 10 * SECOND, json.dumps(text).encode()),
                    singleton=Singleton(mode, mode),
                    input=b'{"data":[' + json.dumps(text).encode() + b"]}",
                )
                for n in range(2)
            ]
            assert [answer.verdict for answer in answers] == [Verdict.BATCHED, verdict]
            assert answers[1].cancelled == (None if mode == "skip" else "cancel0")
        assert sorted(await claimed_ids(store)) == ["cancel0", "skip0"]

    # ------------------------------------------------------------------ batch

    async def test_S28_a_batch_is_full_or_late(self, store: Store, builder: StoreBuilder) -> None:
        """Up to max_size events in one run, in order; due at the first's timeout, or at once when it is full. The window
        does not move."""
        rule_wake = builder.now() + 10 * SECOND
        for n in range(2):
            answer = await batched(store, n)
            assert answer == Admission("checkout", Verdict.BATCHED, "r0", n == 0)
            later(store, builder, 1)
        run = await read(store, "r0")
        assert (run.activity, run.wake_at, run.input) == (Activity.SCHEDULED, rule_wake, b'{"data":[0,1]}')
        assert (await batched(store, 2)).run_id == "r0"
        run = await read(store, "r0")
        assert (run.activity, run.wake_at, run.input) == (Activity.QUEUED, builder.now(), b'{"data":[0,1,2]}')
        assert await batched(store, 3) == Admission("checkout", Verdict.BATCHED, "r3", True)
        later(store, builder, 10)
        assert (await batched(store, 4)).run_id == "r4"
        taken = {claimed.run.id: claimed.run.input for claimed in await claim(store)}
        assert taken == {"r0": b'{"data":[0,1,2]}', "r3": b'{"data":[3]}'}

    async def test_a_batch_of_one_is_full(self, store: Store) -> None:
        """It is due at once, and the next event begins another."""
        for n in range(2):
            assert (await batched(store, n, max_size=1)).run_id == f"r{n}"
        assert sorted(await claimed_ids(store)) == ["r0", "r1"]

    async def test_A20_a_batch_too_large_counts_as_full(self, store: Store) -> None:
        """What would not fit into the store begins the next batch, and the one before is due: nothing is lost."""
        text = "x" * (store.capabilities.max_payload // 2 - 20)
        for n in range(3):
            assert (await batched(store, n, text, max_size=9)).run_id == ("r0" if n < 2 else "r2")
        [claimed] = await claim(store)
        assert json.loads(claimed.run.input) == {"data": [text, text]}
        assert json.loads((await read(store, "r2")).input) == {"data": [text]}

    async def test_B38_every_event_is_in_exactly_one_batch(self, store: Store, other: Store) -> None:
        """S28: publishers over two connections at once; runs hold each event once, no run holds more than it may."""
        answers = await asyncio.gather(*(batched((store, other)[n % 2], n, max_size=4) for n in range(30)))
        runs = await store.get(sorted({answer.run_id for answer in answers if answer.run_id}))
        batches = {run.id: json.loads(run.input)["data"] for run in runs if run}
        assert sorted(n for batch in batches.values() for n in batch) == list(range(30))
        assert sorted(map(len, batches.values())) == [2] + [4] * 7
        for n, answer in enumerate(answers):
            assert answer.run_id is not None
            assert n in batches[answer.run_id]

    # ------------------------------------------------------------------ waits

    async def test_S19_those_who_wait_are_named(self, store: Store, builder: StoreBuilder) -> None:
        """Open waits for that name in that workspace, with all there is to decide them; not the closed, not the expired,
        not those of runs that have ended."""
        now = builder.now()
        waits = {
            "r1": (OpenWaiter("w1", "paid", b'{"a":1}', now + 1), OpenWaiter("w2", "paid"), OpenWaiter("x", "other")),
            "expired": (OpenWaiter("w", "paid", expires_at=now),),
            "closed": (OpenWaiter("w", "paid"), CloseWaiter("w")),
            "renamed": (OpenWaiter("w", "paid"), OpenWaiter("w", "other")),
            "ended": (OpenWaiter("w", "paid"),),
        }
        for run_id, effects in waits.items():
            await begin(store, new(run_id, owner="a"))
            run = await done(store, commit(run_id, effects=effects))
            if run_id == "ended":
                await done(store, commit(run, status=Status.COMPLETED))
        await begin(store, new("cold", owner="a"), new("theirs", owner="a", workspace="v"))
        await done(store, suspend("cold", now + FAR, effects=(OpenWaiter("w", "paid"),)))
        await done(store, commit("theirs", effects=(OpenWaiter("w", "paid"),)))
        [outcome] = await publish(store, NewEvent("e", "paid", b"1"))
        assert sorted(outcome.waiters, key=lambda one: (one.run_id, one.id)) == [
            Waiter("cold", "w", None, None, None),
            Waiter("r1", "w1", b'{"a":1}', now + 1, "a"),
            Waiter("r1", "w2", None, None, "a"),
        ]
        assert not outcome.event.settled
        assert (await read(store, "cold")).inbox_last == 0, "the match has still to be looked at"

    async def test_a_probe_narrows_the_search(self, store: Store) -> None:
        """A wait with a probe is named only where the event has it; one without always; an event without probes asks all."""
        await begin(store, *(new(run_id, owner="a") for run_id in ("r1", "r2", "any")))
        for run_id, probe in (("r1", "p1"), ("r2", "p2"), ("any", "")):
            await done(store, commit(run_id, effects=(OpenWaiter("w", "paid", probe=probe),)))
        for probes, wanted in (
            (("p1", "zz"), ["any", "r1"]),
            (("p2",), ["any", "r2"]),
            ((), ["any"]),
            (None, ["any", "r1", "r2"]),
            (("p1", "p2", ""), ["any", "r1", "r2"]),
        ):
            [outcome] = await publish(store, NewEvent(f"e{probes}", "paid", b"1", probes=probes))
            assert sorted(waiter.run_id for waiter in outcome.waiters) == wanted

    async def test_unsettled_events_are_found_until_they_are(self, store: Store, other: Store) -> None:
        """B12: an event with waiters stays unsettled, for any engine to take up, until somebody says they were told."""
        await begin(store, new(owner="a"), new("v", owner="a", workspace="v"))
        await done(store, commit("r", effects=(OpenWaiter("w", "paid"),)))
        await done(store, commit("v", effects=(OpenWaiter("w", "paid"),)))
        ids = [("e1", "paid", "default"), ("e2", "other", "default"), ("e3", "paid", "default"), ("e4", "paid", "v")]
        await publish(store, *(NewEvent(event_id, name, b"1", w) for event_id, name, w in ids))
        assert await ids_of(other, EventQuery(unsettled=True)) == ["e1", "e3"]
        assert await ids_of(other, EventQuery(None, unsettled=True)) == ["e1", "e3", "e4"]
        await other.settle_events(["e1", "e4", "nobody"])
        assert await ids_of(store, EventQuery(None, unsettled=True)) == ["e3"]
        await store.settle_events(["e1", "e3"])
        await store.settle_events([])
        assert await ids_of(store, EventQuery(None, unsettled=True)) == []
        assert all(event.settled for event in await store.events(EventQuery()))

    async def test_a_duplicate_names_waiters_until_it_is_settled(self, store: Store, other: Store) -> None:
        """The reply that named them may have been lost, or whoever had it has died: the same event again, by its id or by its
        dedupe_id, names those who wait now. Once they have been told, nobody."""
        await begin(store, new(owner="a"), new("r2", owner="a"))
        await done(store, commit("r", effects=(OpenWaiter("w", "paid", probe="p"),)))
        event = NewEvent("e", "paid", b"1", dedupe_id="d", probes=("p",))
        twin = NewEvent("e2", "else", b"2", dedupe_id="d", probes=("q",))
        answers = [(await publish(one, event))[0] for one in (store, store, other)]
        answers.append((await publish(other, twin))[0])
        assert [answer.duplicate for answer in answers] == [False, True, True, True]
        assert [[waiter.run_id for waiter in answer.waiters] for answer in answers] == [["r"]] * 4
        await store.settle_events(["e"])
        assert [(await publish(store, one))[0].waiters for one in (event, twin)] == [(), ()]

    async def test_S20_a_wait_opens_and_an_event_comes(self, store: Store, other: Store, builder: StoreBuilder) -> None:
        """B12: at once over two connections, either the publisher is told of the wait, or the run, looking back after its
        commit, sees the event. Never neither."""
        for n in range(25):
            await begin(store, new(f"r{n}", owner="a"))
            opened = commit(f"r{n}", effects=(OpenWaiter("w", f"paid{n}"),))

            async def look(n: int = n, opened: Any = opened) -> list[str]:
                await done(store, opened)
                return await ids_of(store, EventQuery(name=f"paid{n}"))

            seen, [outcome] = await asyncio.gather(look(), other.publish([NewEvent(f"e{n}", f"paid{n}", b"1")]))
            assert seen or outcome.waiters

    # ------------------------------------------------------------------ reading

    async def test_events_are_queried(self, store: Store, builder: StoreBuilder) -> None:
        """Each filter alone, oldest first or turned round, cut at the limit; numbers make the pages."""
        numbers: list[int] = []
        for n in range(5):
            [outcome] = await publish(store, NewEvent(f"e{n}", f"n{n % 2}", b"%d" % n))
            numbers.append(outcome.event.number)
            later(store, builder, 1)
        assert numbers == sorted(set(numbers))
        for query, wanted in (
            (EventQuery(), ["e0", "e1", "e2", "e3", "e4"]),
            (EventQuery(id="e3"), ["e3"]),
            (EventQuery(name="n1"), ["e1", "e3"]),
            (EventQuery(since=builder.now() - 2 * SECOND), ["e3", "e4"]),
            (EventQuery(after=numbers[2]), ["e3", "e4"]),
            (EventQuery(before=numbers[2]), ["e0", "e1"]),
            (EventQuery(newest_first=True, limit=2), ["e4", "e3"]),
            (EventQuery(newest_first=True, before=numbers[3], limit=2), ["e2", "e1"]),
            (EventQuery(limit=2), ["e0", "e1"]),
            (EventQuery(name="n0", after=numbers[0], before=numbers[4]), ["e2"]),
            (EventQuery(name="nobody"), []),
            (EventQuery("nowhere"), []),
            (EventQuery(whole=True), ["e0", "e1", "e2", "e3", "e4"]),
            (EventQuery(after=numbers[2], whole=True, limit=1), ["e3"]),
            (EventQuery(whole=True, newest_first=True, limit=1), ["e4"]),
        ):
            assert await ids_of(store, query) == wanted, query

    async def test_B42_who_pages_by_number_misses_nothing(self, store: Store, other: Store) -> None:
        """B42: publishers on two connections, and a reader that asks for what comes after the last it has seen: every event,
        once, in the order of numbers, though a lower number may be committed after a higher one."""
        wanted = {f"e{n}.{k}" for n in range(40) for k in range(3)}
        seen: list[EventRecord] = []

        async def read_on() -> None:
            while len(seen) < len(wanted):
                after = seen[-1].number if seen else None
                seen.extend(await store.events(EventQuery(after=after, whole=True, limit=7)))
                await asyncio.sleep(0)

        async def write(n: int) -> None:
            # Some are long under way.
            padding = b'"' + b"x" * (n % 4 * 30_000) + b'"'
            await (store, other)[n % 2].publish([NewEvent(f"e{n}.{k}", "n", padding) for k in range(3)])

        async def write_all(first: int) -> None:
            for n in range(first, 40, 8):
                await write(n)

        async with asyncio.timeout(30):
            await asyncio.gather(read_on(), *map(write_all, range(8)))
        assert {event.id for event in seen} == wanted
        assert [event.number for event in seen] == sorted({event.number for event in seen})

    async def test_A10_all_workspaces_are_for_the_sweep_alone(self, store: Store) -> None:
        """Without a workspace only unsettled events may be asked for: a mistake of the caller's, said at once."""
        with pytest.raises(StoreError):
            await store.events(EventQuery(None))

    async def test_an_admitted_run_waits_in_its_lane(self, store: Store) -> None:
        """S27: an event above a concurrency limit is held back, not dropped."""
        lane = Lane("l", (Rule("slot", 1),))
        for n in range(2):
            assert (await admit(store, f"r{n}", lane=lane)).verdict is Verdict.STARTED
        assert await claimed_ids(store) == ["r0"]

    async def test_old_events_are_let_go(self, store: Store, builder: StoreBuilder) -> None:
        """With an age and no one workflow, settled events of that workspace older than it go, their dedupe ids with them;
        unsettled ones stay. What runs are counted is not changed by it."""
        await begin(store, new("waits", owner="a"))
        await done(store, commit("waits", effects=(OpenWaiter("w", "paid"),)))
        await publish(store, NewEvent("old", "n", b"1", dedupe_id="d"), NewEvent("open", "paid", b"1"))
        await publish(store, NewEvent("theirs", "n", b"1", "v"))
        later(store, builder, 10)
        await publish(store, NewEvent("young", "n", b"1"))
        for request in (PruneRequest(9, keep=0), PruneRequest(9, workflow="checkout", older_than_us=0)):
            assert await store.prune(request) == 0
            assert await ids_of(store, EventQuery()) == ["old", "open", "young"]
        later(store, builder, 1)
        assert await store.prune(PruneRequest(9, older_than_us=11 * SECOND)) == 0
        assert await ids_of(store, EventQuery()) == ["old", "open", "young"]
        assert await store.prune(PruneRequest(9, older_than_us=5 * SECOND)) == 0
        assert await ids_of(store, EventQuery()) == ["open", "young"]
        assert await ids_of(store, EventQuery("v")) == ["theirs"]
        [again] = await publish(store, NewEvent("new", "n", b"1", dedupe_id="d"))
        assert not again.duplicate


async def publish(store: Store, *events: NewEvent) -> list[EventOutcome]:
    return await store.publish(events)


async def admit(store: Store, run_id: str, **fields: Any) -> Admission:
    """One event with one trigger: its policies, and fields of its run."""
    policies = {name: fields.pop(name) for name in ("rate", "singleton", "debounce", "batch") if name in fields}
    trigger = Trigger(new(run_id, **fields), **policies)
    [outcome] = await store.publish([NewEvent(f"e-{run_id}", "n", b"1", triggers=(trigger,))])
    [admission] = outcome.event.admissions
    return admission


async def batched(store: Store, n: int, value: object = None, max_size: int = 3) -> Admission:
    member = json.dumps(n if value is None else value).encode()
    rule = Batch("k", max_size, 10 * SECOND, member)
    return await admit(store, f"r{n}", batch=rule, input=b'{"data":[' + member + b"]}")


async def ids_of(store: Store, query: EventQuery) -> list[str]:
    found: list[EventRecord] = await store.events(query)
    return [event.id for event in found]


def go(run_id: str) -> tuple[Trigger, ...]:
    return (Trigger(new(run_id)),)
