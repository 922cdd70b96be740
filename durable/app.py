"""`Durable`: an application as one plain object. Decorate functions with it, enter it, start runs.

It puts the parts together: a store by URL, transports, an engine, or of a worker node only what serves steps.
"""

from __future__ import annotations

import difflib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import msgspec
from msgspec import UNSET

from durable.control_plane.interface import ControlPlane
from durable.core.clock import SECOND, Clock, SystemClock
from durable.core.ctx import Context, PlainWorkflowClass, WorkflowClass
from durable.core.dead_letter import DeadLetter
from durable.core.definition import WorkflowDefinition, durable_step, workflow, workflow_name
from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError, DurableError, EngineStopped
from durable.core.flow import Batch, Concurrency, Debounce, Fairness, RateLimit, Singleton, Throttle, Trigger
from durable.core.ids import Ids, SystemIds
from durable.core.journal import Entry
from durable.core.registry import Registry
from durable.core.retention import Retention, retention_of
from durable.core.retry import RetryPolicy
from durable.core.step import StepObserver
from durable.engine.bulk import Action, BulkResult
from durable.engine.dead_letter import listen
from durable.engine.deps import DURATIONS, Deps, Settings
from durable.engine.engine import WorkflowEngine
from durable.engine.events import Publication, Published
from durable.engine.failures import Failure
from durable.engine.handle import RunHandle
from durable.engine.start import StartRequest
from durable.opening import Transports, default_caller, default_control_plane, open_pool, open_store
from durable.store.interface import Store
from durable.store.records import RunPage, RunQuery, RunRecord
from durable.transports.event_emitter import EventEmitterTransport
from durable.transports.interface import Transport
from durable.transports.pool import DEFAULT
from durable.worker.handler import StepHandler
from durable.worker.lines import Teller
from durable.worker.worker import Worker

I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741
F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_STORE = "sqlite:///.durable/durable.db"
ROLES = ("engine", "api", "worker")


def _role(role: str | None, worker: bool) -> str:
    chosen = role or ("engine" if worker else "api")
    if chosen not in ROLES:
        raise DefinitionError(f"A role is one of {', '.join(ROLES)}, not {chosen!r}.")
    if not worker and chosen != "api":
        raise DefinitionError(f"worker=False is the role api, and the role given is {chosen}. Leave one of them out.")
    return chosen


