"""Workspaces apart: whoever has one tenant's key learns nothing of another, and may not act there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from durable.server.route import Route
from durable.server.routes_table import ROUTES
from tests.server.world import ADMIN, Running, finished

BODIES: dict[str, dict[str, Any]] = {
    "/events": {"name": "x"},
    "/runs/{id}/signal": {"name": "x"},
    "/runs/{id}/retry-from-step": {"step": "x"},
    "/versions/status": {"functionId": "nobody-has-it"},
    "/approvals/{id}/decision": {"status": "approved"},
    "/e": {"name": "x"},
    "/e/bulk": {"events": [{"name": "x"}]},
    "/workflows/{app}/{name}/trigger": {"input": "x"},
    "/runs/cancel": {"runId": "RUN"},
    "/runs/get": {"runId": "RUN"},
}


@pytest.fixture
def other(service: Running, rival: str) -> Iterator[httpx2.Client]:
    with service.client(rival) as found:
        yield found


ASKED = [route for route in ROUTES if route.method != "WEBSOCKET" and route.auth not in ("node", "token")]
"""The door of runners and that of other engines have tests of their own."""


def filled(route: Route, run_id: str, app: str) -> str:
    return (
        route.path.replace("{id}", run_id).replace("{app}", app).replace("{name}", "hello").replace("{key}", "0" * 16)
    )


def test_runs_go_from_start_to_end_in_their_workspace(client: httpx2.Client) -> None:
    """E6: a key starts its app's workflow, sees it through to the end, and the run says whose it is."""
    run_id = client.post("/workflows/shop/hello/trigger", json={"input": "ann"}).raise_for_status().json()["runId"]
    run = finished(client, run_id)
    assert (run["status"], run["result"], run["app"], run["environment"]) == ("succeeded", "hello ann", "shop", "dev")


@pytest.mark.parametrize(
    "route",
    [route for route in ROUTES if "{id}" in route.path and route.auth == "key" and route.method != "PUT"],
    ids=lambda r: r.method + r.path,
)
def test_a43_ids_of_others(client: httpx2.Client, other: httpx2.Client, route: Route) -> None:
    """A43: on every route with an id, another tenant's is told of in the very words of one that nobody has."""
    theirs = client.post("/workflows/shop/waits/trigger", json={}).json()["runId"]
    nobodys = theirs[:-4] + "0000"
    seen = [
        other.request(
            route.method,
            filled(route, run_id, "rival"),
            json=BODIES.get(route.path, {}) if route.method == "POST" else None,
        )
        for run_id in (theirs, nobodys)
    ]
    assert [answer.status_code for answer in seen] == [404, 404]
    assert seen[0].text.replace(theirs, "ID") == seen[1].text.replace(nobodys, "ID")
    assert seen[0].headers.get("content-type") == "application/json"
    assert client.get(f"/runs/{theirs}").json()["status"] in ("running", "waiting")


def test_a43_lists_and_counts_are_ones_own(client: httpx2.Client, other: httpx2.Client) -> None:
    """A43: lists, counts, workflows and apps of one tenant hold nothing of another's."""
    client.post("/workflows/shop/hello/trigger", json={"input": "secretly", "dedupeId": "only-mine"}).raise_for_status()
    assert other.get("/runs").json() == []
    assert other.get("/runs", params={"q": "only-mine"}).json() == []
    assert other.get("/runs/stats").json()["total"] == 0
    assert {one["app"] for one in other.get("/workflows").json()} == {"rival"}
    assert [one["id"] for one in other.get("/apps").json()] == ["rival.dev"]
    assert other.get("/runs", params={"app": "shop"}).status_code == 403
    assert other.get("/runs/stream", params={"app": "shop"}).status_code == 403


@pytest.mark.parametrize("app", ["shop", "shop.dev", "default", "nobody", "rival.prod", "..", "%2e%2e"])
def test_a10_another_app_in_the_path(other: httpx2.Client, app: str) -> None:
    """A10: an app in the path that is not the key's is as unknown as one that nobody has: 404."""
    assert other.post(f"/workflows/{app}/hello/trigger", json={"input": "x"}).status_code == 404
    assert other.get("/runs").json() == []


def test_another_environment_is_another_workspace(service: Running, key: str) -> None:
    """E6: the same app's prod has another key, and other runs."""
    prod = service.make_app("shop", "prod")
    assert prod != key
    with service.client(prod) as live, service.client(key) as dev:
        run_id = live.post("/workflows/shop/hello/trigger", json={"input": "x"}).json()["runId"]
        assert live.get(f"/runs/{run_id}").json()["environment"] == "prod"
        assert dev.get(f"/runs/{run_id}").status_code == 404


