"""How a run and its journal look to people: the two-layer state, and one line for each journal row.

Pure: rows in, rich text out. `runs show`, `runs watch`, `dev` and the demo print the same lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.style import Style
from rich.text import Text

from durable.cli.output import show_hanging, unicode_output
from durable.cli.text import clock, preview, safe, safe_lines, shorten, span
from durable.core.errors import ErrorData
from durable.core.journal import CHILD, COMMAND_KINDS, EVENT, LOG, PATCHED, RUN, SIGNAL, TIMER, WAIT, Entry
from durable.core.payload import decode_error
from durable.protocol.states import TERMINAL
from durable.store.records import RunRecord

_OURS = re.compile(r"[/\\]durable[/\\](core|engine|worker)[/\\]\w+\.py:\d+")

STATE_STYLES = {
    "completed": "green",
    "failed": "red",
    "dead": "bold red",
    "compensation_failed": "bold red",
    "cancelled": "yellow",
    "blocked": "bold red",
    "paused": "yellow",
    "cancelling": "yellow",
    "retrying": "yellow",
    "executing": "cyan",
}

_MARKS = {
    "completed": ("✔", "+", "green"),
    "failed": ("✘", "x", "red"),
    "dead": ("✘", "x", "bold red"),
    "timed_out": ("✘", "x", "red"),
    "blocked": ("✘", "x", "bold red"),
    "retrying": ("↻", "~", "yellow"),
    "requeued": ("↻", "~", "cyan"),
    "unblocked": ("↻", "~", "cyan"),
    "cancelled": ("⊘", "-", "yellow"),
    "cancelling": ("⊘", "-", "yellow"),
    "late": ("·", ".", "dim"),
    "started": ("▸", ">", "cyan"),
    "dispatched": ("→", ">", "dim"),
    "published": ("→", ">", "dim"),
    "fired": ("◷", "@", "blue"),
    "received": ("✉", "!", "magenta"),
    "marked": ("◆", "*", "blue"),
    "written": ("·", ".", "dim"),
}


def state(run: RunRecord) -> Text:
    """Both layers: what became of the run, and what an active one is doing."""
    text = Text(run.status.value, style=STATE_STYLES.get(run.status, "cyan"))
    if run.status not in TERMINAL:
        text.append(" · ", style="dim").append(run.activity.value, style=STATE_STYLES.get(run.activity, ""))
    return text


def error_of(payload: bytes | None) -> ErrorData | None:
    """A stored error, however it was written."""
    if payload is None:
        return None
    try:
        return decode_error(payload)
    except Exception:
        return ErrorData(message=preview(payload, 500), code="unreadable")


def error_line(error: ErrorData, width: int = 200) -> str:
    """An error in one line."""
    kind = f"{error.type}: " if error.type else ""
    code = f" [{error.code}]" if error.code not in ("error", "") else ""
    return shorten(safe(f"{kind}{error.message}"), width) + safe(code)


def stack_of(error: ErrorData) -> str:
    """Where it happened, over several lines; empty if nobody said. The author's own lines, if there are any."""
    lines = safe_lines((error.stack or "").rstrip()).splitlines()
    own = [line for line in lines if not _OURS.search(line)]
    return "\n".join(own or lines)


class Row:
    """One journal row, told."""

    __slots__ = ("entry", "error", "note", "ran", "waited", "what")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.what = ""
        self.note = ""
        self.waited: int | None = None
        self.ran: int | None = None
        self.error: ErrorData | None = None

    @property
    def minor(self) -> bool:
        """Bookkeeping between two things that matter: shown dim."""
        return self.entry.status in ("published", "late") or (
            self.entry.status in ("started", "dispatched") and self.entry.kind != RUN
        )

    def mark(self) -> tuple[str, str]:
        """(symbol, style)."""
        fancy, plain, style = _MARKS.get(self.entry.status, ("·", ".", ""))
        return (fancy if unicode_output() else plain), style


