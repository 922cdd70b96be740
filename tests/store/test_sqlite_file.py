"""What is special about a file: who may open it, what it promises, and how it breaks."""
# ruff: noqa: ASYNC221, ASYNC240

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from durable.core.errors import (
    PayloadText,
    StoreError,
    StoreFull,
    StoreReadOnly,
    StoreRestored,
    StoreTooNew,
    StoreUnavailable,
    WeakDurability,
)
from durable.protocol.states import Status
from durable.protocol.version import SCHEMA_VERSION
from durable.store.records import CommitStatus, RunQuery, StartRun
from durable.store.sqlite import SqliteStore, connection, schema
from durable.testing.suites.store.builder import LEASE, begin, claimed_ids, commit, done, entry, new, read


@asynccontextmanager
async def opened(path: Path | str, **options: Any) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path, **options)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


def change(path: Path, statement: str) -> None:
    cx = sqlite3.connect(path)
    cx.execute(statement)
    cx.commit()
    cx.close()


# ------------------------------------------------------------------ opening


async def test_S42_the_promises_are_kept(path: Path) -> None:
    """Each connection that writes has the write-ahead log and synchronous=FULL, and the capabilities say so."""
    async with opened(path) as store:
        for cx in (store._connect(), store._connect(1.0)):
            assert cx.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert cx.execute("PRAGMA synchronous").fetchone() == (2,)
            cx.close()
        assert store.capabilities.durable
        assert "synced at every commit" in store.capabilities.durability


async def test_S42_weak_durability_is_refused_unless_allowed(path: Path) -> None:
    """Less than promised is refused with the remedy: asked for in the URL, or forced by the file system."""
    for url in (f"sqlite:///{path}?synchronous=normal", f"sqlite:///{path}2?vfs=unix-dotfile"):
        with pytest.raises(WeakDurability, match="allow_weak_durability"):
            await SqliteStore(url).open()
    async with opened(f"sqlite:///{path}?synchronous=normal", allow_weak_durability=True) as store:
        assert not store.capabilities.durable
        await begin(store, new())


async def test_urls_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes are relative, four absolute, odd names are names, and a missing directory is made."""
    monkeypatch.chdir(tmp_path)
    for given, expected in (
        ("sqlite:///one.db", "one.db"),
        (f"sqlite:///{tmp_path}/two.db", "two.db"),
        ("new/three.db", "new/three.db"),
        (tmp_path / "f?o#u%r.db", "f?o#u%r.db"),
    ):
        async with opened(given) as store:
            await begin(store, new())
        assert (tmp_path / expected).exists()


async def test_memory_is_inline_only() -> None:
    """`:memory:` lives in one connection; it says so, works inline, and claims no durability."""
    with pytest.raises(StoreError, match="inline"):
        SqliteStore(":memory:")
    async with opened(":memory:", inline=True) as store:
        await begin(store, new())
        assert store.beat("a", LEASE).alive
        assert not store.capabilities.durable


async def test_a_closed_store_says_so(path: Path) -> None:
    """Calls before open and after close raise a sentence."""
    store = SqliteStore(path)
    with pytest.raises(StoreError, match="not open"):
        await store.start([new()])
    await store.open()
    await store.close()
    with pytest.raises(StoreError, match="open"):
        await store.get(["r"])
    with pytest.raises(StoreError):
        store.beat("a", LEASE)
    await store.open()
    await begin(store, new())
    await store.close()


async def test_S37_a_newer_schema_is_refused(path: Path) -> None:
    """A file of a newer program, or one that asks for newer engines, is refused with what to do."""
    async with opened(path):
        pass
    for name in ("schema_version", "min_engine_version"):
        change(path, f"UPDATE meta SET value = value + 97 WHERE name = '{name}'")
        with pytest.raises(StoreTooNew, match="upgrade durable"):
            await SqliteStore(path).open()
        change(path, f"UPDATE meta SET value = value - 97 WHERE name = '{name}'")
    async with opened(path):
        pass


def indexes(path: Path) -> dict[str, str]:
    cx = sqlite3.connect(path)
    found = dict(cx.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL").fetchall())
    cx.close()
    return found


async def test_S37_an_older_file_is_migrated_in_place(path: Path, tmp_path: Path) -> None:
    """A file of version 1, with a run in it, has the tables of today once it is opened, by several at once too; an
    engine that had it open goes on."""
    cx = sqlite3.connect(path)
    cx.executescript((Path(__file__).parent / "sqlite_version_1.sql").read_text())
    cx.close()
    older = sqlite3.connect(path)
    due = "SELECT id FROM runs WHERE workflow = 'checkout' AND version = '1' AND owner IS NULL"
    assert older.execute(due).fetchall() == [("r",)]
    async with opened(path) as store, opened(path), opened(path):
        assert older.execute(due).fetchall() == [("r",)]
        older.close()
        assert store.beat("a", LEASE).alive
        assert await claimed_ids(store) == ["r"]
    async with opened(tmp_path / "fresh.db"):
        pass
    assert indexes(path) == indexes(tmp_path / "fresh.db")
    cx = sqlite3.connect(path)
    meta = dict(cx.execute("SELECT name, value FROM meta").fetchall())
    cx.close()
    assert (meta["schema_version"], meta["min_engine_version"]) == (str(SCHEMA_VERSION), "1")


async def test_S37_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All or none: after an error half way the file is of its old version still, and opens when the error is gone."""
    cx = sqlite3.connect(path)
    cx.executescript((Path(__file__).parent / "sqlite_version_1.sql").read_text())
    cx.close()
    before = indexes(path)
    with monkeypatch.context() as broken:
        broken.setattr(schema, "_MIGRATIONS", ((2, ("DROP INDEX runs_due", "CREATE INDEX broken ON nothing (x)")),))
        with pytest.raises(StoreError, match="nothing"):
            await SqliteStore(path).open()
    assert indexes(path) == before
    async with opened(path):
        pass


