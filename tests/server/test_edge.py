"""Requests as an attacker writes them: at the socket, in the JSON, in the path. Each is refused with the API's own shape,
and the next one is served."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator

import httpx2
import pytest

from tests.server.world import ADMIN, JSON, Running, raw, running, status_of

TRIGGER = "/workflows/shop/anything/trigger"


def trigger(client: httpx2.Client, body: bytes) -> httpx2.Response:
    """A body as it is."""
    return client.post(TRIGGER, content=body, headers=JSON)


def code(answer: httpx2.Response) -> str:
    """The stable code of a refusal."""
    return str(answer.json()["error"]["code"])


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    """A service with little patience and little room."""
    with running(
        header_timeout_ms=400,
        body_timeout_ms=400,
        keep_alive_ms=1000,
        max_header_bytes=8192,
        max_headers=40,
        max_connections=300,
    ) as found:
        found.key = found.make_app("shop")  # type: ignore[attr-defined]
        yield found


def post_head(service: Running, extra: str = "", *, path: str = TRIGGER) -> bytes:
    key = service.key  # type: ignore[attr-defined]
    lines = [f"POST {path} HTTP/1.1", "host: x", f"authorization: Bearer {key}", "content-type: application/json"]
    return "\r\n".join([*lines, extra, ""]).encode()


# ------------------------------------------------------------------ paths and queries


@pytest.mark.parametrize(
    ("path", "statuses"),
    [
        ("/runs/..%2F..%2Fx", {400, 404}),
        ("/runs/../../x", {400, 404}),
        ("/runs/%00", {400}),
        ("/runs/" + "a" * 10_000, {400}),
        ("/runs/\u0455hop", {400}),
        ("/runs/%D1%95hop", {400}),
        ("/runs/';%20DROP%20TABLE%20runs", {400}),
        ("/runs/%FF%FE", {400, 404}),
        ("/runs/x/../../healthz", {200, 400, 404}),
    ],
)
def test_a13_run_ids_as_nobody_has_them(client: httpx2.Client, path: str, statuses: set[int]) -> None:
    """A13: dots, NUL, 10 kB, look-alikes, SQL in the place of an id: 400 or 404, never 500, and the runs are still there."""
    assert client.get(path).status_code in statuses
    assert client.get("/runs").status_code == 200


def test_a14_wildcards_are_letters(client: httpx2.Client, service: Running) -> None:
    """A14: `%` and `_` in a search stand for themselves."""
    client.post("/workflows/shop/hello/trigger", json={"input": "x", "dedupeId": "fifty_percent%"}).raise_for_status()
    client.post("/workflows/shop/hello/trigger", json={"input": "x", "dedupeId": "plain"}).raise_for_status()
    assert [run["idempotencyKey"] for run in client.get("/runs", params={"q": "%"}).json()] == ["fifty_percent%"]
    assert [run["idempotencyKey"] for run in client.get("/runs", params={"q": "y_p"}).json()] == ["fifty_percent%"]
    assert [run["idempotencyKey"] for run in client.get("/runs", params={"q": "fifty%nt"}).json()] == []


@pytest.mark.parametrize(
    "query",
    [
        "sort=id;--",
        "sort=input",
        "dir=sideways",
        "status=active",
        "limit=0",
        "limit=-1",
        "limit=1e9",
        "limit=ten",
        "limit=1e1",
        "status=null",
        "nothing=1",
        "limit=1&limit=2",
        "since=never",
        "since=2026-13-45",
        "since=99999999999999999999",
        "cursor=%00",
        "cursor=';--",
        "q=" + "x" * 300,
    ],
)
def test_a15_an_allow_list_for_queries(client: httpx2.Client, query: str) -> None:
    """A15: a column, a direction, a word or a number that is not on the list is 400, by name."""
    answer = client.get(f"/runs?{query}")
    assert answer.status_code == 400
    assert code(answer) in ("bad_query", "bad_id")


# ------------------------------------------------------------------ JSON


def test_a16_depth(client: httpx2.Client) -> None:
    """A16: 100,000 levels are refused at once, as lists, as objects, closed or not."""
    for body in (
        b"[" * 100_000,
        b'{"input":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ):
        begun = time.perf_counter()
        answer = trigger(client, body)
        assert answer.status_code == 400
        assert time.perf_counter() - begun < 0.5
    assert code(trigger(client, b'{"input":' + b"[" * 101 + b"]" * 101 + b"}")) == "bad_json"


@pytest.mark.parametrize(
    "value", ["1" * 1_000_000, "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "0x10", "01", "1.", ".5", "+1"]
)
def test_a17_numbers_that_are_none(client: httpx2.Client, value: str) -> None:
    """A17: numbers that JSON does not have, or no program can hold, are 400."""
    assert trigger(client, f'{{"input":{value}}}'.encode()).status_code == 400


def test_a17_numbers_that_are(client: httpx2.Client, service: Running) -> None:
    """A17: -0 and large integers have a defined value: what was sent comes back."""
    for value in ("-0", "12345678901234567890123", "1e300", "-0.0"):
        run = trigger(client, f'{{"input":{value}}}'.encode()).raise_for_status().json()["runId"]
        assert client.get(f"/runs/{run}").content.count(f'"input":{value},'.encode()) == 1


def test_a18_doubled_keys(client: httpx2.Client) -> None:
    """A18: a key that stands twice in an object is 400: two programs would read two things."""
    for body in (b'{"input":1,"input":2}', b'{"input":{"a":[{"b":1,"b":2}]}}', b'{"input":{"a":1,"\\u0061":2}}'):
        answer = trigger(client, body)
        assert (answer.status_code, code(answer)) == (400, "bad_json")
    assert trigger(client, b'{"input":{"a":{"b":1},"b":{"a":1}}}').status_code == 200


def test_a18_names_with_powers_elsewhere_are_data(client: httpx2.Client) -> None:
    """A18: `__proto__`, `__class__`, `$ref`, `py/object` go through as what they are: keys."""
    value = {
        "__proto__": {"a": 1},
        "__class__": "os.system",
        "$ref": "#/",
        "py/object": "subprocess.Popen",
        "constructor": None,
    }
    run = client.post(TRIGGER, json={"input": value}).raise_for_status().json()["runId"]
    assert client.get(f"/runs/{run}").json()["input"] == value


@pytest.mark.parametrize(
    "body",
    [
        b'{"input":"\\u0000"}',
        b'{"input":{"\\u0000":1}}',
        b'{"input":"\\ud800"}',
        b'{"input":"\\udc00\\ud800"}',
        b'{"input":"\xff"}',
        b'{"input":"\xc0\xaf"}',
        b'{"input":"\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"input":1}',
        '{"input":1}'.encode("utf-16"),
        b'{"input":"a\nb"}',
        b'{"input":1}{"input":2}',
        b'{"input":1} x',
        b'{"input":',
        b"'input'",
        b"null",
        b"[]",
    ],
)
def test_a19_text_that_is_none(client: httpx2.Client, body: bytes) -> None:
    """A19: NUL, lone surrogates, what is no UTF-8, a byte order mark, more than one value: 400 at the edge."""
    answer = trigger(client, body)
    assert answer.status_code == 400
    assert code(answer) in ("bad_json", "bad_body", "payload_text")


def test_keys_are_bounded(client: httpx2.Client) -> None:
    """More keys than a payload may have are refused before anything is built from them."""
    many = b"{" + b",".join(b'"%d":1' % n for n in range(100_002)) + b"}"
    assert trigger(client, b'{"input":%s}' % many).status_code == 413


# ------------------------------------------------------------------ bodies


def test_a20_one_byte_too_many(client: httpx2.Client, service: Running) -> None:
    """A20: the limit is taken, one byte more is 413."""
    limit = service.settings.max_body
    frame = len(b'{"input":""}')
    assert trigger(client, b'{"input":"%s"}' % (b"x" * (limit - frame + 1))).status_code == 413
    assert trigger(client, b'{"input":"%s"}' % (b"x" * (limit - frame))).status_code in (200, 413)
    assert trigger(client, b'{"input":"%s"}' % (b"x" * (limit - frame - 100))).status_code == 200


def test_a20_a_length_that_lies(hasty: Running) -> None:
    """A20: a Content-Length above the limit is 413 before a byte of it; one that promises more than comes is 408; one that
    promises less leaves a second request that is none; one that is no number is 400."""
    assert status_of(raw(hasty.port, post_head(hasty, "content-length: 99999999\r\n"))) == 413
    assert status_of(raw(hasty.port, post_head(hasty, "content-length: 100\r\n") + b'{"input":1}')) == 408
    answer = raw(hasty.port, post_head(hasty, "content-length: 11\r\n") + b'{"input":1}GARBAGE\r\n\r\n')
    assert answer.count(b"HTTP/1.1 ") <= 2
    assert b"HTTP/1.1 400" in answer
    for length in ("-1", "1x", "0x10", "1,1", "9" * 40):
        assert status_of(raw(hasty.port, post_head(hasty, f"content-length: {length}\r\n") + b"{}")) in (400, 413)


def test_a20_chunks_without_end(hasty: Running) -> None:
    """A20: chunks beyond the limit are 413, chunks that stop coming 408."""
    head = post_head(hasty, "transfer-encoding: chunked\r\n")
    assert status_of(raw(hasty.port, head + b'5\r\n{"inp\r\n')) == 408
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    assert status_of(raw(hasty.port, head, more=[chunk] * 40)) == 413


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x"])
def test_a21_nothing_is_unpacked(client: httpx2.Client, encoding: str) -> None:
    """A21: a compressed body is refused by its header, so no bomb goes off: 415."""
    bomb = gzip.compress(b"0" * 50_000_000)
    begun = time.perf_counter()
    answer = client.post(TRIGGER, content=bomb, headers=JSON | {"content-encoding": encoding})
    assert (answer.status_code, code(answer)) == (415, "unsupported_encoding")
    assert time.perf_counter() - begun < 1


def test_a22_packed_without_saying_so(client: httpx2.Client) -> None:
    """A22: gzip that does not say so, whole, doubled, cut or with a tail, is no JSON: 400."""
    packed = gzip.compress(b'{"input":1}')
    for body in (packed, packed + packed, packed[:-4], packed + b"junk"):
        assert trigger(client, body).status_code == 400


def test_a_body_of_another_type(client: httpx2.Client) -> None:
    """What a form in a browser can send is not taken: 415."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = client.post(TRIGGER, content=b'{"input":1}', headers={"content-type": kind})
        assert (answer.status_code, code(answer)) == (415, "unsupported_type")


