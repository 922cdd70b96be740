"""Values to bytes and back: the law, every type promised, every refusal."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypedDict, TypeVar
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from durable.core import payload
from durable.core.errors import (
    DurableError,
    ErrorData,
    NonRetryable,
    PayloadError,
    PayloadText,
    PayloadTooLarge,
    RetryAfter,
)

T = TypeVar("T")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Point(NamedTuple):
    x: int
    y: float


class Movie(TypedDict, total=False):
    title: str
    year: int


@dataclass(frozen=True, slots=True)
class Line:
    sku: str
    price: Decimal


@dataclass
class Order:
    id: UUID
    lines: list[Line]
    placed: datetime
    colour: Colour = Colour.RED
    note: str | None = None
    parent: Order | None = None
    extra: dict[str, object] = field(default_factory=dict)


@dataclass
class Box(Generic[T]):
    value: T


class Cat(msgspec.Struct, tag=True, frozen=True):
    lives: int


class Dog(msgspec.Struct, tag=True, frozen=True):
    name: str


class Address(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    street: str = pydantic.Field(alias="streetName")
    since: date
    total: Decimal = Decimal(0)

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def label(self) -> str:
        return self.street.upper()


class Page(pydantic.BaseModel, Generic[T]):
    items: list[T]


class Left(pydantic.BaseModel):
    kind: Literal["left"] = "left"


class Right(pydantic.BaseModel):
    kind: Literal["right"] = "right"
    size: int


@dataclass
class Customer:
    home: Address
    others: dict[str, list[Address]]
    work: Address | None = None


HOME = Address(streetName="Elm", since=date(2020, 1, 2), total=Decimal("1.50"))
NOW = datetime(2026, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
LINE = Line("a", Decimal("1.10"))

ID = UUID("0190a1b2-0000-7000-8000-000000000001")
"""Not a random one: values name the tests, and xdist wants the same names in each process."""
VALUES: list[tuple[Any, Any]] = [
    (None, None),
    (True, bool),
    (-0.0, float),
    (2**70, int),
    (-(2**63) - 1, int),
    ("\\u0000 is text, \\ too \N{GRINNING FACE}", str),
    (b"\x00\xff", bytes),
    (NOW, datetime),
    (NOW.replace(tzinfo=timezone(timedelta(hours=-5, minutes=-30))), datetime),
    (datetime(2026, 1, 1), datetime),
    (date(1, 1, 1), date),
    (time(1, 2, 3, 4), time),
    (timedelta(days=-1, microseconds=1), timedelta),
    (Decimal("1.10"), Decimal),
    (ID, UUID),
    (Colour.BLUE, Colour),
    (Level.HIGH, Level),
    (Point(1, 2.5), Point),
    (Movie(title="M"), Movie),
    (LINE, Line),
    (Order(ID, [LINE], NOW, extra={"a": [1, None]}, parent=Order(ID, [], NOW)), Order),
    (Box(value=[Line("b", Decimal(2))]), Box[list[Line]]),
    (Box(value=Box(value=1)), Box[Box[int]]),
    ([Cat(lives=9), Dog(name="Rex")], list[Cat | Dog]),
    (HOME, Address),
    ([HOME, None], list[Address | None]),
    (Customer(HOME, {"old": [HOME]}), Customer),
    (Page[Left](items=[Left()]), Page[Left]),
    (Right(size=1), Left | Right),
    ({"a": {1, 2}}, dict[str, set[int]]),
    (frozenset({"a"}), frozenset[str]),
    ((1, "a"), tuple[int, str]),
    ((1, 2, 3), tuple[int, ...]),
    ({1: "a"}, dict[int, str]),
    ({date(2026, 1, 1): 1}, dict[date, int]),
    ("a", Literal["a", "b"]),
    (3, Annotated[int, msgspec.Meta(gt=0)]),
    ({"a": [1]}, dict[str, object]),
    (OrderedDict(a=1), dict[str, int]),
    ([1, 2.5, "x", None, {"k": []}], Any),
]


@pytest.mark.parametrize(("value", "annotation"), VALUES, ids=lambda value: str(value)[:30])
def test_every_promised_type_comes_back_equal(value: Any, annotation: Any) -> None:
    """decode(encode(v), annotation) equals v, is of v's class, and writes the same bytes again."""
    data, live = payload.through(value, annotation, what="a value")
    assert live == value
    assert type(live) is type(value) or isinstance(value, OrderedDict)
    assert payload.through(live, annotation, what="a value") == (data, live)


