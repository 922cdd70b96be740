"""A real service on a loopback port, in a thread with a loop of its own, and what tests ask it with."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2

from durable import Context, Durable, RetryPolicy
from durable.core.flow import RateLimit
from durable.server.app import create_app
from durable.server.connections import HttpServer
from durable.server.settings import ServerSettings
from durable.testing.facts import eventually

T = TypeVar("T")
ADMIN = "an-admin-token-for-tests"
JSON = {"content-type": "application/json"}


async def greet(name: str) -> str:
    return f"hello {name}"


async def explode(what: str) -> str:
    raise ValueError(f"cannot bear {what}")


def workflows(app: Any) -> None:
    """The same small workflows for an app, or (by `register`) for a workspace's registry."""

    @app.workflow
    async def hello(ctx: Context, name: str) -> str:
        ctx.log("greeting", who=name)
        greeting: str = await ctx.step(greet, name)
        return greeting

    @app.workflow
    async def broken(ctx: Context, what: str) -> str:
        result: str = await ctx.step(explode, what, retries=RetryPolicy(max_attempts=2, initial_delay=0.01))
        return result

    @app.workflow
    async def waits(ctx: Context) -> Any:
        ctx.log("waiting")
        return await ctx.wait_for_signal("go")

    @app.workflow
    async def many(ctx: Context, count: int) -> int:
        for n in range(count):
            ctx.log(f"line {n}")
            await ctx.step(greet, str(n))
        return count

    @app.workflow(on="order.placed")
    async def on_order(ctx: Context, order: dict[str, Any]) -> Any:
        return order["id"]

    @app.workflow(on="order.placed", rate_limit=RateLimit(limit=1, period="1h", key="event.data.customer"))
    async def once_an_hour(ctx: Context, order: dict[str, Any]) -> Any:
        return order["customer"]

    @app.workflow
    async def waits_for_event(ctx: Context) -> Any:
        found = await ctx.wait_for_event("payment.done", timeout="1h")
        return found.data

    @app.workflow
    async def anything(ctx: Context, value: Any) -> Any:
        return value


class Running:
    """A service that runs; `do` runs a coroutine on its loop."""

    def __init__(self, app: Durable, settings: ServerSettings, local_app: str | None = None) -> None:
        self.app = app
        self.settings = settings
        self.local_app = local_app
        self.url = ""
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="service-under-test", daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._problem = error
        finally:
            self._up.set()
            self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        async with self.app:
            self.http = HttpServer(create_app(self.app.engine, self.settings, local_app=self.local_app), self.settings)
            self.asgi = self.http._app
            await self.http.start()
            self.port, self.url = self.http.port, f"http://127.0.0.1:{self.http.port}"
            self._up.set()
            await self._stop.wait()
            await self.http.stop()

    def __enter__(self) -> Running:
        self._thread.start()
        self._up.wait(30)
        if self._problem is not None:
            raise self._problem
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        if self._problem is not None:
            raise self._problem

    def do(self, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
        async def go() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(go(), self._loop).result(30)

    def call(self, function: Callable[[], T]) -> T:
        """A plain call on the service's loop."""

        async def go() -> T:
            return function()

        return self.do(go())

    def client(self, key: str | None = None, **options: Any) -> httpx2.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=20, **options)

    def make_app(self, name: str, environment: str = "dev") -> str:
        """A workspace with the small workflows; its key."""
        with self.client(ADMIN) as admin:
            made = admin.post("/api/apps", json={"name": name, "environment": environment}).raise_for_status().json()
        holder = Durable("memory://")
        workflows(holder)
        self.call(lambda: self.app.engine.deps.catalog.put(made["id"], holder.registry))
        return str(made["signingKey"])


@contextmanager
def running(store: str = "memory://", *, local_app: str | None = None, **settings: Any) -> Iterator[Running]:
    """A service in production's manner unless told otherwise."""
    app = Durable(store)
    workflows(app)
    defaults: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "production": True, "admin_token": ADMIN}
    with Running(app, ServerSettings(**(defaults | settings)), local_app) as service:
        yield service


def raw(port: int, data: bytes, *, more: list[bytes] | None = None, timeout: float = 10.0) -> bytes:
    """Bytes on a socket, and all that comes back until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        try:
            sock.sendall(data)
            for part in more or []:
                sock.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while part := sock.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def status_of(answer: bytes) -> int:
    """The status of the first answer; 0: closed without one."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def until(fact: Callable[[], object], claim: str = "") -> None:
    """Wait for a fact that is asked for over HTTP, off the service's loop."""
    asyncio.run(eventually(fact, claim))


def finished(client: httpx2.Client, run_id: str) -> dict[str, Any]:
    """The run, once it has ended: its stream ends by itself then."""
    with client.stream("GET", f"/runs/{run_id}/stream") as stream:
        assert stream.status_code == 200
        for _ in stream.iter_bytes():
            pass
    found: dict[str, Any] = client.get(f"/runs/{run_id}").raise_for_status().json()
    return found


def frames(text: str) -> list[dict[str, Any]]:
    """Server-sent events as {id, event, data}."""
    import json

    found = []
    for part in text.split("\n\n"):
        lines = [line for line in part.split("\n") if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            found.append(fields | {"data": json.loads(fields["data"])})
    return found