def test_migrations_lead_to_the_version_of_this_program() -> None:
    """The table is in order, without a gap, up to SCHEMA_VERSION."""
    assert [version for version, _ in schema._MIGRATIONS] == list(range(2, SCHEMA_VERSION + 1))


async def test_S40_a_restored_copy_is_noticed(path: Path) -> None:
    """A database older than one seen here refuses to open until somebody says that it was meant."""
    async with opened(path) as store:
        await begin(store, new("before"))
    backup = path.read_bytes()
    for n in range(3):
        async with opened(path) as store:
            await begin(store, new(f"after{n}"))
    path.write_bytes(backup)
    for leftover in ("-wal", "-shm"):
        Path(f"{path}{leftover}").unlink(missing_ok=True)
    with pytest.raises(StoreRestored, match="accept_restore"):
        await SqliteStore(path).open()
    async with opened(path, accept_restore=True) as store:
        assert [run.id for run in (await store.find(RunQuery())).runs] == ["before"]
    async with opened(path):
        pass


async def test_S40_a_deleted_file_is_a_new_beginning(path: Path) -> None:
    """Removing the database to start afresh is no restore, and what is restored later is still noticed."""
    for _ in range(3):
        async with opened(path):
            pass
    path.unlink()
    async with opened(path), opened(path):
        pass
    backup = path.read_bytes()
    async with opened(path):
        pass
    path.write_bytes(backup)
    with pytest.raises(StoreRestored):
        await SqliteStore(path).open()


async def test_eight_processes_may_create_at_once(path: Path) -> None:
    """Opening a new file concurrently makes one set of tables and raises nothing."""
    stores = [SqliteStore(path) for _ in range(8)]
    await asyncio.gather(*(store.open() for store in stores))
    await asyncio.gather(*(store.start([new(f"r{n}")]) for n, store in enumerate(stores)))
    assert len((await stores[0].find(RunQuery())).runs) == 8
    await asyncio.gather(*(store.close() for store in stores))


# ------------------------------------------------------------------ broken files


async def test_not_a_database(path: Path) -> None:
    """Another kind of file is left alone, with a sentence."""
    path.write_bytes(b"this is a letter to my aunt\n" * 200)
    with pytest.raises(StoreError, match="not an SQLite database"):
        await SqliteStore(path).open()
    assert path.read_bytes().startswith(b"this is a letter")


async def test_somebody_elses_database(path: Path) -> None:
    """A database with other tables gets ours beside them, and keeps its own."""
    change(path, "CREATE TABLE theirs (a)")
    async with opened(path) as store:
        await begin(store, new())
    change(path, "INSERT INTO theirs VALUES (1)")


async def test_a_damaged_file_is_reported(path: Path) -> None:
    """Pages full of rubbish give a typed error, not a hang and not a wrong answer."""
    async with opened(path) as store:
        await begin(store, *(new(f"r{n}", input=b"x" * 500) for n in range(300)))
    damaged = bytearray(path.read_bytes())
    damaged[4096 * 5 :] = os.urandom(len(damaged) - 4096 * 5)
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"damaged|SQLite"):
        async with opened(path) as store:
            await store.find(RunQuery(limit=1000))


