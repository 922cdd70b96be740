"""BullMQ beyond what every transport owes: what stands in Redis, what comes back as failed, and Redis going away."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
from bullmq import Queue, Worker
from redis.asyncio import Redis

from durable.core.errors import DefinitionError, EngineStopped, MessageRefused, TransportError
from durable.protocol.messages import (
    Answer,
    ControlMessage,
    Heartbeat,
    StepResult,
    Task,
    WorkflowDecision,
    WorkflowStepEvent,
    WorkflowTask,
)
from durable.testing.facts import eventually
from durable.testing.suites.transport import ECHO, TURN, Gate, Results, answer, echo, output_of, task
from durable.transports.bullmq import BullMQTransport, link, transport
from durable.transports.bullmq.jobs import JobQueue, Scriptbook
from durable.transports.bullmq.link import Link
from tests.servers.redis import RedisServer
from tests.servers.services import require


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A Redis of the test's own that keeps what it has, to be killed."""
    require("redis")
    server = RedisServer(persist=True)
    server.start()
    yield server
    server.close()


class House:
    """A prefix, and ends that are closed with the test."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url = url
        self.prefix = f"t-{secrets.token_hex(4)}"
        self._stack = stack
        self.redis = Redis.from_url(url)
        stack.push_async_callback(self.redis.aclose)

    def build(self, **options: Any) -> BullMQTransport:
        given: dict[str, Any] = {"prefix": self.prefix, "heartbeat_interval": 0.02, "failures_every": 0.05} | options
        return BullMQTransport(self.url, **given)

    async def engine(
        self, take: Callable[[Answer], Awaitable[None]] | None = None, **options: Any
    ) -> tuple[BullMQTransport, Results]:
        end, results = self.build(**options), Results()
        end.on_result(take or results.take)
        await self.started(end)
        return end, results

    async def worker(self, handler: Any = echo, group: str = ECHO, **options: Any) -> BullMQTransport:
        end = self.build(**options)
        await self.started(end)
        await end.serve([group], handler)
        return end

    async def started(self, end: BullMQTransport) -> None:
        await end.start()
        self._stack.push_async_callback(end.close, 0.1)

    def queue(self, name: str) -> Queue:
        """BullMQ's own."""
        queue = Queue(f"{self.prefix}-{name}", {"connection": self.url})
        self._stack.push_async_callback(queue.close)
        return queue

    def foreign(self, name: str, handle: Any, **options: Any) -> Worker:
        """BullMQ's own worker."""
        worker = Worker(f"{self.prefix}-{name}", handle, {"connection": self.url, **options})
        self._stack.push_async_callback(worker.close, True)
        return worker

    def taker(self, name: str, lock: float) -> JobQueue:
        """Hands that take jobs and die with them."""
        link = Link(self.url, timeout=2.0)
        self._stack.push_async_callback(link.close)
        return JobQueue(Scriptbook(link), f"{self.prefix}-{name}", lock_ms=int(lock * 1000))

    async def job(self, name: str) -> dict[str, Any]:
        """The one job that waits in a queue, as it stands in Redis."""
        base = f"bull:{self.prefix}-{name}"
        ids = await self.redis.lrange(f"{base}:wait", 0, -1) + await self.redis.zrange(f"{base}:prioritized", 0, -1)
        assert len(ids) == 1
        fields = await self.redis.hgetall(f"{base}:{ids[0].decode()}")
        return {key.decode(): value.decode() for key, value in fields.items()}

    async def dead(self) -> list[dict[str, Any]]:
        base = f"bull:{self.prefix}-dead"
        ids = await self.redis.lrange(f"{base}:wait", 0, -1)
        return [json.loads(await self.redis.hget(f"{base}:{id.decode()}", "data")) for id in ids]

    async def failed(self, group: str = ECHO) -> int:
        return int(await self.redis.zcard(f"bull:{self.prefix}-tasks-{group}:failed"))


@asynccontextmanager
async def housed(url: str) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        yield House(url, stack)


@pytest.fixture
async def house(redis_url: str) -> AsyncIterator[House]:
    async with housed(redis_url) as house:
        yield house


async def settled(look: Callable[[], Awaitable[bool]], claim: str) -> None:
    """Like `eventually`, for a fact that stands in Redis."""
    for _ in range(2000):
        if await look():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never came true: {claim}")


# -- what stands in Redis


async def test_a_task_is_a_job_of_its_group(house: House) -> None:
    """Queue by routing token, name `task`, the message as a JSON object; removed when done, kept a day when failed, and never
    tried again by BullMQ."""
    end, _ = await house.engine()
    sent = msgspec.structs.replace(task("r", name="pay:charge", seq=2, input={"ü": 1}), group="pay-charge@eu")
    await end.dispatch(sent)
    job = await house.job("tasks-pay-charge@eu")
    assert job["name"] == "task"
    assert json.loads(job["data"]) == {
        "runId": "r", "seq": 2, "stepId": "r:2", "name": "pay:charge", "group": "pay-charge@eu", "input": {"ü": 1},
        "attempt": 1,
    }  # fmt: skip
    options = json.loads(job["opts"])
    assert options["removeOnComplete"] is True
    assert options["removeOnFail"] == {"age": 86400}
    assert not options.get("attempts")
    assert not options.get("backoff")
    assert not options.get("jobId")
    assert job["priority"] == "0"


