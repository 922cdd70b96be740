"""What may be a workflow or a step, and how bytes become its input."""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from durable.core.definition import check_name, durable_step, step_of, steps_in, workflow, workflow_of
from durable.core.errors import DefinitionError, PayloadError, ReservedId
from durable.core.retry import RetryPolicy

if TYPE_CHECKING:
    from fractions import Fraction


class Context: ...


@dataclass
class Order:
    id: str
    total: Decimal


@workflow
async def plain(ctx: Context) -> None: ...


@workflow("checkout", "2", timeout="1h", tags=["shop", "shop", "money"], priority=5)
async def checkout(ctx: Context, order: Order) -> Decimal:
    """Documented."""
    return order.total


@workflow(name="greeter")
class Greeter:
    def __init__(self, greeting: str = "hello") -> None:
        self.greeting = greeting

    async def run(self, ctx: Context, name: str = "you") -> str:
        return f"{self.greeting} {name}"


class Payments:
    def __init__(self, fee: int = 1) -> None:
        self.fee = fee

    @durable_step("payments.charge", retries=3, timeout="30s", heartbeat_timeout=5, transport="t", group="g")
    async def charge(self, order: Order) -> Decimal:
        return order.total + self.fee

    @durable_step
    def refund(self) -> str:
        return "done"

    @staticmethod
    @durable_step
    def rate(currency: str) -> str:
        return currency


def _run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def test_decorators_hand_back_the_thing_itself() -> None:
    """A decorated function is called as before; its definition is attached."""
    assert inspect.iscoroutinefunction(checkout)
    assert _run(checkout(Context(), Order("a", Decimal(2)))) == 2
    definition = workflow_of(checkout)
    assert (definition.name, definition.version, definition.timeout) == ("checkout", "2", 3600)
    assert (definition.tags, definition.priority) == (("shop", "money"), 5)
    assert definition.fn is checkout
    assert definition.place.startswith(__file__)


def test_names_come_from_the_code_where_none_is_given() -> None:
    """A function's name, a class's, Class.method for a step."""
    assert workflow_of(plain).name == "plain"
    assert workflow_of(plain).version == "1"
    assert step_of(Payments.refund).name == "Payments.refund"


def test_input_bytes_become_the_annotated_type() -> None:
    """`encode_input` and `call` are each other's inverse, through the annotation."""
    definition = workflow_of(checkout)
    assert (definition.input_type, definition.output_type) == (Order, Decimal)
    data = definition.encode_input(Order("a", Decimal("1.50")))
    assert data == b'{"id":"a","total":"1.50"}'
    assert _run(definition.call(Context(), data)) == Decimal("1.50")


def test_a_workflow_without_input_takes_none() -> None:
    """Nothing in, null on the wire; something in is refused at the caller."""
    definition = workflow_of(plain)
    assert definition.input_type is None
    assert definition.encode_input() == b"null"
    assert _run(definition.call(Context(), b"null")) is None
    with pytest.raises(PayloadError, match="takes no input"):
        definition.encode_input(3)


def test_an_input_that_does_not_fit_is_refused_at_the_start() -> None:
    """By value or by bytes: at the caller, not in the first turn of a run."""
    definition = workflow_of(checkout)
    with pytest.raises(PayloadError, match="the input of workflow checkout"):
        definition.encode_input("nonsense")
    with pytest.raises(PayloadError, match=r"\$\.total"):
        definition.check_input(b'{"id":"a","total":[]}')
    definition.check_input(b'{"id":"a","total":"1"}')


def test_a_class_is_made_anew_for_each_call_by_its_factory() -> None:
    """No-argument constructor by default; `bind` hands the making to a container; a default input is kept."""
    definition = workflow_of(Greeter)
    assert _run(definition.call(Context(), b"null")) == "hello you"
    bound = definition.bind(lambda cls: cls("ciao"))
    assert _run(bound.call(Context(), b'"Ada"')) == "ciao Ada"
    assert workflow_of(Greeter).factory is None


def test_a_class_that_needs_arguments_says_so() -> None:
    """Its constructor's TypeError becomes advice."""

    @workflow
    class Needy:
        def __init__(self, gateway: object) -> None: ...

        async def run(self, ctx: Context) -> None: ...

    with pytest.raises(DefinitionError, match="provider of a module"):
        workflow_of(Needy).call(Context(), b"null")


