"""Triggers and flow control: what may be declared, what it says on the wire, and what it comes to for an event."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from durable import (
    Batch,
    Concurrency,
    Context,
    Debounce,
    Durable,
    Event,
    Fairness,
    RateLimit,
    Singleton,
    Throttle,
    Trigger,
    workflow,
)
from durable.core.definition import WorkflowDefinition, workflow_of
from durable.core.errors import DefinitionError, PayloadError
from durable.core.flow import (
    Flow,
    flow_of,
    key_value,
    priority_of,
    read_flow,
    read_triggers,
    triggers_of,
    weight_of,
    write_flow,
    write_triggers,
)
from durable.core.origin import Origin, origin_of
from durable.engine.admission import lane_of, lane_of_input, trigger_of, wanted

SECOND = 1_000_000


def event(data: Any, name: str = "go") -> dict[str, Any]:
    return {"id": "e1", "name": name, "ts": 5, "data": data}


def definition(**options: Any) -> WorkflowDefinition:
    @workflow(name="w", **options)
    async def w(ctx: Context, data: Any) -> None: ...

    return workflow_of(w)


# ------------------------------------------------------------------ what authors write


def test_the_decorator_takes_what_an_author_would_write() -> None:
    """Names, lists, triggers, shorthands: all become the same data on the definition; `Durable.workflow` takes the same."""
    one = definition(
        on=["a", Trigger("b", where="event.data.x == 1")],
        cron="0 9 * * mon",
        concurrency=[Concurrency(2, key="user"), Concurrency(9)],
        throttle=Throttle(5, "1m"),
        rate_limit=RateLimit(5, timedelta(hours=1)),
        singleton="cancel",
        priority="event.data.rank",
        weight={"vip": 5},
    )
    assert one.triggers == (Trigger("a"), Trigger("b", "event.data.x == 1"), Trigger(cron="0 9 * * mon"))
    assert one.flow.singleton == Singleton(mode="cancel")
    assert one.flow.fairness == Fairness("user", {"vip": 5})
    assert (one.priority, one.flow.priority) == (0, "event.data.rank")
    assert definition(concurrency=3, debounce="3s").flow == Flow(concurrency=(Concurrency(3),), debounce=Debounce("3s"))
    assert definition().flow == Flow()
    assert definition(priority=7).priority == 7
    app = Durable("memory://")

    @app.workflow(name="w", on="a", batch=Batch(10, "5s"))
    async def w(ctx: Context, data: list[int]) -> None: ...

    assert app.registry.triggered("a") == [workflow_of(w)]
    assert app.registry.triggered("b") == []


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Concurrency(0), "limit of concurrency is a number from 1"),
        (lambda: Concurrency(True), "limit of concurrency"),
        (lambda: Concurrency(1.5), "limit of concurrency"),  # type: ignore[arg-type]
        (lambda: Concurrency(1, key="a == 1"), "a path into event.data"),
        (lambda: Concurrency(1, key="a.b("), "wrong at character"),
        (lambda: Throttle(1, 0), "at least a millisecond"),
        (lambda: Throttle(1, -1), "cannot be negative"),
        (lambda: Throttle(1, "soon"), "not a duration"),
        (lambda: RateLimit(1, float("nan")), "NaN"),
        (lambda: Debounce("3s", max_wait="2s"), "shorter than its period"),
        (lambda: Batch(0, "1s"), "max_size of batch"),
        (lambda: Batch(1_001, "1s"), "1,000"),
        (lambda: Singleton(mode="drop"), "skip, cancel, queue"),
        (lambda: Fairness("k", {"a": 0}), "weight is a number"),
        (lambda: Fairness("k", {"a": float("inf")}), "weight is a number"),
        (lambda: Trigger(), "one of the two"),
        (lambda: Trigger("a", cron="* * * * *"), "one of the two"),
        (lambda: Trigger("*"), "no wildcards"),
        (lambda: Trigger("a\n"), "event name"),
        (lambda: Trigger("a", where="event.data.a ="), "wrong at character"),
        (lambda: Trigger(cron=" "), "five or six fields"),
        (lambda: Trigger(cron="* * * * *", timezone="Mars/Base"), "No time zone"),
        (lambda: Trigger(cron="* * * * *", timezone="../../etc/passwd"), "No time zone"),
        (lambda: Trigger(cron="* * * * *", where="true"), "no `where`"),
        (lambda: Trigger(cron="* * * * *", catch_up="some"), "skip, last, all"),
        (lambda: definition(batch=Batch(2, 1), throttle=Throttle(1, 1)), "batch and throttle exclude"),
        (lambda: definition(debounce=1, rate_limit=RateLimit(1, 1)), "debounce and rate_limit exclude"),
        (lambda: definition(debounce=1, batch=Batch(2, 1)), "exclude each other"),
        (lambda: definition(concurrency=[Concurrency(n + 1) for n in range(11)]), "at most 10"),
        (lambda: definition(on=[f"e{n}" for n in range(21)]), "at most 20"),
        (lambda: definition(weight={"a": 2}), "a rule with a key"),
        (lambda: definition(weight="heavy"), "weight is a number"),
        (lambda: definition(priority="event.data.rank +"), "wrong at character"),
        (lambda: definition(throttle=5), "throttle is a Throttle"),
        (lambda: definition(singleton=5), "singleton is a Singleton"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_is_written(make: Callable[[], Any], why: str) -> None:
    """A DefinitionError that says what is wrong, at the decorator."""
    with pytest.raises(DefinitionError, match=why):
        make()


# ------------------------------------------------------------------ the wire


def test_flow_control_on_the_wire_is_as_the_page_says() -> None:
    """Section 4's shapes: one rule or several, periods in milliseconds or as people write them; unknown fields are let be."""
    given = {
        "id": "f",
        "retries": 3,
        "priority": 5,
        "concurrency": {"limit": 2, "key": "user.id"},
        "throttle": {"limit": 1, "periodMs": 3000},
        "rateLimit": {"limit": 4, "period": "1m", "future": 1},
    }
    flow = read_flow(given)
    assert flow == Flow(
        concurrency=(Concurrency(2, "user.id"),), throttle=Throttle(1, 3.0), rate_limit=RateLimit(4, "1m")
    )
    assert write_flow(flow) == {
        "concurrency": [{"limit": 2, "key": "user.id"}],
        "throttle": {"limit": 1, "periodMs": 3000},
        "rateLimit": {"limit": 4, "periodMs": 60000},
    }
    assert read_flow({"debounce": {"periodMs": "3s", "key": "a"}}).debounce == Debounce("3s", "a")
    assert read_flow({"batch": {"maxSize": 5, "timeoutMs": 250}}).batch == Batch(5, 0.25)
    assert read_flow({"concurrency": 4}).concurrency == (Concurrency(4),)
    assert read_flow({"singleton": True}).singleton == Singleton()
    assert read_flow({}) == Flow()