async def test_a_turn_is_a_job_of_another_name(house: House) -> None:
    """A hosted workflow's turn shares the queue of its group, as a job called `workflow`."""
    end, _ = await house.engine()
    await end.dispatch(msgspec.json.decode(TURN, type=WorkflowTask))
    job = await house.job("tasks-suite-flow")
    assert (job["name"], json.loads(job["data"])["taskId"]) == ("workflow", "r:wf:0123abcd")


@pytest.mark.parametrize(
    ("ours", "theirs"), [(0, 1048576), (5, 1048571), (-7, 1048583), (2_000_000, 1), (-2_000_000, 2097151)]
)
async def test_a_priority_is_turned_round(house: House, ours: int, theirs: int) -> None:
    """Higher is sooner here, lower is sooner there; what is beyond BullMQ's range is cut to it."""
    end, _ = await house.engine()
    await end.dispatch(msgspec.structs.replace(task("r"), priority=ours))
    assert (await house.job(f"tasks-{ECHO}"))["priority"] == str(theirs)


async def test_the_urgent_go_first(house: House) -> None:
    """Of tasks with a priority that wait, the highest is worked on first."""
    end, results = await house.engine()
    for n in (1, 9, 5):
        await end.dispatch(msgspec.structs.replace(task(f"r{n}"), priority=n))
    worker = house.build()
    await house.started(worker)
    await worker.serve([ECHO], echo, concurrency=1)
    await eventually(lambda: len(results) == 3, "all were answered")
    assert [result.run_id for result in results.heard] == ["r9", "r5", "r1"]


@pytest.mark.parametrize("kind", ["result", "decision"])
async def test_answers_are_jobs_that_leave_nothing(house: House, kind: str) -> None:
    """Results and decisions each have one queue for all engines, and are removed whatever becomes of them."""
    worker = await house.worker()
    if kind == "result":
        await worker.reply(answer(task("r"), {"x": 1}))
    else:
        await worker.reply(WorkflowDecision(task_id="r:wf:0123abcd", run_id="r", status="completed"))
    job = await house.job(f"{kind}s")
    options = json.loads(job["opts"])
    assert job["name"] == kind
    assert (options["removeOnComplete"], options["removeOnFail"]) == (True, True)
    engine, heard = house.build(), []

    async def take(answer: Answer) -> None:
        heard.append(answer.id)

    engine.on_result(take)
    await house.started(engine)
    await eventually(lambda: heard, "an engine took it")

    async def gone() -> bool:
        return not [key async for key in house.redis.scan_iter(f"bull:{house.prefix}-{kind}s:[0-9]*")]

    await settled(gone, "nothing is left of it")


async def test_names_bear_prefix_and_namespace(house: House) -> None:
    """A namespace has queues of its own; `default` is none."""
    end, _ = await house.engine(namespace="acme")
    same, _ = await house.engine(namespace="default")
    assert (end.prefix, same.prefix) == (f"{house.prefix}-acme", house.prefix)
    await end.dispatch(task("r"))
    assert await house.redis.llen(f"bull:{house.prefix}-acme-tasks-{ECHO}:wait") == 1


async def test_a_worker_of_bullmqs_own_is_as_good(house: House) -> None:
    """A plain BullMQ worker takes the task as an object and answers with a plain `add`."""
    end, results = await house.engine()
    back = house.queue("results")

    async def handle(job: Any, token: str) -> None:
        sent = job.data
        result = {"runId": sent["runId"], "seq": sent["seq"], "stepId": sent["stepId"], "status": "completed"}
        await back.add("result", result | {"output": {"had": sent["input"]}}, {"removeOnComplete": True})

    house.foreign(f"tasks-{ECHO}", handle)
    await end.dispatch(task("r", input=[1]))
    await eventually(lambda: "r:0" in results, "it was answered")
    assert msgspec.json.decode(output_of(results["r:0"])) == {"had": [1]}
    assert results["r:0"].attempt is None


async def test_an_engine_of_bullmqs_own_is_as_good(house: House) -> None:
    """A plain BullMQ queue adds a task, and finds our worker's answer in the results."""
    await house.worker()
    tasks = house.queue(f"tasks-{ECHO}")
    heard: list[Any] = []

    async def take(job: Any, token: str) -> None:
        heard.append((job.name, job.data))

    house.foreign("results", take)
    data = {
        "runId": "r",
        "seq": 0,
        "stepId": "r:0",
        "name": ECHO,
        "group": ECHO,
        "input": {"a": 1},
        "attempt": 1,
        "new": 2,
    }
    await tasks.add("task", data, {"removeOnComplete": True})
    await eventually(lambda: heard, "the answer was there")
    name, result = heard[0]
    assert (name, result["stepId"], result["status"], result["output"]) == ("result", "r:0", "completed", {"a": 1})


