"""The Redis lane, beyond what every transport owes: what becomes of work when a worker, an engine, a link or the server dies."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from redis.asyncio import Redis

from durable import Durable
from durable.core.errors import DefinitionError, EngineStopped, RunNotFound, TransportError
from durable.protocol.messages import Answer, ControlMessage, StepResult
from durable.testing.facts import PATIENCE, eventually
from durable.testing.suites.transport import ECHO, Gate, Results, answer, echo, output_of, task
from durable.transports.redis import RedisTransport
from durable.transports.redis_link import RedisLink, _Wire
from durable.transports.redis_settings import check
from tests.servers.redis import RedisServer
from tests.servers.services import require
from tests.transports.redis_node import far_steps

SHORT = 0.6
"""Seconds of a lease that is meant to run out."""
STREAM = f"durable-lane-tasks-{ECHO}"


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A Redis of the test's own, which keeps what it has when it is killed."""
    require("redis")
    server = RedisServer(persist=True, appendfsync="always")
    server.start()
    yield server
    server.close()


@asynccontextmanager
async def engine_end(
    url: str, take: Callable[[Answer], Awaitable[None]] | None = None, **options: Any
) -> AsyncIterator[tuple[RedisTransport, Results]]:
    transport, results = RedisTransport(url, **options), Results()
    transport.on_result(take or results.take)
    await transport.start()
    try:
        yield transport, results
    finally:
        await transport.close(0.1)


@asynccontextmanager
async def worker_end(
    url: str, handler: Any = echo, *groups: str, concurrency: int = 16, **options: Any
) -> AsyncIterator[RedisTransport]:
    transport = RedisTransport(url, **options)
    await transport.start()
    await transport.serve(groups or [ECHO], handler, concurrency=concurrency)
    try:
        yield transport
    finally:
        await transport.close(0.1)


class Node:
    """A process of tests/transports/redis_node.py."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def word(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            return (await self.process.stdout.readline()).decode().strip()

    async def says(self, *words: str) -> None:
        line = await self.word()
        assert line.split() == list(words), f"the other process said {line!r}"

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def node(role: str, url: str, lease: float = SHORT, *more: str) -> AsyncIterator[Node]:
    command = [sys.executable, "-m", "tests.transports.redis_node", role, url, str(lease), *more]
    one = Node(await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE))
    try:
        await one.says("ready")
        yield one
    finally:
        await one.kill()


async def persistently(transport: RedisTransport, *tasks: Any) -> None:
    """As an engine does: a dispatch that failed is tried again."""
    for each in tasks:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await transport.dispatch(each)
                    break
                except TransportError:
                    await asyncio.sleep(0.02)


async def until(fact: Callable[[], Awaitable[object]], claim: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await fact():
            await asyncio.sleep(0.01)


# -- workers that die


async def test_a_task_of_a_worker_killed_at_it_is_done_by_another(redis_url: str) -> None:
    """kill -9 in the middle of a step: once its lease is over another worker runs the task, and it is answered (S14)."""
    async with engine_end(redis_url) as (engine, results), node("worker", redis_url) as doomed:
        await engine.dispatch(task("r", name="hang"))
        await doomed.says("began", "r:0")
        await doomed.kill()
        async with worker_end(redis_url, echo, "hang", lease=SHORT):
            assert await engine.holding(["r:0"]) == ["r:0"]
            await eventually(lambda: "r:0" in results, "the other worker has answered")
            assert results["r:0"].status == "completed"


async def test_a_task_that_kills_its_workers_is_given_up(redis_url: str) -> None:
    """After so many workers were lost with it, it is answered failed and retryable, and run by nobody."""
    gate = Gate()
    async with engine_end(redis_url) as (engine, results):
        await engine.dispatch(task("r", name="hang"))
        for _ in range(2):
            async with node("worker", redis_url) as doomed:
                await doomed.says("began", "r:0")
        async with worker_end(redis_url, gate.handle, "hang", lease=SHORT, max_deliveries=2):
            await eventually(lambda: "r:0" in results, "it was answered")
        error = results["r:0"].error
        assert error is not None
        assert (error.code, error.retryable) == ("worker_failed", True)
        assert "given out 2 times" in error.message
        assert gate.started == []


async def test_a_worker_at_work_keeps_its_task(redis_url: str) -> None:
    """However long a step takes, nobody takes it from a worker that is alive."""
    first, second = Gate(), Gate()
    async with engine_end(redis_url) as (engine, results):
        async with worker_end(redis_url, first.handle, lease=0.3), worker_end(redis_url, second.handle, lease=0.3):
            await engine.dispatch(task("r"))
            await eventually(lambda: first.started or second.started, "one has it")
            await asyncio.sleep(1.0)  # three leases
            assert len(first.started) + len(second.started) == 1
            first.open()
            second.open()
            await eventually(lambda: "r:0" in results, "it was answered")


async def test_workers_that_are_gone_are_forgotten(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group does not collect the names of dead workers for ever."""
    from durable.transports.redis import tasks

    monkeypatch.setattr(tasks, "GONE_LEASES", 2)
    monkeypatch.setattr(tasks, "BLOCK_SECONDS", 0.1)
    async with Redis.from_url(redis_url) as other:
        async with node("worker", redis_url), engine_end(redis_url) as (engine, results):
            await engine.dispatch(task("r", name="quick"))
            await eventually(lambda: "r:0" in results, "it was answered")
        async with worker_end(redis_url, echo, "quick", lease=0.2):

            async def alone() -> bool:
                return len(await other.xinfo_consumers("durable-lane-tasks-quick", "workers")) == 1

            await until(alone, "only the live one is there")


