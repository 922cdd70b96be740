"""Workflows whose code lives in a worker: turns out, decisions in, and everything between them is a run like any other."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from durable import Context, RetryPolicy, remote_workflow, workflow
from durable.core.errors import DefinitionError, ErrorData, RunCancelled, RunFailed, RunNotFound, RunTimeout
from durable.core.hosted import MAX_COMMANDS
from durable.protocol.messages import (
    AwaitSignal,
    Call,
    HistoryItem,
    RecordStep,
    Sleep,
    StartChildRun,
    StepEvent,
    TurnCommand,
    WorkflowDecision,
    WorkflowTask,
    step_id,
)
from durable.protocol.states import Status
from tests.engine.broker import Broker
from tests.engine.world import SHORT, World, eventually

QUICK = RetryPolicy(max_attempts=50, initial_delay=0.01, backoff="fixed", jitter=0.0)
ONCE = RetryPolicy(max_attempts=1)


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def call(seq: int, name: str = "charge", value: Any = None, group: str = "") -> Call:
    return Call(seq=seq, name=name, input=raw(value), group=group)


def record(seq: int, name: str, output: Any = None, **fields: Any) -> RecordStep:
    if "error" not in fields:
        fields["output"] = raw(output)
    return RecordStep(seq=seq, name=name, **fields)


def told(turn: WorkflowTask) -> list[tuple[Any, ...]]:
    """A turn's history, short: seq, kind, name, what came of it."""
    return [(item.seq, item.kind, item.name, value(item)) for item in turn.history]


def value(item: HistoryItem) -> Any:
    if item.error is not None:
        return item.error.message
    return msgspec.json.decode(item.output) if isinstance(item.output, msgspec.Raw) else None


def order(turn: WorkflowTask) -> list[int]:
    """The seqs of a turn's history in the order in which the run learned of them."""
    return [item.seq for item in sorted(turn.history, key=lambda item: item.order or 0)]


async def test_a_turn_says_all_a_worker_needs_to_replay(world: World) -> None:
    """A turn has a task id of its own form, the workflow and its version, the input, the group's token and the time."""
    broker = Broker()
    app = await world.engine(remote_workflow("py.pay", "2", group="eu", transport="default"), transport=broker.end())
    run = await app.start("py.pay", {"amount": 3})
    turn = await broker.turn()
    start, middle, end = turn.task_id.rpartition(":wf:")
    assert (start, middle) == (run.id, ":wf:")
    assert len(end) == 8
    assert int(end, 16) >= 0
    assert (turn.run_id, turn.workflow, turn.workflow_version) == (run.id, "py.pay", "2")
    assert (bytes(turn.input), turn.history, turn.group) == (b'{"amount":3}', [], "py.pay@eu")
    assert (turn.attempt, turn.transport, turn.seen) == (1, "default", None)
    assert turn.traceparent is not None
    began = (await world.journal(run.id))[0].at // 1_000
    assert turn.started_at == began
    assert turn.at is not None
    assert turn.at >= began
    await broker.decide(turn, "completed", output={"ok": [1.50, None]})
    assert await run.result(5) == {"ok": [1.5, None]}
    await world.sound(run.id)


