"""What there is: dicts, and the few orders kept beside them."""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
from heapq import heappop, heappush
from itertools import count

from msgspec import Struct, field

from durable.core.journal import Entry
from durable.store.admission import EventRecord
from durable.store.hints import Listeners
from durable.store.items import Item
from durable.store.lanes import LaneId, Workflow
from durable.store.records import InboxRow, Lane, OpenWaiter, Route, RunRecord

Ended = tuple[int, str]
"""(finished_at, run id): the order of pruning."""
Ready = tuple[int, int, str, int]
"""(minus priority, wake_at, run id, wake_at), or of a lane (class, rank, run id, wake_at): the order of claiming."""


class Line:
    """Unowned runs of one route and lane, by due time. Entries are never removed when a run changes, only checked when
    met."""

    __slots__ = ("later", "ready")

    def __init__(self) -> None:
        self.later: list[tuple[int, str]] = []
        self.ready: list[Ready] = []


class Engine:
    __slots__ = ("dead", "expires_at")

    def __init__(self, expires_at: int) -> None:
        self.expires_at = expires_at
        self.dead = False


class Window(Struct):
    """A run that events may still join, until it is due."""

    run_id: str
    opened_at: int
    members: int = 1


class History(Struct):
    """Moments of a sliding window, rising, as far back as they count."""

    period_us: int
    times: list[int] = field(default_factory=list)

    def since(self, now: int) -> list[int]:
        """Those in the window that ends now."""
        return self.times[bisect_right(self.times, now - self.period_us) :]

    def add(self, now: int, period_us: int) -> None:
        self.period_us = period_us
        self.times = self.since(now)
        insort(self.times, now)


class Places:
    """Slots of one key: number → holder."""

    __slots__ = ("_freed", "holders")

    def __init__(self) -> None:
        self.holders: dict[int, str] = {}
        self._freed: list[int] = []

    def take(self, run_id: str, number: int | None = None) -> int:
        """This one, or the lowest that is free."""
        if number is None:
            number = heappop(self._freed) if self._freed else len(self.holders)
            if number in self.holders:  # it was given by number
                number = next(n for n in count() if n not in self.holders)
        self.holders[number] = run_id
        return number

    def free(self, number: int) -> None:
        del self.holders[number]
        heappush(self._freed, number)


class Tables:
    """What handles on the same data share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.listeners = Listeners()
        # runs
        self.runs: dict[str, RunRecord] = {}
        self.journals: dict[str, list[Entry]] = {}
        self.inboxes: dict[str, list[InboxRow]] = {}
        self.message_ids: set[tuple[str, str]] = set()
        self.keys: dict[tuple[str, str, str], str] = {}
        self.children: dict[str, list[str]] = {}
        self.ended: dict[Workflow, list[Ended]] = {}
        """Finished runs by workspace and workflow, in the order in which they go."""
        # claims
        self.lines: dict[Route, dict[str | None, Line]] = {}
        """By route, then by key of the lane."""
        self.owned: dict[str, dict[str, None]] = {}
        self.engines: dict[str, Engine] = {}
        # lanes
        self.lanes: dict[LaneId, Lane] = {}
        """As the newest run has it."""
        self.first_due: dict[str, int] = {}
        """By run with a lane: the wake time it had when it first began, or has now."""
        self.slots: dict[str, list[tuple[str, int]]] = {}
        """By holder: (key, number)."""
        self.places: dict[str, Places] = {}
        """The same by key."""
        self.begun: dict[str, History] = {}
        """By throttle: when runs began."""
        self.finish: dict[tuple[LaneId, int], float] = {}
        self.clock: dict[tuple[Workflow, int], float] = {}
        # events
        self.events: dict[str, EventRecord] = {}
        """In the order of their numbers."""
        self.accepted = 0
        """The last event's number."""
        self.dedupe_ids: dict[tuple[str, str], str] = {}
        self.waiters: dict[str, dict[str, OpenWaiter]] = {}
        """By run, by id."""
        self.awaited: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
        """The same by workspace and event: (run id, id), in the order opened."""
        self.rates: dict[str, History] = {}
        """By rule: when it admitted."""
        self.windows: dict[str, Window] = {}
        """By key of a debounce or batch."""
        self.singletons: dict[str, str] = {}
        """By key: the newest run."""
        # items
        self.items: dict[tuple[str, str, str], Item] = {}
        """By kind, workspace and id."""
        self.fires: set[tuple[str, int]] = set()
        self.fired: dict[str, list[tuple[str, int]]] = {}
        """By run: the occurrences it was started for."""
