"""Server-sent events as they come over a connection, comments too: they tell how a stream ends."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable

from msgspec import Struct

MAX_BLOCK = 64 << 20
"""Bytes of one event; more is no stream of ours."""


class Block(Struct, frozen=True):
    """One event, or one comment. What a cut has left half is none."""

    data: bytes = b""
    id: str | None = None
    comment: str | None = None


async def blocks(chunks: AsyncIterable[bytes]) -> AsyncGenerator[Block, None]:
    """By line feeds alone: text in an event may hold other characters that some call line ends. Raises ValueError."""
    rest = b""
    async for chunk in chunks:
        rest += chunk
        *whole, rest = rest.replace(b"\r\n", b"\n").split(b"\n\n")
        if len(rest) > MAX_BLOCK:
            raise ValueError("an event has no end")
        for part in whole:
            if (block := _block(part)) is not None:
                yield block


def _block(part: bytes) -> Block | None:
    data: list[bytes] = []
    id = comment = None
    for line in part.split(b"\n"):
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"id":
            id = value.decode("utf-8", "replace")
        elif not name and value:
            comment = value.decode("utf-8", "replace")
    if not data and comment is None:
        return None
    return Block(b"\n".join(data), id, comment)
