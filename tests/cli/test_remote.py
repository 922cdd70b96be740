"""`durable events`, `durable schedules`, `durable flow`: the command line on a real service."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from durable import Context, Durable
from durable.cli.main import cli
from durable.core.flow import Concurrency
from tests.server.world import Running, running, until

Ask = Callable[..., Result]


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(refused_burst=100_000) as found:
        yield found


@pytest.fixture(scope="module")
def ask(service: Running) -> Ask:
    environment = {"DURABLE_URL": service.url, "DURABLE_KEY": service.make_app("shop")}

    def run(*args: str, input: str | None = None, **env: str) -> Result:
        return CliRunner(env=environment | env).invoke(cli, list(args), input=input, prog_name="durable")

    return run


def answer(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_event_is_sent_and_its_runs_are_named(ask: Ask) -> None:
    """`events send` says what the event has started; the same id again, that nothing new has happened."""
    order = '{"id": "o-1", "customer": "ann"}'
    first = ask("events", "send", "order.placed", order, "--id", "o-1", "--tag", "cli")
    assert first.exit_code == 0, first.output
    assert "  on_order: started, run " in first.stdout
    again = ask("events", "send", "order.placed", "-", "--id", "o-1", input=order)
    assert "nothing new has happened" in again.stdout
    found = answer(ask("events", "send", "order.placed", order, "--id", "o-1", "--json"))
    assert found["deduped"] is True
    assert {one["workflow"] for one in found["triggered"]} == {"on_order", "once_an_hour"}
    assert "Nothing waits for it yet." in ask("events", "send", "nobody.cares").stdout


def test_a_schedules_life(ask: Ask) -> None:
    """ensure, list, pause, resume, trigger and remove, as text and as JSON."""
    assert "No schedules" in ask("schedules", "list").stdout
    made = ask("schedules", "ensure", "nightly", "hello", '"ann"', "--cron", "0 3 * * *", "--timezone", "Europe/Vienna")
    assert made.exit_code == 0, made.output
    assert "nightly starts hello 0 3 * * * Europe/Vienna, next in " in made.stdout
    assert answer(ask("schedules", "ensure", "poll", "hello", '"x"', "--every", "90s", "--json"))["everySeconds"] == 90
    assert answer(ask("schedules", "ensure", "once", "hello", '"x"', "--at", "2100-01-01T00:00:00", "--json"))[
        "at"
    ] == ("2100-01-01T00:00:00Z")
    listed = ask("schedules", "list").stdout
    assert "every 1 min 30 s" in listed
    assert "durable schedules resume nightly" in ask("schedules", "pause", "nightly").stdout
    found = {one["id"]: one for one in answer(ask("schedules", "list", "--json"))["schedules"]}
    assert (found["nightly"]["paused"], found["nightly"]["nextAt"]) == (True, None)
    assert answer(ask("schedules", "resume", "nightly", "--json"))["paused"] is False
    assert answer(ask("schedules", "trigger", "nightly", "--json"))["runId"]
    for one in ("nightly", "poll", "once"):
        assert "Its runs stay." in ask("schedules", "remove", one).stdout
    gone = ask("schedules", "remove", "nightly")
    assert gone.exit_code == 3
    assert "error [schedule_not_found]" in gone.stderr


@pytest.mark.parametrize(
    "arguments",
    [["schedules", "ensure", "x", "hello"], ["schedules", "ensure", "x", "hello", "--cron", "never"]],
)
def test_a_schedule_that_is_none(ask: Ask, arguments: list[str]) -> None:
    """A schedule without a time, or with one that is none, is a usage error."""
    assert ask(*arguments).exit_code == 2


def test_limits_use_and_queue(ask: Ask, service: Running) -> None:
    """`durable flow` shows a limit, how much of it is used, and how many runs wait behind it."""
    holder, gate = Durable("memory://"), threading.Event()

    async def hold() -> None:
        while not gate.is_set():
            await asyncio.sleep(0.01)

    @holder.workflow(concurrency=Concurrency(limit=2))
    async def narrow(ctx: Context) -> None:
        await ctx.step(hold)

    key = service.make_app("narrow")
    service.call(lambda: service.app.engine.deps.catalog.put("narrow.dev", holder.registry))
    assert "No limit has a run now." in ask("flow", DURABLE_KEY=key).stdout
    with service.client(key) as client:
        for _ in range(5):
            client.post("/workflows/narrow/narrow/trigger", json={}).raise_for_status()
        until(lambda: client.get("/flow-state").json()[0]["used"] == 2, "two hold the limit")
    [limit] = answer(ask("flow", "--workflow", "narrow", "--json", DURABLE_KEY=key))["limits"]
    assert (limit["workflow"], limit["limit"], limit["used"], limit["queued"]) == ("narrow", 2, 2, 3)
    shown = ask("flow", DURABLE_KEY=key).stdout
    assert "2/2" in shown
    assert "QUEUED" in shown
    assert answer(ask("flow", "--workflow", "other", "--json", DURABLE_KEY=key)) == {"limits": []}
    gate.set()


def test_what_a_service_refuses(ask: Ask) -> None:
    """A wrong key is refused (4); nobody at the address is 5; a URL of something else is a usage error (2)."""
    wrong = ask("flow", DURABLE_KEY="dk_shop.dev_wrong")
    assert (wrong.exit_code, "error [unauthorized]" in wrong.stderr) == (4, True)
    assert ask("flow", "--url", "redis://localhost").exit_code == 2


@pytest.mark.parametrize("command", [["events", "send"], ["flow"], *(["schedules", name] for name in
    ("list", "ensure", "pause", "resume", "trigger", "remove"))])  # fmt: skip
def test_each_explains_itself(ask: Ask, command: list[str]) -> None:
    """`--help` has examples everywhere."""
    told = ask(*command, "--help")
    assert told.exit_code == 0
    assert "Examples:" in told.output


# ------------------------------------------------------------------ watch


def test_watch_a_run_of_a_service(ask: Ask, service: Running) -> None:
    """`runs watch --url` tells a run to its end, line by line in a pipe, frames with --json, from a row on; and exits 0 if it
    succeeded, 1 if not, 3 if there is none."""
    with service.client(service.make_app("shop")) as client:
        good, bad = (
            client.post(f"/workflows/shop/{name}/trigger", json={"input": "x"}).raise_for_status().json()["runId"]
            for name in ("hello", "broken")
        )
    told = ask("runs", "watch", good, "--url", service.url)
    assert told.exit_code == 0, told.output
    assert "hello@1  log info: greeting who=x" in told.stdout
    assert "Ended: succeeded" in told.stdout
    assert 'output    "hello x"' in told.stdout
    failed = ask("runs", "watch", bad, "--url", service.url)
    assert failed.exit_code == 1
    assert "ValueError: " in failed.stdout.rpartition("Ended: failed")[2]
    rows = [json.loads(line) for line in ask("runs", "watch", good, "--url", service.url, "--json").stdout.splitlines()]
    assert [row["kind"] for row in rows] == ["run_status", "log", "step_status", "run_status"]
    later = ask("runs", "watch", good, "--url", service.url, "--json", "--from", str(rows[1]["seq"]))
    assert [json.loads(line) for line in later.stdout.splitlines()] == rows[1:]
    assert ask("runs", "watch", "no-such-run", "--url", service.url).exit_code == 3
