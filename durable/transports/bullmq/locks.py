"""Keeps the locks of jobs in our hands, from a thread: a body that blocks the loop would lose its job to another worker, which
would run it a second time. A loop that is blocked for good is not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from types import SimpleNamespace
from typing import Any

import redis
from bullmq.redis_connection import SCRIPT_DEFINITIONS, loadScript  # type: ignore[import-untyped]
from bullmq.scripts import Scripts  # type: ignore[import-untyped]
from redis.backoff import NoBackoff
from redis.retry import Retry

from durable.transports.bullmq.jobs import BULL, Job

log = logging.getLogger("durable.transports")

PATIENCE = 2.0
"""Seconds that Redis has to renew the locks."""


class Locks:
    """All jobs of one end. `hold` and `let_go` from the loop; the rest is a thread's."""

    def __init__(self, url: str, *, lock_ms: int, blocked_max: float) -> None:
        """`blocked_max`: seconds without a turn of the loop, after which its jobs are left to others."""
        self._url = url
        self._lock_ms = lock_ms
        self._blocked_max = blocked_max
        self._held: dict[Job, None] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._pulse: asyncio.TimerHandle | None = None
        self._alive = 0.0

    def hold(self, job: Job) -> None:
        """Keep it until it is let go."""
        self._held[job] = None
        if self._thread is None:
            self._beat(asyncio.get_running_loop())
            self._thread = threading.Thread(target=self._keep, name="durable-bullmq-locks", daemon=True)
            self._thread.start()

    def let_go(self, job: Job) -> None:
        """It is settled, or somebody else's."""
        self._held.pop(job, None)

    async def close(self) -> None:
        """The thread ends."""
        self._stop.set()
        if self._pulse is not None:
            self._pulse.cancel()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 2 * PATIENCE)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self._alive = time.monotonic()
        self._pulse = loop.call_later(min(1.0, self._blocked_max / 4), self._beat, loop)

    def _keep(self) -> None:
        client = redis.Redis.from_url(
            self._url, protocol=2, socket_timeout=PATIENCE, socket_connect_timeout=PATIENCE, retry=Retry(NoBackoff(), 0)
        )
        extend = client.register_script(loadScript(SCRIPT_DEFINITIONS["extendLocks"]))
        book = SimpleNamespace(conn=client, commands={"extendLocks": extend})
        try:
            while not self._stop.wait(self._lock_ms / 4000):
                if time.monotonic() - self._alive > self._blocked_max:
                    log.error(
                        "the event loop has been blocked for %g s: its jobs are left to others", self._blocked_max
                    )
                    self._held.clear()
                    self._alive = time.monotonic()
                    continue
                try:
                    self._renew(book)
                except Exception as error:
                    log.warning("locks of jobs under way were not renewed, they may be run elsewhere too: %s", error)
        finally:
            with contextlib.suppress(Exception):
                client.close()

    def _renew(self, book: Any) -> None:
        by_queue: dict[str, list[Job]] = {}
        for job in list(self._held):
            by_queue.setdefault(job.queue.name, []).append(job)
        for name, jobs in by_queue.items():
            scripts = Scripts(BULL, name, book)
            lost = scripts.extendJobLocks([job.id for job in jobs], [job.token for job in jobs], self._lock_ms)
            for job in jobs:
                if job.id.encode() in (lost or ()):
                    self._held.pop(job, None)
                    log.warning("job %s of %s is no longer ours; it may be run elsewhere too", job.id, name)