async def test_every_command_comes_back_as_history(world: World) -> None:
    """Calls, recorded steps, timers, signals and children are what they are for any run, and each comes back once."""

    @workflow(name="kid")
    async def kid(ctx: Context, n: int) -> int:
        return n + 1

    broker = Broker()
    app = await world.engine(remote_workflow("py"), kid, transport=broker.end())
    run = await app.start("py", 1)

    await broker.decide(await broker.turn(1), "continue", record(0, "local", [1]), call(1, "charge", {"n": 1}, "eu"))
    task = await broker.sent(1)
    assert (task.name, task.seq, task.step_id, task.group) == ("charge", 1, step_id(run.id, 1), "charge@eu")
    assert bytes(task.input) == b'{"n":1}'
    await broker.answer(task, 10)

    turn = await broker.turn(2)
    assert told(turn) == [(0, "step", "local", [1]), (1, "call", "charge", 10)]
    assert order(turn) == [0, 1]
    assert turn.seen == 1
    await broker.decide(turn, "continue", Sleep(seq=2, ms=5))

    turn = await broker.turn(3)
    assert told(turn)[2:] == [(2, "timer", "sleep:2", None)]
    await broker.decide(turn, "continue", AwaitSignal(seq=3, signal="go"))
    await world.waits(run.id)
    await run.signal("go", {"yes": True})

    turn = await broker.turn(4)
    assert told(turn)[3:] == [(3, "signal", "go", {"yes": True})]
    await broker.decide(turn, "continue", StartChildRun(seq=4, workflow="kid", input=raw(41)))

    turn = await broker.turn(5)
    assert told(turn)[4:] == [(4, "child", "kid", 42)]
    assert (await world.record(f"{run.id}.child.4")).status is Status.COMPLETED
    await broker.decide(turn, "completed", output="done")
    assert await run.result(5) == "done"
    assert (await world.statuses(run.id, key="local")) == ["completed"]
    await world.sound(run.id)


async def test_what_fails_comes_back_as_an_error(world: World) -> None:
    """A call after its retries, a local step and a child come back with their error, whole."""

    @workflow(name="bad")
    async def bad(ctx: Context) -> None:
        raise ValueError("no luck")

    broker = Broker()
    app = await world.engine(remote_workflow("py", step_retries=QUICK), bad, transport=broker.end())
    run = await app.start("py")
    refused = ErrorData("refused", code="card", details={"left": 3}, retryable=False)
    await broker.decide(
        await broker.turn(),
        "continue",
        record(0, "here", error=ErrorData("local", code="mine")),
        call(1),
        StartChildRun(seq=2, workflow="bad"),
        StartChildRun(seq=3, workflow="nobody's"),
    )
    task = await broker.sent(1)
    await broker.answer(task, error=ErrorData("not yet"))
    again = await broker.sent(2)
    assert (again.step_id, again.attempt) == (task.step_id, 2)
    await broker.answer(again, error=refused)

    def last() -> WorkflowTask:
        return broker.turns[-1]

    async def answer_turns() -> None:
        count = 2
        while True:
            turn = await broker.turn(count)
            await broker.decide(turn, "continue" if len(turn.history) < 4 else "completed")
            if len(turn.history) == 4:
                return
            count += 1

    await answer_turns()
    await run.result(5)
    errors = {item.seq: item.error for item in last().history}
    assert errors[0] == ErrorData("local", code="mine")
    assert errors[1] == refused
    assert errors[2] is not None
    assert "no luck" in errors[2].message
    assert errors[3] is not None
    assert errors[3].code == "unknown_workflow"
    await world.sound(run.id)


async def test_everything_of_a_decision_is_one_commit(world: World) -> None:
    """The decision, its recorded steps with their lines, its calls and its children are stored together or not at all."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), remote_workflow("kid"), transport=broker.end())
    commits: list[list[str]] = []

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "commit":
            commits.extend([f"{e.kind} {e.key} {e.status}" for e in commit.entries] for commit in arguments[0])

    run = await app.start("py")
    turn = await broker.turn()
    world.line(app).fault = watch
    line = StepEvent(at=1, level="warn", message="careful", data={"n": 1})
    await broker.decide(
        turn,
        "continue",
        record(0, "a", 1, events=[line], started_at=1_000, finished_at=1_500),
        record(1, "b", error=ErrorData("no")),
        call(2),
        StartChildRun(seq=3, workflow="kid"),
    )
    await broker.sent(1)
    expected = [
        "remote turn completed",
        "log a written",
        "step a completed",
        "step b failed",
        "remote charge dispatched",
        "child kid started",
    ]
    assert expected in [[line for line in lines if not line.endswith("published")] for lines in commits]
    entries = {(e.kind, e.key): e for e in await world.journal(run.id)}
    done = entries["step", "a"]
    assert (done.payload, done.started_at, done.finished_at) == (b"1", 1_000_000, 1_500_000)
    log = entries["log", "a"].payload
    assert log is not None
    assert msgspec.json.decode(log) == {"level": "warn", "message": "careful", "fields": {"n": 1}}


async def test_the_history_is_not_stored_with_each_turn(world: World) -> None:
    """What the journal holds of a turn does not grow with the turns before it, nor does it hold a recorded output twice."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), transport=broker.end())
    run = await app.start("py")
    big = "x" * 5_000
    for count in range(1, 9):
        turn = await broker.turn(count)
        commands = [record(2 * count, "big", big), Sleep(seq=2 * count + 1, ms=0)]
        await broker.decide(turn, "continue" if count < 8 else "completed", *commands)
    await run.result(5)
    assert len(broker.turns[-1].history) == 14
    entries = await world.journal(run.id)
    turns = [len(e.payload or b"") for e in entries if e.kind == "remote"]
    assert max(turns) < 1_000
    assert sum(len(e.payload or b"") for e in entries) < 8 * 5_000 + 10_000


