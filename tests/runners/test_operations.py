"""Functions over HTTP, one operation per round trip (wire section 4): the engine's driver against an app on a real socket."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from starlette.responses import Response

from durable.core.errors import RunFailed, RunTimeout
from durable.core.functions import AppFunction, Pass, Reply, function_workflow
from durable.core.retry import RetryPolicy
from durable.protocol import signature
from durable.runners.http import post, refused
from durable.runners.outgoing import Calls, Outgoing
from tests.engine.world import World, eventually
from tests.runners.apps import HttpApp, Step

QUICK = RetryPolicy(max_attempts=3, initial_delay=0.01, max_delay=0.05)


def function_of(app: HttpApp, name: str, **options: Any) -> Any:
    """A function of this app, reached over its socket."""
    outgoing = Outgoing(Calls(loopback=True))
    app.at_end.append(outgoing.close)

    async def ask(call: Pass) -> Reply:
        headers = {signature.HEADER: signature.body_signature(app.key or "", call.body)}
        answer = await post(outgoing, app.url, call.body, headers, 5.0)
        if answer.status != 200:
            raise refused(answer, call.app)
        return Reply(200, answer.body)

    options.setdefault("retry", QUICK)
    return function_workflow(AppFunction(name, "1", "default", "shop", "operation", ask, **options))


def soon(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


async def test_steps_and_sleeps_run_once_each(world: World) -> None:
    """An app's function runs step by step: each body once, each pass with what is known, the result is the run's."""
    made: list[str] = []

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        first = await step.run("reserve", lambda: made.append("reserve") or event["data"]["n"])
        step.sleep("nap", soon(0.02))
        second = await step.run("charge", lambda: made.append("charge") or first + 1)
        return {"charged": second}

    async with HttpApp({"order": order}, key="s3cret") as app:
        engine = await world.engine(function_of(app, "order"))
        handle = await engine.start("order", {"n": 4})
        assert await handle.result(10) == {"charged": 5}
        assert made == ["reserve", "charge"]
        assert app.forged == 0
        assert app.asked[-1]["steps"]["reserve"] == {"type": "run", "data": 4}
        assert app.asked[-1]["steps"]["nap"] == {"type": "sleep", "data": None}
        assert app.asked[0]["runId"] == handle.id
        lines = await world.statuses(handle.id)
        assert "step reserve completed" in lines
        assert "step invoke:1 completed" in lines
        await world.sound(handle.id)


async def test_retries_then_failure_handler(world: World) -> None:
    """A step that fails is tried as often as the function's retries say, then the function is told of its failure, may use
    steps there, and the run fails with the step's error."""
    tries: list[int] = []
    told: list[Any] = []

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        if failure is not None:
            await step.run("charge", lambda: told.append(failure))
            return None

        def charge() -> None:
            tries.append(1)
            raise ValueError("no money")

        await step.run("charge", charge)

    async with HttpApp({"order": order}, key="s3cret") as app:
        engine = await world.engine(function_of(app, "order", on_failure=True))
        handle = await engine.start("order", {})
        with pytest.raises(RunFailed, match="no money"):
            await handle.result(10)
        assert len(tries) == 3
        assert told[0]["message"] == "no money"
        assert told[0]["stepId"] == "charge"
        assert told[0]["name"] == "ValueError"
        assert await world.statuses(handle.id, "step", "charge") == ["retrying", "retrying", "failed"]
        await world.sound(handle.id)


async def test_not_retryable_ends_at_once(world: World) -> None:
    """`retryable: false` ends the retries of a step."""
    tries: list[int] = []

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        def charge() -> None:
            tries.append(1)
            raise PermissionError("never")

        await step.run("charge", charge)

    async with HttpApp({"order": order}) as app:
        engine = await world.engine(function_of(app, "order"))
        with pytest.raises(RunFailed, match="never"):
            await (await engine.start("order", {})).result(10)
        assert tries == [1]


async def test_function_body_failures_are_retried(world: World) -> None:
    """An error outside of steps is tried again with the same memos, up to the function's retries."""
    passes: list[int] = []

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        await step.run("one", lambda: 1)
        passes.append(1)
        if len(passes) < 3:
            raise RuntimeError("flaky")
        return "done"

    async with HttpApp({"order": order}) as app:
        engine = await world.engine(function_of(app, "order"))
        assert await (await engine.start("order", {})).result(10) == "done"
        assert len(passes) == 3


