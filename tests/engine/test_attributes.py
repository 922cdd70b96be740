"""Tags and search attributes (N18): given at the start, changed by the run, found by."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Durable, workflow
from durable.core.ctx import Context
from durable.core.errors import DefinitionError
from durable.store.memory import MemoryStore


@workflow(tags=["shop"])
async def order(ctx: Context, total: int) -> str:
    await ctx.set_attributes(total=total, region="eu", big=total > 100, gone="soon")
    await ctx.sleep(0.01)
    await ctx.set_attributes(gone=None, region="us")
    await ctx.set_tags("shop", "done")
    return "ok"


@pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])
async def test_a_run_is_found_by_what_it_says_of_itself(cold: bool) -> None:
    """Attributes and tags that a run sets are what it is found by, type and value; None takes one away."""
    async with Durable(MemoryStore(), workflows=[order], cold=cold) as app:
        small = await app.start(order, 5, attributes={"customer": "c-1"})
        large = await app.start(order, 500, tags=["gift"], attributes={"customer": "c-2"})
        assert await small.result(10) == await large.result(10) == "ok"
        assert dict((await small.get()).attributes) == {"customer": "c-1", "total": 5, "region": "us", "big": False}
        assert (await large.get()).tags == ("shop", "done")

        async def found(**attributes: Any) -> list[str]:
            return [run.id for run in (await app.find(attributes=attributes)).runs]

        assert await found(big=True) == [large.id]
        assert await found(customer="c-1", region="us") == [small.id]
        assert await found(total="5") == []
        assert await found(gone="soon") == []
        assert {run.id for run in (await app.find(tag="done")).runs} == {small.id, large.id}
        assert (await app.find(tag="gift")).runs == []


@pytest.mark.parametrize(
    "bad", [{"": 1}, {"a\x00": 1}, {"a": float("nan")}, {"a": 2**60}, {"a": "x" * 501}, {"a": [1]}, {"a": "\ud800"}]
)
async def test_what_no_store_can_index_is_refused(bad: dict[str, Any]) -> None:
    """A name or value that could not be found by is a DefinitionError where it is given."""
    async with Durable(MemoryStore(), workflows=[order]) as app:
        with pytest.raises(DefinitionError):
            await app.start(order, 1, attributes=bad)
        assert (await app.find()).runs == []
