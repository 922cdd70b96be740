"""The graph as `dependency-injector` containers: what makes the instances, and what users wire, override and inspect.

One DynamicContainer for each module, under a root: `container.payments_module.gateway`. The graph has been checked, so
nothing here can fail for lack of a provider. dependency-injector makes a provider async for ever once it has returned an
awaitable; so what had to be awaited is put in its own place when it is there, and everything after it is plain again.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable
from typing import Any

from dependency_injector import containers, providers

from durable.core.errors import DurableError
from durable.core.step import current_step
from durable.module.decorators import Scope
from durable.module.fitness import is_resource
from durable.module.tree import Graph, Node, identifier, scope

_FORMS: dict[Scope, type[providers.Provider[Any]]] = {
    "singleton": providers.Singleton,
    "transient": providers.Factory,
    "run": providers.ContextLocalSingleton,
}


class Container:
    """Makes what the graph says."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.root = containers.DynamicContainer()
        """The dependency-injector container that users see."""
        self._providers: dict[Node, providers.Provider[Any]] = {}
        self._awaited: list[Node] = []
        self.modules: dict[str, containers.DynamicContainer] = {}
        for node in graph.order:
            self._providers[node] = self._provider(node)
        for module in graph.modules:
            inner = containers.DynamicContainer()
            names: set[str] = set()
            for node in module.nodes:
                name = _free(identifier(node.name), names)
                inner.set_provider(name, self._providers[node])
            self.modules[module.name] = inner
            self.root.set_provider(
                identifier(module.name), providers.Container(containers.DynamicContainer, container=inner)
            )

    def provider(self, node: Node) -> providers.Provider[Any]:
        """The dependency-injector provider of a node."""
        return self._providers[node]

    async def make(self, node: Node) -> Any:
        """A singleton's instance, made now if it is not there yet."""
        provider = self._providers[node]
        made = provider()
        if not inspect.isawaitable(made):
            return made
        instance = await made
        provider.override(providers.Object(instance))
        provider.disable_async_mode()
        self._awaited.append(node)
        return instance

    def get(self, node: Node) -> Any:
        """What the node gives, without waiting. Outside a step, what lives for one run is made anew."""
        provider = self._providers[node]
        made = provider() if scope(node) == "singleton" or _in_step() else self.fresh(node)
        if inspect.isawaitable(made):
            if inspect.iscoroutine(made):
                made.close()
            raise DurableError(f"{node.label} has to be awaited and is not there yet. Start the app first.")
        return made

    def fresh(self, node: Node) -> Any:
        """A new one, with a `run` scope of its own."""
        return contextvars.Context().run(self._providers[node])

    async def end(self, node: Node) -> None:
        """Let an instance go; a resource goes on after its `yield`."""
        provider = self._providers[node]
        if node in self._awaited:
            self._awaited.remove(node)
            provider.reset_last_overriding()
            provider.reset_async_mode()
        if isinstance(provider, providers.Resource):
            done = provider.shutdown()
            if inspect.isawaitable(done):
                await done

    def _provider(self, node: Node) -> providers.Provider[Any]:
        spec = node.spec
        if node.target is not None:
            return self._providers[node.target]
        if spec.form == "value":
            return providers.Object(spec.use_value)
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        for need in node.needs:
            if need.node is None:
                if need.default is None:  # `T | None` without a default has none of its own
                    keywords[need.parameter] = None
                continue
            value: Any = self._later(need.node) if need.lazy else self._providers[need.node]
            if need.positional:
                arguments.append(value)
            else:
                keywords[need.parameter] = value
        maker: Any = spec.use_class or spec.use_factory
        if is_resource(spec):
            return providers.Resource(maker, *arguments, **keywords)
        kind: Any = _FORMS[spec.scope]
        made: providers.Provider[Any] = kind(maker, *arguments, **keywords)
        return made

    def _later(self, node: Node) -> providers.Object[Callable[[], Any]]:
        return providers.Object(lambda: self.get(node))


def _in_step() -> bool:
    try:
        current_step()
    except DurableError:
        return False
    return True


def _free(name: str, taken: set[str]) -> str:
    """The name, or with a number if another provider of the module has it."""
    chosen, number = name, 2
    while chosen in taken or hasattr(containers.DynamicContainer, chosen):
        chosen, number = f"{name}_{number}", number + 1
    taken.add(chosen)
    return chosen
