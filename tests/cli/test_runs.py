"""`durable runs`, on a real SQLite file with real runs in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from durable.cli.runs import ACTIVITIES, STATUSES
from durable.protocol.states import Activity, Status
from tests.cli.world import World, durable


def test_filters_know_every_state() -> None:
    """The states that --status and --activity offer are those there are."""
    assert set(STATUSES) == {status.value for status in Status}
    assert set(ACTIVITIES) == {activity.value for activity in Activity}


# ------------------------------------------------------------------ list


def test_list_shows_every_run_plainly(world: World) -> None:
    """Without a terminal `runs list` prints one aligned line a run, newest first, with no escape codes."""
    result = world.run("runs", "list")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0].split() == ["ID", "WORKFLOW", "STATE", "STARTED", "TOOK", "KEY", "NOTE"]
    assert len(lines) == 1 + 9
    assert "\x1b" not in result.output
    assert world["blocked"] in lines[1]
    assert "active · blocked" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--status", "failed"], {"broken", "evil"}),
        (["--status", "dead"], {"dead"}),
        (["--activity", "blocked"], {"blocked"}),
        (["--workflow", "approval", "--status", "cancelled"], {"cancelled"}),
        (["--tag", "wet"], {"broken"}),
        (["--key", "hello-1"], {"hello"}),
        (["--workflow", "nobody"], set()),
    ],
)
def test_list_filters(world: World, arguments: list[str], names: set[str]) -> None:
    """Filters are ANDed; what does not match is not there."""
    found = world.json("runs", "list", *arguments)
    assert {run["id"] for run in found["runs"]} == {world[name] for name in names}


def test_list_of_nothing_says_so(world: World) -> None:
    """No match is a sentence and success, not an empty screen."""
    result = world.run("runs", "list", "--workflow", "nobody")
    assert (result.exit_code, result.stdout) == (0, "No runs.\n")


def test_pages_cover_all_once(world: World) -> None:
    """Going on with each page's cursor shows every run exactly once."""
    seen: list[str] = []
    arguments: list[str] = []
    while True:
        page = world.json("runs", "list", "--limit", "2", *arguments)
        seen += [run["id"] for run in page["runs"]]
        if page["cursor"] is None:
            break
        arguments = ["--cursor", page["cursor"]]
    assert seen == [run["id"] for run in world.json("runs", "list")["runs"]]
    assert len(set(seen)) == 9


def test_children_are_found_by_their_parent(world: World) -> None:
    """`--parent` lists a run's children, and takes a part of its id."""
    found = world.json("runs", "list", "--parent", world["family"])
    assert [run["workflow"] for run in found["runs"]] == ["hello"]
    assert found["runs"][0]["parent"]["runId"] == world["family"]


def test_list_json_leaves_payloads_out(world: World) -> None:
    """A list is small: inputs and outputs are for `show`."""
    run = world.json("runs", "list", "--key", "hello-1")["runs"][0]
    assert not {"input", "output"} & set(run)
    assert run["createdAt"].endswith("Z")
    assert (run["status"], run["activity"], run["tags"]) == ("completed", None, ["friendly"])


# ------------------------------------------------------------------ show


def test_show_tells_state_timeline_and_output(world: World) -> None:
    """`runs show` shows both layers of the state, each journal row with its durations, and the output."""
    out = world.run("runs", "show", world["hello"]).stdout
    assert "state     completed" in out
    assert "key       hello-1" in out
    assert "step greet  ran " in out
    assert "info: greeting who=ann" in out
    assert "executing" in out
    assert '"hello ann"' in out


def test_show_tells_errors_with_their_place(world: World) -> None:
    """A failed run shows each attempt, the error, the line in the author's file, and what to do."""
    out = world.run("runs", "show", world["broken"]).stdout
    assert "step explode retrying  attempt 1" in out
    assert "ValueError: cannot bear rain; next try in" in out
    assert "step explode failed  attempt 2" in out
    assert "small_app.py:" in out
    assert f"durable runs requeue {world['broken']}" in out


def test_show_tells_why_it_is_blocked(world: World) -> None:
    """A blocked run says what was recorded, what the code asks for, and what to do."""
    out = world.run("runs", "show", world["blocked"]).stdout
    assert "active · blocked" in out
    [line] = [line for line in out.splitlines() if "run blocked" in line]
    assert "'first'" in line
    assert "ctx.patched" in out


def test_show_json_is_one_object(world: World) -> None:
    """`show --json` has the row, the whole journal, densely numbered, and the children."""
    run = world.json("runs", "show", world["family"])
    assert (run["input"], run["output"], run["status"]) == ("bob", "hello bob", "completed")
    assert [entry["seq"] for entry in run["journal"]] == list(range(1, run["seq"] + 1))
    assert {entry["kind"] for entry in run["journal"]} == {"run", "child"}
    assert all(entry["ts"].endswith("Z") for entry in run["journal"])
    assert len(run["children"]) == 1


