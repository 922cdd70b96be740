"""What a wait asks of an event, as bytes that every store keeps: `{"match": {...}}` or `{"if": "expression"}`, nothing for any.

`match` is a part of the event's data: objects hold at least what it says, lists and scalars are equal, numbers by value,
booleans are no numbers. So that the waits of many runs need not all be looked at, a wait names one *probe*, a hash of a path
and a scalar that must be there, and an event names those it has; a store compares these and hands out candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import Struct

from durable.core import payload
from durable.core.errors import DefinitionError
from durable.core.expression import MAX_DEPTH, Path, TooCostly, equal, parse

MAX_PROBES = 64
"""An event with more scalars than this names none, and is shown to every wait for its name."""
MAX_MATCH = 16 << 10
"""Bytes of a `match`."""

_SCALAR = (str, int, float)

Holds = Callable[[Mapping[str, Any]], bool]
"""Takes an event as `{id, name, data, ts}`."""


class _Condition(Struct, rename={"source": "if"}, omit_defaults=True, forbid_unknown_fields=True):
    match: dict[str, Any] | None = None
    source: str | None = None


def condition_of(match: Mapping[str, Any] | None = None, where: str | None = None) -> bytes | None:
    """The condition as bytes; None where anything will do. Raises DefinitionError, PayloadError."""
    if match is not None and where is not None:
        raise DefinitionError("Give `match` or `where`, not both: put the match into the expression, joined by `and`.")
    if where is not None:
        parse(where)
        return msgspec.json.encode(_Condition(source=where))
    if match is None:
        return None
    if not isinstance(match, Mapping):
        raise DefinitionError(f"A match is an object of what event.data must hold, not {match!r:.80}.")
    if not match:
        return None
    data = payload.encode(match, what="the match of a wait for an event", limit=MAX_MATCH)
    return b'{"match":%b}' % data


@lru_cache(maxsize=4096)
def holds(condition: bytes | None) -> Holds:
    """What says whether an event is what a condition asks for. An event too large to judge is not. Raises DefinitionError."""
    if condition is None:
        return _anything
    asked = _read(condition)
    if asked.match is not None:
        match = asked.match
        return lambda event: within(match, event.get("data"))
    expression = parse(asked.source or "")

    def judge(event: Mapping[str, Any]) -> bool:
        try:
            return expression.holds(event)
        except TooCostly:
            return False

    return judge


def parts_of(condition: bytes | None) -> tuple[dict[str, Any] | None, str | None]:
    """The match and the expression of a condition, of which there is at most one. Raises DefinitionError."""
    if condition is None:
        return None, None
    asked = _read(condition)
    return asked.match, asked.source


def as_expression(match: Mapping[str, Any]) -> str | None:
    """A match as an expression that says the same, for wires that have no match; None where none does: of null, which
    would have to be there, of lists, and of objects of which nothing is asked."""
    terms = []
    for path, value in _leaves(match, ("event", "data")):
        if value is None or isinstance(value, list | Mapping):
            return None
        terms.append(f"{_spelled(path)} == {msgspec.json.encode(value).decode()}")
    source = " and ".join(terms)
    try:
        parse(source)
    except DefinitionError:  # too long, or more terms than an expression may have
        return None
    return source


def _leaves(value: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _leaves(inner, (*path, key))
        else:
            yield (*path, key), inner


def _spelled(path: tuple[str, ...]) -> str:
    return path[0] + "".join(
        f".{step}" if step.isidentifier() and step.isascii() else f"[{msgspec.json.encode(step).decode()}]"
        for step in path[1:]
    )


def within(match: Any, data: Any) -> bool:
    """Whether `data` holds all of `match`."""
    if isinstance(match, Mapping):
        return isinstance(data, Mapping) and all(
            key in data and within(value, data[key]) for key, value in match.items()
        )
    return equal(match, data, _free)


def probe_of(condition: bytes | None) -> str:
    """The probe of a wait; empty where nothing is known that must be so."""
    if condition is None:
        return ""
    asked = _read(condition)
    if asked.match is not None:
        pairs = list(_scalars(asked.match))
    else:
        pairs = [(path[1:], value) for path, value in parse(asked.source or "").must_equal if _is_probed(path, value)]
    # Text and numbers tell more apart than booleans do.
    pairs.sort(key=lambda pair: (isinstance(pair[1], bool), pair[0]))
    return _hash(*pairs[0]) if pairs else ""


def probes_of(data: Any) -> tuple[str, ...] | None:
    """The probes of an event's data; None: too many to name."""
    found: list[str] = []
    for path, value in _scalars(data):
        if len(found) >= MAX_PROBES:
            return None
        found.append(_hash(path, value))
    return tuple(found)


def _anything(event: Mapping[str, Any]) -> bool:
    return True


def _free() -> None:
    """A match is small, and nothing in the data is looked at twice."""


def _read(condition: bytes) -> _Condition:
    try:
        asked = msgspec.json.decode(condition, type=_Condition)
    except msgspec.DecodeError as error:
        raise DefinitionError(f"A condition is {{'match': {{...}}}} or {{'if': 'expression'}}: {error}.") from error
    if (asked.match is None) == (asked.source is None):
        raise DefinitionError("A condition has a match or an expression, one of the two.")
    return asked


def _is_probed(path: Path, value: Any) -> bool:
    """Whether an event that has this value there is sure to name a probe for it."""
    return len(path) > 1 and path[0] == "data" and value is not None and all(isinstance(step, str) for step in path)


def _scalars(data: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Paths through objects to text, numbers and booleans. What lies deeper than any expression reaches is left out of a
    wait's and of an event's alike."""
    left: list[tuple[tuple[Any, ...], Any]] = [((), data)]
    while left:
        path, value = left.pop()
        if isinstance(value, _SCALAR):  # first: asking an abstract class costs more than the rest
            if path:
                yield path, value
        elif isinstance(value, Mapping) and len(path) < MAX_DEPTH:
            left.extend([((*path, key), inner) for key, inner in value.items()])


def _hash(path: tuple[Any, ...], value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        text = msgspec.json.encode((path, value))
    except (OverflowError, UnicodeEncodeError):  # an integer beyond 64 bits
        text = repr((path, value)).encode("utf-8", "backslashreplace")
    return hashlib.sha256(text).hexdigest()[:16]
