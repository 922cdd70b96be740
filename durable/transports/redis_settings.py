"""Settings of a Redis that lose work: found at the start, and said. For every transport that keeps tasks in one."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from durable.core.errors import TransportError

log = logging.getLogger("durable.transports")


def complaints(info: Mapping[str, object]) -> list[str]:
    """What in the answer to INFO loses tasks or results, each a sentence with its remedy."""
    found = []
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        found.append(
            f"Redis evicts keys when its memory is full (maxmemory-policy {policy}), queues among them. Set "
            "maxmemory-policy noeviction: it then refuses what does not fit, and that is seen."
        )
    if str(info.get("aof_enabled", "1")) == "0":
        found.append(
            "Redis writes no append-only file (appendonly no): a restart loses every task and result since the last "
            "snapshot, and steps are sent again only when their engine finds that out. Set appendonly yes."
        )
    return found


def check(info: Mapping[str, object], what: str) -> None:
    """Log what loses work. Raises TransportError for a server that cannot serve at all. `what`: who uses it, for the log."""
    if str(info.get("cluster_enabled", "0")) == "1":
        raise TransportError(
            f"{what} uses keys that a Redis Cluster keeps on different nodes: give it a server of its own, with replicas "
            "if need be."
        )
    if str(info.get("role", "master")) not in ("master", "primary"):
        raise TransportError(f"{what} was given a read-only replica. Give it the address of the primary.")
    for sentence in complaints(info):
        log.warning("%s: %s", what, sentence)
