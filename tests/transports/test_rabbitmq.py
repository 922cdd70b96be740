"""What only a broker can do to us: die, block, close connections, count deliveries, and bring garbage."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import aio_pika
import msgspec
import pytest
from aio_pika.abc import AbstractIncomingMessage

from durable import Context, Durable
from durable.control_plane.interface import LOOK_EVERYWHERE
from durable.core.errors import DefinitionError, EngineStopped, MessageRefused, TransportError
from durable.core.retry import RetryPolicy
from durable.protocol import names
from durable.protocol.messages import Answer, ControlMessage, StepResult, Task
from durable.testing.facts import eventually
from durable.testing.suites.control_plane import Heard
from durable.testing.suites.transport import ECHO, Gate, Results, answer, echo, task
from durable.transports.rabbitmq.transport import QUEUE, REASON, RESULTS_AHEAD, RabbitMqTransport
from tests.servers.rabbitmq import RabbitServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def prefix() -> str:
    return f"t{secrets.token_hex(4)}"


@asynccontextmanager
async def end(url: str, prefix: str, take: Any = None, **settings: Any) -> AsyncIterator[RabbitMqTransport]:
    """One end, started; an engine's where `take` is given."""
    transport = RabbitMqTransport(url, prefix=prefix, **{"dispatch_timeout": 2.0, **settings})
    if take is not None:
        transport.on_result(take)
    await transport.start()
    try:
        yield transport
    finally:
        await transport.close(0.2)


async def put(url: str, queue: str, body: bytes, **properties: Any) -> None:
    """By hand, as a stranger would."""
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        await channel.default_exchange.publish(aio_pika.Message(body, **properties), queue)


async def took(url: str, queue: str) -> AbstractIncomingMessage | None:
    """The first message of a queue, taken out."""
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        message = await (await channel.get_queue(queue)).get(fail=False)
        if message is not None:
            await message.ack()
        return message


async def eventually_took(url: str, queue: str) -> AbstractIncomingMessage:
    async with asyncio.timeout(20):
        while (message := await took(url, queue)) is None:
            await asyncio.sleep(0.02)
    return message


async def die_with_it(url: str, queue: str) -> None:
    """A worker that takes a task and is gone."""
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        taken = asyncio.Event()

        async def take(_: AbstractIncomingMessage) -> None:
            taken.set()

        await channel.set_qos(1)
        await (await channel.get_queue(queue)).consume(take)
        async with asyncio.timeout(20):
            await taken.wait()


# -- deliveries that are counted


async def test_a_task_its_workers_die_of_is_given_up(amqp_url: str, prefix: str) -> None:
    """A task delivered more often than its limit comes back as failed, retryable, with its token; the dead queue stays empty."""
    results = Results()
    async with end(amqp_url, prefix, results.take, delivery_limit=2) as engine:
        await engine.dispatch(msgspec.structs.replace(task("r"), token="proof"))
        for _ in range(3):
            assert not results
            await die_with_it(amqp_url, names.tasks(prefix, ECHO))
        await eventually(lambda: "r:0" in results, "it was given up")
        error = results["r:0"].error
        assert error is not None
        assert (error.code, error.retryable, results["r:0"].token) == ("worker_failed", True, "proof")
        assert "delivered 3 times" in error.message
        assert await took(amqp_url, names.tasks(prefix, ECHO)) is None
        await engine.declared(names.dead(prefix))
        assert await took(amqp_url, names.dead(prefix)) is None


async def test_an_answer_that_cannot_be_sent_is_no_loop(amqp_url: str, prefix: str) -> None:
    """A body whose answer no wire carries has failed for good: it has done its work, and would say the same again."""
    results, runs = Results(), 0

    async def handle(task: Task) -> StepResult:
        nonlocal runs
        runs += 1
        return msgspec.structs.replace(answer(task), run_id="half a surrogate pair: \ud800")

    async with end(amqp_url, prefix, results.take) as engine, end(amqp_url, prefix) as worker:
        await worker.serve([ECHO], handle)
        await engine.dispatch(task("r"))
        await eventually(lambda: "r:0" in results, "it was answered")
        error = results["r:0"].error
        assert error is not None
        assert (error.code, error.retryable, runs) == ("payload_text", False, 1)


