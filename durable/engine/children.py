"""What a parent is told of its children: with the commit that ends the child; and by asking after it, when the parent was
closed then and has been reopened since. And what children are told of their parent: that it no longer waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from durable.core.commands import StartChild
from durable.core.errors import ErrorData, StoreError
from durable.core.journal import CHILD, COMMAND_KINDS, RUN, Entry
from durable.core.origin import origin_of
from durable.core.payload import encode_error
from durable.engine.residents import Arrival, Final, Resident
from durable.protocol.states import TERMINAL, Status
from durable.store.records import Message, Parent, PutMessage

if TYPE_CHECKING:
    from durable.engine.executor import Executor

RETRY_SECONDS = 0.1


class ChildNote(msgspec.Struct, frozen=True, omit_defaults=True):
    """Payload of a `child started` entry."""

    run_id: str
    workflow: str
    version: str
    on_parent_close: str = "abandon"
    """Journals written before it was recorded: then nothing but the parent's own code may decide."""
    workspace: str | None = None
    """Where it lives; None: where its parent does."""


class OpenChild(NamedTuple):
    """A child that is to end with its parent: its `started` entry, and who it is."""

    begun: Entry
    run_id: str
    workspace: str | None


class CancelNote(msgspec.Struct, frozen=True):
    """Payload of a `cancel` message and of a `cancelling` entry."""

    reason: str = ""
    children: bool = False
    """It is for all that the run has started too, and for what they have."""


def of_the_tree(entry: Entry) -> bool:
    """Whether a `cancelling` entry is meant for the run's children too."""
    return bool(entry.payload) and msgspec.json.decode(entry.payload or b"{}", type=CancelNote).children


_PARENT_GAVE_UP = b'{"reason":"its parent no longer waits for it"}'
_WHOLE_TREE = b'{"reason":"its parent was cancelled with all it had started","children":true}'


def parents_workspace(run: Resident) -> str:
    """Where the parent of a child lives: almost always where the child does."""
    return origin_of(run.machine.meta).parent_workspace or run.workspace


def cancel(run: Resident, key: str, child_id: str, workspace: str | None = None) -> PutMessage:
    """The parent no longer waits for this child: part of the commit that says so."""
    return PutMessage(
        Message(
            run_id=child_id,
            id=f"{run.run_id}:{key}:cancel",
            kind="cancel",
            payload=_WHOLE_TREE if run.tree_cancelled else _PARENT_GAVE_UP,
            workspace=workspace or run.workspace,
        )
    )


def to_cancel(entries: Sequence[Entry]) -> dict[str, OpenChild]:
    """The children that a journal leaves open and that are to end with their parent: by key. For
    parents that end with no machine to ask."""
    found: dict[str, OpenChild] = {}
    everyone = any(e.kind == RUN and e.status == "cancelling" and of_the_tree(e) for e in entries)
    for entry in entries:
        if entry.kind == CHILD and entry.key is not None:
            if entry.status == "started":
                assert entry.payload is not None
                note = msgspec.json.decode(entry.payload, type=ChildNote)
                if everyone or note.on_parent_close == "cancel":
                    found[entry.key] = OpenChild(entry, note.run_id, note.workspace)
            elif entry.status != "late":
                found.pop(entry.key, None)
    return found


def close_unseen(executor: Executor, run: Resident, entries: Sequence[Entry]) -> None:
    """The replay of a run broke off, and the run is to fail: what the journal says behind that point holds all the same.
    Commands answered there are not given up now, and children started there are."""
    for entry in entries:
        if entry.kind in COMMAND_KINDS and entry.status in ("completed", "failed", "cancelled"):
            run.machine.outstanding.pop(entry.key or "", None)
    for key, (begun, child_id, workspace) in to_cancel(entries).items():
        if key not in run.machine.outstanding:
            arrival = Arrival(executor.clock.now(), CHILD, "cancelled", key=key, ordinal=begun.ordinal, name=begun.name)
            executor.append(run, arrival)
            run.effects.append(cancel(run, key, child_id, workspace))


def tell_parent(run_id: str, workspace: str, parent: Parent, final: Final) -> PutMessage:
    """The outcome, for the parent's inbox: part of the commit that ends the child (B48)."""
    payload = final.output
    if final.status is not Status.COMPLETED:
        payload = final.error or encode_error(ErrorData(message=f"The child run {run_id} was {final.status}."))
    return PutMessage(
        Message(
            run_id=parent.run_id,
            id=f"{run_id}:outcome",
            kind="child",
            name=final.status.value,
            payload=payload,
            key=parent.key,
            ordinal=parent.ordinal,
            workspace=workspace,
        )
    )


def ask(executor: Executor, run: Resident, command: StartChild) -> None:
    """Have an ended child's outcome put into the run's inbox. The run stays in memory meanwhile."""
    run.asking += 1
    executor.keep(_ask(executor, run, command))


async def _ask(executor: Executor, run: Resident, command: StartChild) -> None:
    store = executor.deps.store
    while not run.dropped:
        try:
            child = (await store.get([command.child_id]))[0]
            if child is None or child.status in TERMINAL:
                final = _forgotten(command) if child is None else Final(child.status, child.output, child.error)
                parent = Parent(run.run_id, command.key, command.ordinal)
                await store.send([tell_parent(command.child_id, run.workspace, parent, final).message])
                executor.on_mail(run)
            break
        except StoreError:
            await asyncio.sleep(RETRY_SECONDS)
    run.asking -= 1
    executor.wake(run)


def _forgotten(command: StartChild) -> Final:
    """It was started, so it was there; while this parent was closed nothing kept it from being deleted."""
    message = f"The child run {command.child_id} ended while its parent was closed, and was deleted since (retention)."
    return Final(Status.FAILED, None, encode_error(ErrorData(message=message, retryable=False)))