@pytest.mark.parametrize(
    "flow",
    [
        flow_of(concurrency=[Concurrency(1), Concurrency(2, "a")], weight={"x": 2}, priority="event.data.p"),
        flow_of(throttle=Throttle(2, "90s", "k"), rate_limit=RateLimit(3, "1h"), weight=2.5),
        flow_of(debounce=Debounce("3s", "k", "1m")),
        flow_of(batch=Batch(7, 0.5, "k")),
        flow_of(singleton=Singleton("k", "queue")),
    ],
)
def test_what_is_written_reads_back(flow: Flow) -> None:
    """Through JSON and back: the same decisions."""
    wire = msgspec.json.decode(msgspec.json.encode(write_flow(flow)))
    again = read_flow(wire)
    assert write_flow(again) == wire
    assert again.holds_back == flow.holds_back


def test_triggers_on_the_wire() -> None:
    """`trigger` of one dialect and `triggers` of the other; our additions are there only where they say something."""
    assert read_triggers({"event": "a"}) == (Trigger("a"),)
    listed = [{"event": "a", "if": "event.data.x > 1"}, {"cron": "0 9 * * *", "timezone": "Europe/Amsterdam", "zz": 1}]
    triggers = read_triggers(listed)
    assert triggers == (Trigger("a", "event.data.x > 1"), Trigger(cron="0 9 * * *", timezone="Europe/Amsterdam"))
    assert write_triggers(triggers) == [
        {"event": "a", "if": "event.data.x > 1"},
        {"cron": "0 9 * * *", "timezone": "Europe/Amsterdam", "catchUp": "last"},
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"concurrency": {"key": "a"}},
        {"concurrency": {"limit": "5"}},
        {"concurrency": [[]]},
        {"concurrency": {"limit": 1, "key": 5}},
        {"concurrency": {"limit": 1, "key": ["a"]}},
        {"throttle": {"limit": 1}},
        {"throttle": {"limit": 1, "periodMs": True}},
        {"throttle": {"limit": 1, "periodMs": {}}},
        {"throttle": {"limit": 10**30, "periodMs": 1}},
        {"throttle": "often"},
        {"batch": {"maxSize": 5}},
        {"batch": {"maxSize": 5, "timeoutMs": 5}, "rateLimit": {"limit": 1, "periodMs": 5}},
        {"debounce": {"periodMs": 10**18}},
        {"singleton": {"mode": ["skip"]}},
        {"weight": {"key": "a", "weights": [1]}},
        {"weight": "x"},
        {"priority": "__import__('os')"},
    ],
)
def test_a_strangers_flow_control_is_refused_with_a_sentence(given: dict[str, Any]) -> None:
    """Whatever is wrong with it, a DefinitionError and no other."""
    with pytest.raises(DefinitionError):
        read_flow(given)


