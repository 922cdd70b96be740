"""Results of remote tasks on their way in. Straight to the run where it is resident, through its inbox where it is not;
acknowledged once it is durable (D8). It runs no user code."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import msgspec

from durable.core.errors import ErrorData, RunNotFound
from durable.core.journal import REMOTE
from durable.core.payload import encode_error
from durable.engine.executor import Executor
from durable.engine.lines import line_of
from durable.engine.residents import Arrival, Left, Line, Resident
from durable.engine.resume import decision_arrival, report_of
from durable.engine.signals import Mail
from durable.protocol.messages import Answer, StepResult, WorkflowDecision
from durable.protocol.states import Status
from durable.store.records import Message, SendStatus

log = logging.getLogger("durable.results")


class Results:
    """What the transport's `on_result` calls."""

    def __init__(self, executor: Executor, mail: Mail) -> None:
        self._executor = executor
        self._mail = mail

    async def take(self, answer: Answer) -> None:
        """Returns once the answer is durable, or known to be superfluous. Raises if it must be sent again."""
        if isinstance(answer, StepResult):
            await self._take(answer)
        else:
            await self._decide(answer)

    async def _decide(self, decision: WorkflowDecision) -> None:
        """A hosted run's turn is over."""
        status, payload = _verdict(decision, self._executor.deps.store.capabilities.max_payload)
        run = self._executor.residents.get(decision.run_id)
        if run is not None and not run.suspending and run.paused is None:
            try:
                await self._durably(
                    run, decision_arrival(self._executor.clock.now(), decision.task_id, status, payload)
                )
                return
            except Left:
                pass  # its inbox takes it
        message = Message(
            run_id=decision.run_id,
            id=decision.task_id,
            kind="decision",
            name=status,
            payload=payload,
            workspace=self._executor.settings.workspace,
        )
        if await self._mail.send(message) is SendStatus.NOT_FOUND:
            await self._refuse(decision)

    async def _take(self, result: StepResult) -> None:
        limit = self._executor.deps.store.capabilities.max_payload
        result, payload = _kept(result, limit)
        lines = _lines(result, limit)
        run = self._executor.residents.get(result.run_id)
        if run is not None and not run.suspending and run.paused is None:
            try:
                await self._hand_over(run, result, payload, lines)
                return
            except Left:
                pass  # it left memory before this could be committed; its inbox takes it
        report = report_of(payload, lines, limit) if lines else None
        status = await self._mail.send(
            Message(
                run_id=result.run_id,
                # Without an attempt two results of two attempts look alike; each gets in, one counts.
                id=f"{result.step_id}:{result.attempt or self._executor.deps.ids.unique()}",
                kind="result" if report is None else "report",
                name=result.status,
                payload=payload if report is None else report,
                ordinal=result.seq,
                attempt=result.attempt or 0,
                workspace=self._executor.settings.workspace,
            )
        )
        if status is SendStatus.NOT_FOUND:
            await self._refuse(result)

    async def _refuse(self, result: Answer) -> None:
        """A result for a run that is not here. Where it is another workspace's, the result is not ours to take, nor to
        lose: raises RunNotFound, so that the transport delivers it again, to an engine whose run it is."""
        run = (await self._executor.deps.store.get([result.run_id]))[0]
        if run is None or run.status is not Status.ACTIVE:
            return  # nobody waits for it, anywhere
        log.warning(
            "a result of %s is refused: its run is of workspace %r, and this engine serves %r. Give each workspace"
            " a transport, or a namespace, of its own",
            result.id,
            run.workspace,
            self._executor.settings.workspace,
        )
        raise RunNotFound(f"Run {result.run_id!r} is of another workspace.", run_id=result.run_id)

    async def _hand_over(self, run: Resident, result: StepResult, payload: bytes, lines: Sequence[Line]) -> None:
        """Straight to the run. Raises Left if it goes before the result is committed."""
        now = self._executor.clock.now()
        found = self._executor.dispatch.awaited(result.step_id)
        await self._durably(
            run,
            Arrival(
                now,
                REMOTE,
                result.status,
                key=None if found is None else found[1],
                ordinal=result.seq,
                attempt=result.attempt or 0,
                payload=payload,
                started_at=None if result.started_at is None else result.started_at * 1_000,
                finished_at=now,
                lines=lines,
            ),
        )

    async def _durably(self, run: Resident, arrival: Arrival) -> None:
        """Hand it over, and return once it is committed. Raises Left if the run goes before."""
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def ack(why: BaseException | None) -> None:
            if durable.done():
                return
            if why is None:
                durable.set_result(None)
            else:
                durable.set_exception(why)

        arrival.ack = ack
        self._executor.arrive(run, arrival)
        await durable


NO_VERDICT = frozenset({"unknown_workflow", "unknown_version", "worker_failed", "step_cancelled"})
"""Codes of failed decisions that say something of a worker, and nothing of the run: it has not the code, it died over the turn,
it gave the turn up. The turn is sent again, perhaps to another."""


def _verdict(decision: WorkflowDecision, limit: int) -> tuple[str, bytes]:
    """How the turn ended, and its decision or why there is none."""
    error = decision.error
    if decision.status == "failed" and error is not None and error.code in NO_VERDICT:
        return "failed", encode_error(error)
    data = msgspec.json.encode(decision)
    if len(data) <= limit:
        return "completed", data
    message = (
        f"The worker's decision has {len(data):,} bytes, and the store takes {limit:,}: record references, not data."
    )
    return "failed", encode_error(ErrorData(message=message, code="payload_too_large", retryable=False))


def _kept(result: StepResult, limit: int) -> tuple[StepResult, bytes]:
    """With what is to be stored of it. What no store takes fails the step, and neither the run nor a neighbour."""
    payload = _payload(result)
    if len(payload) <= limit:
        return result, payload
    message = (
        f"The worker's answer has {len(payload):,} bytes, and the store takes {limit:,}: return a reference instead."
    )
    error = ErrorData(message=message, code="payload_too_large", retryable=False)
    return msgspec.structs.replace(result, status="failed", output=msgspec.UNSET, error=error), encode_error(error)


def _lines(result: StepResult, limit: int) -> list[Line]:
    """What the body told of itself. A line that no store takes costs itself alone."""
    lines = []
    for event in result.events or ():
        line = line_of(event)
        if len(line.payload) <= limit:
            lines.append(line)
        else:
            log.warning("a log line of %s has %d bytes and is left out", result.step_id, len(line.payload))
    return lines


def _payload(result: StepResult) -> bytes:
    if result.status == "completed":
        return bytes(result.output) if isinstance(result.output, msgspec.Raw) else b"null"
    return encode_error(result.error or ErrorData(message="The worker gave no reason."))
