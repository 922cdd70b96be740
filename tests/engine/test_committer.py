"""The group by itself: who is answered, and with what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from durable.core.errors import EngineStopped, StoreUnavailable
from durable.engine.committer import Group
from durable.testing.facts import PATIENCE


async def test_S39_whoever_asked_is_told_when_the_engine_stops_between_two_tries() -> None:
    """A question whose batch is waiting for the next try, the store being away, is answered with EngineStopped at the close."""

    async def call(items: Sequence[str]) -> Sequence[str]:
        raise StoreUnavailable("away")

    group: Group[str, str] = Group("questions", call, max_items=10)
    asked = asyncio.ensure_future(group.ask("a"))
    async with asyncio.timeout(PATIENCE):
        while group.trouble is None:
            await asyncio.sleep(0)
        await group.close()
        with pytest.raises(EngineStopped):
            await asked