async def test_a_worker_with_one_place_takes_one_task(redis_url: str) -> None:
    """However many names it serves, it leaves to others what it has no room for."""
    names = [f"suite.{letter}" for letter in "abcdef"]
    gate, free = Gate(), Gate()
    free.open()
    async with engine_end(redis_url) as (engine, results):
        for number, name in enumerate(names):
            await engine.dispatch(task(f"r{number}", name=name))
        async with worker_end(redis_url, gate.handle, *names, concurrency=1):
            await eventually(lambda: gate.started, "it has one")
            async with worker_end(redis_url, free.handle, *names):
                await eventually(lambda: len(results) == 5, "another has done all the others")
            gate.open()
            await eventually(lambda: len(results) == 6, "and this one its own")
            assert len(gate.started) == 1


# -- engines that die


async def test_answers_of_a_killed_engine_are_taken_by_another(redis_url: str) -> None:
    """kill -9 with answers unread: once it counts as gone, another engine takes them over, and none is lost."""
    async with worker_end(redis_url, echo, "quick"), node("engine", redis_url) as doomed:
        await doomed.says("heard", "orphan:0")
        await doomed.kill()
        async with engine_end(redis_url, alive_for=SHORT) as (other, results):
            await eventually(lambda: "orphan:0" in results, "it was taken over")
            await until(lambda: holds_nothing(other, "orphan:0"), "and is held no more")


async def holds_nothing(transport: RedisTransport, *ids: str) -> bool:
    return not await transport.holding(ids)


async def test_an_answer_whose_engine_is_gone_comes_to_whoever_is_there(redis_url: str) -> None:
    """At once where there is another engine; else it waits for the next one."""
    gate = Gate()
    async with worker_end(redis_url, gate.handle):
        async with engine_end(redis_url) as (engine, _):
            await engine.dispatch(task("a"))
            await engine.dispatch(task("b"))
            await eventually(lambda: len(gate.started) == 2, "both are under way")
        gate.open()
        async with Redis.from_url(redis_url) as other:
            await until(lambda: other.xlen("durable-lane-unclaimed"), "they wait for an engine")
        async with engine_end(redis_url) as (_, results):
            await eventually(lambda: results.keys() == {"a:0", "b:0"}, "the next engine has them")


async def test_what_a_stopped_engine_does_not_take_goes_to_another(redis_url: str) -> None:
    """EngineStopped: this engine hears no more, and its answers are another's within moments, long before it would count as
    gone."""
    stopped = 0

    async def stop(result: Answer) -> None:
        nonlocal stopped
        stopped += 1
        raise EngineStopped("this engine has been stopped")

    async with worker_end(redis_url), engine_end(redis_url, stop, alive_for=60) as (engine, _):
        async with engine_end(redis_url, alive_for=60) as (_, results):
            await engine.dispatch(task("r"))
            await eventually(lambda: "r:0" in results, "the other engine has it")
            await engine.dispatch(task("s"))
            await eventually(lambda: "s:0" in results, "and what came later")
            assert stopped == 1


