"""The client against a real service: every method, its shapes, and what it makes of refusals and cuts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import pytest

from durable.client import Client, Conflict, NotAllowed, NotFound, Refused, Unavailable
from tests.client.proxy import Cutter
from tests.runners.apps import Memos, op
from tests.runners.site import FieldRunner
from tests.server.world import Running, running


@pytest.fixture
async def client(service: Running, key: str) -> AsyncIterator[Client]:
    async with Client(service.url, key=key) as found:
        yield found


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a fact that is asked for over HTTP."""
    async with asyncio.timeout(20):
        while not await fact():
            await asyncio.sleep(0.01)


async def waiting(client: Client, run_id: str) -> None:
    async def waits() -> bool:
        return (await client.runs.get(run_id)).status == "waiting"

    await until(waits)


async def test_a_run_from_its_event_to_its_result(client: Client) -> None:
    """An event starts a run; the answer names it, the event says what became of it, the same id changes nothing."""
    order = {"id": "o-1", "customer": "ann"}
    answer = await client.events.send("order.placed", order, id="once", session="s", tags=["eu"])
    assert sorted(one.workflow for one in answer.triggered) == ["on_order", "once_an_hour"]
    again = await client.events.send("order.placed", order, id="once")
    assert (again.event_id, again.deduped) == (answer.event_id, True)
    [mine] = [one for one in answer.triggered if one.workflow == "on_order"]
    assert mine.run_id is not None
    run = await client.runs.wait(mine.run_id)
    assert (run.status, run.ended, run.result, run.event_name) == ("succeeded", True, "o-1", "order.placed")
    assert run.ended_at is not None
    event = await client.events.get(answer.event_id)
    assert (event.name, event.data, event.dedupe_id, event.session) == ("order.placed", order, "once", "s")
    assert [one.run_id for one in event.triggered if one.workflow == "on_order"] == [mine.run_id]


async def test_events_by_pages_and_as_they_come(client: Client) -> None:
    """`list` goes through all pages, newest first; `watch` has what is accepted from then on, or after a number."""
    sent = [(await client.events.send("note", {"n": n})).event_id for n in range(7)]
    listed = [one async for one in client.events.list(name="note", limit=3, since="1h")]
    assert [one.id for one in listed] == sent[::-1]
    async with aclosing(client.events.watch(listed[-1].number)) as watched:
        assert [(await anext(watched)).id for _ in range(6)] == sent[1:]


async def test_a_run_looked_at(client: Client) -> None:
    """Steps, log lines by pages, lists by pages, counts: in the shapes of the service."""
    started = await client.workflows.trigger("shop", "many", 8, id="eight", tags=["looked"])
    assert await client.workflows.trigger("shop", "many", 8, id="eight", tags=["looked"]) == started
    run = await client.runs.wait(started.run_id)
    assert (run.workflow_name, run.app, run.input, run.result, run.step_count) == ("many", "shop", 8, 8, 8)
    assert run.idempotency_key == "eight"
    steps = await client.runs.steps(run.id)
    assert [(step.status, step.kind) for step in steps] == [("completed", "step")] * 8
    assert steps[3].output == "hello 3"
    assert [line.message async for line in client.runs.logs(run.id, limit=3)] == [f"line {n}" for n in range(8)]
    for _ in range(4):
        await client.runs.wait((await client.workflows.trigger("shop", "hello", "x", tags=["looked"])).run_id)
    found = [one async for one in client.runs.list(tag="looked", limit=2, dir="asc")]
    assert [one.workflow_name for one in found] == ["many"] + ["hello"] * 4
    assert [
        one.id async for one in client.runs.list(workflow="many", status="succeeded", q=run.id[-8:], since="1h")
    ] == [run.id]
    stats = await client.runs.stats(workflow="many", since=datetime.now(UTC).replace(year=2000))
    assert stats.by_status["succeeded"] >= 1
    assert sum(bucket.started for bucket in await client.runs.timeseries(workflow="many", buckets=4)) >= 1


async def test_a_failed_runs_error(client: Client) -> None:
    """What a run failed with is told as an error, on the run and on its step; a requeue reopens it."""
    run = await client.runs.wait((await client.workflows.trigger("shop", "broken", "rain")).run_id)
    assert run.status == "failed"
    assert run.error is not None
    assert "cannot bear rain" in run.error.message
    [step] = await client.runs.steps(run.id)
    assert (step.attempt, step.error and step.error.type) == (2, "ValueError")
    assert await client.runs.requeue(run.id)
    assert (await client.runs.wait(run.id)).status == "failed"


