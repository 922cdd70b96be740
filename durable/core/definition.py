"""What a workflow and a step are: a name, the author's code, and how bytes become its input.

Decides which functions and classes may be one, and reads their annotations, once. The decorators hand back what they
were given with the definition attached, so it stays callable and typed. Called by authors, by the registry, and by
replay and workers through `call`. Never runs the author's code except in `call`; knows no engine and no container,
only the `factory` that makes an instance.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any, TypeVar, overload

import msgspec

from durable.core import payload
from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError, PayloadError
from durable.core.event import data_in, input_of, is_event
from durable.core.flow import (
    NO_FLOW,
    Batch,
    Concurrency,
    Debounce,
    Fairness,
    Flow,
    RateLimit,
    Singleton,
    Throttle,
    Trigger,
    flow_of,
    triggers_of,
)
from durable.core.names import MAX_NAME as MAX_NAME
from durable.core.names import check_name as check_name
from durable.core.options import RemoteOptions
from durable.core.retention import Retention, retention_of
from durable.core.retry import RetryPolicy

Factory = Callable[[type[Any]], Any]
"""Makes the instance a class-based workflow runs on; the container gives its own."""

T = TypeVar("T", bound=Callable[..., Any])

_WORKFLOW = "__durable_workflow__"
STEP_MARK = "__durable_step__"


# The definitions


@dataclass(frozen=True, eq=False)
class _Definition:
    """What a workflow and a step have in common. `fn` is the author's own function or class, untouched."""

    name: str
    fn: Callable[..., Any]
    _shape: _Shape = field(repr=False)

    @property
    def input_type(self) -> Any:
        """The input's annotation, `Any` where there is none; None for code that takes no input."""
        return self._shape.types[0]

    @property
    def output_type(self) -> Any:
        """The result's annotation, `Any` where there is none."""
        return self._shape.types[1]

    @property
    def place(self) -> str:
        """file:line, for errors."""
        return self._shape.place

    def resolve(self) -> None:
        """Read the annotations now. Raises DefinitionError; the registry calls it, when every name exists."""
        _ = self._shape.types

    def encode_input(self, value: Any = None, *, limit: int = payload.DEFAULT_LIMIT) -> bytes:
        """The value as the bytes `call` takes. Raises PayloadError here, at the caller's, if it is not the input."""
        wanted = self.input_type
        if wanted is None:
            if value is not None:
                raise PayloadError(f"{self._shape.label} takes no input, but was given a {type(value).__name__}.")
            return b"null"
        data = self.kept(payload.encode(value, wanted, what=self._input, limit=limit))
        self._arguments(data)
        return data

    def kept(self, data: bytes) -> bytes:
        """The input's bytes as they are stored."""
        return data

    def check_input(self, data: bytes, *, limit: int = payload.DEFAULT_LIMIT) -> None:
        """Refuse bytes of a stranger's that could not be stored, or not be read as the input. Raises PayloadError."""
        payload.check(data, what=self._input, limit=limit)
        self._arguments(data)

    @property
    def _input(self) -> str:
        return f"the input of {self._shape.label}"

    def _arguments(self, data: bytes) -> tuple[Any, ...]:
        wanted = self.input_type
        if wanted is None or (self._shape.has_default and data in (b"", b"null")):
            return ()
        return (payload.decode(data or b"null", wanted, what=self._input),)


