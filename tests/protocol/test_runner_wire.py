"""The runners' wire: structs, schemas and golden vectors say the same; what a pass answers is what the schema allows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

from durable.protocol.runners import Envelope, Hello, Invoke, InvokeBody, read_envelope, read_invoke, step_hash

PROTOCOL = Path(__file__).resolve().parents[2] / "protocol"
SCHEMAS: dict[str, type[msgspec.Struct]] = {"invoke.json": Invoke, "result.json": InvokeBody}


def vectors(file: str, which: str = "valid") -> list[Any]:
    content = json.loads((PROTOCOL / "vectors" / "runners" / file).read_text())
    return [pytest.param(vector, id=vector["name"]) for vector in content[which]]


def schema_of(name: str) -> dict[str, Any]:
    """The schema of a struct: of what is written, and what must be there when it is read."""
    [reference], parts = msgspec.json.schema_components([SCHEMAS[name]], ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"runners/{name}",
        **reference,
        "$defs": dict(sorted(parts.items())),
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_are_those_of_the_structs(name: str) -> None:
    """Field for field. DURABLE_WRITE_SCHEMAS=1 writes them anew."""
    file = PROTOCOL / "schema" / "runners" / name
    made = schema_of(name)
    if os.environ.get("DURABLE_WRITE_SCHEMAS"):
        file.write_text(json.dumps(made, indent=2) + "\n")
    assert json.loads(file.read_text()) == json.loads(json.dumps(made))
    Draft202012Validator.check_schema(made)


@pytest.mark.parametrize("vector", vectors("invoke.json"))
def test_invokes_are_read_and_written_back(vector: dict[str, Any]) -> None:
    """What an engine sends, plain or ours: valid by the schema, read by a runner, and written again it is the same."""
    Draft202012Validator(schema_of("invoke.json")).validate(vector["message"])
    read = read_invoke(json.dumps(vector["message"]).encode())
    assert json.loads(msgspec.json.encode(read)) == vector["message"]


@pytest.mark.parametrize("vector", vectors("invoke.json", "invalid"))
def test_malformed_invokes_are_refused(vector: dict[str, Any]) -> None:
    """By the schema and by a runner, which gives no answer."""
    assert not Draft202012Validator(schema_of("invoke.json")).is_valid(vector["message"])
    with pytest.raises(msgspec.ValidationError):
        read_invoke(json.dumps(vector["message"]).encode())


@pytest.mark.parametrize("vector", vectors("result.json"))
def test_results_are_read_and_written_back(vector: dict[str, Any]) -> None:
    """What a runner answers, every opcode of it; and an operation's id is the hash of its name."""
    body = vector["message"]["body"]
    Draft202012Validator(schema_of("result.json")).validate(body)
    read = msgspec.json.decode(json.dumps(body).encode(), type=InvokeBody)
    assert json.loads(msgspec.json.encode(read)) == body
    for opcode in body.get("opcodes", []):
        assert opcode["id"] == step_hash(opcode["name"])


@pytest.mark.parametrize("vector", vectors("result.json"))
def test_results_are_read_by_the_engine(vector: dict[str, Any]) -> None:
    """The engine's own, more lenient reader takes every one of them."""
    from durable.core.passes import read_result

    message = vector["message"]
    answer = read_result(message["status"], json.dumps(message["body"]).encode())
    assert answer.status == {200: "completed", 206: "continue", 400: "failed", 500: "failed"}[message["status"]]
    assert [one.name for one in answer.reached] == [one["name"] for one in message["body"].get("opcodes", [])]
    assert "unknown" not in {one.kind for one in answer.reached}
    assert len(answer.lines) == len(message["body"].get("logs", []))


@pytest.mark.parametrize("vector", vectors("result.json", "invalid"))
def test_malformed_results_are_refused(vector: dict[str, Any]) -> None:
    """By the schema, and by the engine."""
    from durable.core.passes import BadAnswer, read_result

    message = vector["message"]
    assert not Draft202012Validator(schema_of("result.json")).is_valid(message["body"])
    with pytest.raises(BadAnswer):
        read_result(message["status"], json.dumps(message["body"]).encode())


@pytest.mark.parametrize("vector", vectors("frame.json"))
def test_frames_are_read(vector: dict[str, Any]) -> None:
    """The envelope, whatever it carries."""
    frame = read_envelope(json.dumps(vector["message"]))
    assert isinstance(frame, Envelope)
    assert (frame.type, frame.id) == (vector["message"]["type"], vector["message"].get("id"))
    if frame.type == "hello":
        assert isinstance(frame.payload, msgspec.Raw)
        assert msgspec.json.decode(frame.payload, type=Hello).heartbeat_ms == 15_000


def test_step_hashes() -> None:
    """SHA-256 of the name's UTF-8, as it is: no normalisation."""
    content = json.loads((PROTOCOL / "vectors" / "runners" / "step-hash.json").read_text())
    assert len(content["hashes"]) > 5
    for one in content["hashes"]:
        assert step_hash(one["name"]) == one["hash"]
