"""What this engine tells others over the control plane: where to look (`enqueued`, `cancel`), and what became of the runs
it executes (`event`). Hints, never truth: who hears one looks into the store.

Nothing here delays anybody. Messages are made only where somebody may listen, and go out from a task of their own: hints
at once, events of one run together, so many at a time and no more. What does not fit is dropped, and seen by polling.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Literal

from durable.control_plane.interface import ControlPlane
from durable.core.journal import REMOTE, RUN, STEP, Entry
from durable.engine.residents import Resident
from durable.protocol.messages import ControlMessage
from durable.store.records import Commit

log = logging.getLogger("durable.announce")

HINTS_MAX = 1_000
"""Hints waiting to be sent."""
PAUSE_SECONDS = 0.05
"""Between two rounds of events: what happens to a run meanwhile is told as one."""
PROGRESS_MAX = 50
"""Events in a round that tell of anything but the end of a run."""
EVENTS_MAX = 100
"""Events in a round."""
ENDS_MAX = 1_000
"""Ends of runs that wait for their round: others wait for them."""
PUBLISH_SECONDS = 1.0
"""The longest one message may take."""


class Announcer:
    """Speaks for one engine."""

    def __init__(self, plane: ControlPlane, incarnation: Callable[[], str]) -> None:
        self._plane = plane
        self._incarnation = incarnation
        self._hints: dict[tuple[Literal["cancel", "enqueued"], str], None] = {}
        self._words: deque[dict[str, Any]] = deque()
        """Events that somebody waits for, to be told one by one."""
        self._events: dict[str, tuple[str, Entry]] = {}
        """Run → its workflow, and the latest there is to tell."""
        self._round: deque[ControlMessage] = deque()
        self._pause: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def hint(self, kind: Literal["cancel", "enqueued"], run_id: str) -> None:
        """There is something for this run."""
        if self._plane.audience and len(self._hints) < HINTS_MAX:
            self._hints[kind, run_id] = None
            self._speak()

    def tell(self, event: dict[str, Any]) -> None:
        """Something for workers, at once."""
        if self._plane.audience and len(self._words) < HINTS_MAX:
            self._words.append(event)
            self._speak()

    def committed(self, run: Resident, commit: Commit) -> None:
        """A run executing here has got further."""
        if not self._plane.audience or not commit.entries:
            return
        limit = ENDS_MAX if run.ended else PROGRESS_MAX
        if run.run_id in self._events or len(self._events) < limit:
            self._events[run.run_id] = run.definition.name, commit.entries[-1]
            if self._pause is None:
                self._speak()

    async def close(self) -> None:
        """Say what is left to say, if that does not take long."""
        self._resume()
        if self._task is not None:
            task = self._task
            await asyncio.wait({task}, timeout=PUBLISH_SECONDS)
            task.cancel()
        if self._pause is not None:
            self._pause.cancel()

    def _speak(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._publish(), name="durable-announce")

    def _resume(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._events:
            self._speak()

    async def _publish(self) -> None:
        try:
            while (message := self._next()) is not None:
                try:
                    async with asyncio.timeout(PUBLISH_SECONDS):
                        await self._plane.publish_control(message)
                except Exception as error:
                    log.warning("a control message was not sent: %r", error)
        finally:
            self._task = None

    def _next(self) -> ControlMessage | None:
        """Hints first: somebody waits for them."""
        sender = self._incarnation()
        if self._hints:
            kind, run_id = next(iter(self._hints))
            del self._hints[kind, run_id]
            return ControlMessage(sender=sender, kind=kind, run_id=run_id)
        if self._words:
            return ControlMessage(sender=sender, kind="event", event=self._words.popleft())
        if not self._round and self._events and self._pause is None:
            for run_id in list(islice(self._events, EVENTS_MAX)):
                workflow, entry = self._events.pop(run_id)
                self._round.append(ControlMessage(sender=sender, kind="event", event=event(run_id, workflow, entry)))
            self._pause = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._resume)
        return self._round.popleft() if self._round else None


def event(run_id: str, workflow: str, entry: Entry) -> dict[str, object]:
    """A journal entry as others are told of it: `run.<status>`, `step.<status>`, and `run.progress` for all else. No
    payload: that is in the store, for those who may read it."""
    told: dict[str, object] = {"type": "run.progress", "runId": run_id, "workflow": workflow}
    if entry.kind == RUN:
        told["type"] = f"run.{entry.status}"
    elif entry.kind in (STEP, REMOTE):
        told |= {"type": f"step.{entry.status}", "seq": entry.ordinal, "name": entry.name}
    return told | {"at": entry.at // 1_000}


def step_cancel(run_id: str, task: str, attempt: int, at: int) -> dict[str, Any]:
    """A task, a step's or a turn's, that nobody waits for any more, as workers are told of it: this attempt, and those
    before it."""
    return {"type": "step.cancel", "runId": run_id, "stepId": task, "attempt": attempt, "at": at // 1_000}