class Teller:
    """Tells one run's journal row by row. It remembers when things were asked for, so that it can say how long they
    waited and how long they ran."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, str], int] = {}
        self._previous: int | None = None
        self._published: set[tuple[str | None, int]] = set()
        self.executing: list[tuple[int, int]] = []
        """(from, to) of every body that ran, µs."""

    def tell(self, entry: Entry) -> Row:
        """The next row."""
        row = Row(entry)
        row.what = _what(entry)
        self._measure(row)
        _describe(row)
        if entry.status == "published":
            # By the engine that took over from one that died: the same task, under the same id.
            row.what += " again" if (entry.key, entry.attempt) in self._published else ""
            self._published.add((entry.key, entry.attempt))
        self._previous = entry.at
        return row

    def _measure(self, row: Row) -> None:
        entry = row.entry
        command = (entry.kind, entry.key or "")
        if entry.started_at is not None and entry.finished_at is not None:
            row.ran = max(0, entry.finished_at - entry.started_at)
            self.executing.append((entry.started_at, max(entry.started_at, entry.finished_at)))
        if entry.kind in (TIMER, SIGNAL, EVENT):
            row.waited = None if self._previous is None else max(0, entry.at - self._previous)
        elif entry.kind in COMMAND_KINDS:
            since = entry.enqueued_at or self._since.get(command)
            if since is not None and entry.started_at is not None:
                row.waited = max(0, entry.started_at - since)
            elif since is not None and entry.kind == CHILD and entry.status != "started":
                row.waited = max(0, entry.at - since)
            if entry.status in ("dispatched", "retrying") or (entry.kind == CHILD and entry.status == "started"):
                self._since[command] = entry.at


def executing_time(intervals: Sequence[tuple[int, int]]) -> int:
    """How much of the time, in µs, at least one body ran."""
    total, until = 0, 0
    for begin, end in sorted(intervals):
        begin = max(begin, until)
        if end > begin:
            total += end - begin
            until = end
    return total


def _what(entry: Entry) -> str:
    if entry.kind == RUN:
        return f"run {entry.status.replace('_', ' ')}"
    if entry.kind == LOG:
        return f"log {safe(entry.key)}" if entry.key else "log"
    if entry.kind in (SIGNAL, EVENT):
        return f"{entry.kind} {safe(entry.name)}"
    if entry.kind == WAIT:
        return f"wait for event {safe(entry.name)}" + ("" if entry.status == "opened" else f", {entry.status}")
    if entry.kind == TIMER:
        return f"timer {safe(entry.name)}" if entry.name else "timer"
    if entry.kind == PATCHED:
        return f"patched {safe(entry.name)}"
    # A repeated step has a key of its own (`name:1`); that is what tells it from the others.
    verb = "" if entry.status == "completed" else f" {entry.status}"
    return f"{entry.kind} {safe(entry.key or entry.name or entry.ordinal)}{verb}"


def _describe(row: Row) -> None:
    entry = row.entry
    if entry.status in ("failed", "dead", "timed_out"):
        row.error = error_of(entry.payload) if entry.kind in COMMAND_KINDS else None
        row.note = error_line(row.error) if row.error else ""
    elif entry.status == "retrying":
        note = _object(entry.payload)
        row.error = error_of(msgspec.json.encode(note["error"])) if "error" in note else None
        due = note.get("next_at")
        row.note = error_line(row.error) if row.error else ""
        if isinstance(due, int):
            row.note += f"; next try in {span(max(0, due - entry.at))}"
    elif entry.kind == LOG:
        line = _object(entry.payload)
        fields = line.get("fields")
        told = (
            " ".join(f"{safe(key)}={safe(value)}" for key, value in fields.items()) if isinstance(fields, dict) else ""
        )
        row.note = f"{safe(line.get('level', 'info'))}: {safe(line.get('message', ''))} {told}".rstrip()
    elif entry.kind == CHILD and entry.status == "started":
        child = _object(entry.payload)
        row.note = (
            f"{safe(child.get('workflow', ''))} {safe(child.get('version', ''))} as {safe(child.get('run_id', ''))}"
        )
    elif entry.kind == RUN:
        row.note = _run_note(entry)
    elif entry.status in ("completed", "received", "late"):
        row.note = preview(entry.payload)
    elif entry.status == "dispatched":
        row.note = preview(msgspec.json.encode(_object(entry.payload).get("input")))


def _run_note(entry: Entry) -> str:
    payload = _object(entry.payload)
    if entry.status == "started":
        return f"{safe(entry.name or '')} on Python {safe(payload.get('python', '?'))}"
    if entry.status == "blocked":
        error = error_of(entry.payload)
        return error_line(error, 600) if error else ""
    if entry.status == "cancelling":
        return safe(payload.get("reason") or "")
    if entry.status in ("paused", "resumed"):
        by, held = payload.get("by"), entry.held
        parts = [f"by {safe(by)}"] if by else []
        parts += [safe(payload["reason"])] if payload.get("reason") else []
        parts += [f"deadlines are {span(held)} later"] if held else []
        return ", ".join(parts)
    if entry.status == "forked":
        since = f", asks again from {safe(payload['from'])}" if payload.get("from") else ""
        return f"the entries above are those of {safe(payload.get('of', '?'))}{since}"
    if entry.status == "requeued" and "from" in payload:
        return f"asks again from {safe(payload['from'])}"
    return ""


def _object(payload: bytes | None) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(payload or b"{}")
    except (msgspec.DecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def row_text(row: Row) -> Text:
    """What happened, how long it waited and ran, and what there is to say."""
    what = Text(row.what, style="dim" if row.minor else "bold" if row.entry.kind == RUN else "")
    for part in durations(row):
        what.append(f"  {part}", style="dim not bold")
    if row.note:
        failed = row.error is not None and row.entry.status == "failed"
        what.append("  ").append(row.note, style="red" if failed else "dim not bold")
    return what


def show_row(out: Console, row: Row, origin: int) -> None:
    """A row of one run's timeline: number, offset, mark, and the rest wrapped under itself."""
    symbol, style = row.mark()
    head = Text(f"{row.entry.seq:>4}  {'+' + span(max(0, row.entry.at - origin)):>11}  ", style="dim")
    show_hanging(out, head.append(f"{symbol} ", style=Style.parse(style) + Style(dim=False)), row_text(row))