def _typed() -> st.SearchStrategy[tuple[Any, Any]]:
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
    scalars = {
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: text,
        bool: st.booleans(),
        bytes: st.binary(),
        datetime: st.datetimes(timezones=st.sampled_from([None, UTC, timezone(timedelta(hours=5, minutes=45))])),
        date: st.dates(),
        time: st.times(),
        timedelta: st.timedeltas(),
        Decimal: st.decimals(allow_nan=False, allow_infinity=False),
        UUID: st.uuids(),
        Colour: st.sampled_from(Colour),
        Line: st.builds(Line, sku=text, price=st.decimals(allow_nan=False, allow_infinity=False)),
        Cat | Dog: st.builds(Cat, lives=st.integers()) | st.builds(Dog, name=text),
        Address: st.builds(lambda street, since: Address(streetName=street, since=since), text, st.dates()),
    }

    def wrap(inner: st.SearchStrategy[tuple[Any, Any]]) -> st.SearchStrategy[tuple[Any, Any]]:
        return st.one_of(
            inner.map(lambda pair: ([pair[0]] * 2, list[pair[1]])),  # type: ignore[name-defined]
            inner.map(lambda pair: ({"k": pair[0]}, dict[str, pair[1]])),  # type: ignore[name-defined]
            inner.map(lambda pair: ((pair[0],), tuple[pair[1], ...])),  # type: ignore[name-defined]
            inner.map(lambda pair: (Box(value=pair[0]), Box[pair[1]])),  # type: ignore[name-defined]
            inner.map(lambda pair: (None, pair[1] | None)),
        )

    leaves = st.one_of([values.map(lambda v, t=tp: (v, t)) for tp, values in scalars.items()])
    return st.recursive(leaves, wrap, max_leaves=4)


@settings(max_examples=150, deadline=None)
@given(_typed())
def test_the_live_value_is_the_replayed_one(pair: tuple[Any, Any]) -> None:
    """For any typed value: the value that goes on equals the original, and reading the bytes again gives it again."""
    value, annotation = pair
    data, live = payload.through(value, annotation, what="a value")
    assert live == value
    assert payload.decode(data, annotation, what="a value") == live
    assert payload.encode(live, annotation, what="a value") == data


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(_json)
def test_plain_json_is_kept_exactly_or_refused(value: Any) -> None:
    """Any plain value, with NaN, NUL and surrogates among it: kept exactly and sound for strangers, or refused."""
    try:
        data = payload.encode(value, what="a value")
    except PayloadError:
        wrongs = (payload._is_nonfinite, payload._is_nul_text, payload._is_surrogate_text)
        assert any(payload._find(value, wrong) for wrong in wrongs)
        return
    payload.check(data, what="a value")
    assert payload.decode(data, Any, what="a value") == value
    assert payload._find(value, payload._is_nonfinite) is None
    assert payload._find(value, payload._is_nul_text) is None


