"""What a request may cost: bytes, depth, keys, time, and how many of them. Everything here is bounded in memory, too."""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from durable.core import payload
from durable.core.errors import PayloadError, PayloadTooLarge
from durable.server.errors import ApiError

MAX_DIGITS = 400
"""Digits of one number. More is a program's mistake, and takes quadratic time to read."""
MAX_BUCKETS = 50_000
"""Keys and peers remembered by one limit; the longest silent are forgotten first."""
_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))

Receive = Callable[[], Any]


class Bucket:
    """A token bucket for each key: `rate` a second, `burst` at once."""

    def __init__(self, rate: float, burst: float, now: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._now = now
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, cost: float = 1.0) -> float:
        """0.0: go on. Else the seconds after which it is worth asking again; nothing was taken."""
        left = self._filled(key)
        if left < cost:
            return (cost - left) / self._rate
        self._left[key] = (left - cost, self._now())
        self._left.move_to_end(key)
        if len(self._left) > MAX_BUCKETS:
            self._left.popitem(last=False)
        return 0.0

    def wait(self, key: str) -> float:
        """What `take` would answer."""
        return max(0.0, (1.0 - self._filled(key)) / self._rate)

    def _filled(self, key: str) -> float:
        known = self._left.get(key)
        if known is None:
            return self._burst
        left, at = known
        return min(self._burst, left + (self._now() - at) * self._rate)


class Slots:
    """How many of something each key holds open."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[str, int] = {}

    def take(self, key: str) -> bool:
        if self._held.get(key, 0) >= self._limit:
            return False
        self._held[key] = self._held.get(key, 0) + 1
        return True

    @property
    def held(self) -> int:
        """By all keys together."""
        return sum(self._held.values())

    def free(self, key: str) -> None:
        left = self._held.get(key, 0) - 1
        if left > 0:
            self._held[key] = left
        else:
            self._held.pop(key, None)


async def read_body(receive: Receive, headers: Sequence[tuple[bytes, bytes]], *, limit: int, seconds: float) -> bytes:
    """The body, bounded in bytes and in time. Raises ApiError; the connection is closed then, whatever else is sent."""
    length = _length(headers)
    if length is not None and length > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "bad_request", "The connection ended before the body did.", close=True)
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise ApiError(
            408, "body_timeout", f"The body did not arrive within {seconds:g} s. Send it at once.", close=True
        ) from None
    return b"".join(parts)


def _length(headers: Sequence[tuple[bytes, bytes]]) -> int | None:
    for name, value in headers:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 19 else None
    return None


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        "body_too_large",
        f"A body has at most {limit} bytes here. Store large data elsewhere and send its id.",
        close=True,
    )


def check_json(data: bytes, *, what: str = "the body") -> None:
    """Refuse JSON that could not be stored, or that two programs read differently: doubled keys, numbers no float holds, a
    byte order mark, NUL, lone surrogates, nesting and keys beyond the bounds. Raises ApiError."""
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ApiError(400, "bad_json", f"Of {what}: it begins with a byte order mark. Send plain UTF-8.")
    if len(data) > MAX_DIGITS and _NUMBER.search(_without_strings(data)):
        raise ApiError(400, "bad_json", f"Of {what}: a number has more than {MAX_DIGITS} digits. Send it as text.")
    try:
        payload.check(data, what=what, limit=len(data))
    except PayloadTooLarge as error:
        raise ApiError(413, error.code, str(error)) from None
    except PayloadError as error:
        raise ApiError(400, error.code if error.code == "payload_text" else "bad_json", str(error)) from None
    if data.count(b'"') >= 4:
        _refuse_doubles(data, what)


def _without_strings(data: bytes) -> bytes:
    if b"\\" in data:
        data = data.replace(b"\\\\", b"--").replace(b'\\"', b"--")
    return b"".join(data.split(b'"')[::2])


def _refuse_doubles(data: bytes, what: str) -> None:
    """Depth is bounded by now, so the plain parser is safe; it alone tells of every pair."""
    try:
        _PAIRS.decode(data.decode())
    except _Doubled as error:
        raise ApiError(
            400, "bad_json", f"Of {what}: the key {str(error)!r} stands twice in one object. Send each once."
        ) from None


class _Doubled(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) == len(pairs):
        return
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise _Doubled(key[:100])
        seen.add(key)


_PAIRS = json.JSONDecoder(object_pairs_hook=_once, parse_int=str, parse_float=str)
