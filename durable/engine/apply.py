"""What a turn asks for, done. One function for each command, live (`apply`) and after a crash or an eviction (`resume`).

Nothing here touches the world: it journals, adds effects to the coming commit, and puts actions behind the barrier.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from durable.core.commands import (
    Abandon,
    AppStep,
    AskApproval,
    CloseApproval,
    Command,
    Invoke,
    Label,
    Note,
    Patch,
    Record,
    Report,
    RunStep,
    SendEvent,
    SendTask,
    Settled,
    StartChild,
    TakeTurn,
    WaitEvent,
    WaitSignal,
    WriteLog,
)
from durable.core.errors import ErrorData, NotRegistered
from durable.core.journal import CHILD, LOG, PATCHED, RUN, STEP, WAIT, Entry
from durable.core.match import probe_of
from durable.core.origin import meta_of, origin_of
from durable.core.payload import encode_error
from durable.engine import admission, children, pause
from durable.engine.residents import Arrival, Resident
from durable.store.records import (
    CloseWaiter,
    DropItem,
    Lane,
    NewRun,
    OpenWaiter,
    Parent,
    PutItem,
    SetAttributes,
    StartRun,
)

if TYPE_CHECKING:
    from durable.engine.executor import Executor

STARTED = b'{"python":"%d.%d"}' % sys.version_info[:2]
"""Payload of a `started` entry: what the run is recorded on."""


class RetryNote(msgspec.Struct, frozen=True):
    """Payload of a `retrying` entry. `next_at` in µs."""

    error: ErrorData
    next_at: int


class DispatchNote(msgspec.Struct, frozen=True):
    """Payload of a `dispatched` entry. Times in µs."""

    input: msgspec.Raw
    deadline: int | None = None


class WaitNote(msgspec.Struct, frozen=True, omit_defaults=True):
    """Payload of an `opened` entry."""

    condition: msgspec.Raw | None = None
    """Of core/match.py."""
    until: int | None = None
    """The deadline, µs."""


class PublishNote(msgspec.Struct, frozen=True):
    """Payload of a `published` entry: who accepted the task."""

    transport: str


def started(executor: Executor, run: Resident) -> Entry:
    """Journal that the run begins here and now."""
    return executor.append(
        run, Arrival(executor.clock.now(), RUN, "started", name=run.definition.name, payload=STARTED)
    )


def apply(executor: Executor, run: Resident, commands: Iterable[Command | Note]) -> None:
    """Do what a turn asks for."""
    for command in commands:
        _APPLY[type(command)](executor, run, command)


def resume(executor: Executor, run: Resident, command: Command, trace: Sequence[Entry]) -> None:
    """Take up a command that an earlier owner of the run has begun. `trace` is what it wrote down of it."""
    last = trace[-1] if trace else None
    attempt = max((entry.attempt for entry in trace), default=1) or 1
    if isinstance(command, AskApproval):
        _ask_approval(executor, run, command)  # there is one where this run is a copy of another, and none of its own
        return
    if isinstance(command, WaitSignal | AppStep):
        return
    if isinstance(command, WaitEvent):
        if run.machine.generation or run.holds:
            run.effects.append(_waiter(command))  # it went with the run's end, or waits for longer than it says
        put_off = (
            last is not None and run.held_since(last.seq) > 0
        )  # what came when its time seemed up, nobody was told of
        if last is None or last.status != "looked" or run.machine.generation or put_off:
            _look_back(executor, run, command)
        return
    if isinstance(command, SendEvent):
        _send_event(executor, run, command)
        return
    if isinstance(command, StartChild):
        # Started by the very commit that journaled it; its outcome comes through the inbox, if there was one open.
        if run.machine.generation:
            children.ask(executor, run, command)
        return
    if last is not None and last.status == "retrying":
        assert last.payload is not None
        run.attempts[command.key] = last.attempt + 1
        next_at = msgspec.json.decode(last.payload, type=RetryNote).next_at
        run.retries[command.key] = next_at + run.held_since(last.seq)
    elif last is not None and last.status == "held":
        pause.place(run, pause.held(run, command.key, last))
    elif isinstance(command, RunStep):
        executor.steps.launch(run, command, attempt)
    elif isinstance(command, SendTask):
        executor.dispatch.resume(run, command, [entry for entry in trace if entry.attempt == attempt])


def abandon(executor: Executor, run: Resident, command: Command) -> None:
    """Nobody waits for it any more: journal that, and tell whoever works on it."""
    key = command.key
    run.machine.outstanding.pop(key, None)
    run.retries.pop(key, None)
    if isinstance(command, AskApproval):
        run.effects.append(DropItem("approval", command.item_id))
    if isinstance(command, WaitSignal):
        return
    _note(executor, run, command, command.kind, "cancelled")
    if isinstance(command, RunStep):
        executor.steps.cancel(run, key)
    elif isinstance(command, SendTask):
        executor.dispatch.cancel(run, key)
    elif isinstance(command, StartChild):
        run.effects.append(children.cancel(run, key, command.child_id, command.workspace))
    elif isinstance(command, WaitEvent):
        _close(run, command)


def _note(executor: Executor, run: Resident, command: Command, kind: str, status: str, **fields: Any) -> Entry:
    return executor.append(run, Arrival(executor.clock.now(), kind, status, key=command.key, **fields), command)


def _run_step(executor: Executor, run: Resident, command: RunStep) -> None:
    executor.steps.launch(run, command, 1)


def _send_task(executor: Executor, run: Resident, command: SendTask) -> None:
    # Attempts of one task are told apart by number, on the wire and in the inbox, so a requeue goes on counting.
    executor.dispatch.send(run, command, run.spent.get(command.ordinal, 0) + 1)


def _label(executor: Executor, run: Resident, command: Label) -> None:
    run.effects.append(SetAttributes(command.attributes, command.tags))
    entry = _note(executor, run, command, STEP, "completed", attempt=1, payload=b"null")
    apply(executor, run, run.machine.deliver(entry))


def _record(executor: Executor, run: Resident, command: Record) -> None:
    """At once, so that it is in the commit of the decision that brought it: the journal holds neither without the other."""
    for line in command.lines:
        index = run.logs.get(command.key, 0)
        run.logs[command.key] = index + 1
        executor.append(
            run, Arrival(executor.clock.now(), LOG, "written", key=command.key, ordinal=index, payload=line)
        )
    entry = _note(
        executor,
        run,
        command,
        STEP,
        "failed" if command.failed else "completed",
        attempt=1,
        payload=command.payload or b"null",
        started_at=command.started_at,
        finished_at=command.finished_at,
    )
    apply(executor, run, run.machine.deliver(entry))


def _app_step(executor: Executor, run: Resident, command: AppStep) -> None:
    """Nothing yet: what there is to say comes as a Report."""


def _report(executor: Executor, run: Resident, note: Report) -> None:
    """At once, so that it is in the commit of the answer that brought it."""
    command = note.command
    if run.machine.outstanding.get(command.key) is not command:
        return
    for line in note.lines:
        index = run.logs.get(command.key, 0)
        run.logs[command.key] = index + 1
        arrival = Arrival(executor.clock.now(), LOG, "written", key=command.key, ordinal=index, payload=line)
        arrival.attempt = note.attempt
        executor.append(run, arrival)
    entry = _note(
        executor,
        run,
        command,
        STEP,
        note.status,
        attempt=note.attempt,
        payload=note.payload,
        started_at=note.started_at,
        finished_at=note.finished_at,
    )
    if entry.delivers:
        apply(executor, run, run.machine.deliver(entry))


def _ask_approval(executor: Executor, run: Resident, command: AskApproval) -> None:
    run.effects.append(PutItem("approval", command.item_id, command.item, command.expires_at))


def _close_approval(executor: Executor, run: Resident, note: CloseApproval) -> None:
    run.effects.append(DropItem("approval", note.command.item_id))


def _start_child(executor: Executor, run: Resident, command: StartChild) -> None:
    workspace = command.workspace or run.workspace
    try:
        version = command.version or executor.deps.catalog.of(workspace).latest(command.workflow).version
    except NotRegistered as error:
        data = ErrorData(message=str(error), code=error.code, retryable=False)
        executor.arrive(
            run,
            Arrival(executor.clock.now(), CHILD, "failed", key=command.key, payload=encode_error(data)),
        )
        return
    note = children.ChildNote(
        command.child_id, command.workflow, version, command.options.on_parent_close, command.workspace
    )
    payload = msgspec.json.encode(note)
    _note(executor, run, command, CHILD, "started", payload=payload)
    child = NewRun(
        id=command.child_id,
        workflow=command.workflow,
        version=version,
        input=command.input,
        workspace=workspace,
        priority=command.options.priority or 0,
        parent=Parent(run.run_id, command.key, command.ordinal),
        meta=_meta(run, command),
        lane=_lane(executor, workspace, command, version),
    )
    run.effects.append(StartRun(child))


def _lane(executor: Executor, workspace: str, command: StartChild, version: str) -> Lane | None:
    try:
        definition = executor.deps.catalog.of(workspace).workflow(command.workflow, version)
    except NotRegistered:
        return None  # another engine's to run, and nothing is known of its limits
    return admission.lane_of_input(definition, command.input, workspace)


def _meta(run: Resident, command: StartChild) -> bytes | None:
    if command.workspace is None:
        return command.meta
    return meta_of(replace(origin_of(command.meta), parent_workspace=run.workspace))


def _wait_signal(executor: Executor, run: Resident, command: WaitSignal) -> None:
    """A wait writes nothing: signals are journaled as they come, and replay matches them."""


def _wait_event(executor: Executor, run: Resident, command: WaitEvent) -> None:
    """Open the waiter with the commit that says so; then look at what came before it (B11, B12)."""
    note = WaitNote(None if command.condition is None else msgspec.Raw(command.condition), command.deadline)
    _note(executor, run, command, WAIT, "opened", payload=msgspec.json.encode(note))
    run.effects.append(_waiter(command))
    _look_back(executor, run, command)


def _look_back(executor: Executor, run: Resident, command: WaitEvent) -> None:
    run.unlooked.add(command.key)
    run.actions.append(lambda: executor.on_look_back(run, (command.key,)))


def _waiter(command: WaitEvent) -> OpenWaiter:
    return OpenWaiter(command.key, command.name, command.condition, command.deadline, probe_of(command.condition))


def reopen_waits(executor: Executor, run: Resident) -> None:
    """Their deadlines were put off: of what came behind the old ones nobody was told."""
    for wait in run.machine.events_waited():
        if wait.deadline is not None:
            run.effects.append(_waiter(wait))
            _look_back(executor, run, wait)


def _settled(executor: Executor, run: Resident, note: Settled) -> None:
    _close(run, note.command)


def _close(run: Resident, command: WaitEvent) -> None:
    run.unlooked.discard(command.key)
    run.looked.discard(command.key)
    run.effects.append(CloseWaiter(command.key))


def _send_event(executor: Executor, run: Resident, command: SendEvent) -> None:
    """Behind the barrier, like a body; its id makes it harmless to do it again."""
    run.actions.append(lambda: executor.on_send_event(run, command))


def _abandon(executor: Executor, run: Resident, note: Abandon) -> None:
    abandon(executor, run, note.command)


def _patch(executor: Executor, run: Resident, note: Patch) -> None:
    executor.append(run, Arrival(executor.clock.now(), PATCHED, "marked", key=note.id, name=note.id))


def _write_log(executor: Executor, run: Resident, note: WriteLog) -> None:
    payload = log_payload(note.level, note.message, note.fields)
    executor.append(run, Arrival(executor.clock.now(), LOG, "written", ordinal=note.index, payload=payload))


def log_payload(level: str, message: str, fields: bytes | None) -> bytes:
    """The payload of a `log` entry."""
    return msgspec.json.encode({"level": level, "message": message, "fields": msgspec.Raw(fields or b"{}")})


_APPLY: dict[type, Callable[[Any, Resident, Any], None]] = {
    RunStep: _run_step,
    Invoke: _run_step,
    AppStep: _app_step,
    Report: _report,
    AskApproval: _ask_approval,
    CloseApproval: _close_approval,
    SendTask: _send_task,
    TakeTurn: _send_task,
    Record: _record,
    Label: _label,
    StartChild: _start_child,
    WaitSignal: _wait_signal,
    WaitEvent: _wait_event,
    Settled: _settled,
    SendEvent: _send_event,
    Abandon: _abandon,
    Patch: _patch,
    WriteLog: _write_log,
}