def test_a_part_of_an_id_is_enough(world: World) -> None:
    """The end of an id finds its run; one that fits several is refused with their ids."""
    assert world.json("runs", "show", world["hello"][-8:])["id"] == world["hello"]
    result = world.run("runs", "show", world["hello"][:6])
    assert result.exit_code == 2
    assert "[ambiguous_id]" in result.stderr
    assert world["blocked"] in result.stderr


@pytest.mark.parametrize("run_id", ["nothing-like-it", "xyz", "\x1b[2J", ""])
def test_an_unknown_run_is_a_sentence(world: World, run_id: str) -> None:
    """A run that is not there ends with 3, a code and no traceback; what was typed is escaped."""
    for command in ("show", "watch", "cancel", "requeue"):
        result = world.run("runs", command, run_id)
        assert result.exit_code == 3
        assert result.stderr.startswith("error [run_not_found]: ")
        assert "\x1b" not in result.output


def test_stored_text_cannot_steer_the_terminal(world: World) -> None:
    """ANSI, bidi, bell and C1 codes in payloads, errors, logs and tags are shown as escapes, in every command."""
    for arguments in (["show", world["evil"]], ["watch", world["evil"]], ["list", "--workflow", "evil"]):
        for flags in ([], ["--json"]):
            out = world.run("runs", *arguments, *flags).output
            assert not set(out) & set("\x1b\x07\x9b\u202e\u202c"), arguments
            assert "\\u202e" in out
            assert arguments[0] == "list" or "[bold]markup[/bold]" in out


def test_escaped_json_loses_nothing(world: World) -> None:
    """In JSON the escapes are JSON's own: a program reads exactly what was stored."""
    run = world.json("runs", "show", world["evil"])
    assert run["tags"] == ["\u202etag"]
    [line] = [entry["payload"] for entry in run["journal"] if entry["kind"] == "log"]
    assert line["message"].startswith("\x1b[31mred\x1b[0m \u202egnp.exe\u202c \x07")


# ------------------------------------------------------------------ watch


def test_watch_ends_with_the_run(world: World) -> None:
    """`runs watch` of an ended run prints its rows and ends with how it ended: 0 if it completed, 1 if not."""
    good, bad = world.run("runs", "watch", world["hello"]), world.run("runs", "watch", world["broken"])
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert "Ended: completed" in good.stdout
    assert "Ended: failed" in bad.stdout


