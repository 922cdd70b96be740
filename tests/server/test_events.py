"""Events over HTTP: what the answer says of each function, lists, the stream, and the form that apps in any language use."""

from __future__ import annotations

import itertools
import json
import threading

import httpx2
import pytest

from durable.protocol.signature import body_signature
from tests.server.world import Running, finished, frames, until

_numbers = itertools.count()
FLAGS = ("skipped", "dropped", "debounced", "batched", "deduped", "suspended")


def order(customer: str = "") -> dict[str, str]:
    n = next(_numbers)
    return {"id": f"order-{n}", "customer": customer or f"customer-{n}"}


def test_e2_the_answer_says_what_happened_to_each(client: httpx2.Client) -> None:
    """E2: each function the event starts is told of with its run or its flag; a limited one drops, the other starts."""
    placed = order("ann")
    first = client.post("/events", json={"name": "order.placed", "data": placed}).raise_for_status().json()
    assert {one["workflow"] for one in first["triggered"]} == {"on_order", "once_an_hour"}
    assert all("runId" in one and not any(one[flag] for flag in FLAGS) for one in first["triggered"])
    second = client.post("/events", json={"name": "order.placed", "data": order("ann")}).json()
    verdicts = {one["workflow"]: one for one in second["triggered"]}
    assert verdicts["once_an_hour"]["dropped"] is True
    assert "runId" not in verdicts["once_an_hour"]
    run = finished(client, verdicts["on_order"]["runId"])
    assert (run["triggerKind"], run["eventName"], run["eventId"]) == ("event", "order.placed", second["eventId"])


def test_e2_an_event_nobody_waits_for(client: httpx2.Client) -> None:
    """E2: an event that starts nothing is accepted all the same, and every flag is there."""
    answer = client.post("/events", json={"name": "nobody.cares", "data": {"a": 1}}).raise_for_status().json()
    assert (answer["woke"], answer["triggered"]) == (0, [])
    assert {flag: answer[flag] for flag in FLAGS} == dict.fromkeys(FLAGS, False)
    assert client.get(f"/events/{answer['eventId']}").json()["data"] == {"a": 1}


def test_e2_the_same_again(client: httpx2.Client) -> None:
    """E2: a dedupeId that was there before answers with that event, and starts nothing."""
    body = {"name": "order.placed", "data": order(), "dedupeId": f"dedupe-{next(_numbers)}"}
    first, again = (client.post("/events", json=body).raise_for_status().json() for _ in range(2))
    assert (first["deduped"], again["deduped"]) == (False, True)
    assert again["eventId"] == first["eventId"]
    assert [one["runId"] for one in again["triggered"]] == [one["runId"] for one in first["triggered"]]


def test_e3_a_run_that_waits_is_woken(client: httpx2.Client, service: Running) -> None:
    """E3: the answer counts the runs that waited, and they go on with the event's data."""
    run_id = client.post("/workflows/shop/waits_for_event/trigger", json={}).json()["runId"]
    until(lambda: client.get(f"/runs/{run_id}").json()["status"] == "waiting")
    answer = client.post("/events", json={"name": "payment.done", "data": {"paid": 7}}).json()
    assert answer["woke"] >= 1
    assert finished(client, run_id)["result"] == {"paid": 7}


def test_lists_page_by_page(client: httpx2.Client) -> None:
    """Events come newest first, each once, however small the pages; by name."""
    name = f"listed.{next(_numbers)}"
    sent = [client.post("/events", json={"name": name, "data": n}).json()["eventId"] for n in range(7)]
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        answer = client.get("/events", params={"name": name, "limit": "3"} | cursor)
        seen += [one["id"] for one in answer.json()]
        if "x-next-cursor" not in answer.headers:
            break
        cursor = {"cursor": answer.headers["x-next-cursor"]}
    assert seen == sent[::-1]