async def test_what_comes_during_a_turn_is_put_behind_what_the_turn_records(world: World) -> None:
    """(order) A worker runs steps before it hears what arrived meanwhile, so a replay delivers it after them."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), transport=broker.end())
    run = await app.start("py")
    await broker.decide(await broker.turn(1), "continue", call(0, "slow"), call(1, "quick"))
    slow, quick = await broker.sent(1), await broker.sent(2)
    await broker.answer(quick, "first")
    turn = await broker.turn(2)
    assert told(turn) == [(1, "call", "quick", "first")]
    await broker.answer(slow, "meanwhile")  # while the turn is under way
    await broker.decide(turn, "continue", record(2, "local", "then"))
    turn = await broker.turn(3)
    assert [item.seq for item in turn.history] == [0, 1, 2], "the list is by seq"
    assert order(turn) == [1, 2, 0]
    assert turn.seen == 2
    await broker.decide(turn, "completed")
    await run.result(5)


async def test_an_operation_is_asked_for_once(world: World) -> None:
    """A command that comes again, answered or not, changes nothing: calls are idempotent on (run, seq), and so are the rest."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), remote_workflow("kid"), transport=broker.end())
    run = await app.start("py")
    commands: list[TurnCommand] = [
        record(0, "local", 1),
        call(1),
        call(2, "other"),
        Sleep(seq=3, ms=60_000),
        AwaitSignal(seq=4, signal="go"),
        StartChildRun(seq=5, workflow="kid"),
    ]
    await broker.decide(await broker.turn(1), "continue", *commands)
    first = await broker.sent(1)
    await broker.sent(2)
    await broker.answer(first, 1)
    parent = [turn for turn in broker.turns if turn.run_id == run.id]
    await eventually(lambda: len([t for t in broker.turns if t.run_id == run.id]) == 2, "the second turn")
    parent = [turn for turn in broker.turns if turn.run_id == run.id]
    await broker.decide(parent[1], "continue", record(0, "local", "changed"), *commands[1:])
    await run.signal("go", 7)
    await eventually(lambda: len([t for t in broker.turns if t.run_id == run.id]) == 3, "the third turn")
    last = [turn for turn in broker.turns if turn.run_id == run.id][2]
    assert told(last) == [(0, "step", "local", 1), (1, "call", "charge", 1), (4, "signal", "go", 7)]
    assert len(broker.tasks) == 2
    lines = await world.statuses(run.id)
    assert len([line for line in lines if line.endswith("dispatched") and "turn" not in line]) == 2
    assert lines.count("child kid started") == 1
    assert lines.count("step local completed") == 1


