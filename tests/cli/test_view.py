"""What a timeline says: how long things waited, how long they ran, and what is told only once."""

from __future__ import annotations

from durable.cli.view import Teller, executing_time, short_id
from durable.core.journal import REMOTE, RUN, STEP, TIMER, Entry

MS = 1_000


def test_bodies_that_overlap_count_once() -> None:
    """Executing time is the time in which at least one body ran."""
    assert executing_time([(0, 10), (5, 15), (5, 7), (20, 30)]) == 25
    assert executing_time([]) == 0


def test_a_task_waits_from_dispatch_to_pick_up() -> None:
    """A remote step has waited since it was dispatched, and ran as long as its worker says."""
    teller = Teller()
    teller.tell(Entry(1, 0, RUN, "started"))
    teller.tell(Entry(2, 10 * MS, REMOTE, "dispatched", key="charge", attempt=1))
    row = teller.tell(Entry(3, 90 * MS, REMOTE, "completed", key="charge", started_at=30 * MS, finished_at=80 * MS))
    assert (row.waited, row.ran) == (20 * MS, 50 * MS)


def test_a_retry_waits_since_the_failure() -> None:
    """The second attempt has waited since the first was over."""
    teller = Teller()
    note = b'{"error": {"message": "no"}, "next_at": 1030000}'
    first = teller.tell(
        Entry(2, 30 * MS, STEP, "retrying", key="a", attempt=1, payload=note, started_at=0, finished_at=30 * MS)
    )
    second = teller.tell(
        Entry(3, 1_100 * MS, STEP, "completed", key="a", attempt=2, started_at=1_030 * MS, finished_at=1_090 * MS)
    )
    assert first.note == "no; next try in 1.00 s"
    assert (second.waited, second.ran) == (1_000 * MS, 60 * MS)
    assert executing_time(teller.executing) == 90 * MS


def test_a_timer_waits_since_what_came_before() -> None:
    """Only its firing is journaled; the row before tells since when."""
    teller = Teller()
    teller.tell(Entry(1, 5 * MS, RUN, "started"))
    assert teller.tell(Entry(2, 3_005 * MS, TIMER, "fired", name="sleep")).waited == 3_000 * MS


def test_a_task_sent_again_is_told_as_that() -> None:
    """After a take-over the same attempt is published again, and says so; another attempt is another task."""
    teller = Teller()
    told = [
        teller.tell(Entry(n, n, REMOTE, "published", key="charge", attempt=attempt)).what
        for n, attempt in enumerate((1, 1, 2), 1)
    ]
    assert [what.endswith("again") for what in told] == [False, True, False]


def test_broken_payloads_are_told_too() -> None:
    """A row whose payload is not what it should be is shown all the same."""
    for kind, status in (
        (STEP, "failed"),
        (STEP, "retrying"),
        (RUN, "blocked"),
        (RUN, "started"),
        ("log", "written"),
        ("child", "started"),
    ):
        for payload in (None, b"", b"\xff", b"[]", b"3", b'{"error": 5, "fields": 7, "message": {}}'):
            Teller().tell(Entry(1, 1, kind, status, key="k", payload=payload))


def test_a_child_is_told_by_its_family() -> None:
    """The short name of a run is an end of its id, and a child's says whose it is."""
    parent = "01a1feb5-01bb-7290-888c-97e87a2df9a7"
    assert short_id(parent) == "2df9a7"
    assert short_id(f"{parent}.child.3.child.1") == "2df9a7.child.3.child.1"
