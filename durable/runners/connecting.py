"""Connect: a runner that dials the engine, for apps that nobody can reach. One WebSocket, which it keeps.

    async with connect(app, "wss://durable.example", app="shop.dev", key=KEY):
        ...
    await connect(app, "wss://durable.example", app="shop.dev", key=KEY).run()      until SIGTERM, then drained

It says what it runs, answers invokes as they come, and pings, so that the engine knows it lives while bodies take long. A broken
connection is made anew, ever more slowly while that fails; the passes under way on it are given up, since the engine asks
others for them. On the way out those are finished, and no new one is begun.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import msgspec
from msgspec import Raw

from durable.core.errors import DefinitionError, DurableError
from durable.protocol.runners import MAX_FRAME, SUBPROTOCOLS, VERSION, Envelope, Hello, read_envelope
from durable.runners.passes import broken
from durable.runners.runner import Malformed, Runner, fitting
from durable.worker.stopping import stop_signals

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

log = logging.getLogger("durable.runner")

HELLO_SECONDS = 10.0
"""Until the engine's first frame, and for opening the connection."""
FIRST_PAUSE = 0.5
"""Seconds before the second try; doubled each time, up to the longest. Of each a random part is left out."""
LONGEST_PAUSE = 30.0
STEADY_SECONDS = 10.0
"""A connection that has lasted so long begins the pauses anew."""
HEARTBEATS_MISSED = 3
"""After so many heartbeats without a frame of the engine's, the connection counts as dead."""
LEAST_HEARTBEAT = 0.05
"""Seconds."""
_encode = msgspec.json.Encoder().encode
_scheme = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}


class Incompatible(DurableError):
    """Engine and runner have no version of the protocol in common, or the engine does not take this runner."""

    code = "incompatible"


def connect(things: Any, url: str, *, app: str, **options: Any) -> Connecting:
    """A runner that dials the engine at `url`, its base: `wss://durable.example`. `options`: as of `Runner`.

    Raises DefinitionError.
    """
    return Connecting(things, url, app=app, **options)


class Connecting:
    """A runner on a WebSocket. Entered, it dials, and goes on dialling until it is closed."""

    def __init__(
        self, things: Any, url: str, *, app: str, on_state: Callable[[str], None] | None = None, **options: Any
    ) -> None:
        """`on_state`: told `connected` and `disconnected`."""
        parts = urlsplit(url)
        if parts.scheme not in _scheme or not parts.netloc:
            raise DefinitionError(f"The engine's URL is ws:// or wss:// (or http), not {url!r}.")
        self.url = urlunsplit(
            (_scheme[parts.scheme], parts.netloc, parts.path.rstrip("/") + "/connect", parts.query, "")
        )
        self.runner = Runner(things, app=app, **options)
        self.reason = ""
        """Why it is not connected, where it is not."""
        self._on_state = on_state
        self._up = asyncio.Event()
        self._draining = False
        self._link: _Link | None = None
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Connecting:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Make what there is to make, and begin to dial. An engine that is away is tried again; it holds nobody up."""
        if self._task is not None:
            raise DurableError("The runner is running already.")
        await self.runner.prepare()
        self._draining = False
        self._task = asyncio.get_running_loop().create_task(self._stay(), name="durable-runner")

    @property
    def connected(self) -> bool:
        """Whether it is connected, and has said what it runs. The engine does not say that it has taken it."""
        return self._up.is_set()

    async def wait_connected(self, timeout: float | None = None) -> None:
        """Until it is connected, and has said what it runs. Raises TimeoutError, with why."""
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
        except TimeoutError:
            raise TimeoutError(f"The runner is not connected to {self.url}: {self.reason or 'no answer'}") from None

    async def register(self) -> None:
        """Tell the engine again what is run here. Raises DurableError while there is no connection."""
        if self._link is None or not self.connected:
            raise DurableError(f"The runner is not connected to {self.url}: {self.reason or 'not started'}")
        await self._link.register()

    async def close(self, timeout: float | None = None) -> None:
        """Begin nothing new, finish what is under way within `timeout` seconds (default `drain_timeout`), hang up. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        self._draining = True
        try:
            if self._link is not None:
                await self._link.drain(timeout)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.runner.release()

    async def run(self) -> None:
        """Until SIGINT or SIGTERM, then drain: the main of a process. A second signal ends it at once, with 130; what was
        under way is asked for again elsewhere."""

        def draining() -> None:
            log.info(
                "draining: %d passes under way have %g s to finish", self.runner.under_way, self.runner.drain_timeout
            )

        def forced() -> None:
            log.warning("stopped at once; what was under way is asked for again")

        with stop_signals(draining, forced) as stopping:
            async with self:
                await stopping.wait()

    # ------------------------------------------------------------------ staying connected

    async def _stay(self) -> None:
        from websockets.asyncio.client import connect as dial
        from websockets.exceptions import InvalidHandshake, WebSocketException

        pause, told = FIRST_PAUSE, ""
        monotonic = self.runner.clock.monotonic
        while True:
            began = monotonic()
            try:
                socket = await dial(
                    self.url,
                    subprotocols=SUBPROTOCOLS,  # type: ignore[arg-type]
                    additional_headers={}
                    if self.runner.key is None
                    else {"Authorization": f"Bearer {self.runner.key}"},
                    max_size=MAX_FRAME,
                    open_timeout=HELLO_SECONDS,
                    ping_interval=None,  # the protocol has pings of its own
                    close_timeout=2.0,
                )
                async with socket:
                    await self._talk(socket)
                self.reason = f"the engine hung up: {socket.close_reason or socket.close_code}"
            except InvalidHandshake as error:
                self.reason = f"the engine refused the connection: {error}"
            except (OSError, TimeoutError, WebSocketException, DurableError) as error:
                self.reason = str(error) or repr(error)
            except Exception as error:
                log.exception("the runner's connection broke")
                self.reason = repr(error)
            finally:
                self._down()
            if monotonic() - began > STEADY_SECONDS:
                pause = FIRST_PAUSE
            if self.reason != told:
                log.warning("runner %s is not connected to %s: %s", self.runner.name, self.url, self.reason)
            told = self.reason
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _talk(self, socket: ClientConnection) -> None:
        link = _Link(self.runner, socket)
        try:
            await link.greet()
            self._link = link
            self.reason = ""
            self._up.set()
            self._say("connected")
            log.info("runner %s is connected to %s", self.runner.name, self.url)
            await link.serve(lambda: self._draining)
        finally:
            await link.give_up()

    def _down(self) -> None:
        self._link = None
        if self._up.is_set():
            self._up.clear()
            self._say("disconnected")

    def _say(self, state: str) -> None:
        if self._on_state is not None:
            try:
                self._on_state(state)
            except Exception:
                log.exception("on_state raised")