async def test_signals_early_and_late_are_used_once_each(world: World) -> None:
    """A signal that came before the wait is taken at once, oldest first; a wait that came before takes the next."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), transport=broker.end())
    run = await app.start("py")
    turn = await broker.turn(1)
    await run.signal("go", 1)
    await run.signal("go", 2)
    await run.signal("other", 3)
    await world.until_journal(run.id, lambda lines: sum("signal" in line for line in lines) == 3)
    waits = [AwaitSignal(seq=seq, signal="go") for seq in range(3)]
    await broker.decide(turn, "continue", *waits)
    turn = await broker.turn(2)
    assert told(turn) == [(0, "signal", "go", 1), (1, "signal", "go", 2)]
    await broker.decide(turn, "continue")
    await run.signal("go", 4)
    turn = await broker.turn(3)
    assert told(turn)[2:] == [(2, "signal", "go", 4)]
    await broker.decide(turn, "completed")
    await run.result(5)


async def test_only_the_awaited_decision_counts(world: World) -> None:
    """A decision that comes twice, for another turn, or under an id nobody gave out is acknowledged and changes nothing."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), transport=broker.end())
    run = await app.start("py")
    first = await broker.turn(1)
    await broker.decide(first, "completed", output="forged", task_id=f"{run.id}:wf:00000000")
    await broker.decide(first, "completed", output="forged", task_id="nonsense")
    await broker.decide(first, "continue", record(0, "a", 1), Sleep(seq=1, ms=0))
    second = await broker.turn(2)
    assert second.task_id != first.task_id
    await broker.decide(first, "completed", output="again")
    await broker.decide(second, "completed", output="right")
    assert await run.result(5) == "right"
    await broker.decide(second, "completed", output="too late")
    await world.sound(run.id)


async def test_a_decision_of_no_run_is_acknowledged(world: World) -> None:
    """Nobody waits for a decision of a run that is not there; of another workspace's run it is not ours to take."""
    broker = Broker()
    here, there = broker.end(), broker.end()
    app = await world.engine(remote_workflow("py"), transport=here, workspace="here")
    await world.engine(remote_workflow("py"), transport=there, workspace="there")
    run = await app.start("py")
    turn = await broker.turn()
    assert there.results is not None
    with pytest.raises(RunNotFound):
        await there.results(WorkflowDecision(task_id=turn.task_id, run_id=run.id, status="completed"))
    await broker.decide(msgspec.structs.replace(turn, run_id="no such run"), "completed", through=here)
    await broker.decide(turn, "completed", output=1, through=here)
    assert await run.result(5) == 1


async def test_silence_sends_the_turn_again_under_another_id(world: World) -> None:
    """A worker that dies over its turn costs the turn's timeout: the turn is published again, and the old decision is dropped."""
    broker = Broker()
    app = await world.engine(remote_workflow("py", turn_timeout=0.1, retries=QUICK), transport=broker.end())
    run = await app.start("py")
    first = await broker.turn(1)
    broker.beat(first)
    second = await broker.turn(2)
    assert (second.attempt, second.history, second.seen) == (2, [], None)
    assert second.task_id != first.task_id
    assert first.task_id in broker.cancelled, "the worker is told, for what it is worth"
    await broker.decide(first, "completed", output="late")
    last = broker.turns[-1]
    await broker.decide(last, "completed", output="in time")
    assert await run.result(5) == "in time"
    assert "retrying" in await world.statuses(run.id, "remote", "turn")


async def test_a_turn_that_waits_in_its_queue_is_not_sent_again(world: World) -> None:
    """Silence over a turn nobody has begun says that workers are busy: more of the same would make it worse. What the
    transport no longer has is sent again, under its id."""
    broker = Broker()
    app = await world.engine(remote_workflow("py", turn_timeout=0.05, retries=QUICK), transport=broker.end())
    run = await app.start("py")
    turn = await broker.turn(1)
    await asyncio.sleep(0.4)
    assert len(broker.turns) == 1
    broker.held.clear()
    again = await broker.turn(2)
    assert (again.task_id, again.attempt) == (turn.task_id, 1)
    await broker.decide(again, "completed", output=1)
    assert await run.result(5) == 1