def test_a_step_keeps_its_options() -> None:
    """retries=3 is four attempts; durations are read; a policy is taken as it is."""
    options = step_of(Payments.charge).options
    assert (options.retry.max_attempts, options.timeout, options.heartbeat_timeout) == (4, 30, 5)
    assert (options.transport, options.group) == ("t", "g")
    policy = RetryPolicy(max_attempts=9)

    @durable_step(retries=policy, timeout=timedelta(minutes=1))
    def other() -> None: ...

    assert step_of(other).options.retry is policy
    assert step_of(other).options.timeout == 60


def test_a_method_step_runs_on_the_instance_it_is_bound_to() -> None:
    """Bound by reference, by hand, or found in a provider; unbound it says what it needs."""
    definition = step_of(Payments.charge)
    data = definition.encode_input(Order("a", Decimal(2)))
    assert definition.needs_instance
    with pytest.raises(DefinitionError, match="needs an instance of Payments"):
        definition.call(data)
    assert _run(step_of(Payments(fee=3).charge).call(data)) == 5
    assert _run(definition.bind(Payments(fee=4)).call(data)) == 6
    charge, refund, rate = steps_in(Payments(fee=5))
    assert _run(charge.call(data)) == 7
    assert (refund.call(b"null"), rate.call(b'"EUR"')) == ("done", "EUR")
    assert charge.is_async
    assert not refund.is_async


def test_an_override_hides_its_parents_step() -> None:
    """A subclass that overrides a step without marking it has one step less."""

    class Quiet(Payments):
        def refund(self) -> str:
            return "no"

    assert [step.name for step in steps_in(Quiet)] == ["payments.charge", "Payments.rate"]


def test_text_annotations_are_resolved_where_the_decorator_stands() -> None:
    """PEP 563: types of the module, of the enclosing function, and such as are defined further down."""

    @dataclass
    class Local:
        x: int

    @workflow
    async def local(ctx: Context, value: Local) -> Later: ...

    class Holder:
        @durable_step
        def step(self, value: Local) -> list[Local]: ...

    assert workflow_of(local).input_type is Local
    assert workflow_of(local).output_type is Later
    assert step_of(Holder.step).output_type == list[Local]


@workflow
async def early(ctx: Context, value: Later) -> Later | None: ...


def test_a_forward_reference_is_read_once_it_exists() -> None:
    """Decorating came before the class; asking comes after."""
    assert workflow_of(early).input_type is Later


@dataclass
class Later:
    x: int


def test_an_annotation_that_never_resolves_is_an_error_when_registered() -> None:
    """A type imported for the type checker only: named, with its remedy."""

    @workflow
    async def lost(ctx: Context, value: Fraction) -> None: ...

    with pytest.raises(DefinitionError, match=r"lost .*test_definition.py.*Fraction.*TYPE_CHECKING"):
        workflow_of(lost).resolve()


async def _sync_body(ctx: Any, a: Any) -> None: ...


