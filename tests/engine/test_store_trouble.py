"""The store in trouble: what was committed is known, what was not is tried again, and the engine says what is wrong."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from durable import Context, Durable, workflow
from durable.core.errors import StoreError, StoreFull, StoreReadOnly, StoreTooNew, StoreUnavailable
from durable.core.journal import Entry
from durable.opening import open_store
from durable.store.records import Commit, CommitStatus, NewRun
from tests.engine.world import Gate, World, all_results, eventually


@workflow(name="steps")
async def steps(ctx: Context, count: int) -> int:
    total = 0
    for _ in range(count):
        total += await ctx.step("add", asyncio.sleep, 0, 1)
    return total


def once(*names: str, error: type[StoreError] = StoreUnavailable, times: int = 1) -> Any:
    """A fault that strikes the first so many calls of these names."""
    left = dict.fromkeys(names, times)

    def strike(name: str, args: Any) -> StoreError | None:
        if left.get(name, 0) > 0:
            left[name] -= 1
            return error("injected")
        return None

    strike.left = left  # type: ignore[attr-defined]
    return strike


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_S39_an_ambiguous_commit_is_resolved_and_never_doubled(world: World, after: bool) -> None:
    """The connection breaks before or after the commit took effect, at every one of them in turn: each entry is there once."""
    for nth in range(5):
        app = await world.engine(steps)
        seen = 0

        def strike(name: str, args: Any, nth: int = nth) -> StoreError | None:
            nonlocal seen
            if name != "commit":
                return None
            seen += 1
            return StoreUnavailable("lost connection") if seen - 1 == nth else None

        if after:
            world.line(app).fault_after = strike
        else:
            world.line(app).fault = strike
        handle = await app.start(steps, 3)
        assert await handle.result(5) == 3
        await world.sound(handle.id)
        assert seen > nth or nth > 2
        assert app.engine.trouble is None


async def test_S39_every_call_may_lose_its_answer(world: World) -> None:
    """Start, send, claim, load, inbox, release: the same call again does no harm."""

    @workflow(name="all")
    async def all_of_it(ctx: Context) -> Any:
        first = await ctx.wait_for_signal("go")
        await ctx.step("x", lambda: None)
        child = await ctx.child(steps, 2)
        return [first, child]

    names = ("start", "send", "claim", "load", "inbox", "commit", "unread", "owned", "release")
    for field in ("fault", "fault_after"):
        app = await world.engine(all_of_it, steps, beat_every=0.02, poll_every=0.02)
        setattr(world.line(app), field, once(*names, times=2))
        handle = await app.start(all_of_it)
        await handle.signal("go", 1)
        assert await handle.result(10) == [1, 2]
        await world.sound(handle.id)
        await app.close()


@pytest.mark.parametrize("error", [StoreFull, StoreReadOnly, StoreUnavailable])
async def test_a_store_that_takes_nothing_is_reported_and_outlived(
    world: World, error: type[StoreError], caplog: pytest.LogCaptureFixture
) -> None:
    """Full, read-only, out of reach: `trouble` says so, starts wait, nothing is lost, and it all goes on by itself."""
    caplog.set_level(logging.CRITICAL)
    app = await world.engine(steps)
    gate = Gate()

    @workflow(name="gated")
    async def gated(ctx: Context) -> int:
        number: int = await ctx.step("body", gate)
        return number

    app.register(gated)
    handle = await app.start(gated)
    await gate.reached()
    broken = True
    world.line(app).fault = lambda name, args: error("no") if broken and name in ("commit", "start", "send") else None
    gate.open()
    await eventually(lambda: isinstance(app.engine.trouble, error), "the trouble is reported")
    starting = asyncio.ensure_future(app.start(steps, 2))
    await asyncio.sleep(0.05)
    assert not starting.done()
    broken = False
    assert await handle.result(5) == 1
    assert await (await starting).result(5) == 2
    await eventually(lambda: app.engine.trouble is None, "the trouble is over")
    assert gate.came == 1
    await world.sound(handle.id)


async def test_a_commit_the_store_refuses_fails_its_run_alone(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """One commit that can never be stored: its run fails with the typed error, its batch-mates are unharmed."""
    caplog.set_level(logging.CRITICAL)
    from durable import RunFailed
    from durable.core.errors import PayloadTooLarge
    from durable.store.records import CommitOutcome

    app = await world.engine(steps)
    handles = [await app.start(steps, 3) for _ in range(5)]
    bad = handles[2].id
    original = app.engine._executor.commits._call
    struck: list[int] = []

    async def commit(batch: Any) -> Any:
        good = [one for one in batch if one.run_id != bad or struck]
        answers = dict(zip([one.run_id for one in good], await original(good), strict=True)) if good else {}
        if len(good) < len(batch):
            struck.append(1)
            answers[bad] = CommitOutcome(CommitStatus.FENCED, failure=PayloadTooLarge("too large for this column"))
        return [answers[one.run_id] for one in batch]

    app.engine._executor.commits._call = commit
    results = await asyncio.gather(*(handle.result(5) for handle in handles), return_exceptions=True)
    assert isinstance(results[2], RunFailed)
    assert results[2].error is not None
    assert results[2].error.code == "payload_too_large"
    assert [result for n, result in enumerate(results) if n != 2] == [3] * 4
    await world.sound(*(handle.id for handle in handles))


async def test_S42_a_store_says_how_durable_it_is(world: World) -> None:
    """Each store declares it in one sentence and a flag that people and the engine can read."""
    store = await world.store()
    assert store.capabilities.durable is (world.kind == "sqlite")
    assert store.capabilities.durability.endswith(".")


# SQLite itself, without the residency matrix.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "durable.db"


async def test_S42_weak_durability_must_be_asked_for(file: Path) -> None:
    """`synchronous=off` may lose the last commits: refused unless allowed, with a sentence that says how."""
    from durable.core.errors import WeakDurability

    with pytest.raises(WeakDurability, match="synchronous"):
        async with Durable(f"sqlite:///{file}?synchronous=off"):
            raise AssertionError("not reached")


async def test_a_full_disk_stops_nothing_for_good(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite reports full: the engine says `trouble`, keeps everything, and goes on when there is room again."""
    caplog.set_level(logging.CRITICAL)

    @workflow(name="grows")
    async def grows(ctx: Context, size: int) -> int:
        total = 0
        for n in range(6):
            total += len(await ctx.step(f"s{n}", lambda: asyncio.sleep(0.001, "x" * size)))
        return total

    async with Durable(f"sqlite:///{file}", workflows=[grows]) as app:
        first = await app.start_and_wait(grows, 10, timeout=5)
        assert first == 60
        store: Any = app.engine.deps.store
        await _limit_pages(store, full=True)
        handle = asyncio.ensure_future(app.start_and_wait(grows, 200_000, timeout=20))
        await eventually(lambda: isinstance(app.engine.trouble, StoreFull), "the trouble is reported")
        await _limit_pages(store, full=False)
        assert await handle == 1_200_000
        await eventually(lambda: app.engine.trouble is None)