@pytest.mark.parametrize(
    "given",
    [None, [], 5, [{}], {"event": 5}, {"event": "a", "if": ["x"]}, {"event": "a", "if": "x.__class__"}, {"cron": []}],
)
def test_a_strangers_trigger_is_refused_with_a_sentence(given: Any) -> None:
    """The same for triggers; an empty list is no triggers."""
    if given == []:
        assert read_triggers(given) == ()
        return
    with pytest.raises(DefinitionError):
        read_triggers(given)


def test_A35_a_registration_full_of_terms_is_refused_in_a_moment() -> None:
    """10^5 terms, deep parentheses, attribute access: each a DefinitionError, at once."""
    began = time.monotonic()
    for source in ("(" * 10**5, " && ".join(["event.data.a"] * 10**5), "event.data.constructor.prototype()"):
        with pytest.raises(DefinitionError):
            read_triggers([{"event": "a", "if": source}])
    assert time.monotonic() - began < 1


# ------------------------------------------------------------------ an event's keys


@pytest.mark.parametrize(
    ("key", "data", "value"),
    [
        (None, {"a": 1}, ""),
        ("a", {"a": "x"}, "x"),
        ("event.data.a", {"a": 1}, "1"),
        ("a", {"a": 1.0}, "1"),
        ("a", {"a": True}, "true"),
        ("a", {}, ""),
        ("a", {"a": None}, ""),
        ("a", None, ""),
        ("a.b", {"a": 5}, ""),
        ("event.name", {}, "go"),
    ],
)
def test_a_keys_value(key: str | None, data: Any, value: str) -> None:
    """Text as it is, other scalars as JSON; missing values share one empty key."""
    assert key_value(key, event(data)) == value


def test_long_and_deep_values_are_hashed() -> None:
    """A key stays short, whatever was sent, and equal values have equal keys."""
    long = key_value("a", event({"a": "x" * 1_000}))
    deep = key_value("a", event({"a": {"b": [1], "c": 2}}))
    assert long.startswith("#")
    assert len(long) == 33
    assert deep == key_value("a", event({"a": {"c": 2, "b": [1]}}))
    assert deep != key_value("a", event({"a": {"c": 2, "b": [2]}}))
    assert key_value("a", event({"a": "\ud800" * 200})).startswith("#")


