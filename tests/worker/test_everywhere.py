"""The same worker process over every transport, by nothing but its URL: called, and told to cancel."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from durable import Durable, RunCancelled
from durable.testing.facts import PATIENCE
from tests.worker.engine_node import relay
from tests.worker.test_process import APP, begun, started

pytestmark = [pytest.mark.service, pytest.mark.broker]

PLACES = {
    "redis": "redis",
    "bullmq": "bullmq",
    "sqs": "sqs",
    "rabbitmq": "rabbitmq",
    "db": "sqlite",
}
"""Module of the adapter → how the test calls it."""
THERE = [place for module, place in PLACES.items() if importlib.util.find_spec(f"durable.transports.{module}")]


@pytest.fixture(params=THERE)
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str | None]:
    """A transport, and the control plane it needs beside it, if it cannot cancel by itself."""
    place = request.param
    if place == "sqlite":
        return f"sqlite:///{tmp_path}/tasks.db", request.getfixturevalue("redis_url")
    if place == "sqs":
        endpoint = quote(request.getfixturevalue("sqs_url"), safe="")
        return f"sqs://eu-west-1?endpoint={endpoint}&wait=1", request.getfixturevalue("redis_url")
    if place == "rabbitmq":
        return request.getfixturevalue("amqp_url"), None
    url = request.getfixturevalue("redis_url")
    return url.replace("redis://", f"{place}://"), None


async def test_N12_a_worker_process_over_any_transport(urls: tuple[str, str | None], tmp_path: Path) -> None:
    """(N12) A step is answered; a body under way is cancelled with its run, by the transport or by a control plane."""
    transport, plane = urls
    settings: dict[str, Any] = {"transport": transport, "control_plane": plane}
    options = ("--transport", transport, *(("--control-plane", plane) if plane else ()))
    async with started("-m", "durable", "worker", APP, "--json", *options, cwd=tmp_path) as process:
        await process.said(kind="started")
        async with Durable(f"sqlite:///{tmp_path}/runs.db", workflows=[relay], **settings) as app:
            assert await (await app.start(relay, ["greet", "ann"])).result(PATIENCE) == "hello ann"
            run = await app.start(relay, ["sleep", 600.0])
            await begun(app, run)
            await run.cancel()
            with pytest.raises(RunCancelled):
                await run.result(PATIENCE)
            assert (await process.said(kind="task", name="sleep"))["outcome"] == "cancelled"
