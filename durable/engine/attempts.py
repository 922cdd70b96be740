"""Attempts of steps and tasks: which result counts, what is tried again and when, what has taken too long.

A retry is a journal entry and a time: no worker is held while it waits, and it survives the engine (N16).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from durable.core.clock import SECOND
from durable.core.commands import Command, RunStep, SendTask, StartChild
from durable.core.errors import ErrorData
from durable.core.journal import CHILD, LOG, REMOTE, RUN, STEP, Entry
from durable.core.payload import decode_error, encode_error
from durable.engine.apply import RetryNote
from durable.engine.residents import Arrival, Resident
from durable.protocol.codec import MAX_EVENTS

if TYPE_CHECKING:
    from durable.engine.executor import Executor

log = logging.getLogger("durable.attempts")


def accepts(executor: Executor, run: Resident, arrival: Arrival) -> bool:
    """Take in what came of a command. True if the entry is to be journaled as it is; otherwise it has been dealt with."""
    if arrival.task_id is not None:
        arrival.key = executor.dispatch.turn_of(run, arrival.task_id)
        if arrival.key is None:
            log.info("a decision for %s is passed over: that turn is not awaited", arrival.task_id)
            return False
    key, outstanding = arrival.key, run.machine.outstanding
    command = outstanding.get(key) if key is not None else _by_ordinal(outstanding.values(), arrival)
    if arrival.child_id is not None and isinstance(command, StartChild) and arrival.child_id != command.child_id:
        _late(executor, run, arrival)  # of an earlier life, left behind
        return False
    if command is not None and arrival.lines:
        _write_lines(executor, run, command.key, arrival)
    if command is None or (arrival.attempt and arrival.attempt != run.attempts.get(command.key, arrival.attempt)):
        if arrival.status in ("completed", "failed"):
            _late(executor, run, arrival)
        return False
    if key is None:
        key = arrival.key = command.key
    if arrival.kind == REMOTE and arrival.status == "failed" and key in run.retries:
        _late(executor, run, arrival)  # the failure that is being retried, once more: this worker echoes no attempt
        return False
    if arrival.kind == REMOTE:
        sent = run.sent.get(key)
        if arrival.status == "published":
            if sent is not None:
                sent.published = True
            return sent is not None
        arrival.attempt = run.attempts.get(key, 1)
        if arrival.started_at is None and sent is not None:
            arrival.enqueued_at = sent.dispatched_at
        executor.dispatch.settle(run, key)
    if arrival.status == "failed" and arrival.kind in (STEP, REMOTE):
        return _gives_up(executor, run, command, arrival)
    if arrival.kind != CHILD and run.recovery_attempts:
        run.progressed = True
    run.attempts.pop(key, None)
    run.told.pop(key, None)
    if run.retries:
        run.retries.pop(key, None)
    return True


def _by_ordinal(outstanding: Iterable[Command], arrival: Arrival) -> Command | None:
    """A result that came through the inbox knows its ordinal only."""
    for command in outstanding:
        if command.ordinal == arrival.ordinal and command.kind == arrival.kind:
            return command
    return None


def _write_lines(executor: Executor, run: Resident, key: str, arrival: Arrival) -> None:
    """With the result, so that neither is there without the other. What was told live is there already."""
    attempt = arrival.attempt or run.attempts.get(key, 1)
    told = run.told.setdefault(key, set())
    for line in arrival.lines:
        if (attempt, line.mark) not in told:
            told.add((attempt, line.mark))
            entry = Arrival(
                arrival.happened,
                LOG,
                "written",
                key=key,
                ordinal=line.index,
                attempt=attempt,
                payload=line.payload,
            )
            executor.append(run, entry)


def hears(run: Resident, arrival: Arrival) -> bool:
    """Whether a live line is to be journaled: once, and only while its very attempt is awaited."""
    key, line = arrival.key, arrival.line
    assert key is not None
    assert line is not None
    sent = run.sent.get(key)
    if sent is None or sent.attempt != arrival.attempt:
        return False
    told = run.told.setdefault(key, set())
    mark = (arrival.attempt, line.mark)
    if mark in told or sent.lines >= MAX_EVENTS:
        return False
    told.add(mark)
    sent.lines += 1
    return True


def _late(executor: Executor, run: Resident, arrival: Arrival) -> None:
    """Recorded, never delivered."""
    arrival.status = "late"
    executor.append(run, arrival)


def _gives_up(executor: Executor, run: Resident, command: Command, arrival: Arrival) -> bool:
    assert isinstance(command, RunStep | SendTask)
    assert arrival.payload is not None
    key = command.key
    attempt = run.attempts.get(key, 1)
    arrival.attempt = attempt
    error = decode_error(arrival.payload)
    policy = command.options.retry
    made = attempt - run.spent.get(command.ordinal, 0)
    if policy.gives_up(made, retryable=error.retryable, names=(error.code, error.type)):
        run.attempts.pop(key, None)
        run.told.pop(key, None)
        run.retries.pop(key, None)
        return True
    delay = policy.delay(made, executor.deps.ids.random(), retry_after=error.retry_after)
    next_at = executor.clock.now() + int(delay * SECOND)
    arrival.status = "retrying"
    arrival.payload = msgspec.json.encode(RetryNote(error, next_at))
    executor.append(run, arrival)
    run.attempts[key] = attempt + 1
    run.retries[key] = next_at
    return False


def spent(entries: Sequence[Entry]) -> dict[int, int]:
    """Attempts of each task, by ordinal, that lie before the last requeue."""
    counted: dict[int, int] = {}
    before: dict[int, int] = {}
    for entry in entries:
        if entry.kind == REMOTE and entry.ordinal is not None:
            counted[entry.ordinal] = max(entry.attempt, counted.get(entry.ordinal, 0))
        elif entry.kind == RUN and entry.status == "requeued":
            before = dict(counted)
    return before


def due(executor: Executor, run: Resident, moment: int) -> Arrival | None:
    """Do what is due by the clock alone: begin the next attempt of a step, or give up one that took too long."""
    for key, next_at in run.retries.items():
        if next_at == moment:
            del run.retries[key]
            command = run.machine.outstanding[key]
            attempt = run.attempts.get(key, 1)
            if isinstance(command, RunStep):
                executor.steps.launch(run, command, attempt)
            elif isinstance(command, SendTask):
                executor.dispatch.send(run, command, attempt)
            return None
    for key, sent in run.sent.items():
        if sent.deadline == moment:
            return _lost(executor, run, key, moment, f"No result within {sent.command.options.timeout} s.")
        if sent.silent_at() == moment:
            if executor.dispatch.only_waits(run, key):
                return None
            limit = sent.command.options.heartbeat_timeout
            return _lost(executor, run, key, moment, f"The worker has been silent for {limit} s.")
    raise AssertionError("something was due, and nothing is")


def _lost(executor: Executor, run: Resident, key: str, moment: int, why: str) -> Arrival:
    sent = run.sent[key]
    executor.dispatch.tell_worker(run, key)
    executor.dispatch.let_down(run, key)
    error = ErrorData(message=why, code="step_timeout", type="StepTimeout")
    return Arrival(moment, REMOTE, "failed", key=key, attempt=sent.attempt, payload=encode_error(error))
