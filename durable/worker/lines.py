"""What a step's body tells of itself on a worker: kept for its result, and told live over the control plane meanwhile.

A live line is a hint, sent and forgotten: it says which line of which attempt it is, and comes again with the result. What a
chatty body costs is bounded: so many lines, so many bytes, so many messages a round; a line of progress that has not been
told yet gives way to the next one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from durable.core.payload import MAX_MESSAGE, clean, encode
from durable.protocol.codec import MAX_EVENTS
from durable.protocol.messages import RemoteTask, StepEvent

log = logging.getLogger("durable.worker")

LINES_BYTES_MAX = 128 << 10
"""Bytes of lines one attempt may tell: they travel in its result, beside the output."""
LINE_BYTES_MAX = 32 << 10
"""Bytes of fields of one line."""
FIRST_SECONDS = 0.05
"""Before the first round: a body that is done sooner costs no message."""
ROUND_SECONDS = 0.1
"""Between two rounds of live lines."""
ROUND_LINES = 10
"""Live lines of one attempt in a round; the others wait for the next, or come with the result."""
ROUND_MAX = 100
"""Live lines of one worker in a round."""
PUBLISH_SECONDS = 1.0
"""The longest one live line may take."""
LEVELS = {"debug": "debug", "info": "info", "warn": "warn", "warning": "warn", "error": "error", "critical": "error"}


class Lines:
    """The lines of one attempt, in order. Bodies write from the loop and from threads."""

    def __init__(self, task: RemoteTask, now_ms: Callable[[], int], wake: Callable[[], None]) -> None:
        self.task = task
        self._now_ms = now_ms
        self._wake = wake
        self._events: list[StepEvent] = []
        self._told = 0
        self._bytes = 0
        self._left_out = 0
        self._closed = False
        self._lock = threading.Lock()

    def write(self, level: str, message: str, fields: dict[str, Any], progress: bool) -> None:
        """Take a line. Raises PayloadError for fields that are no JSON."""
        data = encode(fields, what="the fields of a log line", limit=LINE_BYTES_MAX) if fields else b""
        text = _sendable(str(message)[:MAX_MESSAGE])
        with self._lock:
            index = len(self._events)
            if self._closed:
                return  # the attempt is over, and a thread goes on
            replaces = progress and index > self._told and self._events[-1].phase == "progress"
            size = len(text) + len(data) + 100
            if not replaces and (index >= MAX_EVENTS - 1 or self._bytes + size > LINES_BYTES_MAX):
                self._left_out += 1
                return
            event = StepEvent(
                at=self._now_ms(),
                level=LEVELS.get(level, "info"),  # type: ignore[arg-type]
                message=text,
                data=msgspec.json.decode(data) if data else None,
                phase="progress" if progress else None,
                index=index - 1 if replaces else index,
            )
            if replaces:
                self._events[-1] = event
            else:
                self._events.append(event)
                self._bytes += size
        self._wake()

    @property
    def untold(self) -> bool:
        """Whether there is a line that was not told live."""
        return not self._closed and self._told < len(self._events)

    def take(self, count: int) -> list[StepEvent]:
        """The next lines to tell live. They stay as they are from now on."""
        with self._lock:
            if self._closed:
                return []
            taken = self._events[self._told : self._told + count]
            self._told += len(taken)
            return taken

    def close(self) -> list[StepEvent] | None:
        """All of them, for the result. What comes later is passed over."""
        with self._lock:
            if self._left_out and not self._closed:
                text = (
                    f"{self._left_out} more lines were left out: an attempt may tell {MAX_EVENTS:,} lines, or "
                    f"{LINES_BYTES_MAX:,} bytes."
                )
                self._events.append(StepEvent(at=self._now_ms(), level="warn", message=text, index=len(self._events)))
            self._closed = True
            return self._events or None


class Teller:
    """Tells lines live, round by round: gives each to `tell`, as `step_progress` spells it, while `listening` says that
    somebody may hear it."""

    def __init__(self, tell: Callable[[dict[str, Any]], Awaitable[None]], listening: Callable[[], bool]) -> None:
        self._tell = tell
        self._listening = listening
        self._lines: dict[Lines, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def follow(self, lines: Lines) -> None:
        """From now on."""
        self._loop = asyncio.get_running_loop()
        self._lines[lines] = None

    def leave(self, lines: Lines) -> None:
        """Its attempt is over: its lines come with the result."""
        self._lines.pop(lines, None)

    def wake(self) -> None:
        """There is a line. From any thread."""
        if self._loop is not None and self._task is None:
            try:
                self._loop.call_soon_threadsafe(self._begin)
            except RuntimeError:
                return  # the loop is closed, and a thread goes on

    def stop(self) -> None:
        """Fall silent."""
        self._lines.clear()
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        if self._task is None and self._lines and self._listening():
            self._task = asyncio.get_running_loop().create_task(self._rounds(), name="durable-lines")

    async def _rounds(self) -> None:
        try:
            await asyncio.sleep(FIRST_SECONDS)
            while talking := [lines for lines in self._lines if lines.untold]:
                room = ROUND_MAX
                for lines in talking:
                    taken = lines.take(min(ROUND_LINES, room))
                    room -= len(taken)
                    for event in taken:
                        await self._say(lines.task, event)
                    if lines in self._lines:  # behind those that had no room in this round
                        self._lines[lines] = self._lines.pop(lines)
                    if not room:
                        break
                await asyncio.sleep(ROUND_SECONDS)
        finally:
            self._task = None

    async def _say(self, task: RemoteTask, event: StepEvent) -> None:
        try:
            async with asyncio.timeout(PUBLISH_SECONDS):
                await self._tell(step_progress(task, event))
        except Exception as error:
            log.debug("a line of %s was not told live: %r", task.id, error)


def step_progress(task: RemoteTask, event: StepEvent) -> dict[str, Any]:
    """A live line as others hear it."""
    return {
        "type": "step.progress",
        "runId": task.run_id,
        "seq": task.seq,
        "stepId": task.step_id,
        "attempt": task.attempt,
        "name": task.name,
        "event": msgspec.to_builtins(event),
        "at": event.at,
    }


def _sendable(text: str) -> str:
    """No wire carries half a surrogate pair. Everything else is the engine's to clean, once."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return clean(text)
    return text
