"""`durable doctor`: is everything as it should be, and if not, what to do."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from durable import __version__
from durable.cli.node import PRIVATE, PRIVATE_FOLDER, api_node, json_option, must_exist, sqlite_path, store_option
from durable.cli.output import EXIT_HELP, Exit, console, show_hanging, show_json, unicode_output
from durable.cli.text import ago, safe, shown_url, size, span

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.store.records import RunRecord

SHOWN = 5
"""Runs named under one finding."""

_MARKS = {"ok": ("✔", "ok", "green"), "note": ("•", "--", "yellow"), "action": ("✘", "!!", "bold red")}


@click.command(epilog=EXIT_HELP)
@click.option(
    "--accept-restore",
    is_flag=True,
    help="The store is an older copy on purpose (a restored backup): go on with it. Work done since then is missing.",
)
@json_option
@store_option
def doctor(store: str, as_json: bool, accept_restore: bool) -> None:
    """Look at the installation and a store. Exits 1 if something needs action.

    \b
    Examples:
      durable doctor
      durable doctor --store sqlite:////var/lib/orders/durable.db
      durable doctor --accept-restore              after restoring a backup on purpose
    """
    findings = Findings()
    asyncio.run(_examine(findings, store, accept_restore))
    if as_json:
        show_json({"ok": not findings.action, "store": shown_url(store), "findings": findings.rows})
    else:
        findings.show()
    if findings.action:
        raise click.exceptions.Exit(Exit.FAILED)


class Findings:
    """What was found, in order."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, level: str, check: str, found: str, remedy: str = "", details: Sequence[str] = ()) -> None:
        """`level` is ok, note (nothing to do now) or action."""
        row: dict[str, Any] = {"level": level, "check": check, "found": found}
        self.rows.append(row | ({"details": list(details)} if details else {}) | ({"remedy": remedy} if remedy else {}))

    @property
    def action(self) -> bool:
        return any(row["level"] == "action" for row in self.rows)

    def show(self) -> None:
        """One line each, what to do below it."""
        from rich.text import Text

        out = console()
        for row in self.rows:
            fancy, plain, style = _MARKS[row["level"]]
            head = Text(fancy if unicode_output() else plain, style=style).append(f" {row['check']:<10}", style="bold")
            indent = Text(" " * head.cell_len)
            show_hanging(out, head, Text(safe(row["found"])))
            for detail in row.get("details", ()):
                show_hanging(out, indent, Text(safe(detail)))
            if remedy := row.get("remedy"):
                show_hanging(out, indent, Text(safe(remedy), style="yellow"))
        count = sum(row["level"] == "action" for row in self.rows)
        out.print(
            Text(f"\n{count} thing{'s' * (count > 1)} to do.", style="bold red")
            if count
            else Text("\nAll is well.", style="bold green")
        )


async def _examine(findings: Findings, store: str, accept_restore: bool) -> None:
    from durable.core.errors import DurableError, StoreError, StoreRestored

    _python(findings)
    path = sqlite_path(store)
    place = PRIVATE_FOLDER.absolute() if store == PRIVATE else path
    if place is not None and not place.exists():
        _no_file_yet(findings, place)
        return
    must_exist(store)
    try:
        alive = _file(findings, path) if path is not None else None
        if accept_restore and path is not None:
            await _accept_restore(findings, store)
        async with api_node(store) as app:
            capabilities = app.engine.deps.store.capabilities
            level = "ok" if capabilities.durable else "action"
            findings.add(level, "store", f"opened and writable. {capabilities.durability}")
            if alive is not None:
                _engines(findings, alive, app.engine.clock.now())
            await _runs(findings, app, alive)
    except StoreRestored as error:
        findings.add("action", "store", str(error), "If that was on purpose: durable doctor --accept-restore")
    except StoreError as error:
        findings.add("action", "store", f"{error} [{error.code}]")
    except DurableError as error:
        findings.add(
            "action",
            "store",
            f"{error} [{error.code}]",
            "Check the URL: sqlite:///relative.db, sqlite:////absolute.db or postgresql://user@host/database",
        )


def _python(findings: Findings) -> None:
    import sqlite3

    version = platform.python_version()
    found = f"durable {__version__} on Python {version}, SQLite {sqlite3.sqlite_version}"
    if sqlite3.sqlite_version_info < (3, 35):
        findings.add("action", "python", found, "SQLite 3.35 or later is needed; use a newer Python build.")
    else:
        findings.add("ok", "python", found)


