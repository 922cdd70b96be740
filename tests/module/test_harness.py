"""The testing kit: virtual time, overrides, steps that fail on purpose."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import pytest

from durable import Context, StepFailed, durable_step, workflow
from durable.core.errors import WaitTimeout
from durable.module import DurableModule, DynamicModule, module
from durable.testing.harness import START, InjectedFailure, Test
from durable.testing.virtual import NothingHappens, VirtualTime
from tests.module.shop import Checkout, FakeGateway, Gateway, Order, Payments, PaymentsModule, ShopModule

pytest_plugins = ["durable.testing.pytest_plugin"]

REAL = 5.0
"""Seconds no virtual month may take, however busy the machine."""


@workflow(name="nap")
async def nap(ctx: Context, days: int) -> str:
    await ctx.sleep(f"{days}d")
    return "awake"


@workflow(name="asks")
async def asks(ctx: Context) -> str:
    try:
        answer: str = await ctx.wait_for_signal("answer", type=str, timeout="7d")
    except WaitTimeout:
        return "no answer"
    return answer


@workflow(name="local")
async def local(ctx: Context) -> int:
    return await ctx.step(counted, retries=2)


def counted() -> int:
    return 1


@module(providers=[nap, asks, local])
class NapModule:
    pass


class Root:
    pass


async def test_thirty_days_take_no_time() -> None:
    """A run that sleeps thirty days ends at once, thirty days later."""
    began = time.monotonic()
    async with Test.create(NapModule) as app:
        assert await app.start_and_wait(nap, 30) == "awake"
        assert app.now == START + timedelta(days=30)
    assert time.monotonic() - began < REAL


async def test_time_stands_still_until_told() -> None:
    """While something can go on time does not move; `advance` moves it to the microsecond and lets what is due happen."""
    async with Test.create(NapModule) as app:
        run = await app.start(nap, 30)
        await app.settle()
        assert app.now == START
        assert (await run.get()).activity == "sleeping"
        await app.advance("29d 23h 59m 59s")
        assert (await run.get()).status == "active"
        await app.advance("1s")
        assert (await run.get()).status == "completed"
        assert app.now == START + timedelta(days=30)


async def test_signals_and_timeouts() -> None:
    """A signal sent before its timeout is taken; one that never comes times out in virtual time."""
    async with Test.create(NapModule) as app:
        run = await app.start(asks)
        await app.advance("6d")
        await run.signal("answer", "yes")
        assert await run.result() == "yes"
        assert await app.start_and_wait(asks) == "no answer"
        assert app.now == START + timedelta(days=13)


async def test_overrides() -> None:
    """What is overridden is never made, wherever it is provided: by a value, a class with its own needs, or a factory."""

    class Alarm(Gateway):
        def __init__(self) -> None:
            raise AssertionError("made")

    @module(imports=[PaymentsModule], providers=[Checkout])
    class AppModule:
        pass

    class ByClass(Gateway):
        async def move(self, order: Order) -> str:
            return "class"

    class ByFactory(Gateway):
        async def move(self, order: Order) -> str:
            return "factory"

    order = Order("1", 1)
    for change, word in (
        ({"value": FakeGateway()}, "paid 1"),
        ({"use_class": ByClass}, "class"),
        ({"use_factory": lambda: ByFactory()}, "factory"),
    ):
        async with Test.create(AppModule).override(Gateway, Alarm).override(Gateway, **change) as app:
            assert await app.start_and_wait(Checkout, order) == f"{word}, {word}"


async def test_fail_times_remote() -> None:
    """A remote step told to fail twice is tried three times, and its body runs once."""
    fake = FakeGateway()
    async with Test.create(ShopModule).override(Gateway, fake) as app:
        app.fail_times(Payments.charge, 2)
        assert await app.start_and_wait(Checkout, Order("1", 5)) == "paid 5, paid 5"
        assert app.attempts("payments.charge") == 4
        assert fake.moved == ["1", "1"]


async def test_fail_once_local() -> None:
    """A local step fails once by name or function, with the error given."""
    async with Test.create(NapModule) as app:
        app.fail_once("counted")
        assert await app.start_and_wait(local) == 1
        assert app.attempts(counted) == 2
        app.fail_times(counted, 3, OSError("disk"))
        with pytest.raises(Exception, match="disk"):
            await app.start_and_wait(local)


async def test_fail_for_good() -> None:
    """A step that fails more often than it is tried fails the run; the error is the one that was asked for."""
    async with Test.create(ShopModule).override(Gateway, FakeGateway()) as app:
        app.fail_times(Payments.charge, 4, InjectedFailure)
        run = await app.start(Checkout, Order("1", 5))
        with pytest.raises(Exception, match="failed") as caught:
            await run.result()
        assert not isinstance(caught.value, StepFailed)
        assert app.attempts(Payments.charge) == 4


async def test_what_for_root_says_of_behaviour_holds() -> None:
    """Options that are not about the world outside stay; the test's own win."""
    root = DynamicModule(
        Root, [DurableModule.for_root("sqlite:///never.db", max_recovery_attempts=7, lease="3s", worker=False)]
    )
    async with Test.create(root, cancel_grace=1.5) as app:
        assert app.durable.settings.max_recovery_attempts == 7
        assert app.durable.settings.cancel_grace == 1.5
        assert app.durable.settings.lease > 1e6
        assert app.durable.role == "engine"


