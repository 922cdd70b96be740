"""The scenarios of `protocol/`, played by this worker: histories in, commands out, for workflows any language can write."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from durable import Context, NonRetryable, StepFailed, workflow
from durable.core.clock import SystemClock
from durable.core.registry import Registry
from durable.protocol.codec import decode_turn, encode
from durable.protocol.messages import WorkflowTask
from durable.worker.turns import TurnHandler
from tests.protocol.test_schema import validator

FOLDER = Path(__file__).parents[2] / "protocol" / "scenarios"
SCENARIOS = {file.stem: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}


class Refused(NonRetryable):
    code = "refused"


def refuse() -> None:
    raise Refused("no")


def add_one(n: int) -> int:
    return n + 1


@workflow("scenario.sequence")
async def sequence(ctx: Context, input: dict[str, int]) -> Any:
    a = await ctx.remote("double", {"n": input["n"]})
    b = await ctx.remote("double", {"n": a})
    return {"total": b}


@workflow("scenario.partition")
async def partition(ctx: Context) -> Any:
    return await ctx.remote("double", {"n": 1}, group="eu")


@workflow("scenario.local")
async def local(ctx: Context, input: dict[str, int]) -> Any:
    a = await ctx.step("add-one", add_one, input["n"])
    return await ctx.remote("double", {"n": a})


@workflow("scenario.parallel")
async def parallel(ctx: Context, input: dict[str, list[int]]) -> Any:
    return await asyncio.gather(*[ctx.remote("double", {"n": n}) for n in input["ns"]])


@workflow("scenario.failing")
async def failing(ctx: Context) -> str:
    await ctx.remote("explode", {})
    return "never"


@workflow("scenario.caught")
async def caught(ctx: Context) -> Any:
    try:
        return await ctx.remote("explode", {})
    except StepFailed as error:
        assert error.error is not None
        return await ctx.remote("repair", {"code": error.error.code})


@workflow("scenario.local_failing")
async def local_failing(ctx: Context) -> None:
    await ctx.step("bad", refuse)


@workflow("scenario.sleep")
async def sleep(ctx: Context, input: dict[str, int]) -> str:
    await ctx.sleep(input["ms"] / 1_000)
    return "woken"


@workflow("scenario.signal")
async def signal(ctx: Context) -> Any:
    return await ctx.wait_for_signal("approve")


@workflow("scenario.two_signals")
async def two_signals(ctx: Context) -> Any:
    return [await ctx.wait_for_signal("go"), await ctx.wait_for_signal("go")]


@workflow("scenario.child")
async def child(ctx: Context, input: dict[str, int]) -> Any:
    return await ctx.child("scenario.sequence", {"n": input["n"]})


@workflow("scenario.race")
async def race(ctx: Context) -> str:
    slow, late = ctx.remote("slow", {}), ctx.sleep(1)
    await asyncio.wait([slow, late], return_when=asyncio.FIRST_COMPLETED)
    return "answer" if slow.done() else "late"


@workflow("scenario.loop")
async def loop(ctx: Context, input: dict[str, int]) -> Any:
    x = None
    for i in range(input["times"]):
        x = await ctx.remote("double", {"n": i})
    return x


@workflow("scenario.now")
async def now(ctx: Context) -> bool:
    return ctx.now().timestamp() > 0


@workflow("scenario.side_effect")
async def side_effect(ctx: Context) -> Any:
    return [await ctx.side_effect(random.random), await ctx.remote("double", {"n": 1})]


WORKFLOWS = [
    sequence,
    partition,
    local,
    parallel,
    failing,
    caught,
    local_failing,
    sleep,
    signal,
    two_signals,
    child,
    race,
    loop,
    now,
    side_effect,
]


def host() -> TurnHandler:
    return TurnHandler(Registry(WORKFLOWS), SystemClock())


def plain(decision: Any) -> Any:
    """A decision as it is compared: see the README beside the scenarios."""
    return {"commands": [_command(one) for one in decision.get("commands") or []]} | {
        key: _error(value) if key == "error" else value
        for key, value in decision.items()
        if key not in ("commands", "patches", "logs") and (value is not None or key == "output")
    }


def _command(command: dict[str, Any]) -> dict[str, Any]:
    shown = {key: value for key, value in command.items() if key not in ("startedAt", "finishedAt", "events")}
    if shown["kind"] == "call":
        shown.setdefault("group", "")
    if "error" in shown:
        shown["error"] = _error(shown["error"])
    return shown


def _error(error: dict[str, Any] | None) -> Any:
    if error is None:
        return None
    return {"retryable": True} | {key: value for key, value in error.items() if key not in ("type", "stack")}


def same(expected: Any, found: Any) -> bool:
    if expected == "<any>":
        return True
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(same(value, found[key]) for key, value in expected.items())
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(same(a, b) for a, b in zip(expected, found, strict=True))
    return bool(expected == found)


async def play(turn: dict[str, Any], by: TurnHandler) -> None:
    task: WorkflowTask = decode_turn(json.dumps(turn["task"]).encode())
    found = msgspec.json.decode(encode(await by(task)))
    assert same(plain(turn["decision"]), plain(found)), (turn["why"], found)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_scenario(name: str) -> None:
    """In order with one host, and in reverse order with a new one for each turn, the decisions are the ones written down."""
    turns = SCENARIOS[name]["turns"]
    one = host()
    for turn in turns:
        await play(turn, one)
    one.close()
    for turn in reversed(turns):
        fresh = host()
        await play(turn, fresh)
        fresh.close()


@pytest.mark.parametrize("name", SCENARIOS)
def test_messages_of_a_scenario_are_valid(name: str) -> None:
    """Every task and every decision is a whole message by its schema."""
    for turn in SCENARIOS[name]["turns"]:
        validator("workflow-task.json").validate(turn["task"])
        validator("workflow-decision.json").validate(turn["decision"])


def test_every_workflow_of_the_readme_is_played() -> None:
    """The README, the files and this page know the same workflows."""
    written = {
        line.split("(")[0] for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("scen")
    }
    played = {scenario["workflow"] for scenario in SCENARIOS.values()}
    assert written == played == {one.__durable_workflow__.name for one in WORKFLOWS}  # type: ignore[attr-defined]
