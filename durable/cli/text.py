"""Values as people and programs read them: safe text, times, JSON. Pure; the only door from stored data to a terminal.

A payload, a name or an error may hold anything. Control characters, ANSI sequences, bidi overrides and invisible
characters are shown as escapes, in JSON output too (where the escape is JSON's own, so nothing is lost).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

_UNSAFE = (
    "\x7f-\x9f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb"
    "\U000e0000-\U000e0fff\ud800-\udfff"
)
_IN_TEXT = re.compile(f"[\x00-\x1f{_UNSAFE}]")
_IN_LINES = re.compile(f"[\x00-\x09\x0b-\x1f{_UNSAFE}]")
_IN_JSON = re.compile(f"[{_UNSAFE}]")

MAX_PARSED = 256 << 10
"""Bytes of a payload that are read for a preview; a larger one is told by its size."""

# ------------------------------------------------------------------ text


def safe(value: object) -> str:
    """One line of text that cannot steer a terminal."""
    return _IN_TEXT.sub(_escape, str(value))


def shown_url(value: str) -> str:
    """A store's URL without its password."""
    bare = re.sub(r"(://[^/?#@]*?:)[^/?#]*@", r"\1***@", value)
    return safe(re.sub(r"([?&](?:ssl)?password=)[^&#]*", r"\1***", bare))


def safe_lines(value: object) -> str:
    """The same for text of several lines: line breaks stay, tabs become spaces."""
    return _IN_LINES.sub(_escape, str(value).replace("\r\n", "\n").expandtabs(4))


def shorten(text: str, width: int) -> str:
    """At most `width` characters, saying so if some are missing."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    short = {9: r"\t", 10: r"\n", 13: r"\r"}.get(code)
    if short is not None:
        return short
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# ------------------------------------------------------------------ payloads and JSON


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON as text; `indent=None` gives one line. Raw payloads pass through unread, so numbers stay as they are."""
    import msgspec

    data = msgspec.json.format(msgspec.json.encode(value), indent=-1 if indent is None else indent)
    return _IN_JSON.sub(_json_escape, data.decode("utf-8", "replace"))


def _json_escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))


def raw(payload: bytes | None) -> Any:
    """A stored payload as a part of JSON output."""
    import msgspec

    if payload is None:
        return None
    try:
        msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return f"(not JSON: {size(len(payload))})"
    return msgspec.Raw(payload)


def pretty(payload: bytes) -> str:
    """A stored payload for people, over several lines where it needs them."""
    if len(payload) > MAX_PARSED:
        return f"({size(len(payload))} of JSON; --json shows all of it)"
    return safe_lines(to_json(raw(payload)))


def preview(payload: bytes | None, width: int = 60) -> str:
    """A stored payload in one short line."""
    if payload is None or payload == b"null":
        return ""
    if len(payload) > MAX_PARSED:
        return f"({size(len(payload))})"
    return shorten(safe(to_json(raw(payload), indent=None)), width)


def size(count: int) -> str:
    """Bytes, as people say it."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


# ------------------------------------------------------------------ times


def iso(at: int | None) -> str | None:
    """A stored time (µs) in ISO 8601, UTC."""
    if at is None:
        return None
    return datetime.fromtimestamp(at // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{at % 1_000_000:06d}Z"


def moment(at: int) -> str:
    """A stored time, local, with its zone."""
    local = datetime.fromtimestamp(at / 1e6, UTC).astimezone()
    return local.strftime("%Y-%m-%d %H:%M:%S ") + (local.tzname() or local.strftime("%z"))


def clock(at: int) -> str:
    """A stored time of today, local, to the millisecond."""
    return datetime.fromtimestamp(at / 1e6, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]


def ago(at: int, now: int) -> str:
    """A stored time as seen from now, roughly."""
    distance = abs(at - now)
    rough = f"{distance // 1_000_000} s" if 1_000_000 <= distance < 60_000_000 else span(distance)
    if distance >= 60_000_000:
        rough = " ".join(rough.split()[:2])  # the larger unit is enough
    if at > now:
        return f"in {rough}"
    return "just now" if distance < 1_000_000 else f"{rough} ago"


def span(us: int) -> str:
    """A duration in µs with the two units that matter."""
    if us < 1_000_000:
        return f"{us / 1_000:.0f} ms" if us >= 10_000 else f"{us / 1_000:.1f} ms"
    if us < 60_000_000:
        return f"{us / 1e6:.2f} s" if us < 10_000_000 else f"{us / 1e6:.1f} s"
    rest = us // 1_000_000
    for large, small, big, little in ((86_400, 3_600, "d", "h"), (3_600, 60, "h", "min"), (60, 1, "min", "s")):
        if rest >= large:
            return f"{rest // large} {big}" + (f" {rest % large // small} {little}" if rest % large // small else "")
    return f"{rest} s"
