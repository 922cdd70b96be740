"""A service to ask over HTTP: which one, with which key, about which app."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from durable.cli.output import Exit

if TYPE_CHECKING:
    from datetime import datetime

    from durable.client import Client

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_URL = "http://127.0.0.1:3030"


def service_options(command: F) -> F:
    """--url, --key and --app."""
    for option in (
        click.option(
            "--app",
            metavar="NAME",
            envvar="DURABLE_APP",
            show_envvar=True,
            help="Which app, where there is no key that says it: in development.",
        ),
        click.option("--key", metavar="KEY", envvar="DURABLE_KEY", show_envvar=True, help="A key of the app's."),
        click.option(
            "--url",
            metavar="URL",
            envvar="DURABLE_URL",
            show_envvar=True,
            default=DEFAULT_URL,
            show_default=True,
            help="Where the service is; `durable dev` says it.",
        ),
    ):
        command = option(command)
    return command


def open_service(url: str, key: str | None, app: str | None = None) -> Client:
    """A client of the service at this URL."""
    from durable.client import Client

    base = url.replace("ws://", "http://", 1).replace("wss://", "https://", 1)
    if not base.startswith(("http://", "https://")):
        raise click.UsageError("--url is where a service is, like http://127.0.0.1:3030.")
    return Client(base, key=key, app=app)


def micros(moment: datetime | None) -> int | None:
    """A time of the client's as stored ones are: µs since the epoch."""
    return None if moment is None else round(moment.timestamp() * 1_000_000)


def exit_of(status: int) -> Exit:
    """What the shell is told where a service refuses with this status; 0: it did not answer."""
    if status == 404:
        return Exit.NOT_FOUND
    if status in (401, 403, 409, 410):
        return Exit.REFUSED
    if status == 0 or status == 429 or status >= 500:
        return Exit.STORE
    return Exit.USAGE
