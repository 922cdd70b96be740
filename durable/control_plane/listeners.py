"""Who hears what a control plane brings, whatever it comes over."""

from __future__ import annotations

import logging
from collections.abc import Callable

from durable.control_plane.interface import ControlHandler
from durable.protocol.messages import ControlMessage

log = logging.getLogger("durable.control_plane")


class Listeners:
    """The handlers of one instance, each for an incarnation. What its own incarnation has said is no news to it."""

    def __init__(self) -> None:
        self._all: list[tuple[str, ControlHandler]] = []

    def __len__(self) -> int:
        return len(self._all)

    def add(self, incarnation: str, handler: ControlHandler) -> Callable[[], None]:
        """Returns the way to stop."""
        listener = (incarnation, handler)
        self._all.append(listener)

        def stop() -> None:
            self._all = [other for other in self._all if other is not listener]

        return stop

    def clear(self) -> None:
        self._all = []

    def tell(self, message: ControlMessage) -> None:
        """Everybody but the sender. A handler that raises harms nobody."""
        for listener in self._all:
            incarnation, handler = listener
            if incarnation == message.sender or not any(listener is still for still in self._all):
                continue
            try:
                handler(message)
            except Exception:
                log.exception("A control handler of %s raised on %r; the message is dropped", incarnation, message.kind)
