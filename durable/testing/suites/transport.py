"""What every transport owes. Subclass `TransportSuite`, say how its two ends are built, run pytest.

The suite reads `capabilities` and skips, with a reason, what a transport says it cannot do. It is the engine here in small:
it asks again for what was not answered, and counts a result once by step id.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
from msgspec import Raw

from durable.core.errors import MessageRefused, TransportError
from durable.protocol.messages import (
    Answer,
    Heartbeat,
    RemoteTask,
    StepResult,
    Task,
    WorkflowDecision,
    WorkflowTask,
    routing_token,
    step_id,
)
from durable.testing.facts import eventually
from durable.testing.faulty_transport import Faults, FaultyTransport
from durable.transports.interface import Transport

ECHO = "suite.echo"
TURN = b"""{"taskId":"r:wf:0123abcd","runId":"r","workflow":"suite:flow","workflowVersion":"2","input":{"n":[1,2.5,null]},
"history":[{"seq":0,"kind":"call","name":"a","output":{"x":"\\u00fc"}},{"seq":1,"kind":"timer","order":4,"at":1700000000000},
{"seq":2,"kind":"child","error":{"message":"no","code":"child_failed"}}],"group":"suite-flow","attempt":1,
"pendingSignals":[{"seq":3,"signal":"go","payload":null}],"at":1700000000001}"""
DECISION = b"""{"taskId":"r:wf:0123abcd","runId":"r","status":"continue","commands":[
{"kind":"call","seq":3,"name":"b","group":"eu","input":[1],"parallelGroup":"g"},{"kind":"recordStep","seq":4,"name":"c","output":null},
{"kind":"sleep","seq":5,"ms":1500},{"kind":"waitSignal","seq":6,"signal":"go"},
{"kind":"startChild","seq":7,"workflow":"other","input":{"a":1}}]}"""


def task(run_id: str, *, name: str = ECHO, seq: int = 0, attempt: int = 1, input: object = None) -> RemoteTask:
    """A task of the suite's own step."""
    return RemoteTask(
        run_id=run_id,
        seq=seq,
        step_id=step_id(run_id, seq),
        name=name,
        group=routing_token(name),
        input=Raw(msgspec.json.encode(input)),
        attempt=attempt,
    )


def answer(task: Task, output: object = None) -> StepResult:
    """A completed result of a step; the input where no output is given."""
    assert isinstance(task, RemoteTask)
    encoded = task.input if output is None else Raw(msgspec.json.encode(output))
    return StepResult(
        run_id=task.run_id, seq=task.seq, step_id=task.step_id, status="completed", output=encoded, attempt=task.attempt
    )


def output_of(result: StepResult) -> bytes:
    """The output as it stands; nothing where there is none."""
    return bytes(result.output) if isinstance(result.output, Raw) else b""


async def echo(task: Task) -> StepResult:
    return answer(task)


class Results(dict[str, StepResult]):
    """A result handler that counts each step once; `heard` has every delivery."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[StepResult] = []

    async def take(self, result: Answer) -> None:
        assert isinstance(result, StepResult)
        self.heard.append(result)
        self.setdefault(result.step_id, result)


class Gate:
    """A handler that works until it is let go, and remembers what happened to it."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.cancelled: list[str] = []
        self.most = 0
        self._open = asyncio.Event()
        self._now = 0

    def open(self) -> None:
        self._open.set()

    async def handle(self, task: Task) -> StepResult:
        self.started.append(task.id)
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.cancelled.append(task.id)
            raise
        finally:
            self._now -= 1
        return answer(task)


