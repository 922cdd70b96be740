"""What is SQS's own: visibility, redrive, batches, shared queues, and what is said when something is missing."""

# ruff: noqa: E402  what is imported below needs the service

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from msgspec import Raw

from tests.servers.services import require

require("sqs")

from aiobotocore.session import get_session
from botocore.exceptions import ClientError

from durable.core.errors import DefinitionError, EngineStopped, MessageRefused, TransportError
from durable.protocol.codec import encode
from durable.protocol.messages import Answer, RemoteTask, StepResult, Task
from durable.testing.facts import eventually
from durable.testing.suites.transport import ECHO, Gate, Results, answer, echo, output_of, task
from durable.transports.sqs import SqsTransport
from durable.transports.sqs.batches import Batches, EntryRefused
from tests.servers.process import free_port
from tests.servers.sqs import SqsServer

ROOT = Path(__file__).resolve().parents[2]


class Site:
    """Queues of one test's own, and a client that looks at them from outside."""

    def __init__(self, url: str, client: Any) -> None:
        self.url = url
        self.client = client
        self.prefix = f"t{uuid4().hex[:8]}"

    def end(self, **options: Any) -> SqsTransport:
        given = {"endpoint_url": self.url, "prefix": self.prefix, "wait": 1, "timeout": 20.0, **options}
        return SqsTransport(**given)

    @asynccontextmanager
    async def opened(self, *ends: SqsTransport) -> AsyncIterator[None]:
        """The ends between their start and their close."""
        try:
            for end in ends:
                await end.start()
            yield
        finally:
            for end in ends:
                await end.close(0.1)

    async def queue(self, what: str) -> str:
        return str((await self.client.get_queue_url(QueueName=f"{self.prefix}-{what}"))["QueueUrl"])

    async def make(self, name: str) -> str:
        return str((await self.client.create_queue(QueueName=name))["QueueUrl"])

    async def count(self, url: str) -> tuple[int, int]:
        """(waiting, in somebody's hands)."""
        wanted = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        said = (await self.client.get_queue_attributes(QueueUrl=url, AttributeNames=wanted))["Attributes"]
        return int(said[wanted[0]]), int(said[wanted[1]])

    async def until_count(self, url: str, count: tuple[int, int]) -> None:
        for _ in range(400):
            if await self.count(url) == count:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{url} has {await self.count(url)}, not {count}")

    async def look(self, url: str, visibility: int = 0) -> list[dict[str, Any]]:
        """Messages there now."""
        answer = await self.client.receive_message(
            QueueUrl=url, MaxNumberOfMessages=10, VisibilityTimeout=visibility, MessageAttributeNames=["All"]
        )
        return list(answer.get("Messages", ()))


@pytest.fixture
async def site(sqs_url: str) -> AsyncIterator[Site]:
    async with get_session().create_client("sqs", endpoint_url=sqs_url) as client:
        yield Site(sqs_url, client)


def ends(site: Site, **options: Any) -> tuple[SqsTransport, SqsTransport, Results]:
    """(engine end, worker end, what the engine heard)."""
    engine, worker, results = site.end(**options), site.end(**options), Results()
    engine.on_result(results.take)
    return engine, worker, results


# -- visibility


async def test_a_long_task_stays_invisible(site: Site) -> None:
    """(S12) A body that takes longer than the visibility is not delivered to anybody else meanwhile."""
    engine, worker, results = ends(site, visibility=2)
    other, gate = site.end(visibility=2), Gate()
    async with site.opened(engine, worker, other):
        await worker.serve([ECHO], gate.handle)
        await other.serve([ECHO], gate.handle)
        await engine.dispatch(task("r"))
        await eventually(lambda: gate.started, "it began")
        await asyncio.sleep(3.5)
        assert gate.started == ["r:0"]
        assert gate.cancelled == []
        gate.open()
        await eventually(lambda: "r:0" in results, "it was answered")
        await site.until_count(await site.queue(f"tasks-{ECHO.replace('.', '_x2E_')}"), (0, 0))


