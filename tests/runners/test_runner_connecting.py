"""A runner that dials: over a real WebSocket, with the engine's end written by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from durable import Context, Durable, workflow
from durable.core.errors import DefinitionError
from durable.core.flow import Trigger
from durable.module import module
from durable.runners.connecting import Connecting, connect
from durable.runners.passes import Failure
from durable.testing.facts import eventually
from tests.runners.little_engine import LittleEngine

KEY = "dk_shop.dev_secret"


@workflow("adds")
async def adds(ctx: Context, numbers: list[int]) -> int:
    total = 0
    for number in numbers:
        total = await ctx.step("add", lambda a, b: a + b, total, number)
    return total


class Engine:
    """The engine's end."""

    def __init__(
        self, heartbeat_ms: int = 15_000, versions: tuple[int, int] = (1, 1), answer_pings: bool = True
    ) -> None:
        self.heartbeat_ms = heartbeat_ms
        self.versions = versions
        self.answer_pings = answer_pings
        self.links: list[ServerConnection] = []
        self.registered: list[dict[str, Any]] = []
        self.frames: list[dict[str, Any]] = []
        self.waiting: dict[str, asyncio.Future[Any]] = {}
        self.subprotocols = ["durable.connect.v0", "duraton.connect.v0"]
        self.server: Server | None = None
        self.port = 0

    async def start(self) -> None:
        # The dialect is offered under two names; an engine may know one of them only.
        self.server = await serve(
            self._serve,
            "127.0.0.1",
            self.port,
            subprotocols=self.subprotocols,
            max_size=1 << 20,  # type: ignore[arg-type]
        )
        self.port = next(iter(self.server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        assert self.server is not None
        self.server.close()
        await self.server.wait_closed()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    async def _serve(self, link: ServerConnection) -> None:
        self.links.append(link)
        low, high = self.versions
        hello = {"protocolVersion": high, "minProtocolVersion": low, "maxProtocolVersion": high}
        try:
            await self.say(link, {"type": "news", "payload": 7})  # unknown types are passed over
            await self.say(link, {"type": "hello", "payload": hello | {"heartbeatMs": self.heartbeat_ms}})
            async for data in link:
                assert isinstance(data, str)
                frame = json.loads(data)
                self.frames.append(frame)
                if frame["type"] == "runner.register":
                    self.registered.append(frame["payload"])
                elif frame["type"] == "ping" and self.answer_pings:
                    await self.say(link, {"type": "pong"})
                elif frame["type"] == "invoke.result" and (waiting := self.waiting.pop(frame["id"], None)):
                    waiting.set_result((frame["payload"]["status"], frame["payload"]["body"]))
        except ConnectionClosed:
            pass

    async def say(self, link: ServerConnection, frame: dict[str, Any]) -> None:
        await link.send(json.dumps(frame))

    async def ask(self, invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        id = f"i{len(self.frames)}-{len(self.waiting)}"
        answer = self.waiting[id] = asyncio.get_running_loop().create_future()
        await self.say(self.links[-1], {"type": "invoke", "id": id, "payload": invoke})
        async with asyncio.timeout(10):
            return await answer  # type: ignore[no-any-return]

    def count(self, type: str) -> int:
        return sum(frame["type"] == type for frame in self.frames)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    one = Engine()
    await one.start()
    yield one
    await one.stop()


def runner(engine: Engine, *flows: Any, **options: Any) -> Connecting:
    return connect(flows or [adds], engine.url, app="shop.dev", **options)


async def test_a_run_over_a_websocket(engine: Engine) -> None:
    """It says what it runs and with which key, and a run goes through it to its end."""
    async with runner(engine, key=KEY, runner="r1", region="eu") as one:
        await one.wait_connected(5)
        await eventually(lambda: len(engine.registered) == 1)
        said = engine.registered[0]
        assert engine.links[0].subprotocol == "durable.connect.v0"
        assert engine.links[0].request is not None
        assert engine.links[0].request.headers["Authorization"] == f"Bearer {KEY}"
        assert (said["app"], said["runner"], said["sdkName"], said["language"]) == (
            "shop.dev",
            "r1",
            "durable",
            "python",
        )
        assert (said["region"], said["protocolVersion"], said["minProtocolVersion"]) == ("eu", 1, 1)
        assert [one["name"] for one in said["workflows"]] == ["adds"]
        assert said["runtime"].startswith(("cpython", "pypy"))
        assert isinstance(said["framework"], str)
        assert len(said["keyFingerprint"]) == 16
        assert await LittleEngine(engine.ask, "adds", [1, 2, 3]).run() == 6


async def test_the_other_name_of_the_dialect(engine: Engine) -> None:
    """An engine that knows the dialect by its other name only is spoken to under that."""
    engine.server.close()  # type: ignore[union-attr]
    engine.subprotocols = ["duraton.connect.v0"]
    engine.port = 0
    await engine.start()
    async with runner(engine) as one:
        await one.wait_connected(5)
        assert engine.links[-1].subprotocol == "duraton.connect.v0"
        assert await LittleEngine(engine.ask, "adds", [1, 2], ours=False).run() == 3


async def test_what_starts_a_workflow_is_said(engine: Engine) -> None:
    """Triggers, flow control, versions and failure handlers are in the registration, as the wire spells them."""

    @workflow(
        "paid", on=Trigger("order.paid", where="event.data.total > 5"), cron="0 9 * * *", concurrency=3, timeout=60
    )
    async def paid(ctx: Context, data: Any) -> None: ...

    @workflow("paid", "2", debounce="3s")
    async def paid_2(ctx: Context, data: Any) -> None: ...

    async def clean_up(ctx: Context, failure: Failure) -> None: ...

    one = runner(engine, paid, paid_2, on_failure={paid: clean_up})
    assert one.runner.registration()["workflows"] == [
        {"name": "paid", "version": "2", "triggers": [], "debounce": {"periodMs": 3_000}, "onFailure": True},
        {
            "name": "paid",
            "version": "1",
            "triggers": [
                {"event": "order.paid", "if": "event.data.total > 5"},
                {"cron": "0 9 * * *", "timezone": "UTC", "catchUp": "last"},
            ],
            "concurrency": [{"limit": 3}],
            "timeoutMs": 60_000,
            "onFailure": True,
        },
    ]


async def test_region_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: DURABLE_REGION, where nothing is said."""
    monkeypatch.setenv("DURABLE_REGION", "ams")
    assert connect([adds], "wss://example.org", app="shop.dev").runner.registration()["region"] == "ams"


async def test_invokes_are_answered_concurrently_up_to_a_bound(engine: Engine) -> None:
    """Two passes at once where two are allowed; the third waits until one is done."""
    going, gate = [], asyncio.Event()

    async def wait(number: int) -> int:
        going.append(number)
        await gate.wait()
        return number

    @workflow("waits")
    async def waits(ctx: Context, number: int) -> int:
        return await ctx.step("s", wait, number)

    async with runner(engine, waits, concurrency=2) as one:
        await one.wait_connected(5)
        runs = [asyncio.create_task(LittleEngine(engine.ask, "waits", n, run_id=f"r{n}").run()) for n in range(3)]
        await eventually(lambda: len(going) == 2)
        await (await engine.links[0].ping())  # the third invoke has arrived: it waits, and is not merely late
        assert len(going) == one.runner.under_way == 2
        gate.set()
        assert sorted(await asyncio.gather(*runs)) == [0, 1, 2]


async def test_it_pings_while_a_body_takes_long() -> None:
    """Pings come on the engine's heartbeat, also in the middle of a pass."""
    engine = Engine(heartbeat_ms=60)
    await engine.start()
    gate = asyncio.Event()

    @workflow("long")
    async def long(ctx: Context) -> str:
        await ctx.step("s", gate.wait)
        return "done"

    async with runner(engine, long) as one:
        await one.wait_connected(5)
        run = asyncio.create_task(LittleEngine(engine.ask, "long").run())
        await eventually(lambda: engine.count("ping") >= 5)
        assert not run.done()
        gate.set()
        assert await run == "done"
    await engine.stop()


async def test_it_comes_back_when_the_engine_does(engine: Engine) -> None:
    """R1: a broken connection and an engine that is away for a while; then it registers again and runs go on."""
    states: list[str] = []
    async with runner(engine, on_state=states.append) as one:
        await one.wait_connected(5)
        await engine.stop()
        await eventually(lambda: not one.connected)
        await engine.start()
        await one.wait_connected(20)
        assert await LittleEngine(engine.ask, "adds", [4]).run() == 4
    assert states == ["connected", "disconnected", "connected", "disconnected"]


async def test_what_was_under_way_on_a_broken_connection_is_given_up(engine: Engine) -> None:
    """R2: the engine asks somebody else at once, so the body is cut short here."""
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

    async with runner(engine, flow) as one:
        await one.wait_connected(5)
        run = asyncio.create_task(LittleEngine(engine.ask, "forever").run())
        await eventually(lambda: one.runner.under_way == 1)
        engine.links[0].transport.abort()
        await eventually(lambda: cut == [True])
        run.cancel()


async def test_an_engine_that_falls_silent_is_left(engine: Engine) -> None:
    """A connection on which nothing is heard for three heartbeats is dead, whatever TCP says; it dials again."""
    quiet = Engine(heartbeat_ms=60, answer_pings=False)
    await quiet.start()
    async with runner(quiet) as one:
        await one.wait_connected(5)
        await eventually(lambda: len(quiet.links) >= 2)
    await quiet.stop()


async def test_it_drains(engine: Engine) -> None:
    """Closed, it tells the engine, begins nothing new, and finishes what is under way."""
    gate, began = asyncio.Event(), []

    async def slow(number: int) -> int:
        began.append(number)
        await gate.wait()
        return number

    @workflow("slow")
    async def flow(ctx: Context, number: int) -> int:
        return await ctx.step("s", slow, number)

    one = runner(engine, flow)
    await one.start()
    await one.wait_connected(5)
    invoke = LittleEngine(engine.ask, "slow", 1).invoke()
    asked = asyncio.create_task(engine.ask(invoke))
    await eventually(lambda: began == [1])
    closing = asyncio.create_task(one.close(10))
    await eventually(lambda: engine.count("runner.drain") == 1)
    late = asyncio.create_task(engine.ask(LittleEngine(engine.ask, "slow", 2).invoke()))
    await eventually(lambda: len(engine.waiting) == 2)
    await (await engine.links[0].ping())  # the second invoke has arrived
    assert not closing.done()
    gate.set()
    status, body = await asked
    assert (status, body["opcodes"][0]["data"]) == (206, 1)
    await closing
    assert began == [1]
    late.cancel()


async def test_a_drain_has_a_bound(engine: Engine) -> None:
    """A body that does not end is given up after the time that was given."""

    @workflow("never")
    async def flow(ctx: Context) -> None:
        await ctx.step("s", asyncio.Event().wait)

    one = runner(engine, flow)
    await one.start()
    await one.wait_connected(5)
    asked = asyncio.create_task(engine.ask(LittleEngine(engine.ask, "never").invoke()))
    await eventually(lambda: one.runner.under_way == 1)
    async with asyncio.timeout(10):
        await one.close(0.05)
    assert one.runner.under_way == 0
    asked.cancel()


async def test_a_result_over_the_frame_is_a_failure_that_says_so(engine: Engine) -> None:
    """B59: what no frame carries is answered as 400 with the limit; the run is not left waiting."""

    @workflow("huge")
    async def flow(ctx: Context) -> None:
        await asyncio.gather(*(ctx.step("s", lambda: "x" * 700_000) for _ in range(2)))

    async with runner(engine, flow) as one:
        await one.wait_connected(5)
        status, body = await engine.ask(LittleEngine(engine.ask, "huge").invoke())
        assert (status, body["error"]["code"]) == (400, "payload_too_large")
        assert body["error"]["retryable"] is False
        assert f"{body['error']['details']['limit']:,}" in body["error"]["message"]


async def test_lines_give_way_to_results(engine: Engine) -> None:
    """Log lines that would push a result over the limit are left out; the result is told."""

    @workflow("chatty")
    async def flow(ctx: Context) -> str:
        for _ in range(400):
            ctx.log("x" * 3_000)
        return "done"

    async with runner(engine, flow) as one:
        await one.wait_connected(5)
        status, body = await engine.ask(LittleEngine(engine.ask, "chatty").invoke())
        assert (status, body) == (200, {"data": "done", "logs": []})


@pytest.mark.parametrize("bad", [None, {}, {"event": {"name": "e"}, "steps": {}}, {"event": 1, "steps": [], "ctx": 2}])
async def test_a_malformed_invoke_gets_no_answer(engine: Engine, bad: Any) -> None:
    """It is passed over, and the next one is answered."""
    async with runner(engine) as one:
        await one.wait_connected(5)
        await engine.say(engine.links[0], {"type": "invoke", "id": "bad", "payload": bad})
        await engine.links[0].send("{")
        assert await LittleEngine(engine.ask, "adds", [1]).run() == 1
        assert [frame["id"] for frame in engine.frames if frame["type"] == "invoke.result"].count("bad") == 0


async def test_versions_that_do_not_meet_are_told() -> None:
    """An engine of other versions only: not connected, and why."""
    engine = Engine(versions=(2, 3))
    await engine.start()
    async with runner(engine) as one:
        await eventually(lambda: "versions 2 to 3" in one.reason)
        assert not one.connected
        with pytest.raises(TimeoutError, match="versions 2 to 3"):
            await one.wait_connected(0.01)
    await engine.stop()


async def test_an_app_and_modules_are_runners_too(engine: Engine) -> None:
    """The same workflow code: of a Durable, and of a root module, whose providers are made and closed with the runner."""
    app = Durable("memory://", workflows=[adds])
    async with connect(app, engine.url, app="shop.dev") as one:
        await one.wait_connected(5)
        assert await LittleEngine(engine.ask, "adds", [1, 1]).run() == 2
    closed: list[bool] = []

    class Prices:
        def of(self, name: str) -> int:
            return len(name)

        async def on_stop(self) -> None:
            closed.append(True)

    @workflow("priced")
    class Priced:
        def __init__(self, prices: Prices) -> None:
            self.prices = prices

        async def run(self, ctx: Context, name: str) -> int:
            return await ctx.step("price", self.prices.of, name)

    @module(providers=[Prices, Priced])
    class Shop:
        pass

    async with connect(Shop, engine.url, app="shop.dev") as one:
        await one.wait_connected(5)
        assert one.runner.workflows == ["priced"]
        assert await LittleEngine(engine.ask, "priced", "tea").run() == 3
        assert closed == []
    assert closed == [True]


def test_what_cannot_be_a_runner_is_refused() -> None:
    """No workflow, no app name, no URL: each says what to give."""
    with pytest.raises(DefinitionError, match="no workflow"):
        connect([], "wss://example.org", app="shop.dev")
    with pytest.raises(DefinitionError, match="name of its app"):
        connect([adds], "wss://example.org", app="")
    with pytest.raises(DefinitionError, match="ws://"):
        connect([adds], "example.org", app="shop.dev")
