"""The PHP worker, as a process of its own, serves a live engine over each of its transports."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import uuid4

import psycopg
import pytest
from aiobotocore.session import get_session
from msgspec import Raw

from durable import Context, Durable, StepFailed, workflow
from durable.core.errors import ErrorData
from durable.core.journal import Entry
from durable.engine.handle import RunHandle
from durable.protocol.messages import Answer, RemoteTask, StepResult, WorkflowDecision, WorkflowTask
from durable.testing.facts import eventually
from durable.transports.db import DbTransport
from durable.transports.interface import Transport
from tests.servers import php
from tests.servers.services import require

assert php.REMEDY  # registers the service

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "workers" / "php"
TRANSPORTS = ["postgres", "sqlite", "sqs"]


class Site:
    """One broker with names of the test's own; workers that serve it, and what they wrote down."""

    def __init__(self, name: str, url: str, folder: Path, *, fifo: bool = False) -> None:
        self.name = name
        self.fifo = fifo
        self.url = url
        self.folder = folder
        self.prefix = f"t{uuid4().hex[:8]}"
        self.diary = folder / "diary"
        self.diary.touch()
        self.log = folder / "worker.log"

    def transport(self) -> Transport:
        """The engine's end."""
        if self.name == "sqs":
            from durable.transports.sqs import SqsTransport

            return SqsTransport(endpoint_url=self.url, prefix=self.prefix, fifo=self.fifo, wait=1, timeout=20.0)
        return DbTransport(self.url, prefix=self.prefix, lease=2.0, poll=0.1, heartbeat_interval=0.2)

    @asynccontextmanager
    async def app(self, *workflows: Any) -> AsyncIterator[Durable]:
        """An engine that serves no step of its own."""
        async with Durable("memory://", workflows=workflows, transport=self.transport()) as app:
            yield app

    @contextmanager
    def worker(self, *only: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A process that serves these steps, or all; killed at last if it still lives."""
        given = {"prefix": self.prefix, **({"only": ",".join(only)} if only else {}), **self._place(), **options}
        command = ["php", str(WORKER / "bin" / "durable-worker"), str(WORKER / "tests" / "serve.php")]
        command += [f"--{key}={value}" for key, value in given.items()]
        command += ["--sqs"] * (self.name == "sqs") + ["--fifo"] * self.fifo
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, env={**os.environ, "DIARY": str(self.diary)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _place(self) -> dict[str, Any]:
        if self.name == "sqs":
            return {"endpoint": self.url, "visibility": 2, "wait": 1}
        if self.name == "sqlite":
            return {"dsn": f"sqlite:{self.url.removeprefix('sqlite:///')}", "lease": 2, "poll": 0.02}
        parts = urlsplit(self.url)
        dsn = {
            "host": parts.hostname,
            "port": parts.port,
            "dbname": parts.path.lstrip("/"),
            **dict(parse_qsl(parts.query)),
        }
        words = ";".join(f"{key}={value}" for key, value in dsn.items() if value)
        return {
            "dsn": f"pgsql:{words}",
            "user": unquote(parts.username or ""),
            "password": unquote(parts.password or ""),
            "lease": 2,
        }

    def said(self, word: str) -> int:
        """How many lines of the diary begin with it."""
        return sum(line.startswith(word) for line in self.diary.read_text().splitlines())


@pytest.fixture(params=TRANSPORTS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    require("php")
    name: str = request.param
    if name == "sqlite":
        return Site(name, f"sqlite:///{tmp_path / 'queue.db'}", tmp_path)
    return Site(name, request.getfixturevalue({"sqs": "sqs_url", "postgres": "postgres_url"}[name]), tmp_path)


async def call(ctx: Context, wanted: dict[str, Any]) -> Any:
    """Calls one step; a failure is told as the workflow sees it."""
    try:
        return await ctx.remote(wanted["step"], wanted.get("input"), returns=Any, retries=wanted.get("retries", 0))
    except StepFailed as failed:
        error = failed.error
        return None if error is None else {"code": error.code, "message": error.message, "details": error.details}


def _workflow() -> Any:
    return workflow("php-call")(call)


async def ended(process: subprocess.Popen[bytes]) -> int:
    await eventually(lambda: process.poll() is not None, "the worker process ended")
    return int(process.returncode)


async def entries(run: RunHandle[Any]) -> list[Entry]:
    return [entry async for entry in run.watch()]


def test_its_own_tests_pass() -> None:
    """Every golden message, every name, the worker's rules over a transport in memory, and the tables on SQLite."""
    require("php")
    done = subprocess.run(
        ["php", str(WORKER / "tests" / "run.php")],
        env={**os.environ, "PROTOCOL_FOLDER": str(ROOT / "protocol")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


async def test_steps_run_in_another_language(site: Site) -> None:
    """Values of every shape, large values, what the step is told, lines in the journal, and failures of each kind."""
    async with site.app(work := _workflow()) as app:
        with site.worker():

            async def run(step: str, input: Any = None, retries: int = 0) -> RunHandle[Any]:
                return await app.start(work, {"step": step, "input": input, "retries": retries})

            shapes = {
                "empty": {},
                "list": [[], {}],
                "one": 1.0,
                "small": 0.1,
                "big": 12345678901234567890123,
                "text": 'ünï ☃ 𝄞 " \\ \n',
                "none": None,
                "yes": True,
                "0": "zero",
                "": "",
            }
            large = "ünï ☃ " * 30_000
            echo, who, big = (
                await run("php.echo", shapes),
                await run("php.who"),
                await run("php:large", {"text": large}),
            )
            flaky, later, talk = (
                await run("php.flaky", retries=3),
                await run("php.later", retries=3),
                await run("php.talk"),
            )
            declined, too_large, bytes_ = (
                await run("php.decline", retries=3),
                await run("php.too_large", retries=3),
                await run("php.bytes", retries=3),
            )
            came = await echo.result(timeout=30)
            assert came == shapes
            assert [type(came[key]) for key in ("one", "big", "empty")] == [float, int, dict]
            told = await who.result(timeout=20)
            assert told["stepId"] == told["idempotencyKey"] == f"{who.id}:0"
            assert (told["runId"], told["attempt"], told["name"]) == (who.id, 1, "php.who")
            assert told["traceparent"].startswith("00-")
            assert await big.result(timeout=20) == large
            assert await flaky.result(timeout=20) == 2
            assert await later.result(timeout=20) == 2
            assert await talk.result(timeout=20) is None
            lines = [entry.payload or b"" for entry in await entries(talk) if entry.kind == "log"]
            assert [b"begun" in line for line in lines] == [True, False]
            refused = {"code": "card_declined", "message": "card declined", "details": {"limit": 5}}
            assert await declined.result(timeout=20) == refused
            assert (await too_large.result(timeout=20))["code"] == "payload_too_large"
            assert (await bytes_.result(timeout=20))["code"] == "payload_text"


async def test_what_it_has_no_handler_for_is_answered(site: Site) -> None:
    """A step's task of another name, and a workflow's turn: failed for good; attempt and token come back as they went."""
    answers: dict[str, Answer] = {}

    async def take(answer: Answer) -> None:
        answers[answer.id] = answer

    end = site.transport()
    end.on_result(take)
    await end.start()
    try:
        with site.worker("php.echo"):
            step = RemoteTask(
                run_id="r",
                seq=4,
                step_id="r:4",
                name="php.other",
                group="php.echo",
                input=Raw(b"{}"),
                attempt=3,
                token="secret",
            )
            turn = WorkflowTask(
                task_id="r:wf:0123abcd", run_id="r", workflow="flow", workflow_version="1", input=Raw(b"{}"), history=[],
                group="php.echo", attempt=1,
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
    assert result.error == ErrorData("no handler for php.other", code="unknown_step", retryable=False)
    assert decision.status == "failed"
    assert decision.error == ErrorData("no handler for flow", "unknown_step", retryable=False)


@pytest.mark.parametrize("site", ["postgres", "sqlite"], indirect=True)
async def test_a_cancel_reaches_the_body(site: Site) -> None:
    """The handler is told with its next sign of life, and nobody answers."""
    async with site.app(work := _workflow()) as app:
        with site.worker("php.until_cancelled"):
            run = await app.start(work, {"step": "php.until_cancelled"})
            await eventually(lambda: site.said("started") == 1, "the step runs")
            await run.cancel()
            await eventually(lambda: site.said("cancelled") == 1, "the step was told")


@pytest.mark.parametrize("site", ["postgres", "sqs"], indirect=True)
async def test_a_step_longer_than_the_lease_runs_once(site: Site) -> None:
    """An alarm keeps the task of a handler that says nothing, beside a worker that would take it."""
    async with site.app(work := _workflow()) as app:
        with site.worker("php.long"), site.worker("php.long"):
            run = await app.start(work, {"step": "php.long", "input": 2.6})
            assert await run.result(timeout=20) == 1
            assert site.said("started") == 1


@pytest.mark.parametrize("site", ["postgres"], indirect=True)
async def test_a_lost_connection_is_made_again(site: Site) -> None:
    """The server ends the worker's connection: it logs that, connects again, and serves on."""
    async with site.app(work := _workflow()) as app:
        with site.worker("php.echo"):
            assert await (await app.start(work, {"step": "php.echo", "input": 1})).result(timeout=20) == 1
            async with await psycopg.AsyncConnection.connect(site.url, autocommit=True) as cx:
                end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'durable-worker'"
                assert len(await (await cx.execute(end)).fetchall()) == 1
            assert await (await app.start(work, {"step": "php.echo", "input": 2})).result(timeout=20) == 2
            assert "can be taken again" in site.log.read_text()


async def test_workers_share_the_tasks(site: Site) -> None:
    """Three processes and sixty tasks: each is done once."""
    async with site.app(work := _workflow()) as app:
        with site.worker("php.note"), site.worker("php.note"), site.worker("php.note"):
            runs = [await app.start(work, {"step": "php.note"}) for _ in range(60)]
            for run in runs:
                await run.result(timeout=30)
        assert sorted(site.diary.read_text().splitlines()) == sorted(f"did {run.id}:0 1" for run in runs)


async def test_fifo_queues(sqs_url: str, tmp_path: Path) -> None:
    """Tasks and results go through FIFO queues, with group and deduplication id."""
    require("php")
    site = Site("sqs", sqs_url, tmp_path, fifo=True)
    async with site.app(work := _workflow()) as app:
        with site.worker("php.flaky"):
            run = await app.start(work, {"step": "php.flaky", "retries": 3})
            assert await run.result(timeout=20) == 2


@pytest.mark.parametrize("site", ["sqs"], indirect=True)
async def test_what_nobody_can_read_is_put_away(site: Site) -> None:
    """It goes to the dead-letter queue with the reason, and the next task is served."""
    async with get_session().create_client("sqs", endpoint_url=site.url) as sqs:
        tasks = await sqs.create_queue(QueueName=f"{site.prefix}-tasks-php_x2E_echo")
        dead = await sqs.create_queue(QueueName=f"{site.prefix}-dead")
        await sqs.send_message(QueueUrl=tasks["QueueUrl"], MessageBody="nope")
        with site.worker("php.echo"):
            found: list[Any] = []
            async with asyncio.timeout(20):
                while not found:
                    said = await sqs.receive_message(
                        QueueUrl=dead["QueueUrl"], MessageAttributeNames=["All"], WaitTimeSeconds=1
                    )
                    found = said.get("Messages", [])
            assert found[0]["Body"] == "nope"
            assert "JSON" in found[0]["MessageAttributes"]["durable-reason"]["StringValue"]
            async with site.app(work := _workflow()) as app:
                assert await (await app.start(work, {"step": "php.echo", "input": 2})).result(timeout=20) == 2


async def test_S14_a_killed_workers_task_runs_elsewhere(site: Site) -> None:
    """(S14) kill -9 in the middle of a step: another worker does it, as the same attempt, and the run completes."""
    again = site.folder / "again"
    async with site.app(work := _workflow()) as app:
        with site.worker("php.stuck_once") as first:
            run = await app.start(work, {"step": "php.stuck_once", "input": {"again": str(again)}})
            await eventually(lambda: site.said("started") == 1, "the step runs")
            first.kill()
        again.touch()
        with site.worker("php.stuck_once"):
            assert await run.result(timeout=30) == 1


async def test_a_worker_drains(site: Site) -> None:
    """SIGTERM: what is under way finishes and is answered, nothing new is taken, and the process ends by itself."""
    until = site.folder / "until"
    async with site.app(work := _workflow()) as app:
        with site.worker("php.stuck_once") as process:
            given = {"step": "php.stuck_once", "input": {"again": str(until)}}
            run = await app.start(work, given)
            await eventually(lambda: site.said("started") == 1, "the step runs")
            process.send_signal(signal.SIGTERM)
            await eventually(lambda: "stopping" in site.log.read_text(), "the signal was heard")
            left = await app.start(work, given)
            until.touch()
            assert await run.result(timeout=20) == 1
            assert await ended(process) == 0
            assert site.said("started") == 1
            await left.cancel()


async def test_an_idle_worker_ends_at_once(site: Site) -> None:
    """SIGTERM in the middle of a wait: the process ends by itself, long before the wait is over."""
    waits = {"wait": 20} if site.name == "sqs" else {"poll": 20}
    async with site.app(work := _workflow()) as app:
        run = await app.start(work, {"step": "php.echo", "input": 1})
        with site.worker("php.echo", **waits) as process:
            assert await run.result(timeout=30) == 1
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                assert await ended(process) == 0


@pytest.mark.parametrize("site", ["postgres", "sqs"], indirect=True)
async def test_what_does_not_end_in_time_is_given_back(site: Site) -> None:
    """SIGTERM, and the step goes on: its task is given back when the time is over, and another worker does it."""
    until = site.folder / "until"
    async with site.app(work := _workflow()) as app:
        with site.worker("php.stuck_once", drain=0) as process:
            run = await app.start(work, {"step": "php.stuck_once", "input": {"again": str(until)}})
            await eventually(lambda: site.said("started") == 1, "the step runs")
            process.send_signal(signal.SIGTERM)
            assert await ended(process) == 1
        until.touch()
        with site.worker("php.stuck_once"):
            assert await run.result(timeout=20) == 1


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
async def test_a_second_signal_ends_it_at_once(site: Site) -> None:
    """SIGTERM twice: the process ends with a step under way."""
    async with site.app(work := _workflow()) as app:
        with site.worker("php.stuck_once") as process:
            await app.start(work, {"step": "php.stuck_once", "input": {"again": str(site.folder / "again")}})
            await eventually(lambda: site.said("started") == 1, "the step runs")
            process.send_signal(signal.SIGTERM)
            await eventually(lambda: "stopping" in site.log.read_text(), "the first signal was heard")
            process.send_signal(signal.SIGTERM)
            assert await ended(process) == 1