def test_priority_and_weight_of_an_event() -> None:
    """A number where the expression comes to one, bounded; the workflow's own otherwise."""
    flow = flow_of(priority="event.data.p", weight=Fairness("who", {"vip": 4}, 0.5))
    given = [3, 2.9, True, 10**30, "5", None, [1]]
    assert [priority_of(flow, 7, event({"p": p})) for p in given] == [3, 2, 1, 2**31 - 1, 7, 7, 7]
    assert weight_of(flow, event({"who": "vip"})) == ("vip", 4)
    assert weight_of(flow, event({})) == ("", 0.5)
    assert weight_of(flow_of(weight=2), event({})) == ("", 2)


# ------------------------------------------------------------------ what the store is asked


def ask(one: WorkflowDefinition, data: Any, workspace: str = "shop.dev") -> Any:
    given = msgspec.json.encode(data)
    origin = Origin(trigger_kind="event", event_name="go", event_id="e1")
    return trigger_of(
        one, event(data), given, at=5_000_000, run_id="r", workspace=workspace, origin=origin, tags=("t",)
    )


def test_what_the_store_is_asked_for_an_event() -> None:
    """Keys are whole, times µs, the run has input, lane, priority, tags and origin."""
    one = definition(
        concurrency=[Concurrency(2, "user"), Concurrency(9)],
        throttle=Throttle(3, "1s"),
        rate_limit=RateLimit(5, "1m", "user"),
        singleton=Singleton("user", "cancel"),
        tags=["own"],
        priority=4,
    )
    trigger = ask(one, {"user": "a/b|c"})
    run = trigger.run
    assert (run.id, run.workflow, run.version, run.input) == ("r", "w", "1", b'{"user":"a/b|c"}')
    assert (run.workspace, run.priority, run.tags) == ("shop.dev", 4, ("own", "t"))
    assert origin_of(run.meta).event_id == "e1"
    assert [(rule.key, rule.kind, rule.limit, rule.period_us) for rule in run.lane.rules] == [
        ("shop.dev/w@1/concurrency/a/b|c", "slots", 2, 0),
        ("shop.dev/w@1/concurrency1/", "slots", 9, 0),
        ("shop.dev/w@1/throttle/", "throttle", 3, SECOND),
    ]
    assert (trigger.rate.key, trigger.rate.limit, trigger.rate.period_us) == ("shop.dev/w@1/rate/a/b|c", 5, 60 * SECOND)
    assert (trigger.singleton.key, trigger.singleton.mode) == ("shop.dev/w@1/singleton/a/b|c", "cancel")
    assert (trigger.debounce, trigger.batch) == (None, None)


def test_B37_no_two_workspaces_workflows_or_versions_share_a_key() -> None:
    """Names with every separator in them, in one place or the other: all keys differ."""
    found = set()
    for workspace in ("a", "a/b", "a/b@1"):
        for name in ("w", "w@1", "b/w", "w@1/concurrency"):
            for version in ("1", "2", "1/concurrency", "1@1"):

                @workflow(name=name, version=version, concurrency=1)
                async def w(ctx: Context, data: Any) -> None: ...

                lane = lane_of(workflow_of(w), event({}), workspace)
                assert lane is not None
                found.add((lane.key, lane.rules[0].key))
    assert len({lane for lane, _ in found}) == len({rule for _, rule in found}) == 48


def test_lanes_are_one_for_each_combination_of_values() -> None:
    """Equal values, equal lanes; a value that could be mistaken for two is not; very long ones stay short."""
    one = definition(concurrency=[Concurrency(1, "a"), Concurrency(1, "b")])

    def lane(a: str, b: str) -> str:
        found = lane_of(one, event({"a": a, "b": b}), "s")
        assert found is not None
        return found.key

    assert lane("x", "y") == lane("x", "y")
    assert len({lane("x", "y"), lane("y", "x"), lane("x|concurrency1/y", ""), lane("x", ""), lane("", "x")}) == 5
    assert len(lane("é" * 100, "ü" * 100)) < 400
    assert lane_of(definition(), event({}), "s") is None
    assert lane_of(definition(rate_limit=RateLimit(1, 1)), event({}), "s") is None
    queued = lane_of(definition(singleton="queue"), event({}), "s")
    assert queued is not None
    assert [rule.limit for rule in queued.rules] == [1]
    assert ask(definition(singleton="queue"), {}).singleton is None