def _no_file_yet(findings: Findings, path: Path) -> None:
    parent = next(folder for folder in path.parents if folder.exists())
    if os.access(parent, os.W_OK):
        findings.add("note", "store", f"{path} is not there yet; the first engine or start makes it.")
    else:
        findings.add(
            "action", "store", f"{path} is not there, and {parent} cannot be written.", "Give another --store URL."
        )


def _file(findings: Findings, path: Path) -> Any:
    """Size, tables, generation, contents. Returns the engines seen."""
    from durable.store.sqlite.report import report

    seen = report(path)
    log = f" and {size(seen.log_bytes)} of write-ahead log" if seen.log_bytes else ""
    findings.add("ok", "file", f"{path}: {size(seen.bytes)}{log}, journal mode {seen.journal_mode}")
    findings.add(
        "ok",
        "tables",
        f"version {seen.schema_version}, generation {seen.generation} (raised at every opening)",
    )
    total = sum(seen.runs.values())
    by_status = ", ".join(f"{count} {status}" for status, count in sorted(seen.runs.items())) or "none yet"
    findings.add("ok", "runs", f"{total:,} ({by_status}), {seen.journal_rows:,} journal rows" if total else by_status)
    return seen.engines


async def _accept_restore(findings: Findings, store: str) -> None:
    from durable.store.sqlite import SqliteStore

    opened = SqliteStore(store, accept_restore=True)
    await opened.open()
    await opened.close()
    findings.add("ok", "restore", "the file as it is now is accepted; engines start on it again")


def _engines(findings: Findings, engines: list[Any], now: int) -> None:
    alive = [engine for engine in engines if not engine.dead and engine.expires_at > now]
    lately = [engine for engine in engines if engine not in alive]
    for engine in alive:
        left = span(engine.expires_at - now)
        findings.add("ok", "engine", f"{engine.incarnation[:8]} is alive; its lease is good for {left}")
    if not alive:
        last = f"; the last one's lease ended {ago(lately[0].expires_at, now)}" if lately else ""
        findings.add("note", "engine", f"none is alive{last}")


async def _runs(findings: Findings, app: Durable, engines: list[Any] | None) -> None:
    from durable.protocol.states import Activity, Status

    now = app.engine.clock.now()
    blocked = (await app.find(status=Status.ACTIVE, activity=Activity.BLOCKED, limit=1000)).runs
    dead = (await app.find(status=Status.DEAD, limit=1000)).runs
    stuck = (await app.find(status=Status.COMPENSATION_FAILED, limit=1000)).runs
    remedies = {
        "blocked": "Their journal and the code disagree. Deploy code that fits (ctx.patched keeps both ways) and restart "
        "the engines, or `durable runs requeue ID`.",
        "dead": "Their engine died again and again while it executed them, or they could not be recovered. Mend the cause, "
        "then `durable runs requeue ID`.",
        "undoing": "A compensation failed: see `durable runs show ID`.",
    }
    for name, found in (("blocked", blocked), ("dead", dead), ("undoing", stuck)):
        if found:
            findings.add("action", name, _count(found), remedies[name], _named(found))
    if not (blocked or dead or stuck):
        findings.add("ok", "trouble", "no blocked and no dead runs")
    if engines is not None and not any(not e.dead and e.expires_at > now for e in engines):
        due = [run for run in await _active(app) if _is_due(run, now)]
        if due:
            findings.add(
                "action",
                "waiting",
                f"{_count(due)} to be looked at, and no engine is alive",
                "Start one: durable dev MODULE:app, or your app.",
                _named(due),
            )


async def _active(app: Durable) -> list[RunRecord]:
    from durable.protocol.states import Status

    return (await app.find(status=Status.ACTIVE, limit=1000)).runs


def _is_due(run: RunRecord, now: int) -> bool:
    if run.activity in ("paused", "blocked"):
        return False
    return run.owner is not None or (run.wake_at is not None and run.wake_at <= now)


def _named(runs: list[RunRecord]) -> list[str]:
    """The first few, each with its error."""
    from durable.cli.view import error_line, error_of

    lines = []
    for run in runs[:SHOWN]:
        error = error_of(run.error)
        lines.append(f"{run.id}  {run.workflow}@{run.version}  {error_line(error) if error else ''}".rstrip())
    return lines + ([f"and {len(runs) - SHOWN} more: durable runs list"] if len(runs) > SHOWN else [])


def _count(runs: list[RunRecord]) -> str:
    many = "1,000 or more" if len(runs) >= 1000 else str(len(runs))
    return f"{many} run{'s' * (len(runs) != 1)}"
