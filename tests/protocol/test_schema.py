"""The Python messages, the JSON Schemas and the golden vectors say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from durable.core import errors
from durable.core.errors import DurableError, ErrorData
from durable.protocol import messages, states
from durable.protocol.messages import ControlMessage, Heartbeat, RemoteTask, StepEvent, StepResult

PROTOCOL = Path(__file__).resolve().parents[2] / "protocol"
MESSAGES: dict[str, type[msgspec.Struct]] = {
    "remote-task.json": RemoteTask,
    "step-result.json": StepResult,
    "step-event.json": StepEvent,
    "error.json": ErrorData,
    "heartbeat.json": Heartbeat,
    "control-message.json": ControlMessage,
}


def load(path: str) -> Any:
    return json.loads((PROTOCOL / path).read_text())


SCHEMAS = {path.name: load(f"schema/{path.name}") for path in sorted((PROTOCOL / "schema").glob("*.json"))}
REGISTRY: Registry[Any] = Registry().with_resources(
    (name, Resource.from_contents(schema)) for name, schema in SCHEMAS.items()
)


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(SCHEMAS[name], registry=REGISTRY)


def vectors(which: str) -> list[Any]:
    """(schema, vector) of every vector file of a schema."""
    found = []
    for path in sorted((PROTOCOL / "vectors").glob("*.json")):
        content = json.loads(path.read_text())
        for vector in content.get(which, []):
            found.append(pytest.param(content["schema"], vector, id=f"{path.stem}: {vector['name']}"))
    return found


def test_every_message_has_a_schema_and_vectors() -> None:
    """No schema without a message, and every message that travels alone has valid and invalid vectors."""
    assert set(SCHEMAS) == set(MESSAGES)
    travelling = {vector.values[0] for which in ("valid", "invalid") for vector in vectors(which)}
    assert travelling == set(MESSAGES) - {"error.json", "step-event.json"}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_schema_has_exactly_the_fields_of_the_message(name: str) -> None:
    """Same fields, same required ones, and each closed list of words is the same list."""
    schema = SCHEMAS[name]
    Draft202012Validator.check_schema(schema)
    fields = {field.encode_name: field for field in msgspec.structs.fields(MESSAGES[name])}
    assert set(schema["properties"]) == set(fields)
    assert set(schema["required"]) == {encoded for encoded, field in fields.items() if field.required}
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


@pytest.mark.parametrize(("name", "vector"), vectors("invalid"))
def test_invalid_vectors_are_refused(name: str, vector: dict[str, Any]) -> None:
    """Schema and Python refuse it."""
    assert not validator(name).is_valid(vector["message"])
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(json.dumps(vector["message"]).encode(), type=MESSAGES[name])


def test_routing_vectors() -> None:
    """Tokens and step ids are spelled as the vectors say: a wrong queue name is a silent black hole."""
    routing = load("vectors/routing.json")
    for vector in routing["tokens"]:
        assert messages.routing_token(vector["name"], vector["partition"]) == vector["token"]
    for vector in routing["stepIds"]:
        assert messages.step_id(vector["runId"], vector["seq"]) == vector["stepId"]


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
