"""What `dev` and `worker` share: finding the app that `MODULE:APP` means, how it is stopped, where its logs go."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import sys
import traceback
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from durable.cli.output import Exit, Problem
from durable.cli.text import safe

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.module.application import Application

SAME_FOR = 2.0
"""Seconds for which a log line is not said again."""


@asynccontextmanager
async def closing(app: Durable | Application | None) -> AsyncIterator[None]:
    """Whatever happens before it runs, providers that were started are stopped."""
    try:
        yield
    finally:
        if app is not None:
            await app.close()


@contextmanager
def stop_signals(as_json: bool, draining: str, forced: str) -> Iterator[asyncio.Event]:
    """Set at the first Ctrl-C or SIGTERM; the second ends the process at once. With a line for each."""
    from durable.worker.stopping import stop_signals as signals

    def say() -> None:
        if not as_json:
            click.echo(f"\n{draining} Ctrl-C again stops at once.", err=True)

    with signals(say, lambda: click.echo(forced, err=True)) as stopping:
        yield stopping


def logs_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s  %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    # They tell of every connection and every attempt while a server is away; the engine tells it once.
    for name in ("psycopg.pool", "aiormq.connection"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # that it starts and stops, we say ourselves
    logging.getLogger("aiobotocore.credentials").setLevel(logging.WARNING)  # where it found some is no news
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # each call of a runner would be a line
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
    asyncios = Path(asyncio.__file__).parent
    theirs = [
        frame for frame in frames if not any(Path(frame.filename).is_relative_to(folder) for folder in (ours, asyncios))
    ] or frames
    place = f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" at {error.filename}:{error.lineno}"
    if isinstance(error, RuntimeError) and str(error).startswith("asyncio.run() cannot be called"):
        place += '. It starts something of its own when imported: put that under `if __name__ == "__main__":`'
        # What was to be run is thrown away with the traceback; that it was never awaited is no news.
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    return Problem(
        f"{safe(target)} cannot be imported: {type(error).__name__}: {safe(error)}{safe(place)}", code="no_app"
    )
