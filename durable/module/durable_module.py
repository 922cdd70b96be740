"""`DurableModule`: the engine as a module. `for_root` says where runs live and how steps travel; everything else asks for
`Durable`. Decides nothing itself: what it is given goes to `Durable(...)`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from durable.app import Durable
from durable.control_plane.interface import ControlPlane
from durable.core.durations import Duration
from durable.core.errors import DefinitionError
from durable.engine.deps import Settings
from durable.module.decorators import DynamicModule, Token, provide
from durable.opening import Transports
from durable.store.interface import Store
from durable.transports.interface import Transport


class DurableOptions:
    """What `Durable(...)` is given: the arguments of `for_root`, kept as they are."""

    def __init__(
        self,
        store: Store | str | None = None,
        *,
        transport: Transport | str | None = None,
        transports: Transports | None = None,
        control_plane: ControlPlane | str | None = None,
        role: str | None = None,
        worker: bool | None = None,
        max_recovery_attempts: int | None = None,
        lease: Duration | None = None,
        dead_letter: Any = None,
        **settings: Any,
    ) -> None:
        given = {
            "store": store,
            "transport": transport,
            "transports": transports,
            "control_plane": control_plane,
            "role": role,
            "worker": worker,
            "max_recovery_attempts": max_recovery_attempts,
            "lease": lease,
            "dead_letter_workflow": dead_letter,
        }
        self.given: dict[str, Any] = {name: value for name, value in given.items() if value is not None} | settings
        known = _known()
        for name in self.given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise DefinitionError(
                    f"Durable has no option {name!r}."
                    + (f" Did you mean {near[0]}?" if near else f" It has: {', '.join(known)}.")
                )
        if "transport" in self.given and "transports" in self.given:
            raise DefinitionError("Give transport=, or transports={...} for a pool; not both.")

    def __repr__(self) -> str:
        return f"DurableOptions({', '.join(self.given)})"

    def but(self, **changes: Any) -> DurableOptions:
        """The same with changes; None takes an option away."""
        return DurableOptions(**{name: value for name, value in (self.given | changes).items() if value is not None})

    def build(self) -> Durable:
        """The application, not yet running."""
        return Durable(**self.given)


def _known() -> list[str]:
    parameters = inspect.signature(Durable.__init__).parameters.values()
    own = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in ("self", "workflows", "steps")]
    return list(dict.fromkeys([*own, *Settings.__struct_fields__]))


class DurableModule:
    """Import it once, in the root module. It is global: every provider may ask for `Durable`."""

    __durable_module__: DynamicModule

    @staticmethod
    def for_root(
        store: Store | str | None = None,
        *,
        transport: Transport | str | None = None,
        transports: Transports | None = None,
        control_plane: ControlPlane | str | None = None,
        role: str | None = None,
        worker: bool | None = None,
        max_recovery_attempts: int | None = None,
        lease: Duration | None = None,
        dead_letter: Any = None,
        **settings: Any,
    ) -> DynamicModule:
        """Where runs live and how steps travel.

        `store`: a URL or a Store. `transport`, or `transports` by id in the order in which they are tried. `role`: engine, api or
        worker; `worker=False` is role api. `dead_letter`: the workflow for runs that cannot be saved. `settings`: those of
        durable/engine/deps.py. Raises DefinitionError for an option there is not.
        """
        options = DurableOptions(
            store,
            transport=transport,
            transports=transports,
            control_plane=control_plane,
            role=role,
            worker=worker,
            max_recovery_attempts=max_recovery_attempts,
            lease=lease,
            dead_letter=dead_letter,
            **settings,
        )
        return _module(provide(DurableOptions, use_value=options), ())

    @staticmethod
    def for_root_async(
        *,
        use_factory: Callable[..., DurableOptions | Mapping[str, Any] | Awaitable[DurableOptions | Mapping[str, Any]]],
        inject: Sequence[Token] | None = None,
        imports: Sequence[Any] = (),
    ) -> DynamicModule:
        """The options made by a factory, plain or async, from other providers: by annotation, or the tokens of `inject`.

        `imports`: the modules it gets them from. It returns DurableOptions, or a dict of for_root's arguments.
        """
        given = provide(_GIVEN, use_factory=use_factory, inject=inject)
        return _module(given, imports, provide(DurableOptions, use_factory=_options, inject=[_GIVEN]))


_GIVEN = "durable.options"


def _options(given: Any) -> DurableOptions:
    if isinstance(given, DurableOptions):
        return given
    if isinstance(given, Mapping):
        return DurableOptions(**given)
    raise DefinitionError(f"The factory of for_root_async returns DurableOptions or a dict, not {given!r}.")


def _build(options: DurableOptions) -> Durable:
    return options.build()


def _module(first: Any, imports: Sequence[Any], *more: Any) -> DynamicModule:
    return DynamicModule(
        DurableModule,
        imports=tuple(imports),
        providers=(first, *more, provide(Durable, use_factory=_build, inject=[DurableOptions])),
        exports=(Durable, DurableOptions),
        is_global=True,
    )


DurableModule.__durable_module__ = DurableModule.for_root()
