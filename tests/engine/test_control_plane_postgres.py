"""Engines that reach each other through Postgres alone: stores give no hints here, and polls are half a minute apart."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from durable import Context, Durable, RunCancelled, workflow
from durable.control_plane.interface import LOOK_EVERYWHERE
from durable.control_plane.local import LocalControlPlane
from durable.control_plane.postgres import PostgresControlPlane
from durable.core.errors import DefinitionError, StoreUnavailable
from durable.core.journal import Entry
from durable.store.postgres import PostgresStore
from durable.testing.facts import PATIENCE, PAUSE, eventually
from durable.testing.suites.control_plane import Heard, cancel
from durable.transports.event_emitter import EventEmitterTransport
from tests.engine.far_node import far
from tests.engine.test_control_plane import FAR, signalled
from tests.engine.world import Gate, Line, World
from tests.store.backends import CHANNELS, Backends


@pytest.fixture(autouse=True)
def _deaf_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Line, "listen", lambda self, on_hint: lambda: None)


async def pods(world: World, url: str, *things: Any) -> tuple[Durable, Durable]:
    """(one that executes, one that runs nothing), as two processes are: each has connections of its own."""
    works = await world.engine(*things, control_plane=url, poll_every=FAR)
    looks = await world.engine(*things, control_plane=url, poll_every=FAR, worker=False)
    return works, looks


def working(gate: Gate) -> Any:
    @workflow(name="working")
    async def working(ctx: Context) -> Any:
        return await ctx.step("work", gate)

    return working


async def test_N10_a_pod_that_runs_nothing_tails_and_signals(world: World, postgres_url: str) -> None:
    """It starts a run, sees every entry in order as it is committed elsewhere, and its signals arrive at once."""
    _, looks = await pods(world, postgres_url, signalled)
    handle = await looks.start(signalled)
    seen: list[tuple[int, str]] = []

    async def tail() -> None:
        async for entry in looks.watch(handle.id):
            seen.append((entry.seq, entry.status))

    tailing = asyncio.create_task(tail())
    for count in (1, 2):
        await handle.signal("go", count)
        await eventually(lambda count=count: [s for _, s in seen].count("received") == count, "it sees each signal")
    async with asyncio.timeout(10):
        assert await handle.result() == [1, 2]
        await tailing
    assert [seq for seq, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][1] == "completed"


async def test_N10_a_cancel_from_a_pod_that_runs_nothing_reaches_the_step_body(world: World, postgres_url: str) -> None:
    """Through the database, within moments: the body sees it once, and whoever waits elsewhere hears of the end."""
    gate = Gate()
    work = working(gate)
    works, looks = await pods(world, postgres_url, work)
    handle = await works.start(work)
    await gate.reached()
    waiting = asyncio.create_task(looks.run(handle.id).result(10))
    assert await looks.run(handle.id).cancel("enough") is True
    with pytest.raises(RunCancelled):
        await waiting
    assert gate.cancelled == 1
    assert (await world.record(handle.id)).status == "cancelled"


async def test_N10_a_cancel_arrives_though_the_connections_are_being_killed(world: World, postgres_url: str) -> None:
    """Connections of all control planes die over and over: no cancel waits for the poll, since a gap makes all look."""
    gate = Gate()
    work = working(gate)
    works, looks = await pods(world, postgres_url, work)
    async with Backends(postgres_url) as others:
        for count in range(1, 6):
            handle = await works.start(work)
            await gate.reached(count)
            await others.terminate()
            await looks.run(handle.id).cancel()
            with pytest.raises(RunCancelled):
                await works.run(handle.id).result(10)
            assert gate.cancelled == count
            await eventually(lambda: plane(works).deaf is None and plane(looks).deaf is None, "both hear again")


async def test_N10_a_gap_makes_an_engine_look_at_once(world: World, postgres_url: str) -> None:
    """A control plane that may have missed something is as good as a hint of the store: work is looked for, tails are fed."""
    works, _ = await pods(world, postgres_url, signalled)
    scheduler = works.engine._scheduler
    await eventually(lambda: not scheduler._wake.is_set(), "it sleeps")
    works.engine._control(LOOK_EVERYWHERE)
    assert scheduler._wake.is_set()


async def test_N9_a_store_on_postgres_brings_the_control_plane(postgres_url: str) -> None:
    """By default, over what stays in the process; what is given wins; the store's `notifications` turn it off."""
    emitter, given = EventEmitterTransport(), LocalControlPlane()
    async with Durable(postgres_url) as app:
        assert isinstance(app.engine.deps.control_plane, PostgresControlPlane)
    async with Durable(PostgresStore(postgres_url), transport=emitter) as app:
        assert isinstance(app.engine.deps.control_plane, PostgresControlPlane)
    async with Durable(postgres_url, control_plane=given) as app:
        assert app.engine.deps.control_plane is given
    async with Durable(PostgresStore(postgres_url, notifications=False), transport=emitter) as app:
        assert app.engine.deps.control_plane is emitter
    async with Backends(postgres_url) as others:
        await others.none()


