"""`durable dev`: an app's engine in the foreground, and a line for everything that happens in its store."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from durable.cli.node import DEFAULT_STORE, json_option, private_server
from durable.cli.output import EXIT_HELP, Exit, Problem, console, show_json
from durable.cli.text import safe, shown_url

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.core.journal import Entry
    from durable.module.application import Application
    from durable.store.interface import Capabilities, Store
    from durable.store.records import RunRecord

LOOK_EVERY = 0.1
"""Seconds between two looks at the store."""
SAME_FOR = 2.0
"""Seconds for which a log line is not said again."""


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
    _logs_to_stderr()
    async with _closing(found):
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

    stopping = _stop_signals(as_json)
    opened = open_store(place)
    # What happens is read through a node of its own, so that the last rows of a drain are seen too.
    looker = Durable(open_store(place) if opened.capabilities.shared else opened, worker=False)
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


@asynccontextmanager
async def _closing(app: Durable | Application | None) -> AsyncIterator[None]:
    """Whatever happens before it runs, providers that were started are stopped."""
    try:
        yield
    finally:
        if app is not None:
            await app.close()


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


def _stop_signals(as_json: bool) -> asyncio.Event:
    """Set at the first Ctrl-C or SIGTERM; the second ends the process at once."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():
            click.echo("Stopped at once. Steps that were running will run again.", err=True)
            sys.stdout.flush()
            os._exit(Exit.INTERRUPTED)
        if not as_json:
            click.echo(
                "\nDraining: steps under way finish, runs are handed over. Ctrl-C again stops at once.", err=True
            )
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
    return stopping


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
    steps = ", ".join(step.name for step in app.registry.steps()) or "none"
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


def _logs_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s  %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    # It tells of every connection and every attempt while a server is away; the engine tells it once.
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_not_twice())


def _not_twice() -> Callable[[logging.LogRecord], bool]:
    """Lets a line pass unless it has just been said: the app and the node that looks beside it have the same troubles."""
    said: dict[tuple[str, str], float] = {}

    def fresh(record: logging.LogRecord) -> bool:
        line = (record.name, record.getMessage())
        last = said.get(line, float("-inf"))
        if len(said) > 100:
            said.clear()
        said[line] = record.created
        return record.created - last > SAME_FOR or record.exc_info is not None

    return fresh


# ------------------------------------------------------------------ finding the app


def load_app(target: str) -> Durable | Application:
    """The app that `module:name`, `module` or `file.py` means: a Durable object, or one made of a root module class.

    Raises Problem; DefinitionError if its modules do not fit together.
    """
    return _app(_load(target))


def load_module_app(target: str) -> Application:
    """An app made of modules. Raises Problem if it is a Durable object, which has none."""
    app = load_app(target)
    from durable.module.application import Application

    if not isinstance(app, Application):
        raise Problem(
            f"{safe(target)} is a Durable object; it has no modules to show. Give a root module class: @module(...).",
            code="no_app",
            exit=Exit.USAGE,
        )
    return app


def _app(found: Any) -> Durable | Application:
    from durable.app import Durable

    if isinstance(found, Durable):
        return found
    from durable.module.application import Application

    return found if isinstance(found, Application) else Application(found)


def _load(target: str) -> Any:
    # A Windows path has a colon too, but never before a plain name at the end.
    place, separator, name = target.rpartition(":")
    if not separator or "/" in name or "\\" in name:
        place, name = target, ""
    module = _import(place, target)
    if name:
        app = getattr(module, name, None)
        if not _is_app(app):
            what = "is not there" if app is None else f"is a {type(app).__name__}, not a Durable or a module class"
            raise Problem(
                f"{safe(place)} was imported, but its {safe(name)} {what}.{_known(module)}",
                code="no_app",
                exit=Exit.USAGE,
            )
        return app
    apps = _apps(module)
    if "app" in apps:
        return apps["app"]
    if len({id(app) for app in apps.values()}) != 1:
        raise Problem(
            f"{safe(place)} has {'no Durable object' if not apps else 'more than one'}; "
            f"{'make one: `app = Durable()`' if not apps else 'say which: ' + ', '.join(f'{place}:{n}' for n in apps)}.",
            code="no_app",
            exit=Exit.USAGE,
        )
    return next(iter(apps.values()))


def _apps(module: ModuleType) -> dict[str, Any]:
    """Durable objects, applications, and module classes that no other in the file imports."""
    found = {name: value for name, value in vars(module).items() if _is_app(value) and not _is_ours(value)}
    imported = {
        id(other)
        for value in found.values()
        for other in getattr(getattr(value, "__durable_module__", None), "imports", ())
    }
    return {name: value for name, value in found.items() if id(value) not in imported}


def _is_app(value: Any) -> bool:
    from durable.app import Durable

    if isinstance(value, Durable) or "__durable_module__" in getattr(value, "__dict__", ()):
        return True
    modules = sys.modules.get("durable.module.application")  # who has not imported it has none
    return modules is not None and isinstance(value, modules.Application)


def _is_ours(value: Any) -> bool:
    return isinstance(value, type) and value.__module__.partition(".")[0] == "durable"


def _known(module: ModuleType) -> str:
    names = list(_apps(module))
    return f" It has: {', '.join(names)}." if names else " No Durable object is in it: `app = Durable()` makes one."


def _import(place: str, target: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not path.is_file():
            raise Problem(f"There is no file {safe(place)}.", code="no_app", exit=Exit.USAGE)
        sys.path.insert(0, str(path.parent))
        return importlib.import_module(path.stem)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(error.name + ".")):
            raise Problem(
                f"There is no module {safe(error.name)} to import from {here}. Give MODULE:APP, or a path to a .py file.",
                code="no_app",
                exit=Exit.USAGE,
            ) from None
        raise _broken(target, error) from error
    except Exception as error:
        if isinstance(error, Problem):
            raise
        raise _broken(target, error) from error


def _broken(target: str, error: BaseException) -> Problem:
    """The author's module does not import: say where, in its own words."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    ours = Path(__file__).parents[1]
    theirs = [frame for frame in frames if not Path(frame.filename).is_relative_to(ours)] or frames
    place = f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" at {error.filename}:{error.lineno}"
    return Problem(
        f"{safe(target)} cannot be imported: {type(error).__name__}: {safe(error)}{safe(place)}", code="no_app"
    )
