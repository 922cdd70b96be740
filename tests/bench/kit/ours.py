"""The workloads on Durable: `python -m tests.bench.kit.ours URL '{"role": "engine"}'`.

Role `engine` runs workflows with the settings that an app gets without asking, `api` starts and inspects them, `store` has
no engine at all: it measures what lies below one.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Any

import psycopg

from durable import Context, Durable, current_step, workflow
from durable.core.ids import SystemIds
from durable.core.journal import Entry
from durable.engine.start import StartRequest
from durable.opening import open_store
from durable.store.records import Commit, NewRun
from tests.bench.kit.child import VALUE, gaps, serve, throughput

OPTIONS = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
LEDGER = OPTIONS.get("ledger", os.devnull)
STAMPS: list[float] = []
LATE: list[float] = []
RESUMED: asyncio.Queue[tuple[int, float]] = asyncio.Queue()
HANDLES: list[Any] = []


async def answer(number: int) -> dict[str, Any]:
    return VALUE


async def stamp(number: int) -> dict[str, Any]:
    STAMPS.append(time.perf_counter())
    return VALUE


async def slow(number: int, seconds: float) -> dict[str, Any]:
    ledger = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(ledger, f"{current_step().run_id} {number} {os.getpid()}\n".encode())
    os.close(ledger)
    await asyncio.sleep(seconds)
    return VALUE


@workflow(name="five_steps")
async def five_steps(ctx: Context, number: int) -> int:
    for _ in range(5):
        await ctx.step("answer", answer, number)
    return number


@workflow(name="many_steps")
async def many_steps(ctx: Context, count: int) -> int:
    for number in range(count):
        await ctx.step("stamp", stamp, number)
    return count


@workflow(name="slow_steps")
async def slow_steps(ctx: Context, given: list[float]) -> int:
    steps, seconds = int(given[0]), given[1]
    for number in range(steps):
        await ctx.step("slow", slow, number, seconds)
    return steps


@workflow(name="signalled")
async def signalled(ctx: Context, count: int) -> int:
    for number in range(count):
        await ctx.wait_for_signal("go")
        RESUMED.put_nowait((number, time.monotonic()))
    return count


@workflow(name="sleeper")
async def sleeper(ctx: Context, seconds: float) -> None:
    await ctx.sleep(seconds)


@workflow(name="timer")
async def timer(ctx: Context, due: float) -> None:
    await ctx.sleep_until(datetime.fromtimestamp(due, UTC))
    LATE.append(time.time() - due)


WORKFLOWS = [five_steps, many_steps, slow_steps, signalled, sleeper, timer]


async def sampled(work: Callable[[], Awaitable[Any]], steps: int | None, top: int) -> dict[str, Any]:
    """Where CPU goes, sampled every millisecond of it, so that calls cost what they cost: µs a step of functions and files,
    what they call in C being theirs. `through` counts what they call in Python too. Steps that are not given are five for
    each workflow that `work` says it has done."""
    own: Counter[str] = Counter()
    through: Counter[str] = Counter()
    files: Counter[str] = Counter()

    def sample(number: int, frame: FrameType | None) -> None:
        seen = set()
        while frame is not None:
            code = frame.f_code
            file = re.sub(r".*/(site-packages|durable|bench|python3\.\d+)/", "", code.co_filename)
            where = f"{file}:{code.co_firstlineno} {code.co_name}"
            if not seen:
                own[where] += 1
                files[file] += 1
            seen.add(where)
            frame = frame.f_back
        through.update(seen)

    signal.signal(signal.SIGPROF, sample)
    cpu = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    done = await work()
    signal.setitimer(signal.ITIMER_PROF, 0)
    total = (time.process_time() - cpu) / (steps or done["workflows"] * 5) * 1e6
    each = total / max(own.total(), 1)
    return {
        "functions": [[where, count * each, through[where] * each] for where, count in own.most_common(top)],
        "files": [[file, count * each] for file, count in files.most_common(top)],
        "total": total,
        "samples": own.total(),
    }


class Engine:
    """What a process of role `engine` or `api` can be told."""

    def __init__(self, app: Durable) -> None:
        self.app = app

    async def one(self) -> dict[str, Any]:
        await (await self.app.start(five_steps, 1)).result()
        return {}

    async def w1(self, seconds: float, at_once: int) -> dict[str, Any]:
        return await throughput(self.one, seconds, at_once)

    async def w2(self, steps: int) -> dict[str, Any]:
        STAMPS.clear()
        await (await self.app.start(many_steps, steps)).result()
        return {"ms": gaps(STAMPS)}

    async def profile(self, seconds: float, at_once: int, top: int) -> dict[str, Any]:
        """Where the CPU of W1 goes, in µs a step."""
        return await sampled(lambda: throughput(self.one, seconds, at_once), None, top)

    async def signals(self, count: int, pause: float) -> dict[str, Any]:
        """Sender and receiver on this engine."""
        handle, took = await self.app.start(signalled, count), []
        for number in range(count):
            await asyncio.sleep(pause)  # the last commit is over: a run at rest, and hot
            begun = time.monotonic()
            await handle.signal("go")
            took.append((await self._resumed(number) - begun) * 1e3)
        await handle.result()
        return {"ms": took}

    async def _resumed(self, number: int) -> float:
        while True:
            got, at = await RESUMED.get()
            if got == number:  # a replay passes by what has been
                return at

    async def receive(self, count: int) -> dict[str, Any]:
        return {"id": (await self.app.start(signalled, count)).id}

    async def resumed(self, number: int) -> dict[str, Any]:
        return {"at": await self._resumed(number)}

    async def send(self, id: str) -> dict[str, Any]:
        begun = time.monotonic()
        await self.app.run(id).signal("go")
        return {"at": begun}

    async def load(self, count: int, steps: int, seconds: float) -> dict[str, Any]:
        handles = await asyncio.gather(*(self.app.start(slow_steps, [steps, seconds]) for _ in range(count)))
        return {"ids": [handle.id for handle in handles]}

    async def await_all(self, ids: list[str]) -> dict[str, Any]:
        await asyncio.gather(*(self.app.run(id).result() for id in ids))
        return {}

    async def sleepers(self, count: int, seconds: float) -> dict[str, Any]:
        """Start runs that sleep, and wait until none of them is in memory. `settled` counts until then."""
        gc.collect()
        before, begun = resident_bytes(), time.perf_counter()
        for first in range(0, count, 1000):
            share = min(1000, count - first)
            started = await self.app.start_many([StartRequest(workflow=sleeper, input=seconds)] * share)
            assert not any(isinstance(one, Exception) for one in started)
        took = time.perf_counter() - begun
        await self.cold()
        gc.collect()
        return {
            "seconds": took,
            "settled": time.perf_counter() - begun,
            "bytes_per_run": (resident_bytes() - before) / count,
        }

    async def cold(self) -> None:
        """Until no run is in memory, and none waits in the store to be taken up."""
        waiting = (
            "SELECT EXISTS (SELECT 1 FROM durable.runs WHERE status = 'active' AND activity IN ('queued', 'executing'))"
        )
        async with await psycopg.AsyncConnection.connect(sys.argv[1], autocommit=True) as cx:
            while True:
                while self.app.engine._executor.residents:
                    await asyncio.sleep(0.05)
                row = await (await cx.execute(waiting)).fetchone()
                if row is not None and not row[0]:
                    return
                await asyncio.sleep(0.1)

    async def timers(self, count: int, ahead: float, within: float) -> dict[str, Any]:
        """Seconds from due time to the workflow going on, of `count` timers due within `within` seconds."""
        LATE.clear()
        first = time.time() + ahead
        requests = [StartRequest(workflow=timer, input=first + within * n / count) for n in range(count)]
        random.Random(1).shuffle(requests)
        handles = await self.app.start_many(requests)
        started = first - time.time()
        await asyncio.gather(*(handle.result() for handle in handles if not isinstance(handle, Exception)))
        assert len(LATE) == count
        return {"seconds": LATE, "started_ahead": started}

    async def idle(self, seconds: float) -> dict[str, Any]:
        """Do nothing, for the parent to count what an idle engine asks."""
        await asyncio.sleep(seconds)
        return {}


class Below:
    """What a process of role `store` can be told."""

    async def floor(self, rows: int, batch: int, in_flight: int) -> dict[str, Any]:
        """Rows a second through `Store.commit` alone, batches made beforehand; `in_flight` of them under way at once.
        0: as many as the store says are worth having."""
        store = open_store(sys.argv[1])
        await store.open()
        in_flight = in_flight or store.capabilities.in_flight
        rounds = max(1, rows // batch // in_flight)
        lanes = []
        for _ in range(in_flight):
            ids = [SystemIds().run_id() for _ in range(batch)]
            await store.start([NewRun(id, "floor", "1", b"0", owner="bench") for id in ids])
            lanes.append([prepared(ids, seq) for seq in range(rounds)])

        async def lane(batches: list[list[Commit]]) -> None:
            for one in batches:
                outcomes = await store.commit(one)
                assert all(outcome.status == "done" for outcome in outcomes)

        gc.collect()
        begun = time.perf_counter()
        await asyncio.gather(*map(lane, lanes))
        took = time.perf_counter() - begun
        await store.close()
        return {"rate": rounds * batch * in_flight / took, "in_flight": in_flight}

    async def lone(self, count: int) -> dict[str, Any]:
        """Milliseconds of `Store.commit` of one run with one row, one after another."""
        store = open_store(sys.argv[1])
        await store.open()
        id, took = SystemIds().run_id(), []
        await store.start([NewRun(id, "floor", "1", b"0", owner="bench")])
        for seq in range(count):
            batch = prepared([id], seq)
            begun = time.perf_counter()
            (outcome,) = await store.commit(batch)
            took.append((time.perf_counter() - begun) * 1e3)
            assert outcome.status == "done"
        await store.close()
        return {"ms": took}

    async def rows(self, rows: int, batch: int) -> dict[str, Any]:
        """Journal-like rows a second, inserted in batches and nothing else."""
        async with await connect() as connection:
            await connection.execute(RAW_TABLE)
            await connection.execute("TRUNCATE raw_journal")
            ids = [SystemIds().run_id() for _ in range(batch)]
            insert = (
                "INSERT INTO raw_journal SELECT *, 'step', 'completed', 'answer', 'answer', 1, '0123456789abcdef'"
                " FROM unnest(%b::text[], %b::int[], %b::bigint[], %b::bytea[])"
            )
            rounds = rows // batch
            begun = time.perf_counter()
            for seq in range(rounds):
                await connection.execute(insert, [ids, [seq] * batch, [1 << 50] * batch, [PAYLOAD] * batch])
            return {"rate": rounds * batch / (time.perf_counter() - begun)}

    async def commits(self, count: int) -> dict[str, Any]:
        """Milliseconds of single INSERT + COMMIT of such a row: one round trip, prepared, through the same driver."""
        async with await connect() as connection:
            await connection.execute(RAW_TABLE)
            run, took = SystemIds().run_id(), []
            insert = "INSERT INTO raw_journal VALUES (%b, %b, %b, %b, 'step', 'completed', 'answer', 'answer', 1, %b)"
            for seq in range(count):
                begun = time.perf_counter()
                await connection.execute(insert, [run, seq, 1 << 50, PAYLOAD, "0123456789abcdef"])
                took.append((time.perf_counter() - begun) * 1e3)
            return {"ms": took}


PAYLOAD = json.dumps(VALUE, separators=(",", ":")).encode()

RAW_TABLE = """CREATE TABLE IF NOT EXISTS raw_journal (run_id text, seq int, at bigint, payload bytea, kind text, status text,
    key text, name text, attempt int, fingerprint text, PRIMARY KEY (run_id, seq))"""


async def connect() -> Any:
    import psycopg

    return await psycopg.AsyncConnection.connect(sys.argv[1], autocommit=True)


def prepared(ids: Sequence[str], seq: int) -> list[Commit]:
    """One step's commit for each of these runs."""
    at = 1_700_000_000_000_000 + seq
    return [
        Commit(
            id,
            1,
            seq,
            f"c{seq}-{id}",
            [Entry(seq + 1, at, "step", "completed", "answer", seq, "answer", 1, "0123456789abcdef", PAYLOAD)],
        )
        for id in ids
    ]


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def our_version() -> str:
    try:
        return version("durable")
    except PackageNotFoundError:
        return "from its folder"


async def main() -> None:
    hello = {"name": "durable", "version": our_version()}
    role = OPTIONS.get("role", "engine")
    if role == "store":
        below = Below()
        await serve({verb: getattr(below, verb) for verb in ["floor", "lone", "rows", "commits"]}, hello)
        return
    async with Durable(sys.argv[1], workflows=WORKFLOWS, role=role, **OPTIONS.get("settings", {})) as app:
        engine = Engine(app)
        verbs = [
            "one",
            "w1",
            "w2",
            "profile",
            "signals",
            "receive",
            "resumed",
            "send",
            "load",
            "await_all",
            "sleepers",
            "timers",
            "idle",
        ]
        await serve({verb: getattr(engine, verb) for verb in verbs}, hello)


if __name__ == "__main__":
    asyncio.run(main())