@pytest.mark.parametrize("route", ASKED, ids=lambda route: route.method + route.path)
def test_a42_a_reader_may_only_read(service: Running, key: str, route: Route) -> None:
    """A42: over every route of the table: a read-only key gets what needs no more than reading, and 401 or 403 on the rest
    before anything of the request is looked at."""
    with service.client(ADMIN) as admin, service.client(key) as full:
        reader = admin.post("/workspaces/shop.dev/readers").raise_for_status().json()
        run_id = full.post("/workflows/shop/waits/trigger", json={}).json()["runId"]
        event_id = full.post("/events", json={"name": "seen"}).json()["eventId"]
        full.put("/schedules/read", json={"workflow": "hello", "input": "x", "everySeconds": 3600}).raise_for_status()
        ids = {"events": event_id, "schedules": "read"}
        path = filled(route, ids.get(route.path.split("/")[1], run_id), "shop")
        body = {name: run_id if value == "RUN" else value for name, value in BODIES.get(route.path, {}).items()}
        with service.client(reader["key"]) as looking:
            if route.answer == "stream":
                with looking.stream(route.method, path) as stream:
                    status = stream.status_code
            else:
                status = looking.request(route.method, path, json=body if route.body is not None else None).status_code
        read = {404} if route.path == "/versions/status" else {route.status}
        expected = {"read": read, "full": {403}, "admin": {401}}[route.role]
        assert status in expected
        assert full.get(f"/runs/{run_id}").json()["status"] in ("running", "waiting")
        assert admin.delete(f"/workspaces/shop.dev/keys/{reader['id']}").status_code == 204


@pytest.mark.parametrize(
    "route", [route for route in ASKED if route.auth != "none"], ids=lambda route: route.method + route.path
)
def test_nothing_without_a_credential(service: Running, route: Route) -> None:
    """In production every route but those of the process asks for a credential: 401 without one."""
    with service.client() as stranger:
        answer = stranger.request(route.method, filled(route, "x", "shop"), json={} if route.body is not None else None)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_provisioning_is_idempotent(service: Running) -> None:
    """E6: the same name and environment give the same id and key, however often and at once; another environment another."""
    from concurrent.futures import ThreadPoolExecutor

    def make(_: int) -> tuple[str, str]:
        with service.client(ADMIN) as admin:
            made = admin.post("/api/apps", json={"name": "again"}).raise_for_status().json()
            assert made["id"] == made["appId"]
            return made["id"], made["signingKey"]

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(make, range(16)))) == 1
    with service.client(ADMIN) as admin:
        assert admin.post("/api/apps", json={"name": "again"}).json()["created"] is False
        acc = admin.post("/api/apps", json={"name": "again", "environment": "acc"}).json()
        assert (acc["id"], acc["created"]) == ("again.acc", True)


@pytest.mark.parametrize(
    "name", ["", "default", "a b", "../x", "a:b", "\u0455hop", "x" * 65, "a\0b", "-x", "a/b", "*", "@rival"]
)
def test_a30_names_that_are_none(service: Running, name: str) -> None:
    """A30: wildcards, another tenant's marks, paths and look-alikes are no app's name: 400."""
    with service.client(ADMIN) as admin:
        assert admin.post("/api/apps", json={"name": name}).status_code == 400


def test_the_last_key_stays(service: Running) -> None:
    """A workspace is never left without a key; an ended reader is out at once."""
    full = service.make_app("lasting")
    with service.client(ADMIN) as admin:
        [view] = [one for one in admin.get("/workspaces").json() if one["id"] == "lasting.dev"]
        assert admin.delete(f"/workspaces/lasting.dev/keys/{view['keys'][0]['id']}").status_code == 409
        reader = admin.post("/workspaces/lasting.dev/readers").json()
        with service.client(reader["key"]) as client:
            assert client.get("/runs").status_code == 200
            assert admin.delete(f"/workspaces/lasting.dev/keys/{reader['id']}").status_code == 204
            assert client.get("/runs").status_code == 401
        assert admin.delete(f"/workspaces/lasting.dev/keys/{'0' * 16}").status_code == 404
        assert admin.post("/workspaces/nobody.dev/rotate", json={}).status_code == 404
    with service.client(full) as client:
        assert client.get("/runs").status_code == 200


def test_no_list_has_a_secret(service: Running, key: str, client: httpx2.Client) -> None:
    """A45: keys are told once; no list has one, nor the input, output or error text of a run."""
    client.post("/workflows/shop/broken/trigger", json={"input": "hunter2", "tags": ["t"]}).raise_for_status()
    with service.client(ADMIN) as admin:
        assert key not in admin.get("/workspaces").text
    assert "hunter2" not in client.get("/runs").text
    for path in ("/apps", "/workflows", "/runs/stats"):
        assert key not in client.get(path).text


def test_a45_secrets_are_not_in_the_log(
    service: Running, key: str, client: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """A45: nothing of a request's headers, body or query is logged, however it ends."""
    import logging

    with caplog.at_level(logging.DEBUG):
        client.post("/workflows/shop/hello/trigger", json={"input": "hunter2"})
        client.post(
            "/workflows/shop/hello/trigger", content=b'{"input":"hunter2"', headers={"content-type": "application/json"}
        )
        client.get("/runs", params={"q": "hunter2"})
        client.get("/runs", headers={"authorization": "Bearer dk_shop.dev_hunter2"})
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert not [line for line in ours if "hunter2" in line or key in line]