async def test_an_answer_that_one_engine_cannot_take_is_offered_to_the_next(redis_url: str) -> None:
    """Its run may be another workspace's: after a few tries it goes round."""

    async def strange(result: Answer) -> None:
        raise RunNotFound("of another workspace", run_id="r")

    async with worker_end(redis_url), engine_end(redis_url, strange) as (engine, _):
        async with engine_end(redis_url) as (_, results):
            await engine.dispatch(task("r"))
            await eventually(lambda: "r:0" in results, "the other engine has it")


# -- the server, and the way to it


async def test_a_server_killed_and_started_again_loses_nothing(server: RedisServer) -> None:
    """With an append-only file: what was dispatched is done, what was under way is answered, and both ends go on by
    themselves. Meanwhile a dispatch fails within moments (B28)."""
    gate = Gate()
    async with engine_end(server.url) as (engine, results), worker_end(server.url, gate.handle, concurrency=2):
        for number in range(4):
            await engine.dispatch(task(f"r{number}"))
        await eventually(lambda: len(gate.started) == 2, "two are under way, two wait")
        server.kill()
        with pytest.raises(TransportError):
            async with asyncio.timeout(3):
                await engine.dispatch(task("away"))
        gate.open()
        server.start()
        await eventually(lambda: len(results) == 4, "all were answered")
        await persistently(engine, task("after"))
        await eventually(lambda: "after:0" in results, "and it goes on")
        await until(lambda: holds_nothing(engine, *results), "nothing is held")


async def test_links_that_are_cut_lose_nothing(redis_url: str) -> None:
    """Every connection of both ends is closed by the server, over and over, under load: each task that was accepted is
    answered."""
    async with engine_end(redis_url) as (engine, results), worker_end(redis_url, echo, lease=SHORT):
        async with Redis.from_url(redis_url) as other:
            for number in range(200):
                await persistently(engine, task(f"r{number}"))
                if number % 20 == 10:
                    await other.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await eventually(lambda: len(results) == 200, "all were answered")
            await until(lambda: holds_nothing(engine, *results), "nothing is held")


async def test_an_emptied_server_is_begun_anew(redis_url: str) -> None:
    """FLUSHALL: nothing is held any more, so an engine that asks sends again; groups are made anew, and answers of what was
    under way still come (B18)."""
    gate = Gate()
    async with engine_end(redis_url) as (engine, results), worker_end(redis_url, gate.handle, concurrency=1):
        await engine.dispatch(task("working"))
        await engine.dispatch(task("waiting"))
        await eventually(lambda: gate.started == ["working:0"], "one is under way")
        async with Redis.from_url(redis_url) as other:
            await other.flushall()
        assert await engine.holding(["working:0", "waiting:0"]) == []
        gate.open()
        await eventually(lambda: "working:0" in results, "what was under way is answered")
        await engine.dispatch(task("waiting"))
        await eventually(lambda: "waiting:0" in results, "what was lost and sent again, too")


async def test_a_server_that_stands_still_makes_a_dispatch_fail(server: RedisServer) -> None:
    """Its sockets open, it answers nothing: TransportError within seconds, and no hanging close."""
    async with engine_end(server.url) as (engine, _):
        server.pause()
        try:
            with pytest.raises(TransportError):
                async with asyncio.timeout(8):
                    await engine.dispatch(task("r"))
        finally:
            server.resume()


async def test_a_server_that_is_not_there_is_said(server: RedisServer) -> None:
    """`start` raises and leaves nothing running; a URL that is none is refused at once."""
    server.kill()
    with pytest.raises(TransportError, match="cannot be reached"):
        await RedisTransport(server.url).start()
    assert not [each for each in asyncio.all_tasks() if each.get_name().startswith("durable-")]
    with pytest.raises(DefinitionError):
        RedisTransport("http://somewhere")


# -- what no engine or worker can read


async def test_what_cannot_be_read_is_put_away_and_the_lane_goes_on(redis_url: str) -> None:
    """(A44) Rubbish among tasks and answers: each is found in the stream of the dead, and the next message is read."""
    async with engine_end(redis_url) as (engine, results), worker_end(redis_url) as worker:
        async with Redis.from_url(redis_url) as other:
            await other.xadd(STREAM, {"t": b"\xff rubbish", "r": "nobody"})
            await other.xadd(STREAM, {"strange": "1"})
            await other.xadd(f"durable-lane-results-{engine._instance}", {"a": b"{}"})
            await engine.dispatch(task("r"))
            await eventually(lambda: "r:0" in results, "the next one was answered")
            await until(lambda: dead(other, 3), "all three were put away")
            assert await other.xlen(STREAM) == 0
            assert worker._bench.tasks == []


