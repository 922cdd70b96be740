"""The transport's contract, both ends on one page. Point to point, at least once.

The engine end dispatches tasks and hears answers and heartbeats; the worker end serves groups and replies. A task is a step's
or a hosted workflow's turn, an answer a step's result or a turn's decision; both ends carry either. A message may be lost,
late, doubled or reordered: the engine counts an answer once by task id, so a transport need only not invent any.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol, runtime_checkable

from msgspec import Struct

from durable.protocol.messages import Answer, Heartbeat, StartRunRequest, Task

ResultHandler = Callable[[Answer], Awaitable[None]]
"""Returns once the answer is durable (or known to be superfluous); only then may a transport acknowledge it. If it raises,
the answer must be delivered again; after EngineStopped to another engine, since this one hears no more; after
MessageRefused to nobody: it is put away where an operator finds it."""
HeartbeatHandler = Callable[[Heartbeat], None]
TaskHandler = Callable[[Task], Awaitable[Answer]]
"""Runs one task. Cancelled when the task is cancelled or the transport gives up waiting for it in `close`."""
StartHandler = Callable[[StartRunRequest], Awaitable[None]]
"""Returns once the run is durable; only then is the wish acknowledged. If it raises, the wish is delivered again; after
MessageRefused to nobody, as an answer."""
Concurrency = int | Callable[[], int]
"""How many tasks at once; a callable is asked before each is taken, and may say less than there are under way."""


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
    cancels: bool = True
    """`cancel` reaches a body under way. False: only a control plane does."""
    signed: bool = False
    """Results that do not echo their task's token are refused: strangers can write to it."""


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
    async def dispatch(self, task: Task) -> None:
        """Accept a task for the workers of its group: it is safe with the transport when this returns. Raises TransportError
        if it is not. The same task id and attempt again is harmless."""
        ...

    async def cancel(self, task_id: str) -> None:
        """Ask for a task's body to be cancelled, all attempts. A hint: unknown tasks are passed over."""
        ...

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        """Which of these are still queued or under way, or answered with the answer not yet taken. Only asked where
        `capabilities.holds`. Raises TransportError if it cannot tell."""
        ...

    def on_result(self, handler: ResultHandler) -> None:
        """Hear answers, and failed results for what the transport itself has given up on. One handler; set before `start`."""
        ...

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        """Hear heartbeats. One handler; set before `start`."""
        ...

    # -- worker end
    async def serve(self, groups: Collection[str], handler: TaskHandler, *, concurrency: Concurrency = 16) -> None:
        """Begin taking tasks of these groups (routing tokens), at most `concurrency` at once, and reply with what `handler`
        returns. May be called before `start`, which then begins; an engine that recovers finds its steps served.
        A task of a name nobody serves here is answered failed, `no handler for <name>`, not retryable."""
        ...

    async def reply(self, answer: Answer) -> None:
        """Send an answer. Raises TransportError; the task is then delivered again."""
        ...

    async def heartbeat(self, beat: Heartbeat) -> None:
        """Say that a task is being worked on. A hint: lost where nobody listens."""
        ...


@runtime_checkable
class StartsRuns(Protocol):
    """What a transport also is where others may ask for runs by message."""

    def on_start_run(self, handler: StartHandler) -> None:
        """Hear wishes for runs. One handler; set before `start`."""
        ...