# ------------------------------------------------------------------ sockets


def test_a23_slow_headers(hasty: Running) -> None:
    """A23: a head that comes byte by byte is closed when its time is up, not prolonged by each byte."""
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as sock:
        begun = time.monotonic()
        answer = b""
        sock.settimeout(0.05)
        for byte in b"GET /healthz HTTP/1.1\r\nx-slow: " + b"a" * 1_000:
            try:
                sock.sendall(bytes([byte]))
                answer += sock.recv(1000)
                break
            except TimeoutError:
                continue
            except OSError:
                break
        assert time.monotonic() - begun < 5
    assert status_of(answer) in (0, 408)


def test_a23_a_second_request_that_is_slow(hasty: Running) -> None:
    """A23: a connection that had one good request has no more patience for the head of its second."""
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while b'{"status":"ok"}' not in answer:
            answer += sock.recv(65536)
        sock.sendall(b"GET /healthz HT")
        answer = b""
        while part := sock.recv(65536):
            answer += part
    assert status_of(answer) == 408


def test_a23_many_idle_sockets(hasty: Running) -> None:
    """A23: sockets that say nothing are closed by their timeout, those above the bound at once, and others are served."""
    sockets = [socket.create_connection(("127.0.0.1", hasty.port), timeout=10) for _ in range(280)]
    try:
        with httpx2.Client(base_url=hasty.url, timeout=10) as client:
            assert client.get("/healthz").status_code == 200
        more = [socket.create_connection(("127.0.0.1", hasty.port), timeout=10) for _ in range(40)]
        sockets += more
        answers = [sock.recv(1000) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()
    assert {status_of(answer) for answer in answers} == {408, 503}
    with httpx2.Client(base_url=hasty.url, timeout=10) as client:
        assert client.get("/healthz").status_code == 200


def test_a24_heads(hasty: Running) -> None:
    """A24: a header of 64 kB, a thousand headers, a bare CR or LF in one, a length beside chunks: 400 or 431, and closed."""
    get = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
    assert status_of(raw(hasty.port, get + b"x-big: " + b"a" * 65_536 + b"\r\n\r\n")) == 431
    assert status_of(raw(hasty.port, get + b"x-big: " + b"a" * 65_536)) == 431
    assert status_of(raw(hasty.port, get + b"".join(b"x-%d: 1\r\n" % n for n in range(1_000)) + b"\r\n")) == 431
    assert status_of(raw(hasty.port, get + b"x: a\rb\r\n\r\n")) == 400
    assert status_of(raw(hasty.port, get + b"x: a\nb\r\n\r\n")) == 400
    assert status_of(raw(hasty.port, get + b"x: a\x00b\r\n\r\n")) == 400
    assert status_of(raw(hasty.port, get + b"x y: 1\r\n\r\n")) == 400
    both = post_head(hasty, "content-length: 11\r\ntransfer-encoding: chunked\r\n")
    assert status_of(raw(hasty.port, both + b'0\r\n\r\n{"input":1}')) == 400
    assert (
        status_of(raw(hasty.port, post_head(hasty, "content-length: 11\r\ncontent-length: 12\r\n") + b'{"input":1}'))
        == 400
    )
    assert status_of(raw(hasty.port, b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n")) in (400, 431)
    assert status_of(raw(hasty.port, b"\x16\x03\x01\x02\x00\x01\x00")) == 400
    assert status_of(raw(hasty.port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")) == 400


def test_every_refusal_has_one_shape(hasty: Running) -> None:
    """At the socket, at the route and behind it: {"error": {"code", "message"}}, as JSON."""
    key = hasty.key  # type: ignore[attr-defined]
    answers = [
        raw(hasty.port, b"nonsense\r\n\r\n"),
        raw(hasty.port, b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 30_000 + b"\r\n\r\n"),
        raw(hasty.port, b"GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
        raw(hasty.port, b"DELETE /runs HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
        raw(hasty.port, b"GET /runs HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
        raw(
            hasty.port,
            f"GET /runs/x HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n\r\n".encode(),
        ),
    ]
    assert [status_of(answer) for answer in answers] == [400, 431, 404, 405, 401, 404]
    for answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"content-type: application/json" in head.lower()
        error = json.loads(body)["error"]
        assert set(error) == {"code", "message"}


# ------------------------------------------------------------------ flooding


def test_a46_open_routes_under_load() -> None:
    """A46: what anybody may ask is bounded for each peer, and never asks the store."""
    with running(rate=5.0, burst=50) as service:
        store = service.app.engine.deps.store
        asked: list[str] = []
        for name in ("get", "find", "get_items", "page", "load", "events"):
            original = getattr(store, name)

            def spy(*args: object, _name: str = name, _original: object = original, **more: object) -> object:
                asked.append(_name)
                return _original(*args, **more)  # type: ignore[operator]

            setattr(store, name, spy)
        with service.client() as client:
            seen = [client.get(path).status_code for _ in range(400) for path in ("/healthz", "/readyz")]
        assert {*seen} == {200, 429}
        assert asked == []


def test_one_key_cannot_starve_another() -> None:
    """The rate is the key's: above it 429 with the time to wait, while another key is served."""
    with running(rate=5.0, burst=60) as service:
        greedy, modest = service.make_app("greedy"), service.make_app("modest")
        with service.client(greedy) as one, service.client(modest) as other:
            answers = [one.get("/workflows") for _ in range(80)]
            refused = [answer for answer in answers if answer.status_code == 429]
            assert refused
            assert code(refused[0]) == "rate_limited"
            assert int(refused[0].headers["retry-after"]) >= 1
            assert other.get("/workflows").status_code == 200


def test_the_admin_token_is_not_in_the_answers(service: Running) -> None:
    """No answer to the admin repeats the token."""
    with service.client(ADMIN) as admin:
        assert ADMIN not in admin.get("/workspaces").text
