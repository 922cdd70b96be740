"""`durable runs` acting on runs: pause, resume, rerun, fork, cancel with children, bulk; on a real SQLite file."""

from __future__ import annotations

import asyncio
import json
from typing import Any, get_args

import pytest

from durable.cli.bulk import ACTIONS
from durable.engine.bulk import Action
from durable.protocol.states import Status
from tests.cli.world import World, eventually, load_app


def meanwhile(world: World, *fact: tuple[str, str]) -> dict[str, Any]:
    """Let an engine with the app's code have the store until these runs are so; their rows then."""
    small = load_app()
    small.app.store = world.url

    async def go() -> dict[str, Any]:
        async with small.app as app:

            async def so() -> bool:
                rows = [await app.get(run_id) for run_id, _ in fact]
                return all(
                    wanted in (row.status.value, row.activity.value if row.status is Status.ACTIVE else "")
                    for row, (_, wanted) in zip(rows, fact, strict=True)
                )

            await eventually(so)
            return {run_id: await app.get(run_id) for run_id, _ in fact}

    return asyncio.run(go())


def test_pause_and_resume(own_world: World) -> None:
    """A run is paused by somebody, listed as paused, shown with who and why and what to do, and resumed once."""
    run = own_world["waiting"]
    told = own_world.run("runs", "pause", run, "--by", "ann", "--reason", "bank is down")
    assert told.exit_code == 0
    assert f"durable runs resume {run}" in told.stdout
    assert own_world.json("runs", "pause", run) == {"id": run, "paused": False, "alreadyAsked": True}
    meanwhile(own_world, (run, "paused"))
    listed = own_world.json("runs", "list", "--activity", "paused")
    assert [one["id"] for one in listed["runs"]] == [run]
    shown = own_world.run("runs", "show", run).stdout
    assert "by ann, bank is down" in shown
    assert f"durable runs resume {run}" in shown
    assert own_world.json("runs", "resume", run, "--timers", "hold", "--by", "bob") == {"id": run, "resumed": True}
    meanwhile(own_world, (run, "waiting"))
    assert own_world.json("runs", "resume", run) == {"id": run, "resumed": False}
    assert "deadlines are" in own_world.run("runs", "show", run).stdout
    late = own_world.run("runs", "pause", own_world["hello"])
    assert late.exit_code == 4
    assert "completed" in late.stderr


def test_rerun_makes_a_new_run_that_says_where_it_is_from(own_world: World) -> None:
    """From a step, under a key that finds it again; `show` names the original; it ends on an engine."""
    old = own_world["hello"]
    new = own_world.json("runs", "rerun", old, "--from-step", "greet", "--key", "k")
    assert (new["replayOf"], new["fromStep"]) == (old, "greet")
    assert own_world.json("runs", "rerun", old, "--from-step", "greet", "--key", "k")["id"] == new["id"]
    row = meanwhile(own_world, (new["id"], "completed"))[new["id"]]
    assert json.loads(row.output) == "hello ann"
    assert f"rerun of {old} from step greet" in own_world.run("runs", "show", new["id"]).stdout
    other = own_world.json("runs", "rerun", old, "--input", '"eve"')
    row = meanwhile(own_world, (other["id"], "completed"))[other["id"]]
    assert json.loads(row.output) == "hello eve"


def test_fork_goes_on_with_another_result(own_world: World) -> None:
    """Behind the step everything has the new result."""
    new = own_world.json("runs", "fork", own_world["hello"], "--step", "greet", "--result", '"good day"')
    row = meanwhile(own_world, (new["id"], "completed"))[new["id"]]
    assert json.loads(row.output) == "good day"
    told = own_world.run("runs", "fork", own_world["waiting"], "--input", "9")
    assert told.exit_code == 0
    assert "is a fork of" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["rerun", "waiting"], 4, "Cancel it first"),
        (["rerun", "hello", "--from-step", "nobody"], 4, "It has greet"),
        (["rerun", "hello", "--input", "{"], 2, "is not JSON"),
        (["fork", "hello"], 1, "no edit was given"),
        (["fork", "hello", "--step", "greet"], 1, "needs both"),
    ],
)
def test_what_cannot_be_is_a_sentence(world: World, arguments: list[str], code: int, said: str) -> None:
    """Refusals exit with their code and say what to do; no traceback."""
    verb, name, *rest = arguments
    result = world.run("runs", verb, world[name], *rest)
    assert (result.exit_code, "Traceback" in result.output) == (code, False)
    assert said in result.stderr


def test_cancel_with_children(own_world: World) -> None:
    """The whole family is asked; a family that has ended is too late."""
    told = own_world.json("runs", "cancel", own_world["waiting"], "--children")
    assert told == {"id": own_world["waiting"], "cancelled": True, "alreadyAsked": False, "children": True}
    meanwhile(own_world, (own_world["waiting"], "cancelled"))
    late = own_world.run("runs", "cancel", own_world["family"], "--children")
    assert late.exit_code == 4
    assert "everything it started" in late.stderr


def test_bulk_counts_asks_and_does(own_world: World) -> None:
    """A dry run names them, without --yes it asks, with it every run is asked once, and again changes nothing."""
    found = own_world.json("runs", "bulk", "replay", "--workflow", "hello", "--dry-run")
    assert (found["matched"], own_world["hello"] in found["runIds"]) == (2, True)
    assert (
        "replay would be done to 2 runs."
        in own_world.run("runs", "bulk", "replay", "--workflow", "hello", "--dry-run").stdout
    )
    asked = own_world.run("runs", "bulk", "replay", "--workflow", "hello", input="n\n")
    assert (asked.exit_code, "Nothing was done" in asked.stderr) == (4, True)
    done = own_world.json("runs", "bulk", "replay", "--workflow", "hello", "--yes")
    assert [one["outcome"] for one in done["runs"]] == ["done", "done"]
    meanwhile(own_world, *((one["newId"], "completed") for one in done["runs"]))
    told = own_world.run("runs", "bulk", "cancel", "--workflow", "approval", "--yes")
    assert told.stdout == "cancel: 1 done, 0 unchanged, 0 refused.\n"
    told = own_world.run("runs", "bulk", "cancel", "--workflow", "approval", "--yes")
    assert told.stdout == "cancel: 0 done, 1 unchanged, 0 refused.\n"
    refused = own_world.run("runs", "bulk", "rerun", "--workflow", "approval", "--status", "active", "--yes")
    assert refused.exit_code == 4
    assert "Cancel it first" in refused.stderr


def test_bulk_wants_to_know_which(world: World) -> None:
    """All runs of a store are not acted on by a forgotten filter."""
    result = world.run("runs", "bulk", "cancel", "--yes")
    assert result.exit_code == 2
    assert "Say which runs" in result.stderr


def test_bulk_offers_the_actions_there_are() -> None:
    """What the command line writes out is what the engine has."""
    assert get_args(Action) == ACTIONS