@dataclass(frozen=True, eq=False)
class WorkflowDefinition(_Definition):
    """A named, versioned workflow. `fn` is an async function `(ctx, input?)`, or a class with such a `run`."""

    version: str = "1"
    timeout: float | None = None
    """Seconds a run may take in all."""
    tags: tuple[str, ...] = ()
    category: str | None = None
    """One word for listings: what kind of work this is."""
    priority: int = 0
    dead_letter_workflow: str | None = None
    """Started for each run of this workflow that is dead; None: the application's default."""
    retention: Retention | None = None
    """How long its finished runs are kept; None: as the application says. The latest version's counts."""
    triggers: tuple[Trigger, ...] = ()
    """What starts its runs, beside those who ask for one. The latest version's count."""
    flow: Flow = NO_FLOW
    """What holds its runs back."""
    factory: Factory | None = field(default=None, repr=False)
    hosting: Any = field(default=None, repr=False)
    """Of a workflow whose code lives in a worker (core/hosted.py): how its turns are sent. None: the code is here."""

    def call(self, ctx: Any, data: bytes) -> Coroutine[Any, Any, Any]:
        """A fresh coroutine over the input bytes. Raises PayloadError if they are not the input."""
        arguments = self._arguments(data)
        if isinstance(self.fn, type):
            instance = (self.factory or _plain)(self.fn)
            return typing.cast(Coroutine[Any, Any, Any], instance.run(ctx, *arguments))
        return typing.cast(Coroutine[Any, Any, Any], self.fn(ctx, *arguments))

    def input_from(self, event_id: str, name: str, at: int, data: bytes) -> bytes:
        """The stored input of a run that an event starts: the event if that is what the code asks for, else its data; of a
        batch the event with a list of one, which grows. `at` in µs."""
        if self.flow.batch is not None:
            return input_of(event_id, name, at, b"[%b]" % data)
        if self.input_type is None:
            return b"null"
        return input_of(event_id, name, at, data) if is_event(self.input_type) else data

    def as_event(self, data: bytes) -> dict[str, Any]:
        """A stored input as keys and priorities see it, also where no event has started the run."""
        value = msgspec.json.decode(data or b"null")
        if (self.flow.batch is not None or is_event(self.input_type)) and isinstance(value, dict):
            return value
        return {"id": "", "name": "", "ts": 0, "data": value}

    def kept(self, data: bytes) -> bytes:
        """The input's bytes as they are stored: a batch's in the form that can grow."""
        return input_of("", "", 0, data) if self._gathers else data

    @property
    def _gathers(self) -> bool:
        """Whether the code asks for a batch's list, and not for the event it stands in."""
        return self.flow.batch is not None and not is_event(self.input_type)

    def _arguments(self, data: bytes) -> tuple[Any, ...]:
        return super()._arguments(data_in(data) if self._gathers and data else data)

    def bind(self, factory: Factory) -> WorkflowDefinition:
        """The same workflow, its instances made by `factory(cls)`."""
        return replace(self, factory=factory)

    @cached_property
    def code_hash(self) -> str:
        """Changes when the code does, not with comments, places or its docstring: a deploy changed this version."""
        return _code_hash(self.fn)


@dataclass(frozen=True, eq=False)
class StepDefinition(_Definition):
    """A named step: a sync or async function or method of at most one input."""

    options: RemoteOptions = field(default_factory=RemoteOptions)
    dead_letter: bool = False
    """It reads dead letters."""
    instance: Any = field(default=None, repr=False)

    @property
    def needs_instance(self) -> bool:
        """A method that no instance has been bound to yet."""
        return self._shape.is_method and self.instance is None

    @property
    def is_async(self) -> bool:
        code = getattr(self.fn, "__code__", None)  # shows it of most, at a tenth of the price
        return (code is not None and bool(code.co_flags & inspect.CO_COROUTINE)) or inspect.iscoroutinefunction(self.fn)

    def call(self, data: bytes) -> Any:
        """Run the body: a coroutine for `async def`, the plain result for `def`. Raises PayloadError."""
        return self.body(*self._arguments(data))

    @property
    def body(self) -> Callable[..., Any]:
        """What to call with the input: the function, or the method of the bound instance."""
        if not self._shape.is_method:
            return self.fn
        if self.instance is None:
            owner = self.fn.__qualname__.rpartition(".")[0]
            raise DefinitionError(
                f"{self._shape.label} is a method: it needs an instance of {owner}. "
                f"Register one (Registry.add), or list {owner} as a provider of a module."
            )
        return MethodType(self.fn, self.instance)

    def bind(self, instance: Any) -> StepDefinition:
        """The same step, running on this instance; a plain function stays as it is."""
        return replace(self, instance=instance) if self._shape.is_method else self


def _plain(cls: type[Any]) -> Any:
    try:
        return cls()
    except TypeError as error:
        raise DefinitionError(
            f"{cls.__qualname__} cannot be made without arguments: {error}. List it as a provider of a module, "
            "or bind a factory."
        ) from error