# -- what BullMQ has given up on


async def test_a_failed_job_is_a_failed_result(house: House) -> None:
    """What BullMQ itself fails is told to an engine once, retryable, with its reason, and stays to be looked at."""
    end, results = await house.engine()

    async def handle(job: Any, token: str) -> None:
        raise RuntimeError("out of memory")

    house.foreign(f"tasks-{ECHO}", handle)
    await end.dispatch(task("r", attempt=3))
    await eventually(lambda: "r:0" in results, "it came back")
    result = results["r:0"]
    assert result.error is not None
    assert (result.status, result.error.message, result.attempt) == (
        "failed",
        "remote step worker failed: out of memory",
        3,
    )
    assert result.error.retryable
    other, again = await house.engine()
    await other.dispatch(task("next"))
    await eventually(lambda: "next:0" in results or "next:0" in again, "another failure is told of")
    assert [r.step_id for r in results.heard + again.heard].count("r:0") == 1
    assert await house.failed() == 2


async def test_a_failure_waits_for_an_engine(house: House) -> None:
    """A job that failed while no engine was there is told to the one that comes, though it has sent nothing itself."""
    first, _ = await house.engine(failures_every=3600.0)

    async def handle(job: Any, token: str) -> None:
        raise RuntimeError("no engine saw this")

    await first.dispatch(task("r"))
    house.foreign(f"tasks-{ECHO}", handle)
    await first.close()

    async def has_failed() -> bool:
        return await house.failed() == 1

    await settled(has_failed, "it failed")
    _, results = await house.engine()
    await eventually(lambda: "r:0" in results, "the next engine was told")


async def test_a_failure_is_told_until_it_is_taken(house: House) -> None:
    """An engine that cannot take a failure hears of it again."""
    heard: list[str] = []

    async def take(answer: Answer) -> None:
        heard.append(answer.id)
        if len(heard) < 3:
            raise ConnectionError("the store is away")

    end, _ = await house.engine(take)

    async def handle(job: Any, token: str) -> None:
        raise RuntimeError("boom")

    house.foreign(f"tasks-{ECHO}", handle)
    await end.dispatch(task("r"))
    await eventually(lambda: len(heard) == 3, "it was told until it was taken")


async def test_a_job_that_lost_its_workers_runs_again_and_then_fails(house: House) -> None:
    """A worker that dies with a task loses it to another; one that dies too often with it, to nobody: the engine hears (S13)."""
    fast = {"stalled_interval": 0.1}
    end, results = await house.engine(**fast)
    dying = house.taker(f"tasks-{ECHO}", lock=0.2)
    await end.dispatch(task("once"))
    assert (await dying.take())[0] is not None
    worker = await house.worker(**fast)
    await eventually(lambda: "once:0" in results, "another worker ran it")
    assert results["once:0"].status == "completed"
    await worker.close()
    await end.dispatch(task("twice"))
    for _ in range(2):
        taken = None
        while taken is None:
            taken, _ = await dying.take()
            if taken is None:
                await dying.check_stalled(1, 100)
                await asyncio.sleep(0.05)
    await house.worker(**fast)
    await eventually(lambda: "twice:0" in results, "the engine was told")
    error = results["twice:0"].error
    assert error is not None
    assert error.message == "remote step worker failed: job stalled more than allowable limit"
    assert error.retryable


