"""`Worker`: serves steps, and hosts workflows, over transports: no engine and no store inside. A process of its own, or a
part of one.

    async with Worker([resize], transport="redis://localhost"):
        ...
    await Worker([resize], transport="redis://localhost").run()      until SIGTERM, then drained

A task that comes again because its answer got lost is answered from memory (worker/dedupe.py). Cancels come from the
transport, or, where it cannot carry them, from the control plane; a body that is cancelled so is answered as failed with
`step_cancelled`, retryable: an engine that still waits for it (a run's clean-up) is never left without an answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Struct

from durable.control_plane.interface import ControlPlane
from durable.core.clock import Clock, SystemClock
from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError, DurableError, ErrorData
from durable.core.ids import SystemIds
from durable.core.registry import Registry
from durable.core.step import StepObserver
from durable.opening import Transports, open_pool
from durable.protocol.messages import Answer, ControlMessage, RemoteTask, Task
from durable.transports.answers import cancelled
from durable.transports.interface import Concurrency, Transport
from durable.transports.pool import DEFAULT, TransportPool
from durable.worker.adaptive import Adaptive
from durable.worker.dedupe import Answered
from durable.worker.handler import StepHandler, groups_of
from durable.worker.lines import Teller
from durable.worker.stopping import stop_signals
from durable.worker.turns import TurnHandler, turn_groups

log = logging.getLogger("durable.worker")

THREADS = 32
"""For plain `def` bodies, at least."""


class Done(Struct, frozen=True):
    """A task that is done with, for `on_done`."""

    task: Task
    outcome: str
    """completed · failed · cancelled (nobody waits for it) · repeated (answered again, not run again) · given_back."""
    seconds: float
    error: ErrorData | None = None


class _Job:
    """A task whose body is under way."""

    def __init__(self, task: Task, work: asyncio.Task[Any]) -> None:
        self.task = task
        self.work = work
        self.before = work.cancelling()
        self.over = asyncio.Event()
        self.told = False
        """Cancelled because the control plane said so."""


class Worker:
    """Serves steps and turns of workflows, at most `concurrency` of them at once on each transport."""

    def __init__(
        self,
        steps: Registry | Iterable[Any] = (),
        *,
        workflows: Registry | Iterable[Any] = (),
        transport: Transport | str | None = None,
        transports: Transports | None = None,
        control_plane: ControlPlane | str | None = None,
        partition: str | None = None,
        concurrency: Concurrency = 16,
        drain_timeout: Duration = 15.0,
        dedupe: int = 1_000,
        on_step: StepObserver | None = None,
        on_done: Callable[[Done], None] | None = None,
        transport_options: Mapping[str, Any] | None = None,
        threads: bool = True,
        clock: Clock | None = None,
    ) -> None:
        """`steps`: functions and objects with `@durable_step`, or a registry. `workflows`: those to host, for engines that know
        them by `remote_workflow`. `transport`, or `transports` by id: URLs or
        objects, the same as the engines'. `control_plane`: where cancels are heard and lines told live; default the first
        transport, if it can. `partition`: serve only what is sent to this group. `concurrency`: a number, or `Adaptive()`.
        `dedupe`: so many answers are remembered; 0: none. `on_step`: told before each body, `on_done` after each task.
        `transport_options`: for transports by URL, such as prefix and namespace. `threads` False: plain bodies run in
        place.

        Raises DefinitionError.
        """
        if transport is not None and transports is not None:
            raise DefinitionError("Give `transport`, or several by id as `transports`; not both.")
        given = {DEFAULT: transport} if transport is not None else transports
        if not given:
            raise DefinitionError(
                "A worker needs a transport that reaches the engines: the default one stays inside this process. "
                "Give transport=..., the same as theirs."
            )
        self.registry = steps if isinstance(steps, Registry) else Registry(steps)
        self.id = SystemIds().unique()
        """This worker's incarnation on the control plane."""
        self.workflows = workflows if isinstance(workflows, Registry) else Registry(workflows)
        self.groups = list(dict.fromkeys(groups_of(self.registry, partition) + turn_groups(self.workflows, partition)))
        """Routing tokens it serves."""
        self.counts: Counter[str] = Counter()
        """Tasks done with, by outcome (`Done.outcome`)."""
        self.drain_timeout = seconds(drain_timeout)
        self._given = given
        self._asked_plane = control_plane
        self._transport_options = transport_options
        self._partition = partition
        self._concurrency = concurrency
        self._on_step = on_step
        self._on_done = on_done
        self._threads = threads
        self._clock = clock or SystemClock()
        self._answered = Answered(dedupe)
        self._jobs: dict[tuple[str, int], _Job] = {}
        self._handler: StepHandler | None = None
        self._turns: TurnHandler | None = None
        self._pool: TransportPool | None = None
        self._plane: ControlPlane | None = None
        self._plane_apart = False
        self._unhear: Callable[[], None] = lambda: None
        if isinstance(concurrency, Adaptive):
            concurrency.under_way = lambda: self.under_way

    # ------------------------------------------------------------------ life

    @property
    def under_way(self) -> int:
        """Tasks whose bodies are running now."""
        return len(self._jobs)

    @property
    def tasks(self) -> list[Task]:
        """Those tasks."""
        return [job.task for job in self._jobs.values()]

    @property
    def transports(self) -> Mapping[str, Transport]:
        """By id, while it runs."""
        return {} if self._pool is None else self._pool.members

    async def __aenter__(self) -> Worker:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Connect and begin to take tasks. Raises DefinitionError (nothing to serve, a URL nobody knows), TransportError."""
        if self._pool is not None:
            raise DurableError("The worker is running already.")
        if not self.groups:
            unbound = [step.name for step in self.registry.steps() if step.needs_instance]
            why = (
                f"{', '.join(unbound)} are methods that no instance was given for: register one, or list its class as a "
                "provider of a module"
                if unbound
                else "put @durable_step on what it is to serve"
            )
            raise DefinitionError(f"This worker has no steps to serve: {why}. Or give it `workflows` to host.")
        pool, plane = open_pool(self._given, self._asked_plane, options=self._transport_options)
        self._plane = plane or pool.control_plane
        shared: object = self._plane
        self._plane_apart = all(shared is not member for member in pool.members.values())
        bound = self._concurrency.max if isinstance(self._concurrency, Adaptive) else self._concurrency
        threads = max(THREADS, bound if isinstance(bound, int) else 0)
        self._handler = StepHandler(
            self.registry,
            self._clock,
            self._on_step,
            threads=threads if self._threads else 0,
            teller=None if self._plane is None else self._speaker(self._plane),
        )
        self._turns = TurnHandler(
            self.workflows,
            self._clock,
            self._on_step,
            threads=threads if self._threads else 0,
            partition=self._partition,
        )
        self._pool = pool
        try:
            await pool.start()
            if self._plane is not None:
                if self._plane_apart:
                    await self._plane.start()
                self._unhear = self._plane.on_control(self.id, self._hear)
            await pool.serve(self.groups, self._take, concurrency=self._concurrency)
        except BaseException:
            await self.close(0.0)
            raise

    async def close(self, timeout: float | None = None) -> None:
        """Take no new task, let those under way finish within `timeout` seconds (default `drain_timeout`), give the rest back:
        they run again elsewhere. Idempotent."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            await pool.close(self.drain_timeout if timeout is None else timeout)
        finally:
            self._unhear()
            if self._handler is not None:
                self._handler.close()
            if self._turns is not None:
                self._turns.close()
            if self._plane is not None and self._plane_apart:
                await self._plane.close()

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM, then drain: the main of a process. A second signal ends it at once, with 130; what
        was under way runs again elsewhere."""

        def draining() -> None:
            log.info("draining: %d tasks under way have %g s to finish", self.under_way, self.drain_timeout)

        def forced() -> None:
            log.warning("stopped at once; %d tasks that were under way will run again", self.under_way)

        with stop_signals(draining, forced) as stopping:
            async with self:
                await stopping.wait()

    # ------------------------------------------------------------------ one task

    async def _take(self, task: Task) -> Answer:
        """A transport's task. The second delivery of an attempt waits for the first, and is answered as that was."""
        key = (task.id, task.attempt)
        began = self._clock.monotonic()
        while (first := self._jobs.get(key)) is not None:
            await first.over.wait()
        known = self._answered.get(task)
        if known is not None:
            self._done(task, "repeated", began, known.error)
            return known
        work = asyncio.current_task()
        assert work is not None
        job = self._jobs[key] = _Job(task, work)
        try:
            answer = await self._run(job)
        except asyncio.CancelledError:
            # By the transport: the engine wants no answer, or this end closes and gives the task back.
            self._done(task, "cancelled" if self._pool is not None else "given_back", began)
            raise
        else:
            if job.told:
                self._done(task, "cancelled", began)
            else:
                self._answered.put(task, answer)
                self._done(task, "completed" if answer.error is None else "failed", began, answer.error)
            return answer
        finally:
            del self._jobs[key]
            job.over.set()

    async def _run(self, job: _Job) -> Answer:
        assert self._handler is not None
        assert self._turns is not None
        handler = self._handler if isinstance(job.task, RemoteTask) else self._turns
        try:
            answer = await handler(job.task)
        except asyncio.CancelledError:
            if not job.told or job.work.uncancel() > job.before:
                raise
            return cancelled(job.task)
        if job.told:
            job.work.uncancel()  # the body insists on its answer
        return answer

    def _done(self, task: Task, outcome: str, began: float, error: ErrorData | None = None) -> None:
        self.counts[outcome] += 1
        if self._on_done is not None:
            try:
                self._on_done(Done(task, outcome, self._clock.monotonic() - began, error))
            except Exception:
                log.exception("on_done raised on task %s", task.id)

    # ------------------------------------------------------------------ the control plane

    def _speaker(self, plane: ControlPlane) -> Teller:
        async def tell(event: dict[str, Any]) -> None:
            await plane.publish_control(ControlMessage(sender=self.id, kind="event", event=event))

        return Teller(tell, lambda: plane.audience)

    def _hear(self, message: ControlMessage) -> None:
        """A cancel of a run or of one step. An engine's word is a hint: whom it does not concern passes it over."""
        if message.kind == "cancel" and message.run_id:
            self._cancel(lambda task: task.run_id == message.run_id)
        elif message.kind == "event" and message.event is not None and message.event.get("type") == "step.cancel":
            event = message.event
            attempt = event.get("attempt")
            self._cancel(
                lambda task: (
                    task.id == event.get("stepId") and (not isinstance(attempt, int) or task.attempt <= attempt)
                )
            )

    def _cancel(self, meant: Callable[[Task], bool]) -> None:
        for job in list(self._jobs.values()):
            if meant(job.task) and not job.told:
                job.told = True
                job.work.cancel()
