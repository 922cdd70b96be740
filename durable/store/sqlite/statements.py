"""Many rows in one statement, in and out.

In: `VALUES (?,?),(?,?)…`, in a few sizes, filled up with NULL rows that the statements pass over, so that the texts
stay cached. Out: one row that holds a JSON list of lists, and beside it the blobs joined together, cut apart again by
their lengths.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import msgspec

MAX_PARAMETERS = 32_000
"""SQLite takes 32,766 by default."""

_SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
_decode = msgspec.json.Decoder(list[Any]).decode

Row = tuple[Any, ...]


def execute_values(cx: sqlite3.Connection, text: Callable[[str], str], rows: Sequence[Row], *tail: Any) -> int:
    """Run `text(values)` over all rows, as few times as parameters allow; `tail` fills the `?`s after them. Returns
    how many rows were changed. `text` must pass over rows that begin with NULL."""
    before = cx.total_changes
    width = len(rows[0])
    most = min(_SIZES[-1], MAX_PARAMETERS // width)
    for start in range(0, len(rows), most):
        chunk = rows[start : start + most]
        size = _SIZES[bisect_left(_SIZES, len(chunk))]
        parameters = list(chain.from_iterable(chunk))
        parameters += (None,) * ((size - len(chunk)) * width)
        parameters += tail
        cx.execute(_text(text, size, width), parameters)
    return cx.total_changes - before


@cache
def _text(text: Callable[[str], str], size: int, width: int) -> str:
    row = "(" + ",".join("?" * width) + ")"
    return text("VALUES " + ",".join([row] * size))


def fetch_packed(
    cx: sqlite3.Connection, source: str, parameters: Sequence[Any], plain: str, blobs: Sequence[str] = ()
) -> list[list[Any]]:
    """The rows of `SELECT plain, blobs FROM source`, fetched in one step. The order is not to be relied on."""
    lengths = "".join(f", length({blob})" for blob in blobs)
    # group_concat joins the bytes as they are, and both aggregates meet the rows in the same order.
    joined = "".join(f", CAST(group_concat({blob}, '') AS BLOB)" for blob in blobs)
    cursor = cx.execute(f"SELECT json_group_array(json_array({plain}{lengths})){joined} FROM {source}", parameters)
    answer = cursor.fetchone()
    cursor.close()
    rows: list[list[Any]] = _decode(answer[0])
    count = len(blobs)
    for column in range(count):
        joint = answer[1 + column]
        position = 0
        for row in rows:
            length = row[column - count]
            if length is not None:
                row[column - count] = joint[position : position + length]
                position += length
    return rows


def fetch_value(cx: sqlite3.Connection, text: str, parameters: Sequence[Any] = ()) -> Any:
    """The first column of the first row, or None."""
    cursor = cx.execute(text, parameters)
    row = cursor.fetchone()
    cursor.close()
    return None if row is None else row[0]


def listed(values: Sequence[Any]) -> str:
    """A parameter for `IN (SELECT value FROM json_each(?))`."""
    return msgspec.json.encode(values).decode()
