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


def test_a_turn_of_another_engine_is_read() -> None:
    """One that leaves out an input and a signal's payload that are undefined, and hands on an error whose code is null."""
    said = {
        "taskId": "r:wf:1",
        "runId": "r",
        "workflow": "w",
        "workflowVersion": "1",
        "history": [
            {"seq": 0, "kind": "call", "name": None, "error": {"message": "m", "code": None, "retryable": False}},
            {"seq": 1, "kind": "step", "output": "@", "error": None},
        ],
        "pendingSignals": [{"seq": 2, "signal": "go"}],
        "group": "w",
        "attempt": 1,
    }
    turn = codec.decode_any_task(json.dumps(said).replace('"@"', "12345678901234567890.10").encode())
    assert isinstance(turn, WorkflowTask)
    assert bytes(turn.input) == b"null"
    first, second = turn.history
    assert first.error == ErrorData("m", retryable=False)
    assert isinstance(second.output, Raw)
    assert bytes(second.output) == b"12345678901234567890.10"
    assert turn.pending_signals is not None
    assert bytes(turn.pending_signals[0].payload) == b"null"
    for wrong in ({"history": [{"seq": "0", "kind": "call"}]}, {"workflowVersion": 1}, {"pendingSignals": 1}):
        with pytest.raises(PayloadError):
            codec.decode_any_task(json.dumps(said | wrong).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {"startedAt": 1.7e12},
        {"startedAt": "soon"},
        {"startedAt": 1e300},
        {"attempt": 1.0},
        {"attempt": [], "token": {}},
        {"events": {"a": 1}},
        {"error": "none"},
    ],
    ids=str,
)
def test_work_is_not_lost_to_how_it_is_told(fields: dict[str, Any]) -> None:
    """Optional fields that make no sense: the output counts, to the digit."""
    data = _result(output="@", **fields).replace(b'"@"', b"12345678901234567890.10")
    result = codec.decode_result(data)
    assert (result.status, result.seq, _output(result)) == ("completed", 2, b"12345678901234567890.10")
    assert (result.started_at, result.attempt) == (
        1_700_000_000_000 if fields.get("startedAt") == 1.7e12 else None,
        1 if fields.get("attempt") == 1.0 else None,
    )
    codec.encode(result)


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
    for wrong in ({"kind": "call", "seq": 1.5, "name": "a"}, {"kind": "recordStep", "seq": 1}):
        refused = codec.decode_decision(json.dumps({**said, "commands": [wrong]}).encode())
        assert refused.error is not None
        assert refused.error.code == "bad_decision"
