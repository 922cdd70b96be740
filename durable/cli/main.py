"""`durable`: the entry, and what all commands share: help, version, errors as one sentence, exit codes."""

from __future__ import annotations

from typing import Any

import click

from durable import __version__
from durable.cli import actions, bulk  # noqa: F401 - they add their commands to `durable runs`
from durable.cli.dev import dev
from durable.cli.doctor import doctor
from durable.cli.events import events
from durable.cli.flow import flow
from durable.cli.modules import modules
from durable.cli.output import EXIT_HELP, Exit, Problem
from durable.cli.remote import exit_of
from durable.cli.runner import runner
from durable.cli.runs import runs
from durable.cli.schedules import schedules
from durable.cli.serve import serve
from durable.cli.worker import worker


class Cli(click.Group):
    """Turns what a user can cause into a sentence and an exit code; only our own mistakes show a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            raise click.exceptions.Exit(Exit.INTERRUPTED) from None
        except Exception as error:
            problem = _problem(error)
            if problem is None:
                raise
            raise problem from error


def _problem(error: Exception) -> Problem | None:
    """What a user can cause, as a sentence; None for our own mistakes."""
    from durable.core import errors

    if not isinstance(error, errors.DurableError):
        return None
    exit = Exit.FAILED
    message = str(error)
    if isinstance(error, errors.RunNotFound):
        exit = Exit.NOT_FOUND
    elif isinstance(error, errors.RunFinished | errors.IdempotencyConflict | errors.RunActive | errors.ForkRefused):
        exit = Exit.REFUSED
    elif isinstance(error, errors.StoreError):
        exit = Exit.STORE
        if isinstance(error, errors.StoreRestored):
            message += ". Here: durable doctor --accept-restore"
    elif isinstance(error, errors.PayloadError):
        exit = Exit.USAGE
    elif isinstance(status := getattr(error, "status", None), int):  # a service has said it
        exit = exit_of(status)
    return Problem(message, code=error.code, exit=exit)


@click.group(
    cls=Cli, epilog=EXIT_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="durable", message="%(prog)s %(version)s")
def cli() -> None:
    """Workflows that survive crashes.

    \b
      durable dev orders:app           run an engine and its API here, and watch it work
      durable serve orders:app         the same in production
      durable worker orders:app        serve an app's steps to engines elsewhere
      durable runner orders:app        run an app's workflows for an engine elsewhere
      durable runs list                what runs there are
      durable runs show 7f3a           one run: its state, its timeline, its errors
      durable events send NAME         send an event, see what it starts
      durable schedules list           what starts by the clock
      durable flow                     limits, their use and what queues behind them
      durable modules shop:AppModule   what an app is made of
      durable doctor                   is everything all right, and if not, what to do
    """


cli.add_command(dev)
cli.add_command(serve)
cli.add_command(worker)
cli.add_command(runner)
cli.add_command(runs)
cli.add_command(events)
cli.add_command(schedules)
cli.add_command(flow)
cli.add_command(doctor)
cli.add_command(modules)


def main() -> None:
    """The `durable` script."""
    cli(prog_name="durable")