class TransportSuite:
    """The contract, test by test."""

    async def build(self) -> Callable[[], Transport]:
        """A maker of ends that reach each other and nobody else's: one process each, as it were. A transport with
        heartbeats should beat at least every 50 ms here."""
        raise NotImplementedError

    @asynccontextmanager
    async def ends(
        self, wrap: Callable[[Transport], Transport] = lambda t: t
    ) -> AsyncIterator[tuple[Transport, Transport, Results]]:
        """(engine end, worker end, results heard), started; closed at last."""
        make = await self.build()
        engine, worker, results = wrap(make()), make(), Results()
        engine.on_result(results.take)
        await engine.start()
        await worker.start()
        try:
            yield engine, worker, results
        finally:
            await worker.close(0.1)
            await engine.close(0.1)

    # -- there and back

    async def test_there_and_back(self) -> None:
        """A task reaches the handler unchanged and its result reaches the engine unchanged."""
        seen: list[RemoteTask] = []

        async def handle(task: Task) -> StepResult:
            assert isinstance(task, RemoteTask)
            seen.append(task)
            return answer(task, {"total": "12.30", "list": [1, 2.5, None, True], "text": "ünï\u2028☃"})

        async with self.ends() as (engine, worker, results):
            await worker.serve([ECHO], handle)
            sent = RemoteTask(
                run_id="r", seq=3, step_id="r:3", name=ECHO, group=ECHO, input=Raw(b'{"a":[1,{"b":"\xc3\xbc"}]}'), attempt=2,
                traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", transport="default", context={"user": 1},
            )  # fmt: skip
            await engine.dispatch(sent)
            await eventually(lambda: "r:3" in results, "the result arrived")
            assert msgspec.json.decode(msgspec.json.encode(seen[0])) == msgspec.json.decode(msgspec.json.encode(sent))
            result = results["r:3"]
            assert (result.run_id, result.seq, result.status, result.attempt) == ("r", 3, "completed", 2)
            assert msgspec.json.decode(output_of(result))["text"] == "ünï\u2028☃"

    async def test_serving_may_be_arranged_before_start(self) -> None:
        """A worker end told what to serve before `start` begins with it; until then it takes nothing."""
        make = await self.build()
        engine, worker, results = make(), make(), Results()
        engine.on_result(results.take)
        gate = Gate()
        gate.open()
        await worker.serve([ECHO], gate.handle)
        await engine.start()
        try:
            await engine.dispatch(task("r"))
            assert gate.started == []
            await worker.start()
            await eventually(lambda: "r:0" in results, "it was answered once the worker had started")
        finally:
            await worker.close(0.1)
            await engine.close(0.1)

    async def test_many_tasks_each_answered(self) -> None:
        """A hundred tasks of three names, dispatched at once, give a hundred results, each its own."""
        names = ["suite.a", "suite.b", "suite:c"]
        tasks = [task(f"r{n}", name=names[n % 3], input={"n": n}) for n in range(100)]
        async with self.ends() as (engine, worker, results):
            await worker.serve(names, echo)
            await asyncio.gather(*(engine.dispatch(t) for t in tasks))
            await eventually(lambda: len(results) == 100, "all were answered")
            for sent in tasks:
                assert output_of(results[sent.step_id]) == bytes(sent.input)

    async def test_tasks_wait_for_room(self) -> None:
        """At most `concurrency` handlers run at once, and the rest run after them."""
        gate = Gate()
        async with self.ends() as (engine, worker, results):
            await worker.serve([ECHO], gate.handle, concurrency=3)
            for n in range(8):
                await engine.dispatch(task(f"r{n}"))
            await eventually(lambda: len(gate.started) == 3, "three were started")
            gate.open()
            await eventually(lambda: len(results) == 8, "all were answered")
            assert gate.most <= 3

    async def test_a_big_message_arrives_whole(self) -> None:
        """A payload near the limit (1 MiB where the limit is beyond) goes there and back unharmed."""
        async with self.ends() as (engine, worker, results):
            size = min(engine.capabilities.max_message - 4096, 1 << 20)
            await worker.serve([ECHO], echo)
            await engine.dispatch(task("big", input="x" * size))
            await eventually(lambda: "big:0" in results, "the big one arrived")
            assert results["big:0"].status == "completed"
            assert len(output_of(results["big:0"])) == size + 2

    async def test_a_task_beyond_the_limit_is_refused(self) -> None:
        """A task larger than `max_message` raises TransportError from dispatch, rather than vanish on the way."""
        async with self.ends() as (engine, _, _results):
            limit = engine.capabilities.max_message
            if limit > 16 << 20:
                pytest.skip(f"the limit of {limit} bytes is beyond what this test wants to allocate")
            with pytest.raises(TransportError):
                await engine.dispatch(task("huge", input="x" * (limit + 1)))

    async def test_a_turn_there_and_back(self) -> None:
        """A hosted workflow's turn shares its group's queue with steps, and its decision comes back as it was made."""
        seen: list[Task] = []
        heard: list[Answer] = []

        async def handle(task: Task) -> Answer:
            seen.append(task)
            if isinstance(task, RemoteTask):
                return answer(task)
            return msgspec.json.decode(DECISION, type=WorkflowDecision)

        async def take(answer: Answer) -> None:
            heard.append(answer)

        make = await self.build()
        engine, worker = make(), make()
        engine.on_result(take)
        await engine.start()
        await worker.start()
        try:
            await worker.serve(["suite-flow"], handle)
            turn = msgspec.json.decode(TURN, type=WorkflowTask)
            await engine.dispatch(turn)
            await engine.dispatch(task("r", name="suite:flow"))
            await eventually(lambda: len(heard) == 2, "both were answered")
            arrived = next(one for one in seen if isinstance(one, WorkflowTask))
            unstamped = msgspec.structs.replace(arrived, transport=None)
            assert msgspec.json.decode(msgspec.json.encode(unstamped)) == msgspec.json.decode(TURN)
            decision = next(one for one in heard if isinstance(one, WorkflowDecision))
            assert msgspec.json.decode(msgspec.json.encode(decision)) == msgspec.json.decode(DECISION)
        finally:
            await worker.close(0.1)
            await engine.close(0.1)

    async def test_the_bound_may_change_while_serving(self) -> None:
        """A bound given as a callable is asked before each task is taken: nothing begins at 0, and all goes on above."""
        gate, bound = Gate(), 0
        gate.open()
        async with self.ends() as (engine, worker, results):
            await worker.serve([ECHO], gate.handle, concurrency=lambda: bound)
            await engine.dispatch(task("r"))
            await asyncio.sleep(0.1)
            assert gate.started == []
            bound = 2
            await eventually(lambda: "r:0" in results, "it was taken once there was room")

    async def test_partitions_are_kept_apart(self) -> None:
        """A task of a partition reaches the workers that serve the partition."""
        async with self.ends() as (engine, worker, results):
            await worker.serve([routing_token(ECHO, "eu")], echo)
            await engine.dispatch(msgspec.structs.replace(task("r"), group=routing_token(ECHO, "eu")))
            await eventually(lambda: "r:0" in results, "the partition's worker answered")
            assert results["r:0"].status == "completed"

    # -- answers that are failures

    async def test_a_raising_handler_is_a_retryable_failure(self) -> None:
        """A handler that raises is answered failed and retryable, with its message, and the worker goes on."""

        async def handle(task: Task) -> StepResult:
            if task.run_id == "bad":
                raise ValueError("the card reader is on fire")
            return answer(task)

        async with self.ends() as (engine, worker, results):
            await worker.serve([ECHO], handle)
            await engine.dispatch(task("bad"))
            await engine.dispatch(task("good"))
            await eventually(lambda: len(results) == 2, "both were answered")
            bad = results["bad:0"]
            assert bad.status == "failed"
            assert bad.error
            assert "the card reader is on fire" in bad.error.message
            assert bad.error.retryable
            assert results["good:0"].status == "completed"

    async def test_an_unknown_step_is_a_final_failure(self) -> None:
        """A task of a name nobody serves, where a worker can see it, is answered `no handler for <name>`, not retryable."""
        async with self.ends() as (engine, worker, results):
            await worker.serve([ECHO], echo)
            lost = msgspec.structs.replace(task("r", name="suite.nobody"), group=routing_token(ECHO))
            await engine.dispatch(lost)
            await eventually(lambda: "r:0" in results, "it was answered")
            error = results["r:0"].error
            assert results["r:0"].status == "failed"
            assert error
            assert "no handler for suite.nobody" in error.message
            assert not error.retryable

    async def test_a_result_not_taken_is_delivered_again(self) -> None:
        """When the engine's handler raises, the result is not acknowledged: it comes again until it is taken."""
        results, raised = Results(), 0

        async def take(result: Answer) -> None:
            nonlocal raised
            if raised < 2:
                raised += 1
                raise ConnectionError("the store is away")
            await results.take(result)

        make = await self.build()
        engine, worker = make(), make()
        engine.on_result(take)
        await engine.start()
        await worker.start()
        try:
            await worker.serve([ECHO], echo)
            await engine.dispatch(task("r"))
            await eventually(lambda: "r:0" in results, "it came again")
            assert raised == 2
        finally:
            await worker.close(0.1)
            await engine.close(0.1)

    async def test_a_refused_result_comes_no_more(self) -> None:
        """A result the engine refuses for good is put away: it is not delivered again, and others still are."""
        results, refused = Results(), 0

        async def take(result: Answer) -> None:
            nonlocal refused
            if result.id == "forged:0":
                refused += 1
                raise MessageRefused("it does not echo its token")
            await results.take(result)

        make = await self.build()
        engine, worker = make(), make()
        engine.on_result(take)
        await engine.start()
        await worker.start()
        try:
            await worker.reply(answer(task("forged")))
            await eventually(lambda: refused == 1, "it came")
            await worker.reply(answer(task("r")))
            await eventually(lambda: "r:0" in results, "the next one was heard")
            assert refused == 1
        finally:
            await worker.close(0.1)
            await engine.close(0.1)

    async def test_a_reply_by_hand(self) -> None:
        """`reply` and `heartbeat` work without `serve`: what other workers answer is heard too."""
        async with self.ends() as (_engine, worker, results):
            await worker.reply(answer(task("r"), "by hand"))
            await eventually(lambda: "r:0" in results, "the reply arrived")
            assert msgspec.json.decode(output_of(results["r:0"])) == "by hand"

    # -- lost, late, doubled, reordered

    async def test_the_same_attempt_twice_is_harmless(self) -> None:
        """Dispatching one attempt twice gives results of that step only, and all say the same."""
        async with self.ends() as (engine, worker, results):
            await worker.serve([ECHO], echo)
            await engine.dispatch(task("r", input=1))
            await engine.dispatch(task("r", input=1))
            await engine.dispatch(task("other", input=2))
            await eventually(lambda: len(results) == 2, "both steps were answered")
            assert {output_of(r) for r in results.heard if r.step_id == "r:0"} == {b"1"}

    async def test_a_retry_runs_although_the_first_attempt_was_answered(self) -> None:
        """A second attempt of the same step id is a new task, and its result says which attempt it was."""
        async with self.ends() as (engine, worker, results):
            await worker.serve([ECHO], echo)
            await engine.dispatch(task("r", attempt=1))
            await eventually(lambda: results.heard, "the first was answered")
            await engine.dispatch(task("r", attempt=2))
            await eventually(lambda: any(r.attempt == 2 for r in results.heard), "the second was answered too")

    @pytest.mark.parametrize("seed", range(5))
    async def test_under_faults_everything_asked_again_is_done_and_counts_once(self, seed: int) -> None:
        """With tasks and results lost, doubled, late and reordered, an engine that asks again gets every result, once."""
        faults = Faults(lost=0.2, doubled=0.2, late=0.3)
        tasks = {t.step_id: t for t in (task(f"r{n}", input=n) for n in range(30))}
        async with self.ends(lambda inner: FaultyTransport(inner, faults, seed=seed)) as (engine, worker, results):
            await worker.serve([ECHO], echo)
            rounds = 0
            while missing := [t for key, t in tasks.items() if key not in results]:
                rounds += 1
                assert rounds < 100, f"never answered: {[t.step_id for t in missing]}"
                for again in missing:
                    await engine.dispatch(msgspec.structs.replace(again, attempt=rounds))
                await asyncio.sleep(faults.latest)
            assert {key: msgspec.json.decode(output_of(r)) for key, r in results.items()} == {
                f"r{n}:0": n for n in range(30)
            }

    # -- holding, cancelling, signs of life

    async def test_holding_tells_the_truth(self) -> None:
        """A task is held while it waits and while it is worked on, and not once its result was taken."""
        gate = Gate()
        async with self.ends() as (engine, worker, results):
            if not engine.capabilities.holds:
                pytest.skip("says of itself that it cannot tell (holds=False)")
            await worker.serve([ECHO], gate.handle, concurrency=1)
            await engine.dispatch(task("working"))
            await engine.dispatch(task("waiting"))
            await eventually(lambda: gate.started, "one is under way")
            ids = ["working:0", "waiting:0", "unknown:0"]
            assert set(await engine.holding(ids)) == {"working:0", "waiting:0"}
            gate.open()
            await eventually(lambda: len(results) == 2, "both were answered")
            for _ in range(1000):
                if not await engine.holding(ids):
                    return
                await asyncio.sleep(0.005)
            raise AssertionError("still held although the results were taken")

    async def test_cancel_reaches_the_handler(self) -> None:
        """Cancelling a task under way cancels its handler, and frees the worker for the next."""
        gate = Gate()
        async with self.ends() as (engine, worker, results):
            if not engine.capabilities.cancels:
                pytest.skip("says of itself that only a control plane reaches a body (cancels=False)")
            await worker.serve([ECHO], gate.handle, concurrency=1)
            await engine.dispatch(task("unwanted"))
            await eventually(lambda: gate.started == ["unwanted:0"], "it is under way")
            await engine.cancel("unwanted:0")
            await eventually(lambda: gate.cancelled == ["unwanted:0"], "its handler was cancelled")
            gate.open()
            await engine.dispatch(task("next"))
            await eventually(lambda: "next:0" in results, "the next one was worked on")

    async def test_cancelling_an_unknown_task_is_harmless(self) -> None:
        """A cancel that comes too late, or for a task nobody knows, is passed over."""
        async with self.ends() as (engine, worker, results):
            await worker.serve([ECHO], echo)
            await engine.cancel("never:0")
            await engine.dispatch(task("r"))
            await eventually(lambda: "r:0" in results, "others are answered")
            await engine.cancel("r:0")

    async def test_a_task_under_way_beats(self) -> None:
        """Where the worker end beats by itself, the engine hears beats of a task that is worked on."""
        beats: list[Heartbeat] = []
        gate = Gate()
        make = await self.build()
        engine, worker, results = make(), make(), Results()
        if not engine.capabilities.heartbeats:
            pytest.skip("says of itself that it does not beat (heartbeats=False)")
        engine.on_result(results.take)
        engine.on_heartbeat(beats.append)
        await engine.start()
        await worker.start()
        try:
            await worker.serve([ECHO], gate.handle)
            await engine.dispatch(task("r", seq=4))
            await eventually(lambda: len(beats) >= 3, "it beats again and again")
            assert {(b.run_id, b.seq, b.step_id) for b in beats} == {("r", 4, "r:4")}
            gate.open()
            await eventually(lambda: "r:4" in results, "it was answered")
        finally:
            await worker.close(0.1)
            await engine.close(0.1)

    # -- closing

    async def test_close_lets_work_finish(self) -> None:
        """Closing the worker end waits for tasks under way, and their results arrive."""
        gate = Gate()
        async with self.ends() as (engine, worker, results):
            await worker.serve([ECHO], gate.handle)
            await engine.dispatch(task("r"))
            await eventually(lambda: gate.started, "it is under way")
            closing = asyncio.create_task(worker.close(10.0))
            asyncio.get_running_loop().call_later(0.02, gate.open)
            await closing
            await eventually(lambda: "r:0" in results, "the result arrived all the same")
            assert gate.cancelled == []

    async def test_close_has_a_bound(self) -> None:
        """A handler that does not finish in time is cancelled; the task is not answered as if it had been done."""
        gate = Gate()
        async with self.ends() as (engine, worker, results):
            await worker.serve([ECHO], gate.handle)
            await engine.dispatch(task("r"))
            await eventually(lambda: gate.started, "it is under way")
            await worker.close(0.05)
            assert gate.cancelled == ["r:0"]
            assert all(r.status == "failed" for r in results.values())

    async def test_a_closed_worker_takes_nothing(self) -> None:
        """After close, tasks stay with the transport until another worker serves them."""
        make = await self.build()
        engine, first, second, results = make(), make(), make(), Results()
        engine.on_result(results.take)
        for end in (engine, first, second):
            await end.start()
        gate = Gate()
        try:
            await first.serve([ECHO], gate.handle)
            await first.close(0.1)
            await engine.dispatch(task("r"))
            await second.serve([ECHO], echo)
            await eventually(lambda: "r:0" in results, "the second worker answered")
            assert gate.started == []
        finally:
            await second.close(0.1)
            await engine.close(0.1)

    async def test_close_is_idempotent(self) -> None:
        """Closing twice is closing once, and an end that never started may be closed."""
        make = await self.build()
        never, once = make(), make()
        await never.close()
        await once.start()
        await once.close()
        await once.close()
        with pytest.raises(TransportError):
            await once.dispatch(task("r"))
