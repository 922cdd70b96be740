"""`durable dev`: an app's engine in the foreground, and a line for everything that happens in its store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import click

from durable.cli.node import DEFAULT_STORE, json_option, private_server
from durable.cli.output import EXIT_HELP, Exit, console, show_json
from durable.cli.target import closing, load_app, logs_to_stderr, stop_signals
from durable.cli.text import safe, shown_url

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.core.journal import Entry
    from durable.module.application import Application
    from durable.store.interface import Capabilities, Store
    from durable.store.records import RunRecord

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
@json_option
def dev(app: str | None, store: str | None, as_json: bool) -> None:
    """Run an app's engine here, with a line for everything that happens.

    MODULE:APP names a module (or a .py file) and the Durable object or root module class in it; ":APP" may be left out
    when there is only one. Without it nothing is executed: a look at what other engines do on the store.

    Ctrl-C drains: steps under way finish, runs are handed over. A second Ctrl-C stops at once; nothing is lost then
    either, but steps that were running run again.

    \b
    Examples:
      durable dev orders:app
      durable dev examples/orders.py --store sqlite:///try.db
      durable dev orders:app --store postgres
      durable dev --store sqlite:////var/lib/orders/durable.db
    """
    code = asyncio.run(_dev(app, store, as_json))
    if code:
        raise click.exceptions.Exit(code)


async def _dev(target: str | None, store: str | None, as_json: bool) -> int:
    from durable.app import Durable

    found = load_app(target) if target else None
    loaded = found if found is None or isinstance(found, Durable) else await found.prepare()
    place = store or (loaded.store if loaded else DEFAULT_STORE)
    logs_to_stderr()
    async with closing(found):
        with private_server(place) if isinstance(place, str) else nullcontext(place) as url:
            await _serve(found, loaded, url, as_json)
    if found is not None and not as_json:
        click.echo("Stopped. Nothing is lost: runs go on when an engine serves them again.")
    return Exit.OK


async def _serve(
    found: Durable | Application | None, loaded: Durable | None, place: Store | str, as_json: bool
) -> None:
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
            if found is None or loaded is None:
                _greet(None, place, opened.capabilities, active, as_json)
                await _follow(feed, printer, stopping.wait())
                return
            loaded.store = opened
            async with found:
                _greet(loaded, place, opened.capabilities, active, as_json)
                await _follow(feed, printer, stopping.wait())
                await _follow(feed, printer, found.close())


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


def _greet(app: Durable | None, place: Any, store: Capabilities, active: int, as_json: bool) -> None:
    if as_json:
        return
    from durable import __version__

    click.echo(
        f"Durable {__version__} on {shown_url(place) if isinstance(place, str) else safe(store.name)}. {store.durability}"
    )
    if app is None:
        click.echo(f"Nothing is executed here; {active} runs are active. What other engines do is shown. Ctrl-C ends.")
        return
    workflows = ", ".join(f"{name}@{version}" for name, version in app.registry.routes()) or "none"
    served = app.registry.steps() if app.settings.serve_steps else ()
    steps = ", ".join(step.name for step in served) or "none"
    click.echo(f"Workflows: {safe(workflows)}. Remote steps served: {safe(steps)}. Runs active: {active}.")
    click.echo("The engine is up. Ctrl-C drains it.")


def _printer(as_json: bool) -> Callable[[RunRecord, Entry], None]:
    from durable.cli.shape import entry_shape
    from durable.cli.view import EventPrinter, short_id

    def json_line(run: RunRecord, entry: Entry) -> None:
        show_json(entry_shape(run.id, entry) | {"workflow": run.workflow, "version": run.version}, indent=None)

    if as_json:
        return json_line
    return EventPrinter(console(), lambda run: f"{short_id(run.id)} {run.workflow}@{run.version}")