async def test_S42_a_read_only_file_is_refused(path: Path) -> None:
    """Opened for reading only: StoreReadOnly, and nothing is changed."""
    async with opened(path):
        pass
    before = path.read_bytes()
    with pytest.raises(StoreReadOnly, match="cannot be written"):
        await SqliteStore(f"sqlite:///{path}?mode=ro").open()
    assert path.read_bytes() == before


async def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """A path in a place that does not exist, or is a file, is refused with a sentence."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="directory"):
        await SqliteStore(tmp_path / "file" / "runs.db").open()
    with pytest.raises(StoreError, match="directory"):
        await SqliteStore(tmp_path).open()


async def test_too_long_locked_is_unavailable(path: Path) -> None:
    """Another process that never lets go makes calls fail in bounded time; they may be repeated, and then work."""
    async with opened(path, busy_timeout_s=0.1) as store:
        await begin(store, new(owner="a"))
        hog = sqlite3.connect(path, isolation_level=None)
        hog.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.commit([commit("r")])
        assert (await read(store)).seq == 0
        hog.execute("ROLLBACK")
        hog.close()
        await done(store, commit("r"))


# ------------------------------------------------------------------ a full disk


async def test_a_full_disk_loses_nothing_and_heals(path: Path) -> None:
    """Every write raises StoreFull and leaves nothing behind; reads go on; with room again, the same calls succeed."""
    async with opened(path) as store:
        await begin(store, *(new(f"r{n}", owner="a") for n in range(5)))
        limit = await store._writer.call(lambda cx: cx.execute("PRAGMA page_count").fetchone()[0] + 3)
        await store._writer.call(lambda cx: cx.execute(f"PRAGMA max_page_count = {limit}").fetchall())
        big = [commit(f"r{n}") for n in range(5)]
        for one in big:
            one.entries = [entry(1, b"x" * 50_000)]
        with pytest.raises(StoreFull, match="nothing was written"):
            await store.commit(big)
        with pytest.raises(StoreFull):
            await store.start([new("late", input=b"x" * 50_000)])
        at_once = await asyncio.gather(
            store.commit(big), *(store.start([new(f"s{n}")]) for n in range(3)), return_exceptions=True
        )
        assert isinstance(at_once[0], StoreFull)
        assert at_once[1:] == [[outcome] for [outcome] in at_once[1:] if outcome.status == "started"]
        assert [run.seq for run in await store.get([f"r{n}" for n in range(5)]) if run] == [0] * 5
        await store._writer.call(lambda cx: cx.execute("PRAGMA max_page_count = 1073741823").fetchall())
        assert {outcome.status for outcome in await store.commit(big)} == {CommitStatus.DONE}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk takes root")
async def test_a_really_full_disk(tmp_path: Path) -> None:
    """The same on a file system of two megabytes."""
    mount = tmp_path / "disk"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        async with opened(mount / "runs.db") as store:
            await begin(store, new(owner="a"))
            seq = 0
            with pytest.raises(StoreFull):  # noqa: PT012
                while True:
                    one = commit("r", seq=seq)
                    one.entries = [entry(seq + 1, os.urandom(50_000))]
                    await store.commit([one])
                    seq += 1
            assert (await read(store)).seq == seq > 0
            assert len(await store.page("r", 0, 1000)) == seq
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)


# ------------------------------------------------------------------ rows SQLite itself refuses


@pytest.mark.parametrize(
    ("poison", "error"),
    [
        (lambda: {"entries": [entry(1, ordinal=2**63)]}, StoreError),
        (lambda: {"entries": [entry(1, name="\ud800")]}, PayloadText),
        (lambda: {"entries": [entry(1, kind=None)]}, StoreError),
        (lambda: {"effects": (StartRun(new("before")), StartRun(new("child", priority=None)))}, StoreError),
    ],
)
async def test_a_row_that_breaks_a_statement_fails_alone(
    path: Path, poison: Callable[[], dict[str, Any]], error: type[Exception]
) -> None:
    """A value no check of ours foresees breaks the whole statement: it is split until the culprit stands alone."""
    async with opened(path) as store:
        await begin(store, *(new(f"r{n}", owner="a") for n in range(200)))
        batch = [commit(f"r{n}") for n in range(200)]
        for name, value in poison().items():
            setattr(batch[77], name, value)
        outcomes = await store.commit(batch)
        assert [n for n, outcome in enumerate(outcomes) if outcome.failure is not None] == [77]
        assert isinstance(outcomes[77].failure, error)
        assert [run.seq for run in await store.get([f"r{n}" for n in range(200)]) if run] == [
            0 if n == 77 else 1 for n in range(200)
        ]
        assert await store.get(["before"]) == [None]


async def test_S36_sqlites_own_length_limit(path: Path) -> None:
    """A value above the limit of the connection fails alone and typed, too."""
    async with opened(path) as store:
        await begin(store, *(new(f"r{n}", owner="a") for n in range(20)))

        def shrink(cx: sqlite3.Connection) -> None:
            cx.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)

        await store._writer.call(shrink)
        batch = [commit(f"r{n}") for n in range(20)]
        batch[3].entries = [entry(1, b"x" * 100_001)]
        outcomes = await store.commit(batch)
        assert [n for n, outcome in enumerate(outcomes) if outcome.failure is not None] == [3]


async def test_B07_the_table_itself_refuses_a_sleeper_without_wake_time(path: Path) -> None:
    """The rule is a CHECK constraint: no statement of anybody's gets around it."""
    async with opened(path) as store:
        await begin(store, new(owner="a"))
        with pytest.raises(sqlite3.IntegrityError, match="suspended_run_has_a_wake_time"):
            change(path, "UPDATE runs SET owner = NULL, wake_at = NULL")


