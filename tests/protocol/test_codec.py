"""Messages on the wire: what enters, what is refused, and that a result always settles its step."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import Raw

from durable.core.errors import ErrorData, PayloadError, PayloadText, PayloadTooLarge
from durable.protocol import codec
from durable.protocol.messages import (
    ControlMessage,
    Heartbeat,
    RemoteTask,
    StepEvent,
    StepResult,
    WorkflowDecision,
    routing_token,
    sanitize,
    step_id,
)

TASK = RemoteTask(run_id="r", seq=2, step_id="r:2", name="pay:x", group="pay-x", input=Raw(b'{"a":1}'), attempt=1)


def _result(**fields: Any) -> bytes:
    return json.dumps({"runId": "r", "seq": 2, "stepId": "r:2", "status": "completed", **fields}).encode()


def _output(result: StepResult) -> bytes:
    assert isinstance(result.output, Raw)
    return bytes(result.output)


def test_messages_come_back_as_they_went() -> None:
    """Task, result, heartbeat and control message; camel case on the wire, nothing that is absent."""
    assert codec.encode(TASK) == (
        b'{"runId":"r","seq":2,"stepId":"r:2","name":"pay:x","group":"pay-x","input":{"a":1},"attempt":1}'
    )
    task = codec.decode_task(codec.encode(TASK))
    assert (task.name, bytes(task.input)) == ("pay:x", b'{"a":1}')
    done = StepResult(run_id="r", seq=2, step_id="r:2", status="completed", output=Raw(b"[1]"), attempt=3)
    back = codec.decode_result(codec.encode(done))
    assert (back.status, _output(back), back.attempt) == ("completed", b"[1]", 3)
    event = StepEvent(at=1, level="info", message="m", data={"k": 1})
    failed = StepResult(
        run_id="r", seq=2, step_id="r:2", status="failed", error=ErrorData("no", retryable=False), events=[event]
    )
    assert codec.decode_result(codec.encode(failed)) == failed
    beat = Heartbeat(run_id="r", seq=0, group="g")
    assert codec.decode_heartbeat(codec.encode(beat)) == beat
    control = ControlMessage(sender="me", kind="cancel", run_id="r")
    assert codec.encode(control) == b'{"from":"me","kind":"cancel","runId":"r"}'
    assert codec.decode_control(codec.encode(control)) == control


def test_unknown_fields_are_ignored() -> None:
    """A newer sender is understood."""
    assert codec.decode_result(_result(output=1, token="t", more={"x": []})).status == "completed"


def test_a_result_without_output_is_null() -> None:
    """Workers that return nothing leave it out or send null."""
    assert _output(codec.decode_result(_result())) == b"null"
    assert _output(codec.decode_result(_result(output=None))) == b"null"


def test_a_failure_without_an_error_still_says_something() -> None:
    """The run gets an error to show."""
    result = codec.decode_result(_result(status="failed"))
    assert result.error is not None
    assert "not why" in result.error.message


@pytest.mark.parametrize(
    ("error", "read"),
    [
        (None, ("The worker said failed, and not why.", "error", True)),
        ({"message": None, "code": None, "retryable": None}, ("The worker said failed, and not why.", "error", True)),
        ("the card reader is on fire", ("the card reader is on fire", "error", True)),
        ({"message": "no", "code": 404, "retryable": False, "stack": 1}, ("no", "404", False)),
    ],
)
def test_what_a_worker_says_of_its_failure_is_read_as_far_as_it_goes(error: Any, read: tuple[str, str, bool]) -> None:
    """Null, or a text where an object should be: the step has failed all the same, and its retries decide."""
    result = codec.decode_result(_result(status="failed", error=error, startedAt=1.7e12 + 0.5, attempt=None))
    assert result.error is not None
    assert (result.error.message, result.error.code, result.error.retryable) == read
    assert (result.started_at, result.attempt) == (1_700_000_000_000, None)


def test_lines_are_read_as_far_as_they_go() -> None:
    """Levels we do not know, times with a fraction or none: the output counts, and the lines are told."""
    lines = [
        {"level": "WARNING", "message": "a", "at": 12.9},
        {"message": 5},
        "none",
        {"level": "info", "message": "b", "at": 1},
    ]
    result = codec.decode_result(_result(output=7, events=lines))
    assert _output(result) == b"7"
    assert [(line.level, line.message, line.at) for line in result.events or ()] == [
        ("warn", "a", 12),
        ("info", "5", 0),
        ("info", "b", 1),
    ]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"output": "x" * 2000}, "payload_too_large"),
        ({"output": "a\0"}, "payload_text"),
        ({"output": json.loads("[" * 150 + "]" * 150)}, "payload_type"),
        ({"status": "finished"}, "payload_type"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_S36_a_result_that_cannot_be_kept_fails_its_step(fields: dict[str, Any], code: str) -> None:
    """Too large, too deep, NUL, wrong types: the step it names has failed for good, so the run goes on."""
    result = codec.decode_result(_result(attempt=4, **fields), limit=1000)
    assert (result.step_id, result.status, result.attempt) == ("r:2", "failed", 4)
    assert result.error is not None
    assert (result.error.code, result.error.retryable) == (code, False)
    codec.encode(result)


@pytest.mark.parametrize("output", [b'"\\ud800"', b"NaN", b"1e400", b'"\xed\xa0\x80"'])
def test_B33_an_output_no_strict_parser_takes_fails_its_step(output: bytes) -> None:
    """Half a surrogate pair, NaN as naive workers write it, broken UTF-8: a typed error, for the step it names."""
    result = codec.decode_result(_result(output="@").replace(b'"@"', output))
    assert result.step_id == "r:2"
    assert result.error is not None
    assert result.error.code == "payload_type"


def test_B33_error_text_with_nul_settles_the_step() -> None:
    """The worker's error is kept, cleaned; events lose what cannot be kept, and are bounded."""
    event = {"at": 1, "level": "info", "message": "m\0", "data": "\0", "name": "\0"}
    data = _result(status="failed", error={"message": "a\0b", "code": "c", "details": {"k": 1}}, events=[event] * 2000)
    result = codec.decode_result(data)
    assert result.error is not None
    assert (result.error.message, result.error.code, result.error.details) == ("a\\u0000b", "c", {"k": 1})
    assert result.events is not None
    assert len(result.events) == codec.MAX_EVENTS
    assert result.events[0] == StepEvent(at=1, level="info", message="m\\u0000")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        _result(stepId="other:2"),
        _result(seq=-1, stepId="r:-1"),
        _result(runId="r\0", stepId="r\0:2"),
        _result(seq="2"),
        _result(output=1).replace(b'"runId"', b'"run"'),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_a_result_that_is_nobodys_is_refused(data: bytes) -> None:
    """Unreadable, or its step id is not its run's: PayloadError."""
    with pytest.raises(PayloadError):
        codec.decode_result(data)


