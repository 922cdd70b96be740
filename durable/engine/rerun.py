"""Running a run again: from the beginning, from one of its steps, with another input, or with another result of a step.

It is always a new run of the same version, which knows where it comes from (`meta`); the old one stays as it is. Its first
entries are copied from the old journal (core/prefix.py), so steps that are kept do not run again. Inserting it is one
transaction, found again by its key. Where the code is at hand, the copy is replayed before it is inserted: one that would
only be blocked is refused at once, and a result is held against the step's type.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context as Variables
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from durable.core import payload, prefix
from durable.core.definition import WorkflowDefinition
from durable.core.errors import (
    DefinitionError,
    DeterminismError,
    ForkRefused,
    NotRegistered,
    PayloadError,
    RunActive,
    RunNotFound,
)
from durable.core.journal import LOG, Entry
from durable.core.origin import meta_of, origin_of
from durable.core.replay import Machine
from durable.engine.admission import lane_of_input
from durable.engine.deps import Deps
from durable.engine.start import Starter
from durable.protocol.states import TERMINAL
from durable.store.records import NewRun, RunRecord

PAGE = 500

T = TypeVar("T")


class Again(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted of a run. Every field that is not set is as it was."""

    kind: str
    """rerun · replay · fork."""
    from_step: str | None = None
    """Key of the first step that is asked again. None: from the beginning."""
    input: Any = UNSET
    step: str | None = None
    """Key of a step whose result is another."""
    result: Any = UNSET
    key: str | None = None
    """The same key and wish again find the run there is."""


def edits_of(edits: Mapping[str, Any], key: str | None) -> Again:
    """`{"input": …}`, `{"input": …, "from_step": key}` or `{"step": key, "result": …}`, perhaps with an input too. Raises
    DefinitionError."""
    unknown = sorted(set(edits) - {"input", "from_step", "step", "result"})
    if unknown or not edits:
        given = f"there is no {unknown[0]!r} to edit" if unknown else "no edit was given"
        raise DefinitionError(
            "A fork takes an 'input', with a 'from_step' where earlier results are to be kept, or a 'step' and its "
            f"'result': {given}."
        )
    if ("step" in edits) != ("result" in edits):
        raise DefinitionError("A fork at a step needs both: {'step': its key, 'result': what it is to have returned}.")
    if "step" in edits and "from_step" in edits:
        raise DefinitionError("A fork goes on behind the 'step' whose result is edited; leave 'from_step' out.")
    wanted = dict(edits)
    return Again(
        kind="fork",
        from_step=wanted.get("from_step"),
        input=wanted.get("input", UNSET),
        step=wanted.get("step"),
        result=wanted.get("result", UNSET),
        key=key,
    )


