"""Server-sent events: every frame once, in order, from wherever one was; and how streams end."""

from __future__ import annotations

import threading
from typing import Any

import httpx2
import pytest

from durable.testing.facts import eventually
from tests.server.world import Running, finished, frames, running


def start(client: httpx2.Client, name: str, **body: Any) -> str:
    return str(client.post(f"/workflows/shop/{name}/trigger", json=body).raise_for_status().json()["runId"])


def read(client: httpx2.Client, run_id: str, *, query: str = "", **headers: str) -> list[dict[str, Any]]:
    """All frames of a run that ends."""
    answer = client.get(f"/runs/{run_id}/stream{query}", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    return frames(answer.text)


def test_r5_frames_of_a_run(client: httpx2.Client) -> None:
    """R5: run_status, step_status and log frames, each with seq, ts, runId and its kind again in the data; the id is the seq;
    the stream ends by itself."""
    run_id = start(client, "hello", input="ann")
    found = read(client, run_id)
    assert [(one["event"], one["data"].get("status")) for one in found] == [
        ("run_status", "running"),
        ("log", None),
        ("step_status", "completed"),
        ("run_status", "succeeded"),
    ]
    for one in found:
        data = one["data"]
        assert data["kind"] == one["event"]
        assert int(one["id"]) == data["seq"]
        assert data["runId"] == run_id
        assert data["ts"].endswith("Z")
    assert found[1]["data"]["message"] == "greeting"
    assert found[1]["data"]["scope"] == "root"
    assert found[1]["data"]["fields"] == {"who": "ann"}


def test_r5_a_retry_and_its_end(client: httpx2.Client) -> None:
    """R5: a failing step tells whether it will be tried again, and when."""
    found = [
        one["data"] for one in read(client, start(client, "broken", input="rain")) if one["event"] == "step_status"
    ]
    assert [(one["status"], one["willRetry"], one["attempt"]) for one in found] == [
        ("retrying", True, 1),
        ("failed", False, 2),
    ]
    assert found[0]["nextAttemptAt"].endswith("Z")
    assert found[0]["error"]["message"] == "cannot bear rain"
    assert "stack" not in found[0]["error"]


def test_s33_from_every_cursor(client: httpx2.Client) -> None:
    """S33: a client with cursor c gets every frame above c exactly once, in order, for every c; by `from` and by
    Last-Event-ID alike."""
    run_id = start(client, "many", input=20)
    everything = read(client, run_id)
    seqs = [int(one["id"]) for one in everything]
    assert seqs == sorted(set(seqs))
    for cursor in range(0, seqs[-1] + 1, 3):
        rest = [seq for seq in seqs if seq > cursor]
        assert [int(one["id"]) for one in read(client, run_id, query=f"?from={cursor}")] == rest
        assert [int(one["id"]) for one in read(client, run_id, **{"last-event-id": str(cursor)})] == rest


def test_s33_reconnecting_while_it_runs(client: httpx2.Client, service: Running) -> None:
    """S33: a watcher that is cut off again and again, at any point, has every frame once at the end."""
    run_id = start(client, "many", input=60)
    seen: list[int] = []
    for _ in range(500):
        headers = {"last-event-id": str(seen[-1])} if seen else {}
        with client.stream("GET", f"/runs/{run_id}/stream", headers=headers) as stream:
            got = 0
            for line in stream.iter_lines():
                if line.startswith("id: "):
                    seen.append(int(line[4:]))
                    got += 1
                    if got == 7:
                        break
            else:
                break
    assert seen == [int(one["id"]) for one in read(client, run_id)]


def test_s33_over_a_restart(tmp_path: Any) -> None:
    """S33: a cursor is good on another process over the same store."""
    url = f"sqlite:///{tmp_path}/restart.db"
    with running(url, production=False) as first:
        with first.client() as client:
            run_id = client.post("/workflows/default/waits/trigger", json={}).raise_for_status().json()["runId"]
            with client.stream("GET", f"/runs/{run_id}/stream") as stream:
                last = next(int(line[4:]) for line in stream.iter_lines() if line.startswith("id: "))
    with running(url, production=False) as second:
        with second.client() as client:
            second.do(second.app.engine.signal(run_id, "go", 7))
            rest = read(client, run_id, query=f"?from={last}")
            everything = read(client, run_id)
    assert [int(one["id"]) for one in everything][1:] == [int(one["id"]) for one in rest]
    assert rest[-1]["data"]["status"] == "succeeded"


@pytest.mark.parametrize("given", ["-1", "x", "99999999999999999999", ""])
def test_cursors_that_are_none(client: httpx2.Client, given: str) -> None:
    """What is no seq is 400, as a query and as a header."""
    run_id = start(client, "hello", input="x")
    assert client.get(f"/runs/{run_id}/stream?from={given}").status_code == 400
    if given:
        assert client.get(f"/runs/{run_id}/stream", headers={"last-event-id": given}).status_code == 400


def test_r8_a_frame_is_durable_when_it_is_seen(client: httpx2.Client, service: Running) -> None:
    """R8: whatever frame a watcher has seen, the store has its row already."""
    store = service.app.engine.deps.store
    run_id = start(client, "many", input=10)
    with client.stream("GET", f"/runs/{run_id}/stream") as stream:
        for line in stream.iter_lines():
            if line.startswith("id: "):
                seq = int(line[4:])
                assert [row.seq for row in service.do(store.page(run_id, seq - 1, 1))] == [seq]


def test_a_silent_stream_is_kept_alive() -> None:
    """A stream of a run that waits has a comment now and then, so that nothing between closes it."""
    with running(stream_keepalive_ms=50) as service:
        with service.client(service.make_app("shop")) as client:
            run_id = start(client, "waits")
            with client.stream("GET", f"/runs/{run_id}/stream") as stream:
                lines = stream.iter_lines()
                assert sum(next(lines) == ": alive" for _ in range(40)) >= 2


def test_streams_end_when_the_process_drains() -> None:
    """A drain ends every stream with a comment, and /readyz is red before; the watcher goes on elsewhere."""
    with running() as service:
        with service.client(service.make_app("shop")) as client:
            run_id = start(client, "waits")
            with client.stream("GET", f"/runs/{run_id}/stream") as stream:
                lines = stream.iter_lines()
                assert next(lines) == ": open"
                assert client.get("/readyz").status_code == 200
                service.call(service.http.drain)
                assert ": this process is stopping; go on elsewhere" in list(lines)
            ready = client.get("/readyz")
            assert (ready.status_code, ready.json()["draining"]) == (503, True)
            assert client.get("/healthz").status_code == 200


def test_streams_are_bounded_and_freed() -> None:
    """One key holds so many streams and no more; a closed one makes room."""
    with running(max_streams=2) as service:
        with service.client(service.make_app("shop")) as client:
            run_id = start(client, "waits")
            with (
                client.stream("GET", f"/runs/{run_id}/stream") as one,
                client.stream("GET", f"/runs/{run_id}/stream") as two,
            ):
                assert [one.status_code, two.status_code] == [200, 200]
                assert client.get(f"/runs/{run_id}/stream").status_code == 429
            held = service.asgi.state.service.streams
            service.do(eventually(lambda: held.held == 0, "closed streams make room"))
            with client.stream("GET", f"/runs/{run_id}/stream") as again:
                assert again.status_code == 200


def test_r7_all_runs_of_a_workspace(client: httpx2.Client, service: Running, rival: str) -> None:
    """R7: /runs/stream tells of every run whose status changes, of this workspace and no other; one that comes back is told
    to look again."""
    heard: list[str] = []
    opened, done = threading.Event(), threading.Event()

    def listen() -> None:
        with service.client(client.headers["authorization"].partition(" ")[2]) as mine:
            with mine.stream("GET", "/runs/stream") as stream:
                for line in stream.iter_lines():
                    opened.set()
                    heard.append(line)
                    if done.is_set():
                        return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert opened.wait(10)
    with service.client(rival) as other:
        theirs = other.post("/workflows/rival/hello/trigger", json={"input": "x"}).json()["runId"]
    run_id = start(client, "hello", input="x")
    finished(client, run_id)

    told = lambda: any(run_id in line and "succeeded" in line for line in heard)  # noqa: E731
    service.do(eventually(told, "the end of the run is told"))
    done.set()
    start(client, "hello", input="y")
    thread.join(15)
    assert not any(theirs in line for line in heard)
    with client.stream("GET", "/runs/stream", headers={"last-event-id": "1"}) as stream:
        assert next(stream.iter_lines()) == "event: resync"


def test_r6_log_lines_by_pages(client: httpx2.Client) -> None:
    """R6: lines in order, each once, however small the pages; the cursor is the next `from`."""
    run_id = start(client, "many", input=25)
    finished(client, run_id)
    lines: list[str] = []
    after, pages = "0", 0
    while True:
        answer = client.get(f"/runs/{run_id}/logs", params={"from": after, "limit": "4"})
        lines += [one["message"] for one in answer.json()]
        pages += 1
        if "x-next-cursor" not in answer.headers:
            break
        after = answer.headers["x-next-cursor"]
    assert lines == [f"line {n}" for n in range(25)]
    assert pages >= 7