def test_tasks_and_hints_are_refused_whole() -> None:
    """Tasks, heartbeats and control messages that are too large, too deep, carry NUL or lack fields: PayloadError."""
    with pytest.raises(PayloadTooLarge):
        codec.decode_task(codec.encode(TASK), limit=5)
    with pytest.raises(PayloadText):
        codec.decode_heartbeat(b'{"runId":"r\\u0000","seq":0,"group":"g"}')
    with pytest.raises(PayloadError, match="group"):
        codec.decode_heartbeat(b'{"runId":"r","seq":0}')
    with pytest.raises(PayloadError):
        codec.decode_control(b'{"from":"me","kind":"event","event":' + b"[" * 99_999)
    with pytest.raises(PayloadError):
        codec.decode_control(b'{"from":"me","kind":"explode"}')


def test_what_we_cannot_send_is_refused_here() -> None:
    """A surrogate in a message, or one too large: a typed error at the sender."""
    with pytest.raises(PayloadText):
        codec.encode(Heartbeat(run_id="\ud800", seq=0, group="g"))
    with pytest.raises(PayloadTooLarge, match="the limit is"):
        codec.encode(Heartbeat(run_id="r" * 300_000, seq=0, group="g"), limit=10)


@pytest.mark.parametrize(
    ("name", "partition", "token"),
    [
        ("payments.charge", None, "payments.charge"),
        ("pay:charge:eu", None, "pay-charge-eu"),
        ("pay", "", "pay"),
        ("pay", "default", "pay"),
        ("pay:x", "eu:west", "pay-x@eu:west"),
    ],
)
def test_golden_names(name: str, partition: str | None, token: str) -> None:
    """Other languages build the same queue names; these never change."""
    assert routing_token(name, partition) == token
    assert sanitize(name) == token.partition("@")[0]
    assert step_id("r", 7) == "r:7"


@pytest.mark.parametrize(
    "commands",
    [
        [{"kind": "dance", "seq": 0}],
        [{"kind": "sleep", "seq": 0}],
        [{"kind": "sleep", "seq": "0", "ms": 1}],
        "none",
        [1],
    ],
)
def test_a_decision_that_cannot_be_read_is_a_failed_one(commands: Any) -> None:
    """Whose it is can be told, so its run hears of it instead of asking for that turn for ever; else it is refused."""
    data = {"taskId": "r:wf:0", "runId": "r", "status": "continue", "commands": commands}
    decision = codec.decode_answer(json.dumps(data).encode())
    assert isinstance(decision, WorkflowDecision)
    assert (decision.task_id, decision.run_id, decision.status) == ("r:wf:0", "r", "failed")
    assert decision.error is not None
    assert decision.error.code == "bad_decision"
    with pytest.raises(PayloadError):
        codec.decode_decision(json.dumps({"runId": "r", "commands": commands}).encode())


def test_a_task_whose_input_was_left_out_is_read_as_null() -> None:
    """Some makes leave out what is undefined; everything else of a task must be right."""
    task = {"runId": "r", "seq": 0, "stepId": "r:0", "name": "a", "group": "a", "attempt": 1}
    assert bytes(codec.decode_task(json.dumps(task).encode()).input) == b"null"
    with pytest.raises(PayloadError):
        codec.decode_task(json.dumps(task | {"attempt": "1"}).encode())