class Rerunner:
    """Starts runs that begin as others did."""

    def __init__(self, deps: Deps, starter: Starter, now: Callable[[], int]) -> None:
        self._deps = deps
        self._starter = starter
        self._now = now

    async def again(self, run_id: str, wish: Again, workspace: str) -> tuple[str, bool]:
        """The id of the new run, and whether it is new. Raises RunNotFound; RunActive where the run has not ended (a fork may
        be made of one that has not); ForkRefused; PayloadError; IdempotencyConflict."""
        record = (await self._deps.store.get([run_id]))[0]
        if record is None or record.workspace != workspace:
            raise RunNotFound(f"There is no run {run_id!r} here. Is it another workspace's?", run_id=run_id)
        if record.status not in TERMINAL and wish.kind != "fork":
            raise RunActive(
                f"Run {run_id!r} is {record.activity}: it can be run again when it has ended. Cancel it first, requeue "
                "it if it is blocked, or fork it.",
                run_id=run_id,
            )
        definition = self._definition(record)
        input = _input(record, definition, wish.input)
        new_id = self._deps.ids.run_id()
        entries: tuple[Entry, ...] = ()
        if wish.from_step is not None or wish.step is not None:
            entries = await self._entries(record, definition, wish, input, new_id)
        origin = msgspec.structs.replace(
            origin_of(record.meta), trigger_kind=wish.kind, replay_of=run_id, from_step=wish.from_step or wish.step
        )
        new = NewRun(
            id=new_id,
            workflow=record.workflow,
            version=record.version,
            input=input,
            workspace=workspace,
            input_hash=_hash(input, wish),
            idempotency_key=None if wish.key is None else f"{wish.kind}:{run_id}:{wish.key}",
            priority=record.priority,
            tags=record.tags,
            attributes=record.attributes,
            entries=entries,
            lane=None if definition is None else lane_of_input(definition, input, workspace),
            meta=meta_of(origin),
        )
        return await self._starter.insert(new)

    def _definition(self, record: RunRecord) -> WorkflowDefinition | None:
        """The run's own version, if its code is here."""
        try:
            return self._deps.catalog.of(record.workspace).workflow(record.workflow, record.version)
        except NotRegistered:
            return None

    async def _entries(
        self, record: RunRecord, definition: WorkflowDefinition | None, wish: Again, input: bytes, new_id: str
    ) -> tuple[Entry, ...]:
        journal = prefix.effective(await self._journal(record.id))
        key = wish.from_step or wish.step or ""
        now = self._now()
        try:
            start = prefix.before(journal, key)
            if definition is not None:
                rehearsal = prefix.copied(start, record.id, key, now)
                read = await _aside(lambda: _rehearsed(definition, new_id, input, rehearsal, key, record.id))
            else:
                read = None
            if wish.step is not None:
                start = prefix.with_result(journal, key, _result(wish, key, read))
        except KeyError:
            raise ForkRefused(
                f"Run {record.id!r} has no step {key!r}. It has {', '.join(prefix.steps(journal)) or 'none'}.",
                run_id=record.id,
            ) from None
        entries = prefix.copied(start, record.id, key, now)
        if wish.step is not None and definition is not None:
            await _aside(lambda: _rehearsed(definition, new_id, input, entries, None, record.id))
        return entries

    async def _journal(self, run_id: str) -> list[Entry]:
        entries: list[Entry] = []
        while page := await self._deps.store.page(run_id, len(entries), PAGE):
            entries += page
        return entries


def _input(record: RunRecord, definition: WorkflowDefinition | None, given: Any) -> bytes:
    if isinstance(given, UnsetType):
        return record.input
    if definition is not None:
        return definition.encode_input(given)
    return payload.encode(given, what=f"the input of {record.workflow}")


def _result(wish: Again, key: str, read: Callable[[bytes], Any] | None) -> bytes:
    what = f"the result of step {key!r}"
    data = payload.encode(wish.result, what=what)
    if read is not None:
        try:
            read(data)
        except PayloadError as error:
            raise PayloadError(f"{what}: {error}") from error
    return data


def _hash(input: bytes, wish: Again) -> str:
    result = b"" if isinstance(wish.result, UnsetType) else payload.canonical(wish.result, what="the edited result")
    return payload.fingerprint(input, (wish.from_step or "").encode(), (wish.step or "").encode(), result)


def _rehearsed(
    definition: WorkflowDefinition,
    run_id: str,
    input: bytes,
    entries: Sequence[Entry],
    key: str | None,
    of: str,
) -> Callable[[bytes], Any] | None:
    """Replay a copy. Returns the reader of what the step at its end returns, where it is asked for by itself. Raises
    ForkRefused if the code does not go that way."""
    logs = sum(entry.kind == LOG and entry.key is None for entry in entries)
    machine = Machine(definition, run_id=run_id, input=input, logs=logs)
    try:
        machine.replay([entry for entry in entries if entry.kind != LOG])
        command = machine.outstanding.get(key or "")
        hosted = any((one.ordinal or 0) >= prefix.TURNS for one in machine.outstanding.values())
        if key is not None and command is None and not hosted:
            raise ForkRefused(
                f"With this input the code does not ask for step {key!r} at that place. Fork from an earlier step, or "
                "from the beginning.",
                run_id=of,
            )
        returns = getattr(command, "returns", Any)
        return None if command is None else payload.decoder(returns)
    except DeterminismError as error:
        raise ForkRefused(
            f"The code does not go the way that run {of!r} has gone up to there, so a new run cannot begin with it: {error} "
            "Fork from an earlier step, or from the beginning.",
            run_id=of,
        ) from error
    finally:
        machine.drop()


async def _aside(work: Callable[[], T]) -> T:
    """Call it from a plain callback: workflow code runs in no task, and sees none of its caller's variables."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def call() -> None:
        if done.cancelled():
            return
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    loop.call_soon(call, context=Variables())
    return await done
