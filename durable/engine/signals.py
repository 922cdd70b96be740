"""Leaving something for a run: signals, cancel requests, results. Writes an inbox row and nudges; runs no user code."""

from __future__ import annotations

from collections.abc import Callable

from durable.core.errors import RunFinished, RunNotFound, StoreError
from durable.engine.committer import Group
from durable.engine.deps import Deps
from durable.store.records import Message, SendOutcome, SendStatus


class Mail:
    """Sends messages, many at once, and has the recipient's owner told."""

    def __init__(self, deps: Deps, nudge: Callable[[str, str | None, str], None]) -> None:
        self._group: Group[Message, SendOutcome] = Group(
            "messages",
            deps.store.send,
            max_items=deps.store.capabilities.max_batch,
            in_flight=deps.store.capabilities.in_flight,
            size=lambda message: len(message.payload or b""),
        )
        self._nudge = nudge

    @property
    def trouble(self) -> StoreError | None:
        """Why the store takes none right now, or None."""
        return self._group.trouble

    async def send(self, message: Message) -> SendStatus:
        """Store a message. The same id again changes nothing. It is durable when this returns."""
        outcome = await self._group.ask(message)
        if outcome.status is SendStatus.ACCEPTED:
            self._nudge(message.run_id, outcome.owner, message.kind)
        return outcome.status

    async def must_send(self, message: Message) -> bool:
        """Like `send`; raises RunNotFound or RunFinished. False: it had been sent before."""
        status = await self.send(message)
        if status is SendStatus.NOT_FOUND:
            raise RunNotFound(
                f"There is no run {message.run_id!r} here. Is it another workspace's?", run_id=message.run_id
            )
        if status is SendStatus.FINISHED:
            raise RunFinished(
                f"Run {message.run_id!r} has finished; the {message.kind} came too late and was not stored.",
                run_id=message.run_id,
            )
        return status is SendStatus.ACCEPTED

    async def close(self) -> None:
        """Send what is queued."""
        await self._group.close()