# The decorators


@overload
def workflow(name: T, /) -> T: ...
@overload
def workflow(
    name: str | None = None,
    version: str = "1",
    *,
    timeout: Duration | None = None,
    tags: Iterable[str] = (),
    category: str | None = None,
    priority: int | str = 0,
    dead_letter_workflow: Any = None,
    retention: Retention | Duration | None = None,
    on: str | Trigger | Sequence[str | Trigger] | None = None,
    cron: str | Trigger | Sequence[str | Trigger] | None = None,
    concurrency: int | Concurrency | Sequence[Concurrency] | None = None,
    throttle: Throttle | None = None,
    rate_limit: RateLimit | None = None,
    debounce: Duration | Debounce | None = None,
    batch: Batch | None = None,
    singleton: bool | str | Singleton | None = None,
    weight: float | Fairness | Mapping[str, float] | None = None,
) -> Callable[[T], T]: ...
def workflow(
    name: Any = None,
    version: str = "1",
    *,
    timeout: Duration | None = None,
    tags: Iterable[str] = (),
    category: str | None = None,
    priority: int | str = 0,
    dead_letter_workflow: Any = None,
    retention: Retention | Duration | None = None,
    on: str | Trigger | Sequence[str | Trigger] | None = None,
    cron: str | Trigger | Sequence[str | Trigger] | None = None,
    concurrency: int | Concurrency | Sequence[Concurrency] | None = None,
    throttle: Throttle | None = None,
    rate_limit: RateLimit | None = None,
    debounce: Duration | Debounce | None = None,
    batch: Batch | None = None,
    singleton: bool | str | Singleton | None = None,
    weight: float | Fairness | Mapping[str, float] | None = None,
) -> Any:
    """Make an async function `(ctx, input?)`, or a class with `async def run(self, ctx, input?)`, a workflow.

    `on`, `cron`: what starts its runs (core/flow.py). A run that an event starts gets the event if its input is an `Event`, else
    the event's data. `concurrency`, `throttle`, `rate_limit`, `debounce`, `batch`, `singleton` hold runs back, each for all or
    for each value of a key. `priority`: a number, or an expression over the event; higher runs first. `weight`: how places are
    shared between keys.
    """
    scope = _Scope.of(sys._getframe(1))

    def decorate(target: T) -> T:
        chosen = _default_name(target) if name is None or name is target else name
        shape = _workflow_shape(target, chosen, scope)
        check_name(chosen, "workflow name")
        check_name(version, "workflow version", reserved=False)
        if category is not None:
            check_name(category, "workflow category", reserved=False)
        definition = WorkflowDefinition(
            name=chosen,
            fn=target,
            _shape=shape,
            version=version,
            timeout=_optional(timeout, "timeout", shape),
            tags=_tags(tags, shape),
            category=category,
            priority=0 if isinstance(priority, str) else _priority(priority, shape),
            dead_letter_workflow=workflow_name(dead_letter_workflow),
            retention=retention_of(retention),
            **_policies(
                shape,
                on=on,
                cron=cron,
                concurrency=concurrency,
                throttle=throttle,
                rate_limit=rate_limit,
                debounce=debounce,
                batch=batch,
                singleton=singleton,
                weight=weight,
                priority=priority if isinstance(priority, str) else None,
            ),
        )
        setattr(target, _WORKFLOW, definition)
        return target

    return decorate(name) if callable(name) else decorate


