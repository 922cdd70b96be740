"""The control plane's contract. Broadcasts between engine instances; losing every message costs latency and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from durable.protocol.messages import ControlMessage

ControlHandler = Callable[[ControlMessage], None]

LOOK_EVERYWHERE = ControlMessage(sender="", kind="enqueued")
"""Told to listeners after a gap: something may have been said meanwhile, of any run."""


class ControlPlane(Protocol):
    """Says something to every engine but the sender."""

    @property
    def audience(self) -> bool:
        """False where it is certain that no more than one instance listens: what it has to tell need not be made."""
        ...

    async def start(self) -> None:
        """Connect. Raises TransportError."""
        ...

    async def close(self) -> None:
        """Let go. Idempotent."""
        ...

    async def publish_control(self, message: ControlMessage) -> None:
        """Tell every instance. Never raises for a peer's sake: a message that cannot be sent is dropped and logged."""
        ...

    def on_control(self, incarnation: str, handler: ControlHandler) -> Callable[[], None]:
        """Hear messages of others (`sender` is not `incarnation`). Returns the way to stop."""
        ...
