"""Settings of the service: one table. A file (TOML) is overridden by the environment, and that by the command line.

A row is a field of `ServerSettings` and its `Setting`; nothing is read from the environment anywhere else.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Struct

from durable.core.errors import DefinitionError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Setting(Struct, frozen=True):
    """What a row of the table says beside name, type and default."""

    env: str
    meaning: str
    production: Any = msgspec.UNSET
    """The default of `durable serve`, where it is another."""
    secret: bool = False


class ServerSettings(Struct, frozen=True, kw_only=True):
    """How the service behaves. Durations are milliseconds, as their names say; sizes are bytes."""

    host: Annotated[str, Setting("DURABLE_HOST", "Address to listen on.", production="0.0.0.0")] = "127.0.0.1"
    port: Annotated[int, Setting("PORT", "Port to listen on; 0 takes a free one.")] = 3030
    database_url: Annotated[
        str | None,
        Setting(
            "DATABASE_URL",
            "Where the runs are. None: the app's own store, or `sqlite:///.durable/durable.db`. `postgres`: a private "
            "server. `--store` and `DURABLE_STORE` go first.",
            secret=True,
        ),
    ] = None
    pg_dir: Annotated[str, Setting("DURABLE_PG_DIR", "Folder of the private Postgres.")] = ".durable/postgres"
    pg_port: Annotated[
        int | None,
        Setting(
            "DURABLE_PG_PORT",
            "Taken and without effect: the private Postgres has no TCP port, only a socket in its folder, so none is open.",
        ),
    ] = None
    workers: Annotated[
        int, Setting("DURABLE_WORKERS", "Runs this process drives at once. 0: it serves the API and executes none.")
    ] = 1_000
    lease_ms: Annotated[
        int,
        Setting("DURABLE_LEASE_MS", "How long this engine's heartbeat is good for; a call to an app is bounded by it."),
    ] = 10_000
    max_attempts: Annotated[
        int, Setting("DURABLE_MAX_ATTEMPTS", "Crashes in a row, without progress between, after which a run is dead.")
    ] = 3
    drain_timeout_ms: Annotated[
        int, Setting("DURABLE_DRAIN_TIMEOUT_MS", "How long a stopping process waits for what is under way.")
    ] = 15_000
    admin_token: Annotated[
        str | None,
        Setting(
            "DURABLE_ADMIN_TOKEN",
            "The bearer token that may create workspaces and rotate keys. None: nobody may, but in `durable dev` on "
            "loopback anybody here.",
            secret=True,
        ),
    ] = None
    env: Annotated[
        str,
        Setting(
            "DURABLE_ENV",
            "`dev`, `acc` or `prod`: which environment workspaces are of that name none.",
            production="prod",
        ),
    ] = "dev"
    app_url: Annotated[
        str | None,
        Setting(
            "DURABLE_APP_URL",
            "In development: the URL of an app whose functions are asked for there, and again when they change. Its SDK "
            "has discovery on.",
        ),
    ] = None
    max_body: Annotated[int, Setting("DURABLE_MAX_BODY", "Bytes a request's body may have.")] = 1 << 20
    max_headers: Annotated[int, Setting("DURABLE_MAX_HEADERS", "Headers a request may have.")] = 100
    max_header_bytes: Annotated[
        int, Setting("DURABLE_MAX_HEADER_BYTES", "Bytes of a request before its body: its line and all headers.")
    ] = 32 << 10
    header_timeout_ms: Annotated[
        int, Setting("DURABLE_HEADER_TIMEOUT_MS", "How long a connection may take to say what it wants.")
    ] = 10_000
    body_timeout_ms: Annotated[int, Setting("DURABLE_BODY_TIMEOUT_MS", "How long a body may take to arrive.")] = 20_000
    keep_alive_ms: Annotated[
        int, Setting("DURABLE_KEEP_ALIVE_MS", "How long a connection may rest between two requests.")
    ] = 15_000
    max_connections: Annotated[int, Setting("DURABLE_MAX_CONNECTIONS", "Connections open at once.")] = 10_000
    max_streams: Annotated[
        int, Setting("DURABLE_MAX_STREAMS", "Streams (SSE) one key, or one peer, may hold open.")
    ] = 200
    rate: Annotated[float, Setting("DURABLE_RATE", "Requests a second of one key, or of one peer without one.")] = (
        1_000.0
    )
    burst: Annotated[int, Setting("DURABLE_BURST", "Requests a key may make at once before its rate counts.")] = 2_000
    trusted_proxies: Annotated[
        str,
        Setting(
            "DURABLE_TRUSTED_PROXIES",
            "Addresses or networks, with commas, of proxies whose `X-Forwarded-For` is believed. Peers are counted by it.",
        ),
    ] = ""
    node_url: Annotated[
        str | None,
        Setting(
            "DURABLE_NODE_URL",
            "Where other engines on the same store reach this one's port: `http://10.0.0.7:3030`. None: in development "
            "here; in production runners that dial in serve only runs of the engine they are connected to.",
        ),
    ] = None
    private_calls: Annotated[
        bool,
        Setting(
            "DURABLE_PRIVATE_CALLS",
            "Whether apps and webhooks in private networks and on this machine may be called; in development they may.",
        ),
    ] = False
    refused_rate: Annotated[
        float, Setting("DURABLE_REFUSED_RATE", "Wrong credentials a second of one peer; above, 429 for that peer.")
    ] = 5.0
    refused_burst: Annotated[
        int, Setting("DURABLE_REFUSED_BURST", "Wrong credentials a peer may send at once before its rate counts.")
    ] = 50
    rotation_ms: Annotated[
        int, Setting("DURABLE_ROTATION_MS", "How long a key stays good after a rotation that does not say.")
    ] = 86_400_000
    stream_keepalive_ms: Annotated[
        int, Setting("DURABLE_STREAM_KEEPALIVE_MS", "A comment on a silent stream, so that nothing between closes it.")
    ] = 15_000

    given: frozenset[str] = frozenset()
    """Those that somebody has set, and are no defaults."""
    production: bool = False
    """`durable serve`: no conveniences. Not a setting: the command says it."""


@cache
def table() -> dict[str, tuple[Setting, Any, Any]]:
    """name → (its row, its type, its default)."""
    hints = get_type_hints(ServerSettings, include_extras=True)
    defaults = {field.name: field.default for field in msgspec.structs.fields(ServerSettings)}
    return {
        name: (hint.__metadata__[0], hint.__origin__, defaults[name])
        for name, hint in hints.items()
        if hasattr(hint, "__metadata__")
    }


def load_settings(
    given: Mapping[str, Any] | None = None,
    *,
    production: bool = False,
    environ: Mapping[str, str] | None = None,
    config: str | None = None,
) -> ServerSettings:
    """Settings for `durable dev` or, with `production`, `durable serve`. `given`: what the command line says; None is not
    said. `config`: a TOML file, else DURABLE_CONFIG's. Raises DefinitionError naming the setting and where it stands."""
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {"production": production}
    for name, (row, _, _) in table().items():
        if production and row.production is not msgspec.UNSET:
            values[name] = row.production
    path = config or environ.get("DURABLE_CONFIG")
    told: dict[str, Any] = _from_file(Path(path)) if path else {}
    for name, (row, kind, _) in table().items():
        if text := environ.get(row.env, ""):
            told[name] = _value(name, kind, text, f"the environment variable {row.env}")
    for name, value in (given or {}).items():
        if value is not None:
            told[name] = _value(name, table()[name][1], value, "the command line")
    settings = ServerSettings(**(values | told), given=frozenset(told))
    _check(settings)
    return settings


