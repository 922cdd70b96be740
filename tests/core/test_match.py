"""What a wait asks of an event, and the probes by which a store finds the waits that may want it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable.core.errors import DefinitionError, PayloadError
from durable.core.match import MAX_PROBES, condition_of, holds, probe_of, probes_of, within


def event(data: Any, name: str = "n") -> dict[str, Any]:
    return {"id": "e", "name": name, "ts": 1, "data": data}


@pytest.mark.parametrize(
    ("match", "data", "fits"),
    [
        ({}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, True),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"a": True}, False),
        ({"a": True}, {"a": 1}, False),
        ({"a": 1}, {"a": "1"}, False),
        ({"a": 1}, {"b": 1}, False),
        ({"a": 1}, [1], False),
        ({"a": 1}, None, False),
        ({"a": None}, {"a": None}, True),
        ({"a": None}, {}, False),
        ({"a": {"b": {"c": "x"}}}, {"a": {"b": {"c": "x", "d": 1}, "e": 2}}, True),
        ({"a": {"b": 1}}, {"a": 1}, False),
        ({"a": {}}, {"a": {"b": 1}}, True),
        ({"a": {}}, {"a": 1}, False),
        ({"a": [1, 2]}, {"a": [1, 2]}, True),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, False),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 2}]}, False),
        ({"a": [1]}, {"a": [True]}, False),
    ],
)
def test_E3_a_match_is_a_part_of_the_data(match: Any, data: Any, fits: bool) -> None:
    """Objects hold at least what it says, lists and scalars are equal, numbers by value, booleans are no numbers."""
    assert within(match, data) is fits
    assert holds(condition_of(match))(event(data)) is fits


def test_a_condition_is_bytes_that_say_all() -> None:
    """None for any event; a match or an expression otherwise, read back from the bytes alone."""
    assert condition_of() is None
    assert condition_of({}) is None
    assert holds(None)(event(None))
    where = condition_of(where="event.data.a > 1")
    assert where == b'{"if":"event.data.a > 1"}'
    assert holds(bytes(where or b""))(event({"a": 2}))
    for wrong in (b"{}", b'{"match":1}', b'{"match":{},"if":"true"}', b"x", b'{"if":"("}', b'{"regex":"a"}'):
        with pytest.raises(DefinitionError):
            holds(wrong)


def test_what_cannot_be_asked_is_refused_at_the_call() -> None:
    """Both kinds at once, a list, a type JSON does not know, more than 16 kB."""
    with pytest.raises(DefinitionError, match="not both"):
        condition_of({"a": 1}, "true")
    with pytest.raises(DefinitionError, match="object"):
        condition_of([1])  # type: ignore[arg-type]
    with pytest.raises(PayloadError):
        condition_of({"a": object()})
    with pytest.raises(PayloadError):
        condition_of({"a": "x" * 20_000})


def test_an_event_too_large_to_judge_is_not_wanted() -> None:
    """The budget of an expression is used up: the wait does not get it, and nothing breaks."""
    where = condition_of(where="event.data.a == event.data.b")
    same = [[n] for n in range(60_000)]
    assert holds(where)(event({"a": same, "b": list(same)})) is False


@pytest.mark.parametrize(
    ("condition", "data"),
    [
        (condition_of({"a": {"b": 1}}), {"a": {"b": 1.0}}),
        (condition_of({"flag": True, "id": "x"}), {"id": "x", "flag": True}),
        (condition_of(where="event.data.a.b == 1 and event.data.c > 2"), {"a": {"b": 1}, "c": 3}),
        (condition_of(where="'x' == event.data['id'] and (event.data.c or true)"), {"id": "x"}),
        (condition_of(where="(event.data.id == 'x') and true"), {"id": "x"}),
    ],
)
def test_a_wait_names_something_that_must_be_so(condition: bytes, data: Any) -> None:
    """Its probe is one of the event's, and of no event that lacks it; text and numbers go before booleans."""
    probe = probe_of(condition)
    assert probe
    assert probe in (probes_of(data) or ())
    assert probe not in (probes_of({"a": {"b": 2}, "id": "y", "flag": True}) or ())


@pytest.mark.parametrize(
    "condition",
    [
        None,
        condition_of({"a": [1]}),
        condition_of({"a": None}),
        condition_of({"a": {}}),
        condition_of(where="event.data.a == null"),
        condition_of(where="event.data.a == 1 or event.data.b == 2"),
        condition_of(where="not (event.data.a == 1)"),
        condition_of(where="event.data.a != 1"),
        condition_of(where="event.data.list[0] == 1"),
        condition_of(where="event.name == 'x'"),
        condition_of(where="event.data.a == event.data.b"),
    ],
)
def test_a_wait_that_can_name_nothing_is_shown_every_event(condition: bytes | None) -> None:
    """What may be true without a certain scalar there has no probe."""
    assert probe_of(condition) == ""


def test_an_event_with_too_much_in_it_names_nothing() -> None:
    """None: any wait may want it."""
    assert len(probes_of({str(n): n for n in range(MAX_PROBES)}) or ()) == MAX_PROBES
    assert probes_of({str(n): n for n in range(MAX_PROBES + 1)}) is None
    assert probes_of([1, 2]) == ()
    assert probes_of("text") == ()
    assert probes_of(None) == ()


keys = st.sampled_from(["a", "b", "c"])
leaves = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([1.0, 0.5, 2**60, 1e300]) | st.sampled_from("xy")
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(keys, values, max_size=3), values)
def test_no_probe_hides_an_event_that_is_wanted(match: dict[str, Any], data: Any) -> None:
    """Whatever is asked and whatever comes: if the match holds, the wait's probe is among the event's, over the wire too."""
    condition = condition_of(match)
    sent = msgspec.json.decode(msgspec.json.encode(data))
    if holds(condition)(event(sent)):
        probes = probes_of(sent)
        assert probe_of(condition) in ("", *(probes or ())) or probes is None


@given(st.dictionaries(keys, st.dictionaries(keys, leaves, max_size=2) | leaves, max_size=3), values)
def test_no_probe_of_an_expression_hides_an_event(asked: dict[str, Any], data: Any) -> None:
    """The same for expressions joined by `and`."""
    terms = [
        f"event.data.{path} == {msgspec.json.encode(value).decode()}"
        for key, inner in asked.items()
        for path, value in (
            [(f"{key}.{k}", v) for k, v in inner.items()] if isinstance(inner, dict) else [(key, inner)]
        )
    ]
    condition = condition_of(where=" and ".join(terms) or "true")
    if holds(condition)(event(data)):
        probes = probes_of(data)
        assert probe_of(condition) in ("", *(probes or ())) or probes is None
