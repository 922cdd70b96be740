"""One action on all runs a filter finds: counted first, done once each, safe to repeat; and failures, listed and tried again."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Context, workflow
from durable.core.errors import DefinitionError, RunFinished
from durable.protocol.states import Status
from durable.store.records import RunQuery
from tests.engine.world import World, all_results

BROKEN: list[int] = []


@workflow(name="waits")
async def waits(ctx: Context, number: int) -> Any:
    return await ctx.wait_for_signal("go")


@workflow(name="breaks")
async def breaks(ctx: Context, number: int) -> int:
    def body() -> int:
        if BROKEN:
            raise ValueError(f"broken {number}")
        return number * 2

    await ctx.step("before", lambda: None)
    return await ctx.step("body", body, retries=0, returns=int)


@pytest.fixture(autouse=True)
def broken() -> Any:
    BROKEN.append(1)
    yield
    BROKEN.clear()


async def failed(world: World, app: Any, count: int) -> list[Any]:
    handles = [await app.start(breaks, number, tags=["odd"] if number % 2 else []) for number in range(count)]
    for handle in handles:
        await world.until(handle.id, lambda r: r.status is Status.FAILED)
    return handles


async def test_a_dry_run_counts_and_does_nothing(world: World) -> None:
    """It says how many there are and names the first; only those the action is for; nothing changes."""
    app = await world.engine(waits, breaks)
    handles = [await app.start(waits, number) for number in range(25)]
    await failed(world, app, 1)
    found = await app.engine.bulk("cancel", RunQuery(), dry_run=True)
    assert (found.matched, found.dry_run, found.items, found.cursor) == (25, True, [], None)
    assert found.run_ids == [handle.id for handle in reversed(handles)][:20]
    assert (await app.engine.bulk("requeue", RunQuery(), dry_run=True)).matched == 1
    assert all([(await handle.get()).status is Status.ACTIVE for handle in handles])
    with pytest.raises(DefinitionError, match="no bulk action 'delete'"):
        await app.engine.bulk("delete", RunQuery(), dry_run=True)  # type: ignore[arg-type]


async def test_pause_resume_and_cancel_in_bulk(world: World) -> None:
    """All that match, a bounded number in one call, going on from the cursor; a second time nothing changes."""
    app = await world.engine(waits)
    handles = [await app.start(waits, number) for number in range(7)]
    for handle in handles:
        await world.waits(handle.id)
    first = await app.engine.bulk("pause", RunQuery(workflow="waits"), limit=5, by="ann")
    assert (first.matched, first.count("done")) == (5, 5)
    rest = await app.engine.bulk("pause", RunQuery(workflow="waits", cursor=first.cursor), limit=5, by="ann")
    assert (rest.count("done"), rest.cursor) == (2, None)
    for handle in handles:
        await world.until(handle.id, lambda r: r.activity == "paused")
    assert (await app.engine.bulk("pause", RunQuery())).count("unchanged") == 7
    assert (await app.engine.bulk("resume", RunQuery())).count("done") == 7
    assert (await app.engine.bulk("cancel", RunQuery(), reason="enough")).count("done") == 7
    for handle in handles:
        await world.until(handle.id, lambda r: r.status is Status.CANCELLED)
    assert (await app.engine.bulk("cancel", RunQuery())).matched == 0


async def test_reruns_in_bulk_are_made_once(world: World) -> None:
    """Each run is rerun once, however often it is asked under one key; another key makes others; what refuses says why and
    holds up nobody."""
    app = await world.engine(waits, breaks)
    handles = await failed(world, app, 6)
    BROKEN.clear()
    query = RunQuery(workflow="breaks", tag="odd", status=Status.FAILED)
    once = await app.engine.bulk("rerun", query, from_step="body")
    assert [item.run_id for item in once.items] == [handle.id for handle in reversed(handles[1::2])]
    again = await app.engine.bulk("rerun", query, from_step="body")
    assert [item.outcome for item in again.items] == ["unchanged"] * 3
    assert [item.new_run_id for item in again.items] == [item.new_run_id for item in once.items]
    assert await all_results([app.run(item.new_run_id or "") for item in once.items]) == [10, 6, 2]
    other = await app.engine.bulk("replay", query, input=21, key="other")
    assert await all_results([app.run(item.new_run_id or "") for item in other.items]) == [42] * 3
    active = await app.start(waits, 1)
    mixed = await app.engine.bulk("rerun", RunQuery(workflow="waits", status=Status.ACTIVE))
    assert [(item.run_id, item.outcome, item.code) for item in mixed.items] == [(active.id, "refused", "run_active")]


async def test_failures_are_listed_and_tried_again(world: World) -> None:
    """Failed runs with their errors, a page at a time; a retry goes on where it failed; one that is well is left alone."""
    app = await world.engine(waits, breaks)
    handles = await failed(world, app, 3)
    await app.start(waits, 1)
    page, cursor = await app.engine.failures(2)
    rest, end = await app.engine.failures(2, cursor)
    assert [one.delivery_id for one in (*page, *rest)] == [handle.id for handle in reversed(handles)]
    assert end is None
    assert "broken 2" in page[0].error.message
    assert page[0].failed_at >= page[0].created_at
    BROKEN.clear()
    assert await app.engine.retry_failure(page[0].delivery_id)
    assert await handles[2].result(5) == 4
    with pytest.raises(RunFinished):
        await app.engine.retry_failure(page[0].delivery_id)
    assert (await app.engine.bulk("requeue", RunQuery())).count("done") == 2
    assert await all_results(handles) == [0, 2, 4]
