"""`durable flow`: the limits, how much of each is used, and what queues behind it. Asked of a service."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from durable.cli.node import go, json_option
from durable.cli.output import show_json, show_table, unicode_output
from durable.cli.remote import micros, open_service, service_options
from durable.cli.text import ago, safe, span

if TYPE_CHECKING:
    from rich.text import Text

    from durable.client import Limit

BAR = 10
"""Characters of a full limit."""


@click.command()
@click.option("--workflow", metavar="NAME", help="Only limits of this workflow.")
@json_option
@service_options
def flow(url: str, key: str | None, app: str | None, workflow: str | None, as_json: bool) -> None:
    """Show limits that have runs, or had some lately: their use, and the due runs that wait behind them.

    \b
    Examples:
      durable flow
      durable flow --workflow charge --json | jq '.limits[] | select(.queued > 0)'
    """
    go(_flow(url, key, app, workflow, as_json))


async def _flow(url: str, key: str | None, app: str | None, workflow: str | None, as_json: bool) -> None:
    async with open_service(url, key, app) as client:
        found = [one for one in await client.flow_state() if workflow in (None, one.workflow)]
    if as_json:
        show_json({"limits": found})
        return
    if not found:
        click.echo("No limit has a run now.")
        return
    from rich.text import Text

    now = time.time_ns() // 1_000
    rows = []
    for one in found:
        due = micros(one.next_at)
        rows.append(
            [
                Text(safe(one.workflow), style="bold"),
                Text(safe(one.kind)),
                Text(safe(one.lane), style="dim"),
                _use(one),
                Text(f"per {span(int(one.period_ms * 1_000))}" if one.period_ms else "at once", style="dim"),
                Text(str(one.queued), style="bold yellow" if one.queued else "dim"),
                Text("" if due is None else ago(due, now), style="dim"),
            ]
        )
    show_table(("WORKFLOW", "KIND", "LANE", "USED", "OF", "QUEUED", "NEXT"), rows)


def _use(one: Limit) -> Text:
    """A bar, and the numbers."""
    from rich.text import Text

    share = min(1.0, one.used / one.limit) if one.limit else 1.0
    full, empty = ("█", "░") if unicode_output() else ("#", ".")
    filled = round(share * BAR)
    style = "red" if share >= 1 else "yellow" if share >= 0.8 else "green"
    text = Text(full * filled, style=style).append(empty * (BAR - filled), style="dim")
    return text.append(f" {one.used}/{one.limit}", style="not dim")
