"""What calls cost the server: updates that stay on their page, and plans that do not grow with what is stored."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import psycopg
import pytest

from durable.store.postgres import PostgresStore, connection
from durable.store.records import ClaimRequest, CommitStatus, Message, PruneRequest, PutMessage, RunQuery
from durable.testing.suites.store.builder import FAR, ROUTE, begin, claimed_ids, commit, new, suspend

HOT_SHARE = 0.65
"""All of them on a server that does nothing else; beside busy databases pages are pruned less often."""


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[PostgresStore]:
    """In which the engine `a` lives, with one connection, so that everything is asked, and prepared, on that one."""
    store = PostgresStore(postgres_url, pool_max=1)
    await store.open()
    store.beat("a", FAR)
    yield store
    await store.close()


async def figures(store: PostgresStore, query: str) -> tuple[int, ...]:
    """Of the statistics as they are now: this session's are flushed first."""
    async with store._db.lend() as cx:
        await cx.execute("SELECT pg_stat_force_next_flush()")
        await cx.execute("SELECT pg_stat_clear_snapshot()")
        [row] = await (await cx.execute(query)).fetchall()  # type: ignore[call-overload]
    return tuple(int(n) for n in row)


async def test_D3_commits_stay_on_their_page(store: PostgresStore) -> None:
    """Plain commits of many runs, batch after batch, are HOT updates for the most part: no index is written."""
    counts = (
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE schemaname = 'durable' AND relname = 'runs'"
    )
    ids = [f"r{n:05}" for n in range(1000)]
    await begin(store, *(new(run_id, owner="a") for run_id in ids))
    before = await figures(store, counts)
    for round_ in range(12):
        for part in range(0, len(ids), 250):
            outcomes = await store.commit([commit(run_id, seq=round_) for run_id in ids[part : part + 250]])
            assert {outcome.status for outcome in outcomes} == {CommitStatus.DONE}
    after = await figures(store, counts)
    updates, hot = after[0] - before[0], after[1] - before[1]
    assert updates == 12_000
    assert hot / updates >= HOT_SHARE, f"{hot / updates:.1%} of {updates} updates are HOT"


FILL = """
INSERT INTO durable.runs (id, workspace, workflow, version, input, input_hash, priority, owner, epoch, seq, status, activity,
                          wake_at, created_at, finished_at, updated_at)
SELECT 'f' || n, 'default', 'checkout', '1', '{}', '', 0, NULL, 1, 2, 'completed', 'executing', NULL, n, n, n
FROM generate_series(1, 100000) n;
INSERT INTO durable.journal (run_id, seq, at, kind, status, attempt)
SELECT 'f' || n, 1, 1, 'step', 'completed', 0 FROM generate_series(1, 100000) n;
INSERT INTO durable.runs (id, workspace, workflow, version, input, input_hash, priority, owner, epoch, seq, status, activity,
                          wake_at, created_at, updated_at)
SELECT 'a' || n, 'default', 'checkout', '1', '{}', '', 0, CASE WHEN n <= 500 THEN 'a' END, 1, 0, 'active',
       CASE WHEN n <= 500 THEN 'executing' ELSE 'queued' END, CASE WHEN n > 500 THEN 0 END, n, n
FROM generate_series(1, 1000) n;
"""

CALLS: dict[str, tuple[int, Callable[[PostgresStore, int], Awaitable[Any]]]] = {
    # name: (rows that it may look at, at most; the call, made for the n-th time)
    "claim": (3000, lambda s, n: s.claim(ClaimRequest("a", (ROUTE,), 10))),
    "claim blocked": (3000, lambda s, n: s.claim(ClaimRequest("a", (ROUTE,), 10, blocked=True))),
    "unread": (1500, lambda s, n: s.unread("a")),
    "owned": (1500, lambda s, n: s.owned("a")),
    "get": (20, lambda s, n: s.get(["a1", "f7", "none"])),
    "load": (50, lambda s, n: s.load(["a1", "f7"])),
    "page": (50, lambda s, n: s.page("f7", 0, 100)),
    "children": (20, lambda s, n: s.children("f7")),
    "inbox": (20, lambda s, n: s.inbox([("a1", 0)])),
    "commit": (50, lambda s, n: s.commit([commit("a1", seq=n), commit("a2", seq=n)])),
    "commit with effects": (
        50,
        lambda s, n: s.commit([commit("a3", seq=n, effects=(PutMessage(Message("a4", f"e{n}", "signal")),))]),
    ),
    "send": (50, lambda s, n: s.send([Message("a5", f"m{n}", "signal"), Message("f7", f"m{n}", "signal")])),
    "start": (50, lambda s, n: s.start([new(f"n{n}", idempotency_key=f"k{n}", workflow="other")])),
    "start again": (50, lambda s, n: s.start([new("n0", idempotency_key="k0", workflow="other")])),
    "release": (50, lambda s, n: s.release([("a6", 99)])),
    "find": (500, lambda s, n: s.find(RunQuery(workspace="default", limit=10))),
    "prune": (500, lambda s, n: s.prune(PruneRequest(5, older_than_us=1))),
    "prune nothing": (500, lambda s, n: s.prune(PruneRequest(5, older_than_us=2 * 10**15))),
    "prune to keep": (1000, lambda s, n: s.prune(PruneRequest(5, keep=100))),
}


