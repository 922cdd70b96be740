"""Our runner and our engine, over their real links: the same workflow code, dialled in and called, hot and cold."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import uvicorn

from durable import Context, NonRetryable, RetryPolicy, RunFailed, StepFailed, current_step, workflow
from durable.core.origin import Origin, meta_of
from durable.runners.connecting import connect
from durable.runners.passes import Failure
from durable.runners.serving import serve
from durable.runners.workspaces import WorkspaceInfo, WorkspaceKey
from durable.store.items import NewItem
from tests.engine.world import World, eventually
from tests.runners.site import Site

WORKSPACE = "shop.dev"
QUICK = RetryPolicy(max_attempts=3, initial_delay=0.01, jitter=0.0)


class Calls:
    """What the bodies did."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.keys: list[str] = []

    async def charge(self, amount: int) -> int:
        step = current_step()
        self.keys.append(step.idempotency_key)
        step.log("charging", attempt=step.attempt)
        self.made.append(f"charge {amount}")
        if step.attempt == 1 and amount == 7:
            raise ConnectionError("not now")
        if amount > 10:
            raise NonRetryable("no funds")
        return amount

    def note(self, what: str) -> str:
        self.made.append(what)
        return what


calls = Calls()


@workflow("checkout")
async def checkout(ctx: Context, order: dict[str, Any]) -> Any:
    ctx.log("began", order=order["id"])
    paid, noted = await asyncio.gather(
        ctx.step("charge", calls.charge, order["amount"], retries=QUICK), ctx.step("note", calls.note, order["id"])
    )
    await ctx.sleep(0.02)
    shipped = await ctx.child("ship", {"id": order["id"]}, returns=str)
    return [paid, noted, shipped]


@workflow("ship")
async def ship(ctx: Context, parcel: dict[str, str]) -> str:
    return await ctx.step("label", lambda: f"label of {parcel['id']}")


@workflow("races")
async def races(ctx: Context, given: dict[str, Any]) -> str:
    name = given["name"]
    try:
        async with asyncio.timeout(given["seconds"]):
            return str(await ctx.wait_for_signal(name))
    except TimeoutError:
        event = await ctx.wait_for_event("paid", match={"order": name}, timeout="1m")
        await ctx.send_event("done", {"order": name})
        return f"event {event.data['order']}"


@workflow("fails")
async def fails(ctx: Context, amount: int) -> None:
    try:
        await ctx.step("charge", calls.charge, amount)
    except StepFailed as error:
        assert error.error is not None
        raise ValueError(f"{error.error.code}: {error.error.message}") from error


async def clean_up(ctx: Context, failure: Failure) -> None:
    await ctx.step("tell", calls.note, f"{failure.error.message} ({failure.input})")


FLOWS = [checkout, ship, races, fails]


@asynccontextmanager
async def runner(site: Site, link: str, name: str = "one", key: str | None = None) -> AsyncIterator[Any]:
    """A runner that the engine knows of."""
    options: dict[str, Any] = {"app": "shop", "runner": name, "on_failure": {fails: clean_up}, "key": key}
    if link == "connect":
        async with connect(FLOWS, site.base, **options) as dialling:
            await dialling.wait_connected(10)
            await known(site, name)
            yield dialling
        return
    place = socket.create_server(("127.0.0.1", 0))
    serving = serve(FLOWS, url=f"http://127.0.0.1:{place.getsockname()[1]}", engine=site.base, **options)
    server = uvicorn.Server(uvicorn.Config(serving, log_level="critical", lifespan="on"))
    work = asyncio.create_task(server._serve([place]))
    try:
        await eventually(lambda: serving.registered)
        await known(site, name)
        yield serving
    finally:
        server.should_exit = True
        await work
        place.close()


async def known(site: Site, name: str) -> None:
    while name not in {one.runner for one in await site.functions.directory.live(WORKSPACE)}:
        await asyncio.sleep(0.005)
    await eventually(lambda: site.functions.of(WORKSPACE).keys() >= {"checkout", "ship", "races", "fails"})


