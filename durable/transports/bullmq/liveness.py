"""Who serves what, as keys that expire: said by each worker end while it serves, read by whoever asks."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from durable.protocol import names
from durable.protocol.liveness import (
    BEAT_EXPIRES,
    CAPABILITIES,
    Beat,
    ProtocolRange,
    Sdk,
    WorkerAlive,
    WorkerDescriptor,
    descriptor_hash,
    encode_beat,
    encode_descriptor,
    read_beat,
    read_descriptor,
)
from durable.transports.bullmq.link import Link

log = logging.getLogger("durable.transports")


def instance_id() -> str:
    """Of one worker end; random, so that two of one process, or of two containers with one name, are two."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", platform.node()) or "host"
    return f"py-{host}-{os.getpid()}-{secrets.token_hex(3)}"


class Liveness:
    """One worker end's keys: a beat and a descriptor for each group it serves."""

    def __init__(
        self, link: Link, prefix: str, *, namespace: str | None, interval: float, status: Callable[[], dict[str, Any]]
    ) -> None:
        """`status`: what a beat says of the moment."""
        self._link = link
        self._prefix = prefix
        self._namespace = namespace if namespace and namespace != "default" else None
        self._interval = interval
        self._status = status
        self._groups: dict[str, None] = {}
        self._started_at = int(time.time() * 1000)
        self._task: asyncio.Task[None] | None = None
        self._complained = False
        self.instance = instance_id()

    async def serve(self, groups: Iterable[str]) -> None:
        """Say so from now on."""
        self._groups.update(dict.fromkeys(groups))
        await self._say()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._go_on(), name="durable-bullmq-liveness")

    async def close(self) -> None:
        """Take the keys away."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait({self._task})
        self._task = None
        try:
            await self._link.ask("DEL", *(key for group in self._groups for key in self._keys(group)))
        except Exception as error:
            log.debug("the keys of this worker could not be taken away, they expire by themselves: %s", error)
        self._groups.clear()

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._say()

    async def _say(self) -> None:
        descriptor = self._descriptor()
        beat = Beat(ts=int(time.time() * 1000), status=self._status(), descriptor_hash=descriptor_hash(descriptor))
        values = encode_beat(beat), encode_descriptor(descriptor)
        said = [
            self._link.ask("SET", key, value, "EX", BEAT_EXPIRES)
            for group in self._groups
            for key, value in zip(self._keys(group), values, strict=True)
        ]
        answers = await asyncio.gather(*said, return_exceptions=True)
        broken = next((answer for answer in answers if isinstance(answer, Exception)), None)
        if broken is not None and not self._complained:
            log.warning("this worker cannot say that it is alive: %s", broken)
        self._complained = broken is not None

    def _keys(self, group: str) -> tuple[str, str]:
        return (
            names.worker_heartbeat(self._prefix, group, self.instance),
            names.worker_descriptor(self._prefix, group, self.instance),
        )

    def _descriptor(self) -> WorkerDescriptor:
        partitions = {group.partition("@")[2] for group in self._groups} - {""}
        return WorkerDescriptor(
            instance_id=self.instance,
            runtime="python",
            sdk=Sdk("durable", _version()),
            protocol=ProtocolRange(),
            capabilities=list(CAPABILITIES),
            workflows=[],
            steps=sorted({group.partition("@")[0] for group in self._groups}),
            started_at=self._started_at,
            partition=partitions.pop() if len(partitions) == 1 else None,
            namespace=self._namespace,
        )


async def alive(link: Link, prefix: str) -> list[WorkerAlive]:
    """Everybody whose beat has not expired. Raises TransportError."""
    found: list[str] = []
    cursor: Any = 0
    while True:
        cursor, keys = await link.ask("SCAN", cursor, "MATCH", names.workers_pattern(prefix), "COUNT", 1000)
        found.extend(key.decode("utf-8", "replace") for key in keys)
        if not int(cursor):
            break
    head = names.worker_heartbeat(prefix, "", "")[:-1]
    workers = []
    for key in sorted(set(found)):
        group, _, instance = key.removeprefix(head).rpartition(":")
        # MGET: a key of another kind, which anybody may leave there, is nothing, and spoils nobody's list.
        beat, descriptor = await link.ask("MGET", key, names.worker_descriptor(prefix, group, instance))
        if beat is not None and group:
            said = read_descriptor(descriptor)
            workers.append(WorkerAlive(group=group, instance=instance, beat=read_beat(beat), descriptor=said))
    return workers


def _version() -> str:
    try:
        return version("durable")
    except PackageNotFoundError:
        return "0"
