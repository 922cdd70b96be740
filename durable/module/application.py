"""`Application`: a root module, running. Reads the tree, makes the providers, registers what they offer, starts the engine.

    async with Application(AppModule) as app:
        run = await app.start(Checkout, order)

In steps, for who needs to come between: `prepare` (providers are there, the registry is full), `open` (the engine is up),
`close` (drained, everything stopped in reverse).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar, overload

from dependency_injector import containers

from durable.app import Durable
from durable.core.ctx import Context, PlainWorkflowClass, WorkflowClass
from durable.core.definition import WorkflowDefinition
from durable.core.errors import DefinitionError, DurableError, EngineStopped
from durable.engine.handle import RunHandle
from durable.module import discovery
from durable.module.container import Container
from durable.module.decorators import UNSET, DynamicModule, Provider, Token, is_module, module_of, name_of, provide
from durable.module.durable_module import DurableModule, DurableOptions
from durable.module.fitness import is_resource, is_waiting
from durable.module.graph import read
from durable.module.lifecycle import Lifecycle
from durable.module.tree import Graph, Node, describe
from durable.worker.stopping import stop_signals

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741
Self = TypeVar("Self", bound="Application")


class Application:
    """An app made of modules. `role` and `store` win over what `for_root` says: one AppModule, nodes of several kinds."""

    def __init__(self, root: Any, *, role: str | None = None, store: Any = None) -> None:
        """Raises DefinitionError if the modules do not fit together; nothing has been made then."""
        self.root = root
        self._overrides: dict[Token, Provider] = {}
        self._changes = {name: value for name, value in {"role": role, "store": store}.items() if value is not None}
        self._container: Container | None = None
        self._lifecycle: Lifecycle | None = None
        self._durable: Durable | None = None
        self._state = "new"
        self.graph: Graph = self._read()
        """Modules and providers, checked."""

    # ------------------------------------------------------------------ before it runs

    def override(
        self: Self,
        token: Token,
        value: Any = UNSET,
        *,
        use_class: type[Any] | None = None,
        use_factory: Callable[..., Any] | None = None,
        inject: Any = None,
    ) -> Self:
        """Have something else provided for a token, wherever it is provided: a value, a class or a factory.

        What is replaced is never made. Raises DefinitionError if nothing provides the token.
        """
        if self._container is not None:
            raise DefinitionError(f"It is too late to override {name_of(token)}: the app has made its container.")
        if isinstance(value, type) and isinstance(token, type):
            use_class, value = value, UNSET
        self._overrides[token] = provide(
            token, use_value=value, use_class=use_class, use_factory=use_factory, inject=inject
        )
        self.graph = self._read()
        return self

    @property
    def container(self) -> containers.DynamicContainer:
        """The dependency-injector container: `container.orders_module.payments`. To wire, inspect and override."""
        return self._made().root

    def describe(self) -> list[dict[str, Any]]:
        """Modules, providers and what they need, as plain data, the root first."""
        return describe(self.graph)

    # ------------------------------------------------------------------ life

    async def __aenter__(self: Self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def prepare(self) -> Durable:
        """Make and start the providers and fill the registry; the engine is not yet up. Raises what a provider raises."""
        if self._state == "prepared":
            return self.durable
        if self._state != "new":
            raise DurableError(f"This app is {self._state}. Make another: Application({name_of(self.root)}).")
        container = self._made()
        self._lifecycle = lifecycle = Lifecycle(container)
        self._state = "prepared"
        try:
            await lifecycle.start()
            self._durable = lifecycle.instances[self._durable_node()]
            discovery.register(container, lifecycle.instances, self._durable)
        except BaseException:
            await self._abandon()
            raise
        return self._durable

    async def open(self) -> None:
        """Start everything, the engine last."""
        durable = await self.prepare()
        assert self._lifecycle is not None
        self._state = "running"
        try:
            await durable.open()
            await self._lifecycle.ready()
        except BaseException:
            await self._abandon()
            raise

    async def close(self, timeout: float | None = None) -> None:
        """Drain the engine, then stop the providers in reverse. Idempotent."""
        if self._state not in ("prepared", "running"):
            return
        self._state = "closed"
        try:
            if self._durable is not None:
                await self._durable.close(timeout)
        finally:
            if self._lifecycle is not None:
                await self._lifecycle.stop()

    async def serve(self) -> None:
        """Run until SIGINT or SIGTERM, then drain: the main of a process. A second signal ends it at once, with 130."""
        log = logging.getLogger("durable.module")
        with stop_signals(lambda: log.info("draining"), lambda: log.warning("stopped at once")) as stopping:
            async with self:
                await stopping.wait()

    @asynccontextmanager
    async def lifespan(self, _: Any = None) -> AsyncIterator[dict[str, Any]]:
        """For Starlette and FastAPI: `FastAPI(lifespan=app.lifespan)`. Requests find this app as `request.state.durable_app`."""
        async with self:
            yield {"durable_app": self}

    async def _abandon(self) -> None:
        """End what was started before something failed; its failure is the one to be told."""
        try:
            await self.close(0)
        except Exception as error:
            logging.getLogger("durable.module").error("stopping after a failed start: %r", error)

    # ------------------------------------------------------------------ running

    @property
    def durable(self) -> Durable:
        """The Durable the modules share. Raises EngineStopped before `prepare`."""
        if self._durable is None:
            raise EngineStopped("The app has not started. Enter it first: `async with Application(...) as app:`.")
        return self._durable

    @overload
    def get(self, token: type[T], *, module: Any = None) -> T: ...
    @overload
    def get(self, token: Any, *, module: Any = None) -> Any: ...
    def get(self, token: Any, *, module: Any = None) -> Any:
        """What a token gives: an instance of `token` if it is a type. `module`: whose, where several provide one.

        Raises DefinitionError if nothing provides it, or several do.
        """
        return self._made().get(self._node(token, module))

    @overload
    async def start(self, workflow: type[WorkflowClass[I, O]], input: I, **options: Any) -> RunHandle[O]: ...
    @overload
    async def start(
        self, workflow: Callable[[Context, I], Coroutine[Any, Any, O]], input: I, **options: Any
    ) -> RunHandle[O]: ...
    @overload
    async def start(self, workflow: Callable[[Context], Awaitable[O]], **options: Any) -> RunHandle[O]: ...
    @overload
    async def start(self, workflow: type[PlainWorkflowClass[O]], **options: Any) -> RunHandle[O]: ...
    @overload
    async def start(self, workflow: str | WorkflowDefinition, input: Any = None, **options: Any) -> RunHandle[Any]: ...
    async def start(self, workflow: Any, input: Any = None, **options: Any) -> Any:
        """Start a run; options as in `Durable.start`."""
        return await self.durable.start(workflow, input, **options)

    async def start_and_wait(self, workflow: Any, input: Any = None, **options: Any) -> Any:
        """Start a run and wait for what it returns."""
        return await self.durable.start_and_wait(workflow, input, **options)

    # ------------------------------------------------------------------ inside

    def _read(self) -> Graph:
        graph = read(_with_durable(self.root), self._overrides)
        [node] = graph.find(DurableOptions)
        spec, node.spec = node.spec, self._adjusted(node.spec)
        if node.spec is not spec and node.spec.form == "value":
            _forget_needs(graph, node)
        return graph

    def _adjusted(self, spec: Provider) -> Provider:
        """The options with what was said by who runs the app."""
        changes = self._changes
        if not changes:
            return spec
        if spec.form == "value":
            return provide(DurableOptions, use_value=spec.use_value.but(**changes))
        make = spec.use_factory
        if make is None or is_waiting(spec) or is_resource(spec):
            raise DefinitionError("Override DurableOptions by a value or a plain factory.")
        return provide(DurableOptions, use_factory=lambda *given, **named: make(*given, **named).but(**changes))

    def _made(self) -> Container:
        if self._container is None:
            self._container = Container(self.graph)
        return self._container

    def _durable_node(self) -> Node:
        return next(node for node in self.graph.find(Durable) if node.module.definition.module is DurableModule)

    def _node(self, token: Any, module: Any = None) -> Node:
        found = self.graph.find(token)
        if module is not None:
            definition = module_of(module)
            found = [node for node in found if node.module.definition is definition]
        distinct = {id(node.target or node): node for node in found}
        if len(distinct) == 1:
            return found[0]
        if found:
            raise DefinitionError(
                f"{name_of(token)} is provided by {' and by '.join(node.module.name for node in found)}. Say whose: "
                f"get({name_of(token)}, module={found[0].module.name})."
            )
        here = f" in {name_of(module)}" if module is not None else ""
        raise DefinitionError(
            f"Nothing provides {name_of(token)}{here}. `durable modules` shows what there is; list it among the providers of "
            "a module."
        )


def _with_durable(root: Any) -> DynamicModule:
    """The root as it is, or with DurableModule beside it if nothing in the tree imports one."""
    definition = module_of(root)
    seen: set[int] = set()

    def has(one: DynamicModule) -> bool:
        if id(one) in seen:
            return False
        seen.add(id(one))
        if one.module is DurableModule:
            return True
        return any(has(module_of(other)) for other in one.imports if is_module(other))

    if has(definition):
        return definition
    return DynamicModule(
        definition.module,
        (*definition.imports, DurableModule),
        definition.providers,
        definition.exports,
        definition.is_global,
    )


def _forget_needs(graph: Graph, node: Node) -> None:
    """What only this one needed, in its own module, is not made."""
    given = {need.node for need in node.needs if need.node is not None and need.node.module is node.module}
    node.needs = []
    idle = given - {need.node for other in graph.order for need in other.needs}
    graph.order = [other for other in graph.order if other not in idle]
    node.module.nodes = [other for other in node.module.nodes if other not in idle]


async def create(root: Any, *, role: str | None = None, store: Any = None) -> Application:
    """An app of this root module, started: `app = await create(AppModule)`. Close it: `await app.close()`."""
    app = Application(root, role=role, store=store)
    await app.open()
    return app