@pytest.fixture(autouse=True)
def fresh() -> None:
    calls.made.clear()
    calls.keys.clear()


@pytest.fixture(params=["connect", "serve"])
def link(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def start(app: Any, flow: str, input: Any, **options: Any) -> Any:
    return await app.engine.start_run(flow, input, workspace=WORKSPACE, **options)


async def test_steps_retries_sleeps_and_children(world: World, link: str) -> None:
    """A workflow of everyday things: each body ran as often as it had to, under one idempotency key; the child ran in the
    runner too."""
    app = await world.engine()
    async with Site(app) as site, runner(site, link):
        run = await start(app, "checkout", {"id": "o1", "amount": 7})
        assert await run.result(20) == [7, "o1", "label of o1"]
        assert sorted(calls.made) == ["charge 7", "charge 7", "o1"]
        assert set(calls.keys) == {f"{run.id}:0"}
        assert await world.statuses(run.id, "step", "charge") == ["retrying", "completed"]
        await world.sound(run.id)


async def test_races_signals_and_events(world: World, link: str) -> None:
    """A timeout around a wait for a signal, an event by condition, one sent: all as in the engine."""
    app = await world.engine()
    async with Site(app) as site, runner(site, link):
        late = await start(app, "races", {"name": "o1", "seconds": 0.05})
        early = await start(app, "races", {"name": "o2", "seconds": 60})
        await early.signal("o2", "came")
        assert await early.result(20) == "came"
        await app.engine.send_event("paid", {"order": "o3"}, workspace=WORKSPACE)
        await app.engine.send_event("paid", {"order": "o1"}, workspace=WORKSPACE)
        assert await late.result(20) == "event o1"


async def test_failures_are_typed_and_cleaned_up_after(world: World, link: str) -> None:
    """A step that fails for good raises StepFailed with its code; what comes out is the run's failure; on_failure has run."""
    app = await world.engine()
    async with Site(app) as site, runner(site, link):
        run = await start(app, "fails", 99)
        with pytest.raises(RunFailed, match="non_retryable: no funds"):
            await run.result(20)
        assert calls.made == ["charge 99", "non_retryable: no funds (99)"]


async def test_a_run_may_be_pinned(world: World, link: str) -> None:
    """R4: to the runner that is named; a run of one that is away fails at once."""
    app = await world.engine()
    async with Site(app) as site, runner(site, link, "one"), runner(site, link, "two") as second:
        pinned = await start(app, "ship", {"id": "o1"}, meta=meta_of(Origin(runner="two")))
        assert await pinned.result(20) == "label of o1"
        lost = await start(app, "ship", {"id": "o1"}, meta=meta_of(Origin(runner="three")))
        with pytest.raises(RunFailed, match="pinned"):
            await lost.result(20)
        assert second.runner.name == "two"


async def test_calls_are_signed_with_the_workspace_s_key(world: World) -> None:
    """The engine signs what it posts, and a runner that has another key takes nothing."""
    app = await world.engine()
    key = WorkspaceKey("dk_shop.dev_secret")
    item = NewItem(WORKSPACE, "workspace", WORKSPACE, msgspec.json.encode(WorkspaceInfo(keys=[key])))
    await app.engine.deps.store.put_items([item])
    async with Site(app) as site, runner(site, "serve", key=key.secret):
        run = await start(app, "ship", {"id": "o1"})
        assert await run.result(20) == "label of o1"
        [info] = await site.functions.directory.live(WORKSPACE)
        assert info.key_matches is True
    async with Site(app) as site, runner(site, "serve", "two", key="dk_shop.dev_another"):
        refused = await start(app, "ship", {"id": "o2"}, meta=meta_of(Origin(runner="two")))
        with pytest.raises(RunFailed):
            await refused.result(20)
        assert calls.made == []
