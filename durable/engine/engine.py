"""The engine as one sees it: start it, give it runs, ask after them, drain it. It only forwards; each verb lives in the
file of its name."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET

from durable.core.clock import StoreClock
from durable.core.dead_letter import DeadLetter
from durable.core.definition import WorkflowDefinition, is_workflow, workflow_of
from durable.core.errors import RunNotFound, StoreError
from durable.core.journal import Entry
from durable.core.payload import encode
from durable.core.webhooks import Delivered
from durable.engine import collector, dead_letter
from durable.engine.announce import Announcer, step_cancel
from durable.engine.bulk import Action, BulkResult, Options, act, perform, preview
from durable.engine.cancellation import Canceller
from durable.engine.deps import Deps
from durable.engine.dispatch import task_id
from durable.engine.events import Events, Publication, Published
from durable.engine.executor import Executor
from durable.engine.failures import Failure, search
from durable.engine.handle import RunHandle, outcome
from durable.engine.lease import Lease
from durable.engine.lines import LIVE_LINE, Hearing
from durable.engine.pause import PauseNote, Pauser, Timers, paused_by
from durable.engine.recovery import Recovery
from durable.engine.requeue import requeue
from durable.engine.rerun import Again, Rerunner, edits_of
from durable.engine.residents import Final, Resident, Sent
from durable.engine.results import Results
from durable.engine.resume import Resume
from durable.engine.retention import Pruner
from durable.engine.scheduler import Scheduler
from durable.engine.signals import Mail
from durable.engine.start import Starter, StartRequest
from durable.engine.timeline import Timeline
from durable.engine.webhooks import Hooks, delivery_of
from durable.protocol.messages import ControlMessage
from durable.protocol.states import TERMINAL
from durable.store.admission import EventQuery, EventRecord, LimitState
from durable.store.records import Commit, Message, PruneRequest, RunPage, RunQuery, RunRecord
from durable.transports.interface import StartsRuns
from durable.transports.pool import TransportPool
from durable.worker.handler import groups_of

log = logging.getLogger("durable.engine")

_ENDED = frozenset(f"run.{status.value}" for status in TERMINAL)

HAND_OVER_SECONDS = 5.0
"""How long a drain tries to write down what waits; an unreachable store is not waited for longer."""

CLOSE_SECONDS = 1.0
"""What transports get to say goodbye, at least, where bodies have used up the drain."""

T = TypeVar("T")


class WorkflowEngine:
    """Drives runs on one event loop. Any number of engines may share a store."""

    def __init__(self, deps: Deps) -> None:
        self.deps = deps
        self._local = deps.clock
        self.clock = StoreClock(deps.clock)
        self._executor = Executor(deps, self.clock)
        self._recovery = Recovery(self._executor)
        self._resume = Resume(self._executor)
        self._scheduler = Scheduler(self._executor, self._recovery, self._resume)
        self._starter = Starter(self._executor, self._scheduler, self.definition)
        self._rerunner = Rerunner(deps, self._starter, self.clock.now)
        self._mail = Mail(deps, self._nudge)
        self._pauser = Pauser(deps, self._mail, self.clock.now, lambda run_id: self._nudge(run_id, None))
        self._canceller = Canceller(deps, self._mail, self._pauser)
        self._events = Events(self._executor, self._mail)
        self._hooks = Hooks(deps, self._mail, deps.caller)
        self._results = Results(self._executor, self._mail)
        self._hearing = Hearing(self._executor, self._mail)
        self._timeline = Timeline(deps, self._home)
        self._pruner = Pruner(deps)
        self._announcer = Announcer(deps.control_plane, lambda: self.incarnation)
        plane: object = deps.control_plane
        self._plane_apart = all(plane is not member for member in deps.transport.members.values())
        """Whether the control plane has a life of its own, and is not a transport that is started and closed anyway."""
        self._plane_open = False
        self._unlisten: list[Callable[[], None]] = []
        self._unhear: Callable[[], None] = lambda: None
        self._running = False
        self._rebirth: asyncio.Task[None] | None = None
        executor = self._executor
        deps.catalog.on_change.append(self._scheduler.nudge)
        executor.on_finished = self._timeline.finished
        executor.on_committed = self._committed
        executor.on_calm = self._recovery.calm
        executor.on_mail = self._resume.mail
        executor.on_due = self._scheduler.nudge
        executor.on_nudge = self._nudge
        executor.webhooks_of = self._hooks.at
        executor.on_parked_mail = self._pauser.rouse_soon
        executor.on_mailed = lambda run_id, kind: self._nudge(run_id, None, kind)
        executor.on_look_back = self._events.look_back
        executor.on_send_event = self._events.send
        executor.on_freed = self._freed
        executor.on_unwanted = self._unwanted
        executor.on_cancelling = self._cancelling

    @property
    def incarnation(self) -> str:
        """This engine's identity: random at each start, never a host or pod name."""
        return self._executor.lease.incarnation

    @property
    def trouble(self) -> StoreError | None:
        """Why the store takes nothing right now, or None."""
        return self._executor.commits.trouble or self._starter.trouble or self._mail.trouble or self._events.trouble

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Take a lease and begin. The store is open, the transport not yet started."""
        deps = self.deps
        if deps.settings.execute:
            dead_letter.prepare(deps)
        lease = self._new_lease()
        self._executor.start(lease)
        # An engine that executes nothing beats too: a heartbeat is where the store's time comes from (S31).
        await lease.start()
        try:
            await self._open_doors(lease)
        except BaseException:
            # Nobody will drain what has not begun; a lease that is kept beats for as long as the process lives.
            self._unlisten_all()
            await self._close_plane()
            await deps.transport.close(0.0)
            await lease.stop()
            raise

    async def _open_doors(self, lease: Lease) -> None:
        deps = self.deps
        deps.transport.on_result(self._results.take)
        deps.transport.on_heartbeat(self._executor.dispatch.beat)
        for member in deps.transport.members.values():
            if isinstance(member, StartsRuns):
                member.on_start_run(self._starter.asked)
        await deps.transport.start()
        if deps.handler is not None:
            await deps.transport.serve(groups_of(deps.registry), deps.handler)
        if self._plane_apart:
            await deps.control_plane.start()
            self._plane_open = True
        self._unlisten.append(deps.store.listen(self._hint))
        self._unhear = deps.control_plane.on_control(lease.incarnation, self._control)
        self._starter.open = True
        self._starter.hot = deps.settings.execute
        if deps.settings.execute:
            self._scheduler.start()
            self._pruner.start()
        collector.relax()
        self._running = True

    async def drain(self, timeout: float | None = None) -> None:
        """Stop without loss: claim, start and begin nothing more, let bodies under way finish within `timeout` seconds (default
        `drain_timeout`), hand the rest over. Nothing of it counts as a crash. Idempotent."""
        if not self._running:
            return
        self._running = False
        collector.restore()
        executor = self._executor
        executor.draining = True
        try:
            await self._wind_down(self.deps.settings.drain_timeout if timeout is None else timeout)
        finally:
            # Also where the drain itself was cancelled: a lease that is kept holds runs that nobody drives.
            for run in list(executor.residents.values()):
                executor.drop(run)
            if self._rebirth is not None:
                self._rebirth.cancel()
            await executor.lease.stop()
            await self._close_plane()
            try:
                await self.deps.store.leave(self.incarnation)
            except StoreError as error:
                log.warning("could not sign off; the lease will end by itself: %s", error)

    async def _wind_down(self, timeout: float) -> None:
        executor = self._executor
        deadline = self._local.monotonic() + timeout
        await self._pruner.stop()
        await self._starter.close()
        if self.deps.settings.execute:
            await self._scheduler.stop()
        await self._settle_bodies(timeout)
        await self._hand_over()
        await self._pauser.close()
        await self._events.close()
        await self._mail.close()
        await executor.commits.close()
        self._unlisten_all()
        self._timeline.close()
        executor.steps.close()
        await self._announcer.close()
        await self.deps.transport.close(max(CLOSE_SECONDS, deadline - self._local.monotonic()))
        await self._close_plane()

    async def _close_plane(self) -> None:
        """Once: engines may share it, and count."""
        if self._plane_open:
            self._plane_open = False
            await self.deps.control_plane.close()

    def _unlisten_all(self) -> None:
        for unlisten in self._unlisten:
            unlisten()
        self._unlisten.clear()
        self._unhear()

    async def _settle_bodies(self, timeout: float) -> None:
        """Wait until nothing is executing and nothing waits to be committed, or until time is up."""
        executor = self._executor
        deadline = self._local.monotonic() + timeout
        while self._local.monotonic() < deadline:
            runs = (run for run in executor.residents.values() if not run.held)
            if not any(_busy(run, self.deps.transport) for run in runs):
                return
            await asyncio.sleep(min(0.02, timeout))
        log.warning("draining: %d runs are still executing; they are handed over", executor.running)

    async def _hand_over(self) -> None:
        """Runs that only wait are put to sleep as they are; the others are due at once, for whoever is there."""
        executor = self._executor
        executor.settler.suspend_waiting()
        await executor.commits.flush(self._local.monotonic, HAND_OVER_SECONDS)
        runs = list(executor.residents.values())
        for run in runs:
            executor.drop(run)
        if runs:
            await asyncio.sleep(0)  # machines unwind from a plain callback
            try:
                await self.deps.store.release([(run.run_id, run.epoch) for run in runs])
            except StoreError as error:
                log.warning("could not release %d runs; the lease will end by itself: %s", len(runs), error)

    # ------------------------------------------------------------------ verbs

    def definition(self, workflow: Any, version: str | None = None, workspace: str | None = None) -> WorkflowDefinition:
        """The definition meant by a name or a decorated object. Raises NotRegistered."""
        registry = self.deps.catalog.of(self._meant(workspace))
        if is_workflow(workflow):
            found = workflow_of(workflow)
            return registry.workflow(found.name, version or found.version)
        if not isinstance(workflow, str):
            workflow_of(workflow)  # says what is missing
        return registry.workflow(str(workflow), version) if version else registry.latest(str(workflow))

    async def start_run(self, workflow: Any, input: Any = None, **options: Any) -> RunHandle[Any]:
        """Start a run; options as in StartRequest. Durable when this returns."""
        request = StartRequest(workflow=workflow, input=input, **options)
        run_id, definition = await self._starter.start(request)
        return RunHandle(self, run_id, definition.output_type, request.workspace)

    async def start_many(self, requests: Sequence[StartRequest]) -> list[RunHandle[Any] | Exception]:
        """Start runs, each on its own: a handle, or why there is none."""
        answers = await self._starter.start_many(requests)
        return [
            answer
            if isinstance(answer, Exception)
            else RunHandle(self, answer[0], answer[1].output_type, request.workspace)
            for request, answer in zip(requests, answers, strict=True)
        ]

    async def start_and_wait(
        self, workflow: Any, input: Any = None, *, timeout: float | None = None, **options: Any
    ) -> Any:
        """Start a run and wait for what it returns."""
        handle = await self.start_run(workflow, input, **options)
        return await handle.result(timeout)

    def handle(self, run_id: str, output_type: Any = Any, *, workspace: str | None = None) -> RunHandle[Any]:
        """A handle to a run there is."""
        return RunHandle(self, run_id, output_type, workspace)

    async def wait(self, run_id: str, timeout: float | None = None, *, workspace: str | None = None) -> Final:
        """How the run ended, wherever it executes. Raises RunNotFound, TimeoutError."""
        return await self._timeline.wait(run_id, timeout, workspace=self._meant(workspace))

    async def result(
        self, run_id: str, timeout: float | None = None, *, type: Any = Any, workspace: str | None = None
    ) -> Any:
        """What the run returned; raises what it ended with."""
        return outcome(run_id, await self.wait(run_id, timeout, workspace=workspace), type)

    async def signal(
        self, run_id: str, name: str, payload: Any = None, *, id: str | None = None, workspace: str | None = None
    ) -> bool:
        """Send a signal: kept, in order per name, and used once, even if nothing waits yet. True if it is new; the same
        `id` again changes nothing. Raises RunNotFound, RunFinished, PayloadError."""
        data = encode(payload, what=f"the payload of signal {name!r}", limit=self.deps.store.capabilities.max_payload)
        message_id = f"signal:{id}" if id is not None else f"signal:{self.deps.ids.unique()}"
        return await self._mail.must_send(self._message(run_id, message_id, "signal", name, data, workspace))

    async def publish(self, events: Sequence[Publication], *, workspace: str | None = None) -> list[Published]:
        """Publish events: each is stored with the runs it starts, then those who wait for it are told. All are looked at
        before any is stored. Raises DefinitionError for a name, PayloadError, PayloadTooLarge."""
        return await self._events.publish(events, self._meant(workspace))

    async def send_event(
        self, name: str, data: Any = None, *, id: str | None = None, workspace: str | None = None, **options: Any
    ) -> Published:
        """Publish one event; options as in Publication. The same `id` again answers with what happened then."""
        return (await self.publish([Publication(name=name, data=data, id=id, **options)], workspace=workspace))[0]

    async def find_events(self, query: EventQuery, *, workspace: str | None = None) -> list[EventRecord]:
        """Accepted events of one workspace, whatever the query says of it."""
        return await self.deps.store.events(msgspec.structs.replace(query, workspace=self._meant(workspace)))

    async def flow_state(self, workflow: str | None = None, *, workspace: str | None = None) -> list[LimitState]:
        """Every limit that has a run, or had one lately: how full it is."""
        return await self.deps.store.limits(self._meant(workspace), workflow)

    async def cancel(
        self, run_id: str, reason: str = "", *, children: bool = False, workspace: str | None = None
    ) -> bool:
        """Ask a run to stop: its main task is cancelled and may clean up for `cancel_grace`. True if this was the first
        request. `children`: and with it everything it has started, and what they have, whatever `on_parent_close` says; of a
        run that has ended, what is still open below it. A paused run goes on for it. Raises RunNotFound, RunFinished."""
        return await self._canceller.cancel(run_id, reason, children, self._meant(workspace))

    async def pause(self, run_id: str, *, by: str = "", reason: str = "", workspace: str | None = None) -> bool:
        """Have a run begin nothing more: what is under way finishes and is recorded, what comes for it waits. True if this
        was the first request since it last went on. Raises RunNotFound, RunFinished."""
        return await self._pauser.pause(run_id, by, reason, self._meant(workspace))

    async def resume(self, run_id: str, *, by: str = "", timers: Timers = "run", workspace: str | None = None) -> bool:
        """Have a paused run go on. `timers`: with "run" the deadlines have gone on, and what is overdue is due at once; with
        "hold" all of them are later by the length of the pause. False: it is not paused. Raises RunNotFound, RunFinished."""
        return await self._pauser.resume(run_id, by, timers, self._meant(workspace))

    async def paused_by(self, run_id: str, *, workspace: str | None = None) -> PauseNote | None:
        """Who has paused a run, and why; None if it is not paused. Raises RunNotFound."""
        await self.get(run_id, workspace=workspace)
        return paused_by((await self.deps.store.load([run_id]))[0].entries)

    async def rerun(
        self,
        run_id: str,
        *,
        from_step: str | None = None,
        input: Any = UNSET,
        idempotency_key: str | None = None,
        workspace: str | None = None,
    ) -> RunHandle[Any]:
        """A new run that does again what a finished one did: all of it, or from one of its steps on, with the results before
        that step kept. `from_step` is a step's key. The same key again finds the same new run. Raises RunNotFound, RunActive,
        ForkRefused, PayloadError, IdempotencyConflict."""
        wish = Again(kind="rerun", from_step=from_step, input=input, key=idempotency_key)
        return await self._again(run_id, wish, workspace)

    async def replay(
        self, run_id: str, input: Any = UNSET, *, idempotency_key: str | None = None, workspace: str | None = None
    ) -> RunHandle[Any]:
        """A new run of a finished one's version from the beginning, with another input if one is given. Raises as `rerun`."""
        return await self._again(run_id, Again(kind="replay", input=input, key=idempotency_key), workspace)

    async def fork(
        self,
        run_id: str,
        edits: Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        workspace: str | None = None,
    ) -> RunHandle[Any]:
        """A new run that begins as this one did, but for one thing: `{"step": key, "result": value}` goes on behind a step that
        returned something else; `{"input": value}` begins anew with another input, and with `"from_step": key` keeps the
        results before that step. The run itself may still be active. Raises as `rerun`, and DefinitionError for other edits."""
        return await self._again(run_id, edits_of(edits, idempotency_key), workspace)

    async def _again(self, run_id: str, wish: Again, workspace: str | None) -> RunHandle[Any]:
        new_id, _ = await self._rerunner.again(run_id, wish, self._meant(workspace))
        return RunHandle(self, new_id, Any, workspace)

    async def deliver_webhook(self, token: str, body: bytes) -> bool:
        """What was posted to a webhook's address: `token` is its last part, `body` JSON, or else a text. True: it settles the
        wait; False: another was first, and this one is only recorded. Raises RunNotFound for a token that is none of ours,
        RunFinished, PayloadTooLarge."""
        return await self._hooks.deliver(token, body)

    async def redeliver(self, run_id: str, step: str, *, workspace: str | None = None) -> Delivered:
        """Make a call again that a step has made, now, under the same id and with the same body; the run is not touched. A call
        that failed for good is tried again by requeueing its run. Raises RunNotFound; ForkRefused if that step made no call;
        NonRetryable, CallFailed and RetryAfter for what the receiver says."""
        await self.get(run_id, workspace=workspace)
        entries = (await self.deps.store.load([run_id]))[0].entries
        return await self._hooks.call(delivery_of(run_id, step, entries))

    async def get(self, run_id: str, *, workspace: str | None = None) -> RunRecord:
        """The run as stored. Raises RunNotFound."""
        record = (await self.deps.store.get([run_id]))[0]
        if record is None or record.workspace != self._meant(workspace):
            raise RunNotFound(f"There is no run {run_id!r} here. Is it another workspace's?", run_id=run_id)
        return record

    async def find(self, query: RunQuery, *, workspace: str | None = None) -> RunPage:
        """Runs of one workspace, whatever the query says of it."""
        return await self.deps.store.find(msgspec.structs.replace(query, workspace=self._meant(workspace)))

    async def requeue(self, run_id: str, *, workspace: str | None = None) -> bool:
        """Reopen a dead or failed run, or have a blocked one looked at again. False: it is active and well."""
        reopened = await requeue(self.deps, self.clock.now(), run_id, workspace)
        if reopened:
            self._nudge(run_id, None)
        return reopened

    async def bulk(
        self,
        action: Action,
        query: RunQuery,
        *,
        dry_run: bool = False,
        limit: int = 1_000,
        workspace: str | None = None,
        **options: Any,
    ) -> BulkResult:
        """Cancel, pause, resume, requeue, rerun or replay all runs a query finds, each on its own, at most `limit` in one call;
        options as in engine/bulk.py's `Options`. Where the query says nothing of their state, only those the action is for. With
        `dry_run` nothing is done: how many there are, and the first ids. Safe to repeat."""
        meant = self._meant(workspace)
        query = msgspec.structs.replace(query, workspace=meant)
        if dry_run:
            return await preview(action, query, self.deps.store.find)
        do = partial(act, self, self._rerunner, action, Options(**options), meant)
        return await perform(action, query, self.deps.store.find, do, limit)

    async def failures(
        self, limit: int = 50, cursor: str | None = None, *, workspace: str | None = None
    ) -> tuple[list[Failure], str | None]:
        """Failed and dead runs, newest first, and where the next page begins."""
        return await search(partial(self.find, workspace=workspace), limit, cursor)

    async def retry_failure(self, delivery_id: str, *, workspace: str | None = None) -> bool:
        """Try a failure again: what had succeeded is kept. False: it is under way again already. Raises RunNotFound,
        RunFinished."""
        return await self.requeue(delivery_id, workspace=workspace)

    async def prune(self, request: PruneRequest, *, workspace: str | None = None) -> int:
        """Delete finished runs of one workspace, one batch; how many there were. Fewer than the limit: no more may go."""
        return await self.deps.store.prune(msgspec.structs.replace(request, workspace=self._meant(workspace)))

    def watch(self, run_id: str, after: int = 0, *, workspace: str | None = None) -> AsyncIterator[Entry]:
        """The run's journal above `after` as it grows, until the run ends. Raises RunNotFound."""
        return self._timeline.watch(run_id, after, workspace=self._meant(workspace))

    def on_dead(self, handler: Callable[[DeadLetter], Any]) -> None:
        """Have every dead run told to `handler`, a plain or async function, exactly once and with retries. Before `start`."""
        dead_letter.listen(self.deps.registry, handler)

    # ------------------------------------------------------------------ inside

    def _home(self, run_id: str) -> str | None:
        """The workspace of a run that is in memory here."""
        run = self._executor.residents.get(run_id)
        return None if run is None else run.workspace

    def _meant(self, workspace: str | None) -> str:
        """The workspace a verb is about: the engine's own, unless another is named."""
        return self.deps.settings.workspace if workspace is None else workspace

    def _message(self, run_id: str, id: str, kind: str, name: str, payload: bytes, workspace: str | None) -> Message:
        return Message(run_id, id, kind, name, payload, workspace=self._meant(workspace))

    def _freed(self, run: Resident) -> None:
        """A place has become free in some lane: whoever has room looks who is next."""
        self._scheduler.nudge()
        self._announcer.hint("enqueued", run.run_id)

    def _committed(self, run: Resident, commit: Commit) -> None:
        self._timeline.committed(run)
        self._announcer.committed(run, commit)

    def _nudge(self, run_id: str, owner: str | None, kind: str = "") -> None:
        """A run has got something: its owner looks; nobody's run is looked for here. `kind`: of the message, if any."""
        run = self._executor.residents.get(run_id)
        if run is not None:
            self._resume.mail(run)
        elif owner is None:
            self._scheduler.nudge()
        if run is None:
            self._announcer.hint("cancel" if kind == "cancel" else "enqueued", run_id)

    def _control(self, message: ControlMessage) -> None:
        """Another engine says where to look. What there is to see is in the store: a cancel is an inbox row."""
        if message.kind == "event":
            event = message.event or {}
            if event.get("type") == LIVE_LINE:
                self._hearing.hear(event)
                return
            self._timeline.news(str(event.get("runId")), ended=event.get("type") in _ENDED)
        elif message.run_id is not None:
            run = self._executor.residents.get(message.run_id)
            if run is not None:
                self._resume.mail(run)
            else:
                self._scheduler.nudge()
        else:
            self._hint()  # a control plane that may have missed something

    def _unwanted(self, run: Resident, sent: Sent) -> None:
        """Nobody waits for a task that is out. Where its transport is not the control plane too, workers may hear of it
        here only."""
        member = self.deps.transport.member(sent.transport)
        plane: object = self.deps.control_plane
        if member.capabilities.shared and plane is not member:
            task = task_id(run, sent.command, sent.attempt)
            self._announcer.tell(step_cancel(run.run_id, task, sent.attempt, self.clock.now()))

    def _cancelling(self, run: Resident) -> None:
        """A run with tasks out is being cancelled. Workers of other makes know this word only."""
        pool = self.deps.transport
        if any(pool.member(sent.transport).capabilities.shared for sent in run.sent.values()):
            self._announcer.hint("cancel", run.run_id)

    async def tell_line(self, event: dict[str, Any]) -> None:
        """A live line of a body that is served beside this engine: for a run here, or for whoever owns it."""
        if not self._hearing.hear(event):
            self._announcer.tell(event)

    def _hint(self) -> None:
        self._scheduler.nudge()
        self._timeline.hint()

    def _new_lease(self) -> Lease:
        settings = self.deps.settings
        return Lease(
            self.deps.store,
            self.clock,
            self._local,
            self.deps.ids.unique(),
            seconds=settings.lease,
            every=settings.beat,
            threads=settings.threads,
            executing=lambda: self._executor.executing,
            on_beat=self._beaten,
            on_lost=self._lost,
        )

    def _beaten(self) -> None:
        self._scheduler.sweep()
        self._executor.keep(self._events.sweep())
        self._executor.steps.release_held()
        self._executor.dispatch.release_held()
        self._executor.dispatch.look_after()
        if self.deps.settings.execute:
            self._pauser.beaten()

    def _lost(self, why: str) -> None:
        """Everything in memory is somebody else's now. Forget it, and come back as somebody new."""
        runs = list(self._executor.residents.values())
        log.error("dropping %d runs: %s", len(runs), why)
        for run in runs:
            self._executor.drop(run)
        if self._running:
            self._rebirth = asyncio.get_running_loop().create_task(self._be_reborn(), name="durable-rebirth")

    async def _be_reborn(self) -> None:
        while True:
            lease = self._new_lease()
            try:
                await lease.start()
            except StoreError as error:
                log.warning("no new lease yet, trying again: %s", error)
                await asyncio.sleep(min(1.0, self.deps.settings.lease / 10))
                continue
            old = self._executor.lease
            self._executor.lease = lease
            self._unhear()
            self._unhear = self.deps.control_plane.on_control(lease.incarnation, self._control)
            await old.stop()
            try:
                await self.deps.store.leave(old.incarnation)
            except StoreError as error:
                log.warning("could not sign off as %s; that lease will end by itself: %s", old.incarnation, error)
            self._scheduler.reset()
            return


def _busy(run: Resident, pool: TransportPool) -> bool:
    """Whether stopping now would waste what is under way. A task in this process ends with it."""
    if run.committing or run.pending or run.arrivals or run.queued or any(run.bodies.values()):
        return True
    return any(not pool.member(sent.transport).capabilities.shared for sent in run.sent.values() if sent.published)
