"""Starting runs. A run that this engine can drive at once is born claimed, with its first journal row; any other is
left for whoever serves it. Runs no user code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Raw, Struct

from durable.core.attributes import check_attributes, check_tags
from durable.core.definition import WorkflowDefinition
from durable.core.errors import (
    DefinitionError,
    EngineStopped,
    IdempotencyConflict,
    MessageRefused,
    PayloadError,
    StoreError,
    TransportError,
)
from durable.core.flow import priority_of
from durable.core.journal import RUN, Entry
from durable.core.payload import fingerprint
from durable.core.replay import Machine
from durable.engine.admission import lane_of_input
from durable.engine.apply import STARTED
from durable.engine.committer import Group
from durable.engine.executor import Executor
from durable.engine.residents import Resident
from durable.engine.scheduler import Scheduler
from durable.protocol.messages import StartRunRequest
from durable.protocol.states import Activity
from durable.store.records import Journal, Lane, NewRun, StartOutcome, StartStatus

RUN_ID_MAX = 200
"""Characters of a run id that another system has given."""


class StartRequest(Struct, kw_only=True):
    """One run to start. `workflow` is a definition's name or a decorated function or class."""

    workflow: Any
    input: Any = None
    """Encoded already, and a stranger's, if it is Raw."""
    key: str | None = None
    """Idempotency key: the same key and input find the run there is; another input is a conflict."""
    version: str | None = None
    """Default: the latest registered. One that is not registered is refused, never replaced."""
    at: int | None = None
    """Not before this moment, µs."""
    priority: int | None = None
    tags: Sequence[str] = ()
    attributes: Mapping[str, str | int | float | bool] = {}
    workspace: str | None = None
    """Default: the engine's own."""
    meta: bytes | None = None
    """Where it comes from (core/origin.py)."""
    lane: Lane | None = None
    """What limits it; such a run is never born claimed. Default: what its workflow says, of its input."""
    run_id: str | None = None
    """Where another system has named the run; a run of this id that is there already is the one. Default: a fresh id."""


Started = tuple[str, WorkflowDefinition]
"""A run's id, and what it runs."""


