"""The processes of `bench service`: `python -m tests.bench.kit.service URL '{"role": "service"}'`.

service  an engine with its API, as `durable serve` has it; one workflow in this process
floor    Starlette and uvicorn, an endpoint that does one INSERT
load     keeps connections busy with one request, and says how fast it is answered
connect  a runner that dials in; serve: one that is called
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from typing import Any

import uvloop

from durable import Context, Durable, workflow
from tests.bench.kit.child import VALUE, serve
from tests.bench.kit.ours import sampled

OPTIONS: dict[str, Any] = json.loads(sys.argv[2])
WORKSPACE = "bench.dev"
FUNCTION_STEPS = 5
LATE: list[float] = []
"""Milliseconds from sending an event to the first step of the run it starts."""
NOW = b'"NOW"'
"""In a body, replaced by the time at which it is sent."""


async def first(sent: float) -> dict[str, Any]:
    LATE.append((time.time() - sent) * 1e3)
    return VALUE


async def answer() -> dict[str, Any]:
    return VALUE


async def five_steps(ctx: Context, event: dict[str, Any]) -> int:
    await ctx.step("first", first, event["sent"])
    for number in range(1, FUNCTION_STEPS):
        await ctx.step(f"step {number}", answer)
    return FUNCTION_STEPS


async def one_step(ctx: Context, event: dict[str, Any]) -> int:
    await ctx.step("first", first, event["sent"])
    return 1


async def late() -> dict[str, Any]:
    """What was measured since the last call."""
    told, LATE[:] = list(LATE), []
    return {"ms": told}


async def profile(seconds: float, top: int) -> dict[str, Any]:
    return await sampled(lambda: asyncio.sleep(seconds), 1, top)


# -- what is measured


async def service() -> None:
    """A workspace with a key, and a workflow of it in this process."""
    from durable.server.app import create_app
    from durable.server.connections import HttpServer
    from durable.server.settings import ServerSettings
    from durable.store.records import RunQuery, Status

    settings = ServerSettings(host="127.0.0.1", port=0, rate=1e9, burst=1_000_000_000)
    async with Durable(sys.argv[1]) as app:
        server = create_app(app.engine, settings)
        http = HttpServer(server, settings)
        await http.start()
        made, _ = await server.state.service.workspaces.provision("bench", "dev")
        inside = Durable("memory://")
        inside.workflow("inside", on="bench.inside")(one_step)
        if OPTIONS.get("inside"):
            app.engine.deps.catalog.put(WORKSPACE, inside.registry)
        key = made.signing_key(app.engine.clock.now()).secret

        async def connected(mode: str) -> dict[str, Any]:
            """Once a runner is there, and what it runs is known."""
            directory = server.state.service.functions.directory
            async with asyncio.timeout(30):
                while not any(one.mode == mode for one in await directory.live(WORKSPACE)):
                    await asyncio.sleep(0.05)
                while not app.engine.deps.catalog.of(WORKSPACE).triggered(f"bench.{mode}"):
                    await asyncio.sleep(0.05)
            return {}

        async def ended(workflow: str) -> dict[str, Any]:
            """Once none of its runs is under way."""
            active = RunQuery(workflow=workflow, statuses=(Status.ACTIVE,), limit=1)
            async with asyncio.timeout(120):
                while (await app.engine.find(active, workspace=WORKSPACE)).runs:
                    await asyncio.sleep(0.02)
            failed = RunQuery(workflow=workflow, statuses=(Status.FAILED, Status.DEAD), limit=1)
            for run in (await app.engine.find(failed, workspace=WORKSPACE)).runs:
                raise RuntimeError(f"a run has failed: {run.error!r}")
            return {}

        verbs = {"late": late, "profile": profile, "connected": connected, "ended": ended}
        await serve(verbs, {"port": http.port, "key": key})
        await app.engine.drain()
        await http.stop()


async def floor() -> None:
    """What HTTP and one durable INSERT cost with nothing around them."""
    import uvicorn
    from psycopg_pool import AsyncConnectionPool
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    pool = AsyncConnectionPool(sys.argv[1], min_size=8, max_size=8, kwargs={"autocommit": True}, open=False, check=None)
    await pool.open(wait=True)
    async with pool.connection() as connection:
        await connection.execute(
            "CREATE TABLE event (id bigserial PRIMARY KEY, name text NOT NULL, data jsonb NOT NULL,"
            " at timestamptz NOT NULL DEFAULT now())"
        )

    async def insert(request: Request) -> JSONResponse:
        body = json.loads(await request.body())
        async with pool.connection() as connection:
            cursor = await connection.execute(
                "INSERT INTO event (name, data) VALUES (%s, %s) RETURNING id",
                (body["name"], json.dumps(body["data"])),
            )
            [number] = await cursor.fetchone() or [0]
        return JSONResponse({"id": number})

    listening = listener()
    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[Route("/insert", insert, methods=["POST"])]), log_config=None, access_log=False
        )
    )
    serving = asyncio.create_task(server.serve([listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    await serve({"profile": profile}, {"port": listening.getsockname()[1]})
    server.should_exit = True
    await serving
    await pool.close()


async def connecting() -> None:
    from durable.runners.connecting import connect

    run = workflow("by_connect", on="bench.connect")(five_steps)
    async with connect([run], OPTIONS["engine"], app=WORKSPACE, key=OPTIONS["key"], concurrency=256) as runner:
        await runner.wait_connected(30)
        await serve({"late": late, "profile": profile}, {})


async def serving() -> None:
    import uvicorn

    from durable.runners.serving import serve as served

    listening = listener()
    runner = served(
        [workflow("by_serve", on="bench.serve")(five_steps)],
        app=WORKSPACE,
        key=OPTIONS["key"],
        engine=OPTIONS["engine"],
        url=f"http://127.0.0.1:{listening.getsockname()[1]}",
        concurrency=1_000,
    )
    server = uvicorn.Server(uvicorn.Config(runner, log_config=None, access_log=False))
    task = asyncio.create_task(server.serve([listening]))
    while not runner.registered:
        await asyncio.sleep(0.05)
    await serve({"late": late, "profile": profile}, {})
    server.should_exit = True
    await task


def listener() -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(2048)
    return listening


# -- the load


class Connection(asyncio.Protocol):
    """One connection, one request at a time, with nothing that a client library would do."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._got = bytearray()
        self._begun = 0.0
        self._done = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._begun = time.perf_counter()
        self._transport.write(self._load.request())

    def data_received(self, data: bytes) -> None:
        self._got += data
        head = self._got.find(b"\r\n\r\n")
        if head < 0:
            return
        at = self._got.lower().find(b"content-length:", 0, head)
        length = int(self._got[at + 15 : self._got.index(b"\r", at)]) if at >= 0 else 0
        if len(self._got) < head + 4 + length:
            return
        if not self._got.startswith(b"HTTP/1.1 200"):
            self._load.fail(f"answered: {bytes(self._got[:600])!r}")
        self._got.clear()
        if self._load.answered(time.perf_counter() - self._begun):
            self._load.pause(self._send)
        else:
            self._done = True
            self._transport.close()
            self._load.closed()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done:
            self._load.fail(f"a connection was lost: {error}")


