"""The Python messages, the JSON Schemas and the golden vectors say the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from durable.core import errors
from durable.core.errors import DurableError, ErrorData, PayloadError
from durable.protocol import codec, messages, names, states
from durable.protocol.messages import (
    AwaitSignal,
    Call,
    ControlMessage,
    Heartbeat,
    HistoryItem,
    PendingSignal,
    RecordStep,
    RemoteTask,
    Sleep,
    StartChildRun,
    StartRunRequest,
    StepEvent,
    StepResult,
    WorkflowDecision,
    WorkflowStepEvent,
    WorkflowTask,
)

PROTOCOL = Path(__file__).resolve().parents[2] / "protocol"
MESSAGES: dict[str, type[msgspec.Struct]] = {
    "remote-task.json": RemoteTask,
    "step-result.json": StepResult,
    "step-event.json": StepEvent,
    "error.json": ErrorData,
    "heartbeat.json": Heartbeat,
    "control-message.json": ControlMessage,
    "workflow-task.json": WorkflowTask,
    "history-item.json": HistoryItem,
    "pending-signal.json": PendingSignal,
    "workflow-decision.json": WorkflowDecision,
    "command-call.json": Call,
    "command-record-step.json": RecordStep,
    "command-sleep.json": Sleep,
    "command-wait-signal.json": AwaitSignal,
    "command-start-child.json": StartChildRun,
    "workflow-step-event.json": WorkflowStepEvent,
    "start-run.json": StartRunRequest,
}
PARTS = {"error.json", "step-event.json", "history-item.json", "pending-signal.json"}
"""They travel inside others, as commands do; the vectors of those show them."""
LIVENESS = {"worker-heartbeat.json", "worker-descriptor.json"}
"""Keys of a Redis, read as leniently as they can be: no message of the codec."""
READ: dict[str, Callable[[bytes], Any]] = {
    "remote-task.json": codec.decode_task,
    "heartbeat.json": codec.decode_heartbeat,
    "control-message.json": codec.decode_control,
    "workflow-task.json": codec.decode_any_task,
    "workflow-decision.json": codec.decode_answer,
    "workflow-step-event.json": codec.decode_step_event,
    "start-run.json": codec.decode_start_run,
}
"""How each enters. A result is not here: one that says whose it is is never refused (test_codec.py)."""


def load(path: str) -> Any:
    return json.loads((PROTOCOL / path).read_text())


SCHEMAS = {path.name: load(f"schema/{path.name}") for path in sorted((PROTOCOL / "schema").glob("*.json"))}
REGISTRY: Registry[Any] = Registry().with_resources(
    (name, Resource.from_contents(schema)) for name, schema in SCHEMAS.items()
)


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(SCHEMAS[name], registry=REGISTRY)


def vectors(which: str, *, liveness: bool = False) -> list[Any]:
    """(schema, vector) of every vector file of a schema."""
    found = []
    for path in sorted((PROTOCOL / "vectors").glob("*.json")):
        content = json.loads(path.read_text())
        if liveness != (content.get("schema") in LIVENESS):
            continue
        for vector in content.get(which, []):
            found.append(pytest.param(content["schema"], vector, id=f"{path.stem}: {vector['name']}"))
    return found


def test_every_message_has_a_schema_and_vectors() -> None:
    """No schema without a message, and every message that travels alone has valid and invalid vectors."""
    assert set(SCHEMAS) == set(MESSAGES) | LIVENESS
    commands = {name for name in MESSAGES if name.startswith("command-")}
    for which in ("valid", "invalid"):
        travelling = {vector.values[0] for vector in vectors(which) + vectors(which, liveness=True)}
        assert travelling == set(SCHEMAS) - PARTS - commands


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_the_schema_has_exactly_the_fields_of_the_message(name: str) -> None:
    """Same fields, same required ones, and each closed list of words is the same list."""
    schema = SCHEMAS[name]
    Draft202012Validator.check_schema(schema)
    fields = {field.encode_name: field for field in msgspec.structs.fields(MESSAGES[name])}
    tag = {"kind"} if name.startswith("command-") else set()
    assert set(schema["properties"]) == set(fields) | tag
    assert set(schema["required"]) == {encoded for encoded, field in fields.items() if field.required} | tag
    of_python = msgspec.json.schema(MESSAGES[name])["$defs"][MESSAGES[name].__name__]["properties"]
    for encoded, prop in schema["properties"].items():
        if "enum" in prop:
            words = of_python[encoded].get("enum") or [
                word for option in of_python[encoded]["anyOf"] for word in option.get("enum", [None])
            ]
            assert set(prop["enum"]) == set(words), encoded


@pytest.mark.parametrize(("name", "vector"), vectors("valid"))
def test_valid_vectors_are_read_and_written_back(name: str, vector: dict[str, Any]) -> None:
    """Schema and Python accept it; written again it is what was read, and still valid."""
    validator(name).validate(vector["message"])
    message = msgspec.json.decode(json.dumps(vector["message"]).encode(), type=MESSAGES[name])
    written = json.loads(msgspec.json.encode(message))
    validator(name).validate(written)
    assert written == vector.get("read", vector["message"])
    assert msgspec.json.decode(msgspec.json.encode(message), type=MESSAGES[name]) == message


@pytest.mark.parametrize(("name", "vector"), vectors("valid"))
def test_valid_vectors_enter(name: str, vector: dict[str, Any]) -> None:
    """What the schema accepts is let in where it arrives, and told from what else arrives there."""
    if name == "step-result.json":
        assert codec.decode_answer(json.dumps(vector["message"]).encode()).id == vector["message"]["stepId"]
    else:
        assert type(READ[name](json.dumps(vector["message"]).encode())) is MESSAGES[name]


@pytest.mark.parametrize(("name", "vector"), vectors("invalid"))
def test_invalid_vectors_are_refused(name: str, vector: dict[str, Any]) -> None:
    """Schema, Python message and codec refuse it."""
    assert not validator(name).is_valid(vector["message"])
    data = json.dumps(vector["message"]).encode()
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(data, type=MESSAGES[name])
    if name == "workflow-decision.json":
        # One that says whose it is stands for a failed turn, so that its run does not ask for it for ever.
        try:
            assert codec.decode_decision(data).error.code == "bad_decision"  # type: ignore[union-attr]
        except PayloadError:
            assert not {"taskId", "runId"} <= vector["message"].keys()
    elif name in READ:
        with pytest.raises(PayloadError):
            READ[name](data)


@pytest.mark.parametrize(("name", "vector"), vectors("valid", liveness=True))
def test_liveness_vectors_are_valid(name: str, vector: dict[str, Any]) -> None:
    """The schema accepts it, and what a reader keeps of it."""
    validator(name).validate(vector["message"])
    validator(name).validate(vector.get("read", vector["message"]))


@pytest.mark.parametrize(("name", "vector"), vectors("invalid", liveness=True))
def test_liveness_vectors_that_say_nothing_are_refused(name: str, vector: dict[str, Any]) -> None:
    """The schema refuses it."""
    assert not validator(name).is_valid(vector["message"])


def test_routing_vectors() -> None:
    """Tokens and step ids are spelled as the vectors say: a wrong queue name is a silent black hole."""
    routing = load("vectors/routing.json")
    for vector in routing["tokens"]:
        assert messages.routing_token(vector["name"], vector["partition"]) == vector["token"]
    for vector in routing["stepIds"]:
        assert messages.step_id(vector["runId"], vector["seq"]) == vector["stepId"]


def test_every_name_is_golden() -> None:
    """Queues, channels, keys and tables are called as `names.json` says, by every prefix, namespace and partition."""
    for golden in load("vectors/names.json")["names"]:
        given = golden.pop("given")
        prefix = names.effective_prefix(given["prefix"], given["namespace"])
        token = messages.routing_token(given["name"], given["partition"])
        built = {
            "prefix": prefix,
            "token": token,
            "tasks": names.tasks(prefix, token),
            "results": names.results(prefix),
            "decisions": names.decisions(prefix),
            "stepEvents": names.step_events(prefix),
            "startRun": names.start_run(prefix),
            "givenUp": names.given_up(prefix),
            "dead": names.dead(prefix),
            "control": names.control(prefix),
            "heartbeat": names.heartbeat(prefix),
            "workerHeartbeat": names.worker_heartbeat(prefix, token, given["instanceId"]),
            "workerDescriptor": names.worker_descriptor(prefix, token, given["instanceId"]),
            "tasksTable": names.tasks_table(prefix),
            "resultsTable": names.results_table(prefix),
        }
        assert built == golden


def test_names_for_sqs_are_golden() -> None:
    """What SQS takes is spelled as `names.json` says, and read back."""
    for golden in load("vectors/names.json")["sqs"]:
        assert names.restricted(golden["name"]) == golden["sqs"]
        assert names.unrestricted(golden["sqs"]) == golden["name"]


def test_names_of_the_lane_are_golden() -> None:
    """Streams and keys of the Redis lane are called as `names.json` says."""
    for golden in load("vectors/names.json")["lane"]:
        given = golden.pop("given")
        prefix = names.effective_prefix(given["prefix"], given["namespace"])
        token = messages.routing_token(given["name"], given["partition"])
        built = {
            "tasks": names.lane_tasks(prefix, token),
            "results": names.lane_results(prefix, given["instanceId"]),
            "unclaimed": names.lane_unclaimed(prefix),
            "engines": names.lane_engines(prefix),
            "held": names.lane_held(prefix),
            "cancels": names.lane_cancels(prefix),
        }
        assert built == golden


def test_no_two_names_are_one_on_sqs() -> None:
    """The spelling has an inverse for whatever looks like an escape, and writes only what SQS takes."""
    spelled: dict[str, str] = {}
    for pieces in itertools.product(["_", "x", "2E", "5F", ".", "é"], repeat=5):
        name = "".join(pieces)
        there = names.restricted(name)
        assert names.unrestricted(there) == name
        assert spelled.setdefault(there, name) == name
        assert there.replace("_", "").replace("-", "").isalnum() or not there.strip("_-")
        assert there.isascii()


def test_states_are_the_same_words() -> None:
    """`states.json` lists exactly the statuses, terminal ones and activities of the code."""
    listed = load("states.json")
    assert list(listed["status"]) == [status.value for status in states.Status]
    assert list(listed["activity"]) == [activity.value for activity in states.Activity]
    assert set(listed["terminal"]) == {status.value for status in states.TERMINAL}


def test_every_error_code_is_listed() -> None:
    """`errors.json` has every code a class bears or the tree at the top of errors.py names, and no other."""
    classes = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, DurableError)]
    borne = {thing.code for thing in classes}
    listed = set(load("errors.json"))
    tree = errors.__doc__ or ""
    assert borne <= listed
    assert [code for code in listed - borne if code not in tree] == []
