"""The loop the simulation stands on: virtual time, seeded order, nodes that vanish, stand still and go on."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

import pytest

from durable.testing.simulation.loop import Deadlock, Livelock, Node, SimLoop


def loop_of(seed: int, **options: Any) -> SimLoop:
    return SimLoop(seed, **options)  # type: ignore[abstract]


def test_time_is_virtual() -> None:
    """A month of sleep takes no time, and the clock says a month."""
    loop = loop_of(1)

    async def main() -> None:
        await asyncio.sleep(30 * 86_400)

    loop.run(main)
    assert loop.time() == 30 * 86_400


def order_of(seed: int, **options: Any) -> list[int]:
    loop = loop_of(seed, **options)
    seen: list[int] = []

    async def note(n: int) -> None:
        seen.append(n)

    async def main() -> None:
        await asyncio.gather(*[note(n) for n in range(8)])

    loop.run(main)
    return seen


def test_order_is_the_seeds() -> None:
    """The same seed gives the same order, other seeds give others; "fifo" keeps what one node asked for in order."""
    assert order_of(1) == order_of(1)
    assert len({tuple(order_of(seed)) for seed in range(20)}) > 15
    assert order_of(1, order="fifo") == list(range(8))


def test_a_crash_is_to_vanish() -> None:
    """Nothing of a crashed node runs again: no timer, no task, no `finally`, not even when it is collected."""
    loop = loop_of(1)
    node = Node("a")
    seen: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(1)
            seen.append("went on")
        finally:
            seen.append("cleaned up")

    async def main() -> None:
        loop.spawn(node, work())
        await asyncio.sleep(0.5)
        loop.crash(node)
        await asyncio.sleep(5)
        gc.collect()

    loop.run(main)
    assert seen == []
    seen.append("over")
    loop.close()


def test_a_pause_is_to_stand_still() -> None:
    """A paused node does nothing, and then all it missed, with the clock as late as it is."""
    loop = loop_of(1)
    node = Node("a")
    seen: list[float] = []

    async def work() -> None:
        for _ in range(3):
            await asyncio.sleep(1)
            seen.append(loop.time())

    async def main() -> None:
        loop.spawn(node, work())
        await asyncio.sleep(1.5)
        loop.pause(node)
        await asyncio.sleep(10)
        assert seen == [1.0]
        loop.resume(node)
        await asyncio.sleep(10)

    loop.run(main)
    assert seen == [1.0, 11.5, 12.5]


def test_whoever_wakes_a_task_it_runs_on_its_own_node() -> None:
    """A future resolved by one node wakes another node's task there, not here."""
    loop = loop_of(1)
    one, other = Node("one"), Node("other")
    seen: list[str] = []

    async def wait(future: asyncio.Future[None]) -> None:
        await future
        seen.append(loop.node.name)

    async def resolve(future: asyncio.Future[None]) -> None:
        future.set_result(None)

    async def main() -> None:
        future: asyncio.Future[None] = loop.create_future()
        loop.spawn(one, wait(future))
        await asyncio.sleep(1)
        loop.spawn(other, resolve(future))
        await asyncio.sleep(1)

    loop.run(main)
    assert seen == ["one"]


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def spinning() -> None:
    while True:
        await asyncio.sleep(0)


@pytest.mark.parametrize(("main", "error"), [(for_ever, Deadlock), (spinning, Livelock)])
def test_standstill_and_spinning_are_found(main: Any, error: type[Exception]) -> None:
    """With nothing scheduled the loop says so; with no end of callbacks too."""
    loop = loop_of(1, max_steps=10_000)
    coros: list[Coroutine[Any, Any, None]] = []

    def made() -> Coroutine[Any, Any, None]:
        coros.append(main())
        return coros[0]

    with pytest.raises(error):
        loop.run(made)
    loop.close()