async def test_what_an_operator_does(client: Client) -> None:
    """pause, resume, signal, cancel: true for the first of them, false for a repeat, Conflict after the end."""
    run_id = (await client.workflows.trigger("shop", "waits")).run_id
    await waiting(client, run_id)
    assert await client.runs.pause(run_id, by="ann", reason="lunch")
    assert not await client.runs.pause(run_id)
    assert (await client.runs.get(run_id)).paused_by == "ann"
    assert await client.runs.signal(run_id, "go", {"n": 1}, signal_id="s-1")
    assert not await client.runs.signal(run_id, "go", {"n": 1}, signal_id="s-1")
    assert await client.runs.resume(run_id, by="ann", timers="hold")
    assert (await client.runs.wait(run_id)).result == {"n": 1}
    other = (await client.workflows.trigger("shop", "waits")).run_id
    assert await client.runs.cancel(other, "enough")
    assert (await client.runs.wait(other)).status == "cancelled"
    with pytest.raises(Conflict) as refused:
        await client.runs.cancel(run_id)
    assert not await client.runs.cancel(other)
    assert (refused.value.status, refused.value.code) == (409, "run_finished")


async def test_running_again(client: Client) -> None:
    """replay, retry_from_step, fork and bulk_replay make new runs; the same key finds the one there is."""
    first = await client.runs.wait((await client.workflows.trigger("shop", "hello", "ann", tags=["again"])).run_id)
    replayed = await client.runs.replay(first.id, key="r")
    assert await client.runs.replay(first.id, key="r") == replayed
    run = await client.runs.wait(replayed.run_id)
    assert (run.result, run.replay_of) == ("hello ann", first.id)
    assert (await client.runs.wait((await client.runs.replay(first.id, "bob")).run_id)).result == "hello bob"
    assert (await client.runs.wait((await client.runs.retry_from_step(first.id, "greet")).run_id)).result == "hello ann"
    forked = await client.runs.fork(first.id, step="greet", result="good day")
    assert (await client.runs.wait(forked.run_id)).result == "good day"
    counted = await client.runs.bulk_replay(workflow="hello", status="succeeded", tag="again", since="1h", dry_run=True)
    done = await client.runs.bulk_replay(workflow="hello", status="succeeded", tag="again", limit=2)
    assert counted.matched >= len(done.items) > 0
    assert [one.outcome for one in done.items] == ["done"] * len(done.items)


async def test_schedules(client: Client) -> None:
    """A schedule is ensured, paused, resumed, triggered, listed and removed."""
    made = await client.schedules.ensure(
        "nightly", "hello", "ann", cron="0 3 * * *", timezone="Europe/Vienna", overlap="skip", tags=["n"]
    )
    assert (made.cron, made.timezone, made.overlap, made.input, made.paused) == (
        *("0 3 * * *", "Europe/Vienna", "skip", "ann"),
        False,
    )
    assert made.next_at is not None
    assert (await client.schedules.ensure("hourly", "hello", "x", every="1h", catch_up="skip")).every_seconds == 3600
    at = datetime(2100, 1, 1, tzinfo=UTC)
    assert (await client.schedules.ensure("once", "hello", "x", at=at)).at == at
    assert (await client.schedules.pause("nightly")).paused
    assert (await client.schedules.get("nightly")).next_at is None
    assert not (await client.schedules.resume("nightly")).paused
    started = await client.schedules.trigger("nightly")
    assert (await client.runs.wait(started.run_id)).result == "hello ann"
    assert [one.id for one in await client.schedules.list()] == ["hourly", "nightly", "once"]
    for one in ("hourly", "nightly", "once"):
        await client.schedules.remove(one)
    with pytest.raises(NotFound):
        await client.schedules.get("nightly")
    with pytest.raises(Refused):
        await client.schedules.ensure("bad", "hello", cron="never")


async def test_what_the_service_is(client: Client) -> None:
    """health, ready, apps, workflows, runners and the limits, as the key sees them."""
    assert (await client.health())["status"] == "ok"
    assert (await client.ready())["status"] == "ready"
    assert [(app.name, app.environment) for app in await client.apps()] == [("shop", "dev")]
    found = {one.name: one for one in await client.workflows.list()}
    assert [trigger.event for trigger in found["on_order"].triggers] == ["order.placed"]
    assert await client.runners() == []
    await client.events.send("order.placed", {"id": "o-2", "customer": "bob"})
    assert isinstance(await client.flow_state(), list)
    assert await client.approvals.list() == []


