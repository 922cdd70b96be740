"""Whole applications over BullMQ: an engine here, workers and callers elsewhere, Redis between them."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from bullmq import Queue, Worker
from redis.asyncio import Redis

from durable import Context, Durable, RetryPolicy, RunCancelled, RunFailed, remote_workflow
from durable.core.errors import RunNotFound
from durable.testing.facts import eventually
from durable.transports.bullmq import BullMQTransport


class Place:
    """One prefix on a Redis."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url, self.stack = url, stack
        self.prefix = f"e-{secrets.token_hex(4)}"

    def transport(self, **options: Any) -> BullMQTransport:
        return BullMQTransport(self.url, prefix=self.prefix, failures_every=0.05, **options)

    def app(self, store: Any = "memory://", **options: Any) -> Durable:
        return Durable(store, transport=self.transport(), **options)

    def queue(self, name: str) -> Queue:
        queue = Queue(f"{self.prefix}-{name}", {"connection": self.url})
        self.stack.push_async_callback(queue.close)
        return queue

    async def wish(self, **said: Any) -> None:
        """As any caller's BullMQ would add it."""
        options = {"removeOnComplete": True, "removeOnFail": True}
        await self.queue("start-run").add("startRun", {"tenant": "default"} | said, options)

    async def all_granted(self) -> bool:
        async with Redis.from_url(self.url) as redis:
            return not [key async for key in redis.scan_iter(f"bull:{self.prefix}-start-run:[0-9]*")]


