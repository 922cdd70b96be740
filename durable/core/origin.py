"""Where a run comes from: what `RunRecord.meta` says. For people and for lists; nothing is decided by it but which runner a
run is pinned to."""

from __future__ import annotations

import msgspec
from msgspec import Struct


class Origin(Struct, frozen=True, omit_defaults=True, rename="camel"):
    """All optional, and unknown fields are let be."""

    trigger_kind: str | None = None
    """event · cron · manual · child · rerun · replay · fork."""
    event_name: str | None = None
    event_id: str | None = None
    app: str | None = None
    runner: str | None = None
    """The runner this run is pinned to."""
    replay_of: str | None = None
    from_step: str | None = None
    schedule_id: str | None = None
    occurrence: int | None = None
    """µs since the epoch."""
    trace_id: str | None = None
    session: str | None = None
    parent_workspace: str | None = None
    """The parent's, of a child in another one."""


_decode = msgspec.json.Decoder(Origin).decode
_encode = msgspec.json.Encoder().encode


def origin_of(meta: bytes | None) -> Origin:
    """What a run's meta says; nothing where there is none."""
    return _decode(meta) if meta else Origin()


def meta_of(origin: Origin) -> bytes | None:
    """As it is stored; None where there is nothing to say."""
    data = _encode(origin)
    return None if data == b"{}" else data
