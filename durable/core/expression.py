"""Conditions over an event, as a small safe language: `if` of triggers, `where` of waits, keys and priorities of flow control.

    event.name == 'order.paid' and (event.data.total >= 100 or not event.data["first order"]) and event.data.city in ['Graz']

Paths begin with `event`, which has id, name, data and ts; behind `data` there is only what the sender put there, and what is
missing is null. Literals are JSON's, and text in single quotes. `== != < <= > >= in`, `and or not` (also `&& || !`) and
parentheses; no calls, no arithmetic, no regular expressions. Values of different types are unequal and unordered, never an
error; booleans are no numbers. Bounded in size, depth and in what one evaluation may look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import msgspec

from durable.core.errors import DefinitionError
from durable.core.errors import TooCostly as TooCostly

MAX_LENGTH = 4_000
"""Characters of an expression."""
MAX_DEPTH = 32
"""Parentheses and `not` within each other."""
MAX_TERMS = 200
"""Comparisons, paths and literals."""
BUDGET = 100_000
"""Values one evaluation may look at."""

FIELDS = ("id", "name", "data", "ts")
"""What an event has."""

Path = tuple[str | int, ...]
"""Behind `event`: ("data", "order", "id")."""

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?![\w.])
    | (?P<text>"(?:[^"\\\x00-\x1f]|\\.)*" | '(?:[^'\\\x00-\x1f]|\\.)*')
    | (?P<word>[A-Za-z_$][A-Za-z0-9_$]*)
    | (?P<sign>&&|\|\||==|!=|<=|>=|[<>!().,\[\]])
    )""",
    re.VERBOSE,
)
_WORDS = {"&&": "and", "||": "or", "!": "not"}
_CONSTANTS = {"true": True, "false": False, "null": None}
_COMPARISONS = frozenset({"==", "!=", "<", "<=", ">", ">=", "in"})