@pytest.fixture
async def place(redis_url: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(redis_url, stack)


async def until(look: Callable[[], Awaitable[bool]], claim: str) -> None:
    """Like `eventually`, for what has to be asked for."""
    for _ in range(1500):
        if await look():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never came true: {claim}")


async def _count(app: Durable, runs: int) -> bool:
    return len((await app.find(workflow="add")).runs) == runs


async def greet(ctx: Context, who: str) -> str:
    return f"{await ctx.remote('say:hello', who)}, {await ctx.remote('say:again', who)}"


async def test_a_worker_node_serves_an_engine(place: Place) -> None:
    """Steps of a run are worked on in an application of role worker, which has no store; many at once, and each once."""
    worker = place.app(role="worker")
    calls: list[str] = []

    @worker.step("say:hello")
    async def hello(who: str) -> str:
        calls.append(who)
        return f"hello {who}"

    @worker.step("say:again")
    async def again(who: str) -> str:
        return f"hello again {who}"

    app = place.app()
    app.workflow("greet")(greet)
    async with app, worker:
        handles = [await app.start("greet", f"w{n}") for n in range(50)]
        answers = [await handle.result(timeout=30) for handle in handles]
    assert answers == [f"hello w{n}, hello again w{n}" for n in range(50)]
    assert sorted(calls) == sorted(f"w{n}" for n in range(50))


async def test_a_worker_that_fails_at_its_job_uses_up_retries(place: Place) -> None:
    """Jobs that BullMQ fails are attempts of the step: they are retried as its policy says, then the run fails with them."""

    async def die(job: Any, token: str) -> None:
        raise RuntimeError(f"out of memory at {job.data['attempt']}")

    app = place.app()

    @app.workflow
    async def lonely(ctx: Context) -> Any:
        return await ctx.remote("heavy", None, retries=2)

    worker = Worker(f"{place.prefix}-tasks-heavy", die, {"connection": place.url})
    place.stack.push_async_callback(worker.close, True)
    async with app:
        handle = await app.start(lonely)
        with pytest.raises(RunFailed, match="remote step worker failed: out of memory at 3"):
            await handle.result(timeout=30)


async def test_a_turn_whose_worker_died_is_taken_again(place: Place) -> None:
    """A turn that BullMQ has failed says nothing about its run: the turn is sent again, to whoever is there."""
    tries: list[str] = []
    decisions = place.queue("decisions")

    async def host(job: Any, token: str) -> None:
        tries.append(job.data["taskId"])
        if len(tries) == 1:
            raise RuntimeError("out of memory")
        decision = {
            "taskId": job.data["taskId"],
            "runId": job.data["runId"],
            "status": "completed",
            "output": "in the end",
        }
        await decisions.add("decision", decision | {"commands": []}, {"removeOnComplete": True, "removeOnFail": True})

    worker = Worker(f"{place.prefix}-tasks-py", host, {"connection": place.url})
    place.stack.push_async_callback(worker.close, True)
    app = place.app()
    app.register(remote_workflow("py", retries=RetryPolicy(max_attempts=3, initial_delay=0.05)))
    async with app:
        handle = await app.start("py", {})
        assert await handle.result(timeout=30) == "in the end"
    assert len(set(tries)) == 2


MORTAL = """
import asyncio, sys
from durable import Durable
from durable.transports.bullmq import BullMQTransport

url, prefix = sys.argv[1:]
worker = Durable(transport=BullMQTransport(url, prefix=prefix, lock=0.5, stalled_interval=0.2, max_stalled=9), role="worker")

@worker.step("heavy")
async def heavy(n: int) -> int:
    print("began", flush=True)
    await asyncio.sleep(3600)

async def main():
    async with worker:
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_step_outlives_the_process_of_its_worker(place: Place) -> None:
    """kill -9 in the middle of a step: another worker has it as soon as the lock has run out, as the same attempt."""
    app = place.app()

    @app.workflow
    async def lonely(ctx: Context) -> int:
        return await ctx.remote("heavy", 20, retries=0, returns=int)

    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MORTAL, place.url, place.prefix, stdout=asyncio.subprocess.PIPE
    )
    worker = Durable(transport=place.transport(stalled_interval=0.2, max_stalled=9), role="worker")

    @worker.step("heavy")
    async def heavy(n: int) -> int:
        return n + 1

    async with app:
        handle = await app.start(lonely)
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"began\n"
        process.kill()
        await process.wait()
        async with worker:
            assert await handle.result(timeout=30) == 21


async def test_a_run_is_started_by_message(place: Place) -> None:
    """A job `startRun` starts a run with its id, tags and attributes; the same wish again starts nothing, and is gone."""
    app = place.app()

    @app.workflow
    async def add(ctx: Context, numbers: dict[str, int]) -> int:
        return sum(numbers.values())

    await place.wish(workflow="add", input={"a": 5})  # before there is an engine
    async with app:
        for _ in range(3):
            await place.wish(
                workflow="add", input={"a": 1, "b": 2}, runId="asked-1", tags=["x"], searchAttributes={"n": 1}
            )
        await until(lambda: _count(app, 2), "both wishes were granted")
        assert await app.run("asked-1").result(timeout=10) == 3
        record = await app.run("asked-1").get()
        assert (record.tags, dict(record.attributes)) == (("x",), {"n": 1})
        await until(place.all_granted, "none is left")
        assert await _count(app, 2)


async def test_wishes_nobody_may_grant_are_put_away(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Another tenant's wish, one whose input is none, and one that cannot be read do not start anything, and stay where an
    operator finds them."""
    app = place.app()

    @app.workflow
    async def add(ctx: Context, numbers: list[int]) -> int:
        return sum(numbers)

    async with app:
        await place.wish(tenant="other", workflow="add", input=[1])
        await place.wish(workflow="add", input="no numbers")
        await place.wish(wrong=1)
        await place.wish(workflow="add", input=[1], runId="x" * 300)
        dead, found = place.queue("dead"), []

        async def put_away() -> bool:
            found[:] = await dead.getJobs(["wait"], 0, -1, True)
            return len(found) == 4

        await until(put_away, "all four are there")
        reasons = sorted(job.data["reason"] for job in found)
        assert any("tenant 'other'" in reason for reason in reasons)
        assert any("cannot be started so" in reason for reason in reasons)
        assert (await app.find(workflow="add")).runs == []


async def test_a_wish_for_a_workflow_of_another_engine_waits_for_it(
    place: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that does not know a workflow leaves the wish to one that does."""
    monkeypatch.setattr("durable.transports.bullmq.transport.NEAR_SECONDS", 0.05)
    ignorant, knowing = place.app(), place.app()

    @knowing.workflow
    async def rare(ctx: Context) -> str:
        return "found"

    async with ignorant:
        await place.wish(workflow="rare", runId="asked-2")
        await eventually(lambda: "it comes again" in caplog.text, "the first engine did not know it")
        async with knowing:
            run = knowing.run("asked-2")

            async def started() -> bool:
                try:
                    return bool(await run.get())
                except RunNotFound:
                    return False

            await until(started, "the other one knew it")
            assert await run.result(timeout=10) == "found"


async def test_a_cancelled_run_is_said_on_the_channel(place: Place) -> None:
    """Workers of other makes hear `cancel` with the run's id, also where the run is executed by the engine that was asked."""
    app = place.app()
    began = asyncio.Event()

    async def never(job: Any, token: str) -> None:
        began.set()
        await asyncio.sleep(3600)

    @app.workflow
    async def waits(ctx: Context) -> None:
        await ctx.remote("slow", None)

    worker = Worker(f"{place.prefix}-tasks-slow", never, {"connection": place.url})
    place.stack.push_async_callback(worker.close, True)
    async with Redis.from_url(place.url) as redis, redis.pubsub() as pubsub:
        await pubsub.subscribe(f"{place.prefix}-control")
        await place.stack.enter_async_context(app)
        handle = await app.start(waits)
        await asyncio.wait_for(began.wait(), 20)
        await handle.cancel("enough")
        with pytest.raises(RunCancelled):
            await handle.result(timeout=20)
        said = []
        while (message := await pubsub.get_message(timeout=0.5)) is not None:
            if message["type"] == "message":
                said.append(json.loads(message["data"]))
    assert ("cancel", handle.id) in [(one["kind"], one.get("runId")) for one in said]


async def test_a_run_outlives_its_redis(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """FLUSHALL after dispatch, a step without a timeout, no retries left out: the step is tried again and the run ends (B18)."""
    app = place.app()

    @app.workflow
    async def one(ctx: Context) -> str:
        return str(await ctx.remote("later", None))

    async with app, Redis.from_url(place.url) as redis:
        handle = await app.start(one)

        async def queued() -> bool:
            return bool(await redis.llen(f"bull:{place.prefix}-tasks-later:wait"))

        await until(queued, "it was sent")
        with caplog.at_level(logging.ERROR):
            await redis.flushdb()
            await eventually(lambda: "no longer there" in caplog.text, "the loss was noticed")
        worker = place.app(role="worker")

        @worker.step("later")
        async def later(_: None) -> str:
            return "done all the same"

        async with worker:
            assert await handle.result(timeout=30) == "done all the same"
