"""Which names may be given to workflows, steps, signals, events: what a store, a queue and a log line can bear."""

from __future__ import annotations

import re

from durable.core.errors import DefinitionError, ReservedId

MAX_NAME = 200
"""Characters in a name or version: they stand in indexes and queue names."""

_RESERVED = ("__", "rollback:")
# C0 and C1 controls, line and paragraph separators, and surrogates, which no store keeps.
_UNNAMEABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def check_name(name: object, what: str, *, reserved: bool = True) -> None:
    """Refuse a name that a store, a queue or a log line would choke on, or that is ours. Raises DefinitionError."""
    if not isinstance(name, str):
        raise DefinitionError(f"A {what} is text, not {name!r}.")
    if not name or name != name.strip():
        raise DefinitionError(f"A {what} is not empty and has no space around it: {name!r}.")
    if len(name) > MAX_NAME:
        raise DefinitionError(f"A {what} has at most {MAX_NAME} characters, this one {len(name)}: {name[:40]!r}...")
    if found := _UNNAMEABLE.search(name):
        raise DefinitionError(f"A {what} is one line of plain text; {name!a} contains {found[0]!a}.")
    if reserved and name.startswith(_RESERVED):
        raise ReservedId(f"A {what} may not begin with {' or '.join(_RESERVED)}; the engine uses those: {name!r}.")