async def test_closing_workers_do_not_count(amqp_url: str, prefix: str) -> None:
    """A task that more workers gave back than its limit of deliveries is worked on by the next all the same."""
    results = Results()
    async with end(amqp_url, prefix, results.take, delivery_limit=1) as engine:
        await engine.dispatch(task("r"))
        gate = Gate()
        for n in range(4):
            async with end(amqp_url, prefix, delivery_limit=1) as worker:
                await worker.serve([ECHO], gate.handle)
                async with asyncio.timeout(20):
                    while len(gate.started) <= n:
                        await asyncio.sleep(0.005)
                await worker.close(0.01)
        async with end(amqp_url, prefix, delivery_limit=1) as worker:
            await worker.serve([ECHO], echo)
            await eventually(lambda: "r:0" in results, "it was answered")
        assert results["r:0"].status == "completed"


async def test_a_killed_worker_process_leaves_its_task_to_another(amqp_url: str, prefix: str) -> None:
    """kill -9 of a process that works on a task: the next worker gets it at once (S14)."""
    results = Results()
    async with end(amqp_url, prefix, results.take) as engine:
        await engine.dispatch(task("r"))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", DIES, amqp_url, prefix),
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"began r:0\n"
        process.kill()
        await process.wait()
        async with end(amqp_url, prefix) as worker:
            await worker.serve([ECHO], echo)
            await eventually(lambda: "r:0" in results, "the other answered")


DIES = f"""
import asyncio, sys
from durable.transports.rabbitmq import RabbitMqTransport

async def work(task):
    print("began", task.id, flush=True)
    await asyncio.sleep(60)

async def main():
    worker = RabbitMqTransport(sys.argv[1], prefix=sys.argv[2])
    await worker.start()
    await worker.serve(["{ECHO}"], work)
    await asyncio.sleep(60)

asyncio.run(main())
"""


# -- messages nobody may read


@pytest.mark.parametrize(
    "garbage",
    [b"\x80\x04\x95pickle", b"", b"{}", b"[" * 10_000, b'{"runId":"r","seq":0,"stepId":"other:0"}', b"x" * (3 << 20)],
    ids=["pickle", "empty", "no fields", "deep", "forged id", "huge"],
)
async def test_injected_garbage_is_put_away_and_work_goes_on(amqp_url: str, prefix: str, garbage: bytes) -> None:
    """(A44) What nobody can read, in any of our queues, ends in the dead queue with its reason; it is never an answer, and the
    consumers go on."""
    results = Results()
    async with end(amqp_url, prefix, results.take, max_message=1 << 20) as engine:
        async with end(amqp_url, prefix, max_message=1 << 20) as worker:
            await worker.serve([ECHO], echo)
            for queue in (names.tasks(prefix, ECHO), names.results(prefix), names.given_up(prefix)):
                await engine.declared(queue)
                await put(amqp_url, queue, garbage)
                dead = await eventually_took(amqp_url, names.dead(prefix))
                assert (dead.body, dead.headers[QUEUE]) == (garbage, queue)
                assert dead.headers[REASON]
            await engine.dispatch(task("r"))
            await eventually(lambda: "r:0" in results, "others are answered")
            assert len(results.heard) == 1


async def test_a_forged_death_is_no_answer(amqp_url: str, prefix: str) -> None:
    """A good task put among those given up by hand, without the broker's word for it, is put away."""
    results = Results()
    async with end(amqp_url, prefix, results.take) as engine:
        await put(amqp_url, names.given_up(prefix), engine._encoded(task("r")))
        dead = await eventually_took(amqp_url, names.dead(prefix))
        assert dead.headers[QUEUE] == names.given_up(prefix)
        assert not results


async def test_a_refused_answer_is_found_in_the_dead_queue(amqp_url: str, prefix: str) -> None:
    """An answer the engine refuses for good lies in the dead queue with the engine's words."""

    async def refuse(_: Answer) -> None:
        raise MessageRefused("it does not echo its token")

    async with end(amqp_url, prefix, refuse) as engine:
        await engine.reply(answer(task("forged")))
        dead = await eventually_took(amqp_url, names.dead(prefix))
        assert dead.headers[REASON] == "it does not echo its token"
        assert b"forged:0" in dead.body


