"""Runs one remote task: finds the step, decodes its input, runs the body, answers. Knows neither engine nor store."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from functools import partial
from typing import Any

import msgspec

from durable.core.clock import Clock
from durable.core.definition import StepDefinition
from durable.core.errors import ErrorData, NotRegistered, StepTimeout
from durable.core.payload import describe, encode
from durable.core.registry import Registry
from durable.core.step import StepScope, enter_step
from durable.protocol.messages import RemoteTask, StepEvent, StepResult
from durable.worker.threads import BodyThreads


class StepHandler:
    """A transport's task handler over a registry of steps."""

    def __init__(self, registry: Registry, clock: Clock, *, threads: int = 32) -> None:
        """`threads`: for plain `def` bodies; 0 runs them in place (the simulation)."""
        self._registry = registry
        self._clock = clock
        self._threads = BodyThreads(threads) if threads else None

    async def __call__(self, task: RemoteTask) -> StepResult:
        """Never raises but CancelledError: a failure is an answer."""
        started = self._clock.now() // 1_000
        events: list[StepEvent] = []

        def write(level: str, message: str, fields: dict[str, Any]) -> None:
            at = self._clock.now() // 1_000
            events.append(StepEvent(at=at, level=level, message=message, data=fields or None))  # type: ignore[arg-type]

        output: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
        error: ErrorData | None = None
        try:
            output = msgspec.Raw(await self._run(task, write))
        except NotRegistered:
            error = ErrorData(message=f"no handler for {task.name}", code="unknown_step", retryable=False)
        except (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as failure:
            # SystemExit and whatever else is no Exception too: without an answer the run would wait for ever.
            error = describe(failure)
        return StepResult(
            run_id=task.run_id,
            seq=task.seq,
            step_id=task.step_id,
            status="completed" if error is None else "failed",
            output=output,
            error=error,
            started_at=started,
            events=events or None,
            attempt=task.attempt,
        )

    async def _run(self, task: RemoteTask, write: Any) -> bytes:
        step = self._registry.step(task.name)
        enter_step(StepScope(task.run_id, task.step_id, task.name, task.name, task.attempt, write))
        timeout = step.options.timeout
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                result = await self._begin(step, bytes(task.input))
                if inspect.isawaitable(result):
                    result = await result
        except TimeoutError:
            if limit.expired():
                raise StepTimeout(f"The step took longer than its timeout of {timeout} s.") from None
            raise
        return encode(result, step.output_type, what=f"the result of step {task.name!r}")

    async def _begin(self, step: StepDefinition, data: bytes) -> Any:
        if step.is_async or self._threads is None:
            return step.call(data)
        return await self._threads.run(partial(contextvars.copy_context().run, step.call, data))
