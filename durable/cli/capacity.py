"""`durable worker --pure`: an engine that executes runs, and nothing beside it: no API, no port, no look at the feed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from durable.cli.output import Exit, Problem, show_json
from durable.cli.service import ServiceNode
from durable.cli.target import closing, logs_to_stderr, stop_signals
from durable.cli.text import safe, shown_url

if TYPE_CHECKING:
    from durable.server.settings import ServerSettings

DRAINING = "Draining: steps under way finish, runs are handed over."
FORCED = "Stopped at once. Steps that were running will run again."


def capacity(app: str | None, store: str | None, config: str | None, drain_timeout: str | None, as_json: bool) -> None:
    """Run it until a signal."""
    from durable.core.durations import seconds
    from durable.server.settings import load_settings

    drain = None if drain_timeout is None else int(seconds(drain_timeout) * 1000)
    settings = load_settings({"drain_timeout_ms": drain}, production=True, config=config)
    if settings.workers == 0:
        raise click.UsageError(
            "DURABLE_WORKERS is 0: such a process executes nothing, and --pure has nothing else to do."
        )
    asyncio.run(_capacity(app, store, settings, as_json))


async def _capacity(target: str | None, store: str | None, settings: ServerSettings, as_json: bool) -> None:
    from durable.opening import open_store
    from durable.server.functions import functions_of

    node = await ServiceNode.load(target, store, settings)
    logs_to_stderr()
    with stop_signals(as_json, DRAINING, FORCED) as stopping:
        async with closing(node.found):
            with node.place() as place:
                opened = open_store(place)
                if not opened.capabilities.shared:
                    raise Problem(
                        f"{safe(opened.capabilities.name)} is inside one process; nobody else sends it runs. Give --store "
                        "postgresql://user@host/database or sqlite:///file.db.",
                        code="no_store",
                        exit=Exit.USAGE,
                    )
                node.durable.store = opened
                async with node.found:
                    functions = functions_of(node.durable.engine, settings)
                    await functions.start()
                    _greet(
                        node, shown_url(place) if isinstance(place, str) else safe(opened.capabilities.name), as_json
                    )
                    await stopping.wait()
                    await node.durable.engine.drain()
                    await functions.close()
    if not as_json:
        click.echo("Stopped. Nothing is lost: runs go on when an engine serves them again.")


def _greet(node: ServiceNode, where: str, as_json: bool) -> None:
    incarnation = node.durable.engine.incarnation
    if as_json:
        show_json({"kind": "started", "engine": incarnation}, indent=None)
        return
    from durable import __version__

    workflows = ", ".join(f"{name}@{version}" for name, version in node.durable.registry.routes())
    own = f" Workflows of its own: {safe(workflows)}." if workflows else ""
    click.echo(f"Durable {__version__}, engine {incarnation[:8]} on {where}, without an API.{own} Ctrl-C drains it.")