def _from_file(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DefinitionError(f"The settings file {path} cannot be read: {error}") from error
    unknown = sorted(set(found) - set(table()))
    if unknown:
        raise DefinitionError(
            f"The settings file {path} has {', '.join(unknown)}, which is no setting. There are {', '.join(table())}."
        )
    return {name: _value(name, table()[name][1], value, str(path)) for name, value in found.items()}


def _value(name: str, kind: Any, value: Any, place: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=not isinstance(value, str))
    except msgspec.ValidationError as error:
        shown = "" if table()[name][0].secret else f" {value!r}"
        raise DefinitionError(f"Setting {name} in {place} cannot be{shown}: {error}") from None


def _check(settings: ServerSettings) -> None:
    if settings.env not in ("dev", "acc", "prod"):
        raise DefinitionError(f"Setting env is dev, acc or prod, not {settings.env!r}.")
    for name, (_, kind, _) in table().items():
        value = getattr(settings, name)
        if kind in (int, float) and not value >= (0 if name in ("port", "workers") else 1):
            raise DefinitionError(f"Setting {name} is a number from 1, not {value}.")
    if settings.port > 65_535:
        raise DefinitionError(f"Setting port is at most 65535, not {settings.port}.")
    if settings.app_url is not None:
        if settings.production:
            raise DefinitionError(
                "Setting app_url is for `durable dev`. In production an app syncs its functions itself."
            )
        if not settings.app_url.startswith(("http://", "https://")):
            raise DefinitionError(f"Setting app_url begins with http:// or https://, not {settings.app_url!r}.")
    networks(settings)
    if settings.admin_token is not None and len(settings.admin_token) < 16:
        raise DefinitionError("Setting admin_token has at least 16 characters: what is shorter can be guessed.")


def networks(settings: ServerSettings) -> tuple[Network, ...]:
    """The proxies that are believed. Raises DefinitionError."""
    try:
        return tuple(
            ipaddress.ip_network(part.strip(), strict=False)
            for part in settings.trusted_proxies.split(",")
            if part.strip()
        )
    except ValueError as error:
        raise DefinitionError(f"Setting trusted_proxies: {error}. Give addresses or networks: 10.0.0.0/8") from None


def reference() -> str:
    """The table of docs/service.md. A test compares the page with it."""
    lines = [
        "| setting | environment | default | with `durable serve` | meaning |",
        "|---|---|---|---|---|",
    ]
    for name, (row, _, default) in table().items():
        production = "" if row.production is msgspec.UNSET else f"`{row.production}`"
        lines.append(f"| `{name}` | `{row.env}` | `{default}` | {production} | {row.meaning} |")
    return "\n".join(lines)