def test_watch_goes_on_from_a_row(world: World) -> None:
    """`--from` begins at that row, without gap or repeat."""
    result = world.run("runs", "watch", world["hello"], "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
    later = world.run("runs", "watch", world["hello"], "--json", "--from", "3").stdout.splitlines()
    assert later == result.stdout.splitlines()[2:]


def test_watch_follows_a_live_run(own_world: World, tmp_path: Path) -> None:
    """What another engine does appears line by line, and the end ends it."""
    url = {"DURABLE_STORE": own_world.url}
    small_app = str(Path(__file__).with_name("small_app.py"))
    with durable("runs", "watch", own_world["waiting"], "--json", cwd=tmp_path, env=url) as watching:
        assert watching.stdout
        assert json.loads(watching.stdout.readline())["status"] == "started"
        assert own_world.run("runs", "signal", own_world["waiting"], "approve", '{"by": "ann"}').exit_code == 0
        with durable("dev", small_app, cwd=tmp_path, env=url) as engine:
            try:
                assert [json.loads(line)["kind"] for line in watching.stdout] == ["signal", "run"]
                assert watching.wait(20) == 0
            finally:
                engine.terminate()
                engine.communicate(timeout=20)


# ------------------------------------------------------------------ cancel, signal, requeue


def test_cancel_is_asked_once(own_world: World) -> None:
    """The first request is news, the second is not, and one for an ended run is too late (4)."""
    first = own_world.json("runs", "cancel", own_world["waiting"], "--reason", "enough")
    second = own_world.json("runs", "cancel", own_world["waiting"])
    assert (first["cancelled"], second["alreadyAsked"]) == (True, True)
    late = own_world.run("runs", "cancel", own_world["hello"])
    assert late.exit_code == 4
    assert "[run_finished]" in late.stderr


def test_a_signal_with_an_id_counts_once(own_world: World) -> None:
    """The same --id again changes nothing; JSON may come from stdin."""
    send = ["runs", "signal", own_world["waiting"], "approve"]
    assert own_world.json(*send, "17", "--id", "one") == {
        "id": own_world["waiting"],
        "signal": "approve",
        "accepted": True,
        "duplicate": False,
    }
    assert own_world.json(*send, "17", "--id", "one")["duplicate"]
    result = own_world.run(*send, "-", input='{"deep": [1, 2]}')
    assert (result.exit_code, own_world.json("runs", "show", own_world["waiting"])["unread"]) == (0, 2)


def test_a_signal_that_is_no_json_is_refused(world: World) -> None:
    """Bad JSON is a usage error (2) that shows how to quote text; nothing is sent."""
    result = world.run("runs", "signal", world["waiting"], "approve", "yes")
    assert result.exit_code == 2
    assert "[bad_json]" in result.stderr
    assert world.json("runs", "show", world["waiting"])["unread"] == 0


def test_requeue_reopens_what_ended_badly(own_world: World) -> None:
    """Dead, failed and blocked runs are active again; a completed one is refused (4), a healthy one left alone."""
    for name in ("dead", "broken", "blocked"):
        answer = own_world.json("runs", "requeue", own_world[name])
        assert (answer["requeued"], answer["status"], answer["activity"]) == (True, "active", "queued")
    assert own_world.run("runs", "requeue", own_world["hello"]).exit_code == 4
    assert own_world.json("runs", "requeue", own_world["waiting"])["requeued"] is False


# ------------------------------------------------------------------ the store


def test_a_missing_store_is_told_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path is a sentence (3) that names the stores nearby, and leaves no file behind."""
    monkeypatch.chdir(tmp_path)
    result = World("sqlite:///typo.db").run("runs", "list")
    assert result.exit_code == 3
    assert "[no_store]" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("url", "exit"), [("nosuch://nowhere", 1), ("memory://", 2)])
def test_an_impossible_store_is_told(url: str, exit: int) -> None:
    """A store that is not known, or that nobody else can see, is a sentence."""
    result = World(url).run("runs", "list")
    assert result.exit_code == exit
    assert result.stderr.startswith("error [")


def test_a_file_that_is_no_store_is_told(tmp_path: Path) -> None:
    """A file of another kind is a sentence with exit code 5, and is left as it is."""
    file = tmp_path / "letter.db"
    file.write_text("Dear Ann,\n" * 200)
    result = World(f"sqlite:///{file}").run("runs", "list")
    assert result.exit_code == 5
    assert "is not an SQLite database" in result.stderr
    assert file.read_text().startswith("Dear Ann")


@pytest.mark.parametrize(("url", "extra"), [("postgres", "embedded-postgres"), ("postgresql://nowhere/x", "postgres")])
def test_postgres_without_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, extra: str) -> None:
    """Where psycopg is not installed the sentence (5) says what to install."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".durable" / "postgres").mkdir(parents=True)
    for name in [name for name in sys.modules if name.startswith(("psycopg", "durable.store.postgres"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    result = World(url).run("runs", "list")
    assert result.exit_code == 5, result.output
    assert f"pip install 'durable[{extra}]'" in result.stderr


def test_a_private_postgres_is_not_made_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--store postgres` where `durable dev` made none is a sentence (3); looking makes nothing."""
    monkeypatch.chdir(tmp_path)
    result = World("postgres").run("runs", "list")
    assert result.exit_code == 3
    assert World("postgres").run("doctor").exit_code == 0
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ prune


def test_prune_deletes_what_is_finished_and_nothing_else(own_world: World) -> None:
    """Bounds are obeyed and ANDed with the workflow; active runs stay; the number is said."""
    world = own_world
    active = {run["id"] for run in world.json("runs", "list", "--status", "active")["runs"]}
    before = {run["id"] for run in world.json("runs", "list")["runs"]}
    assert world.json("runs", "prune", "--older-than", "1d", "--yes") == {"deleted": 0}
    assert world.json("runs", "prune", "--keep", "1000", "--yes") == {"deleted": 0}
    assert world.json("runs", "prune", "--keep", "0", "--workflow", "evil", "--yes") == {"deleted": 1}
    assert {run["id"] for run in world.json("runs", "list")["runs"]} == before - {world["evil"]}
    result = world.run("runs", "prune", "--older-than", "0s", "--yes")
    assert result.exit_code == 0
    assert result.stdout.endswith("finished runs deleted.\n")
    assert active <= {run["id"] for run in world.json("runs", "list")["runs"]}
    assert world.json("runs", "list", "--status", "dead")["runs"] == []
    assert world.run("runs", "show", world["evil"]).exit_code == 3


def test_prune_asks_first(own_world: World) -> None:
    """Without --yes it asks; any other answer deletes nothing and says so."""
    world = own_world
    before = world.json("runs", "list")
    refused = world.run("runs", "prune", "--keep", "0", input="n\n")
    assert refused.exit_code == 4
    assert "Nothing was deleted" in refused.output
    assert f"on {world.url} for good?" in refused.output
    assert world.json("runs", "list") == before
    assert world.run("runs", "prune", "--keep", "0", input="y\n").exit_code == 0
    assert world.json("runs", "list") != before


@pytest.mark.parametrize("arguments", [[], ["--older-than", "a month"], ["--keep", "-1"]])
def test_prune_wants_a_bound(world: World, arguments: list[str]) -> None:
    """Without a bound that can be understood it is a mistake of usage, and nothing is asked of the store."""
    assert world.run("runs", "prune", "--yes", *arguments).exit_code == 2