def test_without_an_annotation_a_value_comes_back_as_plain_json() -> None:
    """Untyped: tuples become lists, keys text; and so does the live value."""
    _, live = payload.through({"a": (1, 2), 3: NOW}, Any, what="a value")
    assert live == {"a": [1, 2], "3": "2026-05-06T07:08:09.123456Z"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_json_cannot_carry_is_refused_by_path(value: float) -> None:
    """msgspec writes NaN as null without a word; we name its place, beside real nulls and integers of any size too."""
    for whole, path in [
        (value, "$"),
        ({"a": [None, {"b": value}]}, "$.a[1].b"),
        ([2**70, None, value], "$[2]"),
        (Box(value=value), "$.value"),
        (Point(1, value), "$[1]"),
    ]:
        with pytest.raises(PayloadError, match="NaN or infinite") as caught:
            payload.encode(whole, what="the result of step s")
        assert f"the result of step s: {path} is" in str(caught.value)
    payload.encode({"a": None, "b": b"\xcb\x7f\xf8\x00"}, what="bytes that look like NaN")


def test_pydantic_does_not_hide_nan() -> None:
    """A model's NaN is found though it is written by the model."""

    class Reading(pydantic.BaseModel):
        value: float

    with pytest.raises(PayloadError, match=r"\$\.value is NaN"):
        payload.encode(Reading(value=math.nan), what="r")


@pytest.mark.parametrize("bad", ["a\0b", "\\\0", "\ud800", "x\udfff"])
@pytest.mark.parametrize("place", [lambda t: t, lambda t: {"k": [t]}, lambda t: {t: 1}, lambda t: Dog(name=t)])
def test_B33_text_that_wedges_stores_is_a_typed_error(bad: str, place: Any) -> None:
    """NUL and lone surrogates, as value and as key: payload_text, naming the place in text that can itself be kept."""
    with pytest.raises(PayloadText) as caught:
        payload.encode(place(bad), what="the result of step s")
    assert caught.value.code == "payload_text"
    payload.encode(str(caught.value), what="the error itself")


def test_text_that_only_looks_like_nul_is_kept() -> None:
    r"""A backslash and "u0000" is honest text."""
    for text in ["\\u0000", "\\\\u0000", 'x\\"\\u0000']:
        assert payload.through({text: text}, Any, what="t")[1] == {text: text}


def test_S36_a_payload_too_large_names_size_limit_and_remedy() -> None:
    """Over the limit: PayloadTooLarge; at the limit: taken. Small limits count too."""
    payload.encode("x" * 98, what="t", limit=100)
    with pytest.raises(PayloadTooLarge, match=r"the input of w is 101 bytes.*limit is 100.*pass its id"):
        payload.encode("x" * 99, what="the input of w", limit=100)
    with pytest.raises(PayloadTooLarge):
        payload.check(b'"' + b"x" * 99 + b'"', what="t", limit=100)
    with pytest.raises(PayloadTooLarge, match="keys"):
        payload.check(payload._encode_json({str(i): 1 for i in range(100_001)}), what="t", limit=1 << 30)


def test_S36_depth_is_bounded_alike_from_every_stack() -> None:
    """100 levels are taken, 101 refused, whatever brackets stand in texts; loops and 100,000 levels never escape."""

    def nest(levels: int, core: Any = 0) -> Any:
        for level in range(levels):
            core = [core] if level % 2 else {"k[{": core, '"\\': "]}"}
        return core

    data = payload.encode(nest(100), what="t")
    payload.check(data, what="t")
    for deep in [nest(101), nest(100, [["wide"]] * 50), nest(100_000)]:
        with pytest.raises(PayloadError, match="nested deeper than 100 levels"):
            payload.encode(deep, what="t")
    payload.encode([["[" * 500]] * 500, what="t")
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(PayloadError, match="contains itself"):
        payload.encode(loop, what="t")


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[[]" * 30_000 + b"]" * 30_000,
        b"1" * 1_000_000,
        b"1e400",
        b"NaN",
        b"Infinity",
        b'"\\u0000"',
        b'"\\ud800"',
        b'"\xff"',
        b'"\xc0\x80"',
        b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf{}",
        b"",
        b"{",
        b"1 2",
        b"{a:1}",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_A16_A17_A19_hostile_bytes_are_refused(data: bytes) -> None:
    """Depth, huge numbers, broken UTF-8, NUL, a BOM: PayloadError and nothing else."""
    with pytest.raises(PayloadError):
        payload.check(data, what="the body")


def test_A18_special_keys_are_data_only() -> None:
    """Duplicate keys: the last counts; `__class__`, `$ref`, `py/object` mean nothing; -0 is defined."""
    data = b'{"a":1,"a":2,"__proto__":{},"__class__":"os.system","$ref":"#","py/object":"x","z":-0}'
    payload.check(data, what="t")
    assert payload.decode(data, Any, what="t")["a"] == 2


def test_a_value_nobody_can_write_is_refused_with_path_type_and_remedy() -> None:
    """A socket inside a dict: the message says where, what, and what to do instead."""
    with socket.socket() as connection, pytest.raises(PayloadError) as caught:
        payload.encode({"rows": [1, {"conn": connection}]}, what="the result of step s")
    assert str(caught.value).startswith("the result of step s: $.rows[1].conn is a socket.socket, which cannot")
    assert "carry an id" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [object(), len, 1j, (i for i in ()), {(1, 2): 3}, {None: 1}, [msgspec.UNSET], 10**5000],
    ids=lambda value: type(value).__name__,
)
def test_other_unwritable_values_are_payload_errors(value: Any) -> None:
    """Functions, generators, keys that are no text, integers too long to print: all one error."""
    with pytest.raises(PayloadError):
        payload.encode(value, what="t")