async def test_N9_schemas_have_control_planes_of_their_own(postgres_url: str) -> None:
    """Two deployments in one database do not wake each other; a URL given means the default schema's."""
    async with (
        Durable(postgres_url) as app,
        Durable(PostgresStore(postgres_url, schema="other")) as other,
        Durable("memory://", control_plane=postgres_url) as by_url,
    ):
        heard, elsewhere, there = Heard(), Heard(), Heard()
        for each, ear in ((app, heard), (other, elsewhere), (by_url, there)):
            await eventually(lambda each=each: plane(each).deaf is None, "it hears")
            plane(each).on_control("ear", ear)
        for each, word in ((other, "theirs"), (app, "ours"), (other, "fence")):
            await plane(each).publish_control(cancel("x", word))
        await eventually(lambda: there.runs() == heard.runs() == ["ours"], "ours is heard by ours")
        await eventually(lambda: elsewhere.runs() == ["theirs", "fence"], "theirs by theirs")


async def test_N9_closed_apps_leave_no_connection(world: World, postgres_url: str) -> None:
    """A control plane made from a URL lives and ends with its app; also with one that could not start."""
    works, looks = await pods(world, postgres_url, signalled)
    async with Backends(postgres_url) as others:
        for app in (works, looks):
            world.apps.remove(app)
            await app.close()
        await others.none()


async def test_N9_an_engine_that_cannot_start_leaves_no_connection(
    world: World, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened before the failure is closed."""

    def broken(self: Line, on_hint: Any) -> Any:
        raise OSError("no hints today")

    monkeypatch.setattr(Line, "listen", broken)
    with pytest.raises(OSError, match="no hints"):
        await world.engine(signalled, control_plane=postgres_url)
    async with Backends(postgres_url) as others:
        await others.none()


async def test_N9_a_url_that_is_no_control_plane_is_refused(world: World) -> None:
    """Before anything is opened, with what to give instead."""
    with pytest.raises(DefinitionError, match="postgresql://"):
        await world.engine(signalled, control_plane="smoke://somewhere")


def plane(app: Durable) -> Any:
    assert not isinstance(app.engine.deps.control_plane, LocalControlPlane)
    return app.engine.deps.control_plane


# -- everything on Postgres


@pytest.mark.parametrize("killing", [False, True], ids=["calm", "killed"])
async def test_N10_a_pod_without_work_tails_and_cancels_what_another_process_executes(
    postgres_url: str, killing: bool
) -> None:
    """Two processes, one database, nothing else: the tail is whole, the body sees the cancel long before any poll; also
    while all that either process listens and speaks on is killed."""
    async with Durable(postgres_url, workflows=[far], poll_every=FAR, worker=False) as looks:
        async with far_node(postgres_url) as hears, Backends(postgres_url) as others:
            await hears("ready")
            handle = await looks.start(far)
            tail = asyncio.create_task(all_of(looks, handle.id))
            await hears("began")
            if killing:
                assert await others.terminate(CHANNELS)
            asked = asyncio.get_running_loop().time()
            await patiently(lambda: looks.run(handle.id).cancel())
            await hears("cancelled")
            with pytest.raises(RunCancelled):
                await patiently(lambda: looks.run(handle.id).result(10))
            seen = await tail
            assert asyncio.get_running_loop().time() - asked < FAR / 3
            assert [entry.seq for entry in seen] == list(range(1, len(seen) + 1))
            assert seen[-1].status == "cancelled"


async def patiently(ask: Callable[[], Awaitable[object]]) -> None:
    """Ask again where the database went away under the question: it may be repeated."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await ask()
                return
            except StoreUnavailable:
                await asyncio.sleep(PAUSE)


async def all_of(app: Durable, run_id: str) -> list[Entry]:
    """The whole journal; a tail that the database was taken from goes on where it was."""
    seen: list[Entry] = []

    async def tail() -> None:
        async for entry in app.watch(run_id, seen[-1].seq if seen else 0):
            seen.append(entry)

    await patiently(tail)
    return seen


@asynccontextmanager
async def far_node(url: str, *more: str) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """A process that executes; gives what waits until it has said a word."""
    pipe = asyncio.subprocess.PIPE
    node = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.engine.far_node", url, *more, stdin=pipe, stdout=pipe
    )
    assert node.stdin is not None
    out = node.stdout
    assert out is not None

    async def hears(word: str) -> None:
        async with asyncio.timeout(PATIENCE):
            line = (await out.readline()).decode().strip()
        assert line == word, f"the other process said {line!r}"

    try:
        yield hears
    finally:
        node.stdin.close()
        try:
            async with asyncio.timeout(PATIENCE):
                await node.wait()
        except TimeoutError:
            node.kill()
            await node.wait()
