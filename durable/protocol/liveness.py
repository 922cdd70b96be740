"""Who is alive among the workers, as keys that expire say it: the beat, and the descriptor it refers to by its hash.

Written by our workers in one shape; read from anybody's in any shape that was ever written.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
from msgspec import Struct

BEAT_SECONDS = 10.0
"""How often a worker says that it is alive."""
BEAT_EXPIRES = 35
"""Seconds a beat is good for."""
PROTOCOL = 1
"""The version of the wire our workers speak."""
CAPABILITIES = ("cancel", "heartbeats")
"""What our workers can do beside running steps."""

_SECONDS_BELOW = 1e12
"""A moment below this is in seconds: as milliseconds it would be before 2001."""
_FNV_OFFSET, _FNV_PRIME, _FNV_MASK = 0xCBF29CE484222325, 0x100000001B3, (1 << 64) - 1


class Sdk(Struct, frozen=True):
    """What a worker is built with."""

    name: str
    version: str


class ProtocolRange(Struct, frozen=True):
    """The version spoken, and the least and greatest understood."""

    version: int = PROTOCOL
    range: tuple[int, int] = (PROTOCOL, PROTOCOL)


class Registration(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """A workflow that a worker hosts."""

    name: str
    version: str | None = None
    group: str | None = None
    requires: list[str] | None = None
    origin: str | None = None


class WorkerDescriptor(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """What a worker is. `started_at` is epoch ms."""

    instance_id: str
    runtime: str
    sdk: Sdk
    protocol: ProtocolRange
    capabilities: list[str]
    workflows: list[str]
    steps: list[str]
    started_at: int
    partition: str | None = None
    namespace: str | None = None
    registrations: list[Registration] | None = None


class Beat(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """A worker's sign of life. `ts` is epoch ms, `status` whatever its runtime tells of itself."""

    ts: int
    status: Any = None
    descriptor_hash: str | None = None


class WorkerAlive(Struct, frozen=True, kw_only=True):
    """One worker, in one group."""

    group: str
    instance: str
    beat: Beat
    descriptor: dict[str, Any] | None = None
    """As it was written; None where there is none, or none that can be read."""


def encode_beat(beat: Beat) -> bytes:
    """The value of the key."""
    return msgspec.json.encode(beat)


def encode_descriptor(descriptor: WorkerDescriptor) -> bytes:
    """The value of the descriptor's key."""
    return msgspec.json.encode(descriptor)


def read_beat(data: bytes) -> Beat:
    """Any form there is: `{ts, status?, descriptorHash?}`, a bare number, seconds or milliseconds. What cannot be read is a
    beat at 0: it is there, so somebody lives."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return Beat(ts=0)
    if isinstance(found, dict):
        said = found.get("descriptorHash")
        digest = said if isinstance(said, str) else None
        return Beat(ts=_moment(found.get("ts")), status=found.get("status"), descriptor_hash=digest)
    return Beat(ts=_moment(found))


def read_descriptor(data: bytes | None) -> dict[str, Any] | None:
    """Whatever object it is; None for anything else."""
    try:
        found = json.loads(data or b"null")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _moment(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    if not 0 < value < 1e16:
        return 0
    return round(value * 1000) if value < _SECONDS_BELOW else round(value)


def descriptor_hash(descriptor: WorkerDescriptor) -> str:
    """A hash over what it says, the same in every language: FNV-1a, 64 bit, 16 hex digits, over the UTF-16 code units of
    compact JSON in a fixed order. It changes when the worker starts anew."""
    said: dict[str, Any] = {
        "instanceId": descriptor.instance_id,
        "runtime": descriptor.runtime,
        "sdk": {"name": descriptor.sdk.name, "version": descriptor.sdk.version},
        "protocol": {"version": descriptor.protocol.version, "range": list(descriptor.protocol.range)},
        "capabilities": _set(descriptor.capabilities),
        "workflows": _set(descriptor.workflows),
        "steps": _set(descriptor.steps),
    }
    if descriptor.registrations is not None:
        said["registrations"] = _registrations(descriptor.registrations)
    said["partition"] = descriptor.partition
    said["namespace"] = descriptor.namespace
    said["startedAt"] = descriptor.started_at
    return fnv1a64(_compact(said))


def fnv1a64(text: str) -> str:
    """Each UTF-16 code unit: xor its low byte, xor its high byte, multiply."""
    value = _FNV_OFFSET
    units = text.encode("utf-16-le", "surrogatepass")
    for low, high in zip(units[::2], units[1::2], strict=True):
        value = ((value ^ low ^ high) * _FNV_PRIME) & _FNV_MASK
    return f"{value:016x}"


def _set(names: list[str]) -> list[str]:
    return sorted(set(names), key=_utf16)


def _utf16(text: str) -> bytes:
    """The order of JavaScript's sort, which compares code units."""
    return text.encode("utf-16-be", "surrogatepass")


def _registrations(given: list[Registration]) -> list[Any]:
    each = {
        _compact(entry): entry
        for one in given
        for entry in [
            {
                "name": one.name,
                "version": one.version,
                "group": one.group,
                "requires": None if one.requires is None else _set(one.requires),
                "origin": one.origin,
            }
        ]
    }
    return [each[text] for text in sorted(each, key=_utf16)]


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
