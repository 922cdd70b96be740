"""Runners that dial in, the engine's end (wire section 5): a session over a socket of text frames.

The server adapts its WebSocket to `Socket` and awaits `Session.run`; what a frame may say and when is decided here. A session
that breaks the order is closed with 1002, one that floods or registers nonsense with 1008, one that does not read with
1013. When it ends, whatever it was asked and has not answered goes elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from durable.core.errors import DurableError, RunnerGone, RunnerRefused, RunnerTimeout
from durable.core.functions import Pass, Reply
from durable.runners.interface import MAX_BODY

log = logging.getLogger("durable.runners")

SUBPROTOCOLS = ("durable.connect.v0", "duraton.connect.v0")
"""In the order in which they are taken where both are offered."""
VERSION = 1
MAX_IN_FLIGHT = 1_000
"""Passes one runner may be asked for at once."""
FRAMES_PER_SECOND = 2_000.0
FRAMES_AT_ONCE = 10_000.0
SEND_SECONDS = 10.0
"""How long a frame may wait to be taken."""
REGISTER_SECONDS = 10.0
"""How long a socket may be open before it says who it is."""

PROTOCOL_ERROR, POLICY, TRY_LATER, TOO_BIG, REPLACED = 1002, 1008, 1013, 1009, 4409

_encode = msgspec.json.Encoder().encode


class SocketClosed(Exception):
    """The other side is gone. `code`: of its closing, where it said one."""

    def __init__(self, code: int = 1006) -> None:
        super().__init__(f"closed with {code}")
        self.code = code


class Socket(Protocol):
    """A socket of text frames."""

    async def receive(self) -> str:
        """The next frame. Raises SocketClosed."""
        ...

    async def send(self, text: str) -> None:
        """Returns once it is on its way. Raises SocketClosed."""
        ...

    async def close(self, code: int, reason: str) -> None:
        """Once; later calls do nothing."""
        ...


class Frame(Struct):
    """The envelope of both directions."""

    type: str
    id: Any = None
    payload: Raw | UnsetType = UNSET


class _Result(Struct):
    status: int
    body: Raw | UnsetType = UNSET


Registered = Callable[["Session", bytes], Awaitable[None]]
"""Takes the payload of `runner.register`. Raises DurableError: the session is closed with what it says."""


class Session:
    """One runner's connection. `invoke` is its RunnerLink."""

    def __init__(
        self,
        socket: Socket,
        workspace: str,
        *,
        key_id: str | None,
        instance: str,
        heartbeat_ms: int,
        monotonic: Callable[[], float],
    ) -> None:
        self.socket = socket
        self.workspace = workspace
        self.key_id = key_id
        """Of the key it came with; None: it came without."""
        self.instance = instance
        self.heartbeat_ms = heartbeat_ms
        self.registered = False
        self.on_life: Callable[[], None] = lambda: None
        """Called with every frame of a registered runner."""
        self._monotonic = monotonic
        self._answers: dict[str, asyncio.Future[Reply]] = {}
        self._asked = 0
        self._ended: int | None = None
        self._listening: asyncio.Timeout | None = None
        self._sending = asyncio.Lock()
        self._budget = FRAMES_AT_ONCE
        self._budget_at = monotonic()

    @property
    def in_flight(self) -> int:
        """Passes it has been asked for and has not answered."""
        return len(self._answers)

    @property
    def alive(self) -> bool:
        return self.registered and self._ended is None

    async def run(self, register: Registered) -> None:
        """From hello to the end of the connection."""
        try:
            await self._converse(register)
        except SocketClosed as closed:
            self._end(closed.code)
        except _Broken as broken:
            await self.close(broken.code, broken.reason)
        finally:
            self._end(1006)

    async def close(self, code: int, reason: str) -> None:
        """End it from this side."""
        self._end(code)
        with contextlib.suppress(SocketClosed, TimeoutError):
            async with asyncio.timeout(SEND_SECONDS):
                await self.socket.close(code, reason[:120])

    async def invoke(self, call: Pass, *, timeout: float) -> Reply:
        """Ask this runner for a pass."""
        if not self.alive:
            raise RunnerGone("The runner has just gone.")
        if len(self._answers) >= MAX_IN_FLIGHT:
            raise RunnerGone(f"The runner has {MAX_IN_FLIGHT:,} passes under way, which is the most one may have.")
        self._asked += 1
        id = f"p{self._asked}"
        frame = b'{"type":"invoke","id":"%b","payload":%b}' % (id.encode(), call.body)
        if len(frame) > MAX_BODY:
            raise RunnerRefused(
                f"A pass of run {call.run_id} is a frame of {len(frame):,} bytes, and the limit is {MAX_BODY:,} (1 MiB): its "
                "event and what its steps returned are too large together. Keep large values elsewhere, and return where.",
                retryable=False,
            )
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._answers[id] = answer
        try:
            async with asyncio.timeout(timeout):
                try:
                    await self._send(frame.decode())
                except SocketClosed:
                    raise RunnerGone("The runner went away before it could be asked.") from None
                return await answer
        except TimeoutError:
            raise RunnerTimeout(
                f"The runner did not answer within {timeout:g} s. A result above the limit of {MAX_BODY:,} bytes (1 MiB) cannot "
                "be sent, and then no answer comes."
            ) from None
        finally:
            del self._answers[id]
            if answer.done() and not answer.cancelled():
                answer.exception()  # seen, also where sending broke off before anybody waited for it

    # ------------------------------------------------------------------ what it says

    async def _converse(self, register: Registered) -> None:
        hello = {
            "protocolVersion": VERSION,
            "minProtocolVersion": VERSION,
            "maxProtocolVersion": VERSION,
            "heartbeatMs": self.heartbeat_ms,
        }
        await self._send(_encode({"type": "hello", "payload": hello}).decode())
        while True:
            frame = await self._next()
            if self.registered:
                self.on_life()
            if frame.type == "ping":
                await self._send('{"type":"pong"}')
            elif frame.type == "runner.register":
                if self.registered:
                    raise _Broken(PROTOCOL_ERROR, "runner.register came twice")
                await self._register(register, frame)
            elif frame.type == "invoke.result":
                self._take(frame)
            elif frame.type in ("hello", "invoke"):
                raise _Broken(PROTOCOL_ERROR, f"{frame.type} is the engine's to say")

    async def _next(self) -> Frame:
        limit = 3 * self.heartbeat_ms / 1_000 if self.registered else REGISTER_SECONDS
        try:
            async with asyncio.timeout(limit) as self._listening:
                if self._ended is not None:
                    raise SocketClosed(self._ended)
                text = await self.socket.receive()
        except TimeoutError:
            if self._ended is not None:  # hung up on from here: what it may still say is not waited for
                raise SocketClosed(self._ended) from None
            if not self.registered:
                raise _Broken(POLICY, "it did not register") from None
            raise _Broken(POLICY, "three heartbeats are missing") from None
        self._spend()
        if len(text) > MAX_BODY:
            raise _Broken(TOO_BIG, f"a frame has at most {MAX_BODY} bytes")
        try:
            return msgspec.json.decode(text, type=Frame)
        except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
            raise _Broken(PROTOCOL_ERROR, "a frame is a JSON object with a type") from None

    def _spend(self) -> None:
        now = self._monotonic()
        self._budget = min(FRAMES_AT_ONCE, self._budget + (now - self._budget_at) * FRAMES_PER_SECOND) - 1
        self._budget_at = now
        if self._budget < 0:
            raise _Broken(POLICY, "too many frames")

    async def _register(self, register: Registered, frame: Frame) -> None:
        try:
            await register(self, _given(frame.payload))
        except DurableError as error:
            log.info("a runner of workspace %s is refused: %s", self.workspace, error)
            said = {"type": "error", "payload": {"message": str(error), "code": error.code}}
            await self._send(_encode(said).decode())
            raise _Broken(POLICY, str(error)) from None
        self.registered = True

    def _take(self, frame: Frame) -> None:
        if not self.registered:
            raise _Broken(PROTOCOL_ERROR, "invoke.result came before runner.register")
        id = frame.id
        number = id[1:] if isinstance(id, str) and id[:1] == "p" else ""
        if not number.isdecimal() or not 1 <= int(number[:20]) <= self._asked:
            raise _Broken(PROTOCOL_ERROR, "invoke.result for what was never asked")
        answer = self._answers.get(f"p{int(number)}")
        if answer is None or answer.done():
            return  # too late
        try:
            result = msgspec.json.decode(_given(frame.payload), type=_Result)
        except msgspec.MsgspecError:
            answer.set_result(Reply(0, b""))
            return
        answer.set_result(Reply(result.status, _given(result.body)))

    async def _send(self, text: str) -> None:
        if self._ended is not None:
            raise SocketClosed(self._ended)
        try:
            async with asyncio.timeout(SEND_SECONDS), self._sending:
                await self.socket.send(text)
        except TimeoutError:
            await self.close(TRY_LATER, "it does not read")
            raise SocketClosed(TRY_LATER) from None

    def _end(self, code: int) -> None:
        if self._ended is not None:
            return
        self._ended = code
        if self._listening is not None:
            with contextlib.suppress(RuntimeError):  # it does not listen just now
                self._listening.reschedule(0)
        if code == TOO_BIG:
            why: Exception = RunnerRefused(
                f"The runner's connection ended over a frame above the limit of {MAX_BODY:,} bytes (1 MiB).",
                retryable=False,
            )
        else:
            why = RunnerGone("The runner went away before it answered.")
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(why)


def _given(data: Raw | UnsetType) -> bytes:
    return bytes(data) if isinstance(data, Raw) else b"{}"


class _Broken(Exception):
    """The session breaks off."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
