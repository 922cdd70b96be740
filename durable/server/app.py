"""The HTTP application: every request goes the same way, as its row of the table says.

limits of the peer → route → credential → role → rate of the key → body → JSON → handler → answer
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.routing import Route as StarletteRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from durable.engine.engine import WorkflowEngine
from durable.engine.functions import Functions
from durable.protocol import signature
from durable.server import errors
from durable.server.auth import Authenticator, Principal, Request
from durable.server.errors import ApiError
from durable.server.limits import Bucket, check_json, read_body
from durable.server.route import Answer, Bytes, Call, Opaque, Route, Service, Stream, decode_query
from durable.server.settings import Network, ServerSettings

log = logging.getLogger("durable.server")

ALWAYS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Guard:
    """What stands before the handlers."""

    def __init__(self, service: Service) -> None:
        settings, monotonic = service.settings, service.engine.clock.monotonic
        self.service = service
        self._authenticate = Authenticator(service.workspaces, settings, monotonic)
        self._rate = Bucket(settings.rate, settings.burst, monotonic)
        self._peers = Bucket(settings.rate, settings.burst, monotonic)

    async def handle(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        request = _Incoming(scope, receive, route, self.service)
        try:
            answer = await self._answer(route, request)
            if isinstance(answer, Stream):
                await _stream(answer, scope, receive, send, self.service, request)
                return
            await _send(send, scope, answer, request)
        except Exception as error:
            refused = errors.of(error)
            if refused is None:
                log.exception("%s %s went wrong (request %s)", route.method, route.path, request.id)
                refused = ApiError(500, "internal", f"Something went wrong here. The log has it under {request.id}.")
            await _send(send, scope, _refusal(refused), request, close=refused.close)

    async def _answer(self, route: Route, request: _Incoming) -> Answer | Stream:
        _take(self._peers if route.auth == "none" else self._rate, f"peer:{request.peer}", 0.2)
        if route.auth in ("none", "node", "token"):
            principal = Principal(None, "read", f"peer:{request.peer}")
        else:
            principal = await self._authenticate(route.auth, route.role, request.for_auth())
            _take(self._rate, principal.id, route.cost)
        request.principal = principal
        body, raw = None, b""
        if route.body is not None:
            raw = await (request.body() if route.body is Bytes else request.json())
            body = None if route.body in (Opaque, Bytes) else _decode(raw, route.body)
            _refuse_strangers(body, principal, self.service)
        answer: Answer | Stream = await route.handler(self._call(route, request, principal, body, raw))
        return answer

    def _call(self, route: Route, request: _Incoming, principal: Principal, body: Any = None, raw: bytes = b"") -> Call:
        return Call(
            service=self.service,
            principal=principal,
            params=request.params,
            query=decode_query(route.query, request.query),
            body=body,
            raw=raw,
            path=request.path,
            peer=request.peer,
            headers=request.headers,
            raw_headers=request.text_headers,
        )

    async def converse(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        """A WebSocket: everything is looked at before it is accepted, and refused as any request is."""
        socket = WebSocket(scope, receive, send)
        request = _Incoming(scope, receive, route, self.service)
        try:
            _take(self._rate, f"peer:{request.peer}", 0.2)
            _refuse_pages(request)
            principal = await self._authenticate(route.auth, route.role, request.for_auth())
            _take(self._rate, principal.id, route.cost)
            await route.handler(self._call(route, request, principal), socket)
        except ApiError as error:
            refused = _refusal(error)
            response = Response(errors.body(error), error.status, refused.headers, media_type="application/json")
            await socket.send_denial_response(response)
        except Exception:
            log.exception("%s %s went wrong (request %s)", route.method, route.path, request.id)
            if socket.application_state is not WebSocketState.DISCONNECTED:
                with suppress(RuntimeError):
                    await socket.close(1011)


class _Incoming:
    """A request as it comes: its body is read once, when somebody wants it, within its bounds."""

    def __init__(self, scope: Scope, receive: Receive, route: Route, service: Service) -> None:
        settings, proxies = service.settings, service.proxies
        self.scope = scope
        self.route = route
        self.settings = settings
        self.raw_headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        self.peer = real_peer((scope.get("client") or ("unknown", 0))[0], self.raw_headers, proxies)
        self.query: bytes = scope.get("query_string", b"")
        self.params: Mapping[str, str] = scope.get("path_params", {})
        self.principal: Principal | None = None
        self.id: str = scope["state"]["request_id"]
        self._receive = receive
        self._body: bytes | None = None
        self.text_headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.raw_headers]
        self.headers = dict(self.text_headers)

    def for_auth(self) -> Request:
        return Request(self.scope.get("method", "GET"), self.path, self.raw_headers, self.peer, self.body)

    @property
    def path(self) -> str:
        """As sent, with its query."""
        path: str = self.scope.get("raw_path", self.scope["path"].encode()).decode("latin-1")
        return path + (f"?{self.query.decode('latin-1')}" if self.query else "")

    async def body(self) -> bytes:
        if self._body is None:
            headers = self.headers
            if headers.get("content-encoding", "identity").lower() != "identity":
                raise ApiError(
                    415, "unsupported_encoding", "Send the body as it is, without content-encoding.", close=True
                )
            self._body = await read_body(
                self._receive,
                self.raw_headers,
                limit=self.route.max_body or self.settings.max_body,
                seconds=self.settings.body_timeout_ms / 1000,
            )
        return self._body

    async def json(self) -> bytes:
        kind = self.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "unsupported_type", "Send JSON: content-type: application/json.", close=True)
        data = await self.body()
        if not data:
            return b"{}"
        check_json(data)
        return data


def _refuse_pages(request: _Incoming) -> None:
    """Runners are no browsers: a page may not dial in, but one of this very host."""
    headers = request.headers
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        raise ApiError(403, "forbidden", "A page of another origin may not open this.")


def real_peer(peer: str, headers: Sequence[tuple[bytes, bytes]], proxies: Sequence[Network]) -> str:
    """Who asks, behind proxies that are trusted: the last address in X-Forwarded-For that is no such proxy. What stands
    before it anybody may have written."""
    hops = [
        part.strip()
        for name, value in headers
        if name == b"x-forwarded-for"
        for part in value.decode("latin-1").split(",")
    ]
    while hops and _is_in(peer, proxies):
        peer = hops.pop()
    return peer


def _is_in(address: str, proxies: Sequence[Network]) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(found in network for network in proxies)


def _take(bucket: Bucket, key: str, cost: float) -> None:
    wait = bucket.take(key, cost)
    if wait > 0:
        raise ApiError(429, "rate_limited", "Too many requests. Wait, or spread them.", retry_after=wait)


def _decode(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise ApiError(400, "bad_body", f"The body: {error}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(400, "bad_json", f"The body is not JSON: {error}") from None


_NAMES = ("app", "target_app", "workspace", "namespace", "tenant")


def _refuse_strangers(body: Any, principal: Principal, service: Service) -> None:
    """The workspace comes from the credential alone: who names another, anywhere in what is ours to read, is refused
    before anything is done."""
    if principal.workspace is None:
        return
    mine = {principal.workspace, service.app_of(principal.workspace)}
    for part in [body, *getattr(body, "events", ())]:
        for name in _NAMES:
            named = getattr(part, name, None)
            if isinstance(named, str) and named not in mine:
                raise ApiError(403, "forbidden", f"This key is not for {name} {named[:80]!r}. Use that app's own key.")


# ------------------------------------------------------------------ answering


def _refusal(error: ApiError) -> Answer:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, int(error.retry_after + 0.999)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Answer(errors.ErrorAnswer(errors.ErrorBody(error.code, str(error), error.details)), error.status, headers)


async def _send(send: Send, scope: Scope, answer: Answer, request: _Incoming | None, *, close: bool = False) -> None:
    data = b"" if answer.status == 204 else msgspec.json.encode(answer.body)
    headers = [*ALWAYS, (b"content-length", str(len(data)).encode())]
    if answer.status != 204:
        headers.append((b"content-type", b"application/json"))
    headers += [(name.encode(), value.encode("latin-1")) for name, value in answer.headers.items()]
    if request is not None:
        headers.append((b"x-request-id", request.id.encode()))
        key = request.principal.key if request.principal else None
        if request.route.auth == "app" and key is not None:
            headers.append((signature.HEADER.encode(), signature.body_signature(key, data).encode()))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else data})


async def _stream(
    stream: Stream, scope: Scope, receive: Receive, send: Send, service: Service, request: _Incoming
) -> None:
    holder = request.principal.id if request.principal else request.peer
    if not service.streams.take(holder):
        raise ApiError(429, "too_many_streams", "This key holds too many streams open. Close one.", retry_after=5)
    try:
        async with aclosing(stream.blocks) as blocks:  # type: ignore[type-var]
            first = await anext(blocks, b"")

            async def all_of_it() -> Any:
                yield first
                async for block in blocks:
                    yield block

            headers = {name.decode(): value.decode() for name, value in ALWAYS}
            headers |= {"x-request-id": request.id, "x-accel-buffering": "no"}
            await StreamingResponse(all_of_it(), media_type="text/event-stream", headers=headers)(scope, receive, send)
    finally:
        service.streams.free(holder)


# ------------------------------------------------------------------ the application


class _Endpoint:
    """One path with all its methods."""

    def __init__(self, guard: Guard, routes: Sequence[Route]) -> None:
        self.routes: dict[str, Route] = {route.method: route for route in routes}
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._guard.converse(self.routes["WEBSOCKET"], scope, receive, send)
            return
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        route = self.routes.get(method)
        if route is None:
            raise HTTPException(405, headers={"allow": ", ".join(sorted(set(self.routes) - {"WEBSOCKET"}))})
        await self._guard.handle(route, scope, receive, send)


def create_app(
    engine: WorkflowEngine,
    settings: ServerSettings,
    *,
    local_app: str | None = None,
    functions: Functions | None = None,
    routes: Sequence[Route] | None = None,
    mounts: Sequence[BaseRoute] = (),
) -> Starlette:
    """The API over an engine that runs. `local_app`: the name of the app in this process, whose workspace is the engine's
    own. `mounts`: what else stands on this port (a dashboard, the runners' door). `app.state.service` is what all share.
    """
    from durable.server.openapi import document
    from durable.server.routes_table import ROUTES

    table = tuple(ROUTES if routes is None else routes)
    service = Service(engine, settings, local_app, functions)
    guard = Guard(service)
    paths: dict[str, list[Route]] = {}
    for route in table:
        paths.setdefault(route.path, []).append(route)
    # What is spelled out goes before what stands for anything: /runs/stats is no run.
    ordered = sorted(paths, key=lambda path: (path.count("{"), path))
    app = Starlette(
        routes=[
            *(_route(path, _Endpoint(guard, paths[path])) for path in ordered),
            *mounts,
        ],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    app.add_middleware(_Numbered, ids=engine.deps.ids.unique)
    app.state.service = service
    app.state.routes_table = table
    service.document = document(table)
    return app


def _route(path: str, endpoint: _Endpoint) -> BaseRoute:
    if "WEBSOCKET" in endpoint.routes:
        return WebSocketRoute(path, endpoint)
    return StarletteRoute(path, endpoint, methods=None)


class _Numbered:
    """Gives each request an id, and takes the last word where nothing else has answered."""

    def __init__(self, app: Callable[..., Awaitable[None]], ids: Callable[[], str]) -> None:
        self._app = app
        self._ids = ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope.setdefault("state", {})["request_id"] = self._ids()
        await self._app(scope, receive, send)


async def _http_error(request: Any, error: Exception) -> Any:
    assert isinstance(error, HTTPException)
    told = {
        404: ("not_found", "There is no such route. GET /openapi.json lists them."),
        405: ("method_not_allowed", "This route has other methods; see the header Allow."),
    }
    code, message = told.get(error.status_code, ("bad_request", str(error.detail)))
    refused = ApiError(error.status_code, code, message)
    headers = dict(error.headers or {}) | {name.decode(): value.decode() for name, value in ALWAYS}
    return Response(errors.body(refused), error.status_code, headers, media_type="application/json")
