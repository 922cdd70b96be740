"""`durable serve`: engine and HTTP API in production, without the conveniences of `durable dev`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from durable.cli.node import json_option
from durable.cli.output import EXIT_HELP, Exit, Problem, show_json
from durable.cli.service import ServiceNode
from durable.cli.target import closing, logs_to_stderr, stop_signals
from durable.cli.text import safe, shown_url

if TYPE_CHECKING:
    from durable.server.settings import ServerSettings
    from durable.store.interface import Store

DRAINING = "Draining: not ready any more, steps under way finish, runs are handed over."
FORCED = "Stopped at once. Steps that were running will run again."


@click.command(epilog=EXIT_HELP)
@click.argument("app", metavar="[MODULE:APP]", required=False)
@click.option(
    "--store", metavar="URL", envvar="DURABLE_STORE", show_envvar=True, help="Where the runs are; or DATABASE_URL."
)
@click.option("--host", metavar="ADDRESS", help="To listen on.  [default: 0.0.0.0]")
@click.option(
    "--port", metavar="N", type=click.IntRange(0, 65_535), help="Of the API; 0 takes a free one.  [default: 3030]"
)
@click.option("--config", metavar="FILE", type=click.Path(dir_okay=False), help="Settings in TOML; docs/service.md.")
@json_option
def serve(
    app: str | None, store: str | None, host: str | None, port: int | None, config: str | None, as_json: bool
) -> None:
    """Run an engine and its API for production: every request needs a key.

    Workspaces and their keys are made with the admin token (DURABLE_ADMIN_TOKEN): POST /api/apps. An app given here runs
    in this process, beside the remote ones; so it need not be given.

    SIGTERM drains: /readyz turns to 503, steps under way finish, runs are handed over. A second one stops at once.

    \b
    Examples:
      DATABASE_URL=postgresql://app@db/app DURABLE_ADMIN_TOKEN=... durable serve
      durable serve orders:app --store postgresql://app@db/app --config durable.toml
    """
    from durable.server.settings import load_settings

    settings = load_settings({"host": host, "port": port}, production=True, config=config)
    asyncio.run(_serve(app, store, settings, as_json))


async def _serve(target: str | None, store: str | None, settings: ServerSettings, as_json: bool) -> None:
    node = await ServiceNode.load(target, store, settings)
    logs_to_stderr()
    with stop_signals(as_json, DRAINING, FORCED) as stopping:
        async with closing(node.found):
            with node.place() as place:
                await _run(node, place, stopping, as_json)
    if not as_json:
        click.echo("Stopped. Nothing is lost: runs go on when an engine serves them again.")


async def _run(node: ServiceNode, place: Store | str, stopping: asyncio.Event, as_json: bool) -> None:
    from durable.opening import open_store

    opened = open_store(place)
    if not opened.capabilities.durable:
        raise Problem(
            f"{safe(opened.capabilities.name)} forgets everything when the process ends. Give --store "
            "postgresql://user@host/database or sqlite:///file.db.",
            code="weak_durability",
            exit=Exit.STORE,
        )
    node.durable.store = opened
    async with node.found:
        http = await node.open_http()
        assert http is not None  # in production it is there, or a Problem
        if as_json:
            show_json(
                {"kind": "started", "url": http.url, "port": http.port, "executes": node.settings.workers > 0},
                indent=None,
            )
        else:
            where = shown_url(place) if isinstance(place, str) else safe(opened.capabilities.name)
            click.echo(f"API: {http.url} on {where}. SIGTERM drains.")
            if node.settings.admin_token is None:
                click.echo("No DURABLE_ADMIN_TOKEN is set: nobody can make workspaces or keys.", err=True)
        await stopping.wait()
        await node.stop(http)