class Starter:
    """Inserts runs, many at once, and hands those born claimed to the executor."""

    def __init__(self, executor: Executor, scheduler: Scheduler, resolve: Callable[..., WorkflowDefinition]) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._resolve = resolve
        self._group: Group[NewRun, StartOutcome] = Group(
            "starts",
            executor.deps.store.start,
            max_items=executor.deps.store.capabilities.max_batch,
            in_flight=executor.deps.store.capabilities.in_flight,
            size=lambda run: len(run.input) + 256 + sum(len(entry.payload or b"") + 96 for entry in run.entries),
        )
        self.open = False
        """Whether runs may be started here."""
        self.hot = False
        """Whether this engine may execute what it starts."""
        self._closed = False

    @property
    def trouble(self) -> StoreError | None:
        """Why the store takes none right now, or None."""
        return self._group.trouble

    async def start(self, request: StartRequest) -> Started:
        """The run's id and what it runs, once it is durable. Raises NotRegistered, PayloadError, IdempotencyConflict."""
        return await self._insert(*self._new(request))

    async def start_many(self, requests: Sequence[StartRequest]) -> list[Started | Exception]:
        """Each on its own: as `start` answers, or why there is no run."""
        waits: list[asyncio.Future[Started] | Exception] = []
        for request in requests:
            try:
                waits.append(asyncio.ensure_future(self._insert(*self._new(request))))
            except Exception as error:
                waits.append(error)
        answers: list[Started | Exception] = []
        for wait in waits:
            try:
                answers.append(await wait if not isinstance(wait, Exception) else wait)
            except Exception as error:
                answers.append(error)
        return answers

    async def insert(self, new: NewRun) -> tuple[str, bool]:
        """A run that is put together already, for whoever serves it: its id, and whether it is new. Raises
        IdempotencyConflict, EngineStopped."""
        if not self.open:
            raise EngineStopped("This engine is stopping or has not been started; start runs on another.")
        outcome = await self._group.ask(new)
        _no_conflict(new, outcome)
        if outcome.run_id == new.id:
            self._executor.on_nudge(new.id, None)
        return outcome.run_id, outcome.run_id == new.id

    async def asked(self, wish: StartRunRequest) -> None:
        """Another system's wish, by message: returns once the run is durable, whoever starts it. Raises MessageRefused for
        what no engine of this workspace may start, NotRegistered for what another one may know."""
        if not self.open and not self._closed:
            raise TransportError("This engine has not begun yet; the wish is delivered again.")
        own = self._executor.settings.workspace
        if wish.tenant != own:
            raise MessageRefused(
                f"A run of {wish.workflow!r} was asked for tenant {wish.tenant!r}, and these engines serve {own!r}. Send it to "
                "the namespace of that tenant's engines."
            )
        if wish.run_id is not None and not 0 < len(wish.run_id) <= RUN_ID_MAX:
            raise MessageRefused(f"A run id has 1 to {RUN_ID_MAX} characters, this one {len(wish.run_id)}.")
        request = StartRequest(
            workflow=wish.workflow,
            input=wish.input,
            tags=wish.tags or (),
            attributes=wish.search_attributes or {},
            run_id=wish.run_id,
        )
        try:
            await self.start(request)
        except (PayloadError, DefinitionError) as error:
            raise MessageRefused(f"A run of {wish.workflow!r} cannot be started so: {error}") from error

    async def close(self) -> None:
        """Refuse new starts; finish those under way."""
        self.open, self._closed = False, True
        await self._group.close()

    def prepare(self, request: StartRequest) -> NewRun:
        """The run as it would be inserted, nobody's yet. Raises NotRegistered, PayloadError."""
        return self._new(request, hot=False)[0]

    def _new(self, request: StartRequest, hot: bool = True) -> tuple[NewRun, WorkflowDefinition]:
        if not self.open:
            raise EngineStopped("This engine is stopping or has not been started; start runs on another.")
        definition = self._resolve(request.workflow, request.version, request.workspace)
        workspace = request.workspace or self._executor.settings.workspace
        registry = self._executor.deps.catalog.of(workspace)
        given = request.input if request.input is not None else registry.default_input(definition)
        if isinstance(given, Raw):
            data = definition.kept(bytes(given))
            definition.check_input(data)
        else:
            data = definition.encode_input(given)
        executor = self._executor
        now = executor.clock.now()
        lane = _both(request.lane, lane_of_input(definition, data, workspace))
        hot = (
            hot
            and self.hot
            and lane is None  # only a claim takes slots
            and request.at is None
            and self._executor.deps.catalog.ready(workspace, definition)
            and request.run_id is None  # it may be there, and somebody's
            and executor.lease.safe()
            and executor.running + len(self._scheduler.starting) < executor.settings.max_running
        )
        run_id = request.run_id or executor.deps.ids.run_id()
        if hot:
            self._scheduler.starting.add(run_id)  # now: the next of many must see that there is less room
        new = NewRun(
            id=run_id,
            workflow=definition.name,
            version=definition.version,
            input=data,
            workspace=workspace,
            input_hash=fingerprint(data),
            idempotency_key=request.key,
            priority=_priority(definition, data) if request.priority is None else request.priority,
            tags=check_tags(request.tags) or definition.tags,
            attributes={
                name: value for name, value in check_attributes(request.attributes).items() if value is not None
            },
            owner=executor.lease.incarnation if hot else None,
            entries=(Entry(1, now, RUN, "started", name=definition.name, payload=STARTED),) if hot else (),
            wake_at=request.at,
            lane=lane,
            meta=request.meta,
        )
        return new, definition

    async def _insert(self, new: NewRun, definition: WorkflowDefinition) -> Started:
        def born(answer: StartOutcome | BaseException) -> None:
            # Whether or not the caller still waits: a run that is born claimed has nobody but us.
            self._scheduler.starting.discard(new.id)
            # EXISTING under our own fresh id: the reply to an earlier try was lost.
            if not isinstance(answer, BaseException) and answer.run_id == new.id:
                if new.owner is not None:
                    self._begin(new, definition)
                else:
                    self._executor.on_nudge(new.id, None)

        outcome = await self._group.ask(new, born)
        _no_conflict(new, outcome)
        return outcome.run_id, definition

    def _begin(self, new: NewRun, definition: WorkflowDefinition) -> None:
        executor = self._executor
        if new.owner != executor.lease.incarnation:
            return  # the lease was lost meanwhile; whoever claims it goes on
        machine = Machine(definition, run_id=new.id, input=new.input)
        machine.meta = new.meta
        # When it was born says the store, if a wait asks: this engine's clock may be beside it.
        run = Resident(new.id, new.workspace, definition, machine, new.parent, 1, len(new.entries), Activity.EXECUTING)
        executor.admit(run, Journal(list(new.entries)))


def _no_conflict(new: NewRun, outcome: StartOutcome) -> None:
    if outcome.status is StartStatus.CONFLICT:
        raise IdempotencyConflict(
            f"Run {outcome.run_id} was started with key {new.idempotency_key!r} and another input. Use another key, "
            "or look at that run.",
            run_id=outcome.run_id,
        )


def _priority(definition: WorkflowDefinition, data: bytes) -> int:
    if definition.flow.priority is None:
        return definition.priority
    return priority_of(definition.flow, definition.priority, definition.as_event(data))


def _both(asked: Lane | None, own: Lane | None) -> Lane | None:
    """A run that stands under the limits of who starts it and under its workflow's own."""
    if asked is None or own is None:
        return asked or own
    return Lane(f"{own.key}|{asked.key}", own.rules + asked.rules, own.weight)
