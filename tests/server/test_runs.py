"""Runs over HTTP: one of them, lists with filters and pages, counts, cancelling."""

from __future__ import annotations

import itertools
from typing import Any

import httpx2
import pytest

from tests.server.world import Running, finished, until

_numbers = itertools.count()


def start(client: httpx2.Client, name: str, **body: Any) -> str:
    return str(client.post(f"/workflows/shop/{name}/trigger", json=body).raise_for_status().json()["runId"])


def test_a_run_as_the_wire_has_it(client: httpx2.Client) -> None:
    """The fields of wire.md section 6, of a run that succeeded and of one that failed."""
    good, bad = (
        finished(client, start(client, "hello", input="ann", tags=["a", "b"])),
        finished(client, start(client, "broken", input="x")),
    )
    required = {
        "id",
        "workflowName",
        "app",
        "status",
        "errorCount",
        "attempt",
        "triggerKind",
        "stepCount",
        "currentStepIndex",
        "startedAt",
    }
    assert required <= set(good)
    assert required <= set(bad)
    assert (good["status"], good["stepCount"], good["errorCount"], good["tags"]) == ("succeeded", 1, 0, ["a", "b"])
    assert (good["input"], good["result"], good["triggerKind"], good["currentStepIndex"]) == (
        "ann",
        "hello ann",
        "manual",
        0,
    )
    assert (bad["status"], bad["errorCount"], bad["error"]["code"]) == ("failed", 2, "step_failed")
    assert bad["durationMs"] > 0
    assert "result" not in bad
    steps = client.get(f"/runs/{bad['id']}/steps").json()
    assert [(one["name"], one["status"], one["attempt"], one["error"]["message"]) for one in steps] == [
        ("explode", "failed", 2, "cannot bear x")
    ]


def test_the_same_dedupe_id(client: httpx2.Client) -> None:
    """The same dedupeId and input find the run there is; another input is 409."""
    key = f"dedupe-{next(_numbers)}"
    first = start(client, "hello", input="a", dedupeId=key)
    assert start(client, "hello", input="a", dedupeId=key) == first
    answer = client.post("/workflows/shop/hello/trigger", json={"input": "b", "dedupeId": key})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/workflows/shop/nothing/trigger", {}, 404, "unknown_workflow"),
        ("/workflows/shop/hello/trigger", {"input": 7}, 400, "payload_type"),
        ("/workflows/shop/hello/trigger", {"input": "x", "version": "9"}, 404, "unknown_version"),
        ("/workflows/shop/hello/trigger", {"input": "x", "tags": "a"}, 400, "bad_body"),
        ("/workflows/shop/hello/trigger", {"input": "x", "tags": ["a"] * 51}, 400, "bad_body"),
        ("/workflows/shop/hello/trigger", {"input": "x", "dedupeId": ""}, 400, "bad_body"),
        ("/runs/none/cancel", {}, 404, "run_not_found"),
    ],
)
def test_what_cannot_be_is_named(
    client: httpx2.Client, path: str, body: dict[str, Any], status: int, code: str
) -> None:
    """What is asked for wrongly is refused with its own code."""
    answer = client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_pages_have_each_run_once(client: httpx2.Client) -> None:
    """Every run once, newest first and oldest first, however small the pages and while more are started."""
    tag = f"paged-{next(_numbers)}"
    ids = [start(client, "hello", input="x", tags=[tag]) for _ in range(9)]
    for direction, wanted in (("desc", ids[::-1]), ("asc", ids)):
        seen: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            answer = client.get("/runs", params={"tag": tag, "limit": "2", "dir": direction} | cursor)
            seen += [run["id"] for run in answer.json()]
            if "x-next-cursor" not in answer.headers:
                break
            cursor = {"cursor": answer.headers["x-next-cursor"]}
            start(client, "hello", input="y")
        assert seen == wanted


def test_filters(client: httpx2.Client) -> None:
    """By status in the wire's words, by workflow, by time, by text; ANDed, over pages that hold more than that."""
    tag = f"filtered-{next(_numbers)}"
    waiting = start(client, "waits", tags=[tag])
    done = [start(client, "hello", input="x", tags=[tag]) for _ in range(3)]
    failed = start(client, "broken", input="x", tags=[tag])
    for run_id in (*done, failed):
        finished(client, run_id)
    until(lambda: client.get(f"/runs/{waiting}").json()["status"] == "waiting")

    def ids(**params: str) -> set[str]:
        return {run["id"] for run in client.get("/runs", params={"tag": tag} | params).raise_for_status().json()}

    assert ids(status="succeeded") == set(done)
    assert ids(status="failed") == {failed}
    assert ids(status="waiting") == {waiting}
    assert ids(status="needs_attention") == ids(status="paused") == set()
    assert ids(workflow="hello", status="failed") == set()
    assert ids(since="1h") == {waiting, failed, *done}
    assert ids(since="2100-01-01T00:00:00Z") == set()
    assert ids(since="4102444800000") == set()
    assert ids(q=failed[-12:]) == {failed}
    assert ids(q="BROKEN") == {failed}
    assert ids(status="succeeded", limit="1") < set(done)


def test_a_list_is_bounded_in_what_it_reads(
    client: httpx2.Client, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts in a list are left out, and said to be, where the journals would be too long to read."""
    from durable.server.routes import runs

    run_id = start(client, "many", input=10)
    finished(client, run_id)
    monkeypatch.setattr(runs, "COUNTED", 5)
    [row] = client.get("/runs", params={"q": run_id}).json()
    assert row["countsOmitted"] is True
    assert client.get(f"/runs/{run_id}").json()["stepCount"] == 10


def test_counts(service: Running) -> None:
    """Stats and the series count what there is, once."""
    with service.client(service.make_app("counted")) as client:
        for name in ("hello", "hello", "broken"):
            run_id = client.post(f"/workflows/counted/{name}/trigger", json={"input": "x"}).json()["runId"]
            finished(client, run_id)
        stats = client.get("/runs/stats").json()
        assert (stats["total"], stats["byStatus"]) == (3, {"succeeded": 2, "failed": 1})
        assert 0.3 < stats["failureRate"] < 0.4
        assert 0 < stats["p50Ms"] <= stats["p95Ms"]
        series = client.get("/runs/timeseries", params={"since": "1h", "buckets": "6"}).json()
        assert len(series) == 6
        assert [sum(one[name] for one in series) for name in ("started", "succeeded", "failed")] == [3, 2, 1]


def test_cancelling(client: httpx2.Client) -> None:
    """A waiting run ends cancelled; asked again nothing changes; one that ended by itself is refused."""
    run_id = start(client, "waits")
    assert client.post(f"/runs/{run_id}/cancel", json={"reason": "not needed"}).json() == {"ok": True, "changed": True}
    assert finished(client, run_id)["status"] == "cancelled"
    again = client.post(f"/runs/{run_id}/cancel")
    assert (again.status_code, again.json()) == (200, {"ok": True, "changed": False})
    ended = start(client, "hello", input="x")
    finished(client, ended)
    late = client.post(f"/runs/{ended}/cancel")
    assert (late.status_code, late.json()["error"]["code"]) == (409, "run_finished")


def test_workflows_are_listed(client: httpx2.Client) -> None:
    """What can be started, with what starts it by itself."""
    found = {one["name"]: one for one in client.get("/workflows").json()}
    assert found["on_order"]["triggers"] == [{"event": "order.placed"}]
    assert found["hello"]["app"] == "shop"