class Bad:
    """Everything that is no workflow."""

    def sync(ctx: Any) -> None: ...
    def generator(ctx: Any) -> Iterator[int]:
        yield 1

    async def async_generator(ctx: Any) -> AsyncIterator[int]:
        yield 1

    async def no_ctx() -> None: ...
    async def two(ctx: Any, a: int, b: int = 2) -> None: ...
    async def star(ctx: Any, *args: int) -> None: ...
    async def stars(ctx: Any, **kwargs: int) -> None: ...
    async def keyword(ctx: Any, *, a: int) -> None: ...
    async def sock(ctx: Any, a: socket.socket) -> None: ...
    async def sock_out(ctx: Any) -> dict[str, socket.socket]: ...

    class NoRun: ...

    class SyncRun:
        def run(self, ctx: Any) -> None: ...

    class NoCtx:
        async def run(self) -> None: ...


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (Bad.sync, "Write `async def`"),
        (Bad.generator, "is a generator"),
        (Bad.async_generator, "is a generator"),
        (Bad.no_ctx, "needs a ctx parameter"),
        (Bad.two, r"more than one input \(a, b\)"),
        (Bad.star, r"\*args cannot be carried"),
        (Bad.stars, r"\*\*kwargs cannot be carried"),
        (Bad.keyword, "a cannot be carried"),
        (Bad.sock, "socket.socket cannot be read back"),
        (Bad.sock_out, "socket.socket"),
        (Bad.NoRun, "needs `async def run"),
        (Bad.SyncRun, "Write `async def`"),
        (Bad.NoCtx, "needs a ctx parameter"),
        (staticmethod(_sync_body), "goes on an async function"),
        (len, "goes on an async function"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_workflow_is_refused_with_the_way_out(target: Any, says: str) -> None:
    """Already the decorator refuses it."""
    with pytest.raises(DefinitionError, match=says):
        workflow("w")(target)


def _step_generator(a: int) -> Iterator[int]:
    yield a


def _step_two(a: int, b: int) -> None: ...


def _step_callable(a: Callable[[], int]) -> None: ...


@pytest.mark.parametrize("target", [_step_generator, _step_two, _step_callable, staticmethod(_step_two), Payments, len])
def test_what_is_no_step_is_refused(target: Any) -> None:
    """Generators, several inputs, types that cannot be carried, things that are no function."""
    with pytest.raises(DefinitionError):
        durable_step("s")(target)


@pytest.mark.parametrize("name", ["", " a", "a ", "x" * 201, "a\0", "a\nb", "\ud800", "a\x1b", "a\u2028b", 3, b"a"])
def test_a_name_that_something_would_choke_on_is_refused(name: Any) -> None:
    """As a workflow's name, its version, a step's name; the message itself is plain text."""
    for attempt in (lambda: workflow(name=name), lambda: workflow("w", name), lambda: workflow("w", tags=[name])):
        with pytest.raises(DefinitionError) as caught:
            attempt()(_sync_body)
        str(caught.value).encode()
    with pytest.raises(DefinitionError):
        durable_step(name=name)(lambda: None)


@pytest.mark.parametrize("name", ["__x", "rollback:charge"])
def test_the_engines_own_names_are_reserved(name: str) -> None:
    """ReservedId, with the code to match; a version may look like that."""
    with pytest.raises(ReservedId) as caught:
        durable_step(name)(lambda: None)
    assert caught.value.code == "reserved_id"
    check_name("__x", "workflow version", reserved=False)


def test_names_people_use_are_taken() -> None:
    """Dots, colons, spaces inside, other scripts, 200 characters."""
    for name in ["payments.charge", "charge:42", "send a mail", "\u652f\u6255\u3044", "x" * 200]:
        check_name(name, "step name")


@pytest.mark.parametrize(
    "options",
    [
        {"retries": -1},
        {"retries": True},
        {"retries": "3"},
        {"timeout": 0},
        {"timeout": "soon"},
        {"heartbeat_timeout": -1},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    """The message names the step and the option."""
    with pytest.raises(DefinitionError, match=rf"{next(iter(options))} of step s"):
        durable_step("s", **options)(lambda: None)


def test_what_is_not_decorated_is_told_apart() -> None:
    """Plain functions, and classes that only inherit the mark."""

    class Child(Greeter): ...

    with pytest.raises(DefinitionError, match="Put @workflow on it"):
        workflow_of(_sync_body)
    with pytest.raises(DefinitionError, match="Put @durable_step on it"):
        step_of(_sync_body)
    with pytest.raises(DefinitionError, match="Put @workflow on it too"):
        workflow_of(Child)


_SOURCE = '''
from durable.core.definition import workflow, workflow_of
@workflow
async def w(ctx, x: int = 0):
    """{doc}"""
    {comment}
    async def inner(): return x in {{"a", "b", "c", {constant!r}}}
    return await inner()
print(workflow_of(w).code_hash)
'''


def test_the_code_hash_follows_the_code_and_nothing_else() -> None:
    """Comments, docstring, place and the process's hash seed leave it; a constant deep inside changes it."""

    def code_hash(seed: str, **parts: str) -> bytes:
        code = _SOURCE.format(**{"doc": "d", "comment": "pass", "constant": "z", **parts})
        run = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        return run.stdout

    base = code_hash("1")
    assert code_hash("2", doc="other") == base
    assert code_hash("3", comment="# why\n\n    pass") == base
    assert code_hash("1", constant="y") != base
    assert workflow_of(Greeter).code_hash != workflow_of(checkout).code_hash
