"""Small apps on real sockets that speak the wire, written from the wire page alone: what the engine meets in the field."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Self

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


class Reached(Exception):
    """The function has reached an operation: the pass ends here."""

    def __init__(self, operation: dict[str, Any]) -> None:
        self.operation = operation


class Step:
    """What a function of section 4 is handed."""

    def __init__(self, memos: dict[str, Any]) -> None:
        self.memos = memos

    def _memo(self, id: str, type: str) -> Any:
        if id in self.memos:
            assert self.memos[id]["type"] == type
            return True
        return False

    async def run(self, id: str, body: Callable[[], Any]) -> Any:
        if not self._memo(id, "run"):
            try:
                data = body()
                if asyncio.iscoroutine(data):
                    data = await data
            except Exception as error:
                retryable = not isinstance(error, PermissionError)
                said = {"op": "error", "id": id, "message": str(error), "name": type(error).__name__}
                raise Reached({**said, "retryable": retryable}) from None
            raise Reached({"op": "step", "id": id, "data": data})
        return self.memos[id]["data"]

    def sleep(self, id: str, until: str) -> None:
        if not self._memo(id, "sleep"):
            raise Reached({"op": "sleep", "id": id, "until": until})

    def wait(self, id: str, event: str, until: str, match: Any = None) -> Any:
        if not self._memo(id, "wait"):
            raise Reached({"op": "wait", "id": id, "event": event, "match": match, "until": until})
        return self.memos[id]["data"]

    def send(self, id: str, *events: dict[str, Any]) -> Any:
        if not self._memo(id, "sendEvent"):
            raise Reached({"op": "sendEvent", "id": id, "events": list(events)})
        return self.memos[id]["data"]


Function = Callable[[Step, dict[str, Any], dict[str, Any] | None], Awaitable[Any]]


class HttpServer:
    """An ASGI app on a port of its own."""

    def __init__(self, app: Any, **options: Any) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app, log_level="error", lifespan="off", timeout_graceful_shutdown=1, ws="websockets-sansio", **options
        )
        self.server = uvicorn.Server(config)
        self._task: asyncio.Task[None] | None = None
        self.at_end: list[Callable[[], Awaitable[None]]] = []

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.server.serve([self._socket]))
        while not self.server.started:
            await asyncio.sleep(0.005)
        return self

    async def __aexit__(self, *_: object) -> None:
        for close in self.at_end:
            await close()
        self.server.should_exit = True
        assert self._task is not None
        await self._task


class HttpApp(HttpServer):
    """An app of section 4."""

    def __init__(self, functions: dict[str, Function], key: str | None = None) -> None:
        self.functions = functions
        self.key = key
        self.asked: list[dict[str, Any]] = []
        """Every request that was answered."""
        self.forged = 0
        self.signs = key
        """What its answers are signed with; None: not at all."""
        self.before: Callable[[dict[str, Any]], Awaitable[Response | None]] | None = None
        super().__init__(Starlette(routes=[Route("/fn", self._answer, methods=["POST"])]))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/fn"

    async def _answer(self, request: Request) -> Response:
        body = await request.body()
        if self.key is not None:
            expected = hmac.new(self.key.encode(), body, hashlib.sha256).hexdigest()
            if request.headers.getlist("x-durable-signature") != [expected]:
                self.forged += 1
                return Response(status_code=401)
        asked = msgspec.json.decode(body)
        self.asked.append(asked)
        if self.before is not None:
            given = await self.before(asked)
            if given is not None:
                return given
        try:
            data = await self.functions[asked["functionId"]](Step(asked["steps"]), asked["event"], asked.get("failure"))
            said = {"op": "done", "data": data}
        except Reached as reached:
            said = reached.operation
        except Exception as error:
            said = {"op": "error", "id": None, "message": str(error), "name": type(error).__name__, "retryable": True}
        answer = msgspec.json.encode(said)
        headers = {}
        if self.key is not None and self.signs:
            headers["x-durable-signature"] = hmac.new(self.signs.encode(), answer, hashlib.sha256).hexdigest()
        return Response(answer, media_type="application/json", headers=headers)


def step_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def op(kind: str, name: str, **fields: Any) -> dict[str, Any]:
    """An opcode of section 5."""
    return {"op": kind, "id": step_hash(name), "name": name, **fields}


class Memos:
    """What an invoke of section 5 knows, by name."""

    def __init__(self, invoke: dict[str, Any]) -> None:
        self.invoke = invoke
        self.steps = invoke["steps"]

    def __contains__(self, name: str) -> bool:
        memo = self.steps.get(step_hash(name))
        return memo is not None and "pending" not in memo

    def pending(self, name: str) -> bool:
        return bool(self.steps.get(step_hash(name), {}).get("pending"))

    def known(self, name: str) -> bool:
        return step_hash(name) in self.steps

    def data(self, name: str) -> Any:
        return self.steps[step_hash(name)]["data"]

    def error(self, name: str) -> Any:
        return self.steps[step_hash(name)].get("error")


Answered = tuple[int, dict[str, Any]]
