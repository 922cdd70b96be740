"""The TypeScript worker, as a process of its own, serves a live engine over each of its transports."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from msgspec import Raw

from durable import Context, Durable, StepFailed, workflow
from durable.core.errors import ErrorData
from durable.core.journal import Entry
from durable.engine.handle import RunHandle
from durable.protocol.messages import Answer, RemoteTask, StepResult, WorkflowDecision, WorkflowTask
from durable.testing.facts import eventually
from durable.transports.interface import Transport
from tests.servers import node
from tests.servers.redis import RedisServer
from tests.servers.services import require

ROOT = Path(__file__).resolve().parents[2]
TRANSPORTS = ["bullmq", "sqs", "postgres"]
pytestmark = pytest.mark.timeout(240)  # the first of them may have to fetch packages and compile


class Site:
    """One broker with names of the test's own; workers that serve it, and what they wrote down."""

    def __init__(self, name: str, url: str, folder: Path, control_url: str | None) -> None:
        self.name = name
        self.url = url
        self.folder = folder
        self.control_url = control_url
        self.prefix = f"t{uuid4().hex[:8]}"
        self.diary = folder / "diary"
        self.diary.touch()

    def transport(self) -> Transport:
        """The engine's end."""
        if self.name == "bullmq":
            from durable.transports.bullmq import BullMQTransport

            return BullMQTransport(self.url, prefix=self.prefix, failures_every=0.2)
        if self.name == "sqs":
            from durable.transports.sqs import SqsTransport

            return SqsTransport(endpoint_url=self.url, prefix=self.prefix, wait=1, timeout=20.0)
        from durable.transports.db import DbTransport

        return DbTransport(self.url, prefix=self.prefix, lease=2.0, heartbeat_interval=0.2)

    @asynccontextmanager
    async def app(self, *workflows: Any) -> AsyncIterator[Durable]:
        """An engine that serves no step of its own."""
        plane: dict[str, Any] = {}
        if self.control_url is not None:
            from durable.control_plane.redis import RedisControlPlane

            plane["control_plane"] = RedisControlPlane(self.control_url, channel=f"{self.prefix}-control")
        async with Durable("memory://", workflows=workflows, transport=self.transport(), **plane) as app:
            yield app

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[bytes]]:
        """A process; killed at last if it still lives."""
        ready = node.built()
        assert ready is not None
        environment = {
            **os.environ,
            "TRANSPORT": self.name,
            "URL": self.url,
            "PREFIX": self.prefix,
            "DIARY": str(self.diary),
            **({"CONTROL_URL": self.control_url} if self.control_url else {}),
        }
        with (self.folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                [ready.node, str(ready.dist / "test" / "serve.js")], env=environment, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def said(self, word: str) -> int:
        """How many lines of the diary begin with it."""
        return sum(line.startswith(word) for line in self.diary.read_text().splitlines())


@pytest.fixture(params=TRANSPORTS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    require("node")
    name: str = request.param
    url: str = request.getfixturevalue({"bullmq": "redis_url", "sqs": "sqs_url", "postgres": "postgres_url"}[name])
    # BullMQ and the tables bring cancels by themselves; over SQS they need a control plane.
    control = request.getfixturevalue("redis_url") if name == "sqs" else None
    return Site(name, url, tmp_path, control)


async def call(ctx: Context, wanted: dict[str, Any]) -> Any:
    """Calls one step; a failure is told as the workflow sees it."""
    try:
        return await ctx.remote(wanted["step"], wanted.get("input"), returns=Any, retries=wanted.get("retries", 0))
    except StepFailed as failed:
        error = failed.error
        return None if error is None else {"code": error.code, "message": error.message, "details": error.details}


async def ended(process: subprocess.Popen[bytes]) -> int:
    await eventually(lambda: process.poll() is not None, "the worker process ended")
    return int(process.returncode)


async def entries(run: RunHandle[Any]) -> list[Entry]:
    return [entry async for entry in run.watch()]


def test_its_own_tests_pass() -> None:
    """Every golden vector, every name, and the worker's rules over a transport in memory: `npm test`, without npm."""
    require("node")
    ready = node.built()
    assert ready is not None
    files = sorted(str(path) for path in (ready.dist / "test").glob("*.test.js"))
    done = subprocess.run(
        [ready.node, "--test", *files],
        env={**os.environ, "PROTOCOL_FOLDER": str(ROOT / "protocol")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]


async def test_steps_run_in_another_language(site: Site) -> None:
    """Values, large values, what the step is told, lines in the journal, failures of each kind, and names nobody serves."""
    async with site.app(work := _workflow()) as app:
        with site.worker():

            async def run(step: str, input: Any = None, retries: int = 0) -> RunHandle[Any]:
                return await app.start(work, {"step": step, "input": input, "retries": retries})

            large = "ünï ☃ " * 30_000
            double, who, big = (
                await run("ts.double", {"n": 21}),
                await run("ts.who"),
                await run("ts:large", {"text": large}),
            )
            flaky, later, talk = (
                await run("ts.flaky", retries=3),
                await run("ts.later", retries=3),
                await run("ts.talk"),
            )
            declined, too_large = await run("ts.decline", retries=3), await run("ts.too_large", retries=3)
            assert await double.result(timeout=30) == {"n": 42}
            told = await who.result(timeout=20)
            assert told["stepId"] == told["idempotencyKey"] == f"{who.id}:0"
            assert (told["attempt"], told["name"]) == (1, "ts.who")
            assert told["traceparent"].startswith("00-")
            assert await big.result(timeout=20) == large.upper()
            assert await flaky.result(timeout=20) == 2
            assert await later.result(timeout=20) == 2
            assert await talk.result(timeout=20) is None
            lines = [entry.payload for entry in await entries(talk) if entry.kind == "log"]
            assert [b"begun" in (line or b"") for line in lines] == [True, False]
            refused = {"code": "card_declined", "message": "card declined", "details": {"limit": 5}}
            assert await declined.result(timeout=20) == refused
            assert (await too_large.result(timeout=20))["code"] == "payload_too_large"


async def test_what_it_has_no_handler_for_is_answered(site: Site) -> None:
    """A step's task of another name, and a workflow's turn: failed for good; the token comes back as it went."""
    answers: dict[str, Answer] = {}

    async def take(answer: Answer) -> None:
        answers[answer.id] = answer

    end = site.transport()
    end.on_result(take)
    await end.start()
    try:
        with site.worker():
            step = RemoteTask(
                run_id="r",
                seq=4,
                step_id="r:4",
                name="ts.other",
                group="ts.double",
                input=Raw(b"{}"),
                attempt=3,
                token="secret",
            )
            turn = WorkflowTask(
                task_id="r:wf:0123abcd", run_id="r", workflow="flow", workflow_version="1", input=Raw(b"{}"), history=[],
                group="ts.double", attempt=1,
            )  # fmt: skip
            await end.dispatch(step)
            await end.dispatch(turn)
            await eventually(lambda: len(answers) == 2, "both are answered")
    finally:
        await end.close(0.1)
    result, decision = answers["r:4"], answers["r:wf:0123abcd"]
    assert isinstance(result, StepResult)
    assert isinstance(decision, WorkflowDecision)
    assert (result.status, result.attempt, result.token) == ("failed", 3, "secret")
    assert result.error == ErrorData("no handler for ts.other", code="unknown_step", retryable=False)
    assert (decision.status, decision.error) == (
        "failed",
        ErrorData("no handler for flow", "unknown_step", retryable=False),
    )


async def test_a_cancel_reaches_the_body(site: Site) -> None:
    """The handler's signal is aborted."""
    async with site.app(work := _workflow()) as app:
        with site.worker():
            run = await app.start(work, {"step": "ts.until_aborted"})
            await eventually(lambda: site.said("started") == 1, "the step runs")
            await run.cancel()
            await eventually(lambda: site.said("aborted") == 1, "the step was aborted")


async def test_it_can_be_seen(redis_url: str, tmp_path: Path) -> None:
    """Over BullMQ: keys that say who is alive and what it serves, gone when it leaves; lines as they are told."""
    require("node")
    site = Site("bullmq", redis_url, tmp_path, None)
    from redis.asyncio import Redis

    from durable.protocol.liveness import WorkerDescriptor, descriptor_hash, read_beat

    alive, what = (f"{site.prefix}-worker-{kind}:ts.talk" for kind in ("heartbeat", "descriptor"))
    async with Redis.from_url(redis_url) as client, client.pubsub() as heard, site.app(work := _workflow()) as app:
        await heard.subscribe(f"{site.prefix}-control")
        with site.worker() as process:
            run = await app.start(work, {"step": "ts.talk"})
            await run.result(timeout=20)
            [key] = await client.keys(f"{alive}:*")
            [described] = await client.keys(f"{what}:*")
            beat = read_beat(await client.get(key))
            descriptor = msgspec.json.decode(await client.get(described), type=WorkerDescriptor)
            assert beat.descriptor_hash == descriptor_hash(descriptor)
            assert (descriptor.runtime, "ts.talk" in descriptor.steps) == ("node", True)
            assert 0 < await client.ttl(key) <= 35
            process.send_signal(signal.SIGTERM)
            assert await ended(process) == 0
            assert await client.keys(f"{site.prefix}-worker-*") == []
        lines = []
        while said := await heard.get_message(timeout=0.2):
            if said["type"] == "message" and (event := json.loads(said["data"]).get("event") or {}):
                lines += [event] if event["type"] == "step.progress" else []
    assert [(line["stepId"], line["attempt"], line["event"]["message"], line["event"]["index"]) for line in lines] == [
        (f"{run.id}:0", 1, "begun", 0),
        (f"{run.id}:0", 1, "slow", 1),
    ]


async def test_a_redis_that_restarts_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """The answer is handed over once Redis is back, and the worker goes on serving."""
    require("node")
    require("redis")
    server = RedisServer(persist=True)
    server.start()
    try:
        site = Site("bullmq", server.url, tmp_path, None)
        until = tmp_path / "until"
        async with site.app(work := _workflow()) as app:
            with site.worker():
                run = await app.start(work, {"step": "ts.slow", "input": {"until": str(until)}})
                await eventually(lambda: site.said("started") == 1, "the step runs")
                await asyncio.to_thread(server.kill)
                until.touch()
                await asyncio.to_thread(server.start)
                assert await run.result(timeout=40) == "finished"
                after = await app.start(work, {"step": "ts.double", "input": {"n": 2}})
                assert await after.result(timeout=30) == {"n": 4}
    finally:
        server.close()


async def test_S14_a_killed_workers_task_runs_elsewhere(site: Site) -> None:
    """kill -9 in the middle of a step: another worker does it, as the same attempt, and the run completes."""
    again = site.folder / "again"
    async with site.app(work := _workflow()) as app:
        with site.worker() as first:
            run = await app.start(work, {"step": "ts.stuck_once", "input": {"again": str(again)}})
            await eventually(lambda: site.said("started") == 1, "the step runs")
            first.kill()
        again.touch()
        with site.worker():
            assert await run.result(timeout=30) == 1


async def test_a_worker_drains(site: Site) -> None:
    """SIGTERM: what is under way finishes and is answered, nothing new is taken, and the process ends by itself."""
    until = site.folder / "until"
    async with site.app(work := _workflow()) as app:
        with site.worker() as process:
            run = await app.start(work, {"step": "ts.slow", "input": {"until": str(until)}})
            await eventually(lambda: site.said("started") == 1, "the step runs")
            process.send_signal(signal.SIGTERM)
            until.touch()
            assert await run.result(timeout=20) == "finished"
            assert await ended(process) == 0


async def test_a_second_signal_ends_it_at_once(site: Site) -> None:
    """SIGTERM twice: the process ends with a step under way."""
    async with site.app(work := _workflow()) as app:
        with site.worker() as process:
            await app.start(work, {"step": "ts.stuck_once", "input": {"again": str(site.folder / "again")}})
            await eventually(lambda: site.said("started") == 1, "the step runs")
            process.send_signal(signal.SIGTERM)
            log = site.folder / "worker.log"
            await eventually(lambda: "stopping" in log.read_text(), "the first signal was heard")
            process.send_signal(signal.SIGTERM)
            assert await ended(process) == 1


def test_one_workflow_moves_from_place_to_place(redis_url: str, tmp_path: Path) -> None:
    """The example: the same workflow inside one process, over BullMQ, and served by this worker."""
    require("node")
    ready = node.built()
    assert ready is not None
    variables = {
        "REDIS_URL": redis_url,
        "NODE": ready.node,
        "TYPESCRIPT_DIST": str(ready.dist),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "one_workflow_three_ways.py")],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "inside: a.png, 160 px wide, by Python; b.png, 160 px wide, by Python",
        "Python over BullMQ: a.png, 160 px wide, by Python; b.png, 160 px wide, by Python",
        "TypeScript over BullMQ: a.png, 160 px wide, by Node; b.png, 160 px wide, by Node",
    ]


def _workflow() -> Any:
    return workflow("ts-call")(call)
