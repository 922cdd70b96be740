"""Tags and search attributes: what runs are found by. Checked where they are given, so that every store can index them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from durable.core.errors import DefinitionError
from durable.core.names import check_name

Attribute = str | int | float | bool

MAX_ATTRIBUTES = 50
MAX_TAGS = 50
MAX_TEXT = 500
"""Characters of an attribute that is a text."""


def check_attributes(given: Mapping[str, Attribute | None]) -> dict[str, Attribute | None]:
    """Names and values; None removes one. Raises DefinitionError."""
    if len(given) > MAX_ATTRIBUTES:
        raise DefinitionError(f"A run has at most {MAX_ATTRIBUTES} search attributes, not {len(given)}.")
    for name, value in given.items():
        check_name(name, "search attribute", reserved=False)
        _check_value(name, value)
    return dict(given)


def check_tags(given: Iterable[str]) -> tuple[str, ...]:
    """Each once, in the order given. Raises DefinitionError."""
    tags = tuple(dict.fromkeys(given))
    if isinstance(given, str) or len(tags) > MAX_TAGS:
        raise DefinitionError(f"Tags are a list of at most {MAX_TAGS} texts, not {given!r:.80}.")
    for tag in tags:
        check_name(tag, "tag", reserved=False)
    return tags


def _check_value(name: str, value: object) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise DefinitionError(
                f"Search attribute {name!r} has {len(value):,} characters, and {MAX_TEXT} is the most."
            )
        if "\x00" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise DefinitionError(f"Search attribute {name!r} has characters that no store keeps.")
        return
    if isinstance(value, int):
        if not -(2**53) < value < 2**53:
            raise DefinitionError(f"Search attribute {name!r} is a number beyond 2**53: make it a text.")
        return
    if isinstance(value, float) and math.isfinite(value):
        return
    raise DefinitionError(f"Search attribute {name!r} is a text, a finite number or a truth, not {value!r:.60}.")
