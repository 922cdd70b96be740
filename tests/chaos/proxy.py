"""A TCP proxy between a client and Postgres that the test controls: cut, held, slow, or cut just when it hurts.

It knows as much of the protocol as it takes to tell rounds apart: what a client sends up to a Sync or a Query, and what
the server says up to ReadyForQuery. So a test can let a commit happen and lose its answer. One proxy is one link; give
each engine its own. It runs on a thread of its own; every method may be called from anywhere.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from psycopg.conninfo import conninfo_to_dict

SSL, GSS, CANCEL = 80877103, 80877104, 80877102
"""What a client may ask for in place of a startup message."""
CHUNK = 65_536


class Round:
    """One question: everything a client sends up to a Sync or a Query, and its answer."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        """SQL of what is executed, prepared earlier or not."""
        self.doomed = False
        """Its answer is dropped, and the link cut when it has come."""


Match = Callable[[list[str]], bool]


def executes(*words: str) -> Match:
    """A round with a statement that has all of these words, in any case."""
    return lambda statements: any(all(w.lower() in sql.lower() for w in words) for sql in statements)


class Frontend:
    """Splits what a client says into messages, and messages into rounds."""

    def __init__(self) -> None:
        self._rest = b""
        self._started = False
        self._prepared: dict[bytes, str] = {}
        self._round = Round()

    def feed(self, data: bytes) -> list[tuple[bytes, Round | bytes | None]]:
        """Messages in order: the bytes, and what they end: a round, nothing, or (b"N") a plea for encryption."""
        data = self._rest + data
        found: list[tuple[bytes, Round | bytes | None]] = []
        at = 0
        while True:
            head = 0 if not self._started else 1
            if len(data) - at < head + 4:
                break
            size = head + struct.unpack_from("!i", data, at + head)[0]
            if len(data) - at < size:
                break
            message = data[at : at + size]
            at += size
            found.append((message, self._startup(message) if not head else self._message(message)))
        self._rest = data[at:]
        return found

    def _startup(self, message: bytes) -> Round | bytes | None:
        code = struct.unpack_from("!i", message, 4)[0]
        if code in (SSL, GSS):
            return b"N"
        self._started = True
        return None if code == CANCEL else self._end()  # the server greets with a ReadyForQuery

    def _message(self, message: bytes) -> Round | None:
        kind, body = message[:1], message[5:]
        if kind == b"Q":
            self._round.statements.append(body.rstrip(b"\0").decode(errors="replace"))
            return self._end()
        if kind == b"P":
            name, sql, _ = body.split(b"\0", 2)
            self._prepared[name] = sql.decode(errors="replace")
        elif kind == b"B":
            _, name, _ = body.split(b"\0", 2)
            self._round.statements.append(self._prepared.get(name, ""))
        elif kind == b"S":
            return self._end()
        return None

    def _end(self) -> Round:
        ended, self._round = self._round, Round()
        return ended


class Backend:
    """Splits what a server says at each ReadyForQuery."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[bytes, bool]]:
        """Pieces in order; true: this one ends a round."""
        data = self._rest + data
        pieces: list[tuple[bytes, bool]] = []
        begin = at = 0
        while len(data) - at >= 5:
            size = 1 + struct.unpack_from("!i", data, at + 1)[0]
            if len(data) - at < size:
                break
            ends = data[at : at + 1] == b"Z"
            at += size
            if ends:
                pieces.append((data[begin:at], True))
                begin = at
        if at > begin:
            pieces.append((data[begin:at], False))
        self._rest = data[at:]
        return pieces


