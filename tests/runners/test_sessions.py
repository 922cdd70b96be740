"""A runner's session by itself: its bounds in size, number and time, over a socket that is two queues."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest

from durable.core.errors import RunnerGone, RunnerRefused
from durable.core.functions import Pass
from durable.runners import connect
from durable.runners.connect import Session, SocketClosed


class Queues:
    """A socket in memory: what is put into `inbound` is received."""

    def __init__(self) -> None:
        self.inbound: asyncio.Queue[str] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.closed: int | None = None
        self.stuck = False

    async def receive(self) -> str:
        return await self.inbound.get()

    async def send(self, text: str) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        self.sent.append(msgspec.json.decode(text))

    async def close(self, code: int, reason: str) -> None:
        self.closed = self.closed or code

    def say(self, type: str, **fields: Any) -> None:
        self.inbound.put_nowait(msgspec.json.encode({"type": type, **fields}).decode())


async def nothing(session: Session, payload: bytes) -> None:
    """Takes any registration."""


def session_of(socket: Queues, heartbeat_ms: int = 10_000) -> Session:
    return Session(socket, "shop.dev", key_id=None, instance="i", heartbeat_ms=heartbeat_ms, monotonic=time.monotonic)


def pass_of(body: bytes = b"{}") -> Pass:
    return Pass("shop.dev", "shop", "order", "1", "order", "run", "runner", body)


async def ended(socket: Queues, session: Session) -> int | None:
    async with asyncio.timeout(5):
        await session.run(nothing)
    return socket.closed


async def test_three_silent_heartbeats_end_it_and_any_frame_is_life() -> None:
    """Pings are answered; frames of unknown types keep a session alive; silence for three intervals ends it."""
    socket = Queues()
    session = session_of(socket, heartbeat_ms=60)
    socket.say("runner.register", payload={})
    running = asyncio.create_task(session.run(nothing))
    for number in range(6):
        await asyncio.sleep(0.05)
        socket.say("ping" if number % 2 else "something.new")
        assert session.alive
    async with asyncio.timeout(5):
        await running
    assert socket.closed == 1008
    assert [frame["type"] for frame in socket.sent] == ["hello", "pong", "pong", "pong"]
    with pytest.raises(RunnerGone):
        await session.invoke(pass_of(), timeout=1)


async def test_a_flood_of_frames_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A27: more frames than a runner ever has to send are a reason to hang up; nothing piles up here."""
    monkeypatch.setattr(connect, "FRAMES_AT_ONCE", 50.0)
    socket = Queues()
    session = session_of(socket)
    session._budget = 50.0
    socket.say("runner.register", payload={})
    for _ in range(500):
        socket.say("ping")
    assert await ended(socket, session) == 1008
    assert len(socket.sent) < 100


async def test_a_frame_above_the_limit_ends_it() -> None:
    """A26: more than 1 MiB, should the socket let it through."""
    socket = Queues()
    socket.inbound.put_nowait(" " * ((1 << 20) + 1))
    assert await ended(socket, session_of(socket)) == 1009


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"type":1}', "\ud800", "[" * 100_000])
async def test_what_is_no_frame_ends_it(text: str) -> None:
    """A16, A19: nonsense closes with 1002, whatever it is."""
    socket = Queues()
    socket.inbound.put_nowait(text)
    assert await ended(socket, session_of(socket)) == 1002


async def test_one_that_does_not_read_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A27: a frame that is not taken in time ends the session, and the pass goes elsewhere."""
    monkeypatch.setattr(connect, "SEND_SECONDS", 0.05)
    socket = Queues()
    session = session_of(socket)
    socket.say("runner.register", payload={})
    running = asyncio.create_task(session.run(nothing))
    await asyncio.sleep(0.02)
    socket.stuck = True
    with pytest.raises(RunnerGone):
        await session.invoke(pass_of(), timeout=5)
    assert socket.closed == 1013
    running.cancel()


async def test_a_pass_above_the_limit_is_refused_with_the_limit() -> None:
    """B59 the other way: what a runner could not be sent is a typed error that names the limit, and no retry mends it."""
    socket = Queues()
    session = session_of(socket)
    socket.say("runner.register", payload={})
    running = asyncio.create_task(session.run(nothing))
    await asyncio.sleep(0.02)
    with pytest.raises(RunnerRefused, match="1 MiB") as refused:
        await session.invoke(pass_of(b'"' + b"x" * (1 << 20) + b'"'), timeout=1)
    assert not refused.value.retryable
    running.cancel()


async def test_a_closed_socket_lets_its_passes_go_at_once() -> None:
    """What was asked and not answered is gone with the connection; after a frame that was too big, with its reason."""
    for code, expected in ((1006, RunnerGone), (1009, RunnerRefused)):
        socket = Queues()
        session = session_of(socket)
        socket.say("runner.register", payload={})
        running = asyncio.create_task(session.run(nothing))
        await asyncio.sleep(0.02)
        asking = asyncio.create_task(session.invoke(pass_of(), timeout=30))
        await asyncio.sleep(0.02)

        async def broken(code: int = code) -> str:
            raise SocketClosed(code)

        socket.receive = broken  # type: ignore[method-assign]
        socket.say("ping")
        with pytest.raises(expected):
            await asyncio.wait_for(asking, 5)
        await running
