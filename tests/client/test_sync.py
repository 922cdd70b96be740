"""The same client for code without an event loop."""

from __future__ import annotations

import threading

import pytest

from durable.client import NotFound, SyncClient
from tests.server.world import Running


def test_the_sync_client_waits(service: Running, key: str) -> None:
    """Coroutines are waited for, iterators are plain, errors are the same."""
    with SyncClient(service.url, key=key) as client:
        started = client.workflows.trigger("shop", "hello", "ann")
        assert client.runs.wait(started.run_id).result == "hello ann"
        kinds = [frame.kind for frame in client.runs.watch(started.run_id)]
        assert kinds == ["run_status", "log", "step_status", "run_status"]
        assert [run.id for run in client.runs.list(q=started.run_id)] == [started.run_id]
        assert [line.message for line in client.runs.logs(started.run_id)] == ["greeting"]
        answer = client.events.send("order.placed", {"id": "o-9", "customer": "sync"})
        assert client.events.get(answer.event_id).name == "order.placed"
        assert client.schedules.ensure("sync", "hello", "x", every="1h").id == "sync"
        client.schedules.remove("sync")
        assert [app.name for app in client.apps()] == ["shop"]
        assert client.flow_state() is not None
        assert client.health()["status"] == "ok"
        with pytest.raises(NotFound):
            client.runs.get("no-such-run")


def test_a_stream_may_be_left(service: Running, key: str) -> None:
    """A watch that is broken off lets its connection go; the client goes on."""
    with SyncClient(service.url, key=key) as client:
        run_id = client.workflows.trigger("shop", "waits").run_id
        for frame in client.runs.watch(run_id):
            assert frame.status == "running"
            break
        assert client.runs.cancel(run_id)
        assert client.runs.wait(run_id).status == "cancelled"


def test_closing_ends_its_thread(service: Running, key: str) -> None:
    """No thread is left behind; a closed client says so."""
    client = SyncClient(service.url, key=key)
    assert client.ready()["status"] == "ready"
    client.close()
    client.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "durable-client"]
    with pytest.raises(RuntimeError, match="closed"):
        client.health()