class _Link:
    """One connection."""

    def __init__(self, runner: Runner, socket: ClientConnection) -> None:
        self._runner = runner
        self._socket = socket
        self._heartbeat = 15.0
        self._room = asyncio.Semaphore(runner.concurrency)
        self._passes: set[asyncio.Task[None]] = set()
        self._heard = runner.clock.monotonic()

    async def greet(self) -> None:
        """The engine says hello, and is told what is run here. Raises Incompatible, TimeoutError."""
        async with asyncio.timeout(HELLO_SECONDS):
            while (envelope := self._read(await self._socket.recv())) is None or envelope.type != "hello":
                pass
        try:
            hello = msgspec.json.decode(_payload(envelope), type=Hello)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Incompatible(f"The engine's hello cannot be read: {error}") from None
        if not hello.min_protocol_version <= VERSION <= hello.max_protocol_version:
            raise Incompatible(
                f"The engine speaks versions {hello.min_protocol_version} to {hello.max_protocol_version} of the runners' "
                f"protocol, and this runner {VERSION}. Upgrade the older of the two."
            )
        self._heartbeat = max(hello.heartbeat_ms / 1_000, LEAST_HEARTBEAT)
        await self.register()

    async def register(self) -> None:
        """Say what is run here."""
        await self._send("runner.register", payload=self._runner.registration())

    async def serve(self, draining: Callable[[], bool]) -> None:
        """Answer invokes until the connection ends. Raises DurableError when the engine has fallen silent."""
        beat = asyncio.get_running_loop().create_task(self._beat(), name="durable-runner-beat")
        try:
            async for data in self._socket:
                self._heard = self._runner.clock.monotonic()
                envelope = self._read(data)
                if envelope is None or draining():
                    continue
                if envelope.type == "invoke" and envelope.id is not None:
                    # Read no further than can be run: what waits, waits in the engine.
                    await self._room.acquire()
                    self._heard = self._runner.clock.monotonic()  # what came meanwhile has not been read
                    task = asyncio.get_running_loop().create_task(self._answer(envelope.id, _payload(envelope)))
                    self._passes.add(task)
                    task.add_done_callback(self._passes.discard)
            if beat.done() and not beat.cancelled() and (error := beat.exception()) is not None:
                raise error
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)

    async def drain(self, timeout: float | None) -> None:
        """Tell the engine to send no more, and finish what is under way."""
        try:
            await self._send("runner.drain")
        except Exception as error:
            log.debug("the engine was not told of the drain: %r", error)
        passes = set(self._passes)
        if passes:
            bound = self._runner.drain_timeout if timeout is None else timeout
            _, left = await asyncio.wait(passes, timeout=bound)
            if left:
                log.warning(
                    "%d passes did not finish within %g s; they are asked for again elsewhere", len(left), bound
                )

    async def give_up(self) -> None:
        """The connection is gone, and what was asked for on it."""
        passes = list(self._passes)
        for task in passes:
            task.cancel()
        await asyncio.gather(*passes, return_exceptions=True)

    async def _answer(self, id: str, data: bytes) -> None:
        try:
            status, body = await self._runner.answer(data)
        except Malformed as error:
            # No answer: whoever sent it times it out.
            log.warning("invoke %s cannot be read: %s", id, error)
            return
        except Exception as error:
            log.exception("invoke %s broke", id)
            status, body = fitting(broken(error))
        finally:
            self._room.release()
        try:
            await self._send("invoke.result", id=id, payload={"status": status, "body": Raw(body)})
        except Exception as error:
            log.warning("the result of invoke %s was not sent: %r", id, error)

    async def _beat(self) -> None:
        """Ping; and hang up when nothing was heard for long."""
        pause = 0.7 * self._heartbeat
        while True:
            await asyncio.sleep(pause)
            if (
                self._runner.clock.monotonic() - self._heard > HEARTBEATS_MISSED * self._heartbeat
                and self._room.locked() is False
            ):
                await self._socket.close(1001, "silence")
                raise DurableError(f"Nothing was heard of the engine for {HEARTBEATS_MISSED * self._heartbeat:g} s.")
            await self._send("ping")

    async def _send(self, type: str, **fields: Any) -> None:
        await self._socket.send(_encode({"type": type} | fields).decode())

    def _read(self, data: str | bytes) -> Envelope | None:
        try:
            return read_envelope(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.warning("a frame of the engine's cannot be read: %s", error)
            return None


def _payload(envelope: Envelope) -> bytes:
    return bytes(envelope.payload) if isinstance(envelope.payload, Raw) else b"null"
