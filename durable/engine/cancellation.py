"""Cancelling a run, alone or with all that it has started.

A cancel is an inbox row. One for the whole tree says so in its payload: the run's owner then passes it on, with the commit
that ends the run, to every child still open, whatever `on_parent_close` says, and so does each child's owner. Nothing is
forgotten that way: a child that starts meanwhile starts in a commit before that one. Only where a run cannot be told any
more, since it has ended or had been asked without its children, are the children looked up and told from here.
"""

from __future__ import annotations

import msgspec

from durable.core.errors import RunFinished, RunNotFound
from durable.core.journal import RUN
from durable.engine.deps import Deps
from durable.engine.pause import Pauser
from durable.engine.signals import Mail
from durable.protocol.states import TERMINAL
from durable.store.records import Message, SendStatus


class Canceller:
    """Asks runs to stop, from anywhere."""

    def __init__(self, deps: Deps, mail: Mail, pauser: Pauser) -> None:
        self._deps = deps
        self._mail = mail
        self._pauser = pauser

    async def cancel(self, run_id: str, reason: str, children: bool, workspace: str) -> bool:
        """True if something was told for the first time. Raises RunNotFound; RunFinished, with `children` only where none of
        them is open."""
        status = await self._ask(run_id, reason, children, workspace)
        if status is SendStatus.NOT_FOUND:
            raise RunNotFound(f"There is no run {run_id!r} here. Is it another workspace's?", run_id=run_id)
        told = status is SendStatus.ACCEPTED
        if children and not told:
            told = await self._ask_children(run_id, reason)
        if status is SendStatus.FINISHED and not told:
            also = " and so has everything it started" if children else ""
            raise RunFinished(
                f"Run {run_id!r} has finished{also}; the cancel came too late and was not stored.", run_id=run_id
            )
        return told

    async def _ask(self, run_id: str, reason: str, children: bool, workspace: str) -> SendStatus:
        note: dict[str, object] = {"reason": reason}
        if children:
            note["children"] = True
        message = Message(run_id, "cancel", "cancel", payload=msgspec.json.encode(note), workspace=workspace)
        status = await self._mail.send(message)
        if status is SendStatus.DUPLICATE:
            # It had been asked before; but a run that was reopened since begins anew in this too.
            entries = (await self._deps.store.load([run_id]))[0].entries
            reopened = [entry.seq for entry in entries if entry.kind == RUN and entry.status == "requeued"]
            if reopened:
                again = msgspec.structs.replace(message, id=f"cancel:{reopened[-1]}")
                status = await self._mail.send(again)
        if status in (SendStatus.ACCEPTED, SendStatus.DUPLICATE):
            await self._pauser.rouse(run_id)
        return status

    async def _ask_children(self, run_id: str, reason: str) -> bool:
        """Every open run below this one, through those that have ended, each in its own workspace."""
        told, left, seen = False, [run_id], {run_id}
        while left:
            for child in await self._deps.store.children(left.pop()):
                if child.id in seen:
                    continue
                seen.add(child.id)
                if child.status in TERMINAL:
                    left.append(child.id)
                    continue
                status = await self._ask(child.id, reason, True, child.workspace)
                told = told or status is SendStatus.ACCEPTED
                if status is not SendStatus.ACCEPTED:
                    left.append(child.id)  # it has ended meanwhile, or had been asked without its own
        return told
