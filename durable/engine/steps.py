"""Local step bodies: run on the application's loop as ordinary tasks, or in a thread if they are a plain `def`.

A body begins only behind the barrier and within the safe share of the lease. It may run twice; its result is
journaled once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from durable.core.commands import Invoke, RunStep
from durable.core.errors import ErrorData, PayloadError, StepTimeout
from durable.core.journal import LOG, STEP
from durable.core.payload import DEFAULT_LIMIT, clean, describe, encode, encode_error, through
from durable.core.step import Pace, StepScope, enter_step
from durable.engine.apply import log_payload
from durable.engine.residents import Arrival, Resident
from durable.protocol.messages import step_id
from durable.worker.bodies import Bodies

if TYPE_CHECKING:
    from durable.engine.executor import Executor


class LocalSteps:
    """Begins, times and cancels step bodies."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._held: list[Callable[[], None]] = []
        settings = executor.settings
        self._bodies = Bodies(settings.body_threads if settings.threads else 0)
        self._limit = min(DEFAULT_LIMIT, executor.deps.store.capabilities.max_payload)

    def launch(self, run: Resident, command: RunStep, attempt: int) -> None:
        """Have a body run once all before it is committed."""
        key = command.key
        run.attempts[key] = attempt
        run.bodies[key] = None
        run.actions.append(partial(self._begin, run, command, attempt))

    def cancel(self, run: Resident, key: str) -> None:
        """Tell a body that nobody waits for it."""
        task = run.bodies.pop(key, None)
        run.marks.pop(key, None)
        run.attempts.pop(key, None)
        if task is not None:
            task.cancel()

    def release_held(self) -> None:
        """The lease has been renewed: begin what waited for that."""
        held, self._held = self._held, []
        for begin in held:
            begin()

    def close(self) -> None:
        """Let the threads go. One that never returns is not waited for."""
        self._bodies.close()

    def _begin(self, run: Resident, command: RunStep, attempt: int) -> None:
        key = command.key
        if run.dropped or run.bodies.get(key, run) is not None or run.attempts.get(key) != attempt:
            return
        executor = self._executor
        if executor.draining:
            return  # the next owner begins it
        if run.paused is not None:
            run.paused.actions.append(partial(self._begin, run, command, attempt))
            return
        instant = executor.clock.monotonic()
        if not executor.lease.safe_at(instant):
            self._held.append(partial(self._begin, run, command, attempt))
            return
        now = executor.clock.at(instant)
        # A copy each time: an attempt must not see what the one before has set.
        task = executor.loop.create_task(self._run(run, command, attempt, now), context=command.variables.copy())
        run.bodies[key] = task
        run.marks[key] = now
        if not run.flushing:
            executor.settler.later(run)

    async def _run(self, run: Resident, command: RunStep, attempt: int, began: int) -> None:
        key = command.key
        status = "completed"
        whole: bytes | None = None
        scope = StepScope(
            run.run_id,
            step_id(run.run_id, command.ordinal),
            key,
            command.name,
            attempt,
            partial(self._log, run, key, Pace(self._executor.clock.monotonic)),
            webhooks=self._executor.webhooks_of(run.workspace),
        )
        try:
            enter_step(scope, self._executor.deps.on_step)
            if command.options.timeout is None:
                result = await self._bodies.call(command.body, command.args)
            else:
                result = await self._timed(run, command, attempt, command.options.timeout, scope)
            if isinstance(command, Invoke):
                whole = result
                payload = command.strip(result)
            else:
                # Read back too: what cannot be read as its type fails the step now, and not its every replay.
                payload, _ = through(result, command.returns, what=f"the result of step {key!r}", limit=self._limit)
        except asyncio.CancelledError:
            scope.cancelled = True
            if run.dropped or key not in run.bodies:
                return  # by us: nobody waits for it
            status = "failed"
            payload = encode_error(ErrorData(message="The step cancelled itself.", code="step_cancelled"))
        except PayloadError as error:
            # The body has done its work; doing it again would give the same value.
            status = "failed"
            data = describe(error)
            payload = encode_error(ErrorData(data.message, data.code, data.type, retryable=False, stack=data.stack))
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            # SystemExit and whatever else is no Exception too: a body that ends without an answer would wedge its run.
            status = "failed"
            payload = encode_error(describe(error))
        if run.bodies.get(key) is asyncio.current_task(self._executor.loop):
            del run.bodies[key]
            run.marks.pop(key, None)
        now = self._executor.clock.now()
        arrival = Arrival(now, STEP, status, key, None, None, attempt, payload, None, began, now)
        arrival.whole = whole if status == "completed" else None
        self._executor.arrive(run, arrival)

    async def _timed(self, run: Resident, command: RunStep, attempt: int, timeout: float, scope: StepScope) -> Any:
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                late = partial(self._late, run, command, attempt)
                return await self._bodies.call(command.body, command.args, late=late)
        except TimeoutError:
            if limit.expired():
                scope.cancelled = True
                raise StepTimeout(f"The step took longer than its timeout of {timeout} s.") from None
            raise

    def _late(self, run: Resident, command: RunStep, attempt: int, error: BaseException | None, result: Any) -> None:
        """A plain body has ended after its timeout: recorded, never delivered."""
        status, key = "completed", command.key
        try:
            if error is not None:
                raise error
            payload, _ = through(result, command.returns, what=f"the result of step {key!r}", limit=self._limit)
        except BaseException as failure:
            status, payload = "failed", encode_error(describe(failure))
        now = self._executor.clock.now()
        self._executor.arrive(run, Arrival(now, STEP, status, key, attempt=attempt, payload=payload, finished_at=now))

    def _log(
        self,
        run: Resident,
        key: str,
        pace: Pace,
        level: str,
        message: str,
        fields: dict[str, Any],
        progress: bool,
    ) -> None:
        if progress and not pace.may():
            return
        data = encode(fields, what="the fields of a log line", limit=self._limit) if fields else None
        payload = log_payload(level, clean(str(message)), data)

        def write() -> None:
            index = run.logs.get(key, 0)
            run.logs[key] = index + 1
            self._executor.arrive(
                run,
                Arrival(self._executor.clock.now(), LOG, "written", key=key, ordinal=index, payload=payload),
            )

        self._executor.call(write)
