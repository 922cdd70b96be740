"""What is wrong with modules is said before anything starts, with its path and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pytest

from durable import Context, durable_step, workflow
from durable.core.errors import DefinitionError
from durable.module import Application, DurableModule, DynamicModule, Inject, injectable, module, provide
from durable.module.decorators import module_of


class Gateway:
    pass


class Payments:
    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway


class Orders:
    def __init__(self, payments: Payments) -> None:
        self.payments = payments


class AppModule:
    """Never made: the tests say each time what is in it."""


def refused(imports: Any = (), providers: Any = (), exports: Any = ()) -> str:
    with pytest.raises(DefinitionError) as caught:
        Application(DynamicModule(AppModule, imports, providers, exports))
    return str(caught.value)


def test_missing() -> None:
    """A missing provider is named with module, consumer and parameter."""
    assert refused(providers=[Payments]) == (
        "AppModule: Payments(gateway: Gateway): nothing provides Gateway. "
        "Add it to the providers of AppModule, or of a module it imports."
    )


def test_missing_with_the_whole_path() -> None:
    """The path of modules stands before what is missing, however deep."""

    @module(providers=[Payments])
    class Inner:
        pass

    @module(imports=[Inner])
    class Outer:
        pass

    assert refused([Outer]).startswith("AppModule > Outer > Inner: Payments(gateway: Gateway)")


def test_near_match() -> None:
    """A token that is nearly there is offered."""

    class Client:
        def __init__(self, url: Annotated[str, Inject("databse.url")]) -> None: ...

    assert "Did you mean database.url?" in refused(providers=[Client, provide("database.url", use_value="")])


def test_a_relative_is_offered() -> None:
    """A provider that is a subclass of what is asked for is offered, with how to say so."""

    class Stripe(Gateway):
        pass

    assert "Add provide(Gateway, use_existing=Stripe) to AppModule" in refused(providers=[Payments, Stripe])


def test_not_exported() -> None:
    """What another module keeps to itself is not visible; the remedy names who must export it, and the import."""

    @module(providers=[Gateway])
    class GatewayModule:
        pass

    told = "provided by GatewayModule, which keeps it to itself. Export it from GatewayModule"
    assert refused([GatewayModule], [Payments]).endswith(f"{told}.")

    @module(imports=[GatewayModule])
    class Other:
        pass

    assert refused([Other], [Payments]).endswith(f"{told}, and import GatewayModule in AppModule.")


def test_not_imported() -> None:
    """What is exported by a module that is not imported here says which to import."""

    @module(providers=[Gateway], exports=[Gateway])
    class GatewayModule:
        pass

    @module(imports=[GatewayModule])
    class Other:
        pass

    assert "exported by GatewayModule. Import GatewayModule in AppModule." in refused([Other], [Payments])


def test_passed_on_and_global() -> None:
    """A module may pass on what it imports, by token or as a whole; a global one needs no import."""

    @module(providers=[Gateway], exports=[Gateway])
    class GatewayModule:
        pass

    @module(imports=[GatewayModule], exports=[GatewayModule])
    class Whole:
        pass

    @module(imports=[GatewayModule], exports=[Gateway])
    class ByToken:
        pass

    @module(providers=[Gateway], exports=[Gateway], is_global=True)
    class Everywhere:
        pass

    @module(providers=[Payments])
    class Needs:
        pass

    for imports in ([Whole], [ByToken], [Whole, ByToken]):
        Application(DynamicModule(AppModule, imports, [Payments]))
    Application(DynamicModule(AppModule, [Needs, Everywhere]))


def test_two_imports_disagree() -> None:
    """A token from two imports is an error where it is asked for, naming both; one's own provider wins."""

    @module(providers=[Gateway], exports=[Gateway])
    class One:
        pass

    @module(providers=[Gateway], exports=[Gateway])
    class Two:
        pass

    told = refused([One, Two], [Payments])
    assert "could be either of One.Gateway" in told
    assert "Two.Gateway" in told
    Application(DynamicModule(AppModule, [One, Two], [Payments, Gateway]))
    Application(DynamicModule(AppModule, [One, Two]))


def test_provided_twice() -> None:
    """A token twice in a module is an error naming both places."""
    told = refused(providers=[Gateway, provide(Gateway, use_value=Gateway())])
    assert "AppModule provides Gateway twice: as class Gateway (" in told
    assert "test_graph.py:" in told
    assert "as value" in told


def test_bad_export() -> None:
    """Exporting what is not there is an error, with the near match."""
    assert "exports 'gatevay', which it neither provides" in refused(
        providers=[provide("gateway", use_value=1)], exports=["gatevay"]
    )
    assert "Did you mean gateway?" in refused(providers=[provide("gateway", use_value=1)], exports=["gatevay"])

    @module()
    class Stranger:
        pass

    assert "exports Stranger, which it does not import. Import it too." in refused(exports=[Stranger])


def test_import_circle() -> None:
    """Modules that import each other are named in a circle."""

    @module()
    class A:
        pass

    @module(imports=[A])
    class B:
        pass

    module_of(A).__dict__["imports"] = (B,)  # Python itself would not let one write it
    assert "import each other in a circle: A > B > A." in refused([A])


def test_provider_circle() -> None:
    """Providers that need each other are named in a circle, with the way out, which works."""

    class Chicken:
        def __init__(self, egg: Annotated[Any, Inject("egg")]) -> None:
            self.egg = egg

    class Egg:
        def __init__(self, chicken: Chicken) -> None: ...

    told = refused(providers=[Chicken, provide("egg", use_class=Egg)])
    assert "in a circle: AppModule.Chicken > AppModule.'egg' > AppModule.Chicken." in told
    assert "Callable[[], Chicken]" in told

    class LaterEgg:
        def __init__(self, chicken: Callable[[], Chicken]) -> None: ...

    Application(DynamicModule(AppModule, (), [Chicken, provide("egg", use_class=LaterEgg)]))


