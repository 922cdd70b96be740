"""What authors write: `@module`, `provide(...)`, `@injectable`, `Inject`. Marks only; nothing is made or checked here.

`durable/module/graph.py` reads the marks and checks the whole at once, so that one error can name everything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from durable.core.definition import is_step, is_workflow
from durable.core.errors import DefinitionError

Token = Hashable
"""What a provider is asked for by: a type, or a text."""
Scope = Literal["singleton", "transient", "run"]
"""`singleton`: one for the app. `transient`: a new one for each that asks. `run`: one for each workflow instance, and one
for each attempt of a step."""

SCOPES: tuple[Scope, ...] = ("singleton", "transient", "run")

T = TypeVar("T")

_MODULE = "__durable_module__"
_SCOPE = "__durable_scope__"


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()


@dataclass(frozen=True)
class Inject:
    """Ask for a token other than the annotation's type: `url: Annotated[str, Inject("database.url")]`."""

    token: Token


@dataclass(frozen=True, eq=False)
class Provider:
    """How a token is provided. Made by `provide`."""

    token: Token
    use_class: type[Any] | None = None
    use_value: Any = UNSET
    use_factory: Callable[..., Any] | None = None
    use_existing: Any = UNSET
    inject: tuple[Token, ...] | None = None
    """For a factory: tokens for its positional parameters; None: by its annotations."""
    scope: Scope = "singleton"

    @property
    def place(self) -> str:
        """file:line of what makes it, for errors."""
        return place_of(self.use_class or self.use_factory or self.token)

    @property
    def form(self) -> str:
        """class, value, factory or existing."""
        if self.use_class is not None:
            return "class"
        if self.use_factory is not None:
            return "factory"
        return "value" if self.use_existing is UNSET else "existing"

    @property
    def made(self) -> type[Any] | None:
        """The class of what is provided, as far as it can be known without making it."""
        if self.use_class is not None:
            return self.use_class
        if self.use_value is not UNSET:
            return type(self.use_value)
        if self.use_factory is not None and isinstance(self.token, type):
            return self.token
        return None


def provide(
    token: Token,
    *,
    use_class: type[Any] | None = None,
    use_value: Any = UNSET,
    use_factory: Callable[..., Any] | None = None,
    use_existing: Any = UNSET,
    inject: Sequence[Token] | None = None,
    scope: Scope | None = None,
) -> Provider:
    """A provider for a token: a class, a value, a factory, or another token under this name too.

    A factory may be `async def`; one that yields, sync or async, is a resource and goes on after the `yield` when the app
    stops. Its parameters are injected by annotation, or are the tokens of `inject` in order.
    """
    given = [
        name
        for name, value in {
            "use_class": UNSET if use_class is None else use_class,
            "use_value": use_value,
            "use_factory": UNSET if use_factory is None else use_factory,
            "use_existing": use_existing,
        }.items()
        if value is not UNSET
    ]
    name = name_of(token)
    if len(given) > 1:
        raise DefinitionError(f"provide({name}) is given {' and '.join(given)}. It takes one of them.")
    if not given:
        if not isinstance(token, type):
            raise DefinitionError(
                f"provide({name}) says nothing of how: give use_class, use_value, use_factory or use_existing."
            )
        use_class = token
    if inject is not None and use_factory is None:
        raise DefinitionError(f"provide({name}): inject goes with use_factory; a class says in its constructor.")
    if use_class is not None and not isinstance(use_class, type):
        raise DefinitionError(f"provide({name}): use_class is a class, not {use_class!r}.")
    if use_factory is not None and not callable(use_factory):
        raise DefinitionError(f"provide({name}): use_factory is a function, not {use_factory!r}.")
    if scope is not None and scope not in SCOPES:
        raise DefinitionError(f"provide({name}): scope is one of {', '.join(SCOPES)}, not {scope!r}.")
    if scope not in (None, "singleton") and (use_value is not UNSET or use_existing is not UNSET):
        raise DefinitionError(f"provide({name}): a value is what it is; a scope goes with a class or a factory.")
    chosen: Scope = scope or (scope_of(use_class) if use_class is not None else "singleton")
    return Provider(
        token,
        use_class=use_class,
        use_value=use_value,
        use_factory=use_factory,
        use_existing=use_existing,
        inject=None if inject is None else tuple(inject),
        scope=chosen,
    )


