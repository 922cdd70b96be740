"""What bodies on workers tell of themselves: live over the control plane, and again with the result. Each line is journaled
once, under its step, by the engine that owns the run. A run that has left memory is woken for it by the engine that let it
go; all others pass the line over.

Anybody may speak on a control plane. So a live line counts only for a task that is out and awaited here, cleaned and bounded
as a result's are, and no more than a result may bring. It changes nothing but the journal.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from durable.core.errors import DurableError
from durable.core.hosted import log_line
from durable.core.journal import LOG, REMOTE, Entry
from durable.core.payload import MAX_MESSAGE, fingerprint
from durable.engine.residents import Arrival, Line, Resident
from durable.engine.resume import told_of
from durable.engine.signals import Mail
from durable.protocol.codec import MAX_EVENTS
from durable.protocol.messages import StepEvent, step_id
from durable.store.interface import Store
from durable.store.records import Message

if TYPE_CHECKING:
    from durable.engine.executor import Executor

log = logging.getLogger("durable.lines")

LIVE_LINE = "step.progress"
"""Type of the event that brings one."""
LIVE_BYTES_MAX = 64 << 10
"""Bytes of a live line; a longer one comes with the result."""
SENDING_MAX = 100
"""Live lines on their way to inboxes; more come with the result."""
PAGE = 500
PAGES_MAX = 20
"""Rows looked through for lines told live; what lies beyond may be written twice."""

Told: TypeAlias = dict[str, set[tuple[int, int | tuple[int, str]]]]


class _LiveLine(msgspec.Struct, rename="camel"):
    """The event as workers send it. Those of other makes may leave out what has a default."""

    run_id: str
    seq: int
    event: StepEvent
    step_id: str | None = None
    attempt: int | None = None


def line_of(event: StepEvent) -> Line:
    """A worker's line as the journal has it."""
    payload, index = log_line(event), event.index
    mark = index if index is not None and 0 <= index < MAX_EVENTS * 2 else (event.at, fingerprint(payload))
    return Line(mark, payload)


class Hearing:
    """Takes live lines, for one engine."""

    def __init__(self, executor: Executor, mail: Mail) -> None:
        self._executor = executor
        self._mail = mail
        self._sending = 0

    def hear(self, event: dict[str, Any]) -> bool:
        """One live line. Whether it was for a run of this engine. Never raises."""
        try:
            said = msgspec.convert(event, _LiveLine)
            line = line_of(_cut(said.event))
            if len(line.payload) > min(LIVE_BYTES_MAX, self._executor.deps.store.capabilities.max_payload):
                return False
            task = step_id(said.run_id, said.seq)
            if said.step_id not in (None, task):
                return False
            found = self._executor.dispatch.awaited(task)
            if found is not None:
                self._arrive(*found, said, line)
                return True
            if (left := self._executor.dispatch.out(task)) is not None:
                self._leave(*left, said, line)
                return True
        except Exception as error:
            log.debug("a live line that cannot be read is passed over: %r", error)
        return False

    def _arrive(self, run: Resident, key: str, said: _LiveLine, line: Line) -> None:
        sent = run.sent.get(key)
        if sent is None or (said.attempt or sent.attempt) != sent.attempt:
            return
        if run.suspending:
            self._leave(key, sent.attempt, said, line)
            return
        now = self._executor.clock.now()
        entry = Arrival(now, LOG, "written", key=key, attempt=sent.attempt, payload=line.payload, line=line)
        entry.ordinal = line.index
        self._executor.arrive(run, entry)

    def _leave(self, key: str, attempt: int, said: _LiveLine, line: Line) -> None:
        """In the inbox of a run that has left memory, which wakes it; for a while what comes next finds it there."""
        if (said.attempt or attempt) != attempt or self._sending >= SENDING_MAX:
            return
        self._sending += 1
        message = Message(
            said.run_id,
            f"{step_id(said.run_id, said.seq)}:{attempt}:line:{fingerprint(str(line.mark).encode())}",
            "line",
            payload=told_of(line),
            key=key,
            ordinal=said.seq,
            attempt=attempt,
            workspace=self._executor.settings.workspace,
        )
        self._executor.keep(self._send(message))

    async def _send(self, message: Message) -> None:
        try:
            await self._mail.send(message)
        except DurableError as error:
            log.debug("a live line was not kept, it comes with the result: %s", error)
        finally:
            self._sending -= 1


def _cut(event: StepEvent) -> StepEvent:
    if len(event.message) <= MAX_MESSAGE:
        return event
    return msgspec.structs.replace(event, message=event.message[:MAX_MESSAGE])


async def told(store: Store, run_id: str, entries: Sequence[Entry], last: int) -> Told:
    """Which lines of tasks that are out are journaled, for a new owner. Reads only where a replay that leaves lines out
    shows that there may be some: `entries` as loaded, `last` the run's seq. Raises StoreError."""
    out: dict[str, int] = {}
    for entry in entries:
        if entry.kind == REMOTE and entry.key is not None:
            if entry.status == "dispatched":
                out.setdefault(entry.key, entry.seq)
            elif entry.status in ("completed", "failed", "cancelled"):
                out.pop(entry.key, None)
    found: Told = {}
    if not out:
        return found
    after = min(out.values())
    if sum(1 for entry in entries if entry.seq > after) >= last - after:
        return found  # no seq is missing, so there are no lines
    for _ in range(PAGES_MAX):
        page = await store.page(run_id, after, PAGE)
        for entry in page:
            if entry.kind == LOG and entry.key in out and entry.attempt and entry.ordinal is not None:
                found.setdefault(entry.key, set()).add((entry.attempt, entry.ordinal))
        if len(page) < PAGE:
            break
        after = page[-1].seq
    return found
