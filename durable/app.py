"""`Durable`: an application as one plain object. Decorate functions with it, enter it, start runs.

It puts the parts together — a store by URL, a transport, an engine — and knows them all by name; nothing else does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import msgspec

from durable.control_plane.interface import ControlPlane
from durable.control_plane.local import LocalControlPlane
from durable.core.clock import SECOND, Clock, SystemClock
from durable.core.ctx import Context, PlainWorkflowClass, WorkflowClass
from durable.core.dead_letter import DeadLetter
from durable.core.definition import WorkflowDefinition, durable_step, workflow, workflow_name
from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError, DurableError, EngineStopped, StoreError
from durable.core.ids import Ids, SystemIds
from durable.core.journal import Entry
from durable.core.registry import Registry
from durable.core.retention import Retention, retention_of
from durable.core.retry import RetryPolicy
from durable.core.step import StepObserver
from durable.engine.dead_letter import listen
from durable.engine.deps import DURATIONS, Deps, Settings
from durable.engine.engine import WorkflowEngine
from durable.engine.handle import RunHandle
from durable.engine.start import StartRequest
from durable.store.interface import Store
from durable.store.memory import MemoryStore
from durable.store.records import RunPage, RunQuery, RunRecord
from durable.transports.event_emitter import EventEmitterTransport
from durable.transports.interface import Transport
from durable.transports.pool import DEFAULT, TransportPool
from durable.worker.handler import StepHandler, groups_of

if TYPE_CHECKING:
    from durable.store.postgres import PostgresStore

I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741
F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_STORE = "sqlite:///.durable/durable.db"


def open_store(store: Store | str) -> Store:
    """A store by its URL: `memory://`, `sqlite:///path` (three slashes relative, four absolute), or
    `postgresql://user@host/database`. A store is itself.

    Raises DurableError: not known, or its driver is not installed.
    """
    if not isinstance(store, str):
        return store
    if store in ("memory", "memory://"):
        return MemoryStore()
    if store.startswith("sqlite:"):
        from durable.store.sqlite import SqliteStore  # only who uses it loads a driver

        return SqliteStore(store)
    if store.startswith(("postgresql://", "postgres://")):
        return _postgres(store)
    hint = " `postgres` alone is for the command line: durable dev --store postgres." if store == "postgres" else ""
    # It may hold a password, and not where one would look for it.
    shown = re.split("[:=]", store)[0] + "…" if re.search("@|password", store, re.IGNORECASE) else store
    raise DurableError(
        f"No store is known for {shown!r}. Give sqlite:///path/to/file.db, postgresql://user@host/database or memory://.{hint}"
    )


def _postgres(url: str) -> Store:
    try:
        from durable.store.postgres import PostgresStore
    except ImportError as error:
        # Without its library psycopg raises an ImportError that names nothing.
        if error.name is not None and error.name.partition(".")[0] not in ("psycopg", "psycopg_pool"):
            raise
        raise StoreError(f"A Postgres store needs psycopg: pip install 'durable[postgres]'. ({error})") from error
    return PostgresStore(url)


def open_control_plane(plane: ControlPlane | str) -> ControlPlane:
    """A control plane by its URL: `postgresql://user@host/database`, `redis://host/0` or `rediss://`, `amqp://` or
    `amqps://`. A control plane is itself. Raises DefinitionError."""
    if not isinstance(plane, str):
        return plane
    if plane.startswith(("redis://", "rediss://")):
        try:
            from durable.control_plane.redis import RedisControlPlane  # only who uses it loads a driver
        except ModuleNotFoundError as error:
            raise DefinitionError("A control plane on Redis needs a driver: pip install 'durable[redis]'.") from error
        return RedisControlPlane(plane)
    if plane.startswith(("amqp://", "amqps://")):
        from durable.transports.rabbitmq import RabbitMqTransport

        return RabbitMqTransport(plane)
    if not plane.startswith(("postgresql://", "postgres://")):
        raise DefinitionError(
            "No control plane is known for the URL given. Give postgresql://user@host/database, redis://host/0, amqp://host/ "
            "or a ControlPlane, or leave it out: the first transport or the store's database is used where it can broadcast."
        )
    try:
        from durable.control_plane.postgres import PostgresControlPlane
    except ModuleNotFoundError as error:
        raise DefinitionError("A control plane on Postgres needs a driver: pip install 'durable[postgres]'.") from error
    return PostgresControlPlane(plane)


def _default_control_plane(pool: TransportPool, store: Store) -> ControlPlane:
    """The first transport, if it can broadcast to other processes; else the store's own database, if it can; else what
    stays in this process. The store is open."""
    first = pool.control_plane
    if first is not None and next(iter(pool.members.values())).capabilities.shared:
        return first
    if store.capabilities.name == "postgres":
        from durable.control_plane.postgres import PostgresControlPlane
        from durable.store.postgres.channel import channel_name

        postgres = cast("PostgresStore", store)
        if postgres.notifications:
            return PostgresControlPlane(postgres.connect, name=channel_name("control", postgres.schema))
    return first or LocalControlPlane()


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

    `store`: a URL or a Store. `transport`: carries remote steps; default in-process. `transports`: several, by id, in order
    of preference. `control_plane`: an object, or a `postgresql://` or `redis://` URL; default the first transport, if it can
    broadcast to other processes, else the store's database, if it is Postgres. `retention`: how long finished runs are kept,
    a rule or an age ("30d"); default for ever. `cold`, `lease` and the rest of `settings` are those of docs/operate.md,
    durations in any spelling ("10s").

    `role`: an `engine` runs workflows and serves steps; an `api` node starts and inspects runs and never executes one
    (`worker=False` says the same); a `worker` serves steps over the transports and opens no store.
    """

    def __init__(
        self,
        store: Store | str = DEFAULT_STORE,
        *,
        workflows: Sequence[Any] = (),
        steps: Sequence[Any] = (),
        transport: Transport | None = None,
        transports: Mapping[str, Transport] | None = None,
        control_plane: ControlPlane | str | None = None,
        worker: bool = True,
        role: str | None = None,
        clock: Clock | None = None,
        ids: Ids | None = None,
        lease: Duration | None = None,
        on_step: StepObserver | None = None,
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
        self.settings = _settings(
            settings,
            execute=self.role == "engine",
            dead_letter_workflow=workflow_name(dead_letter_workflow),
            retention=retention_of(retention),
        )
        self._serving: Transport | None = None
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
        priority: int = 0,
        dead_letter_workflow: Any = None,
        retention: Retention | Duration | None = None,
    ) -> Callable[[F], F]: ...
    def workflow(self, name: Any = None, **options: Any) -> Any:
        """Register an async function `(ctx, input)`, or a class with such a `run`, as a workflow."""
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
        if self._serving is not None:
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
        if self._engine is not None or self._serving is not None:
            raise DurableError("The app is running already.")
        if self.role == "worker":
            await self._serve()
            return
        store = open_store(self.store)
        pool, plane = self._pool({DEFAULT: EventEmitterTransport()} if self._transports is None else self._transports)
        await store.open()
        try:
            engine = WorkflowEngine(
                Deps(
                    store=store,
                    registry=self.registry,
                    transport=pool,
                    handler=self._handler() if self.settings.execute else None,
                    on_step=self._on_step,
                    control_plane=plane or _default_control_plane(pool, store),
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

    def _pool(self, given: Mapping[str, Transport]) -> tuple[TransportPool, ControlPlane | None]:
        """The transports, and the control plane that was asked for, if any. An emitter may have been given to several
        applications: each has an end of its own, or what one registers would outlive it."""
        ends = {id(one): one.end() if isinstance(one, EventEmitterTransport) else one for one in given.values()}
        pool = TransportPool(
            {name: ends[id(one)] for name, one in given.items()},
            dispatch_timeout=self.settings.dispatch_timeout,
            cool_down=self.settings.cool_down,
            task_key=self.settings.task_key,
        )
        asked: Any = ends.get(id(self._control_plane), self._control_plane)
        plane = None if asked is None else open_control_plane(asked)
        return pool, plane

    def _handler(self) -> StepHandler:
        self._serves = StepHandler(
            self.registry,
            self._clock,
            self._on_step,
            threads=self.settings.body_threads if self.settings.threads else 0,
        )
        return self._serves

    async def _serve(self) -> None:
        """As a worker: no store, no engine, only the transports' worker ends."""
        if self._transports is None:
            raise DefinitionError(
                "A worker needs a transport that reaches the engines: the default one stays inside this process. "
                "Give transport=..., the same as theirs."
            )
        pool, _ = self._pool(self._transports)
        await pool.start()
        await pool.serve(groups_of(self.registry), self._handler())
        self._serving = pool

    async def close(self, timeout: float | None = None) -> None:
        """Drain the engine and close the store; a worker finishes what it has taken. Idempotent."""
        serving, self._serving = self._serving, None
        if serving is not None:
            await serving.close(self.settings.drain_timeout if timeout is None else timeout)
        engine, self._engine = self._engine, None
        if engine is not None:
            try:
                await engine.drain(timeout)
            finally:
                await engine.deps.store.close()
        if self._serves is not None:
            self._serves.close()

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

    def run(self, run_id: str) -> RunHandle[Any]:
        """A handle to a run by id."""
        return self.engine.handle(run_id)

    async def get(self, run_id: str) -> RunRecord:
        """The run as stored. Raises RunNotFound."""
        return await self.engine.get(run_id)

    async def find(self, query: RunQuery | None = None, **filters: Any) -> RunPage:
        """Runs, newest first; filters as in RunQuery."""
        return await self.engine.find(msgspec.structs.replace(query or RunQuery(), **filters))

    async def requeue(self, run_id: str) -> None:
        """Reopen a dead or failed run, or have a blocked one looked at again."""
        await self.engine.requeue(run_id)

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
