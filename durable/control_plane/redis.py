"""The control plane over Redis pub/sub: engines on one server tell each other, at the cost of two connections each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from durable.control_plane.interface import LOOK_EVERYWHERE, ControlHandler
from durable.control_plane.listeners import Listeners
from durable.control_plane.redis_channel import Handler, RedisChannel
from durable.core.errors import DefinitionError, PayloadError, TransportError
from durable.protocol.codec import decode_control, encode
from durable.protocol.messages import ControlMessage
from durable.protocol.names import DEFAULT_PREFIX, control

log = logging.getLogger("durable.control_plane")


class RedisControlPlane:
    """A broadcast among all who use the same server and `channel`. Engines of one process may share an instance."""

    def __init__(self, url: str, *, channel: str = control(DEFAULT_PREFIX), probe_every: float = 15.0) -> None:
        """`url`: `redis://…` or `rediss://…`. `probe_every`: seconds between two looks whether it hears, and who else does.
        Raises DefinitionError."""
        self._url, self._name, self._every = url, channel, probe_every
        self._build()
        self._channel: RedisChannel | None = None
        self._starts = 0
        self._turn = asyncio.Lock()
        self._listeners = Listeners()
        self._beside: list[tuple[str, Handler]] = []
        self._complained = False

    def _build(self) -> RedisChannel:
        try:
            return RedisChannel(self._url, name=self._name, probe_every=self._every)
        except (ValueError, TypeError) as error:
            raise DefinitionError(f"This control plane cannot be: {error}") from error

    @property
    def audience(self) -> bool:
        """Whether anybody else listens on the channel, counted by the server now and then, or another engine shares this
        instance."""
        return len(self._listeners) > 1 or (self._channel is not None and self._channel.others)

    @property
    def deaf(self) -> str | None:
        """Why nothing can be relied on to be heard, as a sentence; None: it hears."""
        return self._channel.deaf if self._channel is not None else "It has not been started."

    async def start(self) -> None:
        """Connect and listen. Engines that share an instance each start and close it; the last close counts. Raises
        TransportError when Redis cannot be reached; later losses are mended in the background."""
        async with self._turn:
            if self._channel is None:
                channel = self._build()
                for name, handler in [(self._name, self._heard), *self._beside]:
                    channel.on(name, handler)
                try:
                    await channel.start()
                except Exception as error:
                    raise TransportError(
                        f"The control plane cannot listen on its Redis: {error or type(error).__name__}. Check the URL and "
                        "that the server is up, or give control_plane=LocalControlPlane()."
                    ) from error
                self._channel = channel
            self._starts += 1

    async def close(self) -> None:
        """Say what was said before, and let go of both connections. Idempotent."""
        self._starts = max(0, self._starts - 1)
        if not self._starts:
            self._listeners.clear()
            await self.fall_silent()

    async def publish_control(self, message: ControlMessage) -> None:
        """Tell every instance, soon. Before `start`, after `close` and while Redis is away a message is dropped."""
        if self._channel is None:
            return
        try:
            self._channel.publish(self._name, encode(message))
        except PayloadError as error:
            if not self._complained:
                self._complained = True
                log.warning("a control message of kind %s cannot be said; dropped: %s", message.kind, error)

    def on_control(self, incarnation: str, handler: ControlHandler) -> Callable[[], None]:
        """Hear what others say, and `LOOK_EVERYWHERE` after a gap. Returns the way to stop."""
        return self._listeners.add(incarnation, handler)

    def pass_on(self, message: ControlMessage) -> None:
        """Something that was heard another way; whoever listens on this instance is told."""
        self._listeners.tell(message)

    async def fall_silent(self) -> None:
        """Let go of the connections; whoever listens on this instance stays, for `pass_on`."""
        channel, self._channel = self._channel, None
        self._starts = 0
        if channel is not None:
            await channel.close()

    # -- other channels on the same connections, for a transport's heartbeats

    def also(self, name: str, handler: Handler) -> None:
        """Hear another channel, from the next `start` on; None after a gap."""
        self._beside.append((name, handler))

    def say(self, name: str, data: bytes) -> None:
        """Say something on any channel, soon. Dropped while Redis is away."""
        if self._channel is not None:
            self._channel.publish(name, data)

    # -- what comes

    def _heard(self, data: bytes | None) -> None:
        if data is None:
            message = LOOK_EVERYWHERE
        else:
            try:
                message = decode_control(data)
            except PayloadError as error:
                log.debug("something that is no control message was heard on %s: %s", self._name, error)
                return
        self._listeners.tell(message)
