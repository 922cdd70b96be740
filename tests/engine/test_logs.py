"""Log lines: written once however often the body replays, in order, under the step they belong to (R6)."""

from __future__ import annotations

import msgspec

from durable import Context, RetryPolicy, current_step, durable_step, workflow
from durable.core.errors import ErrorData
from durable.core.hosted import log_line
from durable.engine.lines import line_of
from durable.engine.residents import Line
from durable.engine.resume import arrival_of, report_of
from durable.protocol.messages import StepEvent, StepResult
from durable.store.records import InboxRow, Message
from tests.engine.broker import Broker
from tests.engine.world import World


async def lines(world: World, run_id: str) -> list[tuple[str | None, str]]:
    entries = [entry for entry in await world.journal(run_id) if entry.kind == "log"]
    return [(entry.key, msgspec.json.decode(entry.payload or b"")["message"]) for entry in entries]


async def test_R6_a_line_is_written_once_however_often_the_run_replays(world: World) -> None:
    """Over crashes and evictions each `ctx.log` is one row."""

    @workflow(name="talks")
    async def talks(ctx: Context) -> None:
        ctx.log("begun", order=7)
        await ctx.wait_for_signal("a")
        ctx.log("got a", level="warn")
        await ctx.sleep(0.01)
        ctx.log("slept")
        await ctx.wait_for_signal("b")
        ctx.log("done")

    app = await world.engine(talks)
    handle = await app.start(talks)
    for name in ("a", "b"):
        await world.waits(handle.id)
        await world.crash(app)
        app = await world.engine(talks)
        await app.run(handle.id).signal(name)
    await app.run(handle.id).result(5)
    assert await lines(world, handle.id) == [(None, "begun"), (None, "got a"), (None, "slept"), (None, "done")]
    payload = msgspec.json.decode(next(e for e in await world.journal(handle.id) if e.kind == "log").payload or b"")
    assert payload == {"level": "info", "message": "begun", "fields": {"order": 7}}
    await world.sound(handle.id)


async def test_R6_a_steps_lines_stand_under_its_key(world: World) -> None:
    """`current_step().log` from async bodies and from threads; they come before the result, in order."""

    @workflow(name="steps")
    async def steps(ctx: Context) -> None:
        def thread() -> None:
            current_step().log("from a thread")

        async def body() -> None:
            for n in range(3):
                current_step().log(f"line {n}", n=n)

        await ctx.step("async", body)
        await ctx.step("thread", thread)

    app = await world.engine(steps)
    handle = await app.start(steps)
    await handle.result(5)
    assert await lines(world, handle.id) == [
        ("async", "line 0"),
        ("async", "line 1"),
        ("async", "line 2"),
        ("thread", "from a thread"),
    ]
    await world.sound(handle.id)


async def test_a_line_that_cannot_be_kept_is_an_error_at_the_call(world: World) -> None:
    """Fields that are no JSON raise PayloadError where they are logged; nothing is written, the run goes on if it likes."""
    from durable.core.errors import PayloadError

    @workflow(name="bad")
    async def bad(ctx: Context) -> str:
        try:
            ctx.log("bad", thing=object())
        except PayloadError as error:
            return error.code
        return ""

    app = await world.engine(bad)
    handle = await app.start(bad)
    assert await handle.result(5) == "payload_type"
    assert await lines(world, handle.id) == []


async def test_a_line_with_nul_or_surrogates_does_not_wedge_the_run(world: World) -> None:
    """Hostile text in a message: the run completes all the same."""

    @workflow(name="hostile")
    async def hostile(ctx: Context) -> str:
        for text in ("nul \0 inside", "half \ud800 pair"):
            try:
                ctx.log(text)
            except Exception as error:
                return type(error).__name__
        return "written"

    app = await world.engine(hostile)
    handle = await app.start(hostile)
    assert await handle.result(5) == "written"
    await world.sound(handle.id)


async def test_a_bodys_hostile_line_does_not_wedge_the_run(world: World) -> None:
    """The same from a step body, sync and async."""

    @workflow(name="hostile")
    async def hostile(ctx: Context) -> str:
        async def body() -> str:
            try:
                current_step().log("half \ud800 pair, nul \0")
            except Exception as error:
                return type(error).__name__
            return "written"

        result: str = await ctx.step("body", body)
        return result

    app = await world.engine(hostile)
    handle = await app.start(hostile)
    assert await handle.result(5) == "written"
    await world.sound(handle.id)


