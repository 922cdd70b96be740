"""What an engine is given. Everything it touches outside itself comes through here, so that tests and the simulation
can hand in their own clock, ids, store and transport."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from msgspec import Struct

from durable.control_plane.interface import ControlPlane
from durable.core.clock import Clock
from durable.core.ids import Ids
from durable.core.registry import Registry
from durable.core.retention import Retention
from durable.core.step import StepObserver
from durable.engine.catalog import Catalog
from durable.store.interface import Store
from durable.store.records import DEFAULT_WORKSPACE
from durable.transports.interface import TaskHandler
from durable.transports.pool import TransportPool


class Settings(Struct, frozen=True, kw_only=True):
    """How an engine behaves. Durations are seconds."""

    lease: float = 10.0
    """How long this engine's heartbeat is good for. Peers take its runs after that, or sooner where death can be seen."""
    beat_every: float | None = None
    """Default: 0.3 leases."""
    poll_every: float = 1.0
    """The longest a missed hint can cost."""
    tick: float = 0.02
    """The longest a journal entry waits to be committed when nothing else asks for a commit."""
    hot_for: float = 5.0
    """How long a waiting run stays in memory."""
    hot_limit: int = 10_000
    """Waiting runs kept in memory at most; above it, the longest idle go first."""
    cold: bool = False
    """Drop every run from memory at every wait: a test mode; results must not differ."""
    max_running: int = 1_000
    """Runs this engine drives at once before it stops claiming and starting more."""
    max_recovery_attempts: int = 3
    """Crashes in a row, without progress between, after which a run is dead."""
    dead_letter_workflow: str | None = None
    """Started for each dead run whose workflow names none itself."""
    cancel_grace: float = 10.0
    """How long a cancelled run may go on cleaning up."""
    drain_timeout: float = 15.0
    """How long `async with app` waits, on its way out, for runs that are executing."""
    task_key: str | None = None
    """The engines' secret: with it tasks carry a token, and a result with another one is refused. The same on all."""
    public_url: str | None = None
    """Where the service is reached from outside, for the addresses of webhooks."""
    webhook_key: str | None = None
    """The engines' secret for webhooks: addresses bear a MAC of it, calls are signed with it. Default: `task_key`."""
    ask_every: float = 60.0
    """How long a task may be out before its transport is asked whether it still has it, and asked again, each time after as
    long as it has been out. What no longer is there, after a FLUSHALL for instance, is sent again."""
    dispatch_timeout: float = 5.0
    """How long one transport may take to accept a task, before the next is tried."""
    dispatch_patience: float = 60.0
    """How long a task is offered again and again while no transport takes it, before its attempt counts as failed. A broker
    that is away for a moment uses up nobody's retries."""
    cool_down: float = 1.0
    """How long others go before a transport that failed; twice as long each time that it fails again."""
    reconcile: float = 86_400.0
    """The wake time of a run that waits for something without a time of its own: a safety net."""
    retention: Retention | None = None
    """How long finished runs are kept, where their workflow does not say. None: for ever."""
    retention_every: float = 60.0
    """How often this engine looks for finished runs to delete, give or take a quarter; never where no rule asks for it."""
    threads: bool = True
    """False: the heartbeat runs as a task on the loop and plain `def` bodies run in place (the simulation)."""
    body_threads: int = 32
    """Threads for plain `def` step bodies."""
    serve_steps: bool = True
    """False: this engine drives workflows, and leaves their remote steps to workers."""
    execute: bool = True
    """False: an API node. It starts, signals and inspects runs, and never executes one."""
    workspace: str = DEFAULT_WORKSPACE
    """The engine's own: where its application's workflows run, and what a verb means that names no workspace. A run of
    another workspace than the one meant is not found."""

    @property
    def beat(self) -> float:
        return self.beat_every if self.beat_every is not None else 0.3 * self.lease


DURATIONS = frozenset(
    [
        "lease",
        "beat_every",
        "poll_every",
        "tick",
        "hot_for",
        "cancel_grace",
        "drain_timeout",
        "ask_every",
        "dispatch_timeout",
        "dispatch_patience",
        "cool_down",
        "reconcile",
        "retention_every",
    ]
)
"""Settings in seconds."""


class Deps(Struct, frozen=True, kw_only=True, dict=True):
    """The parts an engine is made of."""

    store: Store
    registry: Registry
    transport: TransportPool
    handler: TaskHandler | None = None
    """Serves the registry's steps from this process, over the transport; None: workers elsewhere do."""
    control_plane: ControlPlane
    clock: Clock
    """The machine's clock; the engine corrects it to the store's."""
    ids: Ids
    settings: Settings
    caller: Any = None
    """Makes outgoing calls (engine/webhooks.py: Caller); None: this engine makes none."""
    on_step: StepObserver | None = None
    """Told of each attempt of a local step."""

    @cached_property
    def catalog(self) -> Catalog:
        """What this engine executes: the registry in its own workspace, and others that are put in while it runs."""
        return Catalog(self.registry, self.settings.workspace)