@overload
def durable_step(name: T, /) -> T: ...
@overload
def durable_step(
    name: str | None = None,
    *,
    retries: int | RetryPolicy | None = None,
    timeout: Duration | None = None,
    heartbeat_timeout: Duration | None = None,
    transport: str | None = None,
    group: str | None = None,
) -> Callable[[T], T]: ...
def durable_step(
    name: Any = None,
    *,
    retries: int | RetryPolicy | None = None,
    timeout: Duration | None = None,
    heartbeat_timeout: Duration | None = None,
    transport: str | None = None,
    group: str | None = None,
) -> Any:
    """Make a function or method of at most one input a step. `retries=3`: three more tries after the first."""
    scope = _Scope.of(sys._getframe(1))

    def decorate(target: T) -> T:
        chosen = _default_name(target) if name is None or name is target else name
        shape = _step_shape(target, chosen, scope)
        check_name(chosen, "step name")
        options = RemoteOptions(
            retry=_retry(retries, shape),
            timeout=_optional(timeout, "timeout", shape),
            heartbeat_timeout=_optional(heartbeat_timeout, "heartbeat_timeout", shape),
            transport=transport,
            group=group,
        )
        setattr(target, STEP_MARK, StepDefinition(name=chosen, fn=target, _shape=shape, options=options))
        return target

    return decorate(name) if callable(name) else decorate


def workflow_name(workflow: Any) -> str | None:
    """The name meant by a name or a decorated workflow."""
    return workflow if workflow is None or isinstance(workflow, str) else workflow_of(workflow).name


def is_workflow(obj: Any) -> bool:
    """Whether it carries a workflow's definition, or is one."""
    return isinstance(obj, WorkflowDefinition) or isinstance(getattr(obj, _WORKFLOW, None), WorkflowDefinition)


def is_step(obj: Any) -> bool:
    """Whether it carries a step's definition, or is one."""
    return isinstance(obj, StepDefinition) or isinstance(getattr(obj, STEP_MARK, None), StepDefinition)


def workflow_of(obj: Any) -> WorkflowDefinition:
    """The definition of a decorated function or class. Raises DefinitionError."""
    if isinstance(obj, WorkflowDefinition):
        return obj
    definition = getattr(obj, _WORKFLOW, None)
    if not isinstance(definition, WorkflowDefinition):
        raise DefinitionError(f"{_label(obj)} is not a workflow. Put @workflow on it.")
    if definition.fn is not obj:
        # A subclass inherits the mark, but would run under its parent's name.
        raise DefinitionError(f"{_label(obj)} is not {definition.name}, only a relative. Put @workflow on it too.")
    return definition


def step_of(obj: Any) -> StepDefinition:
    """The definition of a decorated function or method; a bound method gives one bound to its instance."""
    if isinstance(obj, StepDefinition):
        return obj
    definition = getattr(obj, STEP_MARK, None)
    if not isinstance(definition, StepDefinition):
        raise DefinitionError(f"{_label(obj)} is not a step. Put @durable_step on it.")
    instance = getattr(obj, "__self__", None)
    return definition if instance is None else definition.bind(instance)


def steps_in(provider: Any) -> list[StepDefinition]:
    """The steps among a class's methods, in order of definition; given an instance, bound to it."""
    cls = provider if isinstance(provider, type) else type(provider)
    found: dict[str, StepDefinition] = {}
    for base in reversed(cls.__mro__):
        for attribute, member in vars(base).items():
            found.pop(attribute, None)  # an override replaces its parent's step, or hides it
            definition = getattr(getattr(member, "__func__", member), STEP_MARK, None)  # a staticmethod hides it
            if isinstance(definition, StepDefinition):
                found[attribute] = definition
    return [step if isinstance(provider, type) else step.bind(provider) for step in found.values()]


# Names and numbers


def _default_name(target: Any) -> str:
    qualname: str = getattr(target, "__qualname__", "")
    return qualname.rpartition("<locals>.")[2]


def _optional(value: Duration | None, option: str, shape: _Shape) -> float | None:
    if value is None:
        return None
    try:
        number = seconds(value)
    except DefinitionError as error:
        raise DefinitionError(f"{option} of {shape.label}: {error}") from None
    if number == 0:
        raise DefinitionError(
            f"{option} of {shape.label} is zero, so it could never finish. Leave it out for no limit."
        )
    return number


def _tags(tags: Iterable[str], shape: _Shape) -> tuple[str, ...]:
    if isinstance(tags, str):
        raise DefinitionError(f"tags of {shape.label} is a list of texts: write [{tags!r}].")
    chosen = tuple(dict.fromkeys(tags))
    for tag in chosen:
        check_name(tag, "tag", reserved=False)
    return chosen


