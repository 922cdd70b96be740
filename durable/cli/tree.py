"""A run as a tree that grows: its steps with how long they took, its children's runs under them, their log lines in place.

Pure: frames in, lines of text out. `durable runs watch` draws it again and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from durable.cli.output import unicode_output
from durable.cli.remote import micros
from durable.cli.text import safe, shorten, span
from durable.cli.view import short_id

if TYPE_CHECKING:
    from durable.client import Frame

MAX_DEPTH = 8
_STYLES = {
    **dict.fromkeys(("succeeded", "completed"), ("✔", "+", "green")),
    "failed": ("✘", "x", "red"),
    "needs_attention": ("!", "!", "bold red"),
    "cancelled": ("⊘", "-", "yellow"),
    "retrying": ("↻", "~", "yellow"),
    "running": ("▸", ">", "cyan"),
    "queued": ("◌", "o", "dim"),
    "waiting": ("◷", "@", "blue"),
    "paused": ("‖", "=", "yellow"),
}
_LEVELS = {"error": "red", "critical": "bold red", "warn": "yellow", "warning": "yellow"}
_ENDED = frozenset({"succeeded", "completed", "failed", "cancelled", "needs_attention"})


class Line:
    """A log line."""

    def __init__(self, frame: Frame) -> None:
        self.level = frame.level or "info"
        self.text = safe(frame.message or "")
        self.fields = " ".join(f"{safe(key)}={safe(value)}" for key, value in frame.fields.items())


class Branch:
    """A run, or a step of one."""

    def __init__(self, name: str, run_id: str | None = None) -> None:
        self.name = name
        self.run_id = run_id
        """None: a step."""
        self.status = "queued" if run_id else "running"
        self.attempt = 1
        self.begun: int | None = None
        self.ended: int | None = None
        self.took: int | None = None
        self.due: int | None = None
        self.error: str | None = None
        self.below: list[Branch | Line] = []
        self._steps: dict[str, Branch] = {}

    def step(self, name: str) -> Branch:
        found = self._steps.get(name)
        if found is None:
            found = self._steps[name] = Branch(name)
            self.below.append(found)
        return found

    def feed(self, frame: Frame) -> Branch | None:
        """One frame of this run. The step whose child's run is now known."""
        at = micros(frame.ts)
        if frame.kind == "run_status":
            self._become(frame, at)
            return None
        if frame.kind == "log":
            place = self if frame.scope in (None, "", "root") else self.step(frame.scope or "")
            place.below.append(Line(frame))
            return None
        if frame.kind != "step_status":
            return None
        step = self.step(frame.name or "")
        step._become(frame, at)
        step.attempt = frame.attempt or 1
        step.due = micros(frame.next_attempt_at)
        if frame.child_run_id is not None:
            child = Branch(step.name, frame.child_run_id)
            child.status, child.begun = step.status, step.begun
            self.below[self.below.index(step)] = child
            self._steps[step.name] = child
            return child
        return None

    def _become(self, frame: Frame, at: int | None) -> None:
        if frame.status is not None:
            self.status = frame.status
        if frame.duration_ms is not None:
            self.took = round(frame.duration_ms * 1_000)
        ended = self.status in _ENDED
        if self.begun is None and at is not None:
            self.begun = at if not ended else None if self.took is None else at - self.took
        self.ended = at if ended else None
        self.error = None
        if frame.error is not None:
            kind = f"{frame.error.type}: " if frame.error.type else ""
            self.error = shorten(safe(f"{kind}{frame.error.message}"), 300)

    def lines(self, now: int) -> Iterator[Text]:
        """The whole tree."""
        yield self._told(now)
        yield from self._under(now, "", 0)

    def _under(self, now: int, indent: str, depth: int) -> Iterator[Text]:
        tee, corner, bar = ("├─ ", "└─ ", "│  ") if unicode_output() else ("|- ", "`- ", "|  ")
        for place, one in enumerate(self.below):
            last = place == len(self.below) - 1
            head = Text(indent + (corner if last else tee), style="bright_black")
            if isinstance(one, Line):
                yield head.append_text(_log(one))
                continue
            yield head.append_text(one._told(now))
            if depth < MAX_DEPTH:
                yield from one._under(now, indent + ("   " if last else bar), depth + 1)

    def _told(self, now: int) -> Text:
        fancy, plain, style = _STYLES.get(self.status, ("·", ".", ""))
        text = Text(f"{fancy if unicode_output() else plain} ", style=style)
        text.append(safe(self.name), style="not dim bold default" if self.run_id else "not dim not bold default")
        if self.run_id is not None:
            text.append(f"  {safe(short_id(self.run_id))}", style="not bold bright_black")
        if self.status not in ("completed", "succeeded") or self.run_id is not None:
            text.append(f"  {self.status.replace('_', ' ')}")
        if (took := self._span(now)) is not None:
            text.append(f"  {span(took)}", style="not bold bright_black")
        if self.attempt > 1:
            text.append(f"  attempt {self.attempt}", style="not bold yellow")
        if self.status == "retrying" and self.due is not None:
            text.append(f"  again in {span(max(0, self.due - now))}", style="not bold yellow")
        if self.error is not None:
            text.append(f"  {self.error}", style="not bold red" if self.status == "failed" else "not bold yellow")
        return text

    def _span(self, now: int) -> int | None:
        if self.ended is None:
            return None if self.begun is None else max(0, now - self.begun)
        if self.begun is None:
            return self.took
        return max(self.took or 0, self.ended - self.begun)


def _log(line: Line) -> Text:
    style = _LEVELS.get(line.level, "")
    text = Text("" if line.level == "info" else f"{safe(line.level)}: ", style=style)
    text.append(line.text, style=style or "italic").append(
        f"  {line.fields}" if line.fields else "", style="bright_black"
    )
    return text