def injectable(*, scope: Scope) -> Callable[[type[T]], type[T]]:
    """Say a class's scope where it is written. Without it a provider is a singleton."""
    if scope not in SCOPES:
        raise DefinitionError(f"A scope is one of {', '.join(SCOPES)}, not {scope!r}.")

    def decorate(cls: type[T]) -> type[T]:
        setattr(cls, _SCOPE, scope)
        return cls

    return decorate


def scope_of(cls: type[Any]) -> Scope:
    """What `@injectable` says, or singleton. A workflow's instance lives for one run."""
    if is_workflow(cls):
        return "transient"
    scope: Scope = getattr(cls, _SCOPE, "singleton")
    return scope


@dataclass(frozen=True, eq=False)
class DynamicModule:
    """A module made at run time: what `for_root` returns. Complete in itself; `module` names it and, if it has hooks or a
    constructor, is made and started with it."""

    module: type[Any]
    imports: Sequence[Any] = ()
    providers: Sequence[Any] = ()
    exports: Sequence[Any] = ()
    is_global: bool = False


def module(
    *,
    imports: Sequence[Any] = (),
    providers: Sequence[Any] = (),
    exports: Sequence[Any] = (),
    is_global: bool = False,
) -> Callable[[type[T]], type[T]]:
    """Make a class a module.

    `imports`: modules whose exports its providers may ask for. `providers`: classes, `provide(...)`, workflow and step
    functions. `exports`: tokens, or imported modules, that importers may ask for. `is_global`: its exports are seen
    everywhere without an import.
    """
    for option, value in {"imports": imports, "providers": providers, "exports": exports}.items():
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise DefinitionError(f"@module({option}=...) is a list, not {value!r}.")

    def decorate(cls: type[T]) -> type[T]:
        if not isinstance(cls, type):
            raise DefinitionError(f"@module goes on a class, not on {cls!r}.")
        setattr(cls, _MODULE, DynamicModule(cls, tuple(imports), tuple(providers), tuple(exports), is_global))
        return cls

    return decorate


def is_module(thing: Any) -> bool:
    """A class with `@module`, or what a `for_root` returned."""
    return isinstance(thing, DynamicModule) or (isinstance(thing, type) and _MODULE in vars(thing))


def module_of(thing: Any) -> DynamicModule:
    """The definition of a module. Raises DefinitionError."""
    if isinstance(thing, DynamicModule):
        return thing
    if isinstance(thing, type) and _MODULE in vars(thing):
        definition: DynamicModule = vars(thing)[_MODULE]
        return definition
    if isinstance(thing, type) and hasattr(thing, _MODULE):
        raise DefinitionError(f"{thing.__qualname__} inherits from a module, but is none. Put @module on it too.")
    if callable(thing) and not isinstance(thing, type):
        raise DefinitionError(f"{name_of(thing)} is a function; did you mean to call it: {name_of(thing)}(...)?")
    raise DefinitionError(f"{name_of(thing)} is not a module. Put @module(...) on it.")


def provider_of(thing: Any) -> Provider:
    """A provider as listed: itself, or a class. Raises DefinitionError."""
    if isinstance(thing, Provider):
        return thing
    if is_module(thing):
        raise DefinitionError(f"{name_of(thing)} is a module; it belongs in imports, not in providers.")
    if isinstance(thing, type):
        return provide(thing)
    raise DefinitionError(
        f"{name_of(thing)} is no provider. List a class, provide({name_of(thing)!r}, use_value=...), "
        "or a function with @workflow or @durable_step."
    )


def is_plain(thing: Any) -> bool:
    """A workflow or step that needs no instance: a decorated function, or a definition."""
    return not isinstance(thing, type) and (is_workflow(thing) or is_step(thing))


def name_of(thing: Any) -> str:
    """How errors call a token, a module or a function."""
    if isinstance(thing, DynamicModule):
        return thing.module.__name__
    if isinstance(thing, str):
        return repr(thing)
    return getattr(thing, "__name__", None) or repr(thing)


def place_of(thing: Any) -> str:
    """file:line where it is written, or nothing."""
    try:
        code = getattr(inspect.unwrap(thing), "__code__", None) if callable(thing) else None
        if code is not None:
            return f"{code.co_filename}:{code.co_firstlineno}"
        if isinstance(thing, type):
            return f"{inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return getattr(thing, "__module__", "")
    return ""
