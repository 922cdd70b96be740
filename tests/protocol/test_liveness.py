"""Signs of life: written in one shape, read in all. The hashes were computed by another language."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from durable.protocol.liveness import (
    Beat,
    ProtocolRange,
    Registration,
    Sdk,
    WorkerDescriptor,
    descriptor_hash,
    encode_beat,
    encode_descriptor,
    fnv1a64,
    read_beat,
    read_descriptor,
)

VECTORS = Path(__file__).resolve().parents[2] / "protocol" / "vectors"
GOLDEN = json.loads((VECTORS / "descriptor-hash.json").read_text())
BEATS = json.loads((VECTORS / "worker-heartbeat.json").read_text())
PLAIN = WorkerDescriptor(
    instance_id="py-host-1",
    runtime="python",
    sdk=Sdk("durable", "1.2.3"),
    protocol=ProtocolRange(),
    capabilities=["heartbeats", "cancellation", "heartbeats"],
    workflows=[],
    steps=["pay.charge", "a:b", "\U0001f600", "\ufb01"],
    started_at=1752710460000,
)
HOSTING = WorkerDescriptor(
    instance_id="py-host-1",
    runtime="python",
    sdk=Sdk("durable", "1.2.3"),
    protocol=ProtocolRange(),
    capabilities=["cancellation", "heartbeats"],
    workflows=["order"],
    steps=["a:b", "pay.charge", "\ufb01", "\U0001f600"],
    started_at=1752710460000,
    partition="eu",
    namespace="acme",
    registrations=[Registration(name="order", version="2", group="order@eu", requires=["b", "a", "b"])] * 2,
)


@pytest.mark.parametrize(
    ("text", "digits"), [("", "cbf29ce484222325"), ("a", "af63dc4c8601ec8c"), ("zażółć ☃ 😀", "37ed9260263ce5b9")]
)
def test_the_hash_is_the_one_other_languages_compute(text: str, digits: str) -> None:
    """FNV-1a over UTF-16 code units, both bytes of each, agrees with JavaScript's, beyond the first plane too."""
    assert fnv1a64(text) == digits


@pytest.mark.parametrize(("descriptor", "digits"), [(PLAIN, "0fe23dbd250f018e"), (HOSTING, "8f3a10ec4903a71e")])
def test_a_descriptors_hash_is_the_one_other_languages_compute(descriptor: WorkerDescriptor, digits: str) -> None:
    """Sets are sorted and have no doubles, what is not there is null, and registrations count only where there are any."""
    assert descriptor_hash(descriptor) == digits


def test_a_descriptor_on_the_wire() -> None:
    """Camel case, and nothing that is not there."""
    assert read_descriptor(encode_descriptor(PLAIN)) == {
        "instanceId": "py-host-1",
        "runtime": "python",
        "sdk": {"name": "durable", "version": "1.2.3"},
        "protocol": {"version": 1, "range": [1, 1]},
        "capabilities": ["heartbeats", "cancellation", "heartbeats"],
        "workflows": [],
        "steps": ["pay.charge", "a:b", "\U0001f600", "\ufb01"],
        "startedAt": 1752710460000,
    }


def test_a_beat_on_the_wire() -> None:
    """What is written is what is read."""
    beat = Beat(ts=1752710460000, status={"inFlight": 1}, descriptor_hash="0fe23dbd250f018e")
    assert encode_beat(beat) == b'{"ts":1752710460000,"status":{"inFlight":1},"descriptorHash":"0fe23dbd250f018e"}'
    assert read_beat(encode_beat(beat)) == beat


@pytest.mark.parametrize(
    ("value", "beat"),
    [
        (b"1752710460000", Beat(ts=1752710460000)),
        (b"1752710460", Beat(ts=1752710460000)),
        (b"1752710460.25", Beat(ts=1752710460250)),
        (b'{"ts":1752710460}', Beat(ts=1752710460000)),
        (b'{"ts":1752710460000,"status":"up","more":[1]}', Beat(ts=1752710460000, status="up")),
        (b'{"ts":1752710460000,"status":[{"a":null}]}', Beat(ts=1752710460000, status=[{"a": None}])),
        (b'{"status":{}}', Beat(ts=0, status={})),
        (b'{"ts":"now","descriptorHash":7}', Beat(ts=0)),
        (b'{"ts":true}', Beat(ts=0)),
        (b'{"ts":1e400}', Beat(ts=0)),
        (b"NaN", Beat(ts=0)),
        (b"-5", Beat(ts=0)),
        (b"", Beat(ts=0)),
        (b"\xff", Beat(ts=0)),
        (b"[[[[", Beat(ts=0)),
    ],
)
def test_beats_are_read_in_every_form(value: bytes, beat: Beat) -> None:
    """Numbers, seconds, any status, fields nobody knows: a beat all the same; and nonsense is one at 0, never an error."""
    assert read_beat(value) == beat


@pytest.mark.parametrize("value", [None, b"", b"7", b"[]", b"\xff", b"{"])
def test_a_descriptor_that_is_none_is_none(value: bytes | None) -> None:
    """Who cannot be described is alive all the same."""
    assert read_descriptor(value) is None


@pytest.mark.parametrize("vector", GOLDEN["descriptors"], ids=lambda vector: vector["name"])
def test_hashes_of_the_vectors(vector: dict[str, Any]) -> None:
    """The hash that `protocol/` tells other languages to compute is ours."""
    assert descriptor_hash(msgspec.convert(vector["descriptor"], WorkerDescriptor)) == vector["hash"]


@pytest.mark.parametrize("vector", GOLDEN["texts"], ids=lambda vector: vector["text"] or "empty")
def test_texts_of_the_vectors(vector: dict[str, str]) -> None:
    """So is that of a text."""
    assert fnv1a64(vector["text"]) == vector["hash"]


@pytest.mark.parametrize("vector", BEATS["valid"], ids=lambda vector: vector["name"])
def test_beats_of_the_vectors(vector: dict[str, Any]) -> None:
    """Every beat that `protocol/` calls valid is read as it says."""
    wanted = vector.get("read", vector["message"])
    read = read_beat(json.dumps(vector["message"]).encode())
    assert read.ts == wanted["ts"]
    assert read.status == wanted.get("status")
    assert read.descriptor_hash == wanted.get("descriptorHash")
