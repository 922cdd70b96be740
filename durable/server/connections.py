"""HTTP on a socket, on the loop of the engine: uvicorn, with bounds on what a connection may cost before its request is
one. What the parser itself refuses, and what is too slow or too large, is answered in the API's own shape and closed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from durable.core.errors import DurableError
from durable.server import errors
from durable.server.errors import ApiError
from durable.server.settings import ServerSettings

STOP_SECONDS = 5.0
"""How long requests under way may take when the server stops."""
_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class PortTaken(DurableError):
    """Somebody else listens there."""

    code = "port_taken"


def _guarded(settings: ServerSettings) -> type[HttpToolsProtocol]:
    seconds = settings.header_timeout_ms / 1000

    class Guarded(HttpToolsProtocol):
        """One connection. The parser knows no bound on a head; this one does, in bytes, count and time."""

        _timer: asyncio.TimerHandle | None = None
        _head_done = False
        _head_bytes = 0
        _refused = False

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.access_log = False  # it would write queries down, whatever is in them

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                self._refuse(ApiError(503, "not_ready", "Too many connections are open here. Try again."))
                return
            self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            self._head_bytes += 0 if self._head_done else len(data)
            super().data_received(data)
            if not self._head_done and self._head_bytes > settings.max_header_bytes:
                self._refuse_head()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_done = False
            self._arm()

        def on_headers_complete(self) -> None:
            self._disarm()
            self._head_done, self._head_bytes = True, 0
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if len(self.headers) > settings.max_headers or size > settings.max_header_bytes:
                self._refuse_head()
            if not self._refused:
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if not self._refused:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if not self._refused:
                super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            self._refuse(ApiError(400, "bad_request", "This is not HTTP/1.1 as we take it."))

        def _refuse_head(self) -> None:
            self._refuse(
                ApiError(
                    431,
                    "too_many_headers",
                    f"A request has at most {settings.max_headers} headers and {settings.max_header_bytes} bytes of them.",
                )
            )

        def _refuse(self, error: ApiError) -> None:
            if self._refused or self.transport.is_closing():
                return
            self._refused = True
            self._disarm()
            body = errors.body(error)
            head = (
                f"HTTP/1.1 {error.status} {_PHRASES[error.status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

        def _arm(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(seconds, self._too_slow)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._timer = None
            self._refuse(ApiError(408, "body_timeout", f"No whole request came within {seconds:g} s."))

    return Guarded


class _Quiet(uvicorn.Server):
    """Signals are the process's business, which drains the engine first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """The API on a port."""

    def __init__(self, app: Starlette, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._socket: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None
        self._server: _Quiet | None = None

    @property
    def port(self) -> int:
        assert self._socket is not None, "the server has not been started"
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        host = self._settings.host
        shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
        return f"http://{shown}:{self.port}"

    async def start(self, *, or_next: int = 0) -> None:
        """Listen. `or_next`: so many ports after the wished one are tried when that is taken. Raises PortTaken."""
        settings = self._settings
        self._socket = _listen(settings.host, settings.port, or_next)
        config = uvicorn.Config(
            self._app,
            http=_guarded(settings),
            ws="websockets-sansio",
            ws_max_size=1 << 20,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(1, settings.keep_alive_ms // 1000),
            timeout_graceful_shutdown=int(STOP_SECONDS),
        )
        self._server = _Quiet(config)
        self._serving = asyncio.create_task(self._server.serve([self._socket]), name="durable-http")
        while not self._server.started:
            if self._serving.done():
                await self._serving
                raise DurableError("The HTTP server has ended before it began.")
            await asyncio.sleep(0.005)
        await self._app.state.service.start(f"http://127.0.0.1:{self.port}")

    def drain(self) -> None:
        """Be not ready any more, and end streams; requests are still answered."""
        self._app.state.service.drain()

    async def stop(self) -> None:
        """Take no more, finish what is under way, within bounds. Idempotent."""
        self.drain()
        if self._server is None or self._serving is None:
            return
        await self._app.state.service.close()
        self._server.should_exit = True
        with suppress(asyncio.CancelledError):
            await self._serving
        self._serving = None


def _listen(host: str, port: int, or_next: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for wished in range(port, port + 1 + (or_next if port else 0)):
        # Named a TCP socket: only on those does asyncio send small answers at once, and not 40 ms later.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if os.name != "nt":
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, wished))
            listening.listen(2048)
            return listening
        except OSError as error:
            listening.close()
            problem = error
    raise PortTaken(
        f"Port {port} on {host} cannot be had: {problem.strerror}. Give another: --port 3031, or PORT."
    ) from problem
