"""Apps that are asked for their functions: provisioned with a URL, or in development where the service is told one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx2
import pytest

from durable.core.errors import DefinitionError
from durable.protocol.signature import body_signature
from durable.server import discovery
from durable.server.settings import load_settings
from tests.server.world import ADMIN, Running, finished, running, until


class FieldApp:
    """An app over HTTP, from the wire page alone. It has one function; whoever asks without its key is told 401. With a
    name it is in development, and tells name and key to whoever discovers it."""

    def __init__(self, *, key: str | None = None, name: str | None = None) -> None:
        self.key = key
        self.name = name
        self.event = "cart.paid"
        self.asked: list[dict[str, str]] = []
        """The headers of every GET."""
        self.calls = 0
        self.manifest: Callable[[bytes], tuple[int, dict[str, str], bytes]] = self._signed
        app = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                app.asked.append(headers)
                stamp = headers.get("x-durable-timestamp", "")
                discovers = app.name is not None and headers.get("x-durable-discovery") == "true"
                knows = discovers or app._knows(headers, stamp.encode())
                if not knows or abs(time.time() * 1_000 - int(stamp or 0)) > 300_000:
                    self._say(401, {}, b"{}")
                    return
                said: dict[str, Any] = {"functions": app.functions(), "sdkVersion": "field 1"}
                if discovers:
                    said |= {"appId": f"{app.name}.dev", "appName": app.name, "signingKey": app.key}
                self._say(*app.manifest(json.dumps(said).encode()))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                app.calls += 1
                if not app._knows({name.lower(): value for name, value in self.headers.items()}, body):
                    self._say(401, {}, b"{}")
                else:
                    self._say(*app._signed(b'{"op": "done", "data": "done"}'))

            def _say(self, status: int, headers: dict[str, str], data: bytes) -> None:
                self.send_response(status)
                for name, value in ({"content-length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/durable"

    def functions(self) -> list[dict[str, Any]]:
        return [{"id": "pay", "trigger": {"event": self.event}, "enabled": True, "hasOnFailure": False, "priority": 0}]

    def _knows(self, headers: dict[str, str], body: bytes) -> bool:
        return self.key is None or headers.get("x-durable-signature") == body_signature(self.key, body)

    def _signed(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        return 200, {} if self.key is None else {"x-durable-signature": body_signature(self.key, body)}, body

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "DELAYS", (0.0, 0.05, 0.05, 0.1, 0.1, 0.2, 0.2, 0.5, 1.0, 2.0))
    monkeypatch.setattr(discovery, "LOOK_EVERY", 0.05)


def provision(service: Running, name: str, url: str) -> str:
    with service.client(ADMIN) as admin:
        made = admin.post("/api/apps", json={"name": name, "environment": "dev", "appUrl": url}).raise_for_status()
        return str(made.json()["signingKey"])


def starts(client: httpx2.Client, event: str, **more: Any) -> list[str]:
    answer = client.post("/events", json={"name": event, "data": {}} | more).raise_for_status().json()
    return [one["runId"] for one in answer["triggered"]]


def test_an_app_that_is_provisioned_with_a_url_is_asked_for_its_functions() -> None:
    """It says nothing itself: the service gets the manifest from its URL, signed over the time, as soon as the app has the key
    it was just given, and calls the function."""
    with running(private_calls=True) as service, FieldApp(key="not yet told") as app:
        app.key = provision(service, "shop", app.url)
        with service.client(app.key) as client:
            until(lambda: client.get("/workflows").json(), "the function is there")
            [run_id] = starts(client, "cart.paid")
            assert finished(client, run_id)["result"] == "done"
        assert all("x-durable-discovery" not in headers for headers in app.asked)


@pytest.mark.parametrize(
    "manifest",
    [
        lambda body: (200, {}, body),
        lambda body: (200, {"x-durable-signature": body_signature("another", body)}, body),
        lambda body: (200, {}, b"<html>"),
        lambda body: (302, {"location": "/elsewhere"}, b""),
        lambda body: (200, {}, b"x" * (1 << 20) + b"x"),
        lambda body: (500, {}, b""),
    ],
    ids=["unsigned", "another key", "a page", "a redirect", "too large", "broken"],
)
def test_a_manifest_that_is_not_the_app_s_counts_nothing(manifest: Any) -> None:
    """A01, A02: what is not signed with the workspace's key, or is no manifest, registers nothing; the app may still sync."""
    with running(private_calls=True) as service, FieldApp() as app:
        app.manifest = manifest
        key = provision(service, "shop", app.url)
        with service.client(key) as client:
            until(lambda: app.asked, "it was asked")
            assert client.get("/workflows").json() == []
            body = {"functions": app.functions()}
            assert client.post("/fn/sync", json=body).raise_for_status().json()["ok"] is True
            assert [one["name"] for one in client.get("/workflows").json()] == ["pay"]


def test_an_app_in_development_is_discovered_with_the_key_it_tells() -> None:
    """A dev service that is told a URL makes the app's workspace, signs with the key the app told, calls its function, and
    takes in what changes."""
    with FieldApp(key="the-app's-own", name="shop") as app:
        with running(production=False, admin_token=None, app_url=app.url) as service, service.client() as client:
            until(lambda: client.get("/workflows", params={"app": "shop"}).json(), "the function is there")
            [run_id] = starts(client, "cart.paid", app="shop")
            assert finished(client, run_id)["result"] == "done"
            assert app.asked[0]["x-durable-discovery"] == "true"
            until(lambda: any("x-durable-signature" in headers for headers in app.asked), "it is asked signed")
            app.event = "cart.sent"
            until(lambda: starts(client, "cart.sent", app="shop"), "the changed function is there")
            assert starts(client, "cart.paid", app="shop") == []


def test_an_app_in_development_without_a_key_stays_unsigned() -> None:
    """An app that has no key is discovered, too; nothing between the two is signed. Provisioned later, it has a key."""
    with (
        FieldApp(name="shop") as app,
        running(production=False, admin_token=None, app_url=app.url) as service,
        service.client() as client,
    ):
        until(lambda: client.get("/workflows", params={"app": "shop"}).json(), "the function is there")
        [run_id] = starts(client, "cart.paid", app="shop")
        assert finished(client, run_id)["result"] == "done"
        assert not any("x-durable-signature" in headers for headers in app.asked)
        app.key = client.post("/api/apps", json={"name": "shop"}).raise_for_status().json()["signingKey"]
        before = len(app.asked)
        until(lambda: len(app.asked) > before + 2, "it is asked again")
        [run_id] = starts(client, "cart.paid", app="shop")
        assert finished(client, run_id)["result"] == "done"


def test_discovery_is_for_development() -> None:
    """In production nobody's key is taken from where the service looks for it: the setting is refused."""
    with pytest.raises(DefinitionError, match="durable dev"):
        load_settings({"app_url": "https://shop.example/durable"}, production=True, environ={})
    with pytest.raises(DefinitionError, match="http"):
        load_settings({"app_url": "shop.example"}, environ={})