async def dead(other: Redis, count: int) -> bool:
    return int(await other.xlen("durable-dead")) == count


async def test_streams_and_keys_do_not_grow(redis_url: str) -> None:
    """After five hundred tasks there is nothing left of them, and after both ends have closed nothing but the groups."""
    async with Redis.from_url(redis_url) as other:
        async with engine_end(redis_url) as (engine, results), worker_end(redis_url):
            await asyncio.gather(*(engine.dispatch(task(f"r{number}", input=number)) for number in range(500)))
            await eventually(lambda: len(results) == 500, "all were answered")
            await until(lambda: holds_nothing(engine, *results), "nothing is held")
            assert all(output_of(results[f"r{number}:0"]) == str(number).encode() for number in range(500))
            assert await other.xlen(STREAM) == 0
            assert await other.xlen(f"durable-lane-results-{engine._instance}") == 0
        assert await other.keys("*") == [STREAM.encode()]
        assert await other.xinfo_consumers(STREAM, "workers") == []


async def test_a_newer_attempt_is_held_though_the_older_was_answered(redis_url: str) -> None:
    """The answer of one attempt does not hide that another is under way."""
    gate = Gate()
    async with engine_end(redis_url) as (engine, results):
        await engine.dispatch(task("r", attempt=1))
        await engine.dispatch(task("r", attempt=2))

        async def handle(given: Any) -> StepResult:
            return answer(given) if given.attempt == 1 else await gate.handle(given)

        async with worker_end(redis_url, handle):
            await eventually(lambda: results.heard and gate.started, "the first was answered, the second is under way")
            assert await engine.holding(["r:0"]) == ["r:0"]
            gate.open()
            await until(lambda: holds_nothing(engine, "r:0"), "then it is held no more")


async def test_a_cancelled_run_frees_its_workers(redis_url: str) -> None:
    """`cancel {runId}` on the control channel cancels all tasks of the run, and no other. They are answered as cancelled: a run
    that cleans up may still wait for one of them."""
    gate = Gate()
    async with engine_end(redis_url) as (engine, results), worker_end(redis_url, gate.handle):
        for seq in (0, 1):
            await engine.dispatch(task("r", seq=seq))
        await engine.dispatch(task("other"))
        await eventually(lambda: len(gate.started) == 3, "all are under way")
        await engine.publish_control(ControlMessage(sender="somebody", kind="cancel", run_id="r"))
        await eventually(lambda: sorted(gate.cancelled) == ["r:0", "r:1"], "both were cancelled")
        gate.open()
        await eventually(lambda: len(results.heard) == 3, "all are answered")
        codes = {one.id: one.error.code for one in results.heard if one.error is not None}
        assert codes == {"r:0": "step_cancelled", "r:1": "step_cancelled"}
        await until(lambda: holds_nothing(engine, "r:0", "r:1", "other:0"), "nothing is held")


async def test_deployments_with_other_prefixes_keep_apart(redis_url: str) -> None:
    """A namespace is enough."""
    async with engine_end(redis_url, namespace="blue") as (blue, heard), engine_end(redis_url) as (_, stray):
        async with worker_end(redis_url), worker_end(redis_url, namespace="blue"):
            await blue.dispatch(task("r"))
            await eventually(lambda: "r:0" in heard, "it came home")
            assert stray == {}


async def test_a_worker_of_another_make_needs_no_more_than_the_page(redis_url: str) -> None:
    """Plain commands, as protocol/redis-lane.md has them: it reads a task, answers it without naming an attempt, and the
    engine holds it no more."""
    async with engine_end(redis_url) as (engine, results), Redis.from_url(redis_url, decode_responses=True) as other:
        await engine.dispatch(task("r", input={"a": 1}))
        await other.xgroup_create(STREAM, "workers", "0", mkstream=True)
        ((_, ((entry, fields),)),) = await other.xreadgroup("workers", "them", {STREAM: ">"}, count=1)
        sent = json.loads(fields["t"])
        said = {
            "runId": sent["runId"],
            "seq": sent["seq"],
            "stepId": sent["stepId"],
            "status": "completed",
            "output": 7,
        }
        async with other.pipeline(transaction=True) as pipe:
            pipe.xack(STREAM, "workers", entry)
            pipe.xdel(STREAM, entry)
            pipe.xadd(f"durable-lane-results-{fields['r']}", {"a": json.dumps(said)})
            await pipe.execute()
        await eventually(lambda: "r:0" in results, "the answer was heard")
        assert output_of(results["r:0"]) == b"7"
        await until(lambda: holds_nothing(engine, "r:0"), "it is held no more")


