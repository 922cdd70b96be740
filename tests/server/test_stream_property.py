"""The law of the stream: whatever is cut, and whenever, a watcher has exactly the frames of the journal's rows."""

from __future__ import annotations

import asyncio
import random
import resource
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from durable import Durable
from durable.client import Client
from durable.client.sse import blocks
from durable.server.settings import ServerSettings
from durable.server.views import frame_of
from tests.client.proxy import Cutter
from tests.server.world import Running, running, workflows

WATCHERS = 1_000


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut is no news here: the client comes back without waiting."""
    monkeypatch.setattr("durable.client.client.FIRST_DELAY", 0.001)


def expected(service: Running, run_id: str) -> list[dict[str, Any]]:
    """The frames of a run's journal, read from the store."""
    store = service.app.engine.deps.store
    rows = service.do(store.page(run_id, 0, 100_000))
    frames = [frame for row in rows if (frame := frame_of(run_id, row)) is not None]
    found: list[dict[str, Any]] = [msgspec.json.decode(msgspec.json.encode(frame)) for frame in frames]
    return found


async def told(client: Client, run_id: str, after: int = 0) -> list[dict[str, Any]]:
    """What a watcher hears, over all its connections."""
    path = f"/runs/{run_id}/stream"
    return [frame async for frame in client.stream(path, dict[str, Any], {"from": after}, ends=True)]


@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 25), watchers=st.integers(1, 4))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_s33_cut_anywhere(service: Running, key: str, seed: int, steps: int, watchers: int) -> None:
    """S33: connections that are cut at random bytes, in order or by a reset, while runs progress: over all of them, each
    watcher has the frames of the journal, none twice, none missing, none out of order, from any cursor."""
    rng = random.Random(seed)

    async def watch() -> None:
        cut = lambda: rng.choice([None, rng.randint(1, 400), rng.randint(400, 3_000), rng.randint(1_000, 8_000)])  # noqa: E731
        async with (
            Client(service.url, key=key) as near,
            Cutter(service.port, cut, lambda: rng.random() < 0.5) as cutter,
            Client(cutter.url, key=key) as far,
        ):
            far_runs = [await near.workflows.trigger("shop", "many", steps) for _ in range(2)]
            cursors = [(run.run_id, rng.choice([0, 0, rng.randint(0, 2 * steps)])) for run in far_runs * watchers]
            heard = await asyncio.gather(*(told(far, run_id, after) for run_id, after in cursors))
        for (run_id, after), frames in zip(cursors, heard, strict=True):
            whole = await asyncio.to_thread(expected, service, run_id)
            assert frames == [frame for frame in whole if frame["seq"] > after]
            assert whole[-1]["status"] == "succeeded"

    asyncio.run(watch())


@settings(max_examples=50, deadline=None)
@given(data=st.lists(st.text(max_size=30), max_size=8), sizes=st.lists(st.integers(1, 9), min_size=1))
def test_events_whatever_the_pieces(data: list[str], sizes: list[int]) -> None:
    """Events are the same however the bytes are split; a half one at the end is none."""
    whole = b": open\n\n" + b"".join(
        b"id: %d\nevent: log\ndata: " % n + msgspec.json.encode(text) + b"\n\n" for n, text in enumerate(data)
    )

    async def read(stream: bytes) -> list[tuple[str | None, Any]]:
        async def pieces() -> Any:
            at = turn = 0
            while at < len(stream):
                size = sizes[turn % len(sizes)]
                yield stream[at : at + size]
                at, turn = at + size, turn + 1

        return [(one.id, msgspec.json.decode(one.data)) async for one in blocks(pieces()) if one.data]

    told = [(str(n), text) for n, text in enumerate(data)]
    assert asyncio.run(read(whole)) == told
    assert asyncio.run(read(whole[:-1])) == told[:-1]


@pytest.mark.parametrize("hints", [True, False])
def test_r7_a_watcher_beside_the_one_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hints: bool) -> None:
    """R7: a node that executes nothing, on the same store, tells everything of a run another engine executes, through cuts,
    with notifications and with every one of them lost: polling fills in."""
    url = f"sqlite:///{tmp_path}/two.db"

    looks = Durable(url, worker=False, poll_every=0.1)
    works = Durable(url)
    workflows(works)

    async def watch() -> None:
        async with works:
            with Running(looks, ServerSettings(host="127.0.0.1", port=0)) as service:
                timeline = service.app.engine._timeline
                if not hints:
                    monkeypatch.setattr(timeline, "hint", lambda: None)
                    monkeypatch.setattr(timeline, "news", lambda run_id, ended: None)
                handle = await works.engine.start_run("many", 15)
                rng = random.Random(7)
                async with (
                    Cutter(service.port, lambda: rng.randint(300, 2_500)) as cutter,
                    Client(cutter.url) as client,
                ):
                    heard = await told(client, handle.id)
                assert heard == await asyncio.to_thread(expected, service, handle.id)
                assert heard[-1]["status"] == "succeeded"
                assert cutter.cuts > 1

    asyncio.run(watch())


def test_a_thousand_watchers() -> None:
    """A thousand connections to one process watch a run; each has every frame, in order."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * WATCHERS + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"only {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        with running(max_streams=2 * WATCHERS, max_connections=3 * WATCHERS, rate=1e6, burst=1e6) as service:
            key = service.make_app("shop")
            with service.client(key) as client:
                run_id = client.post("/workflows/shop/waits/trigger", json={}).raise_for_status().json()["runId"]
            heard = asyncio.run(_crowd(service, key, run_id))
            whole = expected(service, run_id)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    seqs = [frame["seq"] for frame in whole]
    assert whole[-1]["status"] == "succeeded"
    assert len(heard) == WATCHERS
    assert all(one == seqs for one in heard)


async def _crowd(service: Running, key: str, run_id: str) -> list[list[int]]:
    """By plain sockets, so that what is measured is the service. The run goes on when all have heard its beginning."""
    open_ = 0
    all_open = asyncio.Event()

    async def one() -> list[int]:
        nonlocal open_
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(f"GET /runs/{run_id}/stream HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n".encode())
        seqs: list[int] = []
        async for line in reader:
            if line.startswith(b"id: "):
                seqs.append(int(line[4:]))
                if len(seqs) == 1:
                    open_ += 1
                    if open_ == WATCHERS:
                        all_open.set()
            elif line == b": ended\n":
                break
        writer.close()
        return seqs

    async def go_on() -> None:
        await all_open.wait()
        async with Client(service.url, key=key) as client:
            await client.runs.signal(run_id, "go", 1)

    async with asyncio.timeout(60):
        *heard, _ = await asyncio.gather(*(one() for _ in range(WATCHERS)), go_on())
    return heard  # type: ignore[return-value]
