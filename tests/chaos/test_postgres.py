"""Engines as real processes on a real Postgres, and everything that can come between them: kill, stop, drain, a server that
falls and rises, connections that end, hang, or break just after the commit.

After each: nothing lost, nothing committed twice, nothing stuck, and everything went on within lease + 2 s.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest

from durable import Durable, RunHandle
from durable.store.postgres.embedded import EmbeddedPostgres
from tests.chaos.node import bulky, waits
from tests.chaos.proxy import Proxy, executes
from tests.chaos.site import GRACE, LEASE, Node, Site, over, owners, patiently, share
from tests.chaos.traffic import Traffic
from tests.conftest import Budget
from tests.servers.postgres import SETTINGS, fresh_database
from tests.servers.services import require

pytestmark = pytest.mark.service

LONE = "appended AS"
"""Stands in the statement that commits one step of one run; all other commits call `commit_runs`."""
CONFIRMED = 1.0
"""Seconds within which the server itself ends what a stopped client began: one function call."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A server of our own: it is going to be stopped."""
    require("postgres")
    with EmbeddedPostgres(tmp_path_factory.mktemp("chaos") / "postgres", settings=SETTINGS) as server:
        yield server


@pytest.fixture
async def site(server: EmbeddedPostgres, tmp_path: Path) -> AsyncIterator[Site]:
    server.start()
    with fresh_database(server.url) as url:
        site = await Site(url, tmp_path).open()
        try:
            yield site
        finally:
            await site.close()


@pytest.fixture
def proxy(site: Site) -> Iterator[Proxy]:
    with Proxy(site.url) as proxy:
        yield proxy


@asynccontextmanager
async def traffic(site: Site, budget: Budget, **options: Any) -> AsyncIterator[Traffic]:
    """Callers at work while the body runs; then every one gets its outcome."""
    callers = Traffic(site, Random(budget.start), **options)
    try:
        yield callers
        await callers.stop()
    finally:
        await callers.abandon()


def ask(site: Site, sql: str, *parameters: Any) -> list[Any]:
    with psycopg.connect(site.url, autocommit=True) as direct:
        return direct.execute(sql, parameters).fetchall()


def locks_of(site: Site, name: str) -> list[Any]:
    """What the connections of this name hold that others could wait for: rows, tables written to. Presence is no lock."""
    return ask(
        site,
        "SELECT l.locktype, l.mode, l.relation::regclass::text, a.state, left(a.query, 60)"
        " FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
        " WHERE a.application_name = %s AND l.granted AND (l.locktype IN ('transactionid', 'tuple')"
        " OR l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')"
        " AND l.locktype = 'relation')",
        name,
    )


async def lets_go(site: Site, name: str) -> None:
    """The server ends by itself what that client began, and holds nothing for it."""
    deadline = time.monotonic() + CONFIRMED
    while held := locks_of(site, name):
        assert time.monotonic() < deadline, f"a stopped engine holds {held}"
        await asyncio.sleep(0.01)


def named(site: Site, name: str) -> str:
    return f"{site.url}{'&' if '?' in site.url else '?'}application_name={name}"


async def orphans_of(
    site: Site, node: Node, handles: list[RunHandle[Any]]
) -> tuple[list[RunHandle[Any]], dict[str, Any]]:
    before = {record.id: record for record in await site.records(handles)}
    return [handle for handle in handles if before[handle.id].owner == node.incarnation], before


# ------------------------------------------------------------------ engines