async def _limit_pages(store: Any, *, full: bool) -> None:
    """As if the disk had no room: the writing connection may not grow the file."""

    def limit(cx: sqlite3.Connection) -> None:
        pages = cx.execute("PRAGMA page_count").fetchone()[0]
        cx.execute(f"PRAGMA max_page_count = {pages + 20 if full else 1_000_000_000}")

    await _on_writer(store, limit)


async def _on_writer(store: Any, operation: Any) -> None:
    for name in ("_writer", "_write", "_lane", "_runner"):
        runner = getattr(store, name, None)
        if runner is not None and hasattr(runner, "call"):
            await runner.call(operation)
            return
    raise AssertionError(f"no writer in {vars(store)}")


async def test_a_read_only_file_is_refused_at_the_start_with_a_sentence(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that cannot be written is no database to start on: StoreReadOnly or another StoreError that says so."""
    async with Durable(f"sqlite:///{file}", workflows=[steps]) as app:
        await app.start_and_wait(steps, 1, timeout=5)
    connect = sqlite3.connect

    def read_only(database: Any, *args: Any, **options: Any) -> Any:
        uri = str(database).split("?")[0].removeprefix("file:")
        return connect(f"file:{uri}?mode=ro", *args, **{**options, "uri": True})

    monkeypatch.setattr(sqlite3, "connect", read_only)
    with pytest.raises(StoreError) as caught:
        async with Durable(f"sqlite:///{file}", workflows=[steps]):
            raise AssertionError("not reached")
    assert "read" in str(caught.value).lower() or "writ" in str(caught.value).lower()


async def test_S37_a_store_of_a_newer_version_is_refused_loudly(file: Path) -> None:
    """An older engine does not touch what a newer one has written: StoreTooNew, with what to do."""
    async with Durable(f"sqlite:///{file}", workflows=[steps]) as app:
        await app.start_and_wait(steps, 1, timeout=5)
    cx = sqlite3.connect(file)
    _newer(cx)
    cx.commit()
    cx.close()
    with pytest.raises(StoreTooNew, match=r"(?i)newer|upgrade"):
        async with Durable(f"sqlite:///{file}", workflows=[steps]):
            raise AssertionError("not reached")


def _newer(cx: sqlite3.Connection) -> None:
    """Pretend that a later release has migrated it."""
    changed = cx.execute("UPDATE meta SET value = value + 1000 WHERE name IN ('schema_version', 'min_engine_version')")
    assert changed.rowcount == 2


async def test_S40_a_restored_copy_is_noticed(file: Path, tmp_path: Path) -> None:
    """A backup put back under running work is refused until somebody says it is meant."""
    from durable.core.errors import StoreRestored

    async with Durable(f"sqlite:///{file}", workflows=[steps]) as app:
        await app.start_and_wait(steps, 1, timeout=5)
    backup = file.read_bytes()  # noqa: ASYNC240
    async with Durable(f"sqlite:///{file}", workflows=[steps]) as app:
        await app.start_and_wait(steps, 1, timeout=5)
    for beside in file.parent.glob(file.name + "-*"):
        beside.unlink()
    file.write_bytes(backup)  # noqa: ASYNC240
    with pytest.raises(StoreRestored, match=r"(?i)restored|backup|older"):
        async with Durable(f"sqlite:///{file}", workflows=[steps]):
            raise AssertionError("not reached")


async def test_S5_commit_with_is_one_transaction_with_the_authors_sql(file: Path) -> None:
    """The author's rows and the journal's come together or not at all: fenced, raised and done."""
    store = open_store(f"sqlite:///{file}")
    if not store.capabilities.commit_with:
        pytest.skip("this store cannot share a transaction")
    await store.open()
    try:
        store.beat("me", 60_000_000)
        await store.start([NewRun("r", "w", "1", b"null", owner="me", entries=(Entry(1, 1, "run", "started"),))])

        async def create(cx: Any) -> None:
            cx.execute("CREATE TABLE ledger (n INTEGER)")

        def commit(seq: int, epoch: int = 1) -> Commit:
            return Commit("r", epoch, seq, f"c{seq}-{epoch}", [Entry(seq + 1, 2, "step", "completed", f"s{seq}")])

        assert (await store.commit_with(create, commit(1))).status is CommitStatus.DONE

        async def write(cx: Any) -> None:
            cx.execute("INSERT INTO ledger VALUES (1)")

        async def write_and_fail(cx: Any) -> None:
            cx.execute("INSERT INTO ledger VALUES (2)")
            raise ValueError("the author's own")

        assert (await store.commit_with(write, commit(2))).status is CommitStatus.DONE
        assert (await store.commit_with(write, commit(2))).status is CommitStatus.DONE, (
            "its reply was lost; it is not done twice"
        )
        assert (await store.commit_with(write, commit(3, epoch=9))).status is CommitStatus.FENCED
        with pytest.raises(ValueError, match="own"):
            await store.commit_with(write_and_fail, commit(3))
        assert [entry.seq for entry in await store.page("r", 0, 10)] == [1, 2, 3]
    finally:
        await store.close()
    cx = sqlite3.connect(file)
    assert cx.execute("SELECT n FROM ledger").fetchall() == [(1,)]
    cx.close()


async def test_many_runs_with_a_flaky_store_all_complete_once(world: World) -> None:
    """One call in five fails, before or after it took effect: sixty runs complete, each journal sound."""
    from random import Random

    draw = Random(7)
    app = await world.engine(steps, poll_every=0.05, beat_every=0.1, max_running=50)

    def flaky(name: str, args: Any) -> StoreError | None:
        return StoreUnavailable("flaky") if name != "beat" and draw.random() < 0.1 else None

    world.line(app).fault = flaky
    world.line(app).fault_after = flaky
    logging.getLogger("durable").setLevel(logging.CRITICAL)
    try:
        handles = await asyncio.gather(*(app.start(steps, 2) for _ in range(200)))
        store, records = await world.store(), []
        while not records or any(record.status == "active" for record in records):
            await asyncio.sleep(0.05)
            records = await store.get([handle.id for handle in handles])
        assert {record.output for record in records} == {b"2"}
    finally:
        logging.getLogger("durable").setLevel(logging.NOTSET)
        world.line(app).fault = world.line(app).fault_after = None
    await world.sound(*(handle.id for handle in handles))
    assert (await all_results(handles[:3])) == [2, 2, 2]