# -- answers that are not taken


async def test_a_stopped_engine_leaves_answers_to_another(amqp_url: str, prefix: str) -> None:
    """After EngineStopped this engine is asked no more, and another takes the answer at once."""
    asked: list[str] = []
    results = Results()

    async def stopped(heard: Answer) -> None:
        asked.append(heard.id)
        raise EngineStopped("it stops")

    async with end(amqp_url, prefix, stopped) as first:
        await first.reply(answer(task("r")))
        await eventually(lambda: asked, "it was asked")
        async with end(amqp_url, prefix, results.take) as second:
            await eventually(lambda: "r:0" in results, "the other one took it")
            await second.reply(answer(task("s")))
            await eventually(lambda: "s:0" in results, "and it alone is asked from then on")
        assert asked == ["r:0"]


async def test_an_answer_nobody_can_take_does_not_spin(amqp_url: str, prefix: str) -> None:
    """While the handler raises, an answer comes again ever more slowly, any number of times, and is taken in the end."""
    times: list[float] = []
    taken = asyncio.Event()

    async def take(_: Answer) -> None:
        times.append(asyncio.get_running_loop().time())
        if len(times) < 6:
            raise ConnectionError("the store is away")
        taken.set()

    async with end(amqp_url, prefix, take) as engine:
        await engine.reply(answer(task("r")))
        async with asyncio.timeout(20):
            await taken.wait()
    pauses = [later - sooner for sooner, later in pairwise(times)]
    assert [pause >= 0.05 * 2**n for n, pause in enumerate(pauses)] == [True] * 5


# -- a broker that goes away


async def test_connections_closed_by_force_are_opened_again(rabbit: RabbitServer, prefix: str) -> None:
    """With every connection closed by the broker's operator a body goes on, once; its answer leaves on a new channel, the
    listeners are told of a gap, and all goes on (S11)."""
    gate, results, heard = Gate(), Results(), Heard()
    async with end(rabbit.url, prefix, results.take) as engine, end(rabbit.url, prefix) as worker:
        engine.on_control("engine", heard)
        await worker.serve([ECHO], gate.handle)
        await engine.dispatch(task("r"))
        await eventually(lambda: gate.started, "it is under way")
        await in_thread(rabbit, "close_all_connections", "a test")
        await eventually(lambda: LOOK_EVERYWHERE in heard, "the engine hears again")
        await worker._servings[0].intakes[0].line.channel()
        await eventually(lambda: len(worker.under_way["r:0", 1]) == 2, "it was delivered again, to who has it already")
        gate.open()
        await eventually(lambda: "r:0" in results, "it was answered")
        await engine.dispatch(task("s"))
        await eventually(lambda: "s:0" in results, "all goes on")
        await worker.publish_control(ControlMessage(sender="worker", kind="enqueued", run_id="s"))
        await eventually(lambda: heard.runs()[-1:] == ["s"], "hints too")
        assert gate.started == ["r:0", "s:0"]
        assert gate.cancelled == []
        await eventually(lambda: not worker.under_way, "both deliveries were settled")
        assert len(results.heard) == 2


async def test_a_killed_broker_comes_back_with_what_was_dispatched(rabbit: RabbitServer, prefix: str) -> None:
    """kill -9 of the broker: dispatch fails within seconds meanwhile, an answer that was being made waits for it, and when it
    is back everything that was confirmed is done (S43)."""
    gate, results = Gate(), Results()
    loop = asyncio.get_running_loop()
    async with end(rabbit.url, prefix, results.take) as engine, end(rabbit.url, prefix) as worker:
        await worker.serve([ECHO], gate.handle, concurrency=1)
        await engine.dispatch(task("working"))
        await eventually(lambda: gate.started, "one is under way")
        await engine.dispatch(task("waiting"))
        # The broker writes down half a second late that a queue is there; killed before, it has it and cannot open it.
        await eventually(lambda: rabbit.wrote(names.tasks(prefix, ECHO)), "the queue's name is on disk")
        rabbit.kill()
        began = loop.time()
        with pytest.raises(TransportError, match=r"127\.0\.0\.1"):
            await engine.dispatch(task("refused"))
        assert loop.time() - began < 5
        await engine.cancel("working:9")  # a hint nobody hears, and no harm
        gate.open()
        await asyncio.to_thread(rabbit.start)
        await eventually(lambda: {"working:0", "waiting:0"} <= set(results), "all that was confirmed is done")
        await engine.dispatch(task("later"))
        await eventually(lambda: "later:0" in results, "and all goes on")