async def test_an_id_used_as_two_types_fails_the_run(world: World) -> None:
    """Reusing one id as two types is an error, said at once."""

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        if "a" in step.memos:
            step.memos.pop("a")
            step.sleep("a", soon(1))
        await step.run("a", lambda: 1)

    async with HttpApp({"order": order}) as app:
        engine = await world.engine(function_of(app, "order"))
        with pytest.raises(RunFailed, match="was a run and is now a sleep"):
            await (await engine.start("order", {})).result(10)


async def test_an_app_that_is_away_fails_nobody(world: World) -> None:
    """While the app answers 503 its runs wait, whatever their retries; when it is back they go on."""
    away = True

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        return await step.run("one", lambda: 1)

    async def before(asked: dict[str, Any]) -> Response | None:
        return Response(status_code=503) if away else None

    async with HttpApp({"order": order}) as app:
        app.before = before
        engine = await world.engine(function_of(app, "order", retry=RetryPolicy(max_attempts=1)))
        handle = await engine.start("order", {})
        await world.until_journal(handle.id, lambda lines: "step invoke retrying" in lines)
        away = False
        assert await handle.result(10) == 1


async def test_killed_between_and_within_passes(world: World) -> None:
    """An engine that dies while the app is at it, or between passes, is followed by another, which asks for the same pass
    again with the same memos; steps that were told of never run twice."""
    made: list[str] = []
    gate = asyncio.Event()

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        first = await step.run("one", lambda: made.append("one") or 1)
        step.sleep("nap", soon(0.01))
        if not gate.is_set():
            reached.set()
            await gate.wait()
        second = await step.run("two", lambda: made.append("two") or 2)
        return first + second

    reached = asyncio.Event()
    async with HttpApp({"order": order}) as app:
        function = function_of(app, "order")
        first = await world.engine(function)
        handle = await first.start("order", {})
        await asyncio.wait_for(reached.wait(), 10)
        before = app.asked[-1]
        await world.crash(first)
        gate.set()
        await world.engine(function)
        await world.until(handle.id, lambda record: record.status == "completed", "it ended")
        again = [asked for asked in app.asked if asked["steps"].keys() == before["steps"].keys()]
        assert len(again) >= 2
        assert all(asked == before for asked in again)
        assert made.count("one") == 1
        assert await world.statuses(handle.id, "step", "two") == ["completed"]
        await world.sound(handle.id)


async def test_timeout_of_the_whole_run(world: World) -> None:
    """timeoutMs bounds the run; what is under way is given up, and the failure handler is told."""
    told: list[Any] = []

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        if failure is not None:
            told.append(failure["code"])
            return
        step.sleep("nap", soon(60))

    async with HttpApp({"order": order}) as app:
        engine = await world.engine(function_of(app, "order", timeout=0.1, on_failure=True))
        with pytest.raises(RunTimeout, match="timeout"):
            await (await engine.start("order", {})).result(10)
        await eventually(lambda: told == ["run_timeout"])


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"<html>secret page</html>", "not what it should be"),
        (b'{"op":"dance","id":"x"}', "dance"),
        (b'{"op":"step"}', "no id"),
        (b'{"op":"sleep","id":"x","until":"tomorrow"}', "ISO 8601"),
        (b'{"op":"sendEvent","id":"x","events":[]}', "1 to 100"),
        (b'{"op":"step","id":"x","data":"\\u0000"}', "NUL"),
    ],
)
async def test_nonsense_is_a_typed_error(world: World, body: bytes, match: str) -> None:
    """An answer that cannot be understood fails the run with a typed error that repeats nothing of a page; no run wedges."""

    async def before(asked: dict[str, Any]) -> Response | None:
        return Response(body)

    async with HttpApp({}) as app:
        app.before = before
        engine = await world.engine(function_of(app, "order", retry=RetryPolicy(max_attempts=1)))
        with pytest.raises(RunFailed, match=match) as raised:
            await (await engine.start("order", {})).result(10)
        assert "secret" not in str(raised.value)
