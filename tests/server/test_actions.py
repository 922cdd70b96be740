"""What an operator does over HTTP (E9): each verb once from end to end; the engine's own tests say what they mean in depth."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from durable import Context, Durable
from durable.protocol.signature import body_signature
from durable.server.settings import ServerSettings
from tests.server.world import ADMIN, Running, finished, until, workflows

_numbers = itertools.count()


def start(client: httpx2.Client, name: str, **body: Any) -> str:
    return str(client.post(f"/workflows/shop/{name}/trigger", json=body).raise_for_status().json()["runId"])


def status(client: httpx2.Client, run_id: str) -> str:
    return str(client.get(f"/runs/{run_id}").json()["status"])


def test_pause_resume_signal(client: httpx2.Client) -> None:
    """A paused run says who paused it and takes its signal only when it goes on; asking twice changes nothing."""
    run_id = start(client, "waits")
    until(lambda: status(client, run_id) == "waiting")
    pause = {"by": "ann", "reason": "a look"}
    assert client.post(f"/runs/{run_id}/pause", json=pause).json() == {"ok": True, "changed": True}
    until(lambda: status(client, run_id) == "paused")
    assert client.get(f"/runs/{run_id}").json()["pausedBy"] == "ann"
    assert client.post(f"/runs/{run_id}/signal", json={"name": "go", "payload": {"a": 1}, "id": "once"}).json()[
        "changed"
    ]
    assert not client.post(f"/runs/{run_id}/signal", json={"name": "go", "payload": 2, "id": "once"}).json()["changed"]
    assert status(client, run_id) == "paused"
    assert client.post(f"/runs/{run_id}/resume", json={}).json()["changed"]
    assert finished(client, run_id)["result"] == {"a": 1}


def test_replay_and_its_key(client: httpx2.Client) -> None:
    """A replay is a new run that names the old one, with another input if one is given; the same key finds it again."""
    old = start(client, "hello", input="ann")
    finished(client, old)
    body = {"input": "bob", "idempotencyKey": f"again-{next(_numbers)}"}
    new = client.post(f"/runs/{old}/replay", json=body).raise_for_status().json()["runId"]
    assert client.post(f"/runs/{old}/replay", json=body).json()["runId"] == new
    run = finished(client, new)
    assert (run["result"], run["replayOf"], run["triggerKind"]) == ("hello bob", old, "replay")


def test_from_a_step_and_forked(client: httpx2.Client) -> None:
    """From a step on what came before is kept; a fork goes on behind a step that returned something else."""
    old = start(client, "many", input=3)
    finished(client, old)
    again = client.post(f"/runs/{old}/retry-from-step", json={"step": "greet:2"}).raise_for_status().json()["runId"]
    run = finished(client, again)
    assert (run["status"], run["fromStep"], run["replayOf"]) == ("succeeded", "greet:2", old)
    forked = (
        client.post(f"/runs/{old}/fork", json={"step": "greet:1", "result": "other"}).raise_for_status().json()["runId"]
    )
    finished(client, forked)
    steps = {step["key"]: step["output"] for step in client.get(f"/runs/{forked}/steps").json()}
    assert steps == {"greet": "hello 0", "greet:1": "other", "greet:2": "hello 2"}


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("retry-from-step", {"step": "nobody"}, {"fork_refused", "bad_definition"}),
        ("fork", {}, {"bad_definition"}),
        ("fork", {"step": "greet"}, {"bad_definition"}),
        ("resume", {"timers": "stop"}, {"bad_body"}),
    ],
)
def test_what_cannot_be(client: httpx2.Client, path: str, body: dict[str, Any], code: set[str]) -> None:
    """A verb that makes no sense is refused with its code, and nothing was started."""
    run_id = start(client, "hello", input="x")
    finished(client, run_id)
    answer = client.post(f"/runs/{run_id}/{path}", json=body)
    assert answer.status_code in (400, 409)
    assert answer.json()["error"]["code"] in code


def test_an_active_run_is_not_run_again(client: httpx2.Client) -> None:
    """409 while it goes on."""
    run_id = start(client, "waits")
    answer = client.post(f"/runs/{run_id}/replay", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "run_active")


def test_many_at_once(client: httpx2.Client) -> None:
    """A dry run counts; the real one makes one new run of each, and again with the same key none."""
    tag = f"bulk-{next(_numbers)}"
    for _ in range(3):
        finished(client, start(client, "hello", input="x", tags=[tag]))
    wish = {"tag": tag, "status": "succeeded", "key": tag}
    assert client.post("/runs/bulk-replay", json=wish | {"dryRun": True}).json()["matched"] == 3
    done = client.post("/runs/bulk-replay", json=wish | {"limit": 3}).raise_for_status().json()
    assert [one["outcome"] for one in done["items"]] == ["done"] * 3


def test_failures_of_an_app(service: Running) -> None:
    """`/failures/search`, `/failures/retry` and `/runs/rerun`, signed as apps in any language do."""
    key = service.make_app("failing")
    with service.client(key) as client, service.client() as plain:
        run_id = client.post("/workflows/failing/broken/trigger", json={"input": "x"}).json()["runId"]
        finished(client, run_id)

        def send(path: str, body: Any) -> Any:
            data = json.dumps(body).encode()
            headers = {"x-durable-app": "failing.dev", "x-durable-signature": body_signature(key, data)}
            return plain.post(path, content=data, headers=headers).raise_for_status().json()

        [failure] = send("/failures/search", {"limit": 10})["failures"]
        assert (failure["runId"], failure["functionId"], failure["status"]) == (run_id, "broken", "failed")
        again = send("/runs/rerun", {"runId": run_id, "idempotencyKey": "k"})["runId"]
        assert send("/runs/rerun", {"runId": run_id, "idempotencyKey": "k"})["runId"] == again
        finished(client, again)
        assert send("/failures/retry", {"deliveryId": run_id})["ok"] is True
        until(lambda: client.get(f"/runs/{run_id}").json()["errorCount"] == 4)


@pytest.fixture(scope="module")
def hooked() -> Iterator[Running]:
    app = Durable("memory://", webhook_key="a secret of the engines", public_url="http://127.0.0.1")
    workflows(app)

    @app.workflow
    async def hooks(ctx: Context) -> Any:
        hook = await ctx.webhook("paid")
        ctx.log("posted to", url=hook.url)
        return await hook.received

    with Running(app, ServerSettings(host="127.0.0.1", port=0, production=True, admin_token=ADMIN)) as found:
        yield found


def test_n22_a_wait_with_a_url(hooked: Running) -> None:
    """N22: whoever knows the address posts to it, without a key and in any content type; the first post counts, and the run
    goes on with it."""
    key = hooked.make_app("shop")
    engine = hooked.app.engine
    run_id = hooked.do(engine.start_run("hooks")).id

    def lines() -> list[Any]:
        rows = hooked.do(engine.deps.store.page(run_id, 0, 100))
        return [json.loads(row.payload) for row in rows if row.kind == "log" and row.payload]

    until(lambda: lines())
    path = lines()[0]["fields"]["url"].removeprefix("http://127.0.0.1")
    with hooked.client() as stranger:
        first = stranger.post(path, content=b'{"paid": 7}', headers={"content-type": "text/plain"})
        assert (first.status_code, first.json()) == (200, {"ok": True, "settled": True})
        assert hooked.do(engine.result(run_id, 20)) == {"paid": 7}
        assert stranger.post(path[:-1] + "0", content=b"{}").status_code in (404, 409)
    assert key not in path


@pytest.mark.parametrize("token", ["x", "..", "a" * 2_000, "%00", "a.b.c"])
def test_addresses_that_are_none(hooked: Running, token: str) -> None:
    """N22: an address nobody has been given is 404, whatever stands in it."""
    with hooked.client() as stranger:
        assert stranger.post(f"/hooks/{token}", content=b"{}").status_code in (400, 404)