class Link:
    """One connection of a client's and the one to the server that belongs to it."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.client = reader, writer
        self.server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.flows = {"up": asyncio.Event(), "down": asyncio.Event()}
        for flow in self.flows.values():
            flow.set()
        self.statements: set[str] = set()
        """Everything it ever executed: tells what a connection is for."""
        self._frontend, self._backend = Frontend(), Backend()
        self._asked: deque[Round] = deque()

    def cut(self) -> None:
        """Both sides see a broken connection at once; what was under way is lost."""
        for end in (self.client, self.server):
            if end is None:
                continue
            sock = end[1].get_extra_info("socket")
            if sock is not None and sock.family == socket.AF_INET:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end[1].transport.abort()

    async def run(self) -> None:
        """Forward until either side ends, or a fault ends both."""
        await self.flows["up"].wait()
        self.server = await self.proxy._connect()
        pumps = [asyncio.ensure_future(self._up()), asyncio.ensure_future(self._down())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for _, writer in (self.client, self.server):
                writer.close()

    async def _up(self) -> None:
        assert self.server is not None
        reader, writer = self.client[0], self.server[1]
        while data := await reader.read(CHUNK):
            await self._pass("up")
            for message, ends in self._frontend.feed(data):
                if ends == b"N":
                    self.client[1].write(b"N")
                    continue
                if isinstance(ends, Round):
                    self.statements.update(ends.statements)
                    fault = self.proxy._fault(ends)
                    if fault == "before":
                        self.cut()
                        return
                    ends.doomed = fault == "after"
                    self._asked.append(ends)
                writer.write(message)
            await writer.drain()

    async def _down(self) -> None:
        assert self.server is not None
        reader, writer = self.server[0], self.client[1]
        while data := await reader.read(CHUNK):
            await self._pass("down")
            for piece, ends in self._backend.feed(data):
                doomed = bool(self._asked) and self._asked[0].doomed
                if not doomed:
                    writer.write(piece)
                if ends and self._asked:
                    self._asked.popleft()
                    self.proxy.rounds += 1
                    if doomed:
                        self.proxy.counts["cut after"] += 1
                        self.cut()
                        return
            await writer.drain()

    async def _pass(self, way: str) -> None:
        if self.proxy.latency:
            await asyncio.sleep(self.proxy.latency)
        await self.flows[way].wait()


class Proxy:
    """Stands before the server of `target`, a postgresql:// URL. `url` is the way through it. A context manager."""

    def __init__(self, target: str) -> None:
        self._target = conninfo_to_dict(target)
        self.latency = 0.0
        """Seconds added to every piece, each way."""
        self.counts: Counter[str] = Counter()
        """Faults that really happened, by kind."""
        self.rounds = 0
        """Rounds answered through here."""
        self._links: set[Link] = set()
        self._plans: list[list[Any]] = []
        self._still: set[str] = set()
        self._loop: asyncio.AbstractEventLoop
        self._over: asyncio.Event
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self.port = 0

    # ------------------------------------------------------------------ life

    @property
    def url(self) -> str:
        """The database behind the proxy, by TCP."""
        user, name = self._target.get("user"), self._target.get("dbname")
        return f"postgresql://{user}@127.0.0.1:{self.port}/{name}?sslmode=disable&gssencmode=disable"

    def named(self, name: str) -> str:
        """The same, by a name that the server shows in pg_stat_activity."""
        return f"{self.url}&application_name={name}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every link and the thread. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._over.wait()
        server.close()
        for link in self._links:
            link.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(self, reader, writer)
        for way in self._still:
            link.flows[way].clear()
        task = asyncio.current_task()
        assert task is not None
        self._links.add(link)
        self._tasks.add(task)
        try:
            await link.run()
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()  # no server, or the test is over
        finally:
            self._links.discard(link)
            self._tasks.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = str(self._target.get("host") or "127.0.0.1"), int(str(self._target.get("port") or 5432))
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    def _do(self, function: Callable[[], None]) -> None:
        done = threading.Event()

        def call() -> None:
            function()
            done.set()

        self._loop.call_soon_threadsafe(call)
        done.wait(10)

    # ------------------------------------------------------------------ faults

    @property
    def links(self) -> int:
        """Connections open now."""
        return len(self._links)

    def cut(self, where: Match | None = None) -> int:
        """Cut every connection, or those that have ever executed what `where` looks for. How many."""
        cut = []

        def now() -> None:
            for link in list(self._links):
                if where is None or where(list(link.statements)):
                    cut.append(link)
                    link.cut()

        self._do(now)
        self.counts["cut"] += len(cut)
        return len(cut)

    def cut_after(self, where: Match, times: int = 1) -> None:
        """The next rounds that `where` fits happen at the server; their answers are lost with the connection."""
        self._do(lambda: self._plans.append(["after", where, times]))

    def cut_before(self, where: Match, times: int = 1) -> None:
        """The next rounds that `where` fits never reach the server whole; the connection is lost."""
        self._do(lambda: self._plans.append(["before", where, times]))

    def stop(self, *ways: str, new: bool = True) -> None:
        """Half-open: nothing passes any more, and nobody is told. `ways`: up (client to server), down; default both.
        `new`: connections made from now on, too. What is said meanwhile arrives after `heal`."""
        still = set(ways or ("up", "down"))

        def now() -> None:
            if new:
                self._still |= still
            for link in self._links:
                for way in still:
                    link.flows[way].clear()
            self.counts["stopped " + " and ".join(sorted(still))] += 1

        self._do(now)

    def heal(self) -> None:
        """No faults from here on: held bytes go on, planned cuts are off, no latency."""

        def now() -> None:
            self.latency = 0.0
            self._plans.clear()
            self._still.clear()
            for link in self._links:
                for flow in link.flows.values():
                    flow.set()

        self._do(now)

    def _fault(self, round_: Round) -> str:
        for plan in self._plans:
            kind, where, _ = plan
            if where(round_.statements):
                plan[2] -= 1
                if plan[2] <= 0:
                    self._plans.remove(plan)
                if kind == "before":
                    self.counts["cut before"] += 1
                return str(kind)
        return ""
