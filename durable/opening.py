"""What a URL means: stores, transports and control planes by their address, wherever somebody gives a text for one.

A scheme names the adapter; options stand in the query and are read by the annotations of the adapter's constructor:
`redis://host/0?prefix=shop&namespace=acc&heartbeat_interval=10s`. Only who uses a driver imports it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, cast, get_args, get_type_hints
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from msgspec import Struct

from durable.control_plane.interface import ControlPlane
from durable.control_plane.local import LocalControlPlane
from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError, DurableError, StoreError
from durable.protocol.names import DEFAULT_PREFIX, control, effective_prefix
from durable.store.interface import Store
from durable.store.memory import MemoryStore
from durable.transports.event_emitter import EventEmitterTransport
from durable.transports.interface import Transport
from durable.transports.pool import TransportPool

if TYPE_CHECKING:
    from durable.store.postgres import PostgresStore

_REDIS_OWN = frozenset(
    [
        *("username", "password", "db", "protocol", "client_name", "max_connections", "health_check_interval"),
        *("socket_timeout", "socket_connect_timeout", "socket_keepalive"),
        *("ssl_cert_reqs", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"),
    ]
)
_AMQP_OWN = frozenset(["heartbeat", "name", "cafile", "capath", "certfile", "keyfile", "no_verify_ssl", "auth"])


class _Kind(Struct, frozen=True):
    """What a scheme stands for."""

    module: str
    cls: str
    extra: str
    """What to install: `durable[extra]`."""
    drivers: tuple[str, ...]
    """Packages whose absence `extra` mends."""
    own: frozenset[str] | None = frozenset()
    """Options that stay in the URL, for the driver. None: all that the constructor does not know."""


_REDIS = _Kind("durable.transports.redis", "RedisTransport", "redis", ("redis",), _REDIS_OWN)
_BULLMQ = _Kind("durable.transports.bullmq", "BullMQTransport", "redis", ("bullmq", "redis"), _REDIS_OWN)
_SQS = _Kind("durable.transports.sqs", "SqsTransport", "sqs", ("aiobotocore", "botocore"))
_RABBIT = _Kind("durable.transports.rabbitmq", "RabbitMqTransport", "rabbitmq", ("aio_pika", "aiormq"), _AMQP_OWN)
_DB = _Kind("durable.transports.db", "DbTransport", "postgres", ("psycopg", "psycopg_pool"), None)

TRANSPORTS: Mapping[str, tuple[_Kind, str]] = {
    "redis": (_REDIS, "redis"),
    "rediss": (_REDIS, "rediss"),
    "bullmq": (_BULLMQ, "redis"),
    "bullmqs": (_BULLMQ, "rediss"),
    "bullmq+redis": (_BULLMQ, "redis"),
    "bullmq+rediss": (_BULLMQ, "rediss"),
    "sqs": (_SQS, ""),
    "amqp": (_RABBIT, "amqp"),
    "amqps": (_RABBIT, "amqps"),
    "postgresql": (_DB, "postgresql"),
    "postgres": (_DB, "postgresql"),
    "sqlite": (_DB, "sqlite"),
}
"""Scheme → adapter, and how its driver spells the scheme."""
TRANSPORT_URLS = (
    "redis://host, bullmq://host, sqs://region, postgresql://user@host/database, sqlite:///path/to/file.db, amqp://host"
)
_REDIS_PLANE = _Kind("durable.control_plane.redis", "RedisControlPlane", "redis", ("redis",), _REDIS_OWN)
_POSTGRES_PLANE = _Kind("durable.control_plane.postgres", "PostgresControlPlane", "postgres", _DB.drivers, None)
CONTROL_PLANES: Mapping[str, tuple[_Kind, str]] = {
    "redis": (_REDIS_PLANE, "redis"),
    "rediss": (_REDIS_PLANE, "rediss"),
    "amqp": (_RABBIT, "amqp"),
    "amqps": (_RABBIT, "amqps"),
    "postgresql": (_POSTGRES_PLANE, "postgresql"),
    "postgres": (_POSTGRES_PLANE, "postgresql"),
}
CONTROL_PLANE_URLS = "postgresql://user@host/database, redis://host or amqp://host"
SPELLED = {"endpoint": "endpoint_url"}
"""Options that are called shorter in a URL."""


def open_store(store: Store | str) -> Store:
    """A store by its URL: `memory://`, `sqlite:///path` (three slashes relative, four absolute), or
    `postgresql://user@host/database`. A store is itself.

    Raises DurableError: not known, or its driver is not installed.
    """
    if not isinstance(store, str):
        return store
    if store in ("memory", "memory://"):
        return MemoryStore()
    if store.startswith("sqlite:"):
        from durable.store.sqlite import SqliteStore  # only who uses it loads a driver

        return SqliteStore(store)
    if store.startswith(("postgresql://", "postgres://")):
        return _postgres(store)
    hint = " `postgres` alone is for the command line: durable dev --store postgres." if store == "postgres" else ""
    raise DurableError(
        f"No store is known for {_shown(store)!r}. Give sqlite:///path/to/file.db, postgresql://user@host/database or "
        f"memory://.{hint}"
    )


def _postgres(url: str) -> Store:
    try:
        from durable.store.postgres import PostgresStore
    except ImportError as error:
        # Without its library psycopg raises an ImportError that names nothing.
        if error.name is not None and error.name.partition(".")[0] not in ("psycopg", "psycopg_pool"):
            raise
        raise StoreError(f"A Postgres store needs psycopg: pip install 'durable[postgres]'. ({error})") from error
    return PostgresStore(url)


def open_transport(transport: Transport | str, **options: Any) -> Transport:
    """A transport by its URL. A transport is itself. `options` hold where the adapter has them and the URL says nothing.

    Raises DefinitionError: a scheme or an option there is not, or a driver that is not installed.
    """
    if not isinstance(transport, str):
        return transport
    if transport in ("event-emitter", "event-emitter://"):
        return EventEmitterTransport()
    return cast(Transport, _open(transport, TRANSPORTS, "transport", f"{TRANSPORT_URLS} or event-emitter://", options))


def open_control_plane(plane: ControlPlane | str, **options: Any) -> ControlPlane:
    """A control plane by its URL: `postgresql://user@host/database`, `redis://host/0`, `amqp://host`. A control plane is
    itself. `options` as of `open_transport`. Raises DefinitionError."""
    if not isinstance(plane, str):
        return plane
    known = (
        f"{CONTROL_PLANE_URLS} or a ControlPlane, or leave it out: the first transport or the store's database is used "
        "where it can broadcast"
    )
    return cast(ControlPlane, _open(plane, CONTROL_PLANES, "control plane", known, options))


Transports = Mapping[str, Transport | str] | Sequence[Transport | str]
"""By id, or in a row: then each is called by its kind."""


def by_id(given: Transports, **options: Any) -> dict[str, Transport]:
    """Open transports, in order. In a row they are called by their kind, `redis`, `db`; the second of one kind `redis-2`."""
    if isinstance(given, Mapping):
        return {name: open_transport(one, **options) for name, one in given.items()}
    found: dict[str, Transport] = {}
    for one in given:
        opened = open_transport(one, **options)
        kind = opened.capabilities.name
        same = sum(name == kind or name.startswith(f"{kind}-") for name in found)
        found[f"{kind}-{same + 1}" if same else kind] = opened
    return found


def open_pool(
    given: Transports,
    control_plane: ControlPlane | str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    **pool: Any,
) -> tuple[TransportPool, ControlPlane | None]:
    """The transports, and the control plane that was asked for, if any: one of the transports where it is the same object
    or the same URL. An emitter may have been given to several applications: each has an end of its own, or what one
    registers would outlive it. `options`: of transports by URL; `pool`: of TransportPool."""
    opened = by_id(given, **(options or {}))
    ends = {id(one): one.end() if isinstance(one, EventEmitterTransport) else one for one in opened.values()}
    members = {name: ends[id(one)] for name, one in opened.items()}
    asked = given.values() if isinstance(given, Mapping) else given
    same = next(
        (name for name, one in zip(opened, asked, strict=True) if one is control_plane or one == control_plane), None
    )
    plane: Any = control_plane
    if same is not None and members[same].capabilities.broadcast:
        plane = members[same]
    elif plane is not None:
        plane = open_control_plane(plane, **(options or {}))
    return TransportPool(members, **pool), plane


def default_control_plane(pool: TransportPool, store: Store) -> ControlPlane:
    """The first transport, if it can broadcast to other processes; else the store's own database, if it can; else what
    stays in this process. The store is open."""
    first = pool.control_plane
    if first is not None and next(iter(pool.members.values())).capabilities.shared:
        return first
    if store.capabilities.name == "postgres":
        from durable.control_plane.postgres import PostgresControlPlane
        from durable.store.postgres.channel import channel_name

        postgres = cast("PostgresStore", store)
        if postgres.notifications:
            return PostgresControlPlane(postgres.connect, name=channel_name("control", postgres.schema))
    return first or LocalControlPlane()


# ------------------------------------------------------------------ by URL


def _open(url: str, kinds: Mapping[str, tuple[_Kind, str]], what: str, known: str, wished: Mapping[str, Any]) -> Any:
    parts = urlsplit(url)
    if parts.scheme not in kinds or not url.startswith(parts.scheme + "://"):
        raise DefinitionError(f"No {what} is known for {_shown(url)!r}. Give {known}.")
    kind, spelled = kinds[parts.scheme]
    build = _class(kind, what)
    parameters = _parameters(build)
    options = {name: value for name, value in wished.items() if name in parameters and value is not None}
    named = {name: wished.get(name) for name in ("prefix", "namespace")}
    kept: list[tuple[str, str]] = []
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        name = SPELLED.get(name, name)
        if name in parameters and name != "url":
            options[name] = _value(text, parameters[name], name)
        elif kind is _REDIS_PLANE and name in named:
            named[name] = text
        elif kind.own is None or name in kind.own:
            kept.append((name, text))
        else:
            raise _no_option(name, parameters, kind, what)
    if kind is _REDIS_PLANE and "channel" not in options:
        options["channel"] = control(effective_prefix(named.get("prefix") or DEFAULT_PREFIX, named.get("namespace")))
    if not spelled:  # of sqs:// the place is a region
        if parts.netloc:
            options["region"] = unquote(parts.netloc)
        return build(**options)
    query = f"?{urlencode(kept)}" if kept else ""
    return build(spelled + url.partition("?")[0].removeprefix(parts.scheme) + query, **options)


def _class(kind: _Kind, what: str) -> Any:
    try:
        return getattr(importlib.import_module(kind.module), kind.cls)
    except ImportError as error:
        # Without its library a driver may raise an ImportError that names nothing.
        if error.name is not None and error.name.partition(".")[0] not in kind.drivers:
            raise
        raise DefinitionError(
            f"This {what} needs a driver that is not installed: pip install 'durable[{kind.extra}]'. ({error})"
        ) from error


def _parameters(build: Any) -> dict[str, Any]:
    """Options by name with their annotation; those that no text can say are left out."""
    try:
        hints = get_type_hints(build.__init__)
    except NameError:  # annotations that only a type checker can see
        hints = {}
    found = {}
    for name, parameter in inspect.signature(build.__init__).parameters.items():
        annotation = hints.get(name, parameter.annotation)
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD and _readable(annotation):
            found[name] = annotation
    return found


def _plain(annotation: Any) -> set[Any]:
    return {part for part in (get_args(annotation) or (annotation,)) if part is not NoneType}


def _readable(annotation: Any) -> bool:
    kinds = _plain(annotation)
    return annotation == Duration or bool(kinds & {str, int, float, bool}) or all(isinstance(one, str) for one in kinds)


def _value(text: str, annotation: Any, name: str) -> Any:
    """A text of a URL as what the constructor takes. Raises DefinitionError."""
    kinds = _plain(annotation)
    if bool in kinds:
        word = text.lower()
        if word in ("", "1", "true", "yes", "on"):
            return True
        if word in ("0", "false", "no", "off"):
            return False
        raise DefinitionError(f"The option {name} is true or false, not {text[:100]!r}.")
    if float in kinds or annotation == Duration:
        try:
            return float(text)
        except ValueError:
            try:
                return seconds(text)
            except DefinitionError as error:
                raise DefinitionError(f"The option {name}: {error}") from None
    if int in kinds and str not in kinds:
        try:
            return int(text)
        except ValueError:
            raise DefinitionError(f"The option {name} is a whole number, not {text[:100]!r}.") from None
    return text


def _no_option(name: str, parameters: Collection[str], kind: _Kind, what: str) -> DefinitionError:
    names = sorted({*parameters, *(kind.own or ())} - {"url"})
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(names)}."
    return DefinitionError(f"This {what} has no option {name[:100]!r}. {hint}")


def _shown(url: str) -> str:
    """It may hold a password, and not where one would look for it."""
    return re.split("[:=]", url)[0] + "…" if re.search("@|password", url, re.IGNORECASE) else url


def default_caller() -> Any:
    """What makes outgoing calls, over connections that open when they are needed; None where its library is not installed."""
    try:
        from durable.runners.outgoing import Outgoing
    except ImportError:
        return None
    return Outgoing()
