"""What this Redis may lose, as sentences for whoever runs it."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from redis.exceptions import ResponseError

from durable.core.errors import TransportError
from durable.transports.bullmq.link import Link

OLDEST = (6, 2)
"""The version that BullMQ asks for."""


class Durability(Struct, frozen=True):
    """`sentence` says what is known. `evicts`: keys may be thrown away while they are needed. `weak`: something should be
    changed."""

    sentence: str
    evicts: bool = False
    weak: bool = False


async def look(link: Link) -> Durability:
    """Ask the server about itself. Raises TransportError if it cannot be reached, refuses us, or is too old."""
    try:
        info = await link.ask("INFO")
    except ResponseError as error:
        await _greet(link)
        return Durability(f"What this Redis may lose could not be checked, it does not say: {error}.")
    _check_version(info)
    policy = _text(info.get("maxmemory_policy")) or await _setting(link, "maxmemory-policy")
    unknown = [] if policy else ["maxmemory-policy"]
    said: list[str] = []
    evicts = bool(policy) and policy != "noeviction"
    if evicts:
        said.append(
            f"It throws keys away when its memory is full (maxmemory-policy {policy}), jobs among them: set maxmemory-policy "
            "noeviction."
        )
    if "aof_enabled" not in info:
        unknown.append("appendonly")
    elif not int(info["aof_enabled"]):
        said.append("A restart loses what came since its last snapshot (appendonly no): set appendonly yes.")
    else:
        fsync = await _setting(link, "appendfsync")
        if not fsync:
            unknown.append("appendfsync")
        elif fsync == "no":
            said.append(
                "A crash of its machine may lose half a minute (appendfsync no): set appendfsync everysec or always."
            )
        elif fsync == "everysec":
            said.append("A crash of its machine may lose a second (appendfsync everysec).")
        else:
            said.append("What it has taken is on its disk.")
    weak = evicts or any("set append" in sentence for sentence in said)
    if unknown:
        said.append(f"It does not let us see {', '.join(unknown)}: that could not be checked.")
    return Durability(" ".join(said), evicts, weak)


async def _greet(link: Link) -> None:
    try:
        await link.ask("PING")
    except ResponseError as error:
        raise TransportError(f"Redis does not let us in: {error}. Check user and password in the URL.") from error


async def _setting(link: Link, name: str) -> str:
    """Nothing where a managed server keeps it to itself."""
    try:
        found = await link.ask("CONFIG", "GET", name)
    except ResponseError:
        return ""
    pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=False)
    return next((_text(value) for key, value in pairs if _text(key) == name), "")


def _check_version(info: dict[str, Any]) -> None:
    said = _text(info.get("redis_version"))
    try:
        version = tuple(int(part) for part in said.split(".")[:2])
    except ValueError:
        return
    if version < OLDEST:
        raise TransportError(f"This Redis is {said}, and BullMQ needs {OLDEST[0]}.{OLDEST[1]} or later: upgrade it.")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