async def test_R6_a_remote_steps_lines_reach_the_journal(world: World) -> None:
    """`current_step().log` on a worker: its lines come back with the result and are journaled under the step."""

    @durable_step("tell")
    async def tell() -> None:
        current_step().log("working", n=1)

    @workflow(name="told")
    async def told(ctx: Context) -> None:
        await ctx.remote(tell)

    app = await world.engine(told, tell)
    handle = await app.start(told)
    await handle.result(5)
    assert await lines(world, handle.id) == [("tell", "working")]


def test_a_line_of_a_part_of_a_step_says_which() -> None:
    """What a worker tells of a sub-process (its id, name, outcome) is journaled with the line, cleaned."""
    event = StepEvent(at=1, level="error", message="no", data=1, sub_id="s", name="p\0", status="failed", phase="check")
    for written in (line_of(event).payload, log_line(event)):
        assert msgspec.json.decode(written) == {
            "level": "error",
            "message": "no",
            "fields": 1,
            "part": {"id": "s", "name": "p\\u0000", "status": "failed", "phase": "check"},
        }
    other = msgspec.structs.replace(event, sub_id="t")
    assert line_of(event).mark != line_of(other).mark, "two parts may say the same at the same moment"
    assert "part" not in msgspec.json.decode(line_of(StepEvent(at=1, level="info", message="m")).payload)


async def test_R6_lines_of_a_worker_reach_a_run_that_has_left_memory(world: World) -> None:
    """A result that comes through the inbox brings its lines, once however often it is delivered, before the result."""

    @workflow(name="far-lines")
    async def far(ctx: Context) -> object:
        answer = await ctx.remote("far", None, retries=RetryPolicy(max_attempts=2, initial_delay=0.0, jitter=0.0))
        await ctx.wait_for_signal("done")
        return answer

    broker = Broker()
    app = await world.engine(far, transport=broker.end())
    handle = await app.start(far)
    for attempt, status in ((1, "failed"), (2, "completed")):
        task = await broker.sent(attempt)
        await world.until_journal(handle.id, lambda found, n=attempt: found.count("remote far published") == n)
        await app.close()
        idle = await world.engine(transport=broker.end())  # serves nothing, and takes results for those who do
        result = StepResult(
            run_id=task.run_id,
            seq=task.seq,
            step_id=task.step_id,
            status=status,  # type: ignore[arg-type]
            output=msgspec.Raw(b"7") if status == "completed" else msgspec.UNSET,
            error=ErrorData(message="again") if status == "failed" else None,
            events=[StepEvent(at=1, level="info", message=f"{attempt} {n}", data={"n": n}) for n in range(2)],
            attempt=attempt,
        )
        for _ in range(2):
            await broker.ends[-1].results(result)  # type: ignore[misc]
        await idle.close()
        app = await world.engine(far, transport=broker.end())
    await app.run(handle.id).signal("done")
    assert await app.run(handle.id).result(5) == 7
    assert await lines(world, handle.id) == [("far", text) for text in ("1 0", "1 1", "2 0", "2 1")]
    statuses = [s for s in await world.statuses(handle.id) if s.split()[-1] in ("written", "retrying", "completed")]
    assert statuses[:6] == ["log far written"] * 2 + ["remote far retrying"] + ["log far written"] * 2 + [
        "remote far completed"
    ]
    await world.sound(handle.id)


def test_lines_that_do_not_fit_beside_their_result_are_left_out() -> None:
    """A report keeps within what a store takes: the first lines that fit, and never at the cost of the result. One that an
    earlier version has stored is read too."""
    result, lines = b"1" * 100, [Line(n if n % 2 else (n, "text"), b'"%d"' % n) for n in range(10)]
    for limit in range(100, 250):
        report = report_of(result, lines, limit)
        assert report is None or len(report) <= limit
    whole = report_of(result, lines, 1000)
    assert whole is not None
    row = InboxRow(1, 0, Message("r", "m", "report", "completed", whole, ordinal=0, attempt=1))
    arrival = arrival_of(row)
    assert (arrival.payload, arrival.lines) == (result, lines)
    old = msgspec.json.encode({"lines": [1, 2], "result": 3})
    arrival = arrival_of(InboxRow(1, 0, Message("r", "m", "report", "completed", old, ordinal=0, attempt=1)))
    assert (arrival.payload, [line.payload for line in arrival.lines]) == (b"3", [b"1", b"2"])
