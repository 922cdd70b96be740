"""Idempotency keys: one run per workspace, workflow and key, for as long as the run row lives."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable import Context, workflow
from durable.core.errors import IdempotencyConflict
from durable.store.records import RunQuery
from tests.engine.world import World


@workflow(name="order")
async def order(ctx: Context, amount: int) -> int:
    await ctx.wait_for_signal("pay")
    return amount


@workflow(name="other")
async def other(ctx: Context, amount: int) -> int:
    return amount


async def test_S24_the_same_key_and_input_find_the_same_run(world: World) -> None:
    """Before, during and after the run, from any engine; it runs once."""
    app = await world.engine(order)
    first = await app.start(order, 5, key="o-1")
    assert (await app.start(order, 5, key="o-1")).id == first.id
    api = await world.engine(order, worker=False)
    assert (await api.start(order, 5, key="o-1")).id == first.id
    await first.signal("pay")
    assert await first.result(5) == 5
    again = await app.start(order, 5, key="o-1")
    assert again.id == first.id
    assert await again.result(5) == 5


async def test_S24_another_input_under_the_same_key_is_a_conflict(world: World) -> None:
    """IdempotencyConflict names the run there is; nothing is started."""
    app = await world.engine(order)
    first = await app.start(order, 5, key="o-1")
    with pytest.raises(IdempotencyConflict, match="another input") as caught:
        await app.start(order, 6, key="o-1")
    assert caught.value.run_id == first.id
    assert len((await app.find(workflow="order")).runs) == 1


async def test_S24_a_key_is_per_workflow_and_workspace(world: World) -> None:
    """The same key elsewhere is another run."""
    app = await world.engine(order, other)
    stranger = await world.engine(order, workspace="stranger", worker=False)
    ids = {
        (await app.start(order, 5, key="k")).id,
        (await app.start(other, 5, key="k")).id,
        (await stranger.start(order, 5, key="k")).id,
    }
    assert len(ids) == 3
    assert [run.id for run in (await stranger.find()).runs] == [next(iter(await _only(world, "stranger")))]


async def _only(world: World, workspace: str) -> list[str]:
    page = await (await world.store()).find(RunQuery(workspace=workspace))
    return [run.id for run in page.runs]


async def test_B24_fifty_concurrent_starts_with_one_key_make_one_run(world: World) -> None:
    """Over three engines at once: one id for all, one run, executed once."""
    apps = [await world.engine(order) for _ in range(3)]
    handles = await asyncio.gather(*(apps[n % 3].start(order, 5, key="same") for n in range(50)))
    assert len({handle.id for handle in handles}) == 1
    assert len((await apps[0].find(workflow="order")).runs) == 1
    await handles[0].signal("pay")
    assert await asyncio.gather(*(handle.result(5) for handle in handles)) == [5] * 50
    assert (await world.statuses(handles[0].id, "run")) == ["started", "completed"]


async def test_S39_a_start_whose_reply_was_lost_is_repeated_without_harm(world: World) -> None:
    """The store had it, the answer did not come: the same insert again, one run, no error for the caller."""
    from durable.core.errors import StoreUnavailable

    app = await world.engine(order)
    lost: list[str] = []

    def lose(name: str, args: Any) -> StoreUnavailable | None:
        if name == "start" and not lost:
            lost.append(name)
            return StoreUnavailable("connection reset by peer")
        return None

    world.line(app).fault_after = lose
    handle = await app.start(order, 5)
    await handle.signal("pay")
    assert await handle.result(5) == 5
    assert lost
    assert len((await app.find(workflow="order")).runs) == 1
    await world.sound(handle.id)
