"""Telling other processes that there may be work: runs that anyone may claim, mail for runs that others own. Goes out after
the transaction and never as part of it; together, at most once in `PAUSE_S`; and only while others are there to hear it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from durable.core.errors import DurableError
from durable.store.hints import Listeners
from durable.store.postgres.channel import Channel, channel_name
from durable.store.postgres.connection import Address, Database

PAUSE_S = 0.005


class Hints:
    """The listeners on one store object, and its channel to the others."""

    def __init__(self, address: Address, db: Database, schema: str, *, notifications: bool) -> None:
        self._address = address
        self._db = db
        self._name = channel_name("work", schema)
        self._notifications = notifications
        self._token = secrets.token_hex(6)
        self._listeners = Listeners()
        self._channel: Channel | None = None
        self._paused: asyncio.TimerHandle | None = None
        self._pending = False
        self._lone: set[asyncio.Task[None]] = set()

    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        stop = self._listeners.add(on_hint, self)
        if self._channel is None and self._notifications:
            self._channel = Channel(self._address.connect, self._name)
            self._channel.on(self._name, self._heard)
            self._channel.begin()
        return stop

    def here(self) -> None:
        """Something has changed: news to the other engines on this store object."""
        self._listeners.changed(self)

    def everywhere(self) -> None:
        """Something has changed, and there may be work for other processes."""
        self.here()
        self.abroad()

    def abroad(self) -> None:
        """There may be work for other processes."""
        if not self._notifications:
            return
        if self._channel is None:
            self._tell_once()
        elif self._paused is not None:
            self._pending = True
        elif self._channel.others:
            self._channel.publish(self._name, self._token)
            self._paused = asyncio.get_running_loop().call_later(PAUSE_S, self._resume)

    async def close(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None
            self._pending = False
        if self._lone:
            await asyncio.wait(self._lone, timeout=1)
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _resume(self) -> None:
        self._paused = None
        if self._pending:
            self._pending = False
            self.abroad()

    def _heard(self, payload: str | None) -> None:
        if payload != self._token:  # None: whatever was said meanwhile was missed
            self._listeners.changed(None)

    def _tell_once(self) -> None:
        """Who does not listen itself, an API call or a command, has no channel: a connection of the pool will do."""
        if not self._lone:
            task = asyncio.get_running_loop().create_task(self._tell(), name="durable-hint")
            self._lone.add(task)
            task.add_done_callback(self._lone.discard)

    async def _tell(self) -> None:
        try:
            await self._db.all("SELECT pg_notify(%s, %s)", [self._name, self._token])
        except DurableError:
            return  # a hint may be lost
