"""Apps and runners through the service's own doors: /connect, /register, /fn/sync, and what is refused there."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from durable.protocol.signature import body_signature, sign
from durable.runners import connect as engine_end
from tests.server.world import Running, finished, running, until

PROTOCOL = Subprotocol("duraton.connect.v0")


def dial(service: Running, key: str | None, *, path: str = "/connect", **options: Any) -> ClientConnection:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    headers |= options.pop("headers", {})
    return connect(
        f"ws://127.0.0.1:{service.port}{path}",
        subprotocols=[PROTOCOL],
        additional_headers=headers,
        max_size=4 << 20,
        compression=None,
        **options,
    )


def register(app: str = "shop", *names: str) -> str:
    payload = {
        "app": app,
        "runner": "one",
        "runtime": "python",
        "sdkName": "a-test",
        "version": "1",
        "framework": "none",
        "region": "eu",
        "protocolVersion": 1,
        "minProtocolVersion": 1,
        "maxProtocolVersion": 1,
        "workflows": [{"name": name, "triggers": [{"event": f"{name}.asked"}]} for name in names],
    }
    return json.dumps({"type": "runner.register", "payload": payload})


def closed(socket: ClientConnection) -> int:
    """The code a connection is closed with from the other side."""
    try:
        while True:
            socket.recv(timeout=20)
    except ConnectionClosed as error:
        assert error.rcvd is not None
        return error.rcvd.code


def test_r1_a_runner_dials_in_and_runs(service: Running, key: str, client: httpx2.Client) -> None:
    """R1, R3: hello, register, invoke, result: a run that an event starts ends with what the runner said; /runners has it with
    its metadata while it is connected, and not after."""
    with dial(service, key) as socket:
        assert socket.subprotocol == PROTOCOL
        hello = json.loads(socket.recv(timeout=10))
        assert (hello["type"], hello["payload"]["protocolVersion"]) == ("hello", 1)
        socket.send(register("shop", "dialled"))
        until(lambda: any(one["name"] == "dialled" for one in client.get("/workflows").json()))
        [runner] = client.get("/runners").json()
        assert (runner["runner"], runner["mode"], runner["region"], runner["keyMatches"]) == (
            "one",
            "connect",
            "eu",
            True,
        )
        answer = client.post("/events", json={"name": "dialled.asked", "data": {"n": 7}}).raise_for_status().json()
        run_id = next(one["runId"] for one in answer["triggered"] if one["workflow"] == "dialled")
        while True:
            frame = json.loads(socket.recv(timeout=10))
            if frame["type"] == "invoke":
                break
        assert frame["payload"]["event"]["data"] == {"n": 7}
        body = {"data": {"doubled": 14}, "logs": []}
        socket.send(json.dumps({"type": "invoke.result", "id": frame["id"], "payload": {"status": 200, "body": body}}))
        run = finished(client, run_id)
        assert (run["status"], run["result"]) == ("succeeded", {"doubled": 14})
        socket.send(json.dumps({"type": "ping"}))
        assert json.loads(socket.recv(timeout=10))["type"] == "pong"
    until(lambda: client.get("/runners").json() == [])


@pytest.mark.parametrize(
    ("token", "path", "headers", "status"),
    [
        (None, "/connect", {}, 401),
        ("wrong", "/connect", {}, 401),
        (None, "/connect?token=KEY", {}, 401),
        (None, "/connect?authorization=Bearer%20KEY", {}, 401),
        ("KEY", "/connect", {"origin": "https://evil.example"}, 403),
        ("KEY", "/connect", {"origin": "null"}, 403),
        ("READER", "/connect", {}, 403),
    ],
)
def test_a25_refused_before_it_is_accepted(
    service: Running, key: str, token: str | None, path: str, headers: dict[str, str], status: int
) -> None:
    """A25: without a key, with one in the query, from another origin's page, with a key that may only look: an answer of the
    API's own shape, and no socket."""
    from tests.server.world import ADMIN

    given = {"KEY": key, None: None}.get(token, "dk_shop.dev_00")
    if token == "READER":
        with service.client(ADMIN) as admin:
            given = admin.post("/workspaces/shop.dev/readers").json()["key"]
    with pytest.raises(InvalidStatus) as refused, dial(service, given, path=path.replace("KEY", key), headers=headers):
        pass
    assert refused.value.response.status_code == status
    assert set(json.loads(refused.value.response.body or b"{}")) == {"error"}