def test_a_foreign_serializer_that_fails_is_a_payload_error() -> None:
    """Whatever a model's own serializer raises stays inside."""

    class Broken(pydantic.BaseModel):
        @pydantic.model_serializer
        def dump(self) -> dict[str, Any]:
            raise KeyError("no")

    with pytest.raises(PayloadError):
        payload.encode([Broken()], what="t")


@pytest.mark.parametrize("annotation", [socket.socket, list[socket.socket], Box[socket.socket], int | socket.socket])
def test_an_annotation_nobody_can_read_is_refused_before_writing(annotation: Any) -> None:
    """Already `encode` and `decoder` refuse it: nothing is written that could not be read back."""
    with pytest.raises(PayloadError, match="cannot be read back"):
        payload.encode(None, annotation, what="t")
    with pytest.raises(PayloadError):
        payload.decoder(annotation)


def test_reading_the_wrong_shape_names_the_place() -> None:
    """The journal says one thing, the annotation another: PayloadError with the path."""
    with pytest.raises(PayloadError, match=r"the result of s: not a .*Line.*\$\.price"):
        payload.decode(b'{"sku":"a","price":[]}', Line, what="the result of s")
    with pytest.raises(PayloadError, match="streetName"):
        payload.decode(b"{}", Address, what="t")
    with pytest.raises(PayloadError, match=r"\$\[0\]"):
        payload.decode(b"[{}]", list[Address], what="t")


def test_subclasses_of_plain_values_are_written_as_plain() -> None:
    """numpy's float64 is a float, many a str is a subclass: written as what they are."""

    class Loud(str):
        def __str__(self) -> str:
            return self.upper()

    class Count(int):
        pass

    class Ratio(float):
        pass

    assert payload.encode([Loud("a"), Count(2), Ratio(0.5)], what="t") == b'["a",2,0.5]'
    with pytest.raises(PayloadError, match="NaN"):
        payload.encode([Ratio("nan")], what="t")