@pytest.mark.timeout(120)
async def test_kill_9_with_500_runs_in_flight(site: Site, budget: Budget, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed at random moments: every run of the dead engine goes on within lease + 2 s, p99 and all."""
    draw = Random(budget.start)
    nodes = {node.incarnation: node for node in await site.several(2)}
    handles = await site.load(500, 0.3)
    times: list[float] = []
    for _ in budget.seeds(2):
        await asyncio.sleep(0.2 + 0.4 * draw.random())
        at_work = [node for owner, _ in owners(await site.records(handles)).most_common() if (node := nodes.get(owner))]
        if not at_work:
            break
        victim = nodes.pop(at_work[0].incarnation)
        victim.send(signal.SIGKILL)
        killed = time.monotonic()
        orphans, before = await orphans_of(site, victim, handles)
        successor = asyncio.ensure_future(site.node())
        times += await site.progress(orphans, before, killed)
        node = await successor
        nodes[node.incarnation] = node
        await site.until(handles, lambda r: over(r) or not r.recovery_attempts, "all progress")
    await site.until(handles, over, "all are done")
    again = await site.judge()
    with capsys.disabled():
        print(
            f"\nPostgres, kill -9: {len(times)} runs orphaned; all went on, p50 {share(times, 0.5):.2f} s, "
            f"p99 {share(times, 0.99):.2f} s (lease {LEASE} s); {again} bodies ran again"
        )
    assert times, "the kills hit something"
    assert max(times) < LEASE + GRACE


async def test_a_lock_that_is_held_is_seen(site: Site) -> None:
    """The witness for locks is to be trusted: a client in the middle of a transaction of its own is told of."""
    with psycopg.connect(named(site, "holder")) as holder:
        assert locks_of(site, "holder") == []
        holder.execute("INSERT INTO durable.meta VALUES ('something', '')")
        assert {lock[0] for lock in locks_of(site, "holder")} == {"transactionid", "relation"}
        holder.rollback()


@pytest.mark.timeout(60)
async def test_a_stopped_engine_holds_no_lock_and_is_refused_when_it_wakes(site: Site, budget: Budget) -> None:
    """SIGSTOP at many moments under load: within a second nothing is held for it, and the others go on. Past its lease its
    runs are theirs, and what it still wants to write is refused."""
    draw = Random(budget.start)
    sleeper = await site.node(via=named(site, "sleeper"), lease=1.0)
    await site.node(lease=1.0)
    async with traffic(site, budget, callers=40, seconds=0.02) as callers:
        for _ in range(8):
            await asyncio.sleep(0.05 + 0.1 * draw.random())
            sleeper.send(signal.SIGSTOP)
            await lets_go(site, "sleeper")
            sleeper.send(signal.SIGCONT)
        sleeper.send(signal.SIGSTOP)
        stopped = time.monotonic()
        handles = await site.load(20, 0.02)
        await site.until(handles, over, "the others take what is new")
        mine = [record for record in (await site.app.find(limit=200)).runs if record.owner == sleeper.incarnation]
        await site.until([site.app.run(r.id) for r in mine], lambda r: r.owner != sleeper.incarnation, "taken over")
        assert time.monotonic() - stopped < 1.0 + GRACE
        await lets_go(site, "sleeper")
        sleeper.send(signal.SIGCONT)
    assert sum(callers.made.values()) >= 40
    assert sleeper.alive
    await site.judge()


@pytest.mark.timeout(60)
async def test_a_stopped_engine_holds_no_lock_while_a_large_answer_is_on_its_way(site: Site, budget: Budget) -> None:
    """Stopped while it reads what it has claimed, megabytes that it does not take: still nothing is held for it."""
    draw = Random(budget.start)
    handles = [
        handle for handle in await asyncio.gather(*(site.start(bulky, "x" * 300_000) for _ in range(100))) if handle
    ]
    for _ in range(3):
        sleeper = await site.node(via=named(site, "sleeper"), lease=1.0)
        await asyncio.sleep(0.05 * draw.random())
        sleeper.send(signal.SIGSTOP)
        await lets_go(site, "sleeper")
        sleeper.send(signal.SIGKILL)
        await sleeper.ended()
    await site.node(lease=1.0)
    await site.until(handles, over, "all are done")
    await site.judge()


@pytest.mark.timeout(60)
async def test_a_drain_under_load_counts_as_no_crash(site: Site, budget: Budget) -> None:
    """SIGTERM while bodies run and callers call: exit code 0, everything handed over, nothing counted against any run."""
    first = await site.node(drain_timeout=0.2)
    async with traffic(site, budget, callers=30, seconds=0.05):
        for _ in range(2):
            other = await site.node(drain_timeout=0.2)
            first.send(signal.SIGTERM)
            assert await first.ended() == 0, site.said()
            first = other
    assert {record.recovery_attempts for record in (await site.app.find(limit=200)).runs} == {0}
    await site.judge()


@pytest.mark.timeout(60)
async def test_engines_whose_clocks_are_wrong_by_ten_minutes(site: Site, budget: Budget) -> None:
    """Stamps, timers and leases are the store's: nothing is early, late or taken from the living, and a death is seen."""
    ahead, behind, right = [await site.node(skew=skew) for skew in (600.0, -600.0, 0.0)]
    async with traffic(site, budget, callers=30, seconds=0.05):
        handles = await site.load(60, 0.3)
        await asyncio.sleep(0.5)
        ahead.send(signal.SIGKILL)
        killed = time.monotonic()
        orphans, before = await orphans_of(site, ahead, handles)
        times = await site.progress(orphans, before, killed)
        await site.until(handles, over, "all are done")
    assert max(times, default=0.0) < LEASE + GRACE
    assert behind.alive
    assert right.alive
    assert "has lost its lease" not in site.log.read_text()
    await site.judge()


# ------------------------------------------------------------------ the server


@pytest.mark.timeout(60)
async def test_the_server_falls_and_rises(site: Site, server: EmbeddedPostgres, budget: Budget) -> None:
    """`stop -m immediate` under load, twice: engines and callers wait it out, and all goes on within lease + 2 s."""
    nodes = await site.several(2)
    async with traffic(site, budget, callers=30, seconds=0.05):
        for _ in range(2):
            handles = await site.load(50, 0.3)
            await asyncio.to_thread(server.stop, "immediate")
            await asyncio.to_thread(server.start)
            risen = time.monotonic()
            before = {record.id: record for record in await patiently(lambda handles=handles: site.records(handles))}
            times = await site.progress(handles, before, risen)
            assert share(times, 0.99) < LEASE + GRACE
            await site.until(handles, over, "all are done")
    assert all(node.alive for node in nodes)
    await site.judge()


@pytest.mark.timeout(60)
async def test_the_server_restarts_into_a_recovery(site: Site, server: EmbeddedPostgres) -> None:
    """B03: 0.2 s after an engine has begun to recover 250 runs of another, the store is gone for a moment. All 250 finish."""
    dead = await site.node()
    handles = await site.load(250, 0.2)
    await site.until(handles, lambda r: r.owner == dead.incarnation, "they are under way")
    dead.send(signal.SIGKILL)
    await dead.ended()
    heir = await site.node()
    await site.until(handles[:1], lambda r: r.owner != dead.incarnation, "the recovery has begun")
    await asyncio.sleep(0.2)
    await asyncio.to_thread(server.stop, "immediate")
    await asyncio.to_thread(server.start)
    await site.until(handles, over, "all are done")
    assert heir.alive
    await site.judge()


@pytest.mark.timeout(60)
async def test_all_backends_are_terminated_again_and_again(site: Site, budget: Budget) -> None:
    """`pg_terminate_backend` of every connection there is, ten times under load: nobody is taken for dead."""
    await site.several(2)
    async with traffic(site, budget, callers=30, seconds=0.05):
        for _ in range(10):
            await asyncio.sleep(0.2)
            ask(
                site,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
            )
    assert "has lost its lease" not in site.log.read_text()
    await site.judge()


# ------------------------------------------------------------------ the link


@pytest.mark.timeout(60)
@pytest.mark.parametrize("call", ["commit_runs", LONE, "start_runs", "send_messages", "claim_runs", "beat"])
async def test_the_link_breaks_between_a_commit_and_its_reply(
    site: Site, proxy: Proxy, budget: Budget, call: str
) -> None:
    """S39, B41: what happened is never taken for failed, what did not happen never for done, whichever call it was."""
    node = await site.node(via=proxy.url)
    async with site.caller(proxy.url) as app, traffic(site, budget, callers=20, seconds=0.02, app=app):
        for cut in [proxy.cut_after, proxy.cut_before] * 3:
            before = proxy.counts.total()
            cut(executes(call))
            await until(lambda before=before: proxy.counts.total() > before, f"{call} is called")
    assert proxy.counts.total() >= 6
    again = await site.judge()
    if call in (LONE, "commit_runs", "start_runs", "send_messages"):
        assert again == 0, "a reply that was lost makes no body run again"
    assert node.alive
    assert "has lost its lease" not in site.log.read_text()


@pytest.mark.timeout(90)
@pytest.mark.parametrize("healed", [True, False], ids=["healed", "never healed"])
async def test_a_half_open_link_to_one_engine(site: Site, proxy: Proxy, budget: Budget, healed: bool) -> None:
    """Its connections hang and nobody is told: the others take its runs within lease + 2 s. Healed, what it still wants to
    write is refused; not healed, but for new connections, it comes back by itself."""
    cut_off = await site.node(via=proxy.named("cut-off"))
    other = await site.node()
    async with traffic(site, budget, callers=20, seconds=0.05):
        handles = await site.load(100, 0.3)
        proxy.stop(new=healed)
        stopped = time.monotonic()
        orphans, before = await orphans_of(site, cut_off, handles)
        assert max(await site.progress(orphans, before, stopped), default=0.0) < LEASE + GRACE
        await site.until(handles, over, "all are done")
        if healed:
            proxy.heal()
    other.send(signal.SIGTERM)
    assert await other.ended() == 0
    last = await site.load(1, 0.01)
    await site.until(last, over, "the one that was cut off works again", timeout=10)
    await site.judge()


# ------------------------------------------------------------------ one of a kind


@pytest.mark.timeout(60)
async def test_processes_that_die_holding_the_migration_lock(server: EmbeddedPostgres, tmp_path: Path) -> None:
    """B36: two processes are killed in the middle of making the tables; the next makes them and works."""
    server.start()
    with fresh_database(server.url) as url, Proxy(url) as proxy:
        site = Site(url, tmp_path)
        proxy.latency = 0.05
        held = (
            "SELECT 1 FROM pg_locks JOIN pg_stat_activity USING (pid)"
            " WHERE locktype = 'advisory' AND granted AND application_name = 'dying'"
        )
        try:
            for _ in range(2):
                dying = site.launch(via=proxy.named("dying"))
                await until(lambda: ask(site, held), "it holds the lock")
                dying.send(signal.SIGKILL)
                await dying.ended()
            began = time.monotonic()
            await site.open()
            assert time.monotonic() - began < 10
            await site.node()
            handles = await site.load(5, 0.01)
            await site.until(handles, over, "it works")
            await site.judge()
        finally:
            await site.close()


@pytest.mark.timeout(60)
async def test_fifty_concurrent_starts_with_one_key(site: Site) -> None:
    """B24: over three engines at once, one run; and a start later, while it lives, finds it."""
    apps = [Durable(site.url, workflows=[waits]) for _ in range(3)]
    async with AsyncExitStack() as stack:
        for app in apps:
            await stack.enter_async_context(app)
        handles = await asyncio.gather(*(site.start(waits, key="the key", app=apps[n % 3]) for n in range(50)))
        assert len({handle.id for handle in handles if handle is not None}) == 1
        again = await site.start(waits, key="the key", app=apps[0])
        assert again is not None
        assert again.id == handles[0].id  # type: ignore[union-attr]
        await site.signal(again.id, "done")
        await again.result(10)
        await site.judge()


@pytest.mark.timeout(90)
async def test_many_long_runs_do_not_hide_a_stuck_one(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """B40: thousands of living runs come before the one whose engine died; it is found within lease + 2 s all the same."""
    many = 3_000
    await site.node(only=["waits"], hot_for=600.0, max_running=10_000, hot_limit=10_000)
    long = await site.load(many, None, waits)
    await site.until(long, lambda r: r.owner is not None and r.activity == "waiting", "all are under way, and kept")
    dying = await site.node(only=["load"])
    [stuck] = await site.load(1, 5.0)
    await site.until([stuck], lambda r: r.owner == dying.incarnation, "the one is under way")
    heir = await site.node()
    dying.send(signal.SIGKILL)
    killed = time.monotonic()
    await site.until([stuck], lambda r: r.owner == heir.incarnation, "it is found")
    took = time.monotonic() - killed
    with capsys.disabled():
        print(f"\nPostgres: the one stuck run behind {many} living ones was found in {took:.2f} s")
    assert took < LEASE + GRACE
    assert owners(await site.records(long)).total() == many


# ------------------------------------------------------------------ waiting


async def until(fact: Any, claim: str, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not fact():
        assert time.monotonic() < deadline, f"never came true: {claim}"
        await asyncio.sleep(0.01)
