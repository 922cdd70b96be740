"""`durable schedules`: runs that start by the clock: list, ensure, pause, resume, trigger, remove. Asked of a service."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from durable.cli.actions import json_of
from durable.cli.node import go, json_option
from durable.cli.output import EXIT_HELP, show_json, show_table
from durable.cli.remote import micros, open_service, service_options
from durable.cli.text import ago, safe, span

if TYPE_CHECKING:
    from durable.client import Schedule


@click.group(epilog=EXIT_HELP)
def schedules() -> None:
    """Runs that start by the clock. A workflow's own cron triggers are there too; their ids begin with a dollar."""


@schedules.command("list")
@json_option
@service_options
def list_schedules(url: str, key: str | None, app: str | None, as_json: bool) -> None:
    """List schedules: when the next run is due, and what became of those before.

    \b
    Examples:
      durable schedules list
      durable schedules list --json | jq -r '.schedules[] | select(.paused) | .id'
    """
    go(_list(url, key, app, as_json))


async def _list(url: str, key: str | None, app: str | None, as_json: bool) -> None:
    async with open_service(url, key, app) as client:
        found = await client.schedules.list()
    if as_json:
        show_json({"schedules": found})
        return
    if not found:
        click.echo("No schedules. Make one: durable schedules ensure ID WORKFLOW --cron '0 3 * * *'")
        return
    from rich.text import Text

    now = time.time_ns() // 1_000
    rows = []
    for one in found:
        next_at, last_at = micros(one.next_at), micros(one.last_at)
        due = "paused" if one.paused else "never again" if next_at is None else ago(next_at, now)
        last = "" if last_at is None else ago(last_at, now)
        note = one.error or (f"{one.skipped} skipped" if one.skipped else "")
        rows.append(
            [
                Text(safe(one.id)),
                Text(safe(one.workflow), style="bold"),
                Text(_when(one)),
                Text(due, style="yellow" if one.paused else "cyan"),
                Text(last, style="dim"),
                Text(str(one.fired), style="dim"),
                Text(safe(note), style="red" if one.error else "dim"),
            ]
        )
    show_table(("ID", "WORKFLOW", "WHEN", "NEXT", "LAST", "RUNS", "NOTE"), rows)


def _when(one: Schedule) -> str:
    if one.cron is not None:
        return safe(f"{one.cron} {one.timezone or 'UTC'}")
    if one.every_seconds is not None:
        return f"every {span(int(one.every_seconds * 1_000_000))}"
    return "" if one.at is None else f"once at {one.at.isoformat(timespec='seconds')}"


@schedules.command()
@click.argument("schedule_id", metavar="ID")
@click.argument("workflow")
@click.argument("input_json", metavar="[INPUT]", required=False)
@click.option("--cron", metavar="EXPR", help="Five fields: minute hour day month weekday.")
@click.option("--timezone", metavar="ZONE", help="Of --cron, like Europe/Vienna. Default: UTC.")
@click.option("--every", metavar="DURATION", help="Like 90s or 6h.")
@click.option("--at", "at", type=click.DateTime(), help="Once, at this time, UTC.")
@click.option("--catch-up", type=click.Choice(("last", "skip", "all")), help="What was missed while nobody was there.")
@click.option(
    "--overlap", type=click.Choice(("allow", "skip", "cancel", "queue")), help="If the run before is unfinished."
)
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Of each run; may be given again.")
@click.option("--paused", is_flag=True, help="Let nothing come due before `durable schedules resume`.")
@json_option
@service_options
def ensure(
    url: str, key: str | None, app: str | None, schedule_id: str, workflow: str, as_json: bool, **given: Any
) -> None:
    """See that there is this schedule. The same again changes nothing.

    INPUT is JSON, or - for stdin.

    \b
    Examples:
      durable schedules ensure nightly report '{"kind": "sales"}' --cron "0 3 * * *" --timezone Europe/Vienna
      durable schedules ensure poll fetch --every 90s --overlap skip
    """
    if sum(given[name] is not None for name in ("cron", "every", "at")) != 1:
        raise click.UsageError("Say when: one of --cron, --every and --at.")
    go(_ensure(url, key, app, schedule_id, workflow, as_json, given))