async def test_a_beat_for_the_run_extends_its_turn(world: World) -> None:
    """A heartbeat without a step id keeps a long turn alive, for as long as it comes."""
    broker = Broker()
    app = await world.engine(remote_workflow("py", turn_timeout=0.3, retries=QUICK), transport=broker.end())
    run = await app.start("py")
    turn = await broker.turn(1)
    for _ in range(15):
        await asyncio.sleep(0.05)
        broker.beat(turn)
    assert len(broker.turns) == 1
    await broker.decide(turn, "completed", output=1)
    assert await run.result(5) == 1


async def test_a_turn_nobody_takes_is_tried_again(world: World) -> None:
    """While no transport takes a turn its attempts fail, as those of any task; the run goes on when one does."""
    broker = Broker()
    broker.refusing = "full"
    app = await world.engine(remote_workflow("py", retries=QUICK), transport=broker.end(), cool_down=0.01)
    run = await app.start("py")
    await world.until_journal(run.id, lambda lines: "remote turn retrying" in lines)
    broker.refusing = None
    await broker.decide(await broker.turn(), "completed", output=1)
    assert await run.result(5) == 1


@pytest.mark.parametrize("code", ["unknown_workflow", "unknown_version", "worker_failed", "step_cancelled"])
async def test_a_worker_without_the_code_leaves_the_turn_to_another(world: World, code: str) -> None:
    """A worker of another version says so, or a broker that it has lost one: the turn goes to the next. A deploy half way, or a
    worker that dies, fails nobody's run."""
    broker = Broker()
    app = await world.engine(remote_workflow("py", retries=QUICK), transport=broker.end())
    run = await app.start("py")
    wrong = ErrorData("Workflow py has no version 1 here", code=code)
    await broker.decide(await broker.turn(1), "failed", error=wrong)
    turn = await broker.turn(2)
    assert turn.attempt == 2
    await broker.decide(turn, "completed", output=1)
    assert await run.result(5) == 1


async def test_a_turn_that_is_given_up_fails_the_run(world: World) -> None:
    """With a limit to its attempts the run fails with what the last one came to, and a requeue sends the turn again."""
    broker = Broker()
    app = await world.engine(remote_workflow("py", turn_timeout=0.05, retries=ONCE), transport=broker.end())
    run = await app.start("py")
    broker.beat(await broker.turn())
    with pytest.raises(RunFailed, match="silent for"):
        await run.result(5)
    await app.engine.requeue(run.id)
    turn = await broker.turn(2)
    assert turn.task_id != broker.turns[0].task_id
    await broker.decide(turn, "completed", output=1)
    assert await run.result(5) == 1


BAD: list[tuple[str, list[TurnCommand], str, str]] = [
    ("continue", [], "stalled", "nothing is outstanding"),
    ("continue", [record(0, "a"), call(0)], "bad_decision", "there twice"),
    ("continue", [call(-1)], "bad_decision", "no position"),
    ("continue", [call(1 << 30)], "bad_decision", "no position"),
    ("continue", [call(0, "")], "bad_decision", "not empty"),
    ("continue", [call(0, "a\nb")], "bad_decision", "one line"),
    ("continue", [AwaitSignal(seq=0, signal="x" * 300)], "bad_decision", "200 characters"),
    ("continue", [Sleep(seq=0, ms=-1)], "bad_decision", "-1 ms"),
    ("continue", [Sleep(seq=0, ms=1 << 60)], "bad_decision", "too long"),
    ("continue", [call(n) for n in range(MAX_COMMANDS + 1)], "bad_decision", "10,001 commands"),
]


