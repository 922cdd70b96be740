"""`durable runner`: an app's workflows run here, for engines elsewhere: by dialling one, or by serving its calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import click

from durable.cli.node import json_option
from durable.cli.output import EXIT_HELP, Problem, show_json
from durable.cli.target import closing, load_app, logs_to_stderr, stop_signals
from durable.cli.text import safe, shown_url

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.module.application import Application
    from durable.runners.connecting import Connecting
    from durable.runners.serving import Serving

DRAINING = "Draining: passes under way finish, no new one is begun."
FORCED = "Stopped at once. What was under way is asked for again."
_DRIVERS = ("websockets", "httpx2", "uvicorn", "httptools")


@click.command(epilog=EXIT_HELP)
@click.argument("app", metavar="MODULE:APP")
@click.option(
    "--connect",
    "dials",
    metavar="URL",
    envvar="DURABLE_URL",
    show_envvar=True,
    help="Dial the engine at this base URL, wss://host; for apps that nobody can reach.",
)
@click.option(
    "--serve",
    "listens",
    metavar="[HOST]:PORT",
    help="Listen, and let the engine call. With --url and --engine it checks in by itself.",
)
@click.option(
    "--as",
    "workspace",
    metavar="APP",
    envvar="DURABLE_APP",
    show_envvar=True,
    required=True,
    help="The app it is a runner of, with its environment: shop.dev.",
)
@click.option("--key", metavar="KEY", envvar="DURABLE_KEY", show_envvar=True, help="The app's key.")
@click.option(
    "--name",
    metavar="NAME",
    envvar="DURABLE_RUNNER",
    show_envvar=True,
    help="What runs can be pinned to. Default: one for this process.",
)
@click.option("--url", metavar="URL", envvar="DURABLE_RUNNER_URL", show_envvar=True, help="Where --serve is reached.")
@click.option("--engine", metavar="URL", help="With --serve: the engine to check in with, its base URL.")
@click.option(
    "--concurrency", metavar="N", type=click.IntRange(1), default=64, show_default=True, help="Passes at once."
)
@click.option(
    "--drain-timeout",
    metavar="DURATION",
    envvar="DURABLE_DRAIN_TIMEOUT",
    show_envvar=True,
    default="15s",
    show_default=True,
    help="How long passes under way may go on after the first Ctrl-C.",
)
@json_option
def runner(
    app: str,
    dials: str | None,
    listens: str | None,
    workspace: str,
    key: str | None,
    name: str | None,
    url: str | None,
    engine: str | None,
    concurrency: int,
    drain_timeout: str,
    as_json: bool,
) -> None:
    """Run an app's workflows here, for an engine elsewhere that keeps their state: no engine and no store in here.

    MODULE:APP names a module (or a .py file) and the Durable object or root module class in it; ":APP" may be left out
    when there is only one. Say --connect or --serve; where runners live is told by DURABLE_REGION.

    Ctrl-C or SIGTERM drains: passes under way finish. A second one stops at once; nothing is lost then either, but what
    was under way is asked for again.

    \b
    Examples:
      durable runner orders:app --connect wss://durable.example --as orders.prod
      durable runner shop:AppModule --serve :8080 --as shop.dev --url https://shop.example --engine https://durable.example
    """
    if listens is not None and click.get_current_context().get_parameter_source("dials") != _GIVEN:
        dials = None  # the variable is for whoever dials
    if (dials is None) == (listens is None):
        raise click.UsageError("Say how the engine and this runner meet: --connect URL, or --serve HOST:PORT.")
    if dials is not None and (url or engine):
        raise click.UsageError("--url and --engine are for --serve: who dials need not be reached.")
    options: dict[str, Any] = {
        "app": workspace,
        "key": key,
        "runner": name,
        "concurrency": concurrency,
        "drain_timeout": drain_timeout,
    }
    try:
        asyncio.run(_runner(app, dials, listens, options, {"url": url, "engine": engine}, as_json))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _DRIVERS:
            raise
        raise Problem(f"A runner needs {error.name}: pip install 'durable[service]'.", code="no_service") from None


_GIVEN = click.core.ParameterSource.COMMANDLINE


async def _runner(
    target: str,
    dials: str | None,
    listens: str | None,
    options: dict[str, Any],
    serving: dict[str, Any],
    as_json: bool,
) -> None:
    found = load_app(target)
    logs_to_stderr()
    with stop_signals(as_json, DRAINING, FORCED) as stopping:
        async with closing(found):
            if dials is not None:
                await _connect(found, dials, options, stopping, as_json)
            else:
                assert listens is not None
                await _serve(found, listens, options | serving, stopping, as_json)
    if as_json:
        show_json({"kind": "stopped"}, indent=None)
    else:
        click.echo("Stopped. Runs go on with another runner, or with this one when it is back.")


async def _connect(
    found: Durable | Application, url: str, options: dict[str, Any], stopping: asyncio.Event, as_json: bool
) -> None:
    from durable.runners.connecting import connect

    def told(state: str) -> None:
        if as_json:
            show_json({"kind": state}, indent=None)
        else:
            click.echo(f"{state.capitalize()}.")

    async with connect(found, url, on_state=told, **options) as one:
        _greet(one, {"connect": shown_url(url)}, as_json)
        await stopping.wait()


async def _serve(
    found: Durable | Application, place: str, options: dict[str, Any], stopping: asyncio.Event, as_json: bool
) -> None:
    import uvicorn

    from durable.runners.serving import serve

    host, port = _place(place)
    one = serve(found, **options)
    config = uvicorn.Config(
        one, host=host, port=port, lifespan="off", log_level="warning", timeout_graceful_shutdown=None, access_log=False
    )
    async with _listening(config) as url, one:
        _greet(one, {"serve": url}, as_json)
        if one.runner.key is None and not as_json:
            click.echo("Warning: without --key whoever reaches this runner can have its steps run.", err=True)
        await stopping.wait()


@asynccontextmanager
async def _listening(config: Any) -> AsyncIterator[str]:
    """A server whose signals are ours: left, it takes no new connection, and ends when those under way have been answered."""
    import uvicorn

    server = uvicorn.Server(config)
    config.load()
    try:
        socket = config.bind_socket()
    except SystemExit:
        raise Problem(
            f"{config.host}:{config.port} cannot be listened on. Is it taken? Give --serve another port.",
            code="port_taken",
        ) from None
    work = asyncio.get_running_loop().create_task(server._serve([socket]))
    try:
        host, port = socket.getsockname()[:2]
        yield f"http://{host if ':' not in host else f'[{host}]'}:{port}"
    finally:
        server.should_exit = True
        await work
        socket.close()


def _place(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise click.UsageError(f"--serve is HOST:PORT, or :PORT, not {safe(text)}.")
    return host.strip("[]") or "0.0.0.0", int(port)


def _greet(one: Connecting | Serving, where: dict[str, str], as_json: bool) -> None:
    made = one.runner
    if as_json:
        line = {"kind": "started", "app": made.app, "runner": made.name, "workflows": made.workflows, **where}
        show_json(line, indent=None)
        return
    from durable import __version__

    how, url = next(iter(where.items()))
    verb = "dials" if how == "connect" else "is called at"
    click.echo(f"Durable {__version__}, runner {safe(made.name)} of {safe(made.app)}, {verb} {safe(url)}.")
    click.echo(f"Workflows: {safe(', '.join(made.workflows))}.")
    click.echo("The runner is up. Ctrl-C drains it.")
