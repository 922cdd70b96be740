"""Messages on the wire: what enters, what is refused, and that a result always settles its step."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import Raw

from durable.core.errors import ErrorData, PayloadError, PayloadText, PayloadTooLarge
from durable.protocol import codec
from durable.protocol.messages import (
    AwaitSignal,
    Call,
    ControlMessage,
    Heartbeat,
    RecordStep,
    RemoteTask,
    Sleep,
    StartChildRun,
    StepEvent,
    StepResult,
    WorkflowDecision,
    WorkflowTask,
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


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"message": "m", "code": None, "retryable": False}, ErrorData("m", retryable=False)),
        ({"message": "m", "code": 402, "retryable": None, "stack": 1}, ErrorData("m", code="402")),
        ({"message": None, "code": "c"}, ErrorData("The worker said failed, and not why.", code="c")),
        ({"message": {"a": 1}, "type": None, "retryAfter": None, "details": [1]}, ErrorData('{"a":1}', details=[1])),
        ("text", ErrorData("text")),
    ],
)
def test_an_error_is_kept_however_it_is_written(said: Any, error: ErrorData) -> None:
    """Null where others leave out, a code that is a number, a bare text: the worker's own words and verdict reach the run."""
    assert codec.decode_result(_result(status="failed", error=said)).error == error


@pytest.mark.parametrize(
    "fields",
    [
        {"startedAt": 1.7e12},
        {"startedAt": 1700000000000.25},
        {"startedAt": "1700000000000"},
        {"startedAt": "soon"},
        {"startedAt": 1e300},
        {"seq": 2.0},
        {"seq": "2"},
        {"attempt": "1"},
        {"attempt": 1.0},
        {"attempt": [], "token": {}},
        {"events": {"a": 1}},
        {"events": [1, None, "x"]},
        {"error": "none"},
        {"startedAt": None, "error": None, "events": None, "attempt": None, "token": None},
    ],
    ids=str,
)
def test_work_is_not_lost_to_how_it_is_told(fields: dict[str, Any]) -> None:
    """Fractions, numbers as text, and optional fields that make no sense: the output counts, to the digit."""
    data = _result(output="@", **fields).replace(b'"@"', b"12345678901234567890.10")
    result = codec.decode_result(data)
    assert (result.status, result.seq, _output(result)) == ("completed", 2, b"12345678901234567890.10")
    started, attempt = fields.get("startedAt"), fields.get("attempt")
    assert result.started_at == (1700000000000 if "17" in str(started) or started == 1.7e12 else None)
    assert result.attempt == (1 if attempt in ("1", 1.0) else None)
    codec.encode(result)


def test_lines_are_kept_as_far_as_they_are_understood() -> None:
    """Levels of other loggers, no time, no level, a status of its own, a message that is no text."""
    said = [
        {"at": 1.5, "level": "WARNING", "message": "a"},
        {"level": "trace", "message": "b", "process": {"p": 1}, "data": {"k": 1}},
        {"at": "2026-01-01", "message": {"c": 1}, "status": "done", "subId": "s"},
        {},
    ]
    assert codec.decode_result(_result(events=said)).events == [
        StepEvent(at=1, level="warn", message="a"),
        StepEvent(at=0, level="debug", message="b", data={"k": 1}),
        StepEvent(at=0, level="info", message='{"c":1}', sub_id="s"),
        StepEvent(at=0, level="info", message=""),
    ]


def test_a_task_of_another_engine_is_read() -> None:
    """One that leaves out an input that is undefined, counts no attempts, and writes null for what is not there."""
    said = {
        "runId": "r",
        "seq": 2,
        "stepId": "r:2",
        "name": "n",
        "group": "n",
        "priority": 1.0,
        "context": None,
        "token": 5,
    }
    task = codec.decode_task(json.dumps(said).encode())
    assert (bytes(task.input), task.attempt, task.priority, task.context, task.token) == (b"null", 1, 1, None, None)


def test_a_turn_of_another_engine_is_read() -> None:
    """The same for a turn, its history and its signals."""
    said = {
        "taskId": "r:wf:1",
        "runId": "r",
        "workflow": "w",
        "workflowVersion": 2,
        "history": [{"seq": 0.0, "kind": "call", "name": None, "error": {"message": "m", "code": None}}],
        "pendingSignals": [{"seq": 1, "signal": "go"}],
    }
    turn = codec.decode_any_task(json.dumps(said).encode())
    assert isinstance(turn, WorkflowTask)
    assert (turn.workflow_version, bytes(turn.input), turn.attempt, turn.group) == ("2", b"null", 1, "")
    assert turn.history[0].error == ErrorData("m")
    assert turn.pending_signals is not None
    assert bytes(turn.pending_signals[0].payload) == b"null"


def test_a_decision_of_another_worker_is_read() -> None:
    """Null where others leave out, times with fractions, errors without a code; what a command must say it must say."""
    said = {
        "taskId": "r:wf:1",
        "runId": "r",
        "status": "continue",
        "error": None,
        "commands": [
            {"kind": "call", "seq": 0, "name": "a", "group": None, "input": 1, "parallelGroup": None},
            {"kind": "recordStep", "seq": 1, "name": "b", "startedAt": 1.5, "error": {"message": "m", "code": None}},
            {"kind": "recordStep", "seq": 2, "name": "c", "error": None, "events": [{"level": "odd", "message": "x"}]},
            {"kind": "sleep", "seq": 3, "ms": 10.7},
            {"kind": "waitSignal", "seq": 4, "signal": "go"},
            {"kind": "startChild", "seq": 5, "workflow": "w"},
        ],
    }
    decision = codec.decode_decision(json.dumps(said).encode())
    assert (decision.status, decision.error) == ("continue", None)
    call, failed, done, sleep, wait, child = decision.commands
    assert isinstance(call, Call)
    assert (call.group, bytes(call.input)) == ("", b"1")
    assert isinstance(failed, RecordStep)
    assert (failed.started_at, failed.error) == (1, ErrorData("m"))
    assert isinstance(done, RecordStep)
    assert (isinstance(done.output, Raw), done.events) == (True, [StepEvent(at=0, level="info", message="x")])
    assert (sleep, wait) == (Sleep(seq=3, ms=10), AwaitSignal(seq=4, signal="go"))
    assert isinstance(child, StartChildRun)
    for wrong in ({"kind": "sleep", "seq": 3}, {"kind": "call", "seq": 1.5, "name": "a"}, {"kind": "fly", "seq": 1}):
        refused = codec.decode_decision(json.dumps({**said, "commands": [wrong]}).encode())
        assert refused.error is not None
        assert refused.error.code == "bad_decision"


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
        [{"kind": "sleep", "seq": "first", "ms": 1}],
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
