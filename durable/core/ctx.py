"""What workflow code can ask for.

Every method is a plain function: the key and the ordinal are given out at the call, what is waited for is a future.
So `asyncio.gather`, `TaskGroup.create_task`, `asyncio.wait` take what it returns as it is, and cancelling it tells
the engine at once. Decides names, keys, options and types at the edge; `core/replay.py` keeps the rest.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import typing
from asyncio import Future
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import datetime, timedelta
from random import Random
from types import FunctionType
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, TypeVarTuple, overload
from uuid import UUID

from durable.core import payload, webhooks
from durable.core.attributes import check_attributes, check_tags
from durable.core.clock import EPOCH, microseconds_of
from durable.core.commands import Label, RunStep, SendEvent, SendTask, StartChild, WaitEvent, WaitSignal
from durable.core.definition import StepDefinition, check_name, is_step, is_workflow, step_of, workflow_of
from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError, WaitTimeout
from durable.core.event import Event, check_event_name, event_reader
from durable.core.match import condition_of
from durable.core.options import ChildOptions, RemoteOptions, StepOptions
from durable.core.retry import RetryPolicy

if TYPE_CHECKING:
    from durable.core.replay import Asked, Machine

T = TypeVar("T")
I = TypeVar("I", contravariant=True)  # noqa: E741
O = TypeVar("O", covariant=True)  # noqa: E741
D = TypeVar("D")
Ts = TypeVarTuple("Ts")

Retries = int | RetryPolicy | None
"""`3`: three more tries after the first."""

_UNSET: Any = object()
_STEP_OPTIONS = StepOptions()
_REMOTE_OPTIONS = RemoteOptions()
_ONCE = StepOptions(RetryPolicy(max_attempts=1))
_NO_ARGUMENTS = payload.fingerprint(b"[]")
_read_text: Callable[[bytes], str] = payload.decoder(str)
_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class WorkflowClass(Protocol[I, O]):
    """A class-based workflow, as a type."""

    def run(self, ctx: Any, input: I, /) -> Coroutine[Any, Any, O]: ...


class PlainWorkflowClass(Protocol[O]):
    """A class-based workflow that takes no input, as a type."""

    def run(self, ctx: Any, /) -> Coroutine[Any, Any, O]: ...


class ChildHandle(Generic[T]):
    """A child run that goes on by itself."""

    def __init__(self, run_id: str, answer: Future[T]) -> None:
        self.run_id = run_id
        self._answer = answer

    def result(self) -> Future[T]:
        """What it returns, as often as you ask. Raises ChildFailed. Giving up this wait leaves the child alone."""
        return asyncio.shield(self._answer)

    def cancel(self) -> bool:
        """Cancel the child. False if it has ended."""
        return self._answer.cancel()


class Log:
    """`ctx.log`: lines that are written once, however often the body is replayed."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __call__(self, message: str, *, level: str = "info", **fields: Any) -> None:
        self._write(level, message, fields)

    def debug(self, message: str, **fields: Any) -> None:
        self._write("debug", message, fields)

    def info(self, message: str, **fields: Any) -> None:
        self._write("info", message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        self._write("warn", message, fields)

    def error(self, message: str, **fields: Any) -> None:
        self._write("error", message, fields)

    def _write(self, level: str, message: str, fields: dict[str, Any]) -> None:
        self._machine.loop.admit()
        # Encoded even where the line is stored already: a value that is refused must be refused on every replay.
        data = payload.encode(fields, what="the fields of a log line") if fields else None
        self._machine.write_log(level, payload.clean(str(message)), data)


class Context:
    """A workflow's first argument."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._loop = machine.loop
        self._random: Random | None = None
        self.log = Log(machine)
        self.run_id = machine.run_id
        self.workflow = machine.definition.name
        self.version = machine.definition.version

    # ------------------------------------------------------------------ steps

    @overload
    def step(
        self,
        name: str,
        fn: Callable[[*Ts], Awaitable[T]],
        /,
        *args: *Ts,
        retries: Retries = None,
        timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def step(
        self,
        name: str,
        fn: Callable[[*Ts], T],
        /,
        *args: *Ts,
        retries: Retries = None,
        timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def step(
        self,
        name: str,
        fn: Callable[..., Any],
        /,
        *args: Any,
        returns: type[T],
        retries: Retries = None,
        timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def step(
        self,
        fn: Callable[[*Ts], Awaitable[T]],
        /,
        *args: *Ts,
        retries: Retries = None,
        timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def step(
        self,
        fn: Callable[[*Ts], T],
        /,
        *args: *Ts,
        retries: Retries = None,
        timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def step(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        returns: type[T],
        retries: Retries = None,
        timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def step(
        self,
        name: str | Callable[..., Any],
        /,
        *args: Any,
        returns: Any = ...,
        retries: Retries = None,
        timeout: Duration | None = None,
    ) -> Future[Any]: ...
    def step(  # type: ignore[misc]  # mypy loses *Ts of an overload here
        self,
        name: Any,
        /,
        *args: Any,
        returns: Any = _UNSET,
        retries: Retries = None,
        timeout: Duration | None = None,
    ) -> Future[Any]:
        """Run a body once and for all: `ctx.step("reserve", fn, a, b)` or `ctx.step(fn, a, b)`.

        The body runs in the engine's process, on the application's loop or, a plain `def`, in a thread. What it
        returns is journaled, and every replay gets that. It may run again if the process dies before: make it
        idempotent. Raises StepFailed after the last attempt.
        """
        self._loop.admit()
        fn = name
        if isinstance(name, str):
            if not args:
                raise DefinitionError(f"Step {name!r} needs a body: ctx.step({name!r}, fn, *args).")
            fn, args = args[0], args[1:]
        plan = _plan_of(fn)
        if fn is name:
            name = plan.name
        options = plan.options
        if retries is not None or timeout is not None:
            options = StepOptions(
                _policy(retries) or options.retry, options.timeout if timeout is None else seconds(timeout)
            )
        return self._step(name, plan, args, options, returns)

    def side_effect(self, fn: Callable[[], T], *, name: str = "side_effect", returns: Any = _UNSET) -> Future[T]:
        """Record what a small function returns, without retries: a random number, the time, a flag."""
        self._loop.admit()
        return self._step(name, _plan_of(fn), (), _ONCE, returns)

    def set_attributes(self, **attributes: str | int | float | bool | None) -> Future[None]:
        """Search attributes that this run is found by from here on; None removes one. Raises DefinitionError."""
        return self._label("attributes", check_attributes(attributes), None)

    def set_tags(self, *tags: str) -> Future[None]:
        """The run's tags from here on, instead of those before. Raises DefinitionError."""
        return self._label("tags", {}, check_tags(tags))

    def _label(self, name: str, attributes: dict[str, Any], tags: tuple[str, ...] | None) -> Future[None]:
        self._loop.admit()
        machine = self._machine
        fingerprint = payload.fingerprint(payload.canonical((attributes, tags), what=name))
        command = Label(next(self._loop.ordinals), machine.key(name), name, fingerprint, attributes, tags)
        return machine.ask(command, _nothing)

    def _step(
        self, name: str | None, plan: _Plan, args: tuple[Any, ...], options: StepOptions, returns: Any
    ) -> Future[Any]:
        machine = self._machine
        if name is None:
            raise DefinitionError(
                f"This step needs a name: ctx.step('name', fn, ...). It was given {plan.body!r:.100}."
            )
        if name not in machine.keys:
            check_name(name, "step name")
        if plan.problem is not None:
            raise DefinitionError(f"Step {name!r} {plan.problem}")
        fingerprint = _NO_ARGUMENTS
        if args:
            fingerprint = payload.fingerprint(payload.canonical(args, what=f"the arguments of step {name!r}"))
        if returns is _UNSET:
            returns, read = plan.result(name)
        else:
            read = payload.decoder(returns)
        command = RunStep(
            next(self._loop.ordinals),
            machine.key(name),
            name,
            fingerprint,
            plan.body,
            args,
            options,
            returns,
            contextvars.copy_context(),
        )
        return machine.ask(command, read)

    @overload
    def remote(
        self,
        step: str,
        input: Any = None,
        /,
        *,
        returns: type[T],
        timeout: Duration | None = None,
        retries: Retries = None,
        transport: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        heartbeat_timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def remote(
        self,
        step: Callable[[Any, I], Awaitable[T]],
        input: I,
        /,
        *,
        timeout: Duration | None = None,
        retries: Retries = None,
        transport: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        heartbeat_timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def remote(
        self,
        step: Callable[[I], Awaitable[T]],
        input: I,
        /,
        *,
        timeout: Duration | None = None,
        retries: Retries = None,
        transport: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        heartbeat_timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def remote(
        self,
        step: Callable[[Any, I], T],
        input: I,
        /,
        *,
        timeout: Duration | None = None,
        retries: Retries = None,
        transport: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        heartbeat_timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def remote(
        self,
        step: Callable[[I], T],
        input: I,
        /,
        *,
        timeout: Duration | None = None,
        retries: Retries = None,
        transport: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        heartbeat_timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def remote(
        self,
        step: Callable[[Any], Awaitable[T]],
        /,
        *,
        timeout: Duration | None = None,
        retries: Retries = None,
        transport: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        heartbeat_timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def remote(
        self,
        step: Callable[[], Awaitable[T]],
        /,
        *,
        timeout: Duration | None = None,
        retries: Retries = None,
        transport: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        heartbeat_timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def remote(
        self,
        step: Callable[[Any], T],
        /,
        *,
        timeout: Duration | None = None,
        retries: Retries = None,
        transport: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        heartbeat_timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def remote(
        self,
        step: Callable[[], T],
        /,
        *,
        timeout: Duration | None = None,
        retries: Retries = None,
        transport: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        heartbeat_timeout: Duration | None = None,
    ) -> Future[T]: ...
    @overload
    def remote(
        self,
        step: str | StepDefinition,
        input: Any = None,
        /,
        *,
        returns: Any = ...,
        timeout: Duration | None = None,
        retries: Retries = None,
        transport: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        heartbeat_timeout: Duration | None = None,
    ) -> Future[Any]: ...
    def remote(
        self,
        step: Any,
        input: Any = None,
        /,
        *,
        returns: Any = _UNSET,
        timeout: Duration | None = None,
        retries: Retries = None,
        transport: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        heartbeat_timeout: Duration | None = None,
    ) -> Future[Any]:
        """Send a step to a worker, by reference (`Payments.charge`) or by name, and wait for its result.

        Options given here win over those of the step's definition. Raises StepFailed.
        """
        self._loop.admit()
        base = _REMOTE_OPTIONS
        if is_step(step):
            definition = step_of(step)
            name, base = definition.name, definition.options
            data = definition.encode_input(input)
            returns = definition.output_type if returns is _UNSET else returns
        else:
            name = _named(step, "step", "@durable_step")
            data = payload.encode(input, what=f"the input of step {name!r}")
            returns = Any if returns is _UNSET else returns
        options = RemoteOptions(
            retry=_policy(retries) or base.retry,
            timeout=base.timeout if timeout is None else seconds(timeout),
            heartbeat_timeout=base.heartbeat_timeout if heartbeat_timeout is None else seconds(heartbeat_timeout),
            transport=transport or base.transport,
            group=group or base.group,
            priority=base.priority if priority is None else priority,
        )
        read = payload.decoder(returns)
        command = SendTask(
            next(self._loop.ordinals),
            self._machine.key(name),
            name,
            _fingerprint(input, name),
            data,
            options,
            returns,
        )
        return self._machine.ask(command, read)

    # ------------------------------------------------------------------ children

    @overload
    def child(self, workflow: str, input: Any = None, *, version: str | None = None, returns: type[T]) -> Future[T]: ...
    @overload
    def child(self, workflow: type[WorkflowClass[I, O]], input: I, *, version: str | None = None) -> Future[O]: ...
    @overload
    def child(
        self, workflow: Callable[[Context, I], Awaitable[O]], input: I, *, version: str | None = None
    ) -> Future[O]: ...
    @overload
    def child(self, workflow: Callable[[Context], Awaitable[O]], *, version: str | None = None) -> Future[O]: ...
    @overload
    def child(
        self, workflow: Any, input: Any = None, *, version: str | None = None, returns: Any = ...
    ) -> Future[Any]: ...
    def child(
        self, workflow: Any, input: Any = None, *, version: str | None = None, returns: Any = _UNSET
    ) -> Future[Any]:
        """Start another run and wait for what it returns. Raises ChildFailed. Cancelling the wait cancels the child."""
        return self._child(workflow, input, version, returns, ChildOptions())[1]

    @overload
    def start_child(
        self,
        workflow: type[WorkflowClass[I, O]],
        input: I,
        *,
        version: str | None = None,
        on_parent_close: Literal["cancel", "abandon"] = "cancel",
    ) -> ChildHandle[O]: ...
    @overload
    def start_child(
        self,
        workflow: Callable[[Context, I], Awaitable[O]],
        input: I,
        *,
        version: str | None = None,
        on_parent_close: Literal["cancel", "abandon"] = "cancel",
    ) -> ChildHandle[O]: ...
    @overload
    def start_child(
        self,
        workflow: Any,
        input: Any = None,
        *,
        version: str | None = None,
        returns: Any = ...,
        on_parent_close: Literal["cancel", "abandon"] = "cancel",
    ) -> ChildHandle[Any]: ...
    def start_child(
        self,
        workflow: Any,
        input: Any = None,
        *,
        version: str | None = None,
        returns: Any = _UNSET,
        on_parent_close: Literal["cancel", "abandon"] = "cancel",
    ) -> ChildHandle[Any]:
        """Start another run and go on. `on_parent_close`: what becomes of it if this run ends other than completed."""
        options = ChildOptions(awaited=False, on_parent_close=on_parent_close)
        return ChildHandle(*self._child(workflow, input, version, returns, options))

    def _child(
        self, workflow: Any, input: Any, version: str | None, returns: Any, options: ChildOptions
    ) -> tuple[str, Future[Any]]:
        self._loop.admit()
        if is_workflow(workflow):
            definition = workflow_of(workflow)
            name, version = definition.name, version or definition.version
            data = definition.encode_input(input)
            returns = definition.output_type if returns is _UNSET else returns
        else:
            name = _named(workflow, "workflow", "@workflow")
            data = payload.encode(input, what=f"the input of workflow {name!r}")
            returns = Any if returns is _UNSET else returns
        read = payload.decoder(returns)
        fingerprint = _fingerprint(input, name)
        ordinal, key = next(self._loop.ordinals), self._machine.key(name)
        child_id = self._machine.child_id(ordinal, key)
        command = StartChild(ordinal, key, name, fingerprint, name, version, data, child_id, options, returns)
        return child_id, self._machine.ask(command, read)

    # ------------------------------------------------------------------ waiting

    @overload
    def wait_for_signal(self, name: str, *, type: type[T], timeout: Duration | None = None) -> Future[T]: ...
    @overload
    def wait_for_signal(
        self, name: str, *, type: type[T], timeout: Duration | None = None, default: D
    ) -> Future[T | D]: ...
    @overload
    def wait_for_signal(
        self, name: str, *, type: Any = ..., timeout: Duration | None = None, default: Any = ...
    ) -> Future[Any]: ...
    def wait_for_signal(
        self, name: str, *, type: Any = Any, timeout: Duration | None = None, default: Any = _UNSET
    ) -> Future[Any]:
        """The next signal of that name, oldest first; one that came early is taken at once, and each only once.

        After `timeout` the wait raises WaitTimeout, or gives `default` where one is given.
        """
        self._loop.admit()
        check_name(name, "signal name")
        return self._signal(name, type, timeout, default)

    def _signal(self, name: str, type: Any, timeout: Duration | None = None, default: Any = _UNSET) -> Future[Any]:
        read = payload.decoder(type)
        limit = None if timeout is None else seconds(timeout)
        machine = self._machine
        command = WaitSignal(next(self._loop.ordinals), machine.key(f"signal:{name}"), name, "")

        def give_up(promise: Asked) -> None:
            if default is _UNSET:
                promise.set_exception(WaitTimeout(f"No signal {name!r} came within {limit:g} s."))
            else:
                promise.set_result(default)

        return machine.wait_signal(command, read, None if limit is None else round(limit * 1e6), give_up)

    # ------------------------------------------------------------------ webhooks

    @overload
    async def webhook(self, name: str = "webhook", *, type: type[T]) -> webhooks.Webhook[T]: ...
    @overload
    async def webhook(self, name: str = "webhook") -> webhooks.Webhook[Any]: ...
    async def webhook(self, name: str = "webhook", *, type: Any = Any) -> webhooks.Webhook[Any]:
        """A wait that has a URL: `hook = await ctx.webhook("paid")`, then give `hook.url` away and `await hook.received`, which
        is what was posted to it, as `type`. The first post counts. The address is recorded: it stays what it is."""
        self._loop.admit()
        check_name(name, "webhook name")
        key = self._machine.peek(f"webhook:{name}")
        url = await self._step(f"webhook:{name}", _plan_of(webhooks.make_url), (), _ONCE, str)
        return webhooks.Webhook(url, self._signal(webhooks.wait_name(key), type))

    def call_webhook(
        self,
        url: str,
        data: Any = None,
        *,
        name: str = "call_webhook",
        headers: Mapping[str, str] | None = None,
        timeout: Duration = webhooks.CALL_SECONDS,
        retries: Retries = None,
    ) -> Future[webhooks.Delivered]:
        """Post JSON to somebody's URL as a step: signed (`x-durable-signature`, HMAC-SHA256 of the body), under an id that is the
        same for every attempt (`x-durable-delivery`), tried again for as long as the receiver cannot take it. `timeout`: of one
        attempt. Raises StepFailed for an answer that is final, and after the last attempt."""
        self._loop.admit()
        options = StepOptions(_policy(retries) or webhooks.CALL_RETRIES, None)
        args = (url, data, dict(headers or {}), seconds(timeout))
        return self._step(name, _plan_of(webhooks.call), args, options, webhooks.Delivered)

    @overload
    def wait_for_event(
        self,
        name: str,
        *,
        type: type[T],
        match: Mapping[str, Any] | None = None,
        where: str | None = None,
        timeout: Duration | None = None,
        early: bool | Duration = True,
    ) -> Future[Event[T]]: ...
    @overload
    def wait_for_event(
        self,
        name: str,
        *,
        type: type[T],
        match: Mapping[str, Any] | None = None,
        where: str | None = None,
        timeout: Duration | None = None,
        default: D,
        early: bool | Duration = True,
    ) -> Future[Event[T] | D]: ...
    @overload
    def wait_for_event(
        self,
        name: str,
        *,
        match: Mapping[str, Any] | None = None,
        where: str | None = None,
        timeout: Duration | None = None,
        early: bool | Duration = True,
    ) -> Future[Event[Any]]: ...
    @overload
    def wait_for_event(
        self,
        name: str,
        *,
        type: Any = ...,
        match: Mapping[str, Any] | None = None,
        where: str | None = None,
        timeout: Duration | None = None,
        default: Any = ...,
        early: bool | Duration = True,
    ) -> Future[Any]: ...
    def wait_for_event(
        self,
        name: str,
        *,
        type: Any = Any,
        match: Mapping[str, Any] | None = None,
        where: str | None = None,
        timeout: Duration | None = None,
        default: Any = _UNSET,
        early: bool | Duration = True,
    ) -> Future[Any]:
        """An event of that name, whoever published it: one whose data holds all of `match`, or for which the expression `where`
        is true. Each event comes to a run once, and to all of its waits that are open then.

        One accepted since the run began is taken at once, unless an earlier wait has had it; `early=False` takes only those
        accepted from now on, a duration those accepted at most so long ago. After `timeout` the wait raises WaitTimeout, or
        gives `default` where one is given. `type`: what the event's data is read as.
        """
        self._loop.admit()
        check_event_name(name)
        condition = condition_of(match, where)
        read = event_reader(type)
        now = self._loop.now
        since: int | None = None
        if early is not True:
            since = now - (round(seconds(early) * 1e6) if early is not False else 0)
        limit = None if timeout is None else seconds(timeout)
        # Never at once: what was accepted before this moment is looked for first.
        deadline = None if limit is None else now + max(1, round(limit * 1e6))
        machine = self._machine
        fingerprint = payload.fingerprint(condition or b"")
        command = WaitEvent(
            next(self._loop.ordinals), machine.key(f"event:{name}"), name, fingerprint, condition, since, deadline
        )

        def give_up(promise: Asked) -> None:
            if default is _UNSET:
                promise.set_exception(WaitTimeout(f"No event {name!r} that was asked for came within {limit:g} s."))
            else:
                promise.set_result(default)

        return machine.wait_event(command, read, give_up)

    def send_event(self, name: str, data: Any = None, *, id: str | None = None) -> Future[str]:
        """Publish an event, once for this call however often the run is replayed, and get its id. `id`: a key of yours; an
        event of this workspace that has it already is the one."""
        self._loop.admit()
        check_event_name(name)
        if id is not None:
            check_name(id, "event's id", reserved=False)
        encoded = payload.encode(data, what=f"the data of event {name!r}")
        fingerprint = payload.fingerprint(payload.canonical(data, what=f"the data of event {name!r}"))
        ordinal = next(self._loop.ordinals)
        command = SendEvent(
            ordinal,
            self._machine.key(f"emit:{name}"),
            name,
            fingerprint,
            f"{self.run_id}.event.{ordinal}",
            id,
            encoded,
        )
        return self._machine.send_event(command, _read_text)

    emit = send_event

    def sleep(self, duration: Duration) -> Future[None]:
        """Sleep, for a second or a year: `ctx.sleep("3d")`. The run needs no memory meanwhile."""
        self._loop.admit()
        return self._loop.sleep_until(self._loop.now + round(seconds(duration) * 1e6))

    def sleep_until(self, moment: datetime) -> Future[None]:
        """Sleep until a moment, which needs a time zone; one that has passed is no wait at all."""
        self._loop.admit()
        if not isinstance(moment, datetime) or moment.tzinfo is None:
            raise DefinitionError(f"sleep_until needs a datetime with a time zone, not {moment!r}: datetime.now(UTC).")
        return self._loop.sleep_until(microseconds_of(moment))

    @overload
    def gather(self, *awaitables: Awaitable[T], mode: Literal["all"] = "all") -> Future[list[T]]: ...
    @overload
    def gather(self, *awaitables: Awaitable[T], mode: Literal["settled"]) -> Future[list[T | BaseException]]: ...
    @overload
    def gather(self, *awaitables: Awaitable[T], mode: Literal["first"]) -> Future[T]: ...
    def gather(self, *awaitables: Awaitable[Any], mode: str = "all") -> Future[Any]:
        """Wait for several. `all`: every result in order, or the first error, and then the rest is cancelled.
        `settled`: results and errors in order. `first`: the first to end, result or error; the rest is cancelled."""
        self._loop.admit()
        if mode not in _GATHER:
            raise DefinitionError(f"gather knows the modes {', '.join(_GATHER)}, not {mode!r}.")
        if mode == "first" and not awaitables:
            raise DefinitionError("gather(mode='first') needs something to wait for.")
        futures: list[Future[Any]] = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
        return self._loop.create_task(_GATHER[mode](futures), name=f"gather-{mode}")

    # ------------------------------------------------------------------ the rest

    def now(self) -> datetime:
        """The time, UTC. It moves from turn to turn, and is the same on every replay."""
        self._loop.admit()
        return EPOCH + timedelta(microseconds=self._loop.now)

    def uuid(self) -> UUID:
        """A random UUID, the same on every replay."""
        self._loop.admit()
        return UUID(int=self._generator().getrandbits(128), version=4)

    def random(self) -> float:
        """A random number in [0, 1), the same on every replay."""
        self._loop.admit()
        return self._generator().random()

    def _generator(self) -> Random:
        if self._random is None:
            self._random = Random(self._machine.seed)
        return self._random

    def patched(self, id: str) -> bool:
        """Whether to take the new way: True for runs that get here for the first time, False for those who have
        been past here with the old code. The answer is journaled and stays."""
        self._loop.admit()
        check_name(id, "patch id")
        return self._machine.patched(id)


def _nothing(_data: bytes) -> None:
    return None


# ------------------------------------------------------------------ gather


async def _all(futures: list[Future[Any]]) -> list[Any]:
    try:
        if futures:
            await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
        for future in futures:  # whatever ended badly comes out, though others before it are still under way
            if future.done():
                future.result()
        return [future.result() for future in futures]
    finally:
        _cancel(futures)


async def _settled(futures: list[Future[Any]]) -> list[Any]:
    try:
        if futures:
            await asyncio.wait(futures)
        return [_outcome(future) for future in futures]
    finally:
        _cancel(futures)


async def _first(futures: list[Future[Any]]) -> Any:
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        return next(future for future in futures if future.done()).result()
    finally:
        _cancel(futures)


_GATHER: dict[str, Callable[[list[Future[Any]]], Coroutine[Any, Any, Any]]] = {
    "all": _all,
    "settled": _settled,
    "first": _first,
}


def _outcome(future: Future[Any]) -> Any:
    if future.cancelled():
        return asyncio.CancelledError()
    error = future.exception()
    return future.result() if error is None else error


def _cancel(futures: list[Future[Any]]) -> None:
    for future in futures:
        future.cancel()


# ------------------------------------------------------------------ reading what was given


def _policy(retries: Retries) -> RetryPolicy | None:
    if retries is None or isinstance(retries, RetryPolicy):
        return retries
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise DefinitionError(f"retries is a number from 0 or a RetryPolicy, not {retries!r}.")
    return RetryPolicy(max_attempts=retries + 1)


def _named(given: Any, what: str, decorator: str) -> str:
    if not isinstance(given, str):
        raise DefinitionError(f"{given!r:.100} is no {what}. Put {decorator} on it, or give its name.")
    check_name(given, f"{what} name")
    return given


def _fingerprint(input: Any, name: str) -> str:
    return payload.fingerprint(payload.canonical(input, what=f"the input of {name!r}"))


class _Plan:
    """What is known of a step's function, whoever calls it with what."""

    def __init__(self, fn: Any) -> None:
        self.body = fn
        self.name: str | None = getattr(fn, "__name__", None)
        self.options = _STEP_OPTIONS
        self.problem: str | None = None
        self._result: tuple[Any, Callable[[bytes], Any]] | None = None
        if is_step(fn):
            definition = step_of(fn)
            self.name = definition.name
            self.options = StepOptions(definition.options.retry, definition.options.timeout)
            self.body = definition.body
            self._result = (definition.output_type, payload.decoder(definition.output_type))
        elif inspect.iscoroutine(fn):
            fn.close()
            self.problem = (
                "was given a call, not a function. Give the function and its arguments apart: "
                f"ctx.step('name', {fn.__name__}, ...)."
            )
        elif not callable(fn):
            self.problem = f"needs a function to run, not {fn!r:.100}."
        elif (code := getattr(fn, "__code__", None)) is not None and code.co_flags & _GENERATORS:
            self.problem = "is a generator; a step returns one value. Return a list."

    def result(self, name: str) -> tuple[Any, Callable[[bytes], Any]]:
        """The annotation of the result, and its reader."""
        if self._result is None:
            annotation = _return_type(self.body, name)
            self._result = (annotation, payload.decoder(annotation))
        return self._result


_cached_plan = functools.lru_cache(maxsize=1024)(_Plan)


def _plan_of(fn: Any) -> _Plan:
    # Functions with a closure are not kept: it may hold the whole run.
    if type(fn) is FunctionType and fn.__closure__ is None:
        return _cached_plan(fn)
    return _Plan(fn)


def _return_type(fn: Callable[..., Any], name: str) -> Any:
    annotation = getattr(fn, "__annotations__", _NOTHING).get("return", Any)
    if isinstance(annotation, type) or annotation is Any:
        return annotation
    if annotation is None:
        return Any
    try:
        return _hints(inspect.unwrap(fn)).get("return", Any)
    except Exception as error:
        raise DefinitionError(
            f"The return annotation of step {name!r} cannot be read: {error}. Define the type in a module, or say "
            "ctx.step(..., returns=TheType)."
        ) from error


_NOTHING: dict[str, Any] = {}


@functools.lru_cache(maxsize=1024)
def _hints(fn: Any) -> dict[str, Any]:
    return typing.get_type_hints(fn, include_extras=True)
