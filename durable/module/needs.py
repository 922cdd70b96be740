"""What a constructor or factory asks for, read from its annotations, and which provider that is.

Called by `graph.py`. An error names the module, the parameter, and the remedy: export it, import it, or the name that was
meant.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from durable.core.errors import DefinitionError
from durable.module.decorators import Inject, Token, name_of
from durable.module.tree import Graph, Need, Node, near, near_names

_UNKNOWN: Any = object()
_NOT_TOKENS = (str, bytes, int, float, bool, list, dict, set, tuple, object)
_LAZY = (collections.abc.Callable, typing.Callable)


def read_needs(graph: Graph) -> list[str]:
    problems: list[str] = []
    for module in graph.modules:
        visible = graph.visible(module)
        for node in module.nodes:
            try:
                if node.spec.form == "existing":
                    node.target = _resolve(graph, node, Need("use_existing", node.spec.use_existing), visible)
                    continue
                if node.spec.form == "value":
                    continue
                for need in _needs(node, visible):
                    need.node = _resolve(graph, node, need, visible)
                    node.needs.append(need)
            except DefinitionError as error:
                problems.append(str(error))
    return problems


def _needs(node: Node, visible: Mapping[Token, Any]) -> Iterator[Need]:
    spec = node.spec
    maker: Any = spec.use_class or spec.use_factory
    parameters = [
        p for p in _signature(node, maker).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if spec.inject is not None:
        required = [p for p in parameters if p.default is p.empty]
        if not len(required) <= len(spec.inject) <= len(parameters):
            raise DefinitionError(
                f"{node.module.path}: the factory of {node.name} ({spec.place}) takes {len(parameters)} parameters, and "
                f"inject names {len(spec.inject)}."
            )
        for token, parameter in zip(spec.inject, parameters, strict=False):
            yield Need(parameter.name, token, positional=True)
        return
    hints = _hints(node, maker, visible)
    for parameter in parameters:
        yield _need(node, parameter, hints.get(parameter.name, _UNKNOWN), visible)


def _need(node: Node, parameter: inspect.Parameter, hint: Any, visible: Mapping[Token, Any]) -> Need:
    need = Need(parameter.name, None, parameter.kind is parameter.POSITIONAL_ONLY, default=parameter.default)
    if hint is _UNKNOWN:
        if need.default is not parameter.empty:
            return need
        raise DefinitionError(
            f"{_asking(node, need)} has no annotation, so nothing can be injected. Annotate it with a provider's type, or "
            f'with Annotated[T, Inject("token")].'
        )
    need.token = hint
    if typing.get_origin(hint) is typing.Annotated:
        marks = [mark for mark in hint.__metadata__ if isinstance(mark, Inject)]
        need.token = marks[0].token if marks else typing.get_args(hint)[0]
        if marks:
            return need
        hint = need.token
    if need.token in visible if isinstance(need.token, Hashable) else False:
        return need
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if len(inner) < len(typing.get_args(hint)) and need.default is parameter.empty:
            need.default = None
        need.token = next((arg for arg in inner if arg in visible), inner[0] if len(inner) == 1 else hint)
    elif typing.get_origin(hint) in _LAZY and not _callable_parameters(hint):
        need.token, need.lazy = typing.get_args(hint)[1], True
    return need


def _callable_parameters(hint: Any) -> Any:
    args = typing.get_args(hint)
    return args[0] if args else "any"


def _signature(node: Node, maker: Any) -> inspect.Signature:
    try:
        return inspect.signature(maker)
    except (TypeError, ValueError) as error:
        raise DefinitionError(
            f"{node.module.path}: the parameters of {name_of(maker)} cannot be read ({error}). Wrap it: "
            f"provide({node.name}, use_factory=lambda: ...)."
        ) from None


def _hints(node: Node, maker: Any, visible: Mapping[Token, Any]) -> dict[str, Any]:
    function = _bare(getattr(maker, "__init__") if isinstance(maker, type) else maker)  # noqa: B009
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:
        pass
    except Exception as error:
        raise DefinitionError(
            f"{node.module.path}: the annotations of {node.where} cannot be read: {error}."
        ) from error
    # A name of `if TYPE_CHECKING` or of a function's body: what is visible here under that name is meant.
    names = {token.__name__: token for token in visible if isinstance(token, type)}
    try:
        return typing.get_type_hints(function, localns=names, include_extras=True)
    except NameError as error:
        raise DefinitionError(
            f"{node.module.path}: {node.where} names {error.name!r}, which is not known there."
            f"{near_names(str(error.name), names)} Import it outside `if TYPE_CHECKING`, or provide it."
        ) from None


def _bare(function: Any) -> Any:
    """A function with the annotations of the parameters alone: what it returns may name anything."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__globals__"):
        function = getattr(type(function), "__call__", None)  # noqa: B004  # a callable object
    if not hasattr(function, "__globals__"):
        return _nothing
    bare = types.FunctionType(_nothing.__code__, function.__globals__)
    bare.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    return bare