@pytest.mark.parametrize(("status", "commands", "code", "why"), BAD)
async def test_a_decision_that_makes_no_sense_fails_the_run(
    world: World, status: str, commands: list[TurnCommand], code: str, why: str
) -> None:
    """It says why, nothing of it is applied, no other run is touched, and a requeue asks the mended worker again."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), transport=broker.end())
    run, other = await app.start("py"), await app.start("py")
    await broker.turn(2)
    mine, others = sorted(broker.turns, key=lambda turn: turn.run_id == other.id)
    await broker.decide(mine, status, *commands)
    with pytest.raises(RunFailed, match=why) as caught:
        await run.result(5)
    assert caught.value.error is not None
    assert caught.value.error.code == code
    assert broker.tasks == []
    await broker.decide(others, "completed", output="well")
    assert await other.result(5) == "well"
    await app.engine.requeue(run.id)
    turn = await broker.turn(3)
    await broker.decide(turn, "completed", output="mended")
    assert await run.result(5) == "mended"
    await world.sound(run.id)


async def test_code_that_changed_under_a_run_fails_it(world: World) -> None:
    """A seq that was one operation and is now another is non-determinism, told with both; a requeue asks that turn again."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), transport=broker.end())
    run = await app.start("py")
    await broker.decide(await broker.turn(1), "continue", call(0, "charge"), Sleep(seq=1, ms=0))
    await broker.decide(await broker.turn(2), "continue", call(0, "refund"))
    with pytest.raises(RunFailed, match="operation 0 was call 'charge', and now it asks for call 'refund'") as caught:
        await run.result(5)
    assert caught.value.error is not None
    assert caught.value.error.code == "non_determinism"
    await app.engine.requeue(run.id)
    turn = await broker.turn(3)
    assert told(turn) == [(1, "timer", "sleep:1", None)]
    await broker.decide(turn, "completed", output=1)
    assert await run.result(5) == 1


async def test_a_decision_too_large_for_the_store_fails_the_run(world: World) -> None:
    """What no store takes is refused with its size, whether the run is in memory or not."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), transport=broker.end())
    run = await app.start("py")
    turn = await broker.turn()
    limit = world.line(app)._store.capabilities.max_payload
    await broker.decide(turn, "completed", output="x" * (limit + 1))
    with pytest.raises(RunFailed, match="record references"):
        await run.result(10)


async def test_commands_that_come_with_the_end_are_applied(world: World) -> None:
    """Steps are recorded, calls made and children started before the run ends; what only waits is let be."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), remote_workflow("kid"), transport=broker.end())
    run = await app.start("py")
    await broker.decide(
        await broker.turn(),
        "completed",
        record(0, "last", "words"),
        call(1),
        StartChildRun(seq=2, workflow="kid", input=raw(1)),
        AwaitSignal(seq=3, signal="never"),
        Sleep(seq=4, ms=10_000_000),
        output="over",
    )
    task = await broker.sent(1)
    assert (await world.record(run.id)).status is Status.ACTIVE, "a call is made before the end"
    await broker.answer(task, 1)
    assert await run.result(5) == "over"
    lines = await world.statuses(run.id)
    assert lines.index("step last completed") < lines.index("run completed")
    kid = await broker.turn(2)
    assert kid.run_id == f"{run.id}.child.2"
    await broker.decide(kid, "completed", output="alone")
    await world.until(f"{run.id}.child.2", lambda record: record.status is Status.COMPLETED)
    await world.sound(run.id)


async def test_a_failed_workflow_says_what_it_failed_of(world: World) -> None:
    """The run ends with the worker's error, whole; its recorded steps stand."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), transport=broker.end())
    run = await app.start("py")
    error = ErrorData("no money", code="card", type="CardError", retryable=False, details={"left": 3})
    await broker.decide(await broker.turn(), "failed", record(0, "tried", error=ErrorData("x")), error=error)
    with pytest.raises(RunFailed) as caught:
        await run.result(5)
    assert caught.value.error == error
    assert "step tried failed" in await world.statuses(run.id)


async def test_a_requeue_asks_again_for_the_call_that_failed_the_run(world: World) -> None:
    """Where the worker let a call's error through, the call is made again and not only the turn; a local step, with its turn."""
    broker = Broker()
    app = await world.engine(remote_workflow("py", step_retries=ONCE), transport=broker.end())
    run = await app.start("py")
    await broker.decide(await broker.turn(1), "continue", record(0, "a", 1), call(1))
    broken = ErrorData("the bank is closed", code="closed")
    await broker.answer(await broker.sent(1), error=broken)
    turn = await broker.turn(2)
    await broker.decide(turn, "failed", error=turn.history[1].error)
    with pytest.raises(RunFailed, match="the bank is closed"):
        await run.result(5)
    await app.engine.requeue(run.id)
    again = await broker.sent(2)
    assert (again.step_id, again.attempt) == (step_id(run.id, 1), 2)
    await broker.answer(again, "paid")
    turn = await broker.turn(3)
    assert told(turn) == [(0, "step", "a", 1), (1, "call", "charge", "paid")]
    assert turn.task_id not in {one.task_id for one in broker.turns[:2]}
    await broker.decide(turn, "failed", record(2, "b", error=broken), error=broken)
    with pytest.raises(RunFailed):
        await run.result(5)
    await app.engine.requeue(run.id)
    turn = await broker.turn(4)
    assert [item.seq for item in turn.history] == [0, 1]
    await broker.decide(turn, "completed", output=1)
    assert await run.result(5) == 1
    await world.sound(run.id)