class _Meter:
    """Counts down while one evaluation looks at values."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = BUDGET

    def take(self, count: int = 1) -> None:
        self.left -= count
        if self.left < 0:
            raise TooCostly(
                f"The expression looked at more than {BUDGET:,} values of this event. Compare smaller parts of it."
            )


Evaluate = Callable[[Mapping[str, Any], _Meter], Any]


class _Node:
    """One piece of an expression: how to evaluate it, and what it is if that can be known."""

    __slots__ = ("evaluate", "is_literal", "literal", "parts", "path")

    def __init__(
        self,
        evaluate: Evaluate,
        *,
        path: Path | None = None,
        is_literal: bool = False,
        literal: Any = None,
        parts: tuple[tuple[Path, Any], ...] = (),
    ) -> None:
        self.evaluate = evaluate
        self.path = path
        self.is_literal = is_literal
        self.literal = literal
        self.parts = parts
        """(path, literal) pairs that must be equal for this to be true."""


class Expression:
    """A parsed expression. Made by `parse`."""

    __slots__ = ("_root", "source")

    def __init__(self, source: str, root: _Node) -> None:
        self.source = source
        self._root = root

    @property
    def path(self) -> Path | None:
        """Where it leads, if it is nothing but a path."""
        return self._root.path

    @property
    def must_equal(self) -> tuple[tuple[Path, Any], ...]:
        """(path, scalar) pairs without which it cannot be true: what stands before and behind `==`, joined by `and`."""
        return self._root.parts

    def value(self, event: Mapping[str, Any]) -> Any:
        """What it comes to for an event `{id, name, data, ts}`. Raises TooCostly."""
        return self._root.evaluate(event, _Meter())

    def holds(self, event: Mapping[str, Any]) -> bool:
        """Whether it is true: null, false, 0, and empty text, lists and objects are not. Raises TooCostly."""
        return bool(self.value(event))


def parse(source: str) -> Expression:
    """The expression. Raises DefinitionError that shows the place."""
    if not isinstance(source, str):
        raise DefinitionError(f"An expression is text, not {source!r:.80}.")
    if len(source) > MAX_LENGTH:
        raise DefinitionError(f"An expression has at most {MAX_LENGTH:,} characters, this one {len(source):,}.")
    return _parsed(source)


@lru_cache(maxsize=1024)
def _parsed(source: str) -> Expression:
    return Expression(source, _Parser(source).whole())


def parse_path(source: str) -> Path:
    """A path into `event.data`, with or without that beginning: `customer.id`, `event.data.customer.id`, `["my key"]`. Raises
    DefinitionError."""
    if not isinstance(source, str) or not 0 < len(source.strip()) <= MAX_LENGTH:
        raise DefinitionError(f"A key is a path into event.data, such as 'customer.id', not {source!r:.80}.")
    return _parsed_path(source)


@lru_cache(maxsize=1024)
def _parsed_path(source: str) -> Path:
    text = source.strip()
    if not re.match(r"event\s*[.\[]", text):
        text = f"event.data{text}" if text.startswith("[") else f"event.data.{text}"
    path = parse(text).path
    if path is None:
        raise DefinitionError(
            f"A key is a path into event.data, such as 'customer.id'; {source!r:.80} is more than a path."
        )
    return path


def look_up(event: Mapping[str, Any], path: Path) -> Any:
    """The value there; None where there is none."""
    value: Any = event
    for step in path:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and step < len(value) else None
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
        if value is None:
            return None
    return value


def equal(a: Any, b: Any, take: Callable[[], None]) -> bool:
    """Equality of JSON values: numbers by value, booleans no numbers, lists and objects in depth."""
    take()
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Mapping):
        return (
            isinstance(b, Mapping)
            and len(a) == len(b)
            and all(key in b and equal(value, b[key], take) for key, value in a.items())
        )
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(equal(x, y, take) for x, y in zip(a, b, strict=True))
    if isinstance(b, Mapping | list):
        return False
    return bool(a == b)


class _Parser:
    """Recursive descent over tokens; every level of it is bounded."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens = list(self._read())
        self._next = 0
        self._terms = 0

    # tokens

    def _read(self) -> Iterator[tuple[str, str, int]]:
        at, end = 0, len(self._source.rstrip())
        while at < end:
            found = _TOKEN.match(self._source, at)
            if found is None:
                self._refuse("this cannot be read", at + len(self._source[at:]) - len(self._source[at:].lstrip()))
            kind = str(found.lastgroup)
            yield kind, found[kind], found.start(kind)
            at = found.end()

    def _peek(self) -> str:
        """The next sign or word as an operator is written; empty at the end, and for a literal."""
        if self._next == len(self._tokens):
            return ""
        kind, text, _ = self._tokens[self._next]
        return _WORDS.get(text, text) if kind in ("sign", "word") else ""

    def _take(self, wanted: str) -> bool:
        if self._peek() != wanted:
            return False
        self._next += 1
        return True

    def _refuse(self, why: str, at: int | None = None) -> NoReturn:
        if at is None:
            at = self._tokens[self._next][2] if self._next < len(self._tokens) else len(self._source.rstrip())
        start = max(0, at - 40)
        shown = re.sub(r"\s", " ", self._source[start : at + 40])
        raise DefinitionError(
            f"The expression is wrong at character {at + 1}: {why}.\n  {shown}\n  {' ' * (at - start)}^\n"
            "Write paths such as event.data.total, literals, == != < <= > >= in, and, or, not, parentheses."
        )

    # grammar

    def whole(self) -> _Node:
        node = self._either(0)
        if self._next < len(self._tokens):
            self._refuse("nothing more is expected here")
        return node

    def _either(self, depth: int) -> _Node:
        nodes = [self._both(depth)]
        while self._take("or"):
            nodes.append(self._both(depth))
        if len(nodes) == 1:
            return nodes[0]
        parts = [node.evaluate for node in nodes]
        return _Node(lambda event, meter: any(part(event, meter) for part in parts))

    def _both(self, depth: int) -> _Node:
        nodes = [self._negated(depth)]
        while self._take("and"):
            nodes.append(self._negated(depth))
        if len(nodes) == 1:
            return nodes[0]
        parts = [node.evaluate for node in nodes]
        return _Node(
            lambda event, meter: all(part(event, meter) for part in parts),
            parts=tuple(pair for node in nodes for pair in node.parts),
        )

    def _negated(self, depth: int) -> _Node:
        if not self._take("not"):
            return self._compared(depth)
        if depth >= MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} levels")
        inner = self._negated(depth + 1).evaluate
        return _Node(lambda event, meter: not inner(event, meter))

    def _compared(self, depth: int) -> _Node:
        left = self._operand(depth)
        sign = self._peek()
        negated = sign == "not"
        if negated:
            self._next += 1
            sign = self._peek()
            if sign != "in":
                self._refuse("only `in` may follow `not` here")
        if sign not in _COMPARISONS:
            return left
        self._next += 1
        right = self._operand(depth)
        if self._peek() in _COMPARISONS:
            self._refuse("comparisons are not chained; join two of them with `and`")
        compare, a, b = _COMPARE[sign], left.evaluate, right.evaluate
        if negated:
            return _Node(lambda event, meter: not compare(a(event, meter), b(event, meter), meter))
        return _Node(
            lambda event, meter: compare(a(event, meter), b(event, meter), meter),
            parts=_must_equal(left, right) if sign == "==" else (),
        )

    def _operand(self, depth: int) -> _Node:
        self._terms += 1
        if self._terms > MAX_TERMS:
            self._refuse(f"more than {MAX_TERMS} terms")
        if depth >= MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} levels")
        if self._take("("):
            node = self._either(depth + 1)
            if not self._take(")"):
                self._refuse("`)` is missing")
            return node
        if self._take("["):
            return self._list(depth)
        if self._next == len(self._tokens):
            self._refuse("a value is missing")
        kind, text, at = self._tokens[self._next]
        if kind == "word" and text == "event":
            self._next += 1
            return self._path()
        if kind in ("number", "text") or text in _CONSTANTS:
            self._next += 1
            return _literal(self._constant(kind, text, at))
        if kind == "word":
            self._refuse(f"there is no {text!r}; a path begins with event, and text stands in quotes")
        self._refuse("a path, a literal or `(` is expected")

    def _list(self, depth: int) -> _Node:
        items: list[_Node] = []
        while not self._take("]"):
            if items and not self._take(","):
                self._refuse("`,` or `]` is missing")
            items.append(self._operand(depth + 1))
        if all(item.is_literal for item in items):
            return _literal([item.literal for item in items])
        parts = [item.evaluate for item in items]
        return _Node(lambda event, meter: [part(event, meter) for part in parts])

    def _path(self) -> _Node:
        steps: list[str | int] = []
        while True:
            if self._take("."):
                if self._next == len(self._tokens) or self._tokens[self._next][0] != "word":
                    self._refuse('a name is expected behind the dot; write ["..."] for any other key')
                self._step(steps, self._tokens[self._next][1])
            elif self._take("["):
                kind, text, at = self._tokens[self._next] if self._next < len(self._tokens) else ("", "", None)
                if kind == "text":
                    self._step(steps, self._constant(kind, text, at))
                elif kind == "number" and text.isdigit() and len(text) < 10:
                    self._step(steps, int(text))
                else:
                    self._refuse("a key in quotes or a position is expected")
                if not self._take("]"):
                    self._refuse("`]` is missing")
            else:
                break
        if not steps:
            self._refuse(f"an event has {', '.join(FIELDS)}: say which")
        path = tuple(steps)

        def value(event: Mapping[str, Any], meter: _Meter) -> Any:
            meter.take()
            return look_up(event, path)

        return _Node(value, path=path)

    def _step(self, steps: list[str | int], step: str | int) -> None:
        if not steps and step not in FIELDS:
            self._refuse(f"an event has {', '.join(FIELDS)}, and no {step!r}; what was sent is in event.data")
        if steps and steps[0] != "data":
            self._refuse(f"event.{steps[0]} has no parts")
        if len(steps) >= MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} levels")
        self._next += 1
        steps.append(step)

    def _constant(self, kind: str, text: str, at: int | None) -> Any:
        if kind == "word":
            return _CONSTANTS[text]
        try:
            if kind == "text" and text[0] == "'":
                text = '"' + re.sub(r"\\.|\"", _requoted, text[1:-1]) + '"'
            value = msgspec.json.decode(text)
            if isinstance(value, str):
                value.encode()  # half a surrogate pair is no text
        except (msgspec.DecodeError, UnicodeEncodeError) as error:
            self._refuse(f"this is no JSON: {error}", at)
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            self._refuse("this number is too large", at)
        return value


