"""Every example runs, says what it is there to show, and leaves nothing behind but its store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.redis import RedisServer
from tests.servers.services import require

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

SAYS: dict[str, list[str]] = {
    "steps_and_retries": [
        "fetch_rate(EUR), attempt 3",
        "result: 108.00 USD (not booked: account closed",
        "step retrying",
    ],
    "remote_step": [
        "worker: a.png, attempt 1, key ends in :0",
        "worker: again, attempt 1, key ends in :2",
        "total width: 480",
    ],
    "sleep": ["the engine stops", "a new engine is up", "result: drink water (after 1 s)"],
    "signals": ["sent: True, the same id again: False", "120: approved by ann", "80: nobody decided"],
    "children": ["page 1\npage 2\nfailed: ", "page 3 is torn", "child print_page: failed"],
    "gather": ["best of [30, 20]: 20; first to answer: 30"],
    "patched": ["the lamp packed", "the vase, insured packed"],
    "cancel": ["first request: True", "released sea-view-17", "the run is cancelled"],
    "typed_values": ["Shirt: Size.LARGE Decimal('39.80') 2026-01-02 b'\\x00\\xff'", "refused [payload_type]"],
    "idempotent_start": ["the same run: True", "result: sent", "refused [idempotency_conflict]"],
    "orders_module": ["the shop opens", "order m-1: 42.00 paid as ch_", "the shop is closed"],
    "over_db": ["hello ann, attempt 1, from the worker: True", "hello bob"],
    "hosted_workflow": ["worker: weighing books", "result: books: 50 g, with ann", "  turn:1\n"],
    "worker_steps": ["result: 10 WORDS", "tasks: {'completed': 2}"],
    "logs": ["info  workflow: importing users", "halfway", "warn  workflow: done {'total': 2000}", "rows: 2000"],
    "schedules": ["paused after two seconds", "by hand: the shop is alive", "left: []"],
    "events": [
        "confirm: o-1 is confirmed\ncheck: o-2 is checked by hand\nconfirm: o-2 is confirmed",
        "sent again, a duplicate: True - runs: 2",
        "told: ['order.confirmed: o-1', 'order.confirmed: o-2']",
    ],
    "wait_for_event": ["starts 0 runs", "kite: paid 30, flown at wind 5", "anvil: nobody paid"],
    "concurrency": ["limits: {'all': 3, 'ann': 2, 'bob': 2}", "done: {'ann': 8, 'bob': 5}", "than the limits: True"],
    "priority": ["served: first, bob, dora, ann, carl"],
    "fairness": ["the next twelve turns: {'huge': 3, 'small': 3, 'gold': 6}"],
    "throttle": ["all of them ran: [0, 1, 2, 3, 4, 5]", "had to wait: True; the fifth for two periods: True"],
    "rate_limit": ["db-1: started\ndb-1: dropped\ndb-2: started\ndb-1: dropped", "runs: 2"],
    "debounce": ["a 'D': debounced, a new run: True", "a 'Durable': debounced, a new run: False", "indexed a: Durable"],
    "batch": ["/price: batched", "3 views: /, /docs, /\n1 views: /price"],
    "singleton": [
        "skip: started, then skipped; synced graz",
        "cancel: started, then started; cancelled; synced graz",
        "queue: started, then started; synced graz; synced graz",
    ],
    "service": ["sent again, the same run: True", "log packed", "o-1 leaves from Graz", "[run_not_found]", "Stopped."],
    "runner_connect": ["cat: 30 px - by right", "right has gone; connected is left", "horse: 50 px"],
    "runner_serve": ["checked in: [('web', 'serve', True)]", "invoice 1001 for o-1, mailed to ann"],
    "search_attributes": ["heavy, in the depot: ['bob']", "at home: ['ann', 'bob']", "fragile is left: False"],
}

SERVED: dict[str, tuple[str, str, list[str]]] = {
    "over_redis": (
        "kept_redis_url",
        "REDIS_URL",
        ["order 0 charged under :0 by another process: True", "order 2 charged under :2 by another process"],
    ),
    "over_sqs": ("sqs_url", "SQS_ENDPOINT_URL", ["worker: b.png, attempt 1", "gallery: a.png, 160 px wide; b.png"]),
    "over_rabbitmq": ("amqp_url", "AMQP_URL", ["worker: b.png, attempt 1", "gallery: a.png, 160 px wide; b.png"]),
    "over_bullmq": (
        "kept_redis_url",
        "REDIS_URL",
        ["worker: b.png, attempt 1", "gallery: a.png, 160 px wide; b.png", "alive: images.thumbnail, python"],
    ),
}
"""Examples that need a server: its fixture, the variable that names it, what they say."""

PARTS = {"orders", "order_demo", "shop", "one_workflow_three_ways"}
"""The demo's files, which tests/examples/test_demo.py runs; and what tests/workers runs, since it has the other languages."""


def test_every_example_is_run() -> None:
    """No example is there that no test runs."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} - PARTS == {*SAYS, *SERVED}


@pytest.fixture
def kept_redis_url() -> Iterator[str]:
    """A Redis of which nothing has to be said: it keeps what it has."""
    require("redis")
    server = RedisServer(persist=True)
    server.start()
    yield server.url
    server.close()


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, tmp_path: Path) -> None:
    """The example succeeds anywhere, prints its facts, warns of nothing, and stays short."""
    check(name, tmp_path, SAYS[name])


@pytest.mark.parametrize("name", SERVED)
def test_example_with_a_server(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """So does the example that needs a server, once it is told where that is."""
    fixture, variable, facts = SERVED[name]
    check(name, tmp_path, facts, **{variable: request.getfixturevalue(fixture)})


def check(name: str, folder: Path, facts: list[str], **environment: str) -> None:
    source = EXAMPLES / f"{name}.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(source)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)} | environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    for fact in facts:
        assert fact in done.stdout
    assert len(source.read_text().splitlines()) < 60


def test_examples_print_once(tmp_path: Path) -> None:
    """A log line of a workflow that is replayed at every wait is written once."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "logs.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 6