async def test_a_task_of_a_killed_worker_comes_again(site: Site) -> None:
    """(S11, S12) A worker killed with -9 leaves its task to the visibility: another worker gets it and answers."""
    engine, worker, results = ends(site, visibility=2)
    async with site.opened(engine, worker):
        await engine.dispatch(task("r"))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.transports.sqs_worker", site.url, site.prefix, ECHO,
            cwd=ROOT, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout
        try:
            assert await process.stdout.readline() == b"r:0\n"
        finally:
            process.kill()
            await process.wait()
        await worker.serve([ECHO], echo)
        await eventually(lambda: "r:0" in results, "another worker answered it")
        assert results["r:0"].status == "completed"


async def test_a_task_that_cannot_be_held_is_cancelled(site: Site) -> None:
    """(S12) When SQS refuses to prolong a message, its body is cancelled and nothing is answered."""
    engine, worker, results = ends(site, visibility=2)
    gate = Gate()
    async with site.opened(engine, worker):
        await worker.serve(["charge"], gate.handle)
        await engine.dispatch(task("r", name="charge"))
        await eventually(lambda: gate.started, "it began")
        await site.client.purge_queue(QueueUrl=await site.queue("tasks-charge"))
        await eventually(lambda: gate.cancelled == ["r:0"], "its body was cancelled")
        await engine.dispatch(task("next", name="charge"))
        gate.open()
        await eventually(lambda: "next:0" in results, "the worker goes on")
        assert "r:0" not in results


async def test_a_task_held_too_long_is_handed_on(site: Site) -> None:
    """(S12) Before SQS's own limit the body is cut short and the task begins anew, for another receipt."""
    engine, worker, results = ends(site, visibility=2, held_max=0.5)
    first = Gate()

    async def handle(task: Task) -> StepResult:
        return await (first.handle(task) if not first.cancelled else echo(task))

    async with site.opened(engine, worker):
        await worker.serve([ECHO], handle)
        await engine.dispatch(task("r"))
        await eventually(lambda: first.cancelled == ["r:0"], "it was cut short")
        await eventually(lambda: "r:0" in results, "it was done the second time")
        assert results["r:0"].status == "completed"


async def test_what_close_cuts_short_comes_at_once(site: Site) -> None:
    """A worker that closes gives its task back: another has it long before the visibility runs out."""
    engine, worker, results = ends(site, visibility=600)
    other, gate = site.end(visibility=600), Gate()
    async with site.opened(engine, worker, other):
        await worker.serve([ECHO], gate.handle)
        await engine.dispatch(task("r"))
        await eventually(lambda: gate.started, "it began")
        await worker.close(0.05)
        assert gate.cancelled == ["r:0"]
        await other.serve([ECHO], echo)
        await eventually(lambda: "r:0" in results, "the other worker answered")


