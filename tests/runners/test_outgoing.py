"""Outgoing calls to addresses that somebody else has chosen: what is never called, and what an answer may cost."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from durable.core.errors import CallRefused, RunnerGone, RunnerRefused, RunnerTimeout
from durable.runners import outgoing
from durable.runners.outgoing import Calls, Outgoing, check_url
from tests.runners.apps import HttpServer

EVERYTHING = Calls(loopback=True, private=True)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:169.254.169.254]/",
        "http://[fd00:ec2::254]/",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "http://0251.0376.0251.0376/",
        "http://100.100.100.200/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[fe80::1%25eth0]/",
        "http://0.0.0.0/",
        "http://[::]/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "ftp://example.com/",
        "http://user:secret@example.com/",
        "http:///nothing",
        "http://exa mple.com/",
        "http://example.com:99999/",
        "javascript:alert(1)",
        "",
    ],
)
async def test_some_addresses_are_never_called(url: str) -> None:
    """A31: metadata in every spelling, other schemes and nonsense are refused whatever is allowed, and no credential is told."""
    calls = Outgoing(EVERYTHING)
    try:
        with pytest.raises(CallRefused) as refused:
            await calls.request("POST", url)
        assert "secret" not in str(refused.value)
    finally:
        await calls.close()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://localhost./",
        "http://api.localhost/",
        "http://0x7f000001/",
        "http://2130706433/",
        "http://127.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://172.16.0.1/",
        "http://100.64.0.1/",
        "http://[fd12::1]/",
        "http://[2002:7f00:1::]/",
    ],
)
async def test_this_machine_and_private_networks_need_a_setting(url: str) -> None:
    """A31: without a setting neither this machine nor a private network is called; the refusal names the setting."""
    with pytest.raises(CallRefused, match="DURABLE_PRIVATE_CALLS"):
        check_url(url, Calls())


async def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A32: a name that is public when first asked for and private after that is asked for once, and every address it has is
    checked."""
    asked: list[str] = []
    answers = [["93.184.216.34", "10.0.0.1"], ["127.0.0.1"]]

    async def resolve(host: str, port: int) -> list[Any]:
        asked.append(host)
        return [ipaddress.ip_address(one) for one in answers[min(len(asked), len(answers)) - 1]]

    monkeypatch.setattr(outgoing, "resolve", resolve)
    calls = Outgoing(Calls())
    try:
        with pytest.raises(CallRefused, match="private"):
            await calls.request("GET", "http://rebinding.example/")
        assert asked == ["rebinding.example"]
        with pytest.raises(CallRefused, match="machine"):
            await calls.request("GET", "http://rebinding.example/")
    finally:
        await calls.close()


async def test_a_checked_address_is_what_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A32: the name is resolved once for a call; the request still bears the name."""
    seen: list[str] = []

    async def answer(request: Request) -> Response:
        seen.append(request.headers["host"])
        return Response(b"{}")

    async def resolve(host: str, port: int) -> list[Any]:
        return [ipaddress.ip_address("127.0.0.1")]

    monkeypatch.setattr(outgoing, "resolve", resolve)
    async with HttpServer(Starlette(routes=[Route("/", answer, methods=["POST"])])) as server:
        calls = Outgoing(Calls(loopback=True))
        assert (await calls.request("POST", f"http://app.example:{server.port}/")).status == 200
        assert seen == [f"app.example:{server.port}"]
        await calls.close()


async def test_answers_are_bounded_and_redirects_are_answers() -> None:
    """A33: a redirect is not followed, a large or endless answer is cut at the limit or the time, a compressed one that was not
    asked for is refused; what an answer says is in no error."""

    async def redirect(request: Request) -> Response:
        return RedirectResponse("http://169.254.169.254/")

    async def endless(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            while True:
                yield b"secret" * 10_000
                await asyncio.sleep(0)

        return StreamingResponse(parts())

    async def declared(request: Request) -> Response:
        return Response(b"x" * 2_000_000)

    async def silent(request: Request) -> Response:
        await asyncio.sleep(30)
        return Response()

    async def packed(request: Request) -> Response:
        return Response(b"bomb", headers={"content-encoding": "gzip"})

    routes = [Route(f"/{one.__name__}", one) for one in (redirect, endless, declared, silent, packed)]
    async with HttpServer(Starlette(routes=routes)) as server:
        calls = Outgoing(Calls(loopback=True))
        base = f"http://127.0.0.1:{server.port}"
        assert (await calls.request("GET", f"{base}/redirect")).status == 307
        for path in ("endless", "declared"):
            with pytest.raises(RunnerRefused, match="1,048,576 bytes") as refused:
                await calls.request("GET", f"{base}/{path}")
            assert "secret" not in str(refused.value)
            assert not refused.value.retryable
        with pytest.raises(RunnerTimeout, match=r"0\.1 s"):
            await calls.request("GET", f"{base}/silent", timeout=0.1)
        with pytest.raises(RunnerRefused, match="encoding"):
            await calls.request("GET", f"{base}/packed")
        with pytest.raises(RunnerRefused, match="limit"):
            await calls.request("POST", f"{base}/redirect", body=b"x" * (1 << 20 | 1))
        await calls.close()


async def test_nobody_there() -> None:
    """A refused connection means that nobody is there."""
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    calls = Outgoing(Calls(loopback=True))
    with pytest.raises(RunnerGone):
        await calls.request("GET", f"http://127.0.0.1:{port}/")
    await calls.close()
