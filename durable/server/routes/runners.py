"""Apps and their runners: what they register, the door they dial in at, who is alive, and what other engines ask for runners
that are connected here."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from starlette.websockets import WebSocket, WebSocketDisconnect

from durable.runners.connect import SUBPROTOCOLS, SocketClosed
from durable.runners.interface import RunnerInfo
from durable.runners.outgoing import check_url
from durable.server.errors import ApiError
from durable.server.route import Answer, Call
from durable.server.views import iso

BINARY = 1003
"""A frame of bytes, where text is spoken."""


class FunctionRef(Struct, frozen=True):
    id: str
    version: str


class Synced(Struct, frozen=True):
    ok: bool
    functions: list[FunctionRef]


class VersionsQuery(Struct, frozen=True, rename="camel"):
    function_id: Annotated[str, Meta(min_length=1, max_length=300)]


class Versions(Struct, frozen=True, rename="camel"):
    """`current`: what new runs get. `versions`: what runs may still go on with."""

    function_id: str
    current: str
    versions: list[str]
    enabled: bool


class Registered(Struct, frozen=True, rename="camel"):
    """Check in again every `heartbeatMs`."""

    ok: bool
    instance: str
    heartbeat_ms: int
    key_matches: bool | None


class Runner(Struct, frozen=True, rename="camel", omit_defaults=True):
    """A runner that is alive. `keyMatches`: whether it says a live key of this workspace."""

    instance: str
    app: str
    mode: str
    workflows: list[str]
    since: str
    seen: str
    in_flight: int
    runner: str | None = None
    runtime: str = ""
    language: str | None = None
    sdk_name: str = ""
    version: str = ""
    framework: str = ""
    region: str | None = None
    key_fingerprint: str | None = None
    key_matches: bool | UnsetType = UNSET


async def sync(call: Call) -> Answer:
    """These are all the functions of the app now; and where it is, if it says so."""
    workspace = call.workspace()
    call.service.discovery.said(workspace)
    specs, url = await call.functions.sync(workspace, call.raw)
    if url is not None:
        check_url(url, call.functions.outgoing.calls)
        await call.service.workspaces.set_url(workspace, url)
    return Answer(Synced(True, [FunctionRef(spec.name, spec.version) for spec in specs]))


async def versions(call: Call) -> Answer:
    """The versions of a function that are known."""
    body: VersionsQuery = call.body
    found = call.functions.of(call.workspace()).get(body.function_id)
    if found is None:
        raise ApiError(404, "not_found", "There is no such function in this workspace. POST /fn/sync registers them.")
    enabled = found.spec.enabled and not found.withdrawn
    return Answer(Versions(body.function_id, found.current, list(found.versions), enabled))


async def register(call: Call) -> Answer:
    """A runner that serves checks in: now, and again before its interval has passed three times."""
    info = await call.functions.check_in(call.principal.workspace, call.raw, key_id=call.key_id)
    return Answer(Registered(True, info.instance, info.heartbeat_ms, info.key_matches))


async def list_runners(call: Call) -> Answer:
    """Who is alive in this workspace."""
    found = await call.functions.directory.live(call.workspace(call.query.app))
    return Answer([_view(one) for one in sorted(found, key=lambda one: (one.app, one.runner or "", one.instance))])


async def node(call: Call) -> Answer:
    """Another engine asks a runner that is connected to this one. It signs with this engine's own key, from the store."""
    given = [value for name, value in call.raw_headers if name == "x-durable-signature"]
    status, body = await call.functions.directory.answer_node(given, call.path, call.raw)
    if status != 200:
        codes = {401: "unauthorized", 404: "not_found", 409: "replayed"}
        raise ApiError(status, codes.get(status, "bad_request"), "This is for other engines on the same store.")
    return Answer(Raw(body))


async def connect(call: Call, socket: WebSocket) -> None:
    """A runner dials in, and stays."""
    offered = socket.scope.get("subprotocols", [])
    chosen = next((name for name in SUBPROTOCOLS if name in offered), None)
    if chosen is None:
        raise ApiError(400, "bad_request", f"Offer one of the subprotocols {' and '.join(SUBPROTOCOLS)}.")
    await socket.accept(chosen)
    await call.functions.connected(_Frames(socket), workspace=call.principal.workspace, key_id=call.key_id)


class _Frames:
    """A WebSocket as frames of text."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._open = True

    async def receive(self) -> str:
        try:
            message: dict[str, Any] = dict(await self._socket.receive())
        except (WebSocketDisconnect, RuntimeError):
            raise SocketClosed from None
        if message["type"] == "websocket.disconnect":
            self._open = False
            raise SocketClosed(message.get("code") or 1006)
        text = message.get("text")
        if text is None:
            await self.close(BINARY, "frames are text")
            raise SocketClosed(BINARY)
        return str(text)

    async def send(self, text: str) -> None:
        try:
            await self._socket.send_text(text)
        except (WebSocketDisconnect, RuntimeError, OSError):
            self._open = False
            raise SocketClosed from None

    async def close(self, code: int, reason: str) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
                await self._socket.close(code, reason)


def _view(one: RunnerInfo) -> Runner:
    return Runner(
        instance=one.instance,
        app=one.app,
        mode=one.mode,
        workflows=one.workflows,
        since=iso(one.since),
        seen=iso(one.seen),
        in_flight=one.in_flight,
        runner=one.runner,
        runtime=one.runtime,
        language=one.language,
        sdk_name=one.sdk_name,
        version=one.version,
        framework=one.framework,
        region=one.region,
        key_fingerprint=one.key_fingerprint,
        key_matches=UNSET if one.key_matches is None else one.key_matches,
    )
