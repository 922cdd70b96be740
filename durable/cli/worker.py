"""`durable worker`: an app's steps served in the foreground to engines elsewhere, with a line for each task; or, with
`--pure`, an engine that executes runs and has no API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from durable.cli.node import json_option
from durable.cli.output import EXIT_HELP, show_json
from durable.cli.target import closing, load_app, logs_to_stderr, stop_signals
from durable.cli.text import safe, shown_url, span

if TYPE_CHECKING:
    from durable.transports.interface import Concurrency
    from durable.worker.worker import Done, Worker

DRAINING = "Draining: tasks under way finish, what does not is given back."
FORCED = "Stopped at once. Tasks that were under way will run again."


@click.command(epilog=EXIT_HELP)
@click.argument("app", metavar="[MODULE:APP]", required=False)
@click.option(
    "--transport",
    "transports",
    metavar="[NAME=]URL",
    multiple=True,
    envvar="DURABLE_TRANSPORT",
    show_envvar=True,
    help="Where tasks come from, the same as the engines': redis://host, bullmq://host, sqs://region, "
    "postgresql://user@host/database, sqlite:///file.db, amqp://host. Several by name. Default: the app's own.",
)
@click.option(
    "--control-plane",
    metavar="URL",
    envvar="DURABLE_CONTROL_PLANE",
    show_envvar=True,
    help="Where cancels are heard and progress is told, if not over the first transport.",
)
@click.option(
    "--partition",
    metavar="NAME",
    envvar="DURABLE_PARTITION",
    show_envvar=True,
    help="Serve only tasks for this group of workers.",
)
@click.option(
    "--concurrency",
    metavar="N|auto",
    default="16",
    show_default=True,
    envvar="DURABLE_CONCURRENCY",
    show_envvar=True,
    help="Tasks at once on each transport; auto: up to 64, as memory allows.",
)
@click.option(
    "--drain-timeout",
    metavar="DURATION",
    envvar="DURABLE_DRAIN_TIMEOUT",
    show_envvar=True,
    help="How long tasks under way may go on after the first Ctrl-C. Default: the app's own, 15s.",
)
@click.option(
    "--prefix",
    metavar="TEXT",
    envvar="DURABLE_PREFIX",
    show_envvar=True,
    help="What names of queues, keys and tables begin with, where the URL does not say. Default: durable.",
)
@click.option(
    "--namespace",
    metavar="TEXT",
    envvar="DURABLE_NAMESPACE",
    show_envvar=True,
    help="Added to the prefix: who serves one namespace does not see the tasks of another.",
)
@click.option(
    "--workflows",
    "hosts",
    is_flag=True,
    help="Host the app's workflows too, for engines that know them by remote_workflow.",
)
@click.option(
    "--pure",
    is_flag=True,
    help="Capacity only: an engine on the store that executes runs, those of the app given here and of remote apps. No API.",
)
@click.option(
    "--store",
    metavar="URL",
    envvar="DURABLE_STORE",
    show_envvar=True,
    help="With --pure: where the runs are; or DATABASE_URL.",
)
@click.option("--config", metavar="FILE", type=click.Path(dir_okay=False), help="With --pure: settings in TOML.")
@json_option
def worker(
    app: str | None,
    transports: Sequence[str],
    control_plane: str | None,
    partition: str | None,
    concurrency: str,
    drain_timeout: str | None,
    prefix: str | None,
    namespace: str | None,
    hosts: bool,
    pure: bool,
    store: str | None,
    config: str | None,
    as_json: bool,
) -> None:
    """Serve an app's steps to engines in other processes: no engine and no store in here.

    MODULE:APP names a module (or a .py file) and the Durable object or root module class in it; ":APP" may be left out
    when there is only one. Its workflows are not run here, unless they are hosted, and its store is not opened.

    Ctrl-C or SIGTERM drains: no new task is taken, those under way finish, and what does not finish in time is given back.
    A second one stops at once; nothing is lost then either, but the tasks run again elsewhere.

    With --pure it is an engine without an API: more capacity beside `durable serve`, on the same store.

    \b
    Examples:
      durable worker orders:app --transport redis://localhost
      durable worker shop:AppModule --transport bullmq://localhost --concurrency auto
      durable worker orders.py --transport fast=redis://localhost --transport slow=sqs://eu-west-1
      durable worker orders:app --transport sqs://eu-west-1 --control-plane postgresql://app@db/app
      durable worker --pure --store postgresql://app@db/app
    """
    if pure:
        if transports or control_plane or partition or hosts or prefix or namespace:
            raise click.UsageError("--pure executes runs; it takes --store and --config, and no transports.")
        from durable.cli.capacity import capacity

        capacity(app, store, config, drain_timeout, as_json)
        return
    if app is None:
        raise click.UsageError("Give MODULE:APP, whose steps to serve; or --pure for an engine without an API.")
    options: dict[str, Any] = {
        "control_plane": control_plane,
        "partition": partition,
        "concurrency": _concurrency(concurrency),
        "drain_timeout": drain_timeout,
        "transport_options": {"prefix": prefix, "namespace": namespace},
        "hosts": hosts,
    }
    if transports:
        options["transports"] = _named(transports)
    elif prefix or namespace:
        raise click.UsageError("--prefix and --namespace are for a --transport given here.")
    given = {name: value for name, value in options.items() if value is not None}
    asyncio.run(_worker(app, given, as_json))


async def _worker(target: str, options: dict[str, Any], as_json: bool) -> None:
    from durable.app import Durable

    found = load_app(target)
    logs_to_stderr()
    with stop_signals(as_json, DRAINING, FORCED) as stopping:
        async with closing(found):
            durable = found if isinstance(found, Durable) else await found.prepare()
            durable.as_worker(**options, on_done=_printer(as_json))
            async with found:
                _greet(durable.worker, options.get("transports", {}), as_json)
                await stopping.wait()
                counts = durable.worker.counts
    if as_json:
        show_json({"kind": "stopped", "tasks": counts}, indent=None)
    else:
        told = ", ".join(f"{count} {outcome.replace('_', ' ')}" for outcome, count in sorted(counts.items()))
        click.echo(f"Stopped. Tasks: {told or 'none'}. What was given back runs elsewhere.")


def _named(given: Sequence[str]) -> dict[str, str]:
    """`name=URL`, or the URL alone for the only one."""
    found: dict[str, str] = {}
    for text in given:
        name, separator, url = text.partition("=")
        if not separator or ":" in name or "/" in name:
            name, url = "default", text
        if name in found:
            raise click.UsageError(
                f"Two transports are called {safe(name)}. Give each a name: --transport fast=redis://..."
            )
        found[name] = url
    return found


def _concurrency(text: str) -> Concurrency:
    from durable.worker.adaptive import Adaptive

    if text == "auto":
        return Adaptive()
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise click.UsageError(f"--concurrency is a number from 1, or auto, not {safe(text)}.")


def _greet(worker: Worker, urls: Mapping[str, str], as_json: bool) -> None:
    steps = [step.name for step in worker.registry.steps() if not step.needs_instance]
    hosted = list(dict.fromkeys(flow.name for flow in worker.workflows.workflows() if flow.hosting is None))
    if as_json:
        members = {name: one.capabilities.name for name, one in worker.transports.items()}
        line = {"kind": "started", "worker": worker.id, "steps": steps, "workflows": hosted, "transports": members}
        show_json(line, indent=None)
        return
    from durable import __version__

    over = ", ".join(
        f"{safe(name)} ({shown_url(urls[name]) if name in urls else safe(one.capabilities.name)})"
        for name, one in worker.transports.items()
    )
    click.echo(f"Durable {__version__}, worker {worker.id[:8]}, over {over}.")
    hosts = f" Workflows hosted: {safe(', '.join(hosted))}." if hosted else ""
    served = safe(", ".join(steps)) or "none"
    click.echo(f"Steps served: {served}.{hosts} Waiting at: {safe(', '.join(worker.groups))}.")
    for name, one in worker.transports.items():
        if not one.capabilities.shared:
            click.echo(
                f"Warning: transport {safe(name)} stays inside this process, so no engine elsewhere will send a task. Give "
                "--transport, the same as the engines'.",
                err=True,
            )
    click.echo("The worker is up. Ctrl-C drains it.")


def _printer(as_json: bool) -> Callable[[Done], None]:
    from durable.cli.view import short_id

    def json_line(done: Done) -> None:
        task = done.task
        line = {
            "kind": "task",
            "name": task.name,
            "runId": task.run_id,
            "id": task.id,
            "attempt": task.attempt,
            "ms": round(done.seconds * 1000, 1),
            "outcome": done.outcome,
        }
        if done.error is not None:
            line["error"] = {"code": done.error.code, "message": done.error.message}
        show_json(line, indent=None)

    def line(done: Done) -> None:
        task = done.task
        why = f": {done.error.line}" if done.error is not None else ""
        took = span(int(done.seconds * 1_000_000))
        outcome = done.outcome.replace("_", " ")
        click.echo(safe(f"{short_id(task.run_id)} {task.name}  attempt {task.attempt}  {took}  {outcome}{why}"))

    return json_line if as_json else line