async def test_approvals_are_decided_once() -> None:
    """What a runner asks for is listed and decided, the first word counts; the app is named where there is no key."""

    def order(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        memos = Memos(invoke)
        if not memos.known("ask"):
            ask = op("Approval", "ask", tool="refund", risk="high", summary="100 EUR", data={"amount": 100})
            return 206, {"opcodes": [ask], "logs": []}
        if "ask" not in memos:
            return 206, {"opcodes": [], "logs": []}
        return 200, {"data": memos.data("ask"), "logs": []}

    with running(production=False) as service:
        async with Client(service.url, app="shop") as client, FieldRunner(service.url, {"order": order}):

            async def there() -> bool:
                return [one.app for one in await client.runners()] == ["shop"]

            async def asked() -> bool:
                return bool(await client.approvals.list())

            await until(there)
            answer = await client.events.send("order.asked", {})
            await until(asked)
            [approval] = await client.approvals.list()
            assert (approval.run_id, approval.tool, approval.args) == (answer.run_id, "refund", {"amount": 100})
            await client.approvals.decide(approval.id, True, by="ann", args={"amount": 90})
            with pytest.raises((Conflict, NotFound)):
                await client.approvals.decide(approval.id, False)
            decision = {"status": "approved", "args": {"amount": 90}, "decidedBy": "ann"}
            assert (await client.runs.wait(approval.run_id)).result == decision
            assert await client.approvals.list() == []
            assert [run.id async for run in client.runs.list()] == [approval.run_id]


async def test_refusals_are_exceptions(service: Running, client: Client) -> None:
    """404, 400, 401 and 403 are errors of their own, with the service's code and message."""
    with pytest.raises(NotFound) as unknown:
        await client.runs.get("no-such-run")
    assert (unknown.value.status, unknown.value.code) == (404, "run_not_found")
    with pytest.raises(NotFound):
        await anext(client.runs.watch("no-such-run"))
    with pytest.raises(Refused, match="moment"):
        await client.runs.stats(since="some day")
    with pytest.raises(NotFound):
        await client.workflows.trigger("shop", "nobody", 1)
    with pytest.raises(NotAllowed):
        await client.flow_state(app="rival")
    async with Client(service.url) as nobody:
        with pytest.raises(NotAllowed) as refused:
            await nobody.apps()
    assert refused.value.status == 401


async def test_nobody_there(free_port: int) -> None:
    """A service that cannot be reached is Unavailable, after as many tries as are harmless."""
    async with Client(f"http://127.0.0.1:{free_port}") as client:
        with pytest.raises(Unavailable, match="Is the service up"):
            await client.ready()


async def test_all_runs_watched(client: Client) -> None:
    """`watch_all` tells of runs of the workspace whose status changes."""
    async with aclosing(client.runs.watch_all()) as frames:
        mine: list[str] = []

        async def start() -> bool:
            mine.append((await client.workflows.trigger("shop", "hello", "x")).run_id)
            return True

        first = anext(frames)
        hearing = asyncio.ensure_future(first)
        while not hearing.done():
            await start()
            await asyncio.wait({hearing}, timeout=0.2)
        frame = await hearing
    assert (frame.kind, frame.workflow_name) == ("run_status", "hello")
    assert frame.run_id in mine


@pytest.mark.parametrize("kindly", [True, False])
async def test_a_watch_goes_on_after_every_cut(service: Running, key: str, client: Client, kindly: bool) -> None:
    """S33: the client's watch has every frame once and in order, wherever the connection is cut, in order or by a reset; a
    stream that was closed before its end is not taken for ended."""
    run_id = (await client.workflows.trigger("shop", "many", 40)).run_id
    async with Cutter(service.port, lambda: 1_500, lambda: kindly) as cutter, Client(cutter.url, key=key) as far:
        seen = [frame async for frame in far.runs.watch(run_id)]
        assert cutter.cuts > 3
    assert seen == [frame async for frame in client.runs.watch(run_id)]
    assert seen[-1].status == "succeeded"
    assert [frame async for frame in client.runs.watch(run_id, seen[-1].seq)] == []


async def test_a_watch_outlives_a_restart(tmp_path: Any, free_port: int) -> None:
    """S33: the service goes, which its stream says, and comes back on the same port: the watch goes on where it was."""
    url = f"sqlite:///{tmp_path}/restart.db"
    async with Client(f"http://127.0.0.1:{free_port}") as client:
        with running(url, production=False, port=free_port):
            run_id = (await client.workflows.trigger("default", "waits")).run_id
            frames = client.runs.watch(run_id)
            seen = [await anext(frames)]
            await waiting(client, run_id)
        with running(url, production=False, port=free_port):
            assert await client.runs.signal(run_id, "go", 7)
            seen += [frame async for frame in frames]
            assert seen == [frame async for frame in client.runs.watch(run_id)]
    assert seen[-1].status == "succeeded"


def test_every_method_is_used_here() -> None:
    """Each public method of the client and its parts is called in this file."""
    from durable.client import client as module

    parts = [module.Events, module.Runs, module.Workflows, module.Schedules, module.Approvals]
    with open(__file__) as file:
        text = file.read()
    names = [f"{part.__name__.lower()}.{name}" for part in parts for name in vars(part) if not name.startswith("_")]
    names += ["apps", "runners", "flow_state", "health", "ready"]
    assert [name for name in names if f".{name}(" not in text] == []
