"""Our two layers of state in the words of the wire, and frames from journal rows."""

from __future__ import annotations

import pytest
from msgspec import UNSET, Raw

from durable import Context, Durable
from durable.core.journal import LOG, REMOTE, RUN, STEP, TIMER, Entry
from durable.protocol.states import TERMINAL, Activity, Status
from durable.server.views import ACTIVE, ENDED, frame_of, iso, status_word, step_views

WORDS: dict[str, set[Activity | Status]] = {
    "queued": {Activity.QUEUED, Activity.SCHEDULED},
    "running": {Activity.EXECUTING, Activity.CANCELLING},
    "waiting": {Activity.WAITING, Activity.SLEEPING, Activity.RETRYING},
    "paused": {Activity.PAUSED},
    "needs_attention": {Activity.BLOCKED, Status.DEAD, Status.COMPENSATION_FAILED},
    "succeeded": {Status.COMPLETED},
    "failed": {Status.FAILED},
    "cancelled": {Status.CANCELLED},
}
"""The table of the design, the other way round."""


def test_every_state_has_its_word() -> None:
    """Every status and every activity stands for exactly one word of the wire, as the design's table says."""
    told = {state: word for word, states in WORDS.items() for state in states}
    assert set(told) == set(Activity) | set(TERMINAL)
    for activity in Activity:
        assert status_word(Status.ACTIVE, activity) == told[activity]
        for status in TERMINAL:
            assert status_word(status, activity) == told[status]
    assert set(ACTIVE) == set(Activity)
    assert set(ENDED) == set(TERMINAL)


@pytest.mark.parametrize(
    ("kind", "status", "frame"),
    [
        (RUN, "started", "running"),
        (RUN, "blocked", "needs_attention"),
        (RUN, "dead", "needs_attention"),
        (RUN, "requeued", "queued"),
        (RUN, "paused", "paused"),
        (STEP, "started", "running"),
        (REMOTE, "dispatched", "running"),
        (REMOTE, "published", None),
        (STEP, "late", None),
        (STEP, "retrying", "retrying"),
        (REMOTE, "cancelled", "cancelled"),
        (TIMER, "fired", None),
        ("patched", "marked", None),
        ("from.a.newer.version", "odd", None),
    ],
)
def test_a_row_is_at_most_one_frame(kind: str, status: str, frame: str | None) -> None:
    """What says something to a watcher is a frame, the rest is none; a kind nobody knows yet is passed over."""
    found = frame_of("r", Entry(3, 1_000_000, kind, status, key="k", ordinal=0))
    assert (found and getattr(found, "status", None)) == frame


def test_a_log_row_that_is_broken_is_still_a_line() -> None:
    """A payload that is no object gives an empty line, not an error in somebody's stream."""
    for payload in (None, b"[]", b"{", b'"x"'):
        found = frame_of("r", Entry(1, 0, LOG, "written", payload=payload))
        assert found is not None
        assert (found.level, found.message) == ("info", "")  # type: ignore[union-attr]


def test_steps_from_a_journal() -> None:
    """A step that was tried twice is one step with its last state; order is that of the first call."""
    rows = [
        Entry(1, 10, RUN, "started"),
        Entry(2, 20, REMOTE, "dispatched", key="b", ordinal=1, name="b", attempt=1, payload=b'{"input":{"x":1}}'),
        Entry(
            3,
            30,
            STEP,
            "retrying",
            key="a",
            ordinal=0,
            name="a",
            attempt=1,
            payload=b'{"error":{"message":"no"},"next_at":40}',
        ),
        Entry(
            4,
            60,
            STEP,
            "completed",
            key="a",
            ordinal=0,
            name="a",
            attempt=2,
            payload=b"7",
            started_at=50,
            finished_at=60,
        ),
    ]
    first, second = step_views(rows)
    assert (first.key, first.status, first.attempt, bytes(first.output)) == ("a", "completed", 2, b"7")  # type: ignore[arg-type]
    assert (second.key, second.status, bytes(second.input)) == ("b", "running", b'{"x":1}')  # type: ignore[arg-type]


def test_times() -> None:
    """Milliseconds, UTC, with a Z."""
    assert iso(1_700_000_000_123_456) == "2023-11-14T22:13:20.123Z"


async def test_waits_for_events_end() -> None:
    """A wait for an event is completed once its event has come, also where that was there before it, or its time is up; the
    event's data is its output."""
    app = Durable("memory://")

    @app.workflow
    async def waits(ctx: Context) -> None:
        await ctx.wait_for_event("a", match={"n": 1})
        await ctx.wait_for_event("b", timeout="10ms", default=None)
        await ctx.wait_for_event("a", match={"n": 2})
        await ctx.wait_for_event("a", timeout="1h")

    async with app:
        run = await app.start(waits)
        for n in (1, 2):
            await app.send_event("a", {"n": n})
        entries = []
        async for entry in app.watch(run.id):
            entries.append(entry)
            if (entry.key, entry.status) == ("event:a:2", "opened"):
                break
        found = [step for step in step_views(entries) if step.kind == "wait"]
    assert [(step.key, step.status, step.output) for step in found] == [
        ("event:a", "completed", Raw(b'{"n":1}')),
        ("event:b", "completed", UNSET),
        ("event:a:1", "completed", Raw(b'{"n":2}')),
        ("event:a:2", "running", UNSET),
    ]
