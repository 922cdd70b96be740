"""What a route is, and what its handler is given."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct
from starlette.websockets import WebSocket

from durable.core.errors import RunNotFound
from durable.engine.engine import WorkflowEngine
from durable.engine.functions import Functions
from durable.server.auth import Auth, Principal, Role, in_reach
from durable.server.discovery import Discovery
from durable.server.errors import ApiError
from durable.server.functions import functions_of
from durable.server.limits import Slots
from durable.server.settings import ServerSettings, networks
from durable.server.workspaces import Workspaces, split
from durable.store.records import DEFAULT_WORKSPACE, RunRecord

MAX_ID = 400
"""Characters of an id in a path: a run's, and those of its children under it."""
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+~-]*")


NODE_PATH = "/internal/invoke"


class Service:
    """What all requests share."""

    def __init__(
        self,
        engine: WorkflowEngine,
        settings: ServerSettings,
        local_app: str | None = None,
        functions: Functions | None = None,
    ) -> None:
        self.engine = engine
        self.functions = functions or functions_of(engine, settings)
        """What apps have registered, and the runners they run in."""
        self.settings = settings
        self.local_app = local_app
        """What apps call the engine's own workspace: the name of the app that runs in this process."""
        self.workspaces = Workspaces(engine, settings.rotation_ms * 1_000)
        self.discovery = Discovery(self.functions, self.workspaces)
        self.proxies = networks(settings)
        self.streams = Slots(settings.max_streams)
        self.document: Mapping[str, Any] = {}
        """The API's description."""
        self.draining = False
        self._on_drain: list[Callable[[], None]] = []

    async def start(self, url: str) -> None:
        """Begin to serve apps and their runners. `url`: where this process listens."""
        settings = self.settings
        reached = settings.node_url or (None if settings.production else url)
        await self.functions.start(None if reached is None else reached.rstrip("/") + NODE_PATH)
        if settings.app_url is not None:
            self.discovery.follow(settings.app_url)

    async def close(self) -> None:
        """Let runners go; they dial in elsewhere."""
        await self.discovery.close()
        await self.functions.close()

    def drain(self) -> None:
        """From now on this process is not ready, and its streams end; watchers go on elsewhere."""
        self.draining = True
        for tell in list(self._on_drain):
            tell()

    def on_drain(self, tell: Callable[[], None]) -> Callable[[], None]:
        """Returns the way to be told no more."""
        self._on_drain.append(tell)
        return lambda: self._on_drain.remove(tell)

    def app_of(self, workspace: str) -> str:
        """What a workspace's app is called."""
        return self.local_app or workspace if workspace == self.engine.deps.settings.workspace else split(workspace)[0]


class Call(Struct, frozen=True, kw_only=True):
    """One request, authenticated, its parts decoded as the route says."""

    service: Service
    principal: Principal
    params: Mapping[str, str]
    query: Any = None
    body: Any = None
    raw: bytes = b""
    """The body as it came; checked to be JSON where the route has a body."""
    path: str
    """As sent, with its query."""
    peer: str
    headers: Mapping[str, str]
    raw_headers: Sequence[tuple[str, str]] = ()

    @property
    def functions(self) -> Functions:
        return self.service.functions

    @property
    def key_id(self) -> str | None:
        """Of the key the request came with."""
        return None if self.principal.key is None else self.principal.id

    @property
    def engine(self) -> WorkflowEngine:
        return self.service.engine

    def workspace(self, app: str | None = None) -> str:
        """The workspace this request is about. `app`: as it names one, which can only be the credential's own; without a
        credential, in development, that one. Raises ApiError."""
        mine = self.principal.workspace
        if mine is not None:
            if app is not None and app not in (mine, self.service.app_of(mine)):
                raise ApiError(403, "forbidden", "This key is for another app. The workspace comes from the key alone.")
            return mine
        own = self.engine.deps.settings.workspace
        if app is None or app in (DEFAULT_WORKSPACE, own, self.service.local_app):
            return own
        if len(app) > 80 or not _ID.fullmatch(app):
            raise ApiError(400, "bad_id", "An app's name is letters, digits, dots, dashes and underscores.")
        return app if app.endswith(".dev") else f"{app}.dev"

    def path_workspace(self) -> str:
        """The same for an app in the path; another's is as unknown as one that nobody has. Raises ApiError."""
        try:
            return self.workspace(self.params["app"])
        except ApiError:
            raise ApiError(404, "not_found", "There is no such app in this workspace.") from None

    async def run(self) -> RunRecord:
        """The run of the path, or of the body's runId. Raises RunNotFound, in the same words for another workspace's."""
        run_id = check_id(self.params.get("id") or self.body.run_id)
        record = (await self.engine.deps.store.get([run_id]))[0]
        if record is None or not in_reach(self.principal, record.workspace):
            raise RunNotFound(f"There is no run {run_id!r} here. Is it another workspace's?", run_id=run_id)
        return record


