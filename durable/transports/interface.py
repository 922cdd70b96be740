"""The transport's contract, both ends on one page. Point to point, at least once.

The engine end dispatches tasks and hears results and heartbeats; the worker end serves steps and replies. A message may be
lost, late, doubled or reordered: the engine counts a result once by task id, so a transport need only not invent any.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

from msgspec import Struct

from durable.protocol.messages import Heartbeat, RemoteTask, StepResult

ResultHandler = Callable[[StepResult], Awaitable[None]]
"""Returns once the result is durable (or known to be superfluous); only then may a transport acknowledge it. If it
raises, the result must be delivered again; after EngineStopped to another engine, since this one hears no more."""
HeartbeatHandler = Callable[[Heartbeat], None]
TaskHandler = Callable[[RemoteTask], Awaitable[StepResult]]
"""Runs one task. Cancelled when the task is cancelled or the transport gives up waiting for it in `close`."""


class Capabilities(Struct, frozen=True):
    """What an adapter says of itself."""

    name: str
    shared: bool
    """Workers in other processes can serve it; False: tasks live and die with this process."""
    holds: bool
    """`holding` answers truly which tasks are still queued or being worked on."""
    broadcast: bool
    """Also implements ControlPlane."""
    heartbeats: bool
    """Its own worker end beats for tasks under way."""
    max_message: int
    """Bytes a task or result may have."""


class Transport(Protocol):
    """Carries tasks to workers and results back."""

    @property
    def capabilities(self) -> Capabilities: ...

    async def start(self) -> None:
        """Connect. Raises TransportError with what to do about it."""
        ...

    async def close(self, timeout: float = 10.0) -> None:
        """Drain: take no new task, let those under way finish within `timeout` seconds, cancel the rest. Idempotent."""
        ...

    # -- engine end
    async def dispatch(self, task: RemoteTask) -> None:
        """Accept a task: it is safe with the transport when this returns. Raises TransportError if it is not. The same
        step id and attempt again is harmless."""
        ...

    async def cancel(self, step_id: str) -> None:
        """Ask for a task's body to be cancelled. A hint: unknown tasks are passed over."""
        ...

    async def holding(self, step_ids: Sequence[str]) -> Collection[str]:
        """Which of these are still queued or under way. Only asked where `capabilities.holds`."""
        ...

    def on_result(self, handler: ResultHandler) -> None:
        """Hear results. One handler; set before `start`."""
        ...

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        """Hear heartbeats. One handler; set before `start`."""
        ...

    # -- worker end
    async def serve(self, steps: Collection[str], handler: TaskHandler, *, concurrency: int = 16) -> None:
        """Begin taking tasks of these step names, at most `concurrency` at once, and reply with what `handler` returns.
        May be called before `start`, which then begins; an engine that recovers finds its steps served.
        A task of a name nobody serves here is answered failed, `no handler for <name>`, not retryable."""
        ...

    async def reply(self, result: StepResult) -> None:
        """Send a result. Raises TransportError; the task is then delivered again."""
        ...

    async def heartbeat(self, beat: Heartbeat) -> None:
        """Say that a task is being worked on."""
        ...
