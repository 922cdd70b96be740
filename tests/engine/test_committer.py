"""The group by itself: who is answered, and with what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from durable.core.errors import EngineStopped, PayloadTooLarge, StoreUnavailable
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


async def test_S39_one_that_the_store_refuses_fails_alone() -> None:
    """Of a batch that the store refuses as a whole, only the culprit gets the error; its neighbours get their answers, in
    order."""
    bad = {3, 7, 8}
    calls = 0

    async def call(items: Sequence[int]) -> Sequence[int]:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        if bad.intersection(items):
            raise PayloadTooLarge("too large")
        return [n * 10 for n in items]

    group: Group[int, int] = Group("questions", call, max_items=11)
    asked = [asyncio.ensure_future(group.ask(n)) for n in range(11)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    for n, answer in enumerate(answers):
        assert isinstance(answer, PayloadTooLarge) if n in bad else answer == n * 10
    assert calls < 20


@pytest.mark.parametrize("moment", range(1, 8))
async def test_S39_whoever_asked_is_told_when_the_engine_stops_amid_the_search(moment: int) -> None:
    """The engine stops at any call of the search for a culprit: each who asked is told once, nobody waits for ever."""
    calls = 0

    async def call(items: Sequence[int]) -> Sequence[int]:
        nonlocal calls
        calls += 1
        if calls == moment:
            group.abort()
        await asyncio.sleep(0)
        if 3 in items:
            raise PayloadTooLarge("too large")
        return items

    group: Group[int, int] = Group("questions", call, max_items=8)
    told: list[int | BaseException] = []
    asked = [asyncio.ensure_future(group.ask(n, told.append)) for n in range(8)]
    async with asyncio.timeout(PATIENCE):
        answers = await asyncio.gather(*asked, return_exceptions=True)
    assert len(told) == 8
    assert [isinstance(answer, PayloadTooLarge) for answer in answers].count(True) <= 1
    assert any(isinstance(answer, EngineStopped) for answer in answers)
