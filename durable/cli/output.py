"""Where lines go: rich on a terminal, plain text in a pipe, JSON when asked. Markup is never read from data."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import click

from durable.cli.text import safe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


class Exit(IntEnum):
    """What the shell is told."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    STORE = 5
    INTERRUPTED = 130


EXIT_HELP = """\b
Exit codes:
  0    done
  1    the run failed, or something needs action
  2    the command was not understood
  3    no such run, schedule or store
  4    refused: too late, or the run is in another state
  5    the store or the service cannot be used
  130  interrupted"""


class Problem(click.ClickException):
    """One sentence for the user, with a stable code, instead of a traceback."""

    def __init__(self, message: str, *, code: str = "error", exit: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.code = code
        self.exit_code = exit  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        """To stderr."""
        click.echo(
            f"{click.style('error', fg='red', bold=True)} [{self.code}]: {safe(self.message)}", err=True, file=file
        )


def console(*, stderr: bool = False) -> Console:
    """A console on today's stdout: wide and plain where nobody watches."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    tty = stream.isatty()
    return Console(
        file=stream, width=None if tty else 100_000, highlight=False, markup=False, emoji=False, soft_wrap=not tty
    )


def unicode_output() -> bool:
    """Whether stdout can write the symbols we like."""
    stream = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # what rich puts there while something is live
    return (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "").startswith("utf")


def show_json(value: Any, *, indent: int | None = 2) -> None:
    """One JSON value, flushed, so that a pipe sees each line when it is written."""
    from durable.cli.text import to_json

    click.echo(to_json(value, indent=indent))


def show_hanging(out: Console, head: Text, body: Text) -> None:
    """A head, and a body that wraps under itself."""
    from rich.text import Text

    room = out.width - head.cell_len
    if not out.is_terminal or body.cell_len <= room or room < 20:
        out.print(head + body)
        return
    for line in body.wrap(out, room):
        out.print(head + line)
        head = Text(" " * head.cell_len)


def show_table(headers: Sequence[str], rows: Iterable[Sequence[Text]]) -> None:
    """Aligned columns; the last gives way on a narrow terminal. A pipe gets every character."""
    from rich.text import Text

    out = console()
    lines = [[Text(header, style="bold") for header in headers], *rows]
    widths = [max(line[column].cell_len for line in lines) for column in range(len(headers))]
    for line in lines:
        text = Text()
        for cell, width in zip(line, widths, strict=True):
            text.append_text(cell).append(" " * (width - cell.cell_len + 2))
        text.rstrip()
        out.print(text, no_wrap=True, overflow="ellipsis")
