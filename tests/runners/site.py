"""What the service puts around an engine, as far as runners see it: /connect, /register and the internal endpoint on a real port.
And a runner of the field, written from the wire page alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Self

import msgspec
import websockets
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from durable.core.errors import DurableError
from durable.engine.functions import Functions
from durable.runners.connect import SUBPROTOCOLS, SocketClosed
from durable.runners.outgoing import Calls
from tests.runners.apps import HttpServer


class StarletteSocket:
    """A Starlette WebSocket as the engine's end wants it."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def receive(self) -> str:
        try:
            return await self._socket.receive_text()
        except WebSocketDisconnect as closed:
            raise SocketClosed(closed.code) from None
        except (RuntimeError, KeyError):
            raise SocketClosed from None

    async def send(self, text: str) -> None:
        try:
            await self._socket.send_text(text)
        except (WebSocketDisconnect, RuntimeError):
            raise SocketClosed from None

    async def close(self, code: int, reason: str) -> None:
        with contextlib.suppress(RuntimeError):
            await self._socket.close(code, reason)


class Site(HttpServer):
    """The service's face of one engine."""

    def __init__(self, app: Any, *, workspace: str | None = None, **options: Any) -> None:
        options.setdefault("calls", Calls(loopback=True))
        self.functions = Functions(app.engine, **options)
        self.workspace = workspace
        self.dead = False
        routes = [
            WebSocketRoute("/connect", self._connect),
            Route("/register", self._register, methods=["POST"]),
            Route("/internal/invoke", self._internal, methods=["POST"]),
        ]
        super().__init__(Starlette(routes=routes), ws_max_size=1 << 20)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self.functions.start(f"{self.base}/internal/invoke")
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self.dead:
            await self.functions.close()
        await super().__aexit__(*exc)

    async def crash(self) -> None:
        """The process is gone, with its engine: nothing is written any more, connections break."""
        self.dead = True
        self.functions._unlisten()
        for task in (self.functions._looking, self.functions.directory._beating):
            assert task is not None
            task.cancel()
        for session in list(self.functions.directory.sessions.values()):
            self.functions.directory.sessions.pop(session.instance)
            await session.close(1001, "gone")
        await self.functions.outgoing.close()

    async def _connect(self, socket: WebSocket) -> None:
        offered = socket.scope.get("subprotocols") or []
        await socket.accept(next((one for one in SUBPROTOCOLS if one in offered), None))
        await self.functions.connected(StarletteSocket(socket), workspace=self.workspace)

    async def _register(self, request: Request) -> Response:
        try:
            info = await self.functions.check_in(self.workspace, await request.body())
        except DurableError as error:
            return Response(msgspec.json.encode({"error": str(error)}), 400)
        return Response(msgspec.json.encode(info))

    async def _internal(self, request: Request) -> Response:
        status, body = await self.functions.directory.answer_node(
            request.headers.getlist("x-durable-signature"), request.url.path, await request.body()
        )
        return Response(body, status)


Handler = Callable[[dict[str, Any]], "Awaitable[tuple[int, dict[str, Any]]] | tuple[int, dict[str, Any]]"]


class FieldRunner:
    """A runner that dials in, as somebody wrote it against another engine."""

    def __init__(self, base: str, handlers: dict[str, Handler], *, app: str = "shop", **more: Any) -> None:
        self.base = base.replace("http://", "ws://")
        self.handlers = handlers
        self.asked: list[dict[str, Any]] = []
        self.frames: list[dict[str, Any]] = []
        self.closed: int | None = None
        self.said = {
            "app": app,
            "runtime": "node 22",
            "sdkName": "field",
            "version": "3.1.0",
            "framework": "express",
            "protocolVersion": 1,
            "minProtocolVersion": 1,
            "maxProtocolVersion": 1,
            "workflows": [{"name": name, "triggers": [{"event": f"{name}.asked"}]} for name in handlers],
        } | more
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self.socket = await websockets.connect(
            f"{self.base}/connect", subprotocols=[websockets.Subprotocol("duraton.connect.v0")], max_size=1 << 20
        )
        hello = msgspec.json.decode(await self.socket.recv())
        assert hello["type"] == "hello"
        self.heartbeat_ms = hello["payload"]["heartbeatMs"]
        await self.send({"type": "runner.register", "payload": self.said})
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        await self.socket.close()

    async def send(self, frame: dict[str, Any]) -> None:
        await self.socket.send(msgspec.json.encode(frame).decode())

    def failed(self) -> str:
        return f"closed {self.closed} {self.reason}, frames {self.frames}"

    def vanish(self) -> None:
        """The process is gone: the connection breaks without a word."""
        self.socket.transport.abort()

    async def _read(self) -> None:
        try:
            async for text in self.socket:
                frame = msgspec.json.decode(text)
                self.frames.append(frame)
                if frame["type"] == "invoke":
                    task = asyncio.create_task(self._answer(frame))
                    self._tasks.add(task)
        except websockets.ConnectionClosed:
            pass
        self.closed = self.socket.close_code
        self.reason = self.socket.close_reason

    async def _answer(self, frame: dict[str, Any]) -> None:
        invoke = frame["payload"]
        assert set(invoke) >= {"event", "steps", "ctx"}
        self.asked.append(invoke)
        result = self.handlers[invoke["ctx"]["workflow"]](invoke)
        status, body = await result if not isinstance(result, tuple) else result
        with contextlib.suppress(websockets.ConnectionClosed):
            await self.send({"type": "invoke.result", "id": frame["id"], "payload": {"status": status, "body": body}})
