"""Runs one remote task: finds the step, decodes its input, runs the body, answers. Knows neither engine nor store."""

from __future__ import annotations

import asyncio

import msgspec

from durable.core.clock import Clock
from durable.core.errors import ErrorData, NotRegistered, PayloadError, StepTimeout
from durable.core.payload import describe, through
from durable.core.registry import Registry
from durable.core.step import StepObserver, StepScope, enter_step
from durable.protocol.messages import Answer, RemoteTask, StepResult, Task, routing_token
from durable.transports.answers import no_handler
from durable.worker.bodies import Bodies
from durable.worker.lines import Lines, Teller


def groups_of(registry: Registry, partition: str | None = None) -> list[str]:
    """Where tasks of the registry's steps wait: each under its own name, and with its group where it declares one; or, for
    a worker of a `partition`, there only."""
    groups: dict[str, None] = {}
    for step in registry.steps():
        if step.needs_instance:
            continue
        if partition is not None:
            groups[routing_token(step.name, partition)] = None
        else:
            groups[routing_token(step.name)] = None
            groups[routing_token(step.name, step.options.group)] = None
    return list(groups)


class StepHandler:
    """A transport's task handler over a registry of steps."""

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        on_step: StepObserver | None = None,
        *,
        threads: int = 32,
        teller: Teller | None = None,
    ) -> None:
        """`teller`: tells what bodies say live; None: it comes with the result."""
        self._registry = registry
        self._clock = clock
        self._on_step = on_step
        self._teller = teller
        self._bodies = Bodies(threads)

    def close(self) -> None:
        """Let the threads of plain bodies go, and tell nothing more."""
        self._bodies.close()
        if self._teller is not None:
            self._teller.stop()

    async def __call__(self, task: Task) -> Answer:
        """Never raises but CancelledError: a failure is an answer."""
        if not isinstance(task, RemoteTask):
            return no_handler(task)
        started = self._now_ms()
        teller = self._teller
        lines = Lines(task, self._now_ms, _silence if teller is None else teller.wake)
        if teller is not None:
            teller.follow(lines)
        try:
            return await self._answer(task, lines, started)
        finally:
            lines.close()
            if teller is not None:
                teller.leave(lines)

    def _now_ms(self) -> int:
        return self._clock.now() // 1_000

    async def _answer(self, task: RemoteTask, lines: Lines, started: int) -> Answer:
        output: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
        error: ErrorData | None = None
        try:
            output = msgspec.Raw(await self._run(task, lines))
        except NotRegistered:
            return no_handler(task)
        except PayloadError as refused:
            # The body has done its work; doing it again would give the same value.
            data = describe(refused)
            error = ErrorData(data.message, data.code, data.type, retryable=False, stack=data.stack)
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
            events=lines.close(),
            attempt=task.attempt,
            token=task.token,
        )

    async def _run(self, task: RemoteTask, lines: Lines) -> bytes:
        step = self._registry.step(task.name)
        scope = StepScope(
            task.run_id,
            task.step_id,
            task.name,
            task.name,
            task.attempt,
            lines.write,
            task.traceparent,
            task.context,
        )
        enter_step(scope, self._on_step)
        timeout = step.options.timeout
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                result = await self._bodies.call(step.call, (bytes(task.input),), is_async=step.is_async)
        except TimeoutError:
            if limit.expired():
                scope.cancelled = True
                raise StepTimeout(f"The step took longer than its timeout of {timeout} s.") from None
            raise
        except asyncio.CancelledError:
            scope.cancelled = True  # a plain body goes on in its thread, and may look
            raise
        # Read back too: what cannot be read as its type fails the step here, not the workflow that waits for it.
        output, _ = through(result, step.output_type, what=f"the result of step {task.name!r}")
        return output


def _silence() -> None:
    """Nobody is told live."""
