"""Development on this machine: no key, a workspace for each app's name; and nobody else gets in by that door."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from tests.server.world import ADMIN, Running, finished, raw, running, status_of


@pytest.fixture(scope="module")
def dev() -> Iterator[Running]:
    with running(production=False, admin_token=None, local_app="orders") as found:
        yield found


@pytest.fixture
def here(dev: Running) -> Iterator[httpx2.Client]:
    with dev.client() as client:
        yield client


def test_the_app_in_this_process(here: httpx2.Client) -> None:
    """Without a key the app given on the command line is asked by its name, by `default`, or by none at all."""
    for app in ("orders", "default"):
        run_id = here.post(f"/workflows/{app}/hello/trigger", json={"input": app}).raise_for_status().json()["runId"]
        run = finished(here, run_id)
        assert (run["result"], run["app"], run["environment"]) == (f"hello {app}", "orders", "dev")
    assert len(here.get("/runs").json()) == len(here.get("/runs", params={"app": "orders"}).json()) >= 2
    event = here.post("/events", json={"name": "order.placed", "data": {"id": "o", "customer": "c"}}).json()
    assert {one["workflow"] for one in event["triggered"]} == {"on_order", "once_an_hour"}


def test_a_workspace_for_each_app(here: httpx2.Client, dev: Running) -> None:
    """Without a key, what names an app is about `<app>.dev`; its runs are found by id, and in no other app's list."""
    dev_key = here.post("/api/apps", json={"name": "shop"}).raise_for_status().json()
    assert dev_key["id"] == "shop.dev"
    event = (
        here.post("/events", json={"name": "order.placed", "app": "shop", "data": {"id": "o"}})
        .raise_for_status()
        .json()
    )
    assert event["triggered"] == []  # shop has no functions here
    assert [one["id"] for one in here.get("/events", params={"app": "shop"}).json()] == [event["eventId"]]
    assert event["eventId"] not in here.get("/events").text
    assert {one["id"] for one in here.get("/apps").json()} >= {"default", "shop.dev"}


def test_a_key_is_still_a_key(here: httpx2.Client, dev: Running) -> None:
    """A request with a key is about its workspace alone, here too; a wrong key is not taken for none."""
    key = here.post("/api/apps", json={"name": "keyed"}).json()["signingKey"]
    run_id = here.post("/workflows/orders/hello/trigger", json={"input": "x"}).json()["runId"]
    with dev.client(key) as keyed:
        assert keyed.get("/runs").json() == []
        assert keyed.get(f"/runs/{run_id}").status_code == 404
        assert keyed.get("/runs", params={"app": "orders"}).status_code == 403
    with dev.client("dk_keyed.dev_00") as wrong:
        assert wrong.get("/runs").status_code == 401


def test_other_environments_need_their_keys(here: httpx2.Client, dev: Running) -> None:
    """What is not development is not open, whoever asks: its runs are not found without its key."""
    key = dev.make_app("live", "prod") if dev.settings.admin_token else None
    made = here.post("/api/apps", json={"name": "live", "environment": "prod"}).raise_for_status().json()
    assert key is None
    with dev.client(made["signingKey"]) as live:
        event = live.post("/events", json={"name": "x"}).raise_for_status().json()
    assert here.get(f"/events/{event['eventId']}", params={"app": "live.prod"}).status_code == 404
    assert "live.prod" not in here.get("/apps").text


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"host": "evil.example"},
        {"host": "evil.example:3030"},
        {"host": "localhost.evil.example"},
        {"origin": "http://localhost.evil.example"},
        {"x-durable-signature": "x"},
        {"authorization": "Bearer"},
    ],
)
def test_pages_of_elsewhere(here: httpx2.Client, headers: dict[str, str]) -> None:
    """A39, A25: a page a browser here has open, or a name bound to this address, is not this machine's user: 401."""
    assert here.get("/runs", headers=headers).status_code == 401
    assert here.post("/workflows/orders/hello/trigger", json={"input": "x"}, headers=headers).status_code == 401


def test_what_a_form_can_send(here: httpx2.Client) -> None:
    """A39: a cross-site form has no JSON to send, and no-cors fetches have an Origin: 415 or 401, nothing started."""
    before = len(here.get("/runs", params={"limit": "500"}).json())
    path = "/workflows/orders/hello/trigger"
    assert here.post(path, content=b'{"input":"x"}', headers={"content-type": "text/plain"}).status_code == 415
    assert here.post(path, content=b'{"input":"x"}', headers={"origin": "https://evil.example"}).status_code == 401
    assert len(here.get("/runs", params={"limit": "500"}).json()) == before


@pytest.mark.parametrize(
    "headers", [{"origin": "http://localhost:5173"}, {"origin": "http://127.0.0.1:3030"}, {"host": "localhost"}]
)
def test_pages_of_this_machine(here: httpx2.Client, headers: dict[str, str]) -> None:
    """A page that is served from this machine is the user's own."""
    assert here.get("/runs", headers=headers).status_code == 200


def test_two_hosts(dev: Running) -> None:
    """Two Host headers are no host."""
    assert status_of(
        raw(dev.port, b"GET /runs HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    ) in (400, 401)


@pytest.mark.parametrize("changed", [{"production": True}, {"env": "prod"}, {"host": "0.0.0.0"}])
def test_not_beyond_development(changed: dict[str, object]) -> None:
    """In production, in another environment, or listening to more than this machine, a key is asked for."""
    with running(**({"production": False, "admin_token": None} | changed)) as service:
        with service.client() as client:
            assert client.get("/runs").status_code == 401
            assert client.post("/api/apps", json={"name": "x"}).status_code == 401
            assert client.get("/healthz").status_code == 200


def test_an_admin_token_is_asked_for_when_there_is_one() -> None:
    """With a token set, making workspaces asks for it in development, too."""
    with running(production=False) as service:
        with service.client() as client, service.client(ADMIN) as admin:
            assert client.post("/api/apps", json={"name": "x"}).status_code == 401
            assert admin.post("/api/apps", json={"name": "x"}).status_code == 200
            assert client.get("/runs").status_code == 200
