"""The control plane over LISTEN and NOTIFY: engines on one database tell each other, at the cost of two connections each.

A notification carries at most 7,999 bytes. A message that is longer goes out without what is bulky: who hears an event looks
into the store anyway, and `cancel` and `enqueued` are only an id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

import msgspec

from durable.control_plane.interface import LOOK_EVERYWHERE, ControlHandler
from durable.control_plane.listeners import Listeners
from durable.core.errors import DefinitionError, PayloadError, StoreError, TransportError
from durable.protocol.codec import decode_control, encode
from durable.protocol.messages import ControlMessage
from durable.store.postgres.channel import PAYLOAD_MAX, Channel, Connect, connector

log = logging.getLogger("durable.control_plane")

KEPT = ("type", "runId", "workflow", "seq", "name", "status", "at")
"""What stays of an event that is too long as it is."""


class PostgresControlPlane:
    """A broadcast among all who use the same database and `name`. Engines of one process may share an instance."""

    def __init__(self, url: str | Connect, *, name: str = "durable_control", probe_every: float = 15.0) -> None:
        """`url`: `postgresql://…` of the database itself, since a pooler in transaction mode loses what is said; or what
        opens a connection to it. `name`: of the channel, `durable_…`. `probe_every`: seconds between two looks whether it
        hears. Raises DefinitionError."""
        try:
            connect = connector(url, application_name="durable control plane") if isinstance(url, str) else url
            self._build = partial(Channel, connect, name, probe_every=probe_every)
            self._build()
        except (ValueError, StoreError) as error:
            raise DefinitionError(f"This control plane cannot be: {error}") from error
        self._name = name
        self._channel: Channel | None = None
        self._starts = 0
        self._turn = asyncio.Lock()
        self._listeners = Listeners()
        self._complained = False

    @property
    def audience(self) -> bool:
        """Whether anybody else has been heard on the channel lately, or another engine shares this instance."""
        return len(self._listeners) > 1 or (self._channel is not None and self._channel.others)

    @property
    def deaf(self) -> str | None:
        """Why nothing can be relied on to be heard, as a sentence; None: it hears."""
        return self._channel.deaf if self._channel is not None else "It has not been started."

    async def start(self) -> None:
        """Connect and listen. Engines that share an instance each start and close it; the last close counts. Raises
        TransportError when the database cannot be reached; later losses are mended in the background."""
        async with self._turn:
            if self._channel is None:
                channel = self._build()
                channel.on(self._name, self._heard)
                try:
                    await channel.start()
                except Exception as error:
                    raise TransportError(
                        f"The control plane cannot listen on its database: {error or type(error).__name__}. Check the URL and "
                        "that the server has two connections to spare, or give control_plane=LocalControlPlane()."
                    ) from error
                self._channel = channel
            self._starts += 1

    async def close(self) -> None:
        """Say what was said before, and let go of both connections. Idempotent."""
        self._starts = max(0, self._starts - 1)
        if self._starts:
            return
        channel, self._channel = self._channel, None
        self._listeners.clear()
        if channel is not None:
            await channel.close()

    async def publish_control(self, message: ControlMessage) -> None:
        """Tell every instance, soon. Before `start`, after `close` and while the database is away a message is dropped."""
        if self._channel is None:
            return
        text = fitting(message)
        if text is not None:
            self._channel.publish(self._name, text)
        elif not self._complained:
            self._complained = True
            log.warning("a control message of kind %s cannot be said in %d bytes; dropped", message.kind, PAYLOAD_MAX)

    def on_control(self, incarnation: str, handler: ControlHandler) -> Callable[[], None]:
        """Hear what others say, and `LOOK_EVERYWHERE` after a gap. Returns the way to stop."""
        return self._listeners.add(incarnation, handler)

    def _heard(self, payload: str | None) -> None:
        if payload is None:
            message = LOOK_EVERYWHERE
        else:
            try:
                message = decode_control(payload.encode())
            except PayloadError as error:
                log.debug("something that is no control message was heard on %s: %s", self._name, error)
                return
        self._listeners.tell(message)


def fitting(message: ControlMessage) -> str | None:
    """The message as one notification's payload, an event without what is bulky if need be; None: not even so."""
    text = _text(message)
    if text is None and message.event is not None:
        slim = {key: message.event[key] for key in KEPT if key in message.event}
        text = _text(msgspec.structs.replace(message, event=slim))
    return text


def _text(message: ControlMessage) -> str | None:
    try:
        data = encode(message)
    except PayloadError:
        return None
    return data.decode() if len(data) <= PAYLOAD_MAX else None