async def test_a_run_ends_although_the_broker_was_killed_in_its_midst(
    rabbit: RabbitServer, prefix: str, tmp_path: Path
) -> None:
    """An engine, a worker and a broker that is killed between their steps and started again: the run's steps are each done,
    and it completes (S43)."""
    patient = RetryPolicy(max_attempts=60, max_delay=1.0)  # a dispatch that fails is an attempt that failed
    done: list[int] = []
    engine = Durable(f"sqlite:///{tmp_path}/db", transport=RabbitMqTransport(rabbit.url, prefix=prefix))
    worker = Durable("memory://", transport=RabbitMqTransport(rabbit.url, prefix=prefix), role="worker")

    @worker.step("double")
    async def double(n: int) -> int:
        done.append(n)
        return 2 * n

    @engine.workflow
    async def doubling(ctx: Context) -> list[int]:
        return [await ctx.remote("double", n, returns=int, retries=patient) for n in range(50)]

    async with engine, worker:
        await eventually(lambda: rabbit.wrote(names.tasks(prefix, "double")), "the queue's name is on disk")
        run = await engine.start(doubling)
        await eventually(lambda: len(done) > 5, "some are done")
        rabbit.kill()
        await asyncio.to_thread(rabbit.start)
        assert await run.result(timeout=60) == [2 * n for n in range(50)]
    assert set(done) == set(range(50))


async def test_a_broker_that_says_nothing_is_a_failure_within_seconds(rabbit: RabbitServer, prefix: str) -> None:
    """A broker that hangs with its sockets open: dispatch raises within seconds, and goes on when the broker does."""
    results = Results()
    async with end(rabbit.url, prefix, results.take, dispatch_timeout=1.0) as engine, end(rabbit.url, prefix) as worker:
        await worker.serve([ECHO], echo)
        rabbit.pause()
        try:
            with pytest.raises(TransportError, match="in time"):
                await engine.dispatch(task("r"))
        finally:
            rabbit.resume()
        await engine.dispatch(task("s"))
        await eventually(lambda: "s:0" in results, "it goes on")


async def test_a_broker_out_of_memory_is_a_failure_within_seconds(rabbit: RabbitServer, prefix: str) -> None:
    """Blocked by an alarm: dispatch raises within seconds, answers that are there are taken meanwhile, and all goes on after."""
    results, may = Results(), asyncio.Event()

    async def take(heard: Answer) -> None:
        await may.wait()
        await results.take(heard)

    async with end(rabbit.url, prefix, take, dispatch_timeout=1.0) as engine, end(rabbit.url, prefix) as worker:
        await worker.serve([ECHO], echo)
        for n in range(2 * RESULTS_AHEAD):
            await worker.reply(answer(task(f"r{n}")))
        await in_thread(rabbit, "set_vm_memory_high_watermark", "0.000001")
        try:
            with pytest.raises(TransportError, match="memory"):
                await until_it_raises(engine)
            may.set()
            await eventually(lambda: len(results) >= 2 * RESULTS_AHEAD, "all answers were taken")
            with pytest.raises(TransportError, match="memory"):
                await engine.dispatch(task("blocked"))
        finally:
            await in_thread(rabbit, "set_vm_memory_high_watermark", "0.4")
        await engine.dispatch(task("after"))
        await eventually(lambda: "after:0" in results, "it works again")