def test_canonical_bytes_do_not_depend_on_hashes() -> None:
    """A set of strings is the same in every process; other keys, and sets that do not sort, too."""
    code = (
        "from durable.core.payload import canonical as c;"
        "print(c({'b': set('abcdef'), 'a': 1}, what=''), c([{1: set('xyz')}, {'a', 1, None}], what=''))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_fingerprints_are_golden_and_know_where_parts_end() -> None:
    """Stored in journals, so they may never change."""
    assert payload.fingerprint(b"{}") == "44136fa355b3678a"
    assert payload.fingerprint(b"ab", b"c") != payload.fingerprint(b"a", b"bc")


def test_pydantic_is_not_imported_for_whoever_does_not_use_it() -> None:
    """Importing and using the codec leaves pydantic out."""
    code = (
        "import sys; from durable.core import payload as p; p.through([1], list[int], what='');"
        "assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Errors as data


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


def _raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_an_exception_becomes_data_and_comes_back() -> None:
    """Message, class name, code, retryability and the last frames; the bytes give the same again."""
    data = payload.describe(_raised(ValueError("boom")))
    assert (data.message, data.type, data.code, data.retryable) == ("boom", "ValueError", "error", True)
    assert data.stack is not None
    assert "in _raised" in data.stack
    assert payload.decode_error(payload.encode_error(data)) == data


def test_what_an_error_says_about_retries_is_kept() -> None:
    """NonRetryable and its subclasses end retries; RetryAfter says when; a broken number says nothing."""

    class Declined(NonRetryable):
        code = "card_declined"

    declined = payload.describe(Declined("no"))
    assert (declined.retryable, declined.code, declined.type) == (False, "card_declined", "Declined")
    assert payload.describe(RetryAfter("later", seconds=30)).retry_after == 30
    assert payload.describe(RetryAfter("later", seconds=-1)).retry_after == 0
    assert payload.describe(RetryAfter("later", seconds=math.nan)).retry_after is None
    assert payload.describe(RetryAfter("later", seconds="soon")).retry_after is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error", [Unprintable(), Unprintable(Unprintable()), MemoryError(), KeyboardInterrupt(), Exception()]
)
def test_no_exception_is_too_broken_to_describe(error: BaseException) -> None:
    """`__str__` that raises, no message at all: still data that can be written."""
    payload.decode_error(payload.encode_error(payload.describe(_raised(error))))


def test_a_recursion_error_is_described_with_a_bounded_stack() -> None:
    """A thousand frames become twenty lines; causes are told, a loop of causes ends."""

    def fall() -> None:
        fall()

    with pytest.raises(RecursionError) as caught:
        fall()
    stack = payload.describe(caught.value).stack
    assert stack is not None
    assert len(stack.splitlines()) < 30
    first, second = ValueError("one"), ValueError("two")
    first.__cause__, second.__cause__ = second, first
    assert "after ValueError: two" in (payload.describe(first).stack or "")


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters() | st.sampled_from("\0\ud800\udc00\\u05cd8")))
def test_B33_error_text_is_cleaned_reversibly(text: str) -> None:
    """Any text at all becomes storable, and `restore` gives it back exactly."""
    cleaned = payload.clean(text)
    payload.encode(cleaned, what="a cleaned text")
    assert payload.restore(cleaned) == text
    message = payload.describe(_raised(ValueError(text))).message
    assert payload.restore(message) == text


def test_S36_an_error_is_trimmed_never_refused() -> None:
    """A megabyte of message, details nobody can write, NUL in each field: an error is always stored."""
    assert len(payload.describe(ValueError("x" * 10**6)).message) < 5_000
    wild = ErrorData("\0" * 10**6, "\0", "\ud800", True, math.inf, details=object(), stack="\0" * 10**6)
    data = payload.encode_error(wild)
    assert len(data) < 128 << 10
    assert payload.decode_error(data).details is None
    kept = payload.decode_error(payload.encode_error(ErrorData("a\0", details={"k": 1})))
    assert (kept.message, kept.details) == ("a\\u0000", {"k": 1})


def test_a_code_that_is_no_text_cannot_wedge_a_run() -> None:
    """An author's `code = 404` is written as text, for an error that cannot be read back would be lost."""

    class Http(DurableError):
        code = 404  # type: ignore[assignment]

    assert payload.decode_error(payload.encode_error(payload.describe(Http("x")))).code == "404"