def check_id(text: str) -> str:
    """Raises ApiError for what no id can be."""
    if len(text) > MAX_ID or not _ID.fullmatch(text):
        raise ApiError(400, "bad_id", "That cannot be an id: an id is letters, digits and . _ : @ + ~ -")
    return text


class Answer(Struct, frozen=True):
    """What a handler gives back. `body`: whatever msgspec encodes; None with 204."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = {}


class Stream(Struct, frozen=True):
    """Server-sent events, each already a block of lines. The first is taken before the answer begins, so that what it
    raises is an answer of its own."""

    blocks: AsyncIterator[bytes]


Handler = Callable[[Call], Awaitable[Answer | Stream]]
SocketHandler = Callable[[Call, WebSocket], Awaitable[None]]
"""It accepts the socket; what it raises before is told as an answer."""


class Opaque(Struct, frozen=True):
    """A body that its handler reads itself, from `raw`."""


class Bytes(Struct, frozen=True):
    """A body of any kind, from `raw`."""


class Nothing(Struct, frozen=True):
    """No query, no body."""


class Route(Struct, frozen=True, kw_only=True):
    """A row of the table of routes: everything that stands before a handler, and what the API's document says of it."""

    method: Literal["GET", "POST", "PUT", "DELETE", "WEBSOCKET"]
    path: str
    handler: Any
    """`Handler`; of a WebSocket, `SocketHandler`."""
    summary: str
    auth: Auth
    role: Role
    scope: Literal["service", "workspace", "run"]
    """What it is about: the whole service, the credential's workspace, one run in it."""
    query: type[Struct] = Nothing
    body: Any = None
    """The body's type; None: none is read."""
    answer: Any = None
    """The answer's type, for the document; `stream` for server-sent events."""
    status: int = 200
    max_body: int | None = None
    """Bytes; None: the setting's."""
    cost: float = 1.0
    """Tokens of the key's bucket that a request takes."""
    tag: str = ""


def _takes_numbers(kind: Any) -> bool:
    return kind is int or any(_takes_numbers(part) for part in get_args(kind))


def decode_query(kind: type[Struct], text: bytes) -> Any:
    """A query string as its struct; strangers, doubles and other shapes are refused. Raises ApiError."""
    from urllib.parse import parse_qsl

    try:
        pairs = parse_qsl(
            text.decode("ascii"), keep_blank_values=True, strict_parsing=bool(text), max_num_fields=50, errors="strict"
        )
    except (ValueError, UnicodeDecodeError):
        raise ApiError(400, "bad_query", "The query is not UTF-8, or has too many parts.") from None
    given: dict[str, Any] = {}
    known = {field.encode_name: _takes_numbers(field.type) for field in msgspec.structs.fields(kind)}
    for name, value in pairs:
        if name not in known:
            raise ApiError(
                400,
                "bad_query",
                f"There is no query parameter {name[:50]!r} here. Known: {', '.join(known) or 'none'}.",
            )
        if name in given:
            raise ApiError(400, "bad_query", f"The query parameter {name} stands twice.")
        if "\0" in value or len(value) > 1_000:
            raise ApiError(400, "bad_query", f"The query parameter {name} is too long, or has a NUL in it.")
        # By hand: the lenient reading takes `null` for None and 1e3 for a number.
        given[name] = int(value) if known[name] and _INTEGER.fullmatch(value) else value
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise ApiError(400, "bad_query", f"The query: {error}") from None