async def test_closing_ends_while_the_broker_says_nothing(rabbit: RabbitServer, prefix: str) -> None:
    """Both ends close within seconds although the broker hangs; what was under way is done by the next worker."""
    gate, results = Gate(), Results()
    loop = asyncio.get_running_loop()
    async with end(rabbit.url, prefix, results.take) as engine, end(rabbit.url, prefix) as worker:
        await worker.serve([ECHO], gate.handle)
        await engine.dispatch(task("r"))
        await eventually(lambda: gate.started, "it is under way")
        rabbit.pause()
        try:
            began = loop.time()
            await asyncio.gather(engine.close(0.1), worker.close(0.1))
            assert loop.time() - began < 15
        finally:
            rabbit.resume()
        async with end(rabbit.url, prefix, results.take), end(rabbit.url, prefix) as other:
            await other.serve([ECHO], echo)
            await eventually(lambda: "r:0" in results, "the next one did it")


async def test_serving_begins_when_the_broker_is_back(rabbit: RabbitServer, prefix: str) -> None:
    """`serve` while the broker is away does not hang and does not raise: it begins when the broker is back."""
    results = Results()
    async with end(rabbit.url, prefix, results.take) as engine, end(rabbit.url, prefix, dispatch_timeout=0.5) as worker:
        await engine.dispatch(task("r"))
        rabbit.pause()
        try:
            async with asyncio.timeout(5):
                await worker.serve([ECHO], echo)
        finally:
            rabbit.resume()
        await eventually(lambda: "r:0" in results, "it serves")


async def until_it_raises(engine: RabbitMqTransport) -> None:
    """Until the broker has noticed that it has no memory."""
    while True:
        await engine.dispatch(task("s"))


async def in_thread(rabbit: RabbitServer, *words: str) -> None:
    await asyncio.to_thread(rabbit.control, *words)


@pytest.fixture
def impatient(rabbit: RabbitServer) -> Iterator[None]:
    """The broker waits less than a second for an acknowledgement, where it commonly waits for half an hour, and looks often."""
    put = "application:set_env(rabbit, {}, {})"
    setting = f"{put.format('consumer_timeout', '{}')}, {put.format('channel_tick_interval', '{}')}."
    rabbit.control("eval", setting.format(300, 300))
    yield
    rabbit.control("eval", setting.format(1_800_000, 60_000))


