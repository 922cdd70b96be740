"""The module tree read and checked: who provides what, who sees whom, what needs what, in which order to start.

Pure: makes no provider and imports no container. Called by `Application` before anything starts and by `durable modules`.
Every problem of a stage is named in one DefinitionError, with the path of modules and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from durable.core.definition import steps_in
from durable.core.errors import DefinitionError
from durable.module.decorators import (
    DynamicModule,
    Provider,
    Token,
    is_module,
    is_plain,
    module_of,
    name_of,
    provide,
    provider_of,
)
from durable.module.fitness import durable_twice, unfit
from durable.module.needs import read_needs
from durable.module.tree import HOOKS, Graph, ModuleNode, Node, ahead, near, same


def read(root: Any, overrides: Mapping[Token, Provider] | None = None) -> Graph:
    """The graph of a root module. Raises DefinitionError with everything that is wrong at the first stage where anything is."""
    modules = _modules(root)
    graph = Graph(modules[-1], modules)
    _check(durable_twice(graph))
    _check(_read_providers(graph))
    _check(_override(graph, overrides or {}))
    _check(_read_exports(graph))
    _check(read_needs(graph))
    _check(_cycles(graph))
    _check(unfit(graph))
    return graph


def _check(problems: list[str]) -> None:
    if len(problems) == 1:
        raise DefinitionError(problems[0])
    if problems:
        raise DefinitionError(
            f"{len(problems)} things are wrong with the modules:\n" + "\n".join(f"- {line}" for line in problems)
        )


def _modules(root: Any) -> list[ModuleNode]:
    """Every module once, imported ones first."""
    done: dict[int, ModuleNode] = {}
    order: list[ModuleNode] = []
    names: dict[str, int] = {}

    def visit(thing: Any, path: list[tuple[DynamicModule, str]]) -> ModuleNode:
        try:
            definition = module_of(thing)
        except DefinitionError as error:
            if not path:
                raise
            raise DefinitionError(f"{_arrow(path)} imports something else than a module: {error}") from None
        if definition in (met for met, _ in path):
            start = [met for met, _ in path].index(definition)
            circle = " > ".join([name for _, name in path[start:]] + [name_of(definition)])
            raise DefinitionError(
                f"Modules import each other in a circle: {circle}. Move what they share into a module of its own that "
                "both import."
            )
        if id(definition) in done:
            return done[id(definition)]
        here = [*path, (definition, name_of(definition))]
        node = ModuleNode(definition, name_of(definition), _arrow(here))
        node.imports = [visit(imported, here) for imported in definition.imports]
        names[node.name] = names.get(node.name, 0) + 1
        if names[node.name] > 1:
            node.name += f"#{names[node.name]}"
        done[id(definition)] = node
        order.append(node)
        return node

    visit(root, [])
    return order


def _arrow(path: list[tuple[DynamicModule, str]]) -> str:
    return " > ".join(name for _, name in path)


def _read_providers(graph: Graph) -> list[str]:
    problems: list[str] = []
    for module in graph.modules:
        seen: dict[Token, Node] = {}
        listed = list(module.definition.providers)
        if _is_provider_too(module.definition.module):
            own: Any = module.definition.module
            listed.append(provide(own))
        for thing in listed:
            if is_plain(thing):
                module.plain.append(thing)
                continue
            try:
                spec = provider_of(thing)
                node = Node(spec, module)
                first = seen.setdefault(spec.token, node)
            except (DefinitionError, TypeError) as error:
                problems.append(f"{module.path}: {error}")
                continue
            if first is not node:
                problems.append(
                    f"{module.path} provides {node.name} twice: {_how(first)} and {_how(node)}. Keep one, or give one of "
                    "them a token of its own: provide('a.name', ...)."
                )
                continue
            module.nodes.append(node)
    return problems


def _is_provider_too(cls: type[Any]) -> bool:
    """A module class that has something to do is made like a provider."""
    return cls.__init__ is not object.__init__ or any(hasattr(cls, hook) for hook in HOOKS) or bool(steps_in(cls))


def _how(node: Node) -> str:
    by = node.spec.use_class or node.spec.use_factory
    detail = f"class {name_of(by)}" if node.spec.use_class else f"factory {name_of(by)}" if by else node.spec.form
    return f"as {detail} ({node.spec.place})" if node.spec.place else f"as {detail}"


def _override(graph: Graph, overrides: Mapping[Token, Provider]) -> list[str]:
    problems = []
    for token, spec in overrides.items():
        found = graph.find(token)
        if not found:
            known = {node.token for module in graph.modules for node in module.nodes}
            problems.append(f"Nothing provides {name_of(token)}, so it cannot be overridden.{near(token, known)}")
        for node in found:
            lost = _steps_lost(node, spec)
            if lost:
                problems.append(
                    f"The override of {node.label} has no step {' and no step '.join(lost)}: what it replaces has. Put "
                    "@durable_step on its method, or override what the steps call instead."
                )
            node.spec = spec
            node.overridden = True
    return problems


def _steps_lost(node: Node, spec: Provider) -> list[str]:
    before = {step.name for step in steps_in(node.spec.made)} if node.spec.made else set()
    after = {step.name for step in steps_in(spec.made)} if spec.made else before
    return sorted(before - after)


def _read_exports(graph: Graph) -> list[str]:
    problems = []
    by_definition = {id(module.definition): module for module in graph.modules}
    for module in graph.modules:
        for thing in module.definition.exports:
            if is_module(thing):
                other = by_definition.get(id(module_of(thing)))
                if other is None or other not in module.imports:
                    problems.append(f"{module.path} exports {name_of(thing)}, which it does not import. Import it too.")
                else:
                    module.exported.update(other.exported)
                continue
            token = thing.token if isinstance(thing, Provider) else thing
            node = module.own.get(token)
            passed_on = [o.exported[token] for o in module.imports if token in o.exported]
            if node is None and not passed_on:
                known = {*module.own, *(t for other in module.imports for t in other.exported)}
                problems.append(
                    f"{module.path} exports {name_of(token)}, which it neither provides nor gets from what it imports."
                    f"{near(token, known)}"
                )
                continue
            module.exported[token] = node or passed_on[0]
        if module.is_global:
            for token, node in module.exported.items():
                before = graph.shared.setdefault(token, node)
                if not same(before, node):
                    problems.append(
                        f"{name_of(token)} is provided globally twice: by {before.where} and by {node.where}. "
                        "Make one of the modules not global."
                    )
    return problems


def _cycles(graph: Graph) -> list[str]:
    """Fill `order`; name each circle once."""
    problems: list[str] = []
    state: dict[Node, str] = {}
    path: list[Node] = []

    def visit(node: Node) -> None:
        if state.get(node) == "done":
            return
        if state.get(node) == "open":
            circle = [*path[path.index(node) :], node]
            problems.append(
                f"Providers need each other in a circle: {' > '.join(one.label for one in circle)}. Have one of them ask for "
                f"Callable[[], {circle[-1].name}], which is called later, or move what they share into a third."
            )
            return
        state[node] = "open"
        path.append(node)
        for other in ahead(node):
            visit(other)
        path.pop()
        state[node] = "done"
        if node.target is not None and node.target.target is not None:
            node.target = node.target.target
        graph.order.append(node)

    for module in graph.modules:
        for node in module.nodes:
            visit(node)
    return problems