def test_a26_frames_that_are_none(service: Running, key: str) -> None:
    """A26: a frame above the limit closes with 1009, text that is no UTF-8 with 1007, bytes with 1003; compression is not
    agreed to, so there is no bomb in it."""
    with dial(service, key) as socket:
        socket.send(json.dumps({"type": "x", "payload": "y" * (1 << 20)}))
        assert closed(socket) == 1009
    with dial(service, key) as socket:
        socket.send(b"\xff\xfe", text=True)
        assert closed(socket) == 1007
    with dial(service, key) as socket:
        socket.send(b"{}")
        assert closed(socket) == 1003
    with connect(
        f"ws://127.0.0.1:{service.port}/connect",
        subprotocols=[PROTOCOL],
        additional_headers={"authorization": f"Bearer {key}"},
        compression="deflate",
    ) as socket:
        assert socket.protocol.extensions == []


def test_a27_a_flood(service: Running, key: str, client: httpx2.Client) -> None:
    """A27: more messages than anybody needs close the connection with 1008, and others are served meanwhile."""
    with dial(service, key) as socket:
        socket.send(register("shop", "flooding"))
        try:
            for _ in range(100_000):
                socket.send('{"type":"ping"}')
        except ConnectionClosed:
            pass
        assert closed(socket) in (1008, 1013)
    assert client.get("/healthz").status_code == 200