class Durable:
    """An application: workflows, steps, and the engine that runs them.

    `store`: a URL or a Store. `transport`: carries remote steps, a URL or a Transport; default in-process. `transports`:
    several, by id, in order of preference. `control_plane`: a URL or an object; default the first transport, if it can
    broadcast to other processes, else the store's database, if it is Postgres. `retention`: how long finished runs are kept,
    a rule or an age ("30d"); default for ever. `caller`: makes the calls of `ctx.call_webhook`; default
    `durable.runners.outgoing.Outgoing()`, which calls no private addresses. `cold`, `lease` and the rest of `settings` are
    those of docs/operate.md, durations in any spelling ("10s").

    `role`: an `engine` runs workflows and serves steps; an `api` node starts and inspects runs and never executes one
    (`worker=False` says the same); a `worker` serves steps over the transports and opens no store.
    """

    def __init__(
        self,
        store: Store | str = DEFAULT_STORE,
        *,
        workflows: Sequence[Any] = (),
        steps: Sequence[Any] = (),
        transport: Transport | str | None = None,
        transports: Transports | None = None,
        control_plane: ControlPlane | str | None = None,
        worker: bool = True,
        role: str | None = None,
        clock: Clock | None = None,
        ids: Ids | None = None,
        lease: Duration | None = None,
        on_step: StepObserver | None = None,
        caller: Any = None,
        dead_letter_workflow: Any = None,
        retention: Retention | Duration | None = None,
        **settings: Any,
    ) -> None:
        self.registry = Registry([*workflows, *steps])
        self.store = store
        """Read when the app is opened; a command line may put another in its place before."""
        if transport is not None and transports is not None:
            raise DurableError("Give `transport`, or several by id as `transports`; not both.")
        self._transports = {DEFAULT: transport} if transport is not None else transports
        self._control_plane = control_plane
        self._clock = clock or SystemClock()
        self._ids = ids or SystemIds()
        if lease is not None:
            settings["lease"] = lease
        self.role = _role(role, worker)
        self._on_step = on_step
        self._caller = caller
        self._called: Any = None
        """The caller that is ours to close."""
        self.settings = _settings(
            settings,
            execute=self.role == "engine",
            dead_letter_workflow=workflow_name(dead_letter_workflow),
            retention=retention_of(retention),
        )
        self._worker: Worker | None = None
        self._worker_options: dict[str, Any] = {}
        self._serves: StepHandler | None = None
        self._engine: WorkflowEngine | None = None

    # ------------------------------------------------------------------ authoring

    @overload
    def workflow(self, name: F, /) -> F: ...
    @overload
    def workflow(
        self,
        name: str | None = None,
        *,
        version: str = "1",
        timeout: Duration | None = None,
        tags: Sequence[str] = (),
        category: str | None = None,
        priority: int | str = 0,
        dead_letter_workflow: Any = None,
        retention: Retention | Duration | None = None,
        on: str | Trigger | Sequence[str | Trigger] | None = None,
        cron: str | Trigger | Sequence[str | Trigger] | None = None,
        concurrency: int | Concurrency | Sequence[Concurrency] | None = None,
        throttle: Throttle | None = None,
        rate_limit: RateLimit | None = None,
        debounce: Duration | Debounce | None = None,
        batch: Batch | None = None,
        singleton: bool | str | Singleton | None = None,
        weight: float | Fairness | Mapping[str, float] | None = None,
    ) -> Callable[[F], F]: ...
    def workflow(self, name: Any = None, **options: Any) -> Any:
        """Register an async function `(ctx, input)`, or a class with such a `run`, as a workflow; options as of `@workflow`."""
        return self._register(workflow, name, options)

    @overload
    def step(self, name: F, /) -> F: ...
    @overload
    def step(
        self,
        name: str | None = None,
        *,
        retries: int | RetryPolicy | None = None,
        timeout: Duration | None = None,
        heartbeat_timeout: Duration | None = None,
        transport: str | None = None,
        group: str | None = None,
    ) -> Callable[[F], F]: ...
    def step(self, name: Any = None, **options: Any) -> Any:
        """Register a function as a step that `ctx.remote` can call by reference or by name."""
        return self._register(durable_step, name, options)

    def on_dead(self, handler: Callable[[DeadLetter], Any]) -> Any:
        """Have every dead run told to `handler`, a plain or async function; before the app is opened. Also a decorator."""
        listen(self.registry, handler)
        return handler

    def workflows(self, *, tag: str | None = None, category: str | None = None) -> list[WorkflowDefinition]:
        """What is registered, by name and version; with a tag or a category, those that carry it."""
        return self.registry.workflows(tag=tag, category=category)

    def default_input(self, tag: str, value: Any) -> None:
        """Start workflows that carry this tag with this input when none is given."""
        self.registry.set_default_input(tag, value)

    def register(self, *things: Any) -> None:
        """Register workflows and steps decorated elsewhere with `@workflow` and `@durable_step`."""
        for thing in things:
            self.registry.add(thing)

    def _register(self, decorator: Any, name: Any, options: dict[str, Any]) -> Any:
        if callable(name) and not options:
            target = decorator(name)
            self.registry.add(target)
            return target

        def decorate(target: F) -> F:
            decorated: F = decorator(name, **options)(target)
            self.registry.add(decorated)
            return decorated

        return decorate

    # ------------------------------------------------------------------ life

    @property
    def engine(self) -> WorkflowEngine:
        """The running engine. Raises EngineStopped before `async with app:`."""
        if self._worker is not None:
            raise EngineStopped(
                "This node is a worker: it serves steps and has no engine. Ask a node of role engine or api."
            )
        if self._engine is None:
            raise EngineStopped("The app is not running. Enter it first: `async with app: ...`.")
        return self._engine

    async def __aenter__(self) -> Durable:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Open the store and start the engine. Raises StoreError with what to do."""
        if self._engine is not None or self._worker is not None:
            raise DurableError("The app is running already.")
        if self.role == "worker":
            await self._serve()
            return
        store = open_store(self.store)
        pool, plane = open_pool(
            {DEFAULT: EventEmitterTransport()} if self._transports is None else self._transports,
            self._control_plane,
            dispatch_timeout=self.settings.dispatch_timeout,
            cool_down=self.settings.cool_down,
            task_key=self.settings.task_key,
        )
        await store.open()
        try:
            engine = WorkflowEngine(
                Deps(
                    store=store,
                    registry=self.registry,
                    transport=pool,
                    handler=self._handler() if self.settings.execute and self.settings.serve_steps else None,
                    on_step=self._on_step,
                    caller=self._caller or self._own_caller(),
                    control_plane=plane or default_control_plane(pool, store),
                    clock=self._clock,
                    ids=self._ids,
                    settings=self.settings,
                )
            )
            await engine.start()
        except BaseException:
            await store.close()
            raise
        self._engine = engine

    def _own_caller(self) -> Any:
        self._called = default_caller()
        return self._called

    def as_worker(self, **options: Any) -> None:
        """Be a node of role worker when opened, with these options of `Worker`: what a command line says wins over the
        program. `hosts`: host this app's workflows too, for engines elsewhere. Before the app is opened."""
        self.role = "worker"
        self._worker_options = options

    @property
    def worker(self) -> Worker:
        """The worker that a node of role worker is. Raises EngineStopped before `async with app:`, and for other roles."""
        if self._worker is None:
            raise EngineStopped(f"No worker runs here: the role is {self.role}, or the app has not been entered.")
        return self._worker

    async def _serve(self) -> None:
        """As a worker: no store, no engine, only the transports' worker ends."""
        settings = self.settings
        ours: dict[str, Any] = {
            "transports": self._transports,
            "control_plane": self._control_plane,
            "drain_timeout": settings.drain_timeout,
            "on_step": self._on_step,
            "clock": self._clock,
            "threads": settings.threads,
        }
        options = ours | self._worker_options
        if options.pop("hosts", False):
            options["workflows"] = self.registry
        worker = Worker(self.registry, **options)
        await worker.start()
        self._worker = worker

    def _handler(self) -> StepHandler:
        self._serves = StepHandler(
            self.registry,
            self._clock,
            self._on_step,
            threads=self.settings.body_threads if self.settings.threads else 0,
            teller=Teller(self._tell_line, lambda: self._engine is not None),
        )
        return self._serves

    async def _tell_line(self, event: dict[str, Any]) -> None:
        if self._engine is not None:
            await self._engine.tell_line(event)

    async def close(self, timeout: float | None = None) -> None:
        """Drain the engine and close the store; a worker finishes what it has taken. Idempotent."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.close(timeout)
        engine, self._engine = self._engine, None
        if engine is not None:
            try:
                await engine.drain(timeout)
            finally:
                await engine.deps.store.close()
        if self._serves is not None:
            self._serves.close()
        ours, self._called = self._called, None
        if ours is not None:
            await ours.close()

    # ------------------------------------------------------------------ runs

    @overload
    async def start(
        self,
        workflow: type[WorkflowClass[I, O]],
        input: I,
        *,
        key: str | None = None,
        version: str | None = None,
        delay: Duration | None = None,
        priority: int | None = None,
        tags: Sequence[str] = (),
    ) -> RunHandle[O]: ...
    @overload
    async def start(
        self,
        workflow: Callable[[Context, I], Awaitable[O]],
        input: I,
        *,
        key: str | None = None,
        version: str | None = None,
        delay: Duration | None = None,
        priority: int | None = None,
        tags: Sequence[str] = (),
    ) -> RunHandle[O]: ...
    @overload
    async def start(
        self,
        workflow: Callable[[Context], Awaitable[O]],
        *,
        key: str | None = None,
        version: str | None = None,
        delay: Duration | None = None,
        priority: int | None = None,
        tags: Sequence[str] = (),
    ) -> RunHandle[O]: ...
    @overload
    async def start(
        self,
        workflow: type[PlainWorkflowClass[O]],
        *,
        key: str | None = None,
        version: str | None = None,
        delay: Duration | None = None,
        priority: int | None = None,
        tags: Sequence[str] = (),
    ) -> RunHandle[O]: ...
    @overload
    async def start(
        self,
        workflow: str | WorkflowDefinition,
        input: Any = None,
        *,
        key: str | None = None,
        version: str | None = None,
        delay: Duration | None = None,
        priority: int | None = None,
        tags: Sequence[str] = (),
    ) -> RunHandle[Any]: ...
    async def start(self, workflow: Any, input: Any = None, *, delay: Duration | None = None, **options: Any) -> Any:
        """Start a run; durable when this returns. The same `key` and input find the run there is.

        Raises NotRegistered, PayloadError, IdempotencyConflict.
        """
        if delay is not None:
            options["at"] = self.engine.clock.now() + int(seconds(delay) * SECOND)
        return await self.engine.start_run(workflow, input, **options)

    async def start_many(self, requests: Sequence[StartRequest]) -> list[RunHandle[Any] | Exception]:
        """Start many runs, each on its own: a handle, or why there is none."""
        return await self.engine.start_many(requests)

    async def start_and_wait(
        self, workflow: Any, input: Any = None, *, timeout: float | None = None, **options: Any
    ) -> Any:
        """Start a run and wait for what it returns."""
        handle = await self.start(workflow, input, **options)
        return await handle.result(timeout)

    async def send_event(self, name: str, data: Any = None, *, id: str | None = None, **options: Any) -> Published:
        """Publish an event: what it starts, and whom it woke. The same `id` again answers with what happened then. Options
        as in Publication. Raises DefinitionError for a name, PayloadError."""
        return await self.engine.send_event(name, data, id=id, **options)

    async def publish(self, events: Sequence[Publication]) -> list[Published]:
        """Publish several events, in order."""
        return await self.engine.publish(events)

    def run(self, run_id: str) -> RunHandle[Any]:
        """A handle to a run by id."""
        return self.engine.handle(run_id)

    async def get(self, run_id: str) -> RunRecord:
        """The run as stored. Raises RunNotFound."""
        return await self.engine.get(run_id)

    async def find(self, query: RunQuery | None = None, **filters: Any) -> RunPage:
        """Runs, newest first; filters as in RunQuery."""
        return await self.engine.find(msgspec.structs.replace(query or RunQuery(), **filters))

    async def requeue(self, run_id: str) -> bool:
        """Reopen a dead or failed run, or have a blocked one looked at again. False: it is active and well."""
        return await self.engine.requeue(run_id)

    async def rerun(
        self, run_id: str, *, from_step: str | None = None, input: Any = UNSET, idempotency_key: str | None = None
    ) -> RunHandle[Any]:
        """A new run that does again what a finished one did: all of it, or from the step of this key on. Raises RunActive,
        ForkRefused, PayloadError, IdempotencyConflict."""
        return await self.engine.rerun(run_id, from_step=from_step, input=input, idempotency_key=idempotency_key)

    async def replay(self, run_id: str, input: Any = UNSET, *, idempotency_key: str | None = None) -> RunHandle[Any]:
        """A new run of a finished one's version from the beginning, with another input. Raises as `rerun`."""
        return await self.engine.replay(run_id, input, idempotency_key=idempotency_key)

    async def fork(
        self, run_id: str, edits: Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> RunHandle[Any]:
        """A new run that begins as this one did, but for one thing: `{"step": key, "result": value}`, or `{"input": value}`,
        perhaps with a `"from_step"`. Raises as `rerun`, and DefinitionError for other edits."""
        return await self.engine.fork(run_id, edits, idempotency_key=idempotency_key)

    async def bulk(
        self,
        action: Action,
        query: RunQuery | None = None,
        *,
        dry_run: bool = False,
        limit: int = 1_000,
        **options: Any,
    ) -> BulkResult:
        """One action on all runs a query finds; `dry_run` says how many there are. Options as in engine/bulk.py."""
        return await self.engine.bulk(action, query or RunQuery(), dry_run=dry_run, limit=limit, **options)

    async def failures(self, limit: int = 50, cursor: str | None = None) -> tuple[list[Failure], str | None]:
        """Failed and dead runs, newest first, and where the next page begins; `requeue` tries one again."""
        return await self.engine.failures(limit, cursor)

    def watch(self, run_id: str, after: int = 0) -> AsyncIterator[Entry]:
        """The run's journal as it grows, until the run ends."""
        return self.engine.watch(run_id, after)


def _settings(given: dict[str, Any], **ours: Any) -> Settings:
    """Durations as people write them; a misspelt name is an error that knows the right one."""
    names = [name for name in Settings.__struct_fields__ if name not in ours]
    for name, value in given.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            known = f"Did you mean {near[0]}?" if near else f"There are {', '.join(names)}."
            raise DefinitionError(f"Durable has no setting {name!r}. {known}")
        if name in DURATIONS and value is not None:
            given[name] = seconds(value)
    return Settings(**ours, **given)