def _nothing() -> None: ...


def _resolve(graph: Graph, node: Node, need: Need, visible: Mapping[Token, list[Node]]) -> Node | None:
    token = need.token
    found = visible.get(token, []) if isinstance(token, Hashable) else []
    if len(found) > 1:
        raise DefinitionError(
            f"{_asking(node, need)} could be either of {' and '.join(one.where for one in found)}, which {node.module.name} "
            "gets from two imports. Import one, or give one of them a token of its own."
        )
    if found and found[0] is node and need.parameter == "use_existing":
        raise DefinitionError(
            f"{node.module.path}: {node.name} is provided as itself. use_existing names another token."
        )
    if found:
        return found[0]
    if need.default is not inspect.Parameter.empty:
        return None
    raise DefinitionError(f"{_asking(node, need)}{_remedy(graph, node, token, visible)}")


def _asking(node: Node, need: Need) -> str:
    if need.parameter == "use_existing":
        return f"{node.module.path}: {node.name} is to be the existing {name_of(need.token)}"
    of = name_of(need.token) if isinstance(need.token, str) else getattr(need.token, "__name__", None) or need.token
    asked = f"{need.parameter}: {of}" if need.token is not None else need.parameter
    return f"{node.module.path}: {node.name}({asked})"


def _remedy(graph: Graph, node: Node, token: Token, visible: Mapping[Token, Any]) -> str:
    module = node.module
    owners = [other for other in graph.modules if token in other.own]
    name = name_of(token)
    for owner in owners:
        exports = [other for other in graph.modules if token in other.exported]
        if exports:
            return f": {name} is exported by {exports[0].name}. Import {exports[0].name} in {module.name}."
        add = "" if owner in module.imports else f", and import {owner.name} in {module.name}"
        return f": {name} is provided by {owner.name}, which keeps it to itself. Export it from {owner.name}{add}."
    if isinstance(token, type) and token in _NOT_TOKENS:
        return (
            f": nothing provides a bare {name}. Give it a token: Annotated[{name}, Inject('a.name')] and "
            "provide('a.name', use_value=...)."
        )
    kin = [t for t in visible if isinstance(t, type) and isinstance(token, type) and _is_a(t, token)]
    if kin:
        return (
            f": nothing provides {name}, but {name_of(kin[0])} is one. Add provide({name}, use_existing="
            f"{name_of(kin[0])}) to {module.name}."
        )
    close = near(token, {t for m in graph.modules for t in m.own})
    return (
        f": nothing provides {name}.{close or f' Add it to the providers of {module.name}, or of a module it imports.'}"
    )


def _is_a(cls: type[Any], base: type[Any]) -> bool:
    if getattr(base, "_is_protocol", False):
        members = {name for name in vars(base) if not name.startswith("_")}
        return bool(members) and all(hasattr(cls, name) for name in members)
    return issubclass(cls, base)
