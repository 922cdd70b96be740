"""Runners that dial in (wire section 5), the engine's end: a real WebSocket, a runner written from the wire page alone."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
import pytest
import websockets

from durable.core.errors import RunFailed
from tests.engine.conftest import once
from tests.engine.world import World, eventually
from tests.runners.apps import Memos, op, step_hash
from tests.runners.site import FieldRunner, Site

WORKSPACE = "shop.dev"


async def start(app: Any, workflow: str, input: Any = None, **options: Any) -> Any:
    return await app.engine.start_run(workflow, input, workspace=WORKSPACE, **options)


async def registered(site: Site, *names: str) -> None:
    await eventually(lambda: set(names) <= site.functions.of(WORKSPACE).keys() and site.functions.directory.sessions)


async def test_a_pass_reports_many_operations_and_each_counts_once(world: World) -> None:
    """Steps in parallel with a sleep: what was run is journaled once under its own name, what is parked comes back as pending,
    and the result is the run's."""

    def order(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        memos = Memos(invoke)
        if not memos.known("a"):
            return 206, {
                "opcodes": [op("StepRun", "a", data=1), op("Sleep", "nap", sleepMs=20), op("StepRun", "b", data=2)],
                "logs": [],
            }
        if "nap" not in memos:
            assert memos.pending("nap")
            return 206, {"opcodes": [], "logs": []}
        return 200, {"data": {"sum": memos.data("a") + memos.data("b"), "got": invoke["event"]["data"]}, "logs": []}

    app = await world.engine()
    async with Site(app) as site, FieldRunner(site.base, {"order": order}) as runner:
        await registered(site, "order")
        handle = await start(app, "order", {"n": 1})
        assert await handle.result(10) == {"sum": 3, "got": {"n": 1}}
        assert await world.statuses(handle.id, "step", "a") == ["completed"]
        assert await world.statuses(handle.id, "step", "b") == ["completed"]
        first = runner.asked[0]
        assert first["steps"] == {}
        assert first["ctx"]["runId"] == handle.id
        assert first["ctx"]["workflow"] == "order"
        assert first["ctx"]["app"] == "shop"
        assert first["ctx"]["attempt"] == 1
        nap = runner.asked[-1]["steps"][step_hash("nap")]
        assert nap["data"] is None
        assert isinstance(nap["order"], int)
        await world.sound(handle.id)


async def test_step_errors_retries_and_memos_of_failures(world: World) -> None:
    """A failed attempt is tried again by its own rules, pending until it is due; the last failure is a memo, which the
    function may catch; logs are kept once."""
    attempts: list[bool] = []

    def order(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        memos = Memos(invoke)
        logs = [{"level": "info", "message": "begin", "scope": "root", "index": 0, "tsMs": 1, "fields": {"a": 1}}]
        if memos.pending("pay"):
            return 206, {"opcodes": [], "logs": logs}
        if "pay" not in memos:
            attempts.append(True)
            retry = {"maxAttempts": 3, "backoff": "fixed", "initialDelayMs": 5, "maxDelayMs": 5}
            logs.append({"level": "error", "message": "oh", "scope": "pay", "index": 0, "tsMs": 1})
            error = {"message": "no money", "stack": "at pay"}
            return 206, {"opcodes": [op("StepRun", "pay", error=error, retry=retry)], "logs": logs}
        return 200, {"data": memos.error("pay")["message"], "logs": logs}

    app = await world.engine()
    async with Site(app) as site, FieldRunner(site.base, {"order": order}):
        await registered(site, "order")
        handle = await start(app, "order")
        assert await handle.result(10) == "no money"
        assert len(attempts) == 3
        assert await world.statuses(handle.id, "step", "pay") == ["retrying", "retrying", "failed"]
        logs = [entry for entry in await world.journal(handle.id) if entry.kind == "log"]
        said = [msgspec.json.decode(entry.payload or b"")["message"] for entry in logs]
        assert said.count("begin") == 1
        assert said.count("oh") == 3
        await world.sound(handle.id)


async def test_a_failed_function_is_retried_and_then_cleans_up(world: World) -> None:
    """500 is tried again with a higher attempt, 400 is not; after it the function is asked once more with onFailure."""
    seen: list[tuple[int, bool]] = []

    def order(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ctx = invoke["ctx"]
        seen.append((ctx["attempt"], bool(ctx.get("onFailure"))))
        if ctx.get("onFailure"):
            assert ctx["error"]["message"] == "never"
            memos = Memos(invoke)
            if "tidy" not in memos:
                return 206, {"opcodes": [op("StepRun", "tidy", data=1)], "logs": []}
            return 200, {"data": None, "logs": []}
        if ctx["attempt"] == 1:
            return 500, {"error": {"message": "flaky"}, "logs": []}
        return 400, {"error": {"message": "never"}}

    app = await world.engine()
    more = {
        "workflows": [
            {"name": "order", "triggers": [], "onFailure": True, "retry": {"maxAttempts": 3, "initialDelayMs": 1}}
        ]
    }
    async with Site(app) as site, FieldRunner(site.base, {"order": order}, **more):
        await registered(site, "order")
        handle = await start(app, "order")
        with pytest.raises(RunFailed, match="never"):
            await handle.result(10)
        assert [one for one in seen if not one[1]] == [(1, False), (2, False)]
        assert [one[1] for one in seen].count(True) == 2
        assert await world.statuses(handle.id, "step", "tidy") == ["completed"]


async def test_children_webless_kinds_and_unknown_ones(world: World) -> None:
    """A child is a run of its own whose result is the memo; an unknown kind of operation fails that step alone, and says so."""

    def parent(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        memos = Memos(invoke)
        if not memos.known("kid"):
            return 206, {
                "opcodes": [
                    op("RunWorkflow", "kid", childName="child", childData={"n": 2}),
                    op("Infer", "think", model="m", messages=[], maxTokens=1),
                    op("Skip", "skipped"),
                ],
                "logs": [],
            }
        if "kid" not in memos:
            return 206, {"opcodes": [], "logs": []}
        return 200, {"data": [memos.data("kid"), memos.error("think")["message"], memos.data("skipped")], "logs": []}

    def child(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"data": invoke["event"]["data"]["n"] * 2, "logs": []}

    app = await world.engine()
    async with Site(app) as site, FieldRunner(site.base, {"parent": parent, "child": child}):
        await registered(site, "parent", "child")
        handle = await start(app, "parent")
        kid, think, skipped = await handle.result(10)
        assert kid == 4
        assert "Infer" in think
        assert skipped is None


async def test_events_wake_and_are_sent(world: World) -> None:
    """WaitForEvent with a condition takes the one event that fits; its memo is the event's data, null where none came; Emit
    starts what listens."""
    told: list[Any] = []

    def waits(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        memos = Memos(invoke)
        if not memos.known("paid"):
            wait = op("WaitForEvent", "paid", eventName="paid", eventIf="event.data.order == 7", timeoutMs=60_000)
            never = op("WaitForEvent", "never", eventName="never", timeoutMs=20)
            return 206, {"opcodes": [wait, never], "logs": []}
        if "paid" not in memos or "never" not in memos:
            return 206, {"opcodes": [], "logs": []}
        if not memos.known("tell"):
            emit = op("Emit", "tell", eventName="hears.asked", data={"x": 1}, dedupeId="once")
            return 206, {"opcodes": [emit], "logs": []}
        return 200, {"data": [memos.data("paid"), memos.data("never")], "logs": []}

    def hears(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        told.append(invoke["event"])
        return 200, {"data": None, "logs": []}

    app = await world.engine()
    async with Site(app) as site, FieldRunner(site.base, {"waits": waits, "hears": hears}):
        await registered(site, "waits", "hears")
        handle = await start(app, "waits")
        await world.until_journal(handle.id, lambda lines: any("timer" in line for line in lines))
        await app.engine.send_event("paid", {"order": 6}, workspace=WORKSPACE)
        await app.engine.send_event("paid", {"order": 7}, workspace=WORKSPACE)
        assert await handle.result(10) == [{"order": 7}, None]
        await eventually(lambda: told)
        assert told[0]["name"] == "hears.asked"
        assert told[0]["data"] == {"x": 1}


async def test_approvals_are_items_and_decided_once(world: World) -> None:
    """An approval is listed while it waits, decided by a message, and gone when it is decided."""

    def order(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        memos = Memos(invoke)
        if not memos.known("ask"):
            ask = op("Approval", "ask", tool="refund", risk="high", summary="100 EUR", data={"amount": 100})
            return 206, {"opcodes": [ask], "logs": []}
        if "ask" not in memos:
            return 206, {"opcodes": [], "logs": []}
        return 200, {"data": memos.data("ask"), "logs": []}

    from durable.store.items import ItemQuery

    app = await world.engine()
    async with Site(app) as site, FieldRunner(site.base, {"order": order}):
        await registered(site, "order")
        handle = await start(app, "order")
        store = await world.store()

        async def waiting() -> list[dict[str, Any]]:
            page = await store.list_items(ItemQuery("approval", WORKSPACE))
            return [msgspec.json.decode(item.data) for item in page.items]

        for _ in range(500):
            if found := await waiting():
                break
            await asyncio.sleep(0.01)
        assert found[0]["tool"] == "refund"
        assert found[0]["args"] == {"amount": 100}
        decision = {"status": "approved", "args": {"amount": 90}, "decidedBy": "ann"}
        one = await app.engine.signal(handle.id, found[0]["signal"], decision, id=found[0]["id"], workspace=WORKSPACE)
        assert one
        assert await handle.result(10) == decision
        assert await waiting() == []


async def test_a_runner_that_vanishes_is_replaced_by_another(world: World) -> None:
    """In-flight passes of a closed socket go to another runner of the app at once."""
    gate = asyncio.Event()

    async def hangs(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        await gate.wait()
        return 200, {"data": "never", "logs": []}

    def answers(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"data": "second", "logs": []}

    app = await world.engine()
    async with Site(app) as site, FieldRunner(site.base, {"order": hangs}, runner="one") as first:
        await registered(site, "order")
        handle = await start(app, "order")
        await eventually(lambda: first.asked)
        async with FieldRunner(site.base, {"order": answers}, runner="two"):
            await eventually(lambda: len(site.functions.directory.sessions) == 2)
            first.vanish()
            assert await handle.result(10) == "second"


async def test_a_pinned_run_fails_fast_where_its_runner_is_away(world: World) -> None:
    """A run pinned to a runner is asked of that one only; where it is away the run fails at once, with a typed error."""
    from durable.core.origin import Origin, meta_of

    def one(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"data": invoke["ctx"]["runner"], "logs": []}

    app = await world.engine()
    async with Site(app) as site, FieldRunner(site.base, {"order": one}, runner="one") as first:
        async with FieldRunner(site.base, {"order": one}, runner="two") as second:
            await registered(site, "order")
            await eventually(lambda: len(site.functions.directory.sessions) == 2)
            for _ in range(3):
                handle = await start(app, "order", meta=meta_of(Origin(runner="two")))
                assert await handle.result(10) == "two"
            assert (len(first.asked), len(second.asked)) == (0, 3)
        handle = await start(app, "order", meta=meta_of(Origin(runner="three")))
        with pytest.raises(RunFailed, match="pinned") as failed:
            await handle.result(10)
        assert failed.value.error is not None
        assert failed.value.error.code == "runner_gone"


async def test_runs_wait_for_a_runner(world: World) -> None:
    """With no runner there a run waits and fails nothing; it goes on when one comes."""

    def one(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"data": 1, "logs": []}

    app = await world.engine()
    async with Site(app) as site:
        async with FieldRunner(site.base, {"order": one}):
            await registered(site, "order")
        await eventually(lambda: not site.functions.directory.sessions)
        handle = await start(app, "order")
        await asyncio.sleep(0.05)
        async with FieldRunner(site.base, {"order": one}):
            assert await handle.result(10) == 1


async def test_an_engine_killed_between_passes(world: World) -> None:
    """A run whose engine dies while its runner is at it goes on with another engine, over another connection, with the same
    memos."""
    gate = asyncio.Event()

    async def order(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        memos = Memos(invoke)
        if "a" not in memos:
            return 206, {"opcodes": [op("StepRun", "a", data=1), op("Sleep", "nap", sleepMs=1)], "logs": []}
        if "nap" not in memos:
            return 206, {"opcodes": [], "logs": []}
        if not gate.is_set():
            await gate.wait()
        return 200, {"data": memos.data("a"), "logs": []}

    first, second = await world.engine(), await world.engine()
    async with Site(first) as site, FieldRunner(site.base, {"order": order}) as runner:
        await registered(site, "order")
        handle = await start(first, "order")
        await eventually(lambda: len(runner.asked) >= 2 and "nap" in Memos(runner.asked[-1]))
        before = runner.asked[-1]["steps"]
        async with Site(second) as other, FieldRunner(other.base, {"order": order}) as there:
            await registered(other, "order")
            await world.crash(first)
            await site.crash()
            gate.set()
            await world.until(handle.id, lambda record: record.status == "completed", "it ended")
            assert [asked["steps"] for asked in there.asked] == [before]
            await world.sound(handle.id)


async def test_a_runner_at_another_node_is_reached_through_it(world: World) -> None:
    """An engine that holds no connection to a runner has the engine ask that does."""

    def one(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"data": "there", "logs": []}

    first, second = await world.engine(worker=False), await world.engine()
    async with Site(first) as site, Site(second) as other, FieldRunner(site.base, {"order": one}) as runner:
        await registered(site, "order")
        await eventually(lambda: "order" in other.functions.of(WORKSPACE))
        handle = await start(second, "order")
        assert await handle.result(10) == "there"
        assert len(runner.asked) == 1
        assert not other.functions.directory.sessions


async def test_a_newer_runner_of_a_name_wins(world: World) -> None:
    """A29: of two runners with one name the newer counts, and the older one's connection is closed."""

    def one(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"data": 1, "logs": []}

    app = await world.engine()
    async with Site(app) as site, FieldRunner(site.base, {"order": one}, runner="same") as first:
        await registered(site, "order")
        async with FieldRunner(site.base, {"order": one}, runner="same") as second:
            await eventually(lambda: first.closed == 4409)
            handle = await start(app, "order")
            assert await handle.result(10) == 1
            assert len(second.asked) == 1


async def test_a_newer_runner_of_a_name_wins_at_another_node(world: World) -> None:
    """A29: two runners of one name at two engines: the newer one counts for both, and the older one's connection is closed by
    the engine that holds it, whatever that one still says."""

    def one(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"data": invoke["event"]["data"], "logs": []}

    async def stays(runner: FieldRunner) -> None:
        while runner.closed is None:
            with contextlib.suppress(websockets.ConnectionClosed):
                await runner.send({"type": "ping"})
            await asyncio.sleep(0.02)

    engine, another = await world.engine(), await world.engine()
    async with (
        Site(engine, heartbeat_ms=200) as here,
        Site(another, heartbeat_ms=200) as there,
        FieldRunner(here.base, {"order": one}, runner="same") as older,
    ):
        lives = [asyncio.create_task(stays(older))]
        await registered(here, "order")
        async with FieldRunner(there.base, {"order": one}, runner="same") as newer:
            lives.append(asyncio.create_task(stays(newer)))
            await eventually(lambda: older.closed == 4409)
            assert newer.closed is None
            for app in (engine, another):
                assert await (await start(app, "order")).result(10) is None
            assert (len(older.asked), len(newer.asked)) == (0, 2)
            for site in (here, there):
                (live,) = await site.functions.directory.live(WORKSPACE)
                assert live.node == there.functions.directory.node_id
            for life in lives:
                life.cancel()


@pytest.mark.parametrize(
    "frames",
    [
        [{"type": "invoke.result", "id": "p1", "payload": {"status": 200, "body": {}}}],
        [{"type": "hello", "payload": {}}],
        ["register", "register"],
        ["register", {"type": "invoke.result", "id": "p9", "payload": {"status": 200, "body": {}}}],
    ],
)
@once
async def test_frames_out_of_order_close_with_1002(world: World, frames: list[Any]) -> None:
    """A28: a result before registration, hello from a runner, two registrations, a result nobody asked for."""
    app = await world.engine()
    async with Site(app) as site:
        said = FieldRunner(site.base, {"order": lambda invoke: (200, {})}).said
        async with websockets.connect(
            site.base.replace("http", "ws") + "/connect", subprotocols=[websockets.Subprotocol("durable.connect.v0")]
        ) as socket:
            await socket.recv()
            for frame in frames:
                whole = {"type": "runner.register", "payload": said} if frame == "register" else frame
                await socket.send(msgspec.json.encode(whole).decode())
            async with asyncio.timeout(5):
                await socket.wait_closed()
            assert socket.close_code == 1002


@pytest.mark.parametrize(
    "workflows",
    [
        [{"name": "*", "triggers": []}],
        [{"name": "x@other", "triggers": []}],
        [{"name": "a", "triggers": [{"event": "e", "if": "__import__('os')"}]}],
        [{"name": "a", "triggers": [{"cron": " "}]}],
        [{"name": "a", "triggers": [], "retry": {"backoff": "wild"}}],
        [{"name": f"w{n}", "triggers": []} for n in range(1_001)],
    ],
)
@once
async def test_nonsense_in_a_registration_is_refused(world: World, workflows: list[Any]) -> None:
    """A30, A35: wildcards, other tenants' names, unsafe conditions and endless lists are refused, and nothing is kept."""
    app = await world.engine()
    async with Site(app) as site, FieldRunner(site.base, {}, workflows=workflows) as runner:
        await eventually(lambda: runner.closed == 1008)
        assert runner.frames[-1]["type"] == "error"
        assert site.functions.of(WORKSPACE) == {}


async def test_a_result_that_cannot_be_sent_times_out_and_names_the_limit(world: World) -> None:
    """B59: a runner that never answers, as one does whose result is over the frame limit, is a typed error that names it."""

    async def silent(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        await asyncio.Event().wait()
        raise AssertionError

    app = await world.engine()
    more = {"workflows": [{"name": "order", "triggers": [], "retry": {"maxAttempts": 1}}]}
    async with Site(app, call_timeout=0.2) as site, FieldRunner(site.base, {"order": silent}, **more):
        await registered(site, "order")
        handle = await start(app, "order")
        with pytest.raises(RunFailed, match="1 MiB") as failed:
            await handle.result(10)
        assert failed.value.error is not None
        assert failed.value.error.code == "runner_timeout"


@pytest.mark.parametrize("sdk", ["durable", "field"])
async def test_a_cancelled_run_cleans_up_where_its_runner_can(world: World, sdk: str) -> None:
    """A runner of ours is told of a cancel, and its passes from then on are the clean-up; one that knows nothing of that is asked
    no more. Either way the run ends cancelled."""
    undone: list[int] = []

    def order(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        memos = Memos(invoke)
        if "cancelling" in invoke["ctx"]:
            if "undo" not in memos:
                undone.append(invoke["ctx"]["cancelling"]["order"])
                return 206, {"opcodes": [op("StepRun", "undo", data=1)], "logs": [], "parked": []}
            return 400, {"error": {"message": "The run was cancelled.", "code": "run_cancelled"}}
        return 206, {"opcodes": [op("Sleep", "nap", sleepMs=60_000)], "logs": []}

    app = await world.engine()
    async with Site(app) as site, FieldRunner(site.base, {"order": order}, sdkName=sdk) as runner:
        await registered(site, "order")
        handle = await start(app, "order")
        await eventually(lambda: runner.asked)
        await world.until_journal(handle.id, lambda lines: "step invoke completed" in lines)
        await app.engine.cancel(handle.id, workspace=WORKSPACE)
        await world.until(handle.id, lambda record: record.status == "cancelled", "it ended")
        assert len(undone) == (1 if sdk == "durable" else 0)
        await world.sound(handle.id)


async def test_another_app_is_reached_by_name(world: World) -> None:
    """RunWorkflow with childApp starts a run of the other app in the same environment, whose result comes back, and Emit with
    targetApp starts what listens there."""
    told: list[Any] = []

    def order(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        memos = Memos(invoke)
        if not memos.known("bill"):
            bill = op("RunWorkflow", "bill", childName="bill", childApp="billing", childData={"n": 3})
            emit = op("Emit", "tell", eventName="heard.asked", targetApp="billing", data=1)
            return 206, {"opcodes": [bill, emit], "logs": []}
        if "bill" not in memos or "tell" not in memos:
            return 206, {"opcodes": [], "logs": []}
        return 200, {"data": memos.data("bill"), "logs": []}

    def bill(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"data": invoke["event"]["data"]["n"] + 1, "logs": []}

    def heard(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        told.append(invoke["event"]["data"])
        return 200, {"data": None, "logs": []}

    app = await world.engine()
    async with (
        Site(app) as site,
        FieldRunner(site.base, {"order": order}),
        FieldRunner(site.base, {"bill": bill, "heard": heard}, app="billing"),
    ):
        await registered(site, "order")
        await eventually(lambda: "bill" in site.functions.of("billing.dev"))
        handle = await start(app, "order")
        assert await handle.result(10) == 4
        await eventually(lambda: told == [1])
        await world.sound(handle.id)