async def test_a_job_that_is_no_task_harms_nobody(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """Rubbish in a group's queue fails for good and stays to be seen; where it says whose it is, its run hears. Tasks go on."""
    end, results = await house.engine()
    await house.worker()
    tasks = house.queue(f"tasks-{ECHO}")
    await tasks.add("task", {"what": "ever"}, {})
    await tasks.add("task", {"runId": "r", "seq": 1, "stepId": "r:1", "name": 7}, {})
    await end.dispatch(task("good"))
    await eventually(
        lambda: {"good:0", "r:1"} <= set(results), "the good one and the one with an address were answered"
    )
    error = results["r:1"].error
    assert error is not None
    assert "it is no task" in error.message
    assert await house.failed() == 2
    assert "is no task, so nobody is told of it" in caplog.text


# -- answers that cannot be taken


@pytest.mark.parametrize("rubbish", [{"what": "ever"}, "text", 7, None, {"runId": "r", "seq": -1, "stepId": "r:-1"}])
async def test_an_unreadable_answer_is_put_away(house: House, rubbish: Any) -> None:
    """An answer that is nobody's is kept where an operator finds it, with the reason; the next one is heard."""
    _, results = await house.engine()
    back = house.queue("results")
    await back.add("result", rubbish, {"removeOnComplete": True, "removeOnFail": True})
    worker = await house.worker()
    await worker.reply(answer(task("r")))
    await eventually(lambda: "r:0" in results, "the next one was heard")

    async def put_away() -> bool:
        return bool(await house.dead())

    await settled(put_away, "it was put away")
    [found] = await house.dead()
    assert found["queue"] == f"{house.prefix}-results"
    assert json.loads(found["data"]) == rubbish
    assert found["reason"]


async def test_a_refused_answer_is_put_away(house: House) -> None:
    """What the engine refuses for good is kept with its words, and is out of the way."""

    async def take(answer: Answer) -> None:
        raise MessageRefused("it does not echo its token")

    await house.engine(take)
    worker = await house.worker()
    await worker.reply(answer(task("forged")))

    async def put_away() -> bool:
        return bool(await house.dead())

    await settled(put_away, "it was put away")
    assert (await house.dead())[0]["reason"] == "it does not echo its token"
    assert await house.redis.llen(f"bull:{house.prefix}-results:active") == 0


async def test_an_answer_goes_from_an_engine_that_stops_to_another(house: House) -> None:
    """EngineStopped gives the answer back at once, and its engine takes no more."""
    stopped: list[str] = []

    async def stop(answer: Answer) -> None:
        stopped.append(answer.id)
        raise EngineStopped("stopping")

    await house.engine(stop)
    worker = await house.worker()
    await worker.reply(answer(task("r")))
    await eventually(lambda: stopped, "the first engine refused")
    _, results = await house.engine()
    for n in range(5):
        await worker.reply(answer(task(f"more{n}")))
    await eventually(lambda: len(results) == 6, "the other engine heard them all")
    assert stopped == ["r:0"]


async def test_an_answer_that_nobody_can_take_waits_and_is_never_lost(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer whose engine goes on failing leaves it for the queue, ever later, so that another may have it; none is
    lost, and none is tried in a hot loop."""
    monkeypatch.setattr(transport, "NEAR_SECONDS", 0.05)
    tries: list[float] = []

    async def fail(answer: Answer) -> None:
        tries.append(time.monotonic())
        raise ConnectionError("my store is away")

    first, _ = await house.engine(fail)
    worker = await house.worker()
    await worker.reply(answer(task("r")))

    async def delayed() -> bool:
        return await house.redis.zcard(f"bull:{house.prefix}-results:delayed") == 1

    await settled(delayed, "it went back, for later")
    assert 1 <= len(tries) <= 3
    _, results = await house.engine()
    await first.close()
    await eventually(lambda: "r:0" in results, "another engine had it in the end")


async def test_an_answer_outlives_its_engines(house: House) -> None:
    """Engines that die with an answer in their hands, again and again, leave it to the next: BullMQ never fails it."""
    worker = await house.worker()
    await worker.reply(answer(task("r")))
    dying = house.taker("results", lock=0.1)
    for n in range(3):
        taken = None
        while taken is None:
            taken, _ = await dying.take()
            if taken is None:
                await dying.check_stalled(0, 20)  # as strict as can be
                await asyncio.sleep(0.03)
        assert taken.starts == n + 1
    _, results = await house.engine(stalled_interval=0.05)
    await eventually(lambda: "r:0" in results, "the next engine had it")


@pytest.mark.parametrize("cut", [False, True], ids=["calm", "cut"])
async def test_what_waits_for_its_time_comes_at_its_time(house: House, cut: bool) -> None:
    """A delayed job is taken when it is due, not at the next whole second; also where the links are cut meanwhile (B28)."""
    seen: list[float] = []

    async def handle(task: Task) -> StepResult:
        seen.append(time.time())
        return answer(task)

    await house.worker(handle)
    tasks = house.queue(f"tasks-{ECHO}")
    due = time.time() + 1.1
    data = json.loads(msgspec.json.encode(task("r", input=1)))
    await tasks.add("task", data, {"delay": 1100, "removeOnComplete": True})
    if cut:
        await house.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await eventually(lambda: seen, "it was taken")
    assert -0.1 < seen[0] - due < 0.8  # at the next whole second it would be 0.9


async def test_events_of_steps_are_drained(house: House) -> None:
    """Step events leave their queue though nobody has asked for them; who has asked hears them, and may fail."""
    told: list[WorkflowStepEvent] = []

    async def hear(event: WorkflowStepEvent) -> None:
        told.append(event)
        raise RuntimeError("a listener's own trouble")

    end = house.build()
    end.on_result(Results().take)
    end.on_step_event(hear)
    await house.started(end)
    queue = house.queue("step-events")
    event = {"runId": "r", "seq": 1, "name": "n", "phase": "running", "startedAt": 5}
    await queue.add("stepEvent", event, {"removeOnComplete": True, "removeOnFail": True})
    await queue.add("stepEvent", event | {"phase": "completed"}, {"removeOnComplete": True, "removeOnFail": True})
    await eventually(lambda: len(told) == 2, "both were heard")
    assert sorted(event.phase for event in told) == ["completed", "running"]

    async def empty() -> bool:
        return not [key async for key in house.redis.scan_iter(f"bull:{house.prefix}-step-events:[0-9]*")]

    await settled(empty, "nothing is left")


# -- Redis goes away


async def test_redis_that_is_not_there_is_said_at_start() -> None:
    """A server nobody answers at is a TransportError with a sentence, within seconds (B55); a URL that is none, a
    DefinitionError."""
    begun = time.monotonic()
    with pytest.raises(TransportError, match=r"Redis cannot be reached.*Check the URL"):
        await BullMQTransport("redis://127.0.0.1:1/0").start()
    assert time.monotonic() - begun < 8
    with pytest.raises(DefinitionError, match="URL"):
        BullMQTransport("http://example.com")


async def test_options_of_the_driver_in_the_url_do_no_harm(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """A URL may say what the driver is to do; waiting for work is not cut short by it, and answers are read all the same."""
    end = BullMQTransport(f"{house.url}?socket_timeout=0.1&protocol=3", prefix=house.prefix)
    await house.started(end)
    await end.serve([ECHO], echo)
    engine, results = await house.engine()
    await asyncio.sleep(0.3)
    await engine.dispatch(task("r"))
    await eventually(lambda: "r:0" in results, "it was answered")
    assert "cannot be read" not in caplog.text


def test_missing_drivers_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra an import says what to install."""
    for name in [name for name in sys.modules if name.startswith("durable.transports.bullmq")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bullmq.job", None)
    with pytest.raises(DefinitionError, match=r"durable\[redis\]"):
        importlib.import_module("durable.transports.bullmq")


async def test_dispatch_while_redis_is_away_fails_soon(server: RedisServer) -> None:
    """Neither a dead server nor one that says nothing lets a dispatch hang; nor is the task sent later in secret."""
    async with housed(server.url) as house:
        end, results = await house.engine(timeout=0.5)
        await house.worker()
        server.pause()
        begun = time.monotonic()
        with pytest.raises(TransportError, match="did not answer within"):
            await end.dispatch(task("silent"))
        assert time.monotonic() - begun < 3
        server.resume()
        server.kill()
        begun = time.monotonic()
        with pytest.raises(TransportError, match="cannot be reached"):
            await end.dispatch(task("dead"))
        assert time.monotonic() - begun < 3
        server.start()
        await until_taken(end, task("after"))
        await eventually(lambda: "after:0" in results, "it works again")
        assert "dead:0" not in results


async def until_taken(end: BullMQTransport, sent: Task) -> None:
    """What the engine does with a dispatch that failed."""
    for _ in range(200):
        try:
            return await end.dispatch(sent)
        except TransportError:
            await asyncio.sleep(0.05)
    raise AssertionError("never taken")


async def test_everything_goes_on_when_redis_is_back(server: RedisServer) -> None:
    """Over a restart of the server: tasks, answers, beats, cancels and control messages all go on by themselves (B28)."""
    async with housed(server.url) as house:
        beats: list[Heartbeat] = []
        end, results = house.build(), Results()
        end.on_result(results.take)
        end.on_heartbeat(beats.append)
        await house.started(end)
        gate = Gate()
        worker = await house.worker(gate.handle)
        heard: list[ControlMessage] = []
        end.on_control("me", heard.append)
        await end.dispatch(task("before"))
        await eventually(lambda: beats, "it beats")
        server.kill()
        server.start()
        beats.clear()
        await eventually(lambda: beats, "beats are heard again")
        await end.dispatch(task("unwanted"))
        await eventually(lambda: "unwanted:0" in gate.started, "tasks are taken again")

        async def cancelled() -> bool:
            await end.cancel("unwanted:0")
            return "unwanted:0" in gate.cancelled

        await settled(cancelled, "cancels are heard again")
        await worker.publish_control(ControlMessage(sender="you", kind="enqueued", run_id="x"))
        await eventually(lambda: any(one.run_id == "x" for one in heard), "control messages are heard again")
        gate.open()
        await eventually(lambda: "before:0" in results, "what was under way is answered")


async def test_an_answer_outlives_an_outage(server: RedisServer) -> None:
    """A body that ends while Redis is away has not worked for nothing: its answer is sent when Redis is back."""
    async with housed(server.url) as house:
        gate = Gate()
        end, results = await house.engine()
        await house.worker(gate.handle)
        await end.dispatch(task("r"))
        await eventually(lambda: gate.started, "it is under way")
        server.kill()
        gate.open()
        await asyncio.sleep(0.2)
        server.start()
        await eventually(lambda: "r:0" in results, "the answer arrived")
        assert gate.started == ["r:0"]


async def test_links_that_are_cut_are_made_again(house: House) -> None:
    """Every connection cut by the server at once costs nothing but a moment (B28)."""
    end, results = await house.engine()
    await house.worker()
    for n in range(3):
        for kind in ("normal", "pubsub"):
            await house.redis.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        await until_taken(end, task(f"r{n}"))
        await eventually(lambda n=n: f"r{n}:0" in results, "it was answered")


async def test_scripts_that_the_server_has_forgotten_are_sent_again(house: House) -> None:
    """A server without the scripts, as after a restart or a failover, gets them."""
    end, results = await house.engine()
    await house.worker()
    await house.redis.script_flush()
    await asyncio.gather(*(end.dispatch(task(f"r{n}")) for n in range(20)))
    await eventually(lambda: len(results) == 20, "all were answered")


async def test_tasks_that_redis_has_lost_come_back_as_failed(house: House) -> None:
    """After FLUSHALL a task without a timeout is not waited for for ever: it counts as failed, retryable (B18). What was
    answered is not told of again."""
    end, results = await house.engine()
    worker = await house.worker()
    await end.dispatch(task("done"))
    await eventually(lambda: "done:0" in results, "one is done")
    await worker.close()
    await end.dispatch(task("lost", attempt=2))
    await house.redis.flushdb()
    await eventually(lambda: "lost:0" in results, "the loss was noticed")
    error = results["lost:0"].error
    assert error is not None
    assert "Redis no longer has the task" in error.message
    assert error.retryable
    assert results["lost:0"].attempt == 2
    assert len(results.heard) == 2


async def test_a_restart_without_loss_is_no_loss(server: RedisServer) -> None:
    """A server that is started again with all it had has lost nothing, and nothing is said to have failed."""
    async with housed(server.url) as house:
        end, results = await house.engine()
        await end.dispatch(task("r"))
        server.stop()
        server.start()
        await until_taken(end, task("later"))
        assert set(await end.holding(["r:0", "later:0"])) == {"r:0", "later:0"}
        await house.worker()
        await eventually(lambda: len(results) == 2, "both were answered")
        assert {result.status for result in results.heard} == {"completed"}


async def test_closing_does_not_wait_for_a_redis_that_says_nothing(server: RedisServer) -> None:
    """An end whose Redis has fallen silent is closed within seconds, tasks under way or not."""
    async with housed(server.url) as house:
        gate = Gate()
        end, _ = await house.engine()
        worker = await house.worker(gate.handle)
        await end.dispatch(task("r"))
        await eventually(lambda: gate.started, "it is under way")
        server.pause()
        begun = time.monotonic()
        await asyncio.gather(worker.close(0.1), end.close(0.1))
        assert time.monotonic() - begun < 12
        assert gate.cancelled == ["r:0"]
        server.resume()


# -- a worker whose loop is blocked


def blocked_worker(house: House, seconds: float, **options: Any) -> tuple[threading.Thread, threading.Event]:
    """A worker on a loop of its own, whose body blocks it. Returns when it has begun to serve."""
    serving, began = threading.Event(), threading.Event()

    async def block(task: Task) -> StepResult:
        began.set()
        time.sleep(seconds)  # noqa: ASYNC251 - the very thing
        return answer(task, "blocked")

    async def live() -> None:
        end = house.build(**options)
        await end.start()
        await end.serve([ECHO], block)
        serving.set()
        while not began.is_set():
            await asyncio.sleep(0.01)
        await end.close(10.0)

    thread = threading.Thread(target=asyncio.run, args=(live(),))
    thread.start()
    assert serving.wait(20)
    return thread, began


@pytest.mark.parametrize("bound", ["kept", "left"])
async def test_a_blocked_loop_keeps_its_job_but_not_for_ever(house: House, bound: str) -> None:
    """A body that blocks its loop for longer than the lock keeps its job, which a thread renews; one that blocks for longer
    than `blocked_max` loses it, both run, and the run counts one result (B26, S13)."""
    fast = {"lock": 1.0 if bound == "kept" else 0.3, "stalled_interval": 0.1}
    second: list[str] = []

    async def other(task: Task) -> StepResult:
        second.append(task.id)
        return answer(task, "other")

    end, results = await house.engine(**fast)
    blocked_max = 60.0 if bound == "kept" else 0.2
    thread, began = blocked_worker(house, 2.5, blocked_max=blocked_max, **fast)
    await end.dispatch(task("r"))
    await asyncio.to_thread(began.wait, 20)
    await house.worker(other, **fast)
    await asyncio.to_thread(thread.join, 30)
    assert not thread.is_alive()
    await eventually(lambda: "r:0" in results, "it was answered")
    if bound == "kept":
        assert second == []
        assert output_of(results["r:0"]) == b'"blocked"'
    else:
        assert second == ["r:0"]
        assert output_of(results["r:0"]) == b'"other"'
        await eventually(lambda: len(results.heard) == 2, "the first one's answer came too, and is a duplicate")


# -- cancels, beats, closing


async def test_cancelling_takes_a_waiting_task_out(house: House) -> None:
    """A task nobody has begun is gone from its queue once it is cancelled."""
    end, results = await house.engine()
    await end.dispatch(task("unwanted"))
    await end.dispatch(task("wanted"))
    await end.cancel("unwanted:0")
    assert await end.holding(["unwanted:0", "wanted:0"]) == ["wanted:0"]
    gate = Gate()
    gate.open()
    await house.worker(gate.handle)
    await eventually(lambda: "wanted:0" in results, "the other was worked on")
    assert gate.started == ["wanted:0"]


async def test_cancels_are_said_on_the_control_channel(house: House) -> None:
    """A cancelled task is an event `step.cancel` with its id; a worker obeys it, and `cancel` of a whole run too."""
    end, _ = await house.engine()
    gate = Gate()
    await house.worker(gate.handle)
    heard: list[dict[str, Any]] = []
    async with house.redis.pubsub() as pubsub:
        await pubsub.subscribe(f"{house.prefix}-control")
        for n in range(3):
            await end.dispatch(task("r", seq=n))
        await end.dispatch(task("other"))
        await eventually(lambda: len(gate.started) == 4, "all are under way")
        await end.cancel("r:1")
        await eventually(lambda: gate.cancelled == ["r:1"], "one was cancelled")
        message = json.dumps({"from": "somebody", "kind": "cancel", "runId": "r"})
        await house.redis.publish(f"{house.prefix}-control", message)
        await eventually(lambda: sorted(gate.cancelled) == ["r:0", "r:1", "r:2"], "then the whole run")
        while (said := await pubsub.get_message(timeout=0.5)) is not None:
            if said["type"] == "message":
                heard.append(json.loads(said["data"]))
    [event] = [one["event"] for one in heard if one["kind"] == "event"]
    assert (event["type"], event["runId"], event["stepId"]) == ("step.cancel", "r", "r:1")


async def test_a_listener_that_raises_harms_nobody(house: House) -> None:
    """A heartbeat handler that raises hears the next beat, and tasks are answered; nonsense on the channel is passed over."""
    beats: list[Heartbeat] = []

    def hear(beat: Heartbeat) -> None:
        beats.append(beat)
        raise RuntimeError("a listener's own trouble")

    gate = Gate()
    end, results = house.build(), Results()
    end.on_result(results.take)
    end.on_heartbeat(hear)
    await house.started(end)
    await house.worker(gate.handle)
    await house.redis.publish(f"{house.prefix}-heartbeat", "nonsense")
    await house.redis.publish(f"{house.prefix}-heartbeat", '{"runId":"turn","seq":0,"group":"g"}')
    await end.dispatch(task("r"))
    await eventually(lambda: len(beats) >= 4, "it goes on hearing")
    assert beats[0] == Heartbeat(run_id="turn", seq=0, group="g")
    gate.open()
    await eventually(lambda: "r:0" in results, "and is answered")


async def test_closing_gives_tasks_back_at_once(house: House) -> None:
    """A task that was cut short by close is another worker's at once, not when the lock has run out."""
    gate = Gate()
    end, results = await house.engine()
    first = await house.worker(gate.handle)
    await end.dispatch(task("r"))
    await eventually(lambda: gate.started, "it is under way")
    await first.close(0.01)
    assert gate.cancelled == ["r:0"]
    await house.worker()
    await eventually(lambda: "r:0" in results, "the other worker ran it")


@pytest.mark.parametrize("after", range(6))
async def test_closing_amid_traffic_leaves_nothing_behind(house: House, after: int) -> None:
    """Wherever close comes upon a worker that is taking tasks, the next worker has them all at once, and none waits for a
    lock to run out."""

    async def work(task: Task) -> StepResult:
        await asyncio.sleep(0.005)
        return answer(task)

    end, results = await house.engine()
    first = await house.worker(work)
    sending = [asyncio.create_task(end.dispatch(task(f"r{n}"))) for n in range(30)]
    await asyncio.sleep(0.006 * after)
    await first.close(0.01)
    await asyncio.gather(*sending)
    await house.worker()
    await eventually(lambda: len(results) == 30, "all were answered", timeout=15)


async def test_what_is_asked_at_once_goes_out_together(house: House) -> None:
    """A hundred dispatches of one moment cost a few round trips, and keep their order."""
    end, _ = await house.engine()
    await end.dispatch(task("first"))
    before = (await house.redis.info("commandstats")).get("cmdstat_evalsha", {}).get("calls", 0)
    batches: list[int] = []
    send = link._Lane._send

    async def counted(self: Any, batch: Any) -> None:
        batches.append(len(batch))
        await send(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link._Lane, "_send", counted)
        await asyncio.gather(*(end.dispatch(task(f"r{n:03}")) for n in range(100)))
    assert (await house.redis.info("commandstats"))["cmdstat_evalsha"]["calls"] - before >= 100
    assert max(batches) >= 100
    queue = house.taker(f"tasks-{ECHO}", lock=5.0)
    order = [json.loads((await queue.take())[0].data)["runId"] for _ in range(101)]  # type: ignore[union-attr]
    assert order == ["first", *(f"r{n:03}" for n in range(100))]


async def test_a_full_worker_leaves_tasks_to_others(house: House) -> None:
    """A worker without room does not swallow the sign that there is work: another one has it at once."""
    gate = Gate()
    end, results = await house.engine()
    full = house.build()
    await house.started(full)
    await full.serve([ECHO], gate.handle, concurrency=1)
    await end.dispatch(task("long"))
    await eventually(lambda: gate.started, "the first worker is full")
    await house.worker()
    for n in range(5):
        await end.dispatch(task(f"r{n}"))
        await eventually(lambda n=n: f"r{n}:0" in results, "the second worker has it")
    assert gate.started == ["long:0"]


# -- what this Redis may lose


@pytest.mark.parametrize(
    ("settings", "said", "weak"),
    [
        ({"appendonly": "no"}, "set appendonly yes", True),
        ({"appendonly": "yes", "appendfsync": "no"}, "set appendfsync everysec", True),
        ({"appendonly": "yes", "appendfsync": "everysec"}, "may lose a second", False),
        ({"appendonly": "yes", "appendfsync": "always"}, "is on its disk", False),
    ],
)
async def test_what_redis_may_lose_is_said(
    settings: dict[str, str], said: str, weak: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that may lose what it has taken is told of at start, with the remedy; a good one only when asked."""
    require("redis")
    server = RedisServer(**settings)
    server.start()
    try:
        end = BullMQTransport(server.url)
        with caplog.at_level(logging.WARNING, "durable.transports"):
            await end.start()
        assert said in end.durability
        assert (said in caplog.text) is weak
        await end.close()
    finally:
        server.close()


async def test_a_redis_that_evicts_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """A server that may throw jobs away is an error that says what to set, unless that is wanted."""
    require("redis")
    server = RedisServer(**{"maxmemory-policy": "allkeys-lru"})
    server.start()
    try:
        with pytest.raises(TransportError, match="maxmemory-policy noeviction"):
            await BullMQTransport(server.url).start()
        end = BullMQTransport(server.url, allow_eviction=True)
        await end.start()
        assert "allkeys-lru" in end.durability
        await end.close()
    finally:
        server.close()


@pytest.mark.parametrize("refused", ["config", "info"])
async def test_a_server_that_does_not_say_is_taken_at_its_word(refused: str) -> None:
    """Where a managed server answers neither INFO nor CONFIG it is used, and said to be unchecked."""
    require("redis")
    server = RedisServer(persist=True)
    server.start()
    try:
        async with Redis.from_url(server.url) as redis:
            rules = ["-config"] if refused == "config" else ["-config", "-info"]
            await redis.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all", *rules)
        url = server.url.replace("redis://", "redis://app:pw@")
        async with housed(url) as house:
            end, results = await house.engine()
            await house.worker()
            assert "could not be checked" in end.durability
            await end.dispatch(task("r"))
            await eventually(lambda: "r:0" in results, "it works all the same")
        with pytest.raises(TransportError, match=r"password|let us in"):
            await BullMQTransport(server.url.replace("redis://", "redis://app:wrong@")).start()
    finally:
        server.close()


async def test_a_redis_that_is_full_says_so(server: RedisServer) -> None:
    """A server out of memory refuses a task with its own words, and takes the next one when there is room."""
    async with housed(server.url) as house:
        end, results = await house.engine()
        await house.redis.config_set("maxmemory", "1")
        with pytest.raises(TransportError, match=r"Redis did not take it.*maxmemory"):
            await end.dispatch(task("r"))
        await house.redis.config_set("maxmemory", "0")
        await house.worker()
        await end.dispatch(task("r"))
        await eventually(lambda: "r:0" in results, "it goes on")


# -- who is alive


async def test_a_worker_says_that_it_is_alive(house: House) -> None:
    """A key for each group, good for 35 s, that refers to a descriptor by its hash; both gone when it closes."""
    engine, _ = await house.engine()
    worker = await house.worker(group="pay-charge@eu")
    [alive] = await engine.workers()
    assert (alive.group, alive.descriptor is not None) == ("pay-charge@eu", True)
    key = f"{house.prefix}-worker-heartbeat:pay-charge@eu:{alive.instance}"
    value = json.loads(await house.redis.get(key))
    assert abs(value["ts"] - time.time() * 1000) < 60_000
    assert set(value) == {"ts", "status", "descriptorHash"}
    assert 30 < await house.redis.ttl(key) <= 35
    told = json.loads(await house.redis.get(key.replace("worker-heartbeat", "worker-descriptor")))
    assert told["instanceId"] == alive.instance
    assert (told["runtime"], told["steps"], told["partition"]) == ("python", ["pay-charge"], "eu")
    assert told["protocol"] == {"version": 1, "range": [1, 1]}
    await worker.close()
    assert await engine.workers() == []


async def test_the_signs_of_others_are_read(house: House) -> None:
    """Beats of other kinds of workers are read in any of their forms; a key that is no beat spoils nobody's."""
    engine, _ = await house.engine()
    base = f"{house.prefix}-worker-heartbeat"
    await house.redis.set(f"{base}:a:node-1", "1752710460")
    await house.redis.set(f"{base}:b@eu:ts:2", '{"ts":1752710460000,"status":"up"}')
    await house.redis.set(f"{base}:c:x", "nonsense")
    await house.redis.sadd(f"{base}:d:x", "a key of another kind")
    found = {worker.group: worker for worker in await engine.workers()}
    assert found["a"].beat.ts == 1752710460000
    assert found["c"].beat.ts == 0
    assert {worker.beat.status for worker in found.values()} == {None, "up"}