def test_a_run_started_by_hand_stands_in_the_same_lane() -> None:
    """Its input is what an event's data would be; the event itself where the workflow takes that."""
    plain = definition(concurrency=Concurrency(1, "user"))
    by_event = ask(plain, {"user": "a"}, "s").run.lane
    assert lane_of_input(plain, plain.encode_input({"user": "a"}), "s") == by_event

    @workflow(name="w", concurrency=Concurrency(1, "user"))
    async def typed(ctx: Context, event: Event[dict[str, str]]) -> None: ...

    given = workflow_of(typed).encode_input(Event("e", "go", 5, {"user": "a"}))
    assert lane_of_input(workflow_of(typed), given, "s") == by_event


@dataclass
class Order:
    id: int


def test_the_input_of_an_events_run() -> None:
    """The event where the annotation says Event, generic over its data; its data otherwise; nothing for code that takes none."""

    @workflow(name="a")
    async def a(ctx: Context, event: Event[Order]) -> None: ...

    @workflow(name="b")
    async def b(ctx: Context, event: Event) -> None: ...  # type: ignore[type-arg]

    @workflow(name="c")
    async def c(ctx: Context, order: Order) -> None: ...

    @workflow(name="d")
    async def d(ctx: Context) -> None: ...

    def argument(one: Any) -> Any:
        found = workflow_of(one)
        return found._arguments(found.input_from("e", "go", 5_000_000, b'{"id":1}'))

    assert argument(a) == (Event("e", "go", 5_000, Order(1)),)
    assert argument(b) == (Event("e", "go", 5_000, {"id": 1}),)
    assert argument(c) == (Order(1),)
    assert argument(d) == ()
    with pytest.raises(PayloadError, match="id"):
        workflow_of(a).check_input(b'{"id":"e","name":"go","ts":5,"data":{}}')


def test_a_batchs_input_can_grow() -> None:
    """It ends in `]}` whatever the code takes, and the code gets the list, or the event with the list."""

    @workflow(name="a", batch=Batch(3, 1))
    async def a(ctx: Context, orders: list[Order]) -> None: ...

    @workflow(name="b", batch=Batch(3, 1))
    async def b(ctx: Context, event: Event[list[Order]]) -> None: ...

    for one, wanted_input in ((a, [Order(1), Order(2)]), (b, Event("e1", "go", 5_000, [Order(1), Order(2)]))):
        trigger = ask(workflow_of(one), {"id": 1})
        assert trigger.run.input.endswith(b"]}")
        assert trigger.batch.member == b'{"id":1}'
        grown = trigger.run.input[:-2] + b',{"id":2}]}'
        assert workflow_of(one)._arguments(grown) == (wanted_input,)
    by_hand = workflow_of(a).encode_input([Order(5)])
    assert by_hand.endswith(b"]}")
    assert workflow_of(a)._arguments(by_hand) == ([Order(5)],)
    with pytest.raises(PayloadError):
        workflow_of(a).encode_input("no list")


def test_which_workflows_an_event_starts() -> None:
    """By name and condition, each once; a condition too costly for the event is not met."""
    plain, twice = definition(on="go"), definition(on=["go", Trigger("go", where="true")])
    picky, greedy = (
        definition(on=Trigger("go", where="event.data.n > 1")),
        definition(on=Trigger("go", where="event.data.a == event.data.b")),
    )
    same = [[n] for n in range(60_000)]
    data = {"n": 1, "a": same, "b": list(same)}
    assert wanted([plain, twice, picky, greedy], event(data)) == [plain, twice]
    assert wanted([plain], event({}, "other")) == []
    assert triggers_of(None, None) == ()
