"""`durable events`: sending them. Asked of a service."""

from __future__ import annotations

import click

from durable.cli.actions import json_of
from durable.cli.node import go, json_option
from durable.cli.output import EXIT_HELP, show_json
from durable.cli.remote import open_service, service_options
from durable.cli.text import safe

_BECAME = ("skipped", "dropped", "debounced", "batched", "suspended")


@click.group(epilog=EXIT_HELP)
def events() -> None:
    """Named facts that start workflows and end waits."""


@events.command()
@click.argument("name")
@click.argument("data", metavar="[DATA]", required=False)
@click.option("--id", "event_id", metavar="ID", help="The same id again changes nothing.")
@click.option("--runner", metavar="NAME", help="Pin the runs it starts to this runner.")
@click.option("--session", metavar="NAME", help="What it belongs to.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Of the runs it starts; may be given again.")
@json_option
@service_options
def send(
    url: str,
    key: str | None,
    app: str | None,
    name: str,
    data: str | None,
    event_id: str | None,
    runner: str | None,
    session: str | None,
    tags: tuple[str, ...],
    as_json: bool,
) -> None:
    """Send an event, and say what became of it.

    DATA is JSON, or - for stdin.

    \b
    Examples:
      durable events send order.placed '{"id": "o-1"}' --id o-1
      durable events send order.placed - --json < order.json | jq -r '.triggered[].runId'
    """
    go(_send(url, key, app, name, data, event_id, runner, session, tags, as_json))


async def _send(
    url: str,
    key: str | None,
    app: str | None,
    name: str,
    data: str | None,
    event_id: str | None,
    runner: str | None,
    session: str | None,
    tags: tuple[str, ...],
    as_json: bool,
) -> None:
    value = None if data is None else json_of(data)
    async with open_service(url, key, app) as client:
        answer = await client.events.send(
            name, value, id=event_id, runner=runner, session=session, tags=list(tags) or None
        )
    if as_json:
        show_json(answer)
        return
    before = " It was there before; nothing new has happened." if answer.deduped else ""
    click.echo(f"Event {safe(answer.event_id)} is accepted.{before}")
    for one in answer.triggered:
        became = next((word for word in _BECAME if getattr(one, word)), "started")
        click.echo(f"  {safe(one.workflow)}: {became}" + (f", run {safe(one.run_id)}" if one.run_id else ""))
    if answer.woke:
        click.echo(f"  It has ended {answer.woke} {'wait' if answer.woke == 1 else 'waits'}.")
    if not answer.triggered and not answer.woke:
        click.echo("  Nothing waits for it yet.")