async def test_a_factory_of_for_root_async_is_not_called() -> None:
    """A test needs no configuration of the real world."""

    def broken() -> dict[str, Any]:
        raise AssertionError("called")

    async with Test.create(DynamicModule(Root, [DurableModule.for_root_async(use_factory=broken)], [nap])) as app:
        assert await app.start_and_wait(nap, 1) == "awake"


async def test_a_bodys_own_sleep_is_virtual() -> None:
    """`asyncio.sleep` and `asyncio.timeout` in a step body pass in virtual time too."""

    @durable_step("patient")
    async def patient() -> str:
        await asyncio.sleep(3600)
        return "done"

    @workflow(name="waits")
    async def waits(ctx: Context) -> str:
        return await ctx.remote(patient)

    began = time.monotonic()
    async with Test.create(DynamicModule(Root, (), [patient, waits])) as app:
        assert await app.start_and_wait(waits) == "done"
    assert time.monotonic() - began < REAL


@pytest.fixture
def durable_module() -> Any:
    return ShopModule


@pytest.fixture
def durable_overrides() -> dict[Any, Any]:
    return {Gateway: FakeGateway()}


async def test_the_fixture(durable_app: Test) -> None:
    """`durable_app` is the module's app with the overrides, open."""
    assert await durable_app.start_and_wait(Checkout, Order("1", 5)) == "paid 5, paid 5"


# ------------------------------------------------------------------ virtual time itself


async def test_threads_are_waited_for() -> None:
    """While a thread works time passes as it really does, so that no timeout overtakes it."""
    virtual = VirtualTime.enter()
    release = threading.Event()
    try:
        loop = asyncio.get_running_loop()
        before = loop.time()
        loop.call_later(0.1, release.set)
        async with asyncio.timeout(3600):
            await asyncio.to_thread(release.wait)
        assert loop.time() - before < 60
    finally:
        virtual.leave()


async def test_sockets_are_waited_for() -> None:
    """A server of the test's own answers before time jumps."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    virtual = VirtualTime.enter()
    try:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            async with asyncio.timeout(3600):
                host, port = server.sockets[0].getsockname()[:2]
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(b"hello\n")
                assert await reader.readline() == b"hello\n"
                writer.close()
    finally:
        virtual.leave()


async def test_idle_connections_do_not_stop_time() -> None:
    """A connection that says nothing delays a jump for a moment only; a listening socket not at all."""
    virtual = VirtualTime.enter()
    ours, theirs = socket.socketpair()
    try:
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, lambda: None)
        began = time.monotonic()
        await asyncio.sleep(86_400)
        assert time.monotonic() - began < REAL
        loop.remove_reader(ours)
    finally:
        virtual.leave()
        ours.close()
        theirs.close()


async def test_time_is_real_again_and_never_went_back() -> None:
    """After the last app has closed the loop's time runs on from where it was, at its real pace."""
    loop = asyncio.get_running_loop()
    before = loop.time()
    async with Test.create(NapModule) as one, Test.create(NapModule):
        await one.advance("1d")
        inside = loop.time()
        assert inside - before > 86_000
    assert loop.time() >= inside
    began = time.monotonic()
    await asyncio.sleep(0.02)
    assert time.monotonic() - began > 0.015
    async with Test.create(NapModule) as again:
        await again.advance("1d")


def test_waiting_for_ever_is_told() -> None:
    """A test that waits for what never comes ends with a sentence instead of hanging."""

    @workflow(name="forever")
    async def forever(ctx: Context) -> None:
        await ctx.wait_for_signal("never")

    async def main() -> None:
        async with Test.create(DynamicModule(Root, (), [forever])) as app:
            await app.start_and_wait(forever)

    with pytest.raises(NothingHappens, match="200 years have passed"):
        asyncio.run(main())


async def test_the_private_things_virtual_time_relies_on() -> None:
    """asyncio's selector loop has `_selector` with `select` and `get_map`, `_ssock`, `_clock_resolution`, and calls its own
    `time`."""
    loop: Any = asyncio.get_running_loop()
    assert callable(loop._selector.select)
    assert loop._ssock.fileno() in {key.fd for key in loop._selector.get_map().values()}
    assert isinstance(loop._clock_resolution, float)