# ------------------------------------------------------------------ the author's own SQL


async def test_S5_commit_with_is_one_transaction(path: Path) -> None:
    """The author's rows are there exactly when the commit is."""
    async with opened(path) as store:
        change(path, "CREATE TABLE orders (id)")
        await begin(store, new(owner="a"))

        def work(then: Callable[[], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
            async def insert(cx: sqlite3.Connection) -> None:
                cx.execute("INSERT INTO orders VALUES (1)")
                await then()

            return insert

        async def nothing() -> None:
            await asyncio.sleep(0)

        async def fails() -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await store.commit_with(work(fails), commit("r"))
        assert (await read(store)).seq == 0
        outcome = await store.commit_with(work(nothing), commit("r", status=Status.COMPLETED))
        assert outcome.status is CommitStatus.DONE
        assert (await store.commit_with(work(nothing), commit("r", seq=1))).status is CommitStatus.FENCED
        cx = sqlite3.connect(path)
        assert cx.execute("SELECT count(*) FROM orders").fetchone() == (1,)
        cx.close()


async def test_S41_a_cancelled_commit_with_leaves_no_open_transaction(path: Path) -> None:
    """Cancelling the caller in the middle of its work undoes it, and the next commit goes through."""
    async with opened(path) as store:
        await begin(store, new(owner="a"))
        begun = asyncio.Event()

        async def hangs(cx: sqlite3.Connection) -> None:
            begun.set()
            await asyncio.Event().wait()

        task = asyncio.ensure_future(store.commit_with(hangs, commit("r")))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await done(store, commit("r"))


async def test_S41_work_that_commits_by_itself_is_told(path: Path) -> None:
    """The lent transaction is not the author's to end."""
    async with opened(path) as store:
        await begin(store, new(owner="a"))

        async def commits(cx: sqlite3.Connection) -> None:
            cx.execute("COMMIT")

        with pytest.raises(StoreError, match="must not commit"):
            await store.commit_with(commits, commit("r"))


async def test_B35_a_cancelled_call_harms_nobody(path: Path) -> None:
    """Callers that give up while waiting leave no wrong answer for the next, and their writes are whole or absent."""
    async with opened(path) as store:
        await begin(store, *(new(f"r{n}", owner="a") for n in range(30)))
        tasks = [asyncio.ensure_future(store.commit([commit(f"r{n}", entries=2)])) for n in range(30)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        runs = await store.get([f"r{n}" for n in range(30)])
        assert {run.seq for run in runs if run} <= {0, 2}
        assert all(task.result()[0].status is CommitStatus.DONE for task in tasks[1::2])


# ------------------------------------------------------------------ plans


async def test_the_due_search_uses_its_index(path: Path) -> None:
    """Claiming from many sleepers of many routes walks none of them: no scan and no sort of runs in the plan."""
    async with opened(path) as store:
        texts: list[str] = []
        await store._writer.call(lambda cx: cx.set_trace_callback(texts.append))
        store.beat("a", LEASE)
        await begin(store, new(), new("gone", owner="nobody"))
        assert sorted(await claimed_ids(store)) == ["gone", "r"]
        await store._writer.call(lambda cx: cx.set_trace_callback(None))
    cx = sqlite3.connect(path)
    for text in texts:
        if "runs" in text and not text.startswith("--"):
            for *_, step in cx.execute("EXPLAIN QUERY PLAN " + text):
                walks = step.startswith("SCAN") and step.split()[1] in ("runs", "r", "x") and "USING" not in step
                assert not walks, (step, text)
    cx.close()


def test_the_codes_are_translated() -> None:
    """Errors without a code of ours still leave as StoreError."""
    assert type(connection.translate(sqlite3.OperationalError("odd"))) is StoreError
