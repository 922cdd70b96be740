"""The client against a real service: what it sends is what the routes take, what they answer is what it reads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from durable.client import Client, Conflict, NotFound, SyncClient, Unavailable
from tests.server.world import Running, running


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(production=False, admin_token=None, local_app="orders") as found:
        yield found


@pytest.fixture
async def client(service: Running) -> AsyncIterator[Client]:
    async with Client(service.url, app="orders") as found:
        yield found


async def test_an_event_from_its_sending_to_its_runs(client: Client) -> None:
    """An event is sent once however often, its run watched to the end, and found again in every list."""
    data = {"id": "o-1", "customer": "ann"}
    answer = await client.events.send("order.placed", data, id="e-1")
    again = await client.events.send("order.placed", data, id="e-1")
    assert (again.event_id, again.deduped, answer.deduped) == (answer.event_id, True, False)
    assert {one.workflow for one in answer.triggered} == {"on_order", "once_an_hour"}
    run_id = answer.triggered[0].run_id or ""
    run = await client.runs.wait(run_id)
    assert (run.status, run.app, run.event_id, run.ended) == ("succeeded", "orders", answer.event_id, True)
    assert run_id in [one.id async for one in client.runs.list(workflow=run.workflow_name)]
    assert (await client.events.get(answer.event_id)).data == data
    assert answer.event_id in [one.id for one in await client.events.list(name="order.placed")]


async def test_a_run_and_its_story(client: Client) -> None:
    """A run that is started by name tells its steps, lines and frames; `watch` goes on behind a seq."""
    run_id = await client.workflows.trigger("orders", "hello", "ann", id="once")
    assert await client.workflows.trigger("orders", "hello", "ann", id="once") == run_id
    frames = [frame async for frame in client.runs.watch(run_id)]
    assert frames[0].kind == "run_status"
    assert frames[-1].status == "succeeded"
    rest = [frame async for frame in client.runs.watch(run_id, after=frames[0].seq)]
    assert rest == frames[1:]
    assert [(step.name, step.output) for step in await client.runs.steps(run_id)] == [("greet", "hello ann")]
    assert [line.message for line in await client.runs.logs(run_id)] == ["greeting"]
    again = await client.runs.fork(run_id, step="greet", result="moin")
    assert (await client.runs.wait(again["runId"])).result == "moin"
    replayed = await client.runs.replay(run_id, "bob")
    assert (await client.runs.wait(replayed["runId"])).result == "hello bob"


async def test_what_is_done_with_a_run(client: Client) -> None:
    """Pause, resume, signal and cancel reach it; one that has ended is a Conflict, one that is not there NotFound."""
    run_id = await client.workflows.trigger("orders", "waits")
    assert (await client.runs.pause(run_id))["changed"]
    await client.runs.resume(run_id)
    await client.runs.signal(run_id, "go", 7)
    assert (await client.runs.wait(run_id)).result == 7
    with pytest.raises(Conflict, match="finished"):
        await client.runs.cancel(run_id)
    with pytest.raises(NotFound):
        await client.runs.get("nobody")


async def test_schedules(client: Client) -> None:
    """A schedule is ensured, read, paused, triggered and removed, in the words of `app.schedules`."""
    made = await client.schedules.ensure("s", "hello", "ann", every=3600, catch_up="skip", overlap="queue")
    assert (made.every_seconds, made.catch_up, made.overlap) == (3600, "skip", "queue")
    assert await client.schedules.get("s") in await client.schedules.list()
    assert (await client.schedules.pause("s")).paused
    run_id = (await client.schedules.trigger("s"))["runId"]
    assert (await client.runs.wait(run_id)).result == "hello ann"
    assert not (await client.schedules.resume("s")).paused
    await client.schedules.remove("s")
    with pytest.raises(NotFound):
        await client.schedules.get("s")


async def test_the_app_is_whose_workspace_is_meant(service: Running, client: Client) -> None:
    """Of two apps each sees its own events and schedules, runners and limits, and none of the other's."""
    async with Client(service.url, app="other") as other:
        answer = await other.events.send("order.placed", {"id": "x"})
        assert answer.triggered == []
        assert (await other.events.get(answer.event_id)).id == answer.event_id
        with pytest.raises(NotFound):
            await client.events.get(answer.event_id)
        assert [one async for one in other.runs.list()] == []
        for about in (
            other.schedules.list,
            other.runners,
            other.workflows.list,
            other.flow_state,
            other.approvals.list,
        ):
            assert await about() == []
        assert "hello" in {one["name"] for one in await client.workflows.list()}
    assert (await client.ready())["status"] == "ready"
    assert "orders" in {one["name"] for one in await client.apps()}


def test_without_a_loop(service: Running) -> None:
    """The synchronous client does the same, iterators too."""
    with SyncClient(service.url, app="orders") as client:
        run_id = client.workflows.trigger("orders", "hello", "cy")
        assert [frame.status for frame in client.runs.watch(run_id)][-1] == "succeeded"
        assert client.runs.get(run_id).result == "hello cy"
        assert run_id in [run.id for run in client.runs.list()]


async def test_nobody_there() -> None:
    """A service that is not up is Unavailable, and the message says where it was looked for."""
    async with Client("http://127.0.0.1:9") as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
            await client.ready()
