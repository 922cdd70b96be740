"""What a parent is told of its children: with the commit that ends the child; and by asking after it, when the parent was
closed then and has been reopened since."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from durable.core.commands import StartChild
from durable.core.errors import ErrorData, StoreError
from durable.core.payload import encode_error
from durable.engine.residents import Final, Resident
from durable.protocol.states import TERMINAL, Status
from durable.store.records import Message, Parent, PutMessage

if TYPE_CHECKING:
    from durable.engine.executor import Executor

RETRY_SECONDS = 0.1


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
