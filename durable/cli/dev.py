"""`durable dev`: engine and HTTP API in the foreground, and a line for everything that happens in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from durable.cli.node import DEFAULT_STORE, json_option
from durable.cli.output import EXIT_HELP, Exit, console, show_json
from durable.cli.service import ServiceNode
from durable.cli.target import closing, logs_to_stderr, stop_signals
from durable.cli.text import safe, shown_url

if TYPE_CHECKING:
    from durable.core.journal import Entry
    from durable.server.connections import HttpServer
    from durable.server.settings import ServerSettings
    from durable.store.interface import Capabilities, Store
    from durable.store.records import RunRecord

NEXT_PORTS = 10
"""Tried when the usual port is taken: several apps in development on one machine."""
LOOK_EVERY = 0.1
"""Seconds between two looks at the store."""
DRAINING = "Draining: steps under way finish, runs are handed over."
FORCED = "Stopped at once. Steps that were running will run again."


@click.command(epilog=EXIT_HELP)
@click.argument("app", metavar="[MODULE:APP]", required=False)
@click.option(
    "--store",
    metavar="URL",
    envvar="DURABLE_STORE",
    show_envvar=True,
    help=f"Run on this store instead of the app's own (without an app: {DEFAULT_STORE}). postgres, without a URL, is a "
    "private server with its data in .durable/postgres.",
)
@click.option(
    "--port", metavar="N", type=click.IntRange(0, 65_535), help="Of the API; 0 takes a free one.  [default: 3030]"
)
@click.option(
    "--app-url",
    metavar="URL",
    help="Ask the app at this URL for its functions, and again when they change.  [env var: DURABLE_APP_URL]",
)
@click.option("--config", metavar="FILE", type=click.Path(dir_okay=False), help="Settings in TOML; docs/service.md.")
@json_option
def dev(
    app: str | None, store: str | None, port: int | None, app_url: str | None, config: str | None, as_json: bool
) -> None:
    """Run an engine and its API here, with a line for everything that happens.

    MODULE:APP names a module (or a .py file) and the Durable object or root module class in it; ":APP" may be left out
    when there is only one. Without it only what remote apps have registered is executed; what other engines do on the
    store is shown.

    From this machine the API needs no key. `durable serve` is the same for production.

    Ctrl-C drains: steps under way finish, runs are handed over. A second Ctrl-C stops at once; nothing is lost then
    either, but steps that were running run again.

    \b
    Examples:
      durable dev orders:app
      durable dev orders:app --port 8080
      durable dev examples/orders.py --store sqlite:///try.db
      durable dev orders:app --store postgres
      durable dev --app-url http://127.0.0.1:3000/api/durable
      durable dev --store sqlite:////var/lib/orders/durable.db
    """
    from durable.server.settings import load_settings

    settings = load_settings({"port": port, "app_url": app_url}, config=config)
    code = asyncio.run(_dev(app, store, settings, as_json))
    if code:
        raise click.exceptions.Exit(code)


async def _dev(target: str | None, store: str | None, settings: ServerSettings, as_json: bool) -> int:
    node = await ServiceNode.load(target, store, settings)
    logs_to_stderr()
    async with closing(node.found):
        with node.place() as url:
            await _serve(node, url, as_json)
    if not as_json:
        click.echo("Stopped. Nothing is lost: runs go on when an engine serves them again.")
    return Exit.OK


async def _serve(node: ServiceNode, place: Store | str, as_json: bool) -> None:
    from durable.app import Durable
    from durable.cli.feed import Feed
    from durable.opening import open_store

    opened = open_store(place)
    # What happens is read through a node of its own, so that the last rows of a drain are seen too.
    looker = Durable(open_store(place) if opened.capabilities.shared else opened, worker=False)
    with stop_signals(as_json, DRAINING, FORCED) as stopping:
        async with looker:
            feed = Feed(looker)
            active = await feed.skip()
            printer = _printer(as_json)
            node.durable.store = opened
            async with node.found:
                http = await node.open_http(or_next=NEXT_PORTS)
                _greet(node, http, place, opened.capabilities, active, as_json)
                await _follow(feed, printer, stopping.wait())
                await _follow(feed, printer, node.stop(http))


async def _follow(feed: Any, printer: Callable[[RunRecord, Entry], None], until: Any) -> None:
    """Print what happens until something is done, and what has happened by then."""
    from durable.core.errors import StoreUnavailable

    done = asyncio.ensure_future(until)
    while True:
        finished = done.done()
        # A store that is away for a while stops nothing: the engine says so in its log, and what was missed is told later.
        with suppress(StoreUnavailable):
            for run, entry in await feed.look():
                printer(run, entry)
        if finished:
            return await done  # type: ignore[no-any-return]
        await asyncio.wait({done}, timeout=LOOK_EVERY)


def _greet(
    node: ServiceNode, http: HttpServer | None, place: Any, store: Capabilities, active: int, as_json: bool
) -> None:
    if as_json:
        return
    from durable import __version__

    click.echo(
        f"Durable {__version__} on {shown_url(place) if isinstance(place, str) else safe(store.name)}. {store.durability}"
    )
    app = node.durable
    if node.target is None:
        click.echo(f"No app is given: only functions of remote apps are executed here. Runs active: {active}.")
        _greet_api(http)
        return
    workflows = ", ".join(f"{name}@{version}" for name, version in app.registry.routes()) or "none"
    served = app.registry.steps() if app.settings.serve_steps else ()
    steps = ", ".join(step.name for step in served) or "none"
    click.echo(f"Workflows: {safe(workflows)}. Remote steps served: {safe(steps)}. Runs active: {active}.")
    _greet_api(http)


def _greet_api(http: HttpServer | None) -> None:
    if http is not None:
        click.echo(f"API: {http.url}, without a key from this machine. {http.url}/openapi.json says what there is.")
    click.echo("The engine is up. Ctrl-C drains it.")


def _printer(as_json: bool) -> Callable[[RunRecord, Entry], None]:
    from durable.cli.shape import entry_shape
    from durable.cli.view import EventPrinter, short_id

    def json_line(run: RunRecord, entry: Entry) -> None:
        show_json(entry_shape(run.id, entry) | {"workflow": run.workflow, "version": run.version}, indent=None)

    if as_json:
        return json_line
    return EventPrinter(console(), lambda run: f"{short_id(run.id)} {run.workflow}@{run.version}")