def _requoted(found: re.Match[str]) -> str:
    """What JSON wants to see between double quotes."""
    return {'"': '\\"', "\\'": "'"}.get(found[0], found[0])


def _literal(value: Any) -> _Node:
    return _Node(lambda event, meter: value, is_literal=True, literal=value)


def _must_equal(left: _Node, right: _Node) -> tuple[tuple[Path, Any], ...]:
    if left.path is None:
        left, right = right, left
    if left.path is None or not right.is_literal or isinstance(right.literal, list):
        return ()
    return ((left.path, right.literal),)


def _equal(a: Any, b: Any, meter: _Meter) -> bool:
    return equal(a, b, meter.take)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any, _Meter], bool]:
    def ordered(a: Any, b: Any, meter: _Meter) -> bool:
        if isinstance(a, str) and isinstance(b, str):
            meter.take(1 + min(len(a), len(b)) // 64)
            return compare(a, b)
        return _is_number(a) and _is_number(b) and compare(a, b)

    return ordered


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _contained(a: Any, b: Any, meter: _Meter) -> bool:
    """In a list, as a part of a text, or as a key of an object."""
    if isinstance(b, Sequence) and not isinstance(b, str):
        return any(equal(a, item, meter.take) for item in b)
    if not isinstance(a, str):
        return False
    if isinstance(b, str):
        meter.take(1 + len(b) // 64)
        return a in b
    return isinstance(b, Mapping) and a in b


_COMPARE: dict[str, Callable[[Any, Any, _Meter], bool]] = {
    "==": _equal,
    "!=": lambda a, b, meter: not equal(a, b, meter.take),
    "<": _ordered(lambda a, b: a < b),
    "<=": _ordered(lambda a, b: a <= b),
    ">": _ordered(lambda a, b: a > b),
    ">=": _ordered(lambda a, b: a >= b),
    "in": _contained,
}