def test_a27_one_that_never_reads(service: Running, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A27: a runner that does not read is hung up on after a while, with what it was sent bounded; others are served
    meanwhile."""
    monkeypatch.setattr(engine_end, "SEND_SECONDS", 0.3)
    with service.client(key) as client, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", service.port))
        deaf.sendall(
            b"GET /connect HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n"
            + f"sec-websocket-protocol: {PROTOCOL}\r\nauthorization: Bearer {key}\r\n\r\n".encode()
        )
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += deaf.recv(1)
        assert answer.startswith(b"HTTP/1.1 101 ")
        deaf.sendall(text_frame(register("shop", "deaf")))
        until(lambda: any(one["name"] == "deaf" for one in client.get("/workflows").json()), "it is registered")
        data = {"name": "deaf.asked", "data": "x" * 900_000}
        for _ in range(20):
            client.post("/events", json=data).raise_for_status()
        until(lambda: client.get("/runners").json() == [], "it is hung up on")
        assert client.get("/healthz").status_code == 200
        for run in client.get("/runs", params={"workflow": "deaf"}).json():
            client.post(f"/runs/{run['id']}/cancel")


def text_frame(text: str) -> bytes:
    """As a client sends it, masked with zeros."""
    data = text.encode()
    return b"\x81" + bytes([0x80 | 126]) + len(data).to_bytes(2, "big") + bytes(4) + data


@pytest.mark.parametrize(
    "frames",
    [
        ['{"type":"invoke.result","id":"p1","payload":{"status":200,"body":{"data":1}}}'],
        ["REGISTER", "REGISTER-OTHER"],
        ["not json"],
        ["[]"],
    ],
)
def test_a28_out_of_order(service: Running, key: str, frames: list[str]) -> None:
    """A28: a result before the registration, a second one of another app, what is no envelope: closed, nothing changed."""
    with dial(service, key) as socket:
        for frame in frames:
            known = {"REGISTER": register("shop", "ordered"), "REGISTER-OTHER": register("rival", "ordered")}
            socket.send(known.get(frame, frame))
        assert closed(socket) in (1002, 1008)


def test_a10_a_runner_of_another_tenant(service: Running, rival: str, client: httpx2.Client) -> None:
    """A10, A30: a key of one tenant registers nothing for another, by either door, nor with names that are patterns."""
    with dial(service, rival) as socket:
        socket.send(register("shop", "stolen"))
        assert closed(socket) == 1008
    for names in (["*"], ["@shop"], ["a" * 500], [f"n{n}" for n in range(1_001)]):
        with dial(service, rival) as socket:
            socket.send(register("rival", *names))
            assert closed(socket) == 1008
    body = json.loads(register("shop", "stolen"))["payload"] | {
        "url": "https://runner.example/invoke",
        "keyFingerprint": "0" * 16,
    }
    with service.client(rival) as other:
        assert other.post("/register", json=body).status_code == 403
    assert not any(one["name"] == "stolen" for one in client.get("/workflows").json())


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/",
        "http://[::ffff:169.254.169.254]/",
        "http://0x7f000001/",
        "http://localhost./",
        "file:///etc/passwd",
        "gopher://x/",
    ],
)
def test_a31_urls_that_are_not_called(client: httpx2.Client, url: str) -> None:
    """A31: a runner or an app at an address that is nobody's to call is refused when it says so."""
    body = json.loads(register("shop", "near"))["payload"] | {"url": url}
    assert client.post("/register", json=body).status_code == 400
    assert client.post("/fn/sync", json={"functions": [], "url": url}).status_code == 400


@contextmanager
def app_at(key: str) -> Iterator[str]:
    """An app in any language: it answers each call with the next operation, and checks who calls."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            call = json.loads(body)
            step = call["steps"].get("charge")
            answer: dict[str, Any] = (
                {"op": "done", "data": step["data"]} if step else {"op": "step", "id": "charge", "data": 42}
            )
            if self.headers["x-durable-signature"] != body_signature(key, body):
                answer = {"op": "error", "id": None, "message": "not signed", "retryable": False}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.send_header("x-durable-signature", body_signature(key, data))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_e8_an_app_in_any_language() -> None:
    """E8: an app says its functions and its URL, signed; an event starts one; the service calls it, signed, one operation per
    round trip, until it is done."""
    with running(production=False) as service:
        key = service.make_app("php")
        with app_at(key) as url, service.client() as plain, service.client(key) as client:
            function = {
                "id": "pay",
                "trigger": {"event": "cart.paid"},
                "version": "2",
                "enabled": True,
                "hasOnFailure": False,
                "priority": 0,
            }
            body = json.dumps({"sdkVersion": "1.0", "url": url, "functions": [function]}).encode()
            headers = {"x-durable-app": "php.dev", "x-durable-signature": body_signature(key, body)}
            answer = plain.post("/fn/sync", content=body, headers=headers)
            assert answer.json() == {"ok": True, "functions": [{"id": "pay", "version": "2"}]}
            status = client.post("/versions/status", json={"functionId": "pay"}).json()
            assert (status["current"], status["versions"], status["enabled"]) == ("2", ["2"], True)
            event = json.dumps({"name": "cart.paid", "data": {"total": 5}}).encode()
            headers = {"x-durable-app": "php.dev", "x-durable-signature": body_signature(key, event)}
            [run_id] = plain.post("/e", content=event, headers=headers).raise_for_status().json()["runIds"]
            run = finished(client, run_id)
            assert (run["status"], run["result"], run["app"]) == ("succeeded", 42, "php")
            assert [step["name"] for step in client.get(f"/runs/{run_id}/steps").json()] == ["charge"]


def test_other_engines_alone_may_ask_for_runners_here(service: Running, key: str) -> None:
    """The internal endpoint takes this engine's own key from the store and nothing else: no tenant's key, no admin token."""
    from tests.server.world import ADMIN

    body = b'{"instance":"x","call":{},"timeout":1}'
    with service.client() as client:
        for headers in (
            {},
            {"authorization": f"Bearer {key}"},
            {"authorization": f"Bearer {ADMIN}"},
            {"x-durable-signature": sign(key, "POST", "/internal/invoke", body, ts=0, nonce="n" * 16)},
        ):
            assert client.post("/internal/invoke", content=body, headers=headers).status_code in (401, 404)
