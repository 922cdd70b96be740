"""What an author may say about a step, a task or a child. Durations are seconds; text forms ("30s") are read at the edge."""

from __future__ import annotations

from msgspec import Struct, field

from durable.core.retry import RetryPolicy


class StepOptions(Struct, frozen=True):
    """How a local body is run."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    timeout: float | None = None
    """Seconds allowed to each attempt."""


class RemoteOptions(Struct, frozen=True):
    """How a remote task is sent and awaited."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    timeout: float | None = None
    """Seconds from dispatch to result, for each attempt."""
    heartbeat_timeout: float | None = None
    """Seconds of silence after which the attempt counts as lost. None: silence proves nothing."""
    transport: str | None = None
    """Pool member to try first."""
    group: str | None = None
    """Worker partition; see the routing token in protocol/."""
    priority: int | None = None


class ChildOptions(Struct, frozen=True):
    """How a child run relates to its parent."""

    awaited: bool = True
    """`ctx.child` waits; `ctx.start_child` hands back a handle."""
    on_parent_close: str = "cancel"
    """What happens to an open child when its parent ends other than completed: "cancel" or "abandon"."""
    priority: int | None = None