def test_existing_circle() -> None:
    """Names that stand for each other are a circle too, of any length."""
    names = ["a", "b", "c"]
    told = refused(providers=[provide(n, use_existing=m) for n, m in zip(names, [*names[1:], "a"], strict=True)])
    assert "in a circle" in told
    assert "provided as itself" in refused(providers=[provide("a", use_existing="a")])


def test_all_at_once() -> None:
    """Everything wrong at one stage is told at once."""
    told = refused(providers=[Payments, Orders, provide("x", use_existing="y")])
    assert told.startswith("2 things are wrong with the modules:\n- AppModule: Payments(gateway: Gateway)")


def test_not_annotated_and_bare_types() -> None:
    """A parameter without annotation, or of a bare type, is told how to ask for what it wants."""

    class Vague:
        def __init__(self, thing) -> None: ...  # type: ignore[no-untyped-def]

    class Bare:
        def __init__(self, url: str) -> None: ...

    assert "Vague(thing) has no annotation" in refused(providers=[Vague])
    assert "Annotated[str, Inject('a.name')]" in refused(providers=[Bare])


def test_unknown_names() -> None:
    """An annotation that names nothing is an error with the module, the place and the near match."""
    told = refused(providers=[Payments, Gateway, Misspelt])
    assert "names 'Gatevay', which is not known there. Did you mean Gateway?" in told


class Misspelt:
    def __init__(self, gateway: Gatevay) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("text", "is no provider"),
        (lambda: 1, "is no provider"),
        (module()(type("Inner", (), {})), "belongs in imports"),
    ],
)
def test_no_provider(listed: Any, words: str) -> None:
    """What is no provider is refused, with the path."""
    told = refused(providers=[listed])
    assert told.startswith("AppModule: ")
    assert words in told


def test_no_module() -> None:
    """What is no module is refused where it is imported; a forgotten call is seen."""
    assert "AppModule imports something else than a module: Gateway is not a module" in refused([Gateway])
    assert "did you mean to call it: for_root(...)" in refused([DurableModule.for_root])
    with pytest.raises(DefinitionError, match=r"Gateway is not a module. Put @module\(...\) on it."):
        Application(Gateway)


def test_durable_once() -> None:
    """Two configurations of Durable are an error naming both places."""

    @module(imports=[DurableModule.for_root("memory://")])
    class Inner:
        pass

    told = refused([Inner, DurableModule.for_root("memory://")])
    assert "configured twice: at AppModule > Inner > DurableModule and at AppModule > DurableModule" in told


def test_duplicate_workflows_and_steps() -> None:
    """Two workflows or steps of one name are an error naming both modules and both places."""

    class First:
        @durable_step("charge")
        async def charge(self) -> None: ...

    class Second:
        @durable_step("charge")
        async def charge(self) -> None: ...

    @workflow(name="same")
    async def one(ctx: Context) -> None: ...

    @workflow(name="same")
    class Two:
        async def run(self, ctx: Context) -> None: ...

    @module(providers=[Second, Two])
    class OtherModule:
        pass

    told = refused([OtherModule], [First, one])
    assert "Step charge is defined twice: by OtherModule.Second (" in told
    assert "and by AppModule.First (" in told
    assert "Workflow same version 1 is defined twice: by OtherModule.Two (" in told


def test_the_same_class_in_two_modules() -> None:
    """One class with steps in two modules is two instances of one step: provide it once and export it."""

    class Charges:
        @durable_step("charge")
        async def charge(self) -> None: ...

    @module(providers=[Charges])
    class Other:
        pass

    assert "provide it in one and export it" in refused([Other], [Charges])


def test_scopes_that_do_not_fit() -> None:
    """A singleton may not keep what lives for one run; what has steps or hooks, or waits, is a singleton."""

    @injectable(scope="run")
    class Session:
        def on_start(self) -> None: ...

    class Keeper:
        def __init__(self, session: Session) -> None: ...

    @injectable(scope="transient")
    class Steps:
        @durable_step("fresh")
        async def fresh(self) -> None: ...

    async def slow() -> int:
        return 1

    told = refused(providers=[Session, Keeper, Steps, provide("slow", use_factory=slow, scope="transient")])
    assert "Keeper is a singleton and would keep the first Session for ever" in told
    assert "Session has on_start, which would never be called" in told
    assert "Steps has steps (fresh), so it is a singleton" in told
    assert "factory of 'slow' is async" in told


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"use_value": 1, "use_class": int}, "use_class and use_value"),
        ({}, "says nothing of how"),
        ({"use_class": 3}, "is a class"),
        ({"use_factory": 3}, "is a function"),
        ({"use_value": 3, "inject": ["x"]}, "inject goes with use_factory"),
        ({"use_class": int, "scope": "request"}, "singleton, transient, run"),
        ({"use_value": 3, "scope": "transient"}, "a value is what it is"),
    ],
)
def test_provide_is_checked(given: dict[str, Any], words: str) -> None:
    """`provide` refuses what makes no sense, where it is written."""
    with pytest.raises(DefinitionError, match=words):
        provide("token", **given)


def test_overrides_are_checked() -> None:
    """An override of what nobody provides names the near match; one that loses steps says which."""

    class Charges:
        @durable_step("charge")
        async def charge(self) -> None: ...

    root = DynamicModule(AppModule, (), [Charges, provide("gateway", use_value=1)])
    with pytest.raises(DefinitionError, match=r"cannot be overridden\. Did you mean gateway\?"):
        Application(root).override("gatevay", 2)
    with pytest.raises(DefinitionError, match="has no step charge"):
        Application(root).override(Charges, object())
