"""Functions over HTTP: the engine signs, asks and reads as the golden vectors say, which the SDKs read too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from durable import Durable
from durable.core.errors import BadAnswer, RunFailed
from durable.core.functions import AppFunction, Pass, Reply, function_workflow
from durable.core.passes import read_operation
from durable.core.retry import RetryPolicy
from durable.engine.events import Publication
from durable.protocol.signature import body_signature
from durable.testing.facts import eventually

VECTORS = Path(__file__).resolve().parents[2] / "protocol" / "vectors" / "functions"
LATE = "2099-01-01T00:00:00Z"


def load(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((VECTORS / file).read_text())
    return found


@pytest.mark.parametrize("vector", [pytest.param(one, id=one["name"]) for one in load("signature.json")["signatures"]])
def test_signatures_of_bodies(vector: dict[str, str]) -> None:
    """The plain signature is the same everywhere."""
    assert body_signature(vector["key"], vector["body"].encode()) == vector["header"]


@pytest.mark.parametrize("vector", [pytest.param(one, id=one["name"]) for one in load("operation.json")["valid"]])
def test_operations_are_read(vector: dict[str, Any]) -> None:
    """What an app may answer is understood, and by its id."""
    said = vector["message"]
    answer = read_operation(json.dumps(said).encode())
    assert answer.status == {"done": "completed"}.get(said["op"], "failed" if said.get("id", 0) is None else "continue")
    assert [one.id for one in answer.reached] == ([said["id"]] if answer.status == "continue" else [])


@pytest.mark.parametrize("vector", [pytest.param(one, id=one["name"]) for one in load("operation.json")["invalid"]])
def test_other_answers_are_refused(vector: dict[str, Any]) -> None:
    """What makes no sense is an error that says so, and nothing else."""
    with pytest.raises(BadAnswer):
        read_operation(json.dumps(vector["message"]).encode())


class Script:
    """An app that answers as the conversation says, and notes what it was asked."""

    def __init__(self, passes: list[dict[str, Any]]) -> None:
        self.passes = passes
        self.asked: list[dict[str, Any]] = []

    async def ask(self, call: Pass) -> Reply:
        said = dict(self.passes[len(self.asked)]["answer"])
        self.asked.append(msgspec.json.decode(call.body))
        if said.get("until") == "*":
            said["until"] = LATE
        return Reply(200, msgspec.json.encode(said))

    def matches(self, ids: dict[str, str]) -> None:
        """Whether it was asked as the conversation says. `ids`: of this time, by those that stand there."""
        assert len(self.asked) == len(self.passes)
        for one, asked in zip(self.passes, self.asked, strict=True):
            text = json.dumps(one["call"])
            for there, here in ids.items():
                text = text.replace(f'"{there}"', f'"{here}"')
            expected = json.loads(text)
            if "tell" in expected["steps"]:  # the ids of what was sent stand for themselves
                [sent] = asked["steps"]["tell"]["data"]["ids"]
                expected["steps"]["tell"]["data"] = {"ids": [sent]}
            assert asked == expected, one["name"]

    def function(self, **options: Any) -> Any:
        function = AppFunction("fulfil", "2", "default", "shop", "operation", self.ask, versioned=True, **options)
        return function_workflow(function, on="order/created")


async def test_the_engine_leads_the_golden_conversation() -> None:
    """Every call of a run is the one of the vectors, from the event to the result."""
    script = Script([one for one in load("conversation.json")["passes"] if "failure" not in one["call"]])
    async with Durable("memory://", workflows=[script.function()]) as app:
        event = script.passes[0]["call"]["event"]
        [found] = await app.engine.publish([Publication(name=event["name"], data=event["data"], id=event["id"])])
        await eventually(lambda: len(script.asked) == 3, "it waits")
        await app.engine.publish([Publication(name="order/packed", data={"id": "another", "box": 1}, id="e-0")])
        packed = await app.engine.publish([Publication(name="order/packed", data={"id": "o-1", "box": 7}, id="e-2")])
        run_id = found.admissions[0].run_id
        assert run_id is not None
        assert await app.engine.result(run_id, 10) == script.passes[-1]["answer"]["data"]
    script.matches({"r-1": run_id, "e-1": found.event_id, "e-2": packed[0].event_id})


async def test_the_engine_tells_the_app_of_its_failure_as_the_vectors_say() -> None:
    """After a failure for good the failure handler is asked, from its beginning, with the failure."""
    told = [one for one in load("conversation.json")["passes"] if "failure" in one["call"]]
    failed = {
        "op": "error",
        "id": "charge",
        "message": "no funds",
        "name": "NonRetryable",
        "code": "no_funds",
        "retryable": False,
    }
    first = told[0]["call"] | {"steps": {}}
    del first["failure"]
    script = Script([{"name": "it fails", "call": first, "answer": failed}, *told])
    function = script.function(on_failure=True, retry=RetryPolicy(max_attempts=2, initial_delay=0.01))
    async with Durable("memory://", workflows=[function]) as app:
        event = first["event"]
        [found] = await app.engine.publish([Publication(name=event["name"], data=event["data"], id=event["id"])])
        run_id = found.admissions[0].run_id
        assert run_id is not None
        with pytest.raises(RunFailed, match="no funds"):
            await app.engine.result(run_id, 10)
    script.matches({"r-1": run_id, "e-1": found.event_id})
