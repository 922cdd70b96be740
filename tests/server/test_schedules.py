"""Schedules over HTTP."""

from __future__ import annotations

import httpx2

from tests.server.world import Running


def test_a_schedule_is_made_found_and_removed(client: httpx2.Client) -> None:
    """PUT makes it once; it can be read, listed, triggered and removed, and then it is not there any more (D6)."""
    body = {"workflow": "hello", "input": "Ada", "cron": "0 3 * * *", "timezone": "Europe/Berlin", "overlap": "skip"}
    made = client.put("/schedules/nightly", json=body)
    assert made.status_code == 200, made.text
    assert client.put("/schedules/nightly", json=body).json() == made.json() == client.get("/schedules/nightly").json()
    assert made.json()["nextAt"].endswith("Z")
    assert "nightly" in [one["id"] for one in client.get("/schedules").json()]
    run_id = client.post("/schedules/nightly/trigger", json={}).json()["runId"]
    assert client.get(f"/runs/{run_id}").json()["workflowName"] == "hello"
    assert client.delete("/schedules/nightly").status_code == 204
    for answer in (client.get("/schedules/nightly"), client.delete("/schedules/nightly")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "schedule_not_found")


def test_what_an_operator_has_paused_stays_paused(client: httpx2.Client) -> None:
    """A program that declares its schedule again at its next start does not undo a pause."""
    body = {"workflow": "hello", "input": "Ada", "everySeconds": 3600}
    client.put("/schedules/beat", json=body)
    assert "nextAt" not in client.post("/schedules/beat/pause", json={}).json()
    assert client.put("/schedules/beat", json=body).json()["paused"] is True
    assert "nextAt" in client.post("/schedules/beat/resume", json={}).json()


def test_A36_a_schedule_that_is_none_is_refused(client: httpx2.Client) -> None:
    """A line that never comes true, an unknown zone, two times at once, a workflow nobody has: refused, and nothing is kept
    (A36)."""
    good = {"workflow": "hello", "input": "Ada", "cron": "0 3 * * *"}
    for change, status in (
        ({"cron": "0 0 31 2 *"}, 400),
        ({"cron": "x" * 201}, 400),
        ({"timezone": "Mars/Base"}, 400),
        ({"everySeconds": 60}, 400),
        ({"everySeconds": 0.1, "cron": None}, 400),
        ({"overlap": "maybe"}, 400),
        ({"workflow": "nobody"}, 404),
    ):
        answer = client.put("/schedules/bad", json=good | change)
        assert answer.status_code == status, (change, answer.text)
    assert client.get("/schedules/bad").status_code == 404


def test_a_rivals_schedule_is_not_found(service: Running, client: httpx2.Client, rival: str) -> None:
    """Another workspace's schedule is as unknown as one that nobody has (B37)."""
    client.put("/schedules/mine", json={"workflow": "hello", "input": "Ada", "everySeconds": 3600})
    with service.client(rival) as other:
        assert other.get("/schedules").json() == []
        for answer in (
            other.get("/schedules/mine"),
            other.post("/schedules/mine/pause", json={}),
            other.delete("/schedules/mine"),
        ):
            assert answer.status_code == 404