async def test_cancelling_tells_the_worker_and_settles(world: World) -> None:
    """A run is cancelled while its turn is under way: the worker is told, and its decision is too late."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), remote_workflow("kid"), transport=broker.end())
    run = await app.start("py")
    await broker.decide(
        await broker.turn(1), "continue", call(0), StartChildRun(seq=1, workflow="kid"), Sleep(seq=2, ms=0)
    )
    await eventually(lambda: len(broker.turns) == 3, "a second turn and the child's first")
    under_way = next(turn for turn in broker.turns[1:] if turn.run_id == run.id)
    await run.cancel()
    with pytest.raises(RunCancelled):
        await run.result(5)
    await eventually(lambda: under_way.task_id in broker.cancelled, "the worker is told")
    assert step_id(run.id, 0) in broker.cancelled
    await broker.decide(under_way, "completed", output="too late")
    await world.until(f"{run.id}.child.1", lambda record: record.status is Status.CANCELLED)
    assert (await world.record(run.id)).status is Status.CANCELLED
    await world.sound(run.id)


async def test_a_worker_that_heard_of_the_cancel_first_ends_the_run(world: World) -> None:
    """The status `cancelled` ends the run so, with what its turn had recorded by then."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), transport=broker.end())
    run = await app.start("py")
    await broker.decide(await broker.turn(), "cancelled", record(0, "half", 1))
    with pytest.raises(RunCancelled):
        await run.result(5)
    assert "step half completed" in await world.statuses(run.id)


async def test_a_run_may_take_no_longer_than_its_timeout(world: World) -> None:
    """A hosted workflow has a timeout as any other."""
    broker = Broker()
    app = await world.engine(remote_workflow("py", timeout=0.1), transport=broker.end())
    run = await app.start("py")
    await broker.decide(await broker.turn(), "continue", AwaitSignal(seq=0, signal="never"))
    with pytest.raises(RunTimeout, match="longer than its timeout"):
        await run.result(5)


async def test_an_engine_that_dies_between_turn_and_decision_is_replaced(world: World) -> None:
    """The next owner awaits the same turn, sends nothing twice, and takes the decision; the run's history is whole."""
    broker = Broker()
    definition = remote_workflow("py")
    app = await world.engine(definition, transport=broker.end())
    run = await app.start("py")
    await broker.decide(await broker.turn(1), "continue", record(0, "a", "kept"), Sleep(seq=1, ms=0))
    turn = await broker.turn(2)
    await world.until_journal(run.id, lambda lines: "remote turn:1 published" in lines)
    await world.crash(app)
    heir = await world.engine(definition, transport=broker.end())
    await eventually(lambda: run.id in heir.engine._executor.residents, "the heir has it")
    await broker.decide(turn, "continue", call(2))
    await broker.answer(await broker.sent(1), "paid")
    last = await broker.turn(3)
    assert told(last) == [(0, "step", "a", "kept"), (1, "timer", "sleep:1", None), (2, "call", "charge", "paid")]
    await broker.decide(last, "completed", output="alive")
    assert await heir.engine.result(run.id, timeout=5) == "alive"
    assert len(broker.turns) == 3
    await world.sound(run.id)