# -- settings


def test_settings_that_lose_work_are_said() -> None:
    """A replica, a cluster and a server that is too old are refused."""
    good = {"role": "master", "cluster_enabled": "0", "redis_version": "7.2.4"}
    check(good)
    for bad in ({"role": "slave"}, {"cluster_enabled": "1"}, {"redis_version": "6.0.9"}):
        with pytest.raises(TransportError):
            check(good | bad)


async def test_a_server_that_evicts_is_complained_of_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """Read from the server itself."""
    require("redis")
    server = RedisServer(**{"maxmemory-policy": "allkeys-lru"})
    server.start()
    try:
        async with engine_end(server.url):
            assert "noeviction" in caplog.text
            assert "appendonly yes" in caplog.text
    finally:
        server.close()


# -- the whole of it


async def test_a_workflow_outlives_the_workers_of_its_steps(redis_url: str) -> None:
    """Steps in another process, which is killed at one of them: a second process takes over, and the run completes."""
    async with Durable("memory://", workflows=[far_steps], transport=RedisTransport(redis_url)) as app:
        async with node("app", redis_url, SHORT, "doomed") as first:
            handle = await app.start(far_steps, "doomed")
            await first.says("began", handle.id)
            await first.kill()
            async with node("app", redis_url, SHORT, "nobody"):
                assert await handle.result(PATIENCE) == ["doomed", "doomed", 3]


@pytest.mark.parametrize("when", ["while the step runs", "after its answer came"])
async def test_a_workflow_outlives_the_engine_that_sent_its_steps(redis_url: str, postgres_url: str, when: str) -> None:
    """kill -9 of the engine while a step of its run is under way elsewhere, or once its answer is on its way home: another
    engine takes the run over and hears the answer, and the step has run once."""
    gate = Gate()

    async def handle(given: Any) -> StepResult:
        return await gate.handle(given) if given.name == "hang" else answer(given)

    options = {"lease": SHORT, "alive_for": SHORT}
    async with worker_end(redis_url, handle, "quick", "hang", **options):
        async with node("run", redis_url, SHORT, postgres_url) as doomed:
            run_id = await doomed.word()
            await eventually(lambda: gate.started == [f"{run_id}:1"], "its step is under way")
            await until(lambda: published(postgres_url, run_id, 2), "and known to be")  # else it is sent once more
            if when == "after its answer came":
                doomed.process.send_signal(signal.SIGSTOP)
                gate.open()
                async with Redis.from_url(redis_url) as other:
                    await until(lambda: waits(other), "its answer lies in its stream")
        transport = RedisTransport(redis_url, **options)
        async with Durable(postgres_url, workflows=[far_steps], transport=transport, lease=SHORT) as app:
            gate.open()
            assert await app.run(run_id).result(PATIENCE) == ["x", "x", 3]
        assert gate.started == [f"{run_id}:1"]


async def published(postgres_url: str, run_id: str, count: int) -> bool:
    async with await psycopg.AsyncConnection.connect(postgres_url) as connection:
        found = await connection.execute(
            "SELECT count(*) FROM durable.journal WHERE run_id = %s AND status = 'published'", [run_id]
        )
        row = await found.fetchone()
    return row is not None and row[0] == count


async def waits(other: Redis) -> bool:
    streams = [key async for key in other.scan_iter("durable-lane-results-*")]
    return any([await other.xlen(stream) for stream in streams])


async def test_a_link_cut_in_the_moment_it_was_opened_fails_its_first_question(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of a connection that broke between its opening and the question gets an error at once, never silence; the
    next question opens another (B28)."""
    link = RedisLink(redis_url, name="test")
    ready = RedisLink._loaded

    async def cut(self: RedisLink, wire: _Wire) -> None:
        await ready(self, wire)
        asyncio.get_running_loop().call_soon(wire.fail, ConnectionError("cut"))

    monkeypatch.setattr(RedisLink, "_loaded", cut)
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(TransportError, match="lost"):
            await link.one("PING")
        monkeypatch.undo()
        assert await link.one("PING") == b"PONG"
    await link.close()