def _priority(priority: object, shape: _Shape) -> int:
    if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**31) <= priority < 2**31:
        raise DefinitionError(f"priority of {shape.label} is a 32-bit number; higher runs first. Not {priority!r}.")
    return priority


def _policies(shape: _Shape, *, on: Any, cron: Any, **given: Any) -> dict[str, Any]:
    try:
        return {"triggers": triggers_of(on, cron), "flow": flow_of(**given)}
    except DefinitionError as error:
        raise type(error)(f"{shape.label}: {error}") from None


def _retry(retries: object, shape: _Shape) -> RetryPolicy:
    if retries is None:
        return RetryPolicy()
    if isinstance(retries, RetryPolicy):
        return retries
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise DefinitionError(f"retries of {shape.label} is a number from 0 or a RetryPolicy, not {retries!r}.")
    return RetryPolicy(max_attempts=retries + 1)


# Reading the author's code


@dataclass(frozen=True, eq=False)
class _Scope:
    """Names visible where the decorator stands, for annotations kept as text inside functions."""

    names: Mapping[str, Any]

    @classmethod
    def of(cls, frame: FrameType) -> _Scope:
        layers = []
        at: FrameType | None = frame
        while at is not None and at.f_locals is not at.f_globals:
            layers.append(at.f_locals)
            if "__qualname__" not in at.f_locals:  # a function; a class body sees what is around it too
                break
            at = at.f_back
        return cls({name: value for layer in reversed(layers) for name, value in layer.items()})


@dataclass(frozen=True, eq=False)
class _Shape:
    """A checked signature, whose types are read when first asked for: a forward reference may not exist yet."""

    label: str
    function: Callable[..., Any]
    place: str
    input_name: str | None
    has_default: bool
    is_method: bool
    scope: _Scope = field(repr=False)

    @cached_property
    def types(self) -> tuple[Any, Any]:
        try:
            hints = typing.get_type_hints(self.function, localns=dict(self.scope.names), include_extras=True)
        except Exception as error:
            raise DefinitionError(
                f"The annotations of {self.label} ({self.place}) cannot be read: {error}. "
                "Define or import the type in the same module, outside `if TYPE_CHECKING`."
            ) from error
        output = self._readable("result", hints.get("return", Any))
        if self.input_name is None:
            return None, output
        return self._readable("input", hints.get(self.input_name, Any)), output

    def _readable(self, role: str, annotation: Any) -> Any:
        annotation = Any if annotation in (typing.NoReturn, typing.Never) else annotation
        try:
            payload.decoder(annotation)
        except PayloadError as error:
            raise DefinitionError(f"The {role} of {self.label} ({self.place}): {error}") from error
        return annotation


def _workflow_shape(target: Any, name: object, scope: _Scope) -> _Shape:
    label = f"workflow {name}"
    function, skip = target, 1
    if isinstance(target, type):
        function, skip = _members(target).get("run"), 2
        if not isinstance(function, FunctionType):
            raise DefinitionError(f"{label}: {target.__qualname__} needs `async def run(self, ctx, input)`.")
    place = _place(target)
    if not isinstance(function, FunctionType):
        raise DefinitionError(f"{label}: @workflow goes on an async function or a class, not on {target!r}.")
    _refuse_generators(function, label, place)
    if not inspect.iscoroutinefunction(function):
        raise DefinitionError(f"{label} ({place}) is a plain function. Write `async def`, and do its I/O in steps.")
    parameters = _parameters(function, label, place)
    if len(parameters) < skip:
        raise DefinitionError(f"{label} ({place}) needs a ctx parameter: `async def {function.__name__}(ctx, input)`.")
    _refuse_input_for_ctx(parameters[skip - 1], label, place)
    return _shape(function, parameters[skip:], label, place, scope, is_method=skip == 2)


def _refuse_input_for_ctx(parameter: inspect.Parameter, label: str, place: str) -> None:
    """`async def w(n: int)` would be handed the Context as its n."""
    annotation = parameter.annotation
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "Any")
    if annotation is not inspect.Parameter.empty and name.rpartition(".")[2].strip("'\"") not in (
        "Context",
        "Any",
        "object",
    ):
        raise DefinitionError(
            f"{label} ({place}): its first parameter is the Context, but {parameter.name!r} is a {name}. "
            f"Write `(ctx: Context, {parameter.name}: {name})`."
        )


