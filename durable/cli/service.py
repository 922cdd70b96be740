"""What `dev`, `serve` and `worker --pure` share: an app or none, its settings from outside, its engine, its HTTP server, and
the order in which they stop."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from durable.cli.node import DEFAULT_STORE, private_server
from durable.cli.output import Exit, Problem
from durable.cli.target import load_app
from durable.cli.text import safe

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.module.application import Application
    from durable.server.connections import HttpServer
    from durable.server.settings import ServerSettings
    from durable.store.interface import Store


class ServiceNode:
    """One process of the service."""

    def __init__(
        self,
        target: str | None,
        found: Durable | Application,
        durable: Durable,
        place: Store | str,
        settings: ServerSettings,
    ) -> None:
        self.target = target
        self.found = found
        self.durable = durable
        self.settings = settings
        self._place = place

    @classmethod
    async def load(cls, target: str | None, store: str | None, settings: ServerSettings) -> ServiceNode:
        """The app that `target` means, or one without workflows; on the store that was named first: on the command line, in
        the settings, by the app. Raises Problem."""
        from durable.app import Durable

        found = load_app(target) if target else Durable(DEFAULT_STORE)
        durable = found if isinstance(found, Durable) else await found.prepare()
        _apply(settings, durable)
        return cls(target, found, durable, store or settings.database_url or durable.store, settings)

    def place(self) -> AbstractContextManager[Any]:
        """The store, or its URL; a private server runs while it is entered."""
        if not isinstance(self._place, str):
            return nullcontext(self._place)
        return private_server(self._place, Path(self.settings.pg_dir))

    async def open_http(self, *, or_next: int = 0) -> HttpServer | None:
        """Serve the API, once the engine runs. None, with a word, where what it needs is not installed. Raises Problem."""
        settings = self.settings
        try:
            from durable.server.app import create_app
            from durable.server.connections import HttpServer, PortTaken
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "httptools", "websockets"):
                raise
            said = f"The API needs pip install 'durable[service]'. ({safe(error)})"
            if settings.production:
                raise Problem(said, code="no_service", exit=Exit.FAILED) from error
            click.echo(said, err=True)
            return None
        server = HttpServer(create_app(self.durable.engine, settings, local_app=self.name), settings)
        try:
            await server.start(or_next=0 if "port" in settings.given else or_next)
        except PortTaken as error:
            raise Problem(str(error), code="port_taken", exit=Exit.FAILED) from error
        if settings.port not in (0, server.port):
            click.echo(f"Port {settings.port} is taken; the API is on {server.port}.", err=True)
        return server

    @property
    def name(self) -> str | None:
        """What the app in this process is called over HTTP: by its module, or its file."""
        if self.target is None:
            return None
        place = self.target.partition(":")[0].removesuffix(".py")
        return place.replace("\\", "/").rpartition("/")[2].rpartition(".")[2]

    async def stop(self, http: HttpServer | None) -> None:
        """Not ready first, so that nobody sends more; then the engine drains while requests are still answered; then the
        server, and the store last."""
        if http is not None:
            http.drain()
        await self.durable.engine.drain()
        if http is not None:
            await http.stop()
        await self.found.close()


def _apply(settings: ServerSettings, durable: Durable) -> None:
    """What was set from outside goes before what the program says; what was not leaves it alone."""
    import msgspec

    ours = {
        "lease": ("lease_ms", settings.lease_ms / 1000),
        "max_recovery_attempts": ("max_attempts", settings.max_attempts),
        "drain_timeout": ("drain_timeout_ms", settings.drain_timeout_ms / 1000),
        "max_running": ("workers", max(1, settings.workers)),
    }
    changed: dict[str, Any] = {name: value for name, (setting, value) in ours.items() if setting in settings.given}
    if settings.workers == 0:
        durable.role = "api"
        changed["execute"] = False
    durable.settings = msgspec.structs.replace(durable.settings, **changed)
