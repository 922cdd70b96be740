"""The control plane of one process: engines that share this instance, or a `peer` of it, hear each other.

Handlers are called from the event loop, never inside `publish_control`, so nobody runs in a sender's stack.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from durable.control_plane.interface import ControlHandler
from durable.protocol.messages import ControlMessage

log = logging.getLogger("durable.control_plane")


class _Listener:
    """One `on_control`. `end` is what it was registered through."""

    def __init__(self, end: LocalControlPlane, incarnation: str, handler: ControlHandler) -> None:
        self.end = end
        self.incarnation = incarnation
        self.handler = handler


class LocalControlPlane:
    """One end of an in-process broadcast."""

    def __init__(self) -> None:
        self._listeners: list[_Listener] = []
        self._starts = 0

    def peer(self) -> LocalControlPlane:
        """Another end of the same broadcast, with a life of its own."""
        other = LocalControlPlane()
        other._listeners = self._listeners
        return other

    @property
    def audience(self) -> bool:
        """Whether more than one instance listens in this process."""
        return len(self._listeners) > 1

    async def start(self) -> None:
        """Open this end. Engines that share one instance each start and close it; the last close counts."""
        self._starts += 1

    async def close(self) -> None:
        """Fall silent and deaf."""
        self._starts = max(0, self._starts - 1)
        if not self._starts:
            self._listeners[:] = [listener for listener in self._listeners if listener.end is not self]

    async def publish_control(self, message: ControlMessage) -> None:
        """Tell every instance but the sender, soon. Before `start` and after `close` a message is dropped."""
        if not self._starts:
            return
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            if listener.incarnation != message.sender:
                loop.call_soon(self._tell, listener, message)

    def on_control(self, incarnation: str, handler: ControlHandler) -> Callable[[], None]:
        """Hear what others say. Returns the way to stop."""
        listener = _Listener(self, incarnation, handler)
        self._listeners.append(listener)

        def stop() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return stop

    def _tell(self, listener: _Listener, message: ControlMessage) -> None:
        if listener not in self._listeners or not listener.end._starts:
            return
        try:
            listener.handler(message)
        except Exception:
            log.exception(
                "A control handler of %s raised on %r; the message is dropped", listener.incarnation, message.kind
            )