class EventPrinter:
    """Rows of many runs as they come, a line each: time, whose it is (`who`), what happened. `minor=False` leaves
    bookkeeping out."""

    def __init__(self, out: Console, who: Callable[[RunRecord], str], *, minor: bool = True) -> None:
        self._out = out
        self._who = who
        self._minor = minor
        self._tellers: dict[str, Teller] = {}

    def __call__(self, run: RunRecord, entry: Entry) -> None:
        row = self._tellers.setdefault(run.id, Teller()).tell(entry)
        if run.status in TERMINAL and entry.seq >= run.seq:
            del self._tellers[run.id]
        if row.minor and not self._minor:
            return
        if entry.kind == RUN and entry.status in ("failed", "dead") and (error := error_of(run.error)):
            row.note = error_line(error)
        symbol, style = row.mark()
        line = Text(f"{clock(entry.at)}  ", style="dim")
        line.append(f"{safe(self._who(run))}  ", style=Style(color="cyan", dim=False))
        line.append(f"{symbol} ", style=Style.parse(style) + Style(dim=False)).append_text(row_text(row))
        self._out.print(line, no_wrap=True, overflow="ellipsis")


def durations(row: Row) -> list[str]:
    """`attempt 2`, `waited 1.2 s`, `ran 30 ms`: those that say something."""
    parts = []
    if row.entry.attempt > 1 or (row.entry.attempt and row.entry.status == "retrying"):
        parts.append(f"attempt {row.entry.attempt}")
    if row.waited is not None and row.waited >= 1_000:
        parts.append(f"waited {span(row.waited)}")
    if row.ran is not None:
        parts.append(f"ran {span(row.ran)}")
    return parts


def short_id(run_id: str) -> str:
    """The end of an id, enough to name it to a command. A child's begins in its oldest parent's: `7f3a51.child.2`."""
    family = run_id.partition(".child.")[0]
    return family[-6:] + run_id[len(family) :]


def kind_of(run: RunRecord) -> str:
    """`order@2`."""
    return safe(f"{run.workflow}@{run.version}")