def test_the_stream_of_events(client: httpx2.Client, service: Running, rival: str) -> None:
    """Events are told in order as they are accepted, from a number on without gap or repeat, and only one's own."""
    name = f"streamed.{next(_numbers)}"
    ids = [client.post("/events", json={"name": name, "data": n}).json()["eventId"] for n in range(3)]
    before = client.get(f"/events/{ids[0]}").json()["number"] - 1
    with service.client(rival) as other:
        other.post("/events", json={"name": name, "data": "theirs"}).raise_for_status()
    text, opened = "", threading.Event()
    with client.stream("GET", f"/events/stream?from={before}") as stream:
        for part in stream.iter_text():
            text += part
            opened.set()
            if text.count("event: event") == 3:
                break
    found = frames(text)
    assert [one["data"]["id"] for one in found] == ids
    assert [int(one["id"]) for one in found] == [one["data"]["number"] for one in found]
    assert {one["data"]["kind"] for one in found} == {"event"}


def test_a10_another_tenant_in_the_body(client: httpx2.Client) -> None:
    """A10: a body that names another app, at the top or in the second of a batch, is 403, and nothing of it was done."""
    before = len(client.get("/events", params={"limit": "500"}).json())
    for stranger in ({"app": "rival"}, {"targetApp": "rival"}, {"app": "rival.dev"}, {"targetApp": "default"}):
        answer = client.post("/events", json={"name": "order.placed", "data": order()} | stranger)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    batch = {"events": [{"name": "a", "data": 1}, {"name": "b", "data": 2, "targetApp": "rival"}]}
    assert client.post("/e/bulk", json=batch).status_code == 403
    assert client.post("/events", json={"name": "x", "data": {"app": "rival"}}).status_code == 200  # data is data
    assert client.post("/events", json={"name": "x", "app": "shop"}).status_code == 200
    assert len(client.get("/events", params={"limit": "500"}).json()) == before + 2


def test_e7_as_apps_in_any_language_publish(service: Running, key: str) -> None:
    """E7: `/e` and `/e/bulk` with the plain signature; the same id again gives the same answer; the answer is signed."""
    body = json.dumps({"name": "order.placed", "data": order(), "id": f"mine-{next(_numbers)}"}).encode()
    with service.client() as app:

        def send(path: str, body: bytes) -> httpx2.Response:
            headers = {"x-durable-app": "shop.dev", "x-durable-signature": body_signature(key, body)}
            answer = app.post(path, content=body, headers=headers)
            assert answer.headers["x-durable-signature"] == body_signature(key, answer.content)
            return answer

        first, again = send("/e", body), send("/e", body)
        assert first.status_code == 200
        assert again.content == first.content
        assert len(first.json()["runIds"]) == 2
        many = json.dumps({"events": [{"name": "order.placed", "data": order()} for _ in range(100)]}).encode()
        assert len(send("/e/bulk", many).json()["events"]) == 100
        more = json.dumps({"events": [{"name": "x"}] * 101}).encode()
        assert send("/e/bulk", more).status_code == 400
        run_id = first.json()["runIds"][0]
        found = send("/runs/get", json.dumps({"runId": run_id}).encode()).json()
        assert (found["run"]["id"], found["steps"]) == (run_id, [])
        assert send("/runs/search", b'{"functionId":"on_order","limit":2}').json()["cursor"]


def test_all_or_none_of_a_batch(client: httpx2.Client) -> None:
    """One event that cannot be refuses the whole batch before any is stored."""
    name = f"batch.{next(_numbers)}"
    answer = client.post("/e/bulk", json={"events": [{"name": name, "data": 1}, {"name": " spaced ", "data": 2}]})
    assert answer.status_code == 400
    assert client.get("/events", params={"name": name}).json() == []


@pytest.mark.parametrize("name", ["", " x", "a\nb", "x" * 400, "a\0b", 7, None])
def test_names_that_are_none(client: httpx2.Client, name: object) -> None:
    """An event's name is a line of plain text: 400."""
    assert client.post("/events", json={"name": name, "data": 1}).status_code == 400


def test_how_full_the_limits_are(client: httpx2.Client, rival: str, service: Running) -> None:
    """/flow-state is the workspace's own."""
    assert isinstance(client.get("/flow-state").raise_for_status().json(), list)
    with service.client(rival) as other:
        assert other.get("/flow-state").json() == []
