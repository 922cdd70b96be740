"""Several engines, and runs that meet themselves: what has to hold when everybody reaches for the same thing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from durable import Context, RunCancelled, RunFailed, current_step, workflow
from durable.core.errors import StoreUnavailable
from durable.protocol.states import Status
from durable.store.records import NewRun
from tests.engine.world import Gate, World, eventually

ROOT = Path(__file__).resolve().parents[2]


async def test_B32_eight_engines_claiming_at_once_execute_each_run_once(world: World) -> None:
    """The part that exists before limits: eight engines reach for eighty due runs at the same moment; each is executed by
    one, none above `max_running` at a time, and runs of other versions are not touched."""
    ran: Counter[str] = Counter()
    running = peak = 0

    async def body() -> None:
        nonlocal running, peak
        ran[current_step().run_id] += 1
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.005)
        running -= 1

    @workflow(name="due")
    async def due(ctx: Context) -> None:
        await ctx.step("body", body)

    api = await world.engine(due, worker=False)
    handles = [await api.start(due) for _ in range(80)]
    store = await world.store()
    await store.start([NewRun("other-version", "due", "99", b"null")])
    await asyncio.gather(*(world.engine(due, max_running=3) for _ in range(8)))
    for handle in handles:
        await handle.result(10)
    assert ran == Counter({handle.id: 1 for handle in handles})
    assert peak <= 24
    assert (await world.record("other-version")).epoch == 0
    await world.sound(*(handle.id for handle in handles[:10]))


async def test_B43_a_run_that_waits_for_what_only_it_can_produce_is_driven_on(world: World) -> None:
    """A run whose own step signals it, and whose engine dies in that step: suspended, taken over, driven to its end."""
    gate = Gate()
    apps: list[Any] = []

    async def tell_itself() -> None:
        await gate()
        await apps[-1].run(current_step().run_id).signal("echo", "heard", id="once")

    @workflow(name="itself")
    async def itself(ctx: Context) -> list[Any]:
        return list(await asyncio.gather(ctx.wait_for_signal("echo"), ctx.step("tell", tell_itself)))

    apps.append(await world.engine(itself))
    handle = await apps[-1].start(itself)
    await gate.reached()
    await world.crash(apps[-1])
    apps.append(await world.engine(itself))
    await gate.reached(2)
    gate.open()
    assert await apps[-1].run(handle.id).result(5) == ["heard", None]
    await world.sound(handle.id)


async def test_B43_an_attempt_that_hangs_is_given_up_and_driven_again(world: World) -> None:
    """The first attempt never answers; its timeout ends it, and the second one completes the run."""
    tries: list[int] = []

    async def hangs_once() -> int:
        tries.append(current_step().attempt)
        if len(tries) == 1:
            await asyncio.Event().wait()
        return len(tries)

    @workflow(name="hangs")
    async def hangs(ctx: Context) -> int:
        from durable import RetryPolicy

        number: int = await ctx.step("body", hangs_once, timeout=0.05, retries=RetryPolicy(initial_delay=0.01))
        return number

    app = await world.engine(hangs)
    assert await app.start_and_wait(hangs, timeout=5) == 2


async def test_trouble_is_reported_for_starts_and_signals_too(world: World) -> None:
    """An engine with nothing to commit still says that the store takes nothing, when somebody tries to start or to signal."""

    @workflow(name="idle")
    async def idle(ctx: Context) -> Any:
        return await ctx.wait_for_signal("go")

    app = await world.engine(idle)
    handle = await app.start(idle)
    await world.waits(handle.id)
    broken = "start"
    world.line(app).fault = lambda name, args: StoreUnavailable("away") if name == broken else None
    starting = asyncio.ensure_future(app.start(idle))
    await eventually(lambda: app.engine.trouble is not None, "the trouble of starts is reported")
    broken = "send"
    await starting
    sending = asyncio.ensure_future(handle.signal("go", 1))
    await eventually(lambda: app.engine.trouble is not None, "the trouble of messages is reported")
    broken = ""
    await sending
    assert await handle.result(5) == 1
    await eventually(lambda: app.engine.trouble is None)


async def test_closing_with_the_store_out_of_reach_has_a_bound_and_loses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is gone and stays gone: close() returns all the same, and the next engine finds the run as it was."""
    monkeypatch.setattr("durable.engine.engine.HAND_OVER_SECONDS", 0.2)
    gate = Gate()

    @workflow(name="stuck")
    async def stuck(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    app = await world.engine(stuck, lease=1.0)
    handle = await app.start(stuck)
    await gate.reached()
    world.line(app).fault = lambda name, args: StoreUnavailable("gone") if name != "close" else None
    gate.open()
    await eventually(lambda: app.engine.trouble is not None)
    began = time.monotonic()
    await app.close(0.2)
    assert time.monotonic() - began < 4
    other = await world.engine(stuck, poll_every=0.1)
    assert await other.run(handle.id).result(10) == 2
    await world.sound(handle.id)


async def test_a_requeued_run_can_be_cancelled_again(world: World) -> None:
    """A cancel that the run swallowed before it failed is no reason to ignore a new one after it was reopened."""
    broken = [True]

    @workflow(name="swallows")
    async def swallows(ctx: Context) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await ctx.wait_for_signal("never")

        async def body() -> None:
            if broken:
                broken.pop()
                raise ValueError("no")

        await ctx.step("body", body, retries=0)
        await ctx.wait_for_signal("never either")

    app = await world.engine(swallows)
    handle = await app.start(swallows)
    await world.waits(handle.id)
    await handle.cancel()
    with pytest.raises(RunFailed):
        await handle.result(5)
    await app.requeue(handle.id)
    await world.until_journal(handle.id, lambda lines: "step body completed" in lines)
    assert await handle.cancel() is True
    with pytest.raises(RunCancelled):
        await handle.result(5)
    assert (await world.record(handle.id)).status is Status.CANCELLED


STUCK = """
import asyncio, signal, sys, time
from durable import Context, Durable, workflow

@workflow(name="stuck")
async def stuck(ctx: Context) -> None:
    def body() -> None:
        print("stuck", flush=True)
        time.sleep(60)
    await ctx.step("body", body)

async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with Durable(sys.argv[1], workflows=[stuck], drain_timeout=0.3) as app:
        await app.start(stuck)
        await stop.wait()
    print("closed", flush=True)

asyncio.run(main())
"""


def test_S38_a_thread_that_does_not_return_does_not_hold_the_exit_back(tmp_path: Path) -> None:
    """A plain `def` body cannot be cancelled; drain has a bound, and so has the end of the process."""
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    process = subprocess.Popen(
        [sys.executable, str(script), f"sqlite:///{tmp_path / 'durable.db'}"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "stuck"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().strip() == "closed"
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
