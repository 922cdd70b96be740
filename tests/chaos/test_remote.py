"""Remote steps over real brokers, with worker processes that are killed and stopped, brokers that restart and forget, and
answers that come late, twice and out of order. What the run is told is always one answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec
import pytest

from durable import Context, Durable, RetryPolicy, RunFailed, RunHandle, workflow
from durable.core.journal import REMOTE, Entry
from durable.opening import open_transport
from durable.protocol.messages import StepResult
from durable.store.postgres.embedded import EmbeddedPostgres
from durable.testing.facts import eventually
from tests.servers.rabbitmq import RabbitServer
from tests.servers.redis import RedisServer
from tests.servers.services import require
from tests.servers.sqs import CREDENTIALS, SqsServer

ROOT = Path(__file__).resolve().parents[2]
QUICK = RetryPolicy(max_attempts=4, initial_delay=0.05, jitter=0.0)
PATIENCE = 40.0


@workflow(name="five")
async def five(ctx: Context, n: int) -> int:
    """Five errands in a row."""
    for _ in range(5):
        n = await ctx.remote("errands.quick", n, retries=QUICK)
    return n


@workflow(name="one-slow")
async def one_slow(ctx: Context, seconds: float) -> Any:
    """One errand that takes its time, without a timeout."""
    return await ctx.remote("errands.slow", seconds, retries=QUICK)


@workflow(name="impatient")
async def impatient(ctx: Context, seconds: float) -> Any:
    """One errand with a timeout; then it stays for what comes late."""
    pid = await ctx.remote("errands.slow", seconds, retries=QUICK, timeout=2.0)
    await ctx.wait_for_signal("go")
    return pid


@workflow(name="doomed")
async def doomed(ctx: Context) -> Any:
    """One errand that kills whoever runs it."""
    return await ctx.remote("errands.poison", 1, retries=RetryPolicy(max_attempts=2, initial_delay=0.05, jitter=0.0))


class Broker:
    """A real server of one kind, and the URL under which everybody meets on it. Leases are short."""

    def __init__(self, kind: str, server: Any, address: str, **options: Any) -> None:
        self.kind = kind
        self.server = server
        options["prefix"] = f"chaos-{uuid.uuid4().hex[:8]}"
        self.url = f"{address}{'&' if '?' in address else '?'}{urlencode(options)}"


class Servers:
    """One of each kind for all these tests, started when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: dict[str, Any] = {}

    def _one(self, service: str, make: Callable[[], Any]) -> Any:
        require(service)
        if service not in self._running:
            self._running[service] = make()
            self._running[service].start()
        return self._running[service]

    def broker(self, kind: str) -> Broker:
        """An empty corner of a running server of this kind."""
        if kind in ("lane", "bullmq"):
            redis = self._one("redis", lambda: RedisServer(persist=True, appendfsync="always"))
            if kind == "lane":
                return Broker(kind, redis, redis.url, lease=1.0, alive_for=2.0, max_deliveries=2)
            url = redis.url.replace("redis://", "bullmq://")
            return Broker(kind, redis, url, lock=1.0, stalled_interval=1.0, failures_every=0.5)
        if kind == "rabbitmq":
            rabbit = self._one("rabbitmq", RabbitServer)
            return Broker(kind, rabbit, rabbit.url)
        if kind == "sqs":
            sqs = self._one("sqs", SqsServer)
            return Broker(kind, sqs, f"sqs://eu-west-1?endpoint={sqs.url}", visibility=2, wait=1, max_receives=2)
        postgres = self._one("postgres", lambda: EmbeddedPostgres(self._directory / "postgres"))
        return Broker(kind, postgres, postgres.url, lease=1.5, poll=0.2, max_deliveries=2)

    def close(self) -> None:
        for server in self._running.values():
            server.stop() if isinstance(server, EmbeddedPostgres) else server.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("brokers"))
    yield servers
    servers.close()