async def _ensure(
    url: str, key: str | None, app: str | None, id: str, workflow: str, as_json: bool, given: dict[str, Any]
) -> None:
    from datetime import UTC

    text, at = given.pop("input_json"), given.pop("at")
    given["paused"] = given["paused"] or None  # without the flag: as it is
    async with open_service(url, key, app) as client:
        made = await client.schedules.ensure(
            id,
            workflow,
            None if text is None else json_of(text),
            at=None if at is None else at.replace(tzinfo=UTC),
            **given,
        )
    _show(made, as_json, "")


@schedules.command()
@click.argument("schedule_id", metavar="ID")
@json_option
@service_options
def pause(url: str, key: str | None, app: str | None, schedule_id: str, as_json: bool) -> None:
    """Let nothing of a schedule come due.

    \b
    Examples:
      durable schedules pause nightly
    """
    go(_change(url, key, app, schedule_id, "pause", as_json))


@schedules.command()
@click.argument("schedule_id", metavar="ID")
@json_option
@service_options
def resume(url: str, key: str | None, app: str | None, schedule_id: str, as_json: bool) -> None:
    """Let a schedule go on from now. What would have come due meanwhile is not made up.

    \b
    Examples:
      durable schedules resume nightly
    """
    go(_change(url, key, app, schedule_id, "resume", as_json))


async def _change(url: str, key: str | None, app: str | None, id: str, verb: str, as_json: bool) -> None:
    async with open_service(url, key, app) as client:
        _show(await getattr(client.schedules, verb)(id), as_json, f" Go on with: durable schedules resume {safe(id)}")


def _show(one: Schedule, as_json: bool, paused: str) -> None:
    if as_json:
        show_json(one)
        return
    due = micros(one.next_at)
    if one.paused:
        click.echo(f"{safe(one.id)} is paused.{paused}")
    elif due is None:
        click.echo(f"{safe(one.id)} starts {safe(one.workflow)} never again.")
    else:
        click.echo(
            f"{safe(one.id)} starts {safe(one.workflow)} {_when(one)}, next {ago(due, time.time_ns() // 1_000)}."
        )


@schedules.command()
@click.argument("schedule_id", metavar="ID")
@json_option
@service_options
def trigger(url: str, key: str | None, app: str | None, schedule_id: str, as_json: bool) -> None:
    """Start a run of a schedule now, beside its occurrences.

    \b
    Examples:
      durable runs watch --url http://127.0.0.1:3030 $(durable schedules trigger nightly --json | jq -r .runId)
    """
    go(_trigger(url, key, app, schedule_id, as_json))


async def _trigger(url: str, key: str | None, app: str | None, id: str, as_json: bool) -> None:
    async with open_service(url, key, app) as client:
        started = await client.schedules.trigger(id)
    if as_json:
        show_json(started)
    else:
        click.echo(f"Run {safe(started.run_id)} is started.")


@schedules.command()
@click.argument("schedule_id", metavar="ID")
@json_option
@service_options
def remove(url: str, key: str | None, app: str | None, schedule_id: str, as_json: bool) -> None:
    """Remove a schedule. Its runs stay.

    \b
    Examples:
      durable schedules remove nightly
    """
    go(_remove(url, key, app, schedule_id, as_json))


async def _remove(url: str, key: str | None, app: str | None, id: str, as_json: bool) -> None:
    async with open_service(url, key, app) as client:
        await client.schedules.remove(id)
    if as_json:
        show_json({"id": id, "removed": True})
    else:
        click.echo(f"{safe(id)} is removed. Its runs stay.")