async def test_a_task_is_deleted_only_after_its_answer_was_sent(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that cannot send the answer gives the task back at once, and does it again."""
    engine, worker, results = ends(site, visibility=600)
    reply, runs = worker.reply, 0

    async def handle(task: Task) -> StepResult:
        nonlocal runs
        runs += 1
        return await echo(task)

    async def failing(answer: Answer) -> None:
        if runs == 1:
            raise TransportError("the results queue is full")
        await reply(answer)

    monkeypatch.setattr(worker, "reply", failing)
    async with site.opened(engine, worker):
        await worker.serve([ECHO], handle)
        await engine.dispatch(task("r"))
        await eventually(lambda: "r:0" in results, "it was answered in the end")
        assert runs == 2


async def test_a_result_is_deleted_only_after_the_engine_took_it(site: Site) -> None:
    """While the engine's handler works the result is invisible and there; afterwards it is gone."""
    engine, heard, taken = site.end(visibility=2), asyncio.Event(), asyncio.Event()
    times = 0

    async def take(_: Answer) -> None:
        nonlocal times
        times += 1
        heard.set()
        await taken.wait()

    engine.on_result(take)
    async with site.opened(engine):
        url = await site.queue("results")
        await engine.reply(answer(task("r")))
        await heard.wait()
        await asyncio.sleep(2.5)
        assert await site.count(url) == (0, 1)
        assert times == 1
        taken.set()
        await site.until_count(url, (0, 0))


async def test_a_stopped_engine_leaves_results_to_another(site: Site) -> None:
    """After EngineStopped the result is another engine's at once, and this one hears no more."""
    stopped, engine, results = site.end(visibility=600), site.end(visibility=600), Results()
    asked: list[str] = []

    async def stop(result: Answer) -> None:
        asked.append(result.id)
        raise EngineStopped("this engine has stopped")

    stopped.on_result(stop)
    engine.on_result(results.take)
    async with site.opened(stopped):
        await stopped.reply(answer(task("r")))
        await eventually(lambda: asked, "the first engine was asked")
        async with site.opened(engine):
            await engine.reply(answer(task("later")))
            await eventually(lambda: len(results) == 2, "the second engine took both")
    assert asked == ["r:0"]


async def test_tasks_of_several_queues_wait_for_room(site: Site) -> None:
    """The bound holds over all queues that are served together, and what had to wait is done afterwards."""
    engine, worker, results = ends(site)
    names, gate = ["a", "b", "c"], Gate()
    async with site.opened(engine, worker):
        for name in names:
            await asyncio.gather(*(engine.dispatch(task(f"{name}{n}", name=name)) for n in range(3)))
        await worker.serve(names, gate.handle, concurrency=2)
        await eventually(lambda: len(gate.started) == 2, "two began")
        gate.open()
        await eventually(lambda: len(results) == 9, "all were answered")
        assert gate.most == 2


# -- what SQS gives up on


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
async def test_what_sqs_gives_up_on_is_a_failed_result(site: Site, fifo: bool) -> None:
    """(S11) A task received too often goes to the dead-letter queue and comes back as a failure that may be retried."""
    engine, _, results = ends(site, max_receives=2, fifo=fifo)
    async with site.opened(engine):
        sent = msgspec.structs.replace(task("r", name="charge", attempt=4), token="proof")
        await engine.dispatch(sent)
        url = await site.queue("tasks-charge" + (".fifo" if fifo else ""))
        for _ in range(2):
            assert [json.loads(m["Body"])["runId"] for m in await site.look(url)] == ["r"]
        assert await site.look(url) == []
        await eventually(lambda: "r:0" in results, "it came back")
        result = results["r:0"]
        assert (result.status, result.attempt, result.token) == ("failed", 4, "proof")
        assert result.error
        assert result.error.message == "remote step worker failed: received 2 times without an answer"
        assert (result.error.code, result.error.retryable) == ("worker_failed", True)
        await site.until_count(await site.queue("dead" + (".fifo" if fifo else "")), (0, 0))


async def test_a_dead_letter_is_deleted_only_after_it_was_taken(site: Site) -> None:
    """A dead letter whose result the engine could not make durable is told again."""
    engine, heard = site.end(), 0

    async def take(_: Answer) -> None:
        nonlocal heard
        heard += 1
        if heard == 1:
            raise ConnectionError("the store is away")

    engine.on_result(take)
    async with site.opened(engine):
        dead = await site.queue("dead")
        await site.client.send_message(QueueUrl=dead, MessageBody=encode(task("r")).decode())
        await eventually(lambda: heard == 2, "it was told again")
        await site.until_count(dead, (0, 0))


async def test_other_dead_letters_are_left_and_said_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """What is no task of ours stays in the dead-letter queue, without noise, and others are heard beside it."""
    caplog.set_level(logging.WARNING, "durable.transports")
    engine, _, results = ends(site, visibility=1)
    async with site.opened(engine):
        dead = await site.queue("dead")
        await site.client.send_message(QueueUrl=dead, MessageBody="somebody's invoice")
        await eventually(lambda: "left there" in caplog.text, "it was said")
        await asyncio.sleep(1.5)
        await site.client.send_message(QueueUrl=dead, MessageBody=encode(task("r")).decode())
        await eventually(lambda: "r:0" in results, "a task is heard of")
        assert caplog.text.count("left there") == 1
    assert sum(await site.count(dead)) == 1


async def test_a_queue_without_a_redrive_policy_is_said(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A task queue that was there before and never gives up is used as it is, with a warning that names it."""
    engine = site.end()
    await site.make(f"{site.prefix}-tasks-charge")
    async with site.opened(engine):
        await engine.dispatch(task("r", name="charge"))
        assert f"queue {site.prefix}-tasks-charge has no redrive policy" in caplog.text
        await engine.dispatch(task("r", name="refund"))
        assert caplog.text.count("redrive") == 1


async def test_a_handler_may_refuse_a_dead_letter(site: Site) -> None:
    """A dead letter whose result the engine refuses stays, with the reason, and is told to nobody again."""
    engine, refused = site.end(visibility=1), 0

    async def take(_: Answer) -> None:
        nonlocal refused
        refused += 1
        raise MessageRefused("Its token is not ours.")

    engine.on_result(take)
    async with site.opened(engine):
        dead = await site.queue("dead")
        await site.client.send_message(QueueUrl=dead, MessageBody=encode(task("r")).decode())
        await eventually(lambda: refused == 1, "it was refused")
        await asyncio.sleep(1.5)
        assert refused == 1
    assert sum(await site.count(dead)) == 1


async def test_what_cannot_be_read_is_put_away(site: Site) -> None:
    """(A44) Garbage, pickles, other versions and huge messages go to the dead-letter queue with a reason, and both ends go on.
    But an answer that says whose it is, whatever else it says, has failed that step: its run does not wait for ever."""
    engine, worker, results = ends(site)
    pickled = pickle.dumps({"run_id": "r"}, protocol=0).decode("ascii")
    huge = json.dumps({"runId": "r", "seq": 0, "stepId": "r:0", "name": "charge", "attempt": "x" * 900_000})
    bad = [
        "",
        pickled,
        '{"v":99,"job":{"id":"r:0"}}',
        huge,
        "[" * 2000,
        "{}",
        '{"runId":"r","seq":0,"stepId":"other:0"}',
    ]
    async with site.opened(engine, worker):
        await worker.serve(["charge"], echo)
        await engine.dispatch(task("first", name="charge"))
        await eventually(lambda: "first:0" in results, "all is well at first")
        tasks, answers = await site.queue("tasks-charge"), await site.queue("results")
        for body in bad:
            await site.client.send_message(QueueUrl=tasks, MessageBody=body or " ")
            await site.client.send_message(QueueUrl=answers, MessageBody=body or " ")
        await engine.dispatch(task("last", name="charge"))
        await eventually(lambda: "last:0" in results, "what came after is answered")
        dead = await site.queue("dead")
        away = 2 * len(bad) - 1
        for _ in range(200):
            if sum(await site.count(dead)) == away:
                break
            await asyncio.sleep(0.05)
        assert sum(await site.count(dead)) == away
        await site.until_count(tasks, (0, 0))
        await site.until_count(answers, (0, 0))
        assert set(results) == {"first:0", "last:0", "r:0"}
        assert results["r:0"].status == "failed"


async def test_a_refused_result_is_put_away_with_its_reason(site: Site) -> None:
    """(A44) What the engine refuses lies in the dead-letter queue as it came, with the reason, and is told to nobody again."""
    engine, refused = site.end(visibility=1), 0

    async def take(_: Answer) -> None:
        nonlocal refused
        refused += 1
        raise MessageRefused("Its token is not ours.")

    engine.on_result(take)
    async with site.opened(engine):
        forged = msgspec.structs.replace(answer(task("other-workspace")), token="made up")
        await engine.reply(forged)
        await eventually(lambda: refused == 1, "it was refused")
        await site.until_count(await site.queue("results"), (0, 0))
    dead = await site.queue("dead")
    found: list[dict[str, Any]] = []
    while not found:
        found = await site.look(dead)
    assert found[0]["Body"] == encode(forged).decode()
    assert found[0]["MessageAttributes"]["durable-reason"]["StringValue"] == "Its token is not ours."


# -- queues shared with others, or given


async def test_a_marker_tells_ours_in_a_shared_queue(site: Site) -> None:
    """Messages without the marker are given back at once and stay for whom they are meant; ours go through."""
    shared, back = await site.make(f"{site.prefix}-shop"), await site.make(f"{site.prefix}-answers")
    engine, worker, results = ends(
        site, marker="durable", queue_urls={"charge": shared, "refund": shared}, results_url=back, visibility=600
    )
    for url in (shared, back):
        await site.client.send_message(QueueUrl=url, MessageBody="an invoice")
    async with site.opened(engine, worker):
        await worker.serve(["charge", "refund"], echo)
        await engine.dispatch(task("r", name="charge"))
        await engine.dispatch(task("s", name="refund"))
        await eventually(lambda: len(results) == 2, "ours were answered")
        assert {result.status for result in results.values()} == {"completed"}
        for url in (shared, back):
            found: list[dict[str, Any]] = []
            while not found:
                found = await site.look(url)
            assert found[0]["Body"] == "an invoice"


async def test_given_queues_need_no_names(site: Site) -> None:
    """With URLs for all, nothing is looked up and nothing is made."""
    urls = {what: await site.make(f"mine-{uuid4().hex[:8]}") for what in ("tasks", "results", "decisions", "dead")}
    engine, worker, results = ends(
        site, create_queues=False, queue_urls={ECHO: urls["tasks"]}, results_url=urls["results"],
        decisions_url=urls["decisions"], dead_url=urls["dead"],
    )  # fmt: skip
    async with site.opened(engine, worker):
        await worker.serve([ECHO], echo)
        await engine.dispatch(task("r"))
        await eventually(lambda: "r:0" in results, "it was answered")
    listed = await site.client.list_queues(QueueNamePrefix=site.prefix)
    assert listed.get("QueueUrls", []) == []


async def test_queues_are_called_as_the_wire_says(site: Site) -> None:
    """Plain names stay as they are, others are escaped; what is made keeps messages as long as SQS can, and task queues
    know where dead letters go."""
    engine = site.end(max_receives=7)
    async with site.opened(engine):
        await engine.dispatch(task("r", name="charge"))
        await engine.dispatch(task("r", name="payments.charge"))
        urls = (await site.client.list_queues(QueueNamePrefix=site.prefix))["QueueUrls"]
        assert sorted(url.rpartition("/")[2].removeprefix(site.prefix) for url in urls) == [
            "-dead", "-decisions", "-results", "-tasks-charge", "-tasks-payments_x2E_charge",
        ]  # fmt: skip
        said = await site.client.get_queue_attributes(QueueUrl=await site.queue("tasks-charge"), AttributeNames=["All"])
        policy = json.loads(said["Attributes"]["RedrivePolicy"])
        assert policy["maxReceiveCount"] == 7
        assert policy["deadLetterTargetArn"].endswith(f":{site.prefix}-dead")
        assert said["Attributes"]["MessageRetentionPeriod"] == "1209600"


# -- messages that go


class Calls:
    """A batch call that refuses some entries, and remembers what was asked."""

    def __init__(self, refuse: Callable[[dict[str, Any]], bool] = lambda _: False) -> None:
        self.batches: list[list[dict[str, Any]]] = []
        self._refuse = refuse

    async def __call__(self, *, QueueUrl: str, Entries: list[dict[str, Any]]) -> dict[str, Any]:
        self.batches.append(Entries)
        await asyncio.sleep(0.01)
        said: dict[str, Any] = {"Successful": [], "Failed": []}
        for entry in Entries:
            refused = {"Id": entry["Id"], "Code": "Nope", "SenderFault": True}
            said["Failed" if self._refuse(entry) else "Successful"].append(refused)
        return said


async def test_what_is_sent_together_goes_in_batches() -> None:
    """Of 25 messages at once at most 10 go in a call, and no call has more bytes than SQS takes."""
    calls = Calls()
    batches = Batches(calls, at_once=1)
    await asyncio.gather(*(batches.put("u", {"n": n}) for n in range(25)))
    assert [len(batch) for batch in calls.batches] == [10, 10, 5]
    calls.batches.clear()
    await asyncio.gather(*(batches.put("u", {"n": n}, size=400_000) for n in range(5)))
    assert [len(batch) for batch in calls.batches] == [2, 2, 1]


async def test_an_entry_that_is_refused_fails_alone() -> None:
    """A partial failure raises for just those it is about."""
    batches = Batches(Calls(lambda entry: entry["n"] % 3 == 0), at_once=1)
    outcomes = await asyncio.gather(*(batches.put("u", {"n": n}) for n in range(9)), return_exceptions=True)
    assert [isinstance(outcome, EntryRefused) for outcome in outcomes] == [n % 3 == 0 for n in range(9)]


async def test_a_call_refused_for_one_entry_is_tried_one_by_one() -> None:
    """Where the whole call is refused because of one message, the others are sent all the same."""

    async def call(*, QueueUrl: str, Entries: list[dict[str, Any]]) -> dict[str, Any]:
        if any(entry["n"] == 3 for entry in Entries):
            raise ClientError({"Error": {"Code": "InvalidMessageContents"}}, "SendMessageBatch")
        return {"Successful": [{"Id": entry["Id"]} for entry in Entries]}

    batches = Batches(call, at_once=1)
    outcomes = await asyncio.gather(*(batches.put("u", {"n": n}) for n in range(5)), return_exceptions=True)
    assert [isinstance(outcome, ClientError) for outcome in outcomes] == [n == 3 for n in range(5)]


async def test_whoever_waits_for_a_call_hears_of_the_close() -> None:
    """Nothing waits for ever: what is under way and what is queued fails when the transport closes."""

    async def never(**_: Any) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    batches = Batches(never, at_once=1)
    waiting = asyncio.gather(*(batches.put("u", {"n": n}) for n in range(15)), return_exceptions=True)
    await asyncio.sleep(0)
    await batches.close()
    assert all(isinstance(outcome, ConnectionError) for outcome in await waiting)


async def test_dispatches_at_once_share_calls(site: Site) -> None:
    """Twenty tasks dispatched at the same time need far fewer calls, and each arrives."""
    engine = site.end()
    async with site.opened(engine):
        await engine.dispatch(task("first", name="charge"))
        sent, calls = engine._sends._call, 0

        async def counting(**arguments: Any) -> dict[str, Any]:
            nonlocal calls
            calls += 1
            return await sent(**arguments)

        engine._sends._call = counting
        await asyncio.gather(*(engine.dispatch(task(f"r{n}", name="charge")) for n in range(20)))
        assert calls == 2
        assert await site.count(await site.queue("tasks-charge")) == (21, 0)


async def test_every_character_of_json_travels(site: Site) -> None:
    """SQS takes no U+FFFE and U+FFFF; a task and a result with them arrive unchanged all the same."""
    engine, worker, results = ends(site)
    async with site.opened(engine, worker):
        text = "\ufffe\uffff\x7f\x01\U0001f600\\"
        await engine.dispatch(task("r", name="charge", input=text))
        body = (await site.look(await site.queue("tasks-charge")))[0]["Body"]
        assert not {"\ufffe", "\uffff"} & set(body)
        await worker.serve(["charge"], echo)
        await eventually(lambda: "r:0" in results, "it was answered")
        assert json.loads(output_of(results["r:0"])) == text


async def test_fifo_queues_drop_what_is_sent_twice(site: Site) -> None:
    """The same attempt dispatched twice is one message of its step's group; another attempt is another."""
    engine = site.end(fifo=True)
    async with site.opened(engine):
        for attempt in (1, 1, 2):
            await engine.dispatch(task("r", name="charge", attempt=attempt))
        await engine.dispatch(task("a run with spaces\n" + "x" * 200, name="charge"))
        url = await site.queue("tasks-charge.fifo")
        assert await site.count(url) == (3, 0)
        read = await site.client.receive_message(QueueUrl=url, MaxNumberOfMessages=10, AttributeNames=["All"])
        assert read["Messages"][0]["Attributes"]["MessageGroupId"] == "r:0"


async def test_fifo_queues_let_parallel_steps_of_a_run_go(site: Site) -> None:
    """Two steps of one run are worked on at the same time, while neither is answered."""
    engine, worker, results = ends(site, fifo=True)
    async with site.opened(engine, worker):
        gate = Gate()
        await worker.serve(["charge"], gate.handle)
        for seq in (0, 1):
            await engine.dispatch(task("r", seq=seq, name="charge"))
        await eventually(lambda: len(gate.started) == 2, "both have begun")
        gate.open()
        await eventually(lambda: {"r:0", "r:1"} <= results.keys(), "both were answered")


# -- what is said when something is missing


async def refusal(end: SqsTransport) -> str:
    with pytest.raises(TransportError) as caught:
        await end.start()
    await end.close()
    return str(caught.value)


async def test_missing_credentials_are_named(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without credentials `start` says which variables to set."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in await refusal(site.end())


async def test_a_missing_region_is_named(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a region `start` says where to give one."""
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert "give region=, or set AWS_DEFAULT_REGION" in await refusal(site.end())


@pytest.mark.parametrize("variable", ["SQS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SQS"])
async def test_the_environment_names_the_endpoint(site: Site, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both variables are honoured."""
    for name in ("SQS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SQS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, site.url)
    async with site.opened(site.end(endpoint_url=None)):
        await site.queue("results")


async def test_a_missing_queue_is_named(site: Site) -> None:
    """Where queues may not be made, `start` and `dispatch` say which one is not there, and in which region."""
    said = await refusal(site.end(create_queues=False))
    assert f"no queue {site.prefix}-results in region eu-west-1" in said
    for what in ("results", "decisions", "dead"):
        await site.make(f"{site.prefix}-{what}")
    engine = site.end(create_queues=False)
    async with site.opened(engine):
        with pytest.raises(TransportError, match=f"{site.prefix}-tasks-payments_x2E_charge in region"):
            await engine.dispatch(task("r", name="payments.charge"))
        with pytest.raises(TransportError, match="would have a name of 10"):
            await engine.dispatch(task("r", name="x" * 90))


async def test_an_endpoint_that_is_away_fails_fast(site: Site) -> None:
    """Nobody waits for long for a server that is not there."""
    began = time.monotonic()
    assert "does not answer" in await refusal(site.end(endpoint_url=f"http://127.0.0.1:{free_port()}", timeout=5.0))
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("options", [{"visibility": 0}, {"wait": 0}, {"wait": 21}, {"max_message": 2 << 20}])
async def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    """What SQS cannot do is refused where it is written."""
    with pytest.raises(DefinitionError, match=f"takes a {next(iter(options))} from"):
        SqsTransport(**options)  # type: ignore[arg-type]


async def test_a_server_that_comes_back_is_found_again(sqs_url: str) -> None:
    """While SQS is away a dispatch fails within seconds; afterwards both ends go on by themselves, and make queues anew
    where they are gone."""
    require("sqs")
    server = SqsServer()
    server.start()
    try:
        async with get_session().create_client("sqs", endpoint_url=server.url) as client:
            site = Site(server.url, client)
            engine, worker, results = ends(site, timeout=3.0)
            async with site.opened(engine, worker):
                await worker.serve([ECHO], echo)
                await engine.dispatch(task("before"))
                await eventually(lambda: "before:0" in results, "all is well at first")
                await asyncio.to_thread(server.kill)
                with pytest.raises(TransportError):
                    await asyncio.wait_for(engine.dispatch(task("lost")), 8)
                await asyncio.to_thread(server.start)
                await engine.dispatch(task("after"))
                await eventually(lambda: "after:0" in results, "it goes on")
    finally:
        server.close()


async def test_there_is_no_asking_and_no_calling_back(site: Site) -> None:
    """The transport says what SQS cannot do, rather than guess."""
    end = site.end(signed=True)
    capabilities = end.capabilities
    said = (capabilities.holds, capabilities.cancels, capabilities.broadcast, capabilities.heartbeats)
    assert said == (False, False, False, False)
    assert capabilities.signed
    with pytest.raises(TransportError, match="cannot tell"):
        await end.holding(["r:0"])


async def test_a_sent_task_is_the_json_of_the_wire(site: Site) -> None:
    """The body is the task's own JSON and nothing around it: a worker of another make reads it and is understood."""
    engine, _, results = ends(site)
    async with site.opened(engine):
        await engine.dispatch(
            RemoteTask(
                run_id="r", seq=2, step_id="r:2", name="charge", group="charge", input=Raw(b'{"a":1}'), attempt=1
            )
        )
        message = (await site.look(await site.queue("tasks-charge")))[0]
        assert "MessageAttributes" not in message
        assert json.loads(message["Body"]) == {
            "runId": "r", "seq": 2, "stepId": "r:2", "name": "charge", "group": "charge", "input": {"a": 1}, "attempt": 1,
        }  # fmt: skip
        body = {"runId": "r", "seq": 2, "stepId": "r:2", "status": "completed", "output": None, "elapsed": 3}
        await site.client.send_message(QueueUrl=await site.queue("results"), MessageBody=json.dumps(body, indent=1))
        await eventually(lambda: "r:2" in results, "it was understood")
        assert results["r:2"].attempt is None