def _step_shape(target: Any, name: object, scope: _Scope) -> _Shape:
    label = f"step {name}"
    if isinstance(target, (staticmethod, classmethod)):
        raise DefinitionError(f"{label}: put @durable_step below @{type(target).__name__}.")
    if not isinstance(target, FunctionType):
        raise DefinitionError(f"{label}: @durable_step goes on a function or method, not on {target!r}.")
    place = _place(target)
    _refuse_generators(target, label, place)
    parameters = _parameters(target, label, place)
    owner = target.__qualname__.rpartition(".")[0]
    is_method = bool(owner) and not owner.endswith("<locals>") and bool(parameters) and parameters[0].name == "self"
    return _shape(target, parameters[is_method:], label, place, scope, is_method=is_method)


def _shape(
    function: Callable[..., Any],
    inputs: list[inspect.Parameter],
    label: str,
    place: str,
    scope: _Scope,
    *,
    is_method: bool,
) -> _Shape:
    if len(inputs) > 1:
        names = ", ".join(parameter.name for parameter in inputs)
        raise DefinitionError(f"{label} ({place}) takes more than one input ({names}). Put them into one dataclass.")
    shape = _Shape(
        label=label,
        function=function,
        place=place,
        input_name=inputs[0].name if inputs else None,
        has_default=bool(inputs) and inputs[0].default is not inspect.Parameter.empty,
        is_method=is_method,
        scope=scope,
    )
    try:
        _ = shape.types
    except DefinitionError as error:
        # A name that does not exist yet may be defined further down; the registry asks again.
        if not _is_forward_reference(error):
            raise
    return shape


def _is_forward_reference(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, NameError):
        error = error.__cause__
    return error is not None


def _parameters(function: Callable[..., Any], label: str, place: str) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
            raise DefinitionError(
                f"{label} ({place}): {str(parameter).partition(':')[0]} cannot be carried. "
                "Take one input; put several values into one dataclass."
            )
    return parameters


def _refuse_generators(function: Callable[..., Any], label: str, place: str) -> None:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise DefinitionError(f"{label} ({place}) is a generator. Return a value; `yield` has no place in it.")


def _members(cls: type[Any]) -> dict[str, Any]:
    """A class's attributes as written, inherited ones too."""
    return {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}


def _place(target: Any) -> str:
    function = _members(target).get("run") if isinstance(target, type) else target
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return f"{code.co_filename}:{code.co_firstlineno}" if isinstance(code, CodeType) else "?"


def _label(obj: Any) -> str:
    return getattr(obj, "__qualname__", None) or repr(obj)


# The hash of the code


def _code_hash(target: Callable[..., Any]) -> str:
    functions = [target]
    if isinstance(target, type):
        members = _members(target)
        functions = [members[name] for name in sorted(members) if isinstance(members[name], FunctionType)]
    parts: list[bytes] = []
    for function in functions:
        plain = inspect.unwrap(function)
        if isinstance(plain, FunctionType):
            parts.extend(_code_parts(plain.__code__, plain.__doc__))
    return payload.fingerprint(*parts)


def _code_parts(code: CodeType, doc: str | None = None) -> list[bytes]:
    parts = [code.co_code, repr((code.co_name, code.co_names, code.co_varnames, code.co_freevars)).encode()]
    for index, constant in enumerate(code.co_consts):
        if isinstance(constant, CodeType):
            parts.extend(_code_parts(constant))
        elif not (index == 0 and isinstance(constant, str) and constant == doc):
            parts.append(_stable(constant).encode("utf-8", "surrogatepass"))
    return parts


def _stable(constant: Any) -> str:
    """`repr`, but a frozenset's order is that of hashes, which differ from process to process."""
    if isinstance(constant, frozenset):
        return f"frozenset({sorted(map(_stable, constant))})"
    if isinstance(constant, tuple):
        return f"({','.join(map(_stable, constant))})"
    return repr(constant)