class Load:
    """So many connections, until the time is up or the count is full."""

    def __init__(self, head: bytes, body: bytes, seconds: float | None, count: int | None, every: float) -> None:
        self._head, self._body, self._timed = head, body, NOW in body
        self._whole = head + f"content-length: {len(body)}\r\n\r\n".encode() + body
        self._loop = asyncio.get_running_loop()
        self._until = time.perf_counter() + seconds if seconds is not None else float("inf")
        self._left = count if count is not None else sys.maxsize
        self._every = every
        self.took: list[float] = []
        self.open = 0
        self.done: asyncio.Future[None] = self._loop.create_future()

    def request(self) -> bytes:
        self._left -= 1
        if not self._timed:
            return self._whole
        body = self._body.replace(NOW, repr(time.time()).encode())
        return self._head + f"content-length: {len(body)}\r\n\r\n".encode() + body

    def answered(self, seconds: float) -> bool:
        """Whether to go on."""
        self.took.append(seconds)
        return self._left > 0 and time.perf_counter() < self._until

    def pause(self, send: Any) -> None:
        if self._every:
            self._loop.call_later(self._every, send)
        else:
            send()

    def closed(self) -> None:
        self.open -= 1
        if not self.open and not self.done.done():
            self.done.set_result(None)

    def fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(why))


async def post(
    port: int,
    path: str,
    body: str,
    key: str = "",
    connections: int = 1,
    seconds: float | None = None,
    count: int | None = None,
    every: float = 0.0,
) -> dict[str, Any]:
    """Requests a second, and milliseconds of one. `every`: seconds that a connection rests between two."""
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {key}\r\n" if key else ""
    load = Load(head.encode(), body.encode(), seconds, count, every)
    begun, loop = time.perf_counter(), asyncio.get_running_loop()
    load.open = min(connections, count or connections)
    await asyncio.gather(
        *(loop.create_connection(lambda: Connection(load), "127.0.0.1", port) for _ in range(load.open))
    )
    await load.done
    took = time.perf_counter() - begun
    return {"rate": len(load.took) / took, "count": len(load.took), "ms": [one * 1e3 for one in load.took]}


ROLES = {"service": service, "floor": floor, "connect": connecting, "serve": serving}


async def main() -> None:
    if OPTIONS["role"] == "load":
        await serve({"post": post}, {})
    else:
        await ROLES[OPTIONS["role"]]()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        if OPTIONS.get("loop", "uvloop") == "uvloop":
            uvloop.run(main())
        else:
            asyncio.run(main())