async def test_an_unpublished_turn_goes_out_under_its_id(world: World) -> None:
    """The await is stored before the task is published: a new owner publishes the very same task, history and all."""
    broker = Broker()
    broker.hanging = True
    definition = remote_workflow("py")
    app = await world.engine(definition, transport=broker.end(), dispatch_timeout=60)
    run = await app.start("py", {"n": 1})
    await world.until_journal(run.id, lambda lines: "remote turn dispatched" in lines)
    await world.crash(app)
    broker.hanging = False
    heir = await world.engine(definition, transport=broker.end())
    turn = await broker.turn()
    assert (turn.attempt, bytes(turn.input)) == (1, b'{"n":1}')
    await broker.decide(turn, "completed", output=1)
    assert await heir.engine.result(run.id, timeout=5) == 1


async def test_any_engine_takes_a_decision(world: World) -> None:
    """A decision that reaches an engine which has not the run gets to its owner through the inbox, once."""
    broker = Broker()
    mine, others = broker.end(), broker.end()
    app = await world.engine(remote_workflow("py"), transport=mine)
    await world.engine(transport=others)
    run = await app.start("py")
    turn = await broker.turn(1)
    await broker.decide(turn, "continue", record(0, "a", "x" * 100), Sleep(seq=1, ms=0), through=others)
    await broker.decide(turn, "continue", record(0, "a", "twice"), through=others)
    turn = await broker.turn(2)
    assert told(turn)[0] == (0, "step", "a", "x" * 100)
    await broker.decide(turn, "completed", output=2, through=others)
    assert await run.result(5) == 2
    assert len(broker.turns) == 2


async def test_a_decision_wakes_a_run_that_nobody_has(world: World) -> None:
    """The owner dies unseen and its run lies in the store: the decision waits in its inbox, and the next owner takes it."""
    broker = Broker()
    definition = remote_workflow("py")
    mine, others = broker.end(), broker.end()
    app = await world.engine(definition, transport=mine, lease=SHORT)
    other = await world.engine(transport=others)
    run = await app.start("py")
    turn = await broker.turn(1)
    await world.crash(app, noticed=False)
    await broker.decide(turn, "completed", output="found", through=others)
    await world.engine(definition, transport=broker.end(), lease=SHORT)
    assert await other.engine.result(run.id, timeout=10) == "found"
    await world.sound(run.id)


async def test_lines_and_patches_of_the_code_are_kept(world: World) -> None:
    """Log lines of a decision are the run's, numbered on; patches are told to every later turn."""
    broker = Broker()
    app = await world.engine(remote_workflow("py"), transport=broker.end())
    run = await app.start("py")
    lines = [StepEvent(at=1, level="info", message="one", data={"n": 1}), StepEvent(at=2, level="warn", message="two")]
    turn = await broker.turn(1)
    await broker.decide(turn, "continue", Sleep(seq=0, ms=0), logs=lines, patches=["faster"])
    turn = await broker.turn(2)
    assert (turn.logs, turn.patches) == (2, ["faster"])
    await broker.decide(turn, "completed", logs=lines[:1], patches=["faster"])
    await run.result(5)
    written = [msgspec.json.decode(e.payload or b"") for e in await world.journal(run.id) if e.kind == "log"]
    assert [(line["level"], line["message"]) for line in written] == [("info", "one"), ("warn", "two"), ("info", "one")]


def test_registering_refuses_what_cannot_work() -> None:
    """A turn needs time, and a number of retries is one; both are said where the workflow is registered."""
    with pytest.raises(DefinitionError, match="turn_timeout"):
        remote_workflow("py", turn_timeout=0)
    with pytest.raises(DefinitionError, match="retries"):
        remote_workflow("py", retries=-1)
    with pytest.raises(DefinitionError, match="step_retries"):
        remote_workflow("py", step_retries=True)
