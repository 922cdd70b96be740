"""Modules and providers as a graph: the data, and how it is named and shown. `graph.py` fills it."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from durable.core.definition import is_step, is_workflow, step_of, steps_in, workflow_of
from durable.module.decorators import DynamicModule, Provider, Token, name_of

HOOKS = ("on_start", "on_ready", "on_stop")
"""What a provider may have; lifecycle.py calls them."""


@dataclass(eq=False)
class Need:
    """One parameter of a constructor or factory."""

    parameter: str
    token: Token
    positional: bool = False
    lazy: bool = False
    """`Callable[[], T]`: asked for when called, not when the needing one is made."""
    default: Any = inspect.Parameter.empty
    node: Node | None = None
    """What satisfies it; None: its default does."""


@dataclass(eq=False)
class Node:
    """A provider in its module."""

    spec: Provider
    module: ModuleNode
    needs: list[Need] = field(default_factory=list)
    target: Node | None = None
    """For an existing provider: the one it stands for."""
    overridden: bool = False

    @property
    def token(self) -> Token:
        return self.spec.token

    @property
    def name(self) -> str:
        return name_of(self.spec.token)

    @property
    def is_workflow(self) -> bool:
        return self.target is None and self.spec.form != "value" and is_workflow(self.spec.made)

    @property
    def label(self) -> str:
        """`OrdersModule.Checkout`"""
        return f"{self.module.name}.{self.name}"

    @property
    def where(self) -> str:
        return f"{self.label} ({self.spec.place})" if self.spec.place else self.label


@dataclass(eq=False)
class ModuleNode:
    """A module in the tree. One that is imported twice is here once."""

    definition: DynamicModule
    name: str
    path: str
    """From the root to where it was first met: `AppModule > OrdersModule`."""
    imports: list[ModuleNode] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    plain: list[Any] = field(default_factory=list)
    """Workflow and step functions, which need no instance."""
    exported: dict[Token, Node] = field(default_factory=dict)

    @property
    def own(self) -> dict[Token, Node]:
        return {node.token: node for node in self.nodes}

    @property
    def is_global(self) -> bool:
        return self.definition.is_global


@dataclass(eq=False)
class Graph:
    """All of it, checked."""

    root: ModuleNode
    modules: list[ModuleNode]
    """Imported ones first."""
    order: list[Node] = field(default_factory=list)
    """Each after all it needs: the order of starting."""
    shared: dict[Token, Node] = field(default_factory=dict)
    """What global modules export."""

    def visible(self, module: ModuleNode) -> dict[Token, list[Node]]:
        """What a module's providers may ask for. Its own hides imports, imports hide globals; two imports: two nodes."""
        found: dict[Token, list[Node]] = {token: [node] for token, node in self.shared.items()}
        imported: dict[Token, list[Node]] = {}
        for other in module.imports:
            for token, node in other.exported.items():
                nodes = imported.setdefault(token, [])
                if not any(same(node, known) for known in nodes):
                    nodes.append(node)
        return found | imported | {token: [node] for token, node in module.own.items()}

    def find(self, token: Token) -> list[Node]:
        """Every provider of a token, wherever it is."""
        return [node for module in self.modules for node in module.nodes if node.token == token]


def same(a: Node, b: Node) -> bool:
    return (a.target or a) is (b.target or b)


def ahead(node: Node) -> Iterator[Node]:
    """What has to be there before a provider is made."""
    if node.target is not None:
        yield node.target
    for need in node.needs:
        if need.node is not None and not need.lazy:
            yield need.node


def scope(node: Node) -> str:
    return (node.target or node).spec.scope


def near(token: Token, known: Iterable[Token]) -> str:
    return near_names(plain(token), {plain(one): one for one in known})


def near_names(name: str, known: Mapping[str, Any]) -> str:
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(lower[one] for one in near)}?" if near else ""


def plain(token: Token) -> str:
    return token if isinstance(token, str) else name_of(token)


def identifier(name: str) -> str:
    """A name as an attribute of a container: `OrdersModule` is orders_module, `"database.url"` is database_url."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"\W+", "_", parted).strip("_").lower() or "provider"


def describe(graph: Graph) -> list[dict[str, Any]]:
    """The graph as plain data, the root first."""
    return [
        {
            "name": module.name,
            "global": module.is_global,
            "imports": [other.name for other in module.imports],
            "exports": [plain(token) for token in module.exported],
            "providers": [_describe(module, node) for node in module.nodes],
            "workflows": [flow.name for flow in map(workflow_of, filter(is_workflow, module.plain))],
            "steps": [step.name for step in map(step_of, filter(is_step, module.plain))],
        }
        for module in reversed(graph.modules)
    ]


def _describe(module: ModuleNode, node: Node) -> dict[str, Any]:
    made = (node.target or node).spec.made
    return {
        "token": plain(node.token),
        "form": node.spec.form,
        "scope": scope(node),
        "exported": module.exported.get(node.token) is node,
        "needs": [
            {"parameter": need.parameter, "token": plain(need.token), "from": need.node.module.name, "lazy": need.lazy}
            for need in node.needs
            if need.node is not None
        ],
        "existing": node.target.label if node.target else None,
        "workflow": workflow_of(made).name if node.is_workflow and made else None,
        "steps": [step.name for step in steps_in(made)] if made and node.target is None else [],
    }
