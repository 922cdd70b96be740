"""What a Redis may lose, as sentences for whoever runs it. For every transport that keeps tasks in one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from msgspec import Struct

from durable.core.errors import TransportError
from durable.transports.redis_link import Refused

OLDEST = (6, 2)
"""The version that our scripts, and BullMQ's, ask for."""

Ask = Callable[..., Awaitable[Any]]
"""One command's answer. Raises Refused for what the server does not take."""


class Durability(Struct, frozen=True):
    """`sentence` says what is known. `evicts`: keys may be thrown away while they are needed. `weak`: something should be
    changed."""

    sentence: str
    evicts: bool = False
    weak: bool = False


async def look(ask: Ask) -> Durability:
    """Ask the server about itself; a managed one may keep it to itself. Raises TransportError if it cannot be reached, refuses
    us, or cannot serve at all."""
    try:
        info = facts(await ask("INFO"))
    except Refused as error:
        await _greet(ask)
        return Durability(f"What this Redis may lose could not be checked, it does not say: {error}.")
    check(info)
    policy = info.get("maxmemory_policy") or await _setting(ask, "maxmemory-policy")
    unknown = [] if policy else ["maxmemory-policy"]
    said: list[str] = []
    evicts = bool(policy) and policy != "noeviction"
    if evicts:
        said.append(
            f"It throws keys away when its memory is full (maxmemory-policy {policy}), tasks and answers among them: set "
            "maxmemory-policy noeviction."
        )
    log = info.get("aof_enabled")
    if log is None:
        unknown.append("appendonly")
    elif log == "0":
        said.append("A restart loses what came since its last snapshot (appendonly no): set appendonly yes.")
    else:
        fsync = await _setting(ask, "appendfsync")
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


def facts(info: bytes) -> dict[str, str]:
    """The answer to INFO, field by field."""
    lines = info.decode(errors="replace").splitlines()
    return {name: value for name, _, value in (line.partition(":") for line in lines)}


def check(info: Mapping[str, str]) -> None:
    """Raises TransportError for a server that cannot serve at all."""
    if info.get("cluster_enabled", "0") == "1":
        raise TransportError(
            "This Redis is a cluster, which keeps the keys we use together on different nodes: give a server of its own, with "
            "replicas if need be."
        )
    if info.get("role", "master") not in ("master", "primary"):
        raise TransportError("This Redis is a read-only replica: give the address of the primary.")
    said = info.get("redis_version", "")
    try:
        version = tuple(int(part) for part in said.split(".")[:2])
    except ValueError:
        return
    if version < OLDEST:
        raise TransportError(f"This Redis is {said}, and {OLDEST[0]}.{OLDEST[1]} or later is needed: upgrade it.")


async def _greet(ask: Ask) -> None:
    try:
        await ask("PING")
    except Refused as error:
        raise TransportError(f"Redis does not let us in: {error}. Check user and password in the URL.") from error


async def _setting(ask: Ask, name: str) -> str:
    """Nothing where a managed server keeps it to itself."""
    try:
        found: list[str] = [word.decode(errors="replace") for word in await ask("CONFIG", "GET", name)]
    except Refused:
        return ""
    return dict(zip(found[::2], found[1::2], strict=False)).get(name, "")
