"""The language of conditions: what it says, what it refuses and where, and that nothing in it can run away."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable.core.errors import DefinitionError
from durable.core.expression import BUDGET, MAX_DEPTH, MAX_LENGTH, MAX_TERMS, TooCostly, parse, parse_path

EVENT: dict[str, Any] = {
    "id": "e1",
    "name": "order.paid",
    "ts": 1_700_000_000_000,
    "data": {
        "a": {"b": 1.0, "c": None},
        "text": "it's",
        "list": [1, "x", {"k": True}],
        "yes": True,
        "no": False,
        "big": 2**70,
        "odd key": 5,
        "in": "kept",
        "empty": [],
    },
}


@pytest.mark.parametrize(
    "source",
    [
        "event.name == 'order.paid'",
        'event.name == "order.paid"',
        "event.data.a.b == 1",
        "1.0 == event.data.a.b",
        "event.data.text == 'it\\'s'",
        "event['data']['text'] == \"it's\"",
        'event.data["odd key"] >= 5',
        "event.data.in == 'kept'",
        "event.data.list[2].k == true",
        "'x' in event.data.list",
        "2 not in event.data.list",
        "event.data.a.b in [1, 2, 3]",
        "event.data.a.b in [event.data.list[0]]",
        "'t' in event.data.text",
        "'b' in event.data.a",
        "event.data.yes and not event.data.no",
        "event.data.yes && !event.data.no || event.data.nothing",
        "event.data.no or (event.data.yes and event.data.big > 1e20)",
        "event.data.big == 1180591620717411303424",
        "event.data.nothing.at.all == null",
        "event.data.a.c == null",
        "event.data.a == event.data.a",
        "event.data.text < 'z'",
        "event.ts > 1600000000000",
        "not event.data.empty",
        "not event.data.list[7]",
        "not not event.data.yes",
        "event.data.a.b != 'one'",
        "'\\u00e9' != \"e\"",
        " ( ( true ) ) ",
    ],
)
def test_what_is_true(source: str) -> None:
    """Paths, literals, comparisons and connectives as the page says; what is missing is null."""
    assert parse(source).holds(EVENT) is True


@pytest.mark.parametrize(
    "source",
    [
        "event.data.yes == 1",
        "event.data.yes > 0",
        "event.data.a.b == '1'",
        "event.data.a.b < 'x'",
        "event.data.text < 5",
        "event.data.nothing < 1",
        "event.data.nothing >= null",
        "event.data.list == 1",
        "event.data.list < event.data.list",
        "event.data.a == [1]",
        "'z' in event.data.nothing",
        "1 in 'text'",
        "1 in 12",
        "true in [1]",
        "event.data.text.length == 4",
        "event.data.list.first",
    ],
)
def test_values_of_different_types_are_unequal_and_unordered(source: str) -> None:
    """Never an error: false. Booleans are no numbers, text has no parts, a list has no names."""
    assert parse(source).holds(EVENT) is False


@pytest.mark.parametrize(
    ("source", "place", "why"),
    [
        ("", 1, "a value is missing"),
        ("event.data.a ==", 16, "a value is missing"),
        ("event.data.a = 1", 14, "cannot be read"),
        ("event.data.a == 1 == 2", 19, "not chained"),
        ("event.data.a 5", 14, "nothing more"),
        ("(event.data.a", 14, "`\\)` is missing"),
        ("event.data.a)", 13, "nothing more"),
        ("[1, 2", 6, "`\\]` is missing"),
        ("event", 6, "say which"),
        ("event.user == 1", 7, "an event has id, name, data, ts"),
        ("event.name.upper", 12, "has no parts"),
        ("evil.data", 1, "there is no 'evil'"),
        ("event.data[x]", 12, "a key in quotes"),
        ("event.data[-1]", 12, "a key in quotes"),
        ("event.data.a == 'x", 17, "cannot be read"),
        ("event.data.a == 1e999", 17, "no JSON"),
        ("event.data.a == 01", 17, "cannot be read"),
        ("event.data.a == '\\x41'", 17, "no JSON"),
        ("event.data.a not 5", 18, "only `in` may follow"),
        ("event.data.é == 1", 12, "cannot be read"),
        ("and", 1, "there is no 'and'"),
    ],
)
def test_what_is_wrong_is_shown_with_its_place(source: str, place: int, why: str) -> None:
    """A DefinitionError at registration, with the character and a caret under it."""
    with pytest.raises(DefinitionError, match=rf"character {place}: .*{why}") as caught:
        parse(source)
    shown, caret = str(caught.value).splitlines()[1:3]
    assert caret.index("^") - 2 == min(place - 1, 40)
    assert len(shown) <= 90


@pytest.mark.parametrize(
    "source",
    [
        "(" * 100_000,
        "(" * 1_000 + "true" + ")" * 1_000,
        "not " * 900 + "true",
        "!" * 3_000 + "true",
        "[" * 1_000,
        "[" * 100 + "]" * 100,
        " or ".join(["event.data.a"] * 100_000),
        " or ".join(["true"] * (MAX_TERMS + 1)),
        "event.data" + ".a" * 100,
        "event.data" + "[0]" * 100,
        "x.__class__",
        "event.__class__",
        "event.data.__class__.__subclasses__()",
        "event.data.a.__init__.__globals__['os'].system('id')",
        "(lambda: 1)()",
        "__import__('os')",
        "event.data.a =~ /(a+)+$/",
        "event.data.a.matches('(a+)+$')",
        "f'{event}'",
        "event.data.a if true else false",
        "event.data.a == " + "9" * 5_000,
        "event.data.a == '" + "\\" * 3_999,
        "'\\ud800' == event.name",
        "\x00",
        "event.data.a == 1; drop",
        "1 + 1 == 2",
        "{'a': 1} == event.data",
        "event\u200b.data.a",
    ],
    ids=range(28),
)
def test_A35_hostile_expressions_are_refused_at_once(source: str) -> None:
    """Too deep, too long, or a word of another language: a DefinitionError within a moment, and no other error."""
    began = time.monotonic()
    with pytest.raises(DefinitionError):
        parse(source)
    assert time.monotonic() - began < 0.5


def test_A35_names_that_look_like_attributes_are_keys_of_the_data() -> None:
    """`event.data.__class__` asks for a key of that name, which nobody has sent."""
    assert parse("event.data.__class__").value(EVENT) is None
    assert parse("event.data.__class__ == 5").holds({"data": {"__class__": 5}})


def test_A35_one_evaluation_has_a_budget() -> None:
    """A small expression over a huge event stops with a typed error, in a moment; a plain one is not bothered."""
    large = {"l": [[n] for n in range(60_000)], "t": "a" * 1_000_000}
    huge = {"name": "n", "data": large | {"same": [[n] for n in range(60_000)]}}
    greedy = parse("event.data.l == event.data.same")
    began = time.monotonic()
    with pytest.raises(TooCostly, match=f"{BUDGET:,}"):
        greedy.holds(huge)
    assert time.monotonic() - began < 2
    assert parse("'b' in event.data.t").holds(huge) is False


def test_bounds_are_where_they_are_said_to_be() -> None:
    """The last that fits is taken, the next refused."""
    assert parse("(" * (MAX_DEPTH - 1) + "true" + ")" * (MAX_DEPTH - 1)).holds(EVENT)
    with pytest.raises(DefinitionError, match="levels"):
        parse("(" * MAX_DEPTH + "true" + ")" * MAX_DEPTH)
    assert parse(" and ".join(["true"] * MAX_TERMS)).holds(EVENT)
    long = "'" + "a" * (MAX_LENGTH - 2) + "'"
    assert parse(long).holds(EVENT)
    with pytest.raises(DefinitionError, match="at most 4,000 characters"):
        parse(long + " ")


@given(st.text(alphabet="event.data[]()'\"\\ =!<>&|,andorti0123456789nul-e", max_size=60))
def test_A35_whatever_is_written_is_parsed_or_refused(source: str) -> None:
    """No text makes the parser or the evaluation fail in another way."""
    try:
        expression = parse(source)
    except DefinitionError:
        return
    expression.holds(EVENT)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(scalars, scalars)
def test_equality_is_json_equality(a: Any, b: Any) -> None:
    """`==` between what was sent and a literal is equality of JSON values, and `!=` its opposite."""
    event = {"name": "n", "data": {"a": a, "b": b}}
    same = parse("event.data.a == event.data.b").holds(event)
    booleans = isinstance(a, bool) + isinstance(b, bool)
    assert same is (a == b and booleans != 1)
    assert parse("event.data.a != event.data.b").holds(event) is not same


def test_a_path_may_leave_out_its_beginning() -> None:
    """Keys of rules: `a.b`, `event.data.a.b` and brackets are the same path; more than a path is none."""
    assert parse_path("a.b") == parse_path("event.data.a.b") == parse_path('["a"].b') == ("data", "a", "b")
    assert parse_path("event.name") == ("name",)
    for wrong in ("a == 1", "", "a b", "1", 5, None, "a()", "x" * 5_000):
        with pytest.raises(DefinitionError):
            parse_path(wrong)  # type: ignore[arg-type]