@pytest.fixture(params=["lane", "bullmq", "db", "rabbitmq", "sqs"])
def broker(request: pytest.FixtureRequest, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Broker:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return servers.broker(request.param)


def only(*kinds: str) -> pytest.MarkDecorator:
    """This test is about these brokers."""
    return pytest.mark.parametrize("broker", kinds, indirect=True)


class Workshop:
    """Worker processes on one broker, and one engine, in this process, that sends them errands."""

    def __init__(self, broker: Broker, directory: Path) -> None:
        self.broker = broker
        self.ledger = directory / "ledger.jsonl"
        self.log = directory / "workers.log"
        self.workers: list[subprocess.Popen[bytes]] = []
        self.transport = open_transport(broker.url)
        self.app = Durable(
            f"sqlite:///{directory}/runs.db",
            workflows=[five, one_slow, impatient, doomed],
            transport=self.transport,
            ask_every=1.0,
            lease=2.0,
            poll_every=0.2,
            role="engine",
        )

    def hire(self) -> subprocess.Popen[bytes]:
        """One more worker."""
        command = [sys.executable, "-m", "durable", "worker", "tests.chaos.errands:app", "--transport", self.broker.url]
        env = os.environ | {"CHAOS_LEDGER": str(self.ledger), "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            worker = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env)
        self.workers.append(worker)
        return worker

    def lines(self, what: str | None = None) -> list[tuple[str, int, int, str]]:
        """What the bodies have witnessed."""
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        found = [tuple(json.loads(line)) for line in lines]
        return [line for line in found if what is None or line[3] == what]

    async def journal(self, handle: RunHandle[Any]) -> list[Entry]:
        """The run's entries about remote steps."""
        [loaded] = await self.app.engine.deps.store.load([handle.id])
        return [entry for entry in loaded.entries if entry.kind == REMOTE]

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""

    async def until(self, fact: Callable[[], object], claim: str) -> None:
        try:
            await eventually(fact, claim, timeout=PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGCONT)
                worker.kill()
            worker.wait()


@asynccontextmanager
async def opened(broker: Broker, tmp_path: Path) -> AsyncIterator[Workshop]:
    workshop = Workshop(broker, tmp_path)
    try:
        async with workshop.app:
            yield workshop
    finally:
        workshop.close()


pytestmark = pytest.mark.timeout(120)


async def test_S14_kill_9_of_a_worker_in_the_middle_of_a_step(broker: Broker, tmp_path: Path) -> None:
    """The broker gives the task to another worker; the run gets one answer, the other worker's, and no recovery attempt is
    counted."""
    async with opened(broker, tmp_path) as workshop:
        first = workshop.hire()
        handle = await workshop.app.start(one_slow, 1.0)
        await workshop.until(lambda: workshop.lines("began"), "the step is under way")
        first.kill()
        second = workshop.hire()
        assert await handle.result(PATIENCE) == second.pid
        assert {line[2] for line in workshop.lines("done")} == {second.pid}
        record = await handle.get()
        assert record.recovery_attempts == 0


@only("lane", "bullmq", "db", "rabbitmq")
async def test_B28_the_broker_restarts_under_load(broker: Broker, tmp_path: Path) -> None:
    """kill -9 of the broker while a hundred five-step runs are under way: all of them finish, each step counted once."""
    async with opened(broker, tmp_path) as workshop:
        for _ in range(2):
            workshop.hire()
        handles = [await workshop.app.start(five, n) for n in range(100)]
        await workshop.until(lambda: len(workshop.lines("done")) >= 50, "they are at work")
        _fall(broker)
        await asyncio.sleep(0.3)
        broker.server.start()
        assert await asyncio.gather(*(handle.result(PATIENCE) for handle in handles)) == [n + 5 for n in range(100)]
        for handle in handles[:10]:
            statuses = Counter(entry.status for entry in await workshop.journal(handle))
            assert statuses["completed"] == 5


def _fall(broker: Broker) -> None:
    if isinstance(broker.server, EmbeddedPostgres):
        broker.server.stop("immediate")
    else:
        broker.server.kill()


@only("lane", "bullmq")
async def test_B18_flushall_after_dispatch(broker: Broker, tmp_path: Path) -> None:
    """Redis forgets everything while tasks wait for a worker, without any timeout: they are sent again and done."""
    import redis

    async with opened(broker, tmp_path) as workshop:
        handles = [await workshop.app.start(five, n) for n in range(10)]

        def waiting() -> int:
            return sum(
                1 for run in workshop.app.engine._executor.residents.values() for s in run.sent.values() if s.published
            )

        await workshop.until(lambda: waiting() == 10, "all are with the broker")
        with redis.Redis(port=broker.server.port) as client:
            client.flushall()
        workshop.hire()
        assert await asyncio.gather(*(handle.result(PATIENCE) for handle in handles)) == [n + 5 for n in range(10)]


async def test_S7_doubled_and_reordered_results(broker: Broker, tmp_path: Path) -> None:
    """Strangers echo every answer of a step three times, before and after it was taken, some without attempt: one is applied."""
    async with opened(broker, tmp_path) as workshop:
        other = open_transport(broker.url)
        await other.start()
        try:
            handle = await workshop.app.start(impatient, 0.0)
            await asyncio.sleep(0.1)
            for n in (3, 1, 2):
                for attempt in (1, None, 9):
                    await other.reply(
                        StepResult(
                            run_id=handle.id,
                            seq=0,
                            step_id=f"{handle.id}:0",
                            status="completed",
                            output=msgspec.Raw(b"%d" % n),
                            attempt=attempt,
                        )
                    )
            worker = workshop.hire()
            if broker.kind != "db":  # there an answer takes its task away
                await workshop.until(lambda: workshop.lines("done"), "the worker did it as well")
            await handle.signal("go")
            assert await handle.result(PATIENCE) in (1, 2, 3)
            assert worker.poll() is None
            statuses = Counter(entry.status for entry in await workshop.journal(handle))
            assert statuses["completed"] == 1
        finally:
            await other.close(1.0)


async def test_S9_a_worker_that_answers_after_its_step_was_retried(broker: Broker, tmp_path: Path) -> None:
    """SIGSTOP past the step's timeout; another worker does the second attempt; the sleeper wakes and answers: recorded as
    late or dropped, never applied."""
    async with opened(broker, tmp_path) as workshop:
        sleeper = workshop.hire()
        handle = await workshop.app.start(impatient, 0.2)
        await workshop.until(lambda: workshop.lines("began"), "the first attempt is under way")
        sleeper.send_signal(signal.SIGSTOP)
        second = workshop.hire()
        await workshop.until(
            lambda: any(line[2] == second.pid for line in workshop.lines("done")), "another has done it"
        )
        sleeper.send_signal(signal.SIGCONT)
        await workshop.until(
            lambda: any(line[2] == sleeper.pid for line in workshop.lines()) and sleeper.poll() is None, "it is back"
        )
        again = await workshop.app.start(five, 1)
        assert await again.result(PATIENCE) == 6
        await handle.signal("go")
        await handle.result(PATIENCE)
        statuses = Counter(entry.status for entry in await workshop.journal(handle))
        assert statuses["completed"] == 1


async def test_N13_a_remote_step_that_kills_its_workers_uses_up_its_retries(broker: Broker, tmp_path: Path) -> None:
    """Workers are hired again and again, and die: the broker gives up on each attempt, the step's retries end, the run
    fails and shows what happened; others are served meanwhile."""
    async with opened(broker, tmp_path) as workshop:
        handle = await workshop.app.start(doomed)
        result = asyncio.ensure_future(handle.result(PATIENCE * 2))
        worker = workshop.hire()
        while not result.done():
            if worker.poll() is not None:
                worker = workshop.hire()
            await asyncio.sleep(0.05)
        with pytest.raises(RunFailed) as failed:
            result.result()
        assert "remote step worker failed" in str(failed.value)
        attempts = Counter(line[1] for line in workshop.lines("killed"))
        assert set(attempts) == {1, 2}
        statuses = [entry.status for entry in await workshop.journal(handle) if entry.status in ("retrying", "failed")]
        assert statuses == ["retrying", "failed"]
        if worker.poll() is not None:
            workshop.hire()
        bystander = await workshop.app.start(five, 1)
        assert await bystander.result(PATIENCE) == 6