async def test_a_body_that_outlasts_the_broker_s_patience_runs_once(
    rabbit: RabbitServer, impatient: None, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a body takes longer than consumer_timeout the task comes again, to the same worker: it goes on, once, and is
    answered; the log says what to set."""
    gate, results = Gate(), Results()
    async with end(rabbit.url, prefix, results.take) as engine, end(rabbit.url, prefix) as worker:
        await worker.serve([ECHO], gate.handle)
        await engine.dispatch(task("r"))
        await eventually(lambda: len(worker.under_way.get(("r:0", 1), ())) > 1, "it was delivered again")
        gate.open()
        await eventually(lambda: "r:0" in results, "it was answered")
        assert gate.started == ["r:0"]
        assert "consumer_timeout" in caplog.text


# -- room


async def test_groups_of_one_worker_share_its_bound(amqp_url: str, prefix: str) -> None:
    """Three queues and room for two: no more than two begin, and what this worker has no room for goes to one that has."""
    gate, results = Gate(), Results()
    steps = ["a", "b", "c"]
    async with end(amqp_url, prefix, results.take) as engine, end(amqp_url, prefix) as full:
        await full.serve(steps, gate.handle, concurrency=2)
        for name in steps * 2:
            await engine.dispatch(task(f"r{len(results.heard)}{name}{secrets.token_hex(2)}", name=name))
        await eventually(lambda: len(gate.started) == 2, "two were begun")
        async with end(amqp_url, prefix) as free:
            await free.serve(steps, echo)
            await eventually(lambda: len(results) == 4, "the other one did the rest")
            assert gate.most == 2
            gate.open()
            await eventually(lambda: len(results) == 6, "all were answered")


async def test_a_worker_that_was_full_takes_again(amqp_url: str, prefix: str) -> None:
    """After it had to give back, a worker of several groups takes as much as it can as soon as there is room."""
    gate, results = Gate(), Results()
    async with end(amqp_url, prefix, results.take) as engine, end(amqp_url, prefix) as worker:
        await worker.serve(["a", "b"], gate.handle, concurrency=2)
        for n in range(8):
            await engine.dispatch(task(f"r{n}", name="ab"[n % 2]))
        await eventually(lambda: all(not intake.ahead for intake in worker._servings[0].intakes), "it asks for no more")
        gate.open()
        await eventually(lambda: len(results) == 8, "all were answered")
        assert gate.most == 2


async def test_a_bound_that_falls_to_nothing_leaves_tasks_to_others(amqp_url: str, prefix: str) -> None:
    """A worker whose bound becomes 0 while it serves lets others have what comes then."""
    bound, gate, results = 4, Gate(), Results()
    async with end(amqp_url, prefix, results.take) as engine, end(amqp_url, prefix) as sinking:
        await sinking.serve([ECHO], gate.handle, concurrency=lambda: bound)
        await engine.dispatch(task("r"))
        await eventually(lambda: gate.started == ["r:0"], "it works")
        bound = 0
        await engine.dispatch(task("s"))
        async with end(amqp_url, prefix) as other:
            await other.serve([ECHO], echo)
            await eventually(lambda: "s:0" in results, "the other one has it")
        assert gate.started == ["r:0"]


# -- queues


async def test_a_deleted_queue_is_made_again(amqp_url: str, prefix: str) -> None:
    """A queue that somebody deletes under both ends is there again, for who sends and for who serves."""
    results = Results()
    async with end(amqp_url, prefix, results.take) as engine, end(amqp_url, prefix) as worker:
        await worker.serve([ECHO], echo)
        await engine.dispatch(task("r"))
        await eventually(lambda: "r:0" in results, "it works")
        async with await aio_pika.connect(amqp_url) as connection, connection.channel() as channel:
            await channel.queue_delete(names.tasks(prefix, ECHO))
        await engine.dispatch(task("s"))
        await eventually(lambda: "s:0" in results, "it works again")


async def test_a_queue_with_other_arguments_is_told(amqp_url: str, prefix: str) -> None:
    """Where a queue exists with other arguments, sending and serving say so, and other queues are served."""
    async with end(amqp_url, prefix, delivery_limit=3) as first:
        await first.serve([ECHO], echo)
        async with end(amqp_url, prefix, delivery_limit=4) as second:
            for _ in range(2):
                with pytest.raises(TransportError, match="other arguments"):
                    await second.dispatch(task("r"))
            with pytest.raises(TransportError, match="other arguments"):
                await second.serve([ECHO], echo)
            await second.dispatch(task("r", name="another"))


async def test_nothing_is_sent_into_the_void(amqp_url: str, prefix: str) -> None:
    """Where others declare queues and have not, dispatch raises: an unroutable task is no silence."""
    async with end(amqp_url, prefix):
        pass  # the exchanges are there
    async with end(amqp_url, prefix, declare=False) as engine:
        with pytest.raises(TransportError, match="has no queue"):
            await engine.dispatch(task("r"))
        with pytest.raises(TransportError, match="no such queue"):
            await engine.serve([ECHO], echo)


async def test_an_end_may_be_started_again(amqp_url: str, prefix: str) -> None:
    """After a start that failed and after a close an end can be started; what was arranged before the failure is served."""
    results = Results()
    host = amqp_url.partition("@")[2]
    worker = RabbitMqTransport(f"amqp://guest:wrong@{host}", prefix=prefix)
    await worker.serve([ECHO], echo)
    with pytest.raises(TransportError):
        await worker.start()
    worker._url = amqp_url
    async with end(amqp_url, prefix, results.take) as engine:
        await worker.start()
        await engine.dispatch(task("r"))
        await eventually(lambda: "r:0" in results, "it serves")
        await worker.close()
        await worker.start()
        await worker.serve([ECHO], echo)
        await engine.dispatch(task("s"))
        await eventually(lambda: "s:0" in results, "it serves again")
        await worker.close()


async def test_classic_queues_work(amqp_url: str, prefix: str) -> None:
    """There and back over classic queues, for brokers without quorum queues."""
    results = Results()
    async with (
        end(amqp_url, prefix, results.take, queue_type="classic") as engine,
        end(amqp_url, prefix, queue_type="classic") as worker,
    ):
        await worker.serve([ECHO], echo)
        await engine.dispatch(task("r"))
        await eventually(lambda: "r:0" in results, "it was answered")


# -- cancels


async def test_a_cancel_of_a_run_reaches_all_its_bodies(amqp_url: str, prefix: str) -> None:
    """What engines say among themselves of a cancelled run, workers hear too: its tasks are cancelled, others go on."""
    gate, results = Gate(), Results()
    async with end(amqp_url, prefix, results.take) as engine, end(amqp_url, prefix) as worker:
        await worker.serve([ECHO], gate.handle)
        for sent in (task("r", seq=0), task("r", seq=1), task("other")):
            await engine.dispatch(sent)
        await eventually(lambda: len(gate.started) == 3, "all are under way")
        await engine.publish_control(ControlMessage(sender="engine", kind="cancel", run_id="r"))
        await eventually(lambda: sorted(gate.cancelled) == ["r:0", "r:1"], "both were cancelled")
        gate.open()
        await eventually(lambda: len(results) == 3, "the other run goes on, and nobody is left without an answer")
        assert results["other:0"].status == "completed"
        assert {results[f"r:{seq}"].status for seq in (0, 1)} == {"failed"}


# -- errors that teach


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("amqp://guest:secret@{host}/", "user or password"),
        ("amqp://guest:guest@{host}/nowhere", "virtual host 'nowhere'"),
        ("amqp://guest:guest@127.0.0.1:1/", "cannot be reached"),
        ("http://{host}/", "amqp://user:password@host"),
        ("amqp://guest:secret@host:port/", "amqp://user:password@host"),
    ],
    ids=["password", "virtual host", "nobody there", "scheme", "port"],
)
async def test_what_cannot_be_reached_is_told(amqp_url: str, url: str, words: str) -> None:
    """A wrong password, virtual host or URL is a TransportError that says which, and never the password."""
    host = amqp_url.partition("@")[2].strip("/")
    transport = RabbitMqTransport(url.format(host=host))
    with pytest.raises(TransportError, match=words) as caught:
        await transport.start()
    assert "secret" not in str(caught.value)
    with pytest.raises(TransportError, match="not open"):
        await transport.dispatch(task("r"))
    await transport.close()


def test_settings_are_checked() -> None:
    """Settings that cannot be are refused before anything is opened."""
    with pytest.raises(DefinitionError, match="prefetch"):
        RabbitMqTransport(prefetch=0)
    with pytest.raises(DefinitionError, match="queue_type"):
        RabbitMqTransport(queue_type="stream")  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="prefix"):
        RabbitMqTransport(prefix="a:b")


async def test_a_name_that_is_too_long_is_told(amqp_url: str, prefix: str) -> None:
    """AMQP's names have 255 bytes: a longer step name is an error, and not a closed connection."""
    async with end(amqp_url, prefix) as engine:
        with pytest.raises(TransportError, match="255 bytes"):
            await engine.dispatch(task("r", name="x" * 250))
        await engine.dispatch(task("r" * 300, name="y"))


def test_without_the_driver_the_extra_is_named() -> None:
    """Without aio-pika the module says what to install."""
    program = "import sys; sys.modules['aio_pika'] = None; import durable.transports.rabbitmq"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "DefinitionError" in done.stderr
    assert "pip install 'durable[rabbitmq]'" in done.stderr


# -- many at once


async def test_confirms_are_pipelined(amqp_url: str, prefix: str) -> None:
    """Two hundred dispatches at once are under way together: the broker is asked for the queue once, and each is there."""
    results = Results()
    done: list[str] = []

    async def handle(task: Task) -> StepResult:
        done.append(task.id)
        return answer(task)

    async with end(amqp_url, prefix, results.take) as engine, end(amqp_url, prefix) as worker:
        await asyncio.gather(*(engine.dispatch(task(f"r{n}")) for n in range(200)))
        assert sum(ECHO in queue for queue in engine._declared) == 1
        await worker.serve([ECHO], handle, concurrency=50)
        await eventually(lambda: len(results) == 200, "all were answered")
        assert len(done) == 200
