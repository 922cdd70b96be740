"""What workflow code can ask for. Plain functions that hand out futures: key and ordinal are given at the call."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from uuid import UUID

from durable.core import payload
from durable.core.commands import RunStep, SendTask, StartChild, WaitSignal
from durable.core.definition import check_name, is_step, is_workflow, step_of, workflow_of
from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError, WaitTimeout
from durable.core.options import ChildOptions, RemoteOptions, StepOptions
from durable.core.retry import RetryPolicy

if TYPE_CHECKING:
    from durable.core.replay import Machine

T = TypeVar("T")
_UNSET: Any = object()


class ChildHandle(Generic[T]):
    """A child that was started and is not waited for yet."""

    def __init__(self, run_id: str, future: Awaitable[T]) -> None:
        self.run_id = run_id
        self._future = future

    def result(self) -> Awaitable[T]:
        """Wait for what it returns. Raises ChildFailed."""
        return self._future


class Context:
    """Handed to workflow code."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @property
    def run_id(self) -> str:
        return self._machine.run_id

    def step(self, name: Any, fn: Any = None, /, *args: Any, retries: int | RetryPolicy | None = None,
             timeout: Duration | None = None, returns: Any = _UNSET) -> Any:
        machine = self._machine
        machine.check()
        if not isinstance(name, str):
            if fn is not None:
                args = (fn, *args)
            fn, name = name, None
        options = StepOptions()
        if is_step(fn):
            definition = step_of(fn)
            name = name or definition.name
            options = StepOptions(definition.options.retry, definition.options.timeout)
            fn = definition.body
        name = name or getattr(fn, "__name__", "step")
        return self._step(name, fn, args, options, retries, timeout, returns)

    def _step(self, name: str, fn: Any, args: Any, options: StepOptions, retries: Any, timeout: Any, returns: Any) -> Any:
        machine = self._machine
        check_name(name, "step name")
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise DefinitionError(f"Step {name!r} is a generator; a step returns one value. Return a list.")
        if not callable(fn):
            raise DefinitionError(f"Step {name!r} needs a function, not {fn!r:.100}.")
        data = payload.encode(args, what=f"the arguments of step {name!r}") if args else b"[]"
        if returns is _UNSET:
            returns = getattr(fn, "__annotations__", {}).get("return", Any)
            if isinstance(returns, str):
                import typing
                returns = typing.get_type_hints(fn).get("return", Any)
        ordinal = machine.next_ordinal()
        command = RunStep(
            ordinal, machine.next_key(name), name, payload.fingerprint(data), fn, args,
            _options(options, retries, timeout), returns, contextvars.copy_context(),
        )
        return machine.issue(command, payload.decoder(returns))

    def remote(self, step: Any, input: Any = None, /, *, returns: Any = _UNSET, timeout: Duration | None = None,
               retries: int | RetryPolicy | None = None, transport: str | None = None, group: str | None = None,
               priority: int | None = None, heartbeat_timeout: Duration | None = None) -> Any:
        machine = self._machine
        machine.check()
        base = RemoteOptions()
        if is_step(step):
            definition = step_of(step)
            name, base = definition.name, definition.options
            data = definition.encode_input(input)
            returns = definition.output_type if returns is _UNSET else returns
        else:
            name = step
            check_name(name, "step name")
            data = payload.encode(input, what=f"the input of step {name!r}")
            returns = Any if returns is _UNSET else returns
        options = RemoteOptions(
            retry=_policy(retries) or base.retry,
            timeout=seconds(timeout) if timeout is not None else base.timeout,
            heartbeat_timeout=seconds(heartbeat_timeout) if heartbeat_timeout is not None else base.heartbeat_timeout,
            transport=transport or base.transport,
            group=group or base.group,
            priority=priority if priority is not None else base.priority,
        )
        command = SendTask(machine.next_ordinal(), machine.next_key(name), name, payload.fingerprint(data), data, options, returns)
        return machine.issue(command, payload.decoder(returns))

    def side_effect(self, fn: Callable[[], T], *, name: str = "side_effect", returns: Any = _UNSET) -> Awaitable[T]:
        self._machine.check()
        return self._step(name, fn, (), StepOptions(RetryPolicy(max_attempts=1)), None, None, returns)  # type: ignore[no-any-return]

    def child(self, workflow: Any, input: Any = None, *, version: str | None = None, returns: Any = _UNSET) -> Any:
        return self._child(workflow, input, version, returns, ChildOptions())[1]

    def start_child(self, workflow: Any, input: Any = None, *, version: str | None = None, returns: Any = _UNSET,
                    on_parent_close: Literal["cancel", "abandon"] = "cancel") -> ChildHandle[Any]:
        return ChildHandle(*self._child(workflow, input, version, returns, ChildOptions(awaited=False, on_parent_close=on_parent_close)))

    def _child(self, workflow: Any, input: Any, version: str | None, returns: Any, options: ChildOptions) -> Any:
        machine = self._machine
        machine.check()
        if is_workflow(workflow):
            definition = workflow_of(workflow)
            name, version = definition.name, version or definition.version
            data = definition.encode_input(input)
            returns = definition.output_type if returns is _UNSET else returns
        else:
            name = workflow
            data = payload.encode(input, what=f"the input of workflow {name!r}")
            returns = Any if returns is _UNSET else returns
        ordinal, key = machine.next_ordinal(), machine.next_key(name)
        child_id = machine.child_id(ordinal, key)
        command = StartChild(ordinal, key, name, payload.fingerprint(data), name, version, data, child_id, options, returns)
        return child_id, machine.issue(command, payload.decoder(returns))

    def wait_for_signal(self, name: str, *, type: Any = Any, timeout: Duration | None = None, default: Any = _UNSET) -> Any:
        machine = self._machine
        machine.check()
        check_name(name, "signal name")
        command = WaitSignal(machine.next_ordinal(), machine.next_key(f"signal:{name}"), name, "")
        future = machine.issue(command, payload.decoder(type))
        if timeout is not None and not future.done():
            def over() -> None:
                if machine.withdraw(future):
                    if default is _UNSET:
                        future.set_exception(WaitTimeout(f"No signal {name!r} within {timeout}."))
                    else:
                        future.set_result(default)
            handle = machine.loop.call_later(seconds(timeout), over)
            future.add_done_callback(lambda _: handle.cancel())
        return future

    def sleep(self, delay: Duration) -> Awaitable[None]:
        return self._until(self._machine.now + int(seconds(delay) * 1_000_000))

    def sleep_until(self, moment: datetime) -> Awaitable[None]:
        if moment.tzinfo is None:
            raise DefinitionError("sleep_until needs a time with a zone: datetime(..., tzinfo=UTC).")
        return self._until(int(moment.timestamp() * 1_000_000))

    def _until(self, deadline: int) -> Awaitable[None]:
        machine = self._machine
        machine.check()
        future = machine.loop.create_future()
        handle = machine.loop.call_later((deadline - machine.now) / 1_000_000, _ring, future)
        future.add_done_callback(lambda _: handle.cancel())
        return future

    def now(self) -> datetime:
        return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=self._machine.now)

    def uuid(self) -> UUID:
        return UUID(int=self._machine.random.getrandbits(128), version=4)

    def random(self) -> float:
        return self._machine.random.random()

    def patched(self, id: str) -> bool:
        self._machine.check()
        return self._machine.patched(id)

    async def gather(self, *awaitables: Awaitable[Any], mode: Literal["all", "settled", "first"] = "all") -> Any:
        if mode == "all":
            return await asyncio.gather(*awaitables)
        if mode == "settled":
            return await asyncio.gather(*awaitables, return_exceptions=True)
        futures = [asyncio.ensure_future(a) for a in awaitables]
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        winner = next(f for f in futures if f.done())
        for future in futures:
            if future is not winner:
                future.cancel()
        return winner.result()

    def log(self, message: str, *, level: str = "info", **fields: Any) -> None:
        self._machine.check()
        data = payload.encode(fields, what="the fields of a log line") if fields else None
        self._machine.write_log(level, message, data)


def _ring(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _policy(retries: int | RetryPolicy | None) -> RetryPolicy | None:
    return RetryPolicy(max_attempts=retries + 1) if isinstance(retries, int) else retries


def _options(base: StepOptions, retries: Any, timeout: Any) -> StepOptions:
    if retries is None and timeout is None:
        return base
    return StepOptions(_policy(retries) or base.retry, seconds(timeout) if timeout is not None else base.timeout)