@pytest.mark.parametrize("statistics", ["never", "empty", "never, planned", "small, planned", "empty, planned"])
async def test_D8_no_call_grows_with_what_is_stored(
    store: PostgresStore, postgres_url: str, statistics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 100,000 finished runs that the server's statistics know nothing of, every call reads a few rows by an index: also
    where statements were planned while the tables were empty, as soon as those plans are too old."""
    monkeypatch.setattr(connection, "PLANS_S", 0.0)
    planned = 8 if "planned" in statistics else 0
    with psycopg.connect(postgres_url, autocommit=True) as cx:
        for table in ("runs", "journal_default", "inbox", "engines", "event_waiters", "slots", "schedule_fires"):
            cx.execute(f"ALTER TABLE durable.{table} SET (autovacuum_enabled = off)")  # type: ignore[call-overload]
        if "small" in statistics:
            await begin(store, *(new(f"s{n}", owner="s") for n in range(60)))
        if "never" not in statistics:
            cx.execute("VACUUM ANALYZE")
        for n in range(planned):
            for _, call in CALLS.values():
                await call(store, n)
        cx.execute("DELETE FROM durable.runs")
        cx.execute("DELETE FROM durable.inbox")
        cx.execute(FILL)
    counts = """
        SELECT sum(coalesce(seq_tup_read, 0)), sum(coalesce(idx_tup_fetch, 0)),
               (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE schemaname = 'durable')
        FROM pg_stat_user_tables WHERE schemaname = 'durable' AND relname IN ('runs', 'journal_default', 'inbox')"""
    wrong = []
    for name, (most, call) in CALLS.items():
        looks = []
        for _ in range(3):  # a connection of the pool may still report what it did before
            before = await figures(store, counts)
            await call(store, 0)
            after = await figures(store, counts)
            looks.append([b - a for a, b in zip(before, after, strict=True)])
        scanned, fetched, read = min(looks)
        if scanned > 0 or fetched > most or read > most:
            wrong.append(f"{name}: {scanned} rows by scanning, {fetched} fetched and {read} read by an index")
    assert not wrong, "\n".join(wrong)


async def test_B40_ten_thousand_long_runs_hide_no_orphan(store: PostgresStore, postgres_url: str) -> None:
    """One run of a dead engine among ten thousand of a living one is found by the next claim, whatever the order."""
    with psycopg.connect(postgres_url, autocommit=True) as cx:
        cx.execute(
            "INSERT INTO durable.runs (id, workspace, workflow, version, input, input_hash, priority, owner, epoch, seq,"
            " activity, created_at, updated_at) SELECT 'r' || n, 'default', 'checkout', '1', '{}', '', 0,"
            " CASE n WHEN 10000 THEN 'gone' ELSE 'living' END, 1, 0, 'executing', n, n FROM generate_series(1, 10000) n"
        )
    store.beat("living", FAR)
    assert await claimed_ids(store, "a", 5) == ["r10000"]
    assert await claimed_ids(store, "a", 5) == []


async def test_S21_every_suspended_run_has_a_wake_time(store: PostgresStore) -> None:
    """The table itself refuses a suspended run that nothing would wake, whoever writes it."""
    await begin(store, new(owner="a"))
    [outcome] = await store.commit([suspend("r", 1)])
    assert outcome.status is CommitStatus.DONE
    for change in ("wake_at = NULL", "wake_at = NULL, activity = 'sleeping'", "status = 'active', wake_at = NULL"):
        with pytest.raises(psycopg.errors.CheckViolation):
            async with store._db.lend() as cx:
                await cx.execute(f"UPDATE durable.runs SET {change}")  # type: ignore[call-overload]
