"""A runner that serves: over real HTTP, alone, mounted in Starlette, FastAPI and Flask; signed, bounded, checking in."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from flask import Flask
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from durable import Context, workflow
from durable.core.errors import DefinitionError
from durable.protocol.runners import MAX_FRAME
from durable.protocol.signature import HEADER, check, fingerprint, sign
from durable.runners import serving
from durable.runners.serving import RegistrationRefused, Serving, serve
from durable.testing.clock import ManualClock
from durable.testing.facts import eventually
from tests.runners.little_engine import LittleEngine

KEY = "dk_shop.dev_secret"


@workflow("adds")
async def adds(ctx: Context, numbers: list[int]) -> int:
    total = 0
    for number in numbers:
        total = await ctx.step("add", lambda a, b: a + b, total, number)
    return total


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """The base URL of a real server over an ASGI app."""
    place = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on", timeout_graceful_shutdown=5))
    work = asyncio.create_task(server._serve([place]))
    await eventually(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.should_exit = True
        await work
        place.close()


class Asking:
    """The engine's end: posts invokes, signed, and checks what comes back."""

    def __init__(self, url: str, key: str | None = KEY) -> None:
        self.url = url
        self.key = key

    def headers(self, method: str, path: str, body: bytes, nonce: str) -> dict[str, str]:
        if self.key is None:
            return {}
        return {HEADER: sign(self.key, method, path, body, ts=int(time.time()), nonce=nonce)}

    async def __call__(self, invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        body, nonce = json.dumps(invoke).encode(), secrets.token_urlsafe(16)
        target = httpx2.URL(f"{self.url}/invoke")
        path = target.raw_path.decode()
        async with httpx2.AsyncClient() as client:
            answer = await client.post(target, content=body, headers=self.headers("POST", path, body, nonce))
        if self.key is not None and answer.status_code != 401:
            given = answer.headers.get_list(HEADER)
            check(given, [self.key], str(answer.status_code), path, answer.content, now=time.time(), nonce=nonce)
        return answer.status_code, answer.json()


def runner(*flows: Any, key: str | None = KEY, **options: Any) -> Serving:
    return serve(flows or [adds], app="shop.dev", key=key, **options)


def invoke(name: str = "adds", data: Any = None) -> dict[str, Any]:
    return LittleEngine(None, name, data).invoke()  # type: ignore[arg-type]


async def test_a_run_over_http() -> None:
    """Alone on a server, its lifespan starts it; a run goes through it to its end, signed both ways."""
    async with listening(runner()) as url:
        assert await LittleEngine(Asking(url), "adds", [1, 2, 3]).run() == 6
        assert await LittleEngine(Asking(url), "adds", [1, 2], ours=False).run() == 3


def fastapi(one: Serving) -> Any:
    app = FastAPI(lifespan=one.lifespan)
    app.mount("/durable", one)
    return app


def starlette(one: Serving) -> Any:
    return Starlette(routes=[Mount("/durable", one)], lifespan=one.lifespan)


@pytest.mark.parametrize("mounted", [fastapi, starlette])
async def test_mounted_in_an_app(mounted: Callable[[Serving], Any]) -> None:
    """Below a path of somebody's app, which starts and stops it: the path that is signed is the whole one."""
    one = runner()
    async with listening(mounted(one)) as url:
        assert await LittleEngine(Asking(f"{url}/durable"), "adds", [1, 2, 3]).run() == 6
        async with httpx2.AsyncClient() as client:
            answer = await client.get(f"{url}/durable/", headers=Asking(url).headers("GET", "/durable/", b"", "n" * 16))
        assert answer.json()["app"] == "shop.dev"
    assert one._users == 0


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


async def test_mounted_in_flask() -> None:
    """As a WSGI app, on a thread of its own, from the first request on; closed, the thread has ended."""
    one = runner()
    app = Flask("shop")
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/durable": one.wsgi})  # type: ignore[method-assign]
    server = make_server("127.0.0.1", 0, app, handler_class=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert await LittleEngine(Asking(f"{url}/durable"), "adds", [1, 2, 3]).run() == 6
        status, _ = await Asking(f"{url}/durable", "another")(invoke())
        assert status == 401
        async with httpx2.AsyncClient() as client:
            big = await client.post(f"{url}/durable/invoke", content=b"x" * (MAX_FRAME + 1))
        assert big.status_code == 413
        assert any(thread.name == "durable-runner" for thread in threading.enumerate())
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()
        one.wsgi.close()
    assert not any(thread.name == "durable-runner" for thread in threading.enumerate())
    one.wsgi.close()


async def test_unsigned_and_wrongly_signed_requests_are_refused() -> None:
    """A01 A05: none, of another key, of another path, twice: 401 with the same words, and nothing is run."""
    ran: list[int] = []

    @workflow("counts")
    async def counts(ctx: Context) -> None:
        await ctx.step("s", lambda: ran.append(1))

    async with listening(runner(counts)) as url, httpx2.AsyncClient() as client:
        body = json.dumps(invoke("counts")).encode()

        async def post(*headers: tuple[str, str], path: str = "/invoke") -> httpx2.Response:
            return await client.post(url + path, content=body, headers=list(headers))

        good = Asking(url).headers("POST", "/invoke", body, "n" * 16)[HEADER]
        other = Asking(url, "another").headers("POST", "/invoke", body, "m" * 16)[HEADER]
        answers = [
            await post(),
            await post((HEADER, "")),
            await post((HEADER, other)),
            await post((HEADER, good), (HEADER, good)),
            await post((HEADER, good), path="/invoke?x=1"),
        ]
        assert {answer.status_code for answer in answers} == {401}
        assert len({answer.content for answer in answers}) == 1
        assert HEADER not in answers[0].headers
        assert ran == []
        assert (await post((HEADER, good))).status_code == 206
        assert (await post((HEADER, good))).status_code == 401
        assert ran == [1]


async def test_old_signatures_are_refused() -> None:
    """Five minutes off by this runner's clock."""
    clock = ManualClock(int((time.time() + 301) * 1e6))
    async with listening(runner(clock=clock)) as url:
        status, _ = await Asking(url)(invoke())
        assert status == 401


async def test_bodies_are_bounded() -> None:
    """Over 1 MiB: 413, whether the length is said or the bytes just come."""

    async def stream() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100_000

    async with listening(runner(key=None)) as url, httpx2.AsyncClient() as client:
        for content in (b"x" * (MAX_FRAME + 1), stream()):
            answer = await client.post(f"{url}/invoke", content=content)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


async def test_what_is_not_there_and_what_is_no_invoke() -> None:
    """404, 405, and 422 for a body without the three objects: errors as data, none of which ends a run."""
    async with listening(runner(key=None)) as url, httpx2.AsyncClient() as client:
        assert (await client.get(f"{url}/invoke")).status_code == 405
        assert (await client.post(f"{url}/")).status_code == 405
        assert (await client.get(f"{url}/nothing")).status_code == 404
        for body in (b"", b"{", b"[]", b'{"event":{"name":"e"},"steps":{}}'):
            answer = await client.post(f"{url}/invoke", content=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "malformed_invoke")


async def test_a_runner_that_is_full_says_so() -> None:
    """503 beyond its bound: asked again later, or elsewhere."""
    gate = asyncio.Event()

    @workflow("waits")
    async def waits(ctx: Context) -> None:
        await ctx.step("s", gate.wait)

    one = runner(waits, key=None, concurrency=1)
    async with listening(one) as url:
        first = asyncio.create_task(Asking(url, None)(invoke("waits")))
        await eventually(lambda: one.runner.under_way == 1)
        status, body = await Asking(url, None)(invoke("waits"))
        assert (status, body["error"]["code"]) == (503, "busy")
        gate.set()
        assert (await first)[0] == 206


async def test_a_pass_nobody_waits_for_is_cut_short() -> None:
    """The engine hung up: it asks again, so the body here is cancelled."""
    cut: list[bool] = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cut.append(True)
            raise

    @workflow("forever")
    async def flow(ctx: Context) -> None:
        await ctx.step("s", forever)

    one = runner(flow, key=None)
    async with listening(one) as url:
        asked = asyncio.create_task(Asking(url, None)(invoke("forever")))
        await eventually(lambda: one.runner.under_way == 1)
        asked.cancel()
        await eventually(lambda: cut == [True])


async def test_it_drains() -> None:
    """Closed, it lets a pass under way finish, and takes no new one."""
    gate = asyncio.Event()

    @workflow("slow")
    async def flow(ctx: Context) -> None:
        await ctx.step("s", gate.wait)

    one = runner(flow, key=None)
    await one.start()
    answering = asyncio.create_task(one.runner.answer(json.dumps(invoke("slow")).encode()))
    await eventually(lambda: one.runner.under_way == 1)
    closing = asyncio.create_task(one.close(10))
    await eventually(lambda: one._closing)
    status, _, said = await one._respond("POST", "/invoke", "/invoke", [], b"{}")
    assert (status, json.loads(said)["error"]["code"]) == (503, "draining")
    gate.set()
    await closing
    assert (await answering)[0] == 206


class Book:
    """The engine's `/register`."""

    def __init__(self) -> None:
        self.entries: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.status = 200
        self.app = Starlette(routes=[Route("/base/register", self.take, methods=["POST"])])

    async def take(self, request: Request) -> JSONResponse:
        self.entries.append((dict(request.headers), await request.json()))
        return JSONResponse({"ok": True} if self.status < 300 else {"error": {"message": "no"}}, self.status)


async def test_it_checks_in_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: registered when it starts, with URL and key fingerprint, again on the beat, and on demand; not once it is closed."""
    monkeypatch.setattr(serving, "REGISTER_SECONDS", 0.05)
    book = Book()
    async with listening(book.app) as engine:
        one = runner(url="https://shop.example/durable/", engine=f"{engine}/base/", runner="r1")
        async with one:
            await eventually(lambda: len(book.entries) >= 3)
            headers, said = book.entries[0]
            assert headers["authorization"] == f"Bearer {KEY}"
            assert said["url"] == "https://shop.example/durable/invoke"
            assert said["keyFingerprint"] == fingerprint(KEY)
            assert (said["runner"], said["app"], said["framework"]) == ("r1", "shop.dev", "fastapi")
            assert [one["name"] for one in said["workflows"]] == ["adds"]
            assert one.registered
            assert await one.register() == {"ok": True}
            beating = [task for task in asyncio.all_tasks() if task.get_name() == "durable-runner-register"]
        assert [task.done() for task in beating] == [True]
        assert not one.registered


async def test_an_engine_that_is_away_is_tried_again(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Nobody is held up by it; what is wrong is said once; a refusal is an error for who asks."""
    monkeypatch.setattr(serving, "RETRY_SECONDS", 0.01)
    book = Book()
    book.status = 403
    with caplog.at_level(logging.INFO, "durable.runner"):
        async with listening(book.app) as engine:
            one = runner(url="https://shop.example/durable", engine=f"{engine}/base")
            async with one:
                await eventually(lambda: len(book.entries) >= 3)
                with pytest.raises(RegistrationRefused, match="403"):
                    await one.register()
                assert not one.registered
                book.status = 200
                await eventually(lambda: one.registered)
    assert caplog.text.count("is not registered") == 1
    assert "is registered with" in caplog.text


def test_what_cannot_serve_is_refused() -> None:
    """An engine without a URL to be reached at, and URLs that are none."""
    with pytest.raises(DefinitionError, match="reached at"):
        runner(engine="https://durable.example")
    with pytest.raises(DefinitionError, match="http"):
        runner(url="shop.example")
