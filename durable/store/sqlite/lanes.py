"""Lanes in tables: what the pure rules (durable/store/lanes.py) ask for is read, and what they decide is written, all in the
claim's transaction; the one writer makes counting exact.

A due run with a lane is marked `ready` and from then on stands in an index in the order of its lane, `standing`: its rank,
and far below that once it has begun, so that the begun go first.
"""

from __future__ import annotations

import heapq
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import msgspec

from durable.store.admission import LimitState
from durable.store.interface import AGEING_US
from durable.store.lanes import (
    SLOTS,
    THROTTLE,
    Free,
    LaneId,
    Ledger,
    Pick,
    Queue,
    Waiting,
    Workflow,
    choose,
    lacking,
    opens_at,
)
from durable.store.records import NewRun, Rule
from durable.store.sqlite.schema import LANED_LATER, LANED_READY, of
from durable.store.sqlite.statements import execute_values, fetch_packed, listed

BEGUN = 1 << 60
"""How far below its rank a run stands that has begun before."""

_ROUTES = (
    "SELECT DISTINCT json_extract(value, '$[0]') AS workspace, json_extract(value, '$[1]') AS workflow,"
    " json_extract(value, '$[2]') AS version FROM json_each(?)"
)
_ROUTE = "x.workspace = routes.workspace AND x.workflow = routes.workflow AND x.version = routes.version"

READY_AT_ONCE = 5_000
"""Runs that one claim marks as ready at most."""

_decode_rules = msgspec.json.Decoder(tuple[Rule, ...]).decode


class Candidate(NamedTuple):
    """A run that may be taken. In the order of claiming: sorted."""

    below: int
    """Minus its priority."""
    wake_at: int
    number: int
    run_id: str = ""
    """Known where it is asked for: of orphans."""
    crashed: bool = False
    lane: LaneId | None = None


class Due(NamedTuple):
    """What is due without a lane; and whether there is anything with one."""

    free: list[Candidate]
    next_at: int | None
    laned: bool


class Picked(NamedTuple):
    runs: list[Candidate]
    next_at: int | None


class _Lane(NamedTuple):
    rules: tuple[Rule, ...]
    weight: float


_NO_LANE = _Lane((), 1.0)


def keep(cx: sqlite3.Connection, runs: Sequence[NewRun]) -> None:
    """The lanes of these new runs are as the last of each says."""
    rows = {
        (run.workspace, run.workflow, run.lane.key): (
            msgspec.json.encode(run.lane.rules).decode(),
            run.lane.weight,
        )
        for run in runs
        if run.lane is not None
    }
    if rows:
        execute_values(cx, _keep_text, [(*lane, *terms) for lane, terms in rows.items()])


def _keep_text(values: str) -> str:
    return f"""
        INSERT INTO lanes (workspace, workflow, key, rules, weight)
        SELECT * FROM ({values}) WHERE column1 IS NOT NULL
        ON CONFLICT (workspace, workflow, key) DO UPDATE SET rules = excluded.rules, weight = excluded.weight
        WHERE rules <> excluded.rules OR weight <> excluded.weight"""


# ------------------------------------------------------------------ a claim


def probe(cx: sqlite3.Connection, routes: str, now: int) -> tuple[bool, int | None]:
    """Whether a run with a lane is due on these routes, and if none is, when the next will be: two seeks a route."""
    queued, wake_at = cx.execute(
        f"""
        WITH routes AS ({_ROUTES})
        SELECT
          (SELECT max(EXISTS (SELECT 1 FROM runs x WHERE {_ROUTE} AND {of("x", LANED_READY)})) FROM routes),
          (SELECT min((SELECT min(x.wake_at) FROM runs x WHERE {_ROUTE} AND {of("x", LANED_LATER)})) FROM routes)""",
        [routes],
    ).fetchone()
    if wake_at is not None and wake_at <= now:
        return True, None
    return bool(queued), wake_at


def pick(cx: sqlite3.Connection, orphans: Sequence[Candidate], due: Due, routes: str, limit: int, now: int) -> Picked:
    """Whose turn it is, slots and turns written down. `routes` is a JSON list of (workspace, workflow, version)."""
    lanes = _Lanes(cx)
    free = list(due.free)
    lost: list[Candidate] = []
    held = _held(cx, [orphan.run_id for orphan in orphans if orphan.lane is not None])
    lanes.load({orphan.lane for orphan in orphans if orphan.lane is not None})
    for orphan in orphans:
        lacks = orphan.lane is not None and lacking(lanes[orphan.lane].rules, held.get(orphan.run_id, ()))
        (lost if lacks else free).append(orphan)
    crashed = {orphan.number for orphan in lost if orphan.crashed}
    _set_free(cx, [orphan.number for orphan in lost], now)
    flooded = _mark_ready(cx, routes, now)

    heads = _heads(cx, routes)
    lanes.load({head.lane for head in heads})
    holders = _holders(cx, routes)
    lanes.load({holder.lane for holder in holders})
    by_id: dict[str, Candidate] = {}
    waiting: dict[LaneId, list[Waiting]] = {}
    for holder in holders:
        lacks = lacking(lanes[holder.lane].rules, holder.keys)
        candidate = Candidate(
            -holder.priority, holder.wake_at, holder.number, holder.run_id, holder.number in crashed, holder.lane
        )
        by_id[holder.run_id] = candidate
        if lacks:
            one = Waiting(holder.run_id, holder.priority, _rank(holder.standing), lacks, holder.standing >= _NEW_ABOVE)
            waiting.setdefault(holder.lane, []).append(one)
        else:
            free.append(candidate)
    skip = set(by_id)

    lines: dict[LaneId, list[Iterator[_Line]]] = {}
    for head in heads:
        lines.setdefault(head.lane, []).append(_line(cx, head, limit + 1))
    queues = []
    for lane in dict.fromkeys([*waiting, *lines]):
        terms = lanes[lane]
        first = sorted(waiting.get(lane, ()), key=lambda one: (one.rank, one.run_id))
        rest = _waiting(lines.get(lane, ()), lane, terms, skip, by_id, crashed)
        queues.append(Queue(lane, terms.rules, terms.weight, chain(first, rest)))

    free.sort()
    known = {one.run_id or str(one.number): one for one in free}
    choice = choose(
        (Free(key, -one.below, one.wake_at) for key, one in known.items()),
        queues,
        _ledger(cx, queues, lanes, now),
        limit,
        now,
    )
    picked = [(one, known[one.run_id] if one.lane is None else by_id[one.run_id]) for one in choice.picks]
    _write_turns(cx, [(one, candidate) for one, candidate in picked if one.lane is not None], lanes, now)
    _take_out(cx, [candidate.number for _, candidate in picked if candidate.lane is not None])
    return Picked(
        [candidate for _, candidate in picked], _next_at(cx, due, routes, choice.opens_at, now, choice.more or flooded)
    )


def _next_at(cx: sqlite3.Connection, due: Due, routes: str, opens_at: int | None, now: int, more: bool) -> int | None:
    if more:
        return now
    later = cx.execute(
        f"WITH routes AS ({_ROUTES}) SELECT min((SELECT min(x.wake_at) FROM runs x"
        f" WHERE {_ROUTE} AND {of('x', LANED_LATER)} AND x.wake_at > ?)) FROM routes",
        [routes, now],
    ).fetchone()[0]
    return min((at for at in (due.next_at, opens_at, later) if at is not None), default=None)


_NEW_ABOVE = -(BEGUN >> 1)


def _rank(standing: int) -> int:
    return standing if standing >= _NEW_ABOVE else standing + BEGUN


def _set_free(cx: sqlite3.Connection, numbers: Sequence[int], now: int) -> None:
    """Orphans that must queue, for they lack a slot: unowned, under a new epoch."""
    if numbers:
        cx.execute(
            """
            UPDATE runs SET
              recovery_attempts = recovery_attempts + (activity = 'executing'),
              activity = CASE activity WHEN 'executing' THEN 'queued' ELSE activity END,
              owner = NULL, epoch = epoch + 1, wake_at = :now, updated_at = :now
            WHERE number IN (SELECT value FROM json_each(:numbers))""",
            {"now": now, "numbers": listed(numbers)},
        )


def _mark_ready(cx: sqlite3.Connection, routes: str, now: int) -> bool:
    """Those that have come due since. True: there may be more of them."""
    marked = cx.execute(
        f"""
        UPDATE runs SET
          ready = 1,
          standing = CASE WHEN started_at IS NULL THEN wake_at - priority * {AGEING_US} ELSE standing END
        WHERE number IN (
          SELECT x.number FROM ({_ROUTES}) routes CROSS JOIN runs x
          WHERE {_ROUTE} AND {of("x", LANED_LATER)} AND x.wake_at <= ? LIMIT {READY_AT_ONCE})""",
        [routes, now],
    ).rowcount
    return marked >= READY_AT_ONCE


class _Head(NamedTuple):
    """The lane of a route that has a run ready."""

    workspace: str
    workflow: str
    version: str
    key: str

    @property
    def lane(self) -> LaneId:
        return self.workspace, self.workflow, self.key


def _heads(cx: sqlite3.Connection, routes: str) -> list[_Head]:
    """One seek in the index for each."""
    text = f"""
        WITH RECURSIVE
        routes AS ({_ROUTES}),
        heads(workspace, workflow, version, key) AS (
          SELECT workspace, workflow, version, (
            SELECT min(x.lane) FROM runs x WHERE {_ROUTE} AND {of("x", LANED_READY)})
          FROM routes
          UNION ALL
          SELECT workspace, workflow, version, (
            SELECT min(x.lane) FROM runs x
            WHERE {_ROUTE.replace("routes.", "heads.")} AND {of("x", LANED_READY)} AND x.lane > heads.key)
          FROM heads WHERE key IS NOT NULL)
        SELECT json_group_array(json_array(workspace, workflow, version, key)) FROM heads WHERE key IS NOT NULL"""
    return [_Head(*row) for row in json.loads(cx.execute(text, [routes]).fetchone()[0])]


class _Line(NamedTuple):
    """A ready run. In the order of its lane: sorted."""

    standing: int
    run_id: str
    number: int
    priority: int
    wake_at: int


_LINE_TEXT = (
    "SELECT standing, id, number, priority, wake_at FROM runs"
    " WHERE workspace = ? AND workflow = ? AND version = ? AND lane = ? AND (standing, id) > (?, ?)"
    f" AND {LANED_READY} ORDER BY standing, id LIMIT ?"
)


def _line(cx: sqlite3.Connection, head: _Head, most: int) -> Iterator[_Line]:
    """The first of that lane, read as they are asked for: of many lanes no more is looked at than the head."""
    after: tuple[int, str] = (-(1 << 62), "")
    size = 1
    while rows := cx.execute(_LINE_TEXT, (*head, *after, size)).fetchall():
        for row in rows:
            yield _Line(*row)
        after = rows[-1][:2]
        size = most


def _waiting(
    lines: Iterable[Iterator[_Line]],
    lane: LaneId,
    terms: _Lane,
    skip: set[str],
    by_id: dict[str, Candidate],
    crashed: set[int],
) -> Iterator[Waiting]:
    """Those in line that hold no slot, each noted in `by_id` as it is met."""
    lacks = lacking(terms.rules, ())
    for standing, run_id, number, priority, wake_at in heapq.merge(*lines):
        if run_id not in skip:
            by_id[run_id] = Candidate(-priority, wake_at, number, run_id, number in crashed, lane)
            yield Waiting(run_id, priority, _rank(standing), lacks, standing >= _NEW_ABOVE)


# ------------------------------------------------------------------ slots, throttles, turns


class _Lanes:
    """Their terms, read once."""

    def __init__(self, cx: sqlite3.Connection) -> None:
        self._cx = cx
        self._known: dict[LaneId, _Lane] = {}

    def __getitem__(self, lane: LaneId) -> _Lane:
        return self._known.get(lane, _NO_LANE)

    def load(self, lanes: Iterable[LaneId]) -> None:
        wanted = [lane for lane in lanes if lane not in self._known]
        if not wanted:
            return
        rows = fetch_packed(
            self._cx,
            "json_each(?) w JOIN lanes l ON l.workspace = json_extract(w.value, '$[0]')"
            " AND l.workflow = json_extract(w.value, '$[1]') AND l.key = json_extract(w.value, '$[2]')",
            [listed(wanted)],
            "l.workspace, l.workflow, l.key, l.rules, l.weight",
        )
        for workspace, workflow, key, rules, weight in rows:
            self._known[workspace, workflow, key] = _Lane(_decode_rules(rules), weight)


class _Holder(NamedTuple):
    """A due run that holds slots still."""

    run_id: str
    number: int
    priority: int
    wake_at: int
    standing: int
    lane: LaneId
    keys: list[str]


def _holders(cx: sqlite3.Connection, routes: str) -> list[_Holder]:
    """There are no more of them than slots."""
    rows = fetch_packed(
        cx,
        f"slots s CROSS JOIN runs x ON x.id = s.run_id JOIN ({_ROUTES}) routes ON {_ROUTE}"
        f" WHERE {of('x', LANED_READY).replace('x.lane IS NOT NULL', '+x.lane IS NOT NULL')}",
        [routes],
        "x.id, x.number, x.priority, x.wake_at, x.standing, x.workspace, x.workflow, x.lane, s.key",
    )
    found: dict[str, _Holder] = {}
    for run_id, number, priority, wake_at, standing, workspace, workflow, lane, key in rows:
        if run_id not in found:
            found[run_id] = _Holder(run_id, number, priority, wake_at, standing, (workspace, workflow, lane), [])
        found[run_id].keys.append(key)
    return list(found.values())


def _held(cx: sqlite3.Connection, run_ids: Sequence[str]) -> dict[str, list[str]]:
    held: dict[str, list[str]] = {}
    if run_ids:
        rows = fetch_packed(
            cx, "slots WHERE run_id IN (SELECT value FROM json_each(?))", [listed(run_ids)], "run_id, key"
        )
        for run_id, key in rows:
            held.setdefault(run_id, []).append(key)
    return held


def _ledger(cx: sqlite3.Connection, queues: Sequence[Queue], lanes: _Lanes, now: int) -> Ledger:
    rules = {(rule.kind, rule.key): rule for queue in queues for rule in queue.rules}
    finish, clock = _turns(cx, {queue.id[:2] for queue in queues})
    return Ledger(
        used=used(cx, [key for kind, key in rules if kind == SLOTS]),
        begun=ticks(cx, THROTTLE, [key for kind, key in rules if kind == THROTTLE]),
        finish=finish,
        clock=clock,
    )


def used(cx: sqlite3.Connection, keys: Sequence[str]) -> dict[str, int]:
    """How many hold a slot of each."""
    if not keys:
        return {}
    rows = fetch_packed(
        cx,
        "(SELECT key, count(*) AS used FROM slots WHERE key IN (SELECT value FROM json_each(?)) GROUP BY key)",
        [listed(keys)],
        "key, used",
    )
    return dict(rows)


def ticks(cx: sqlite3.Connection, kind: str, keys: Sequence[str]) -> dict[str, list[int]]:
    """When each throttle (or rate) let one through, rising, as far back as it may count."""
    found: dict[str, list[int]] = {}
    if keys:
        rows = fetch_packed(
            cx, "ticks WHERE kind = ? AND key IN (SELECT value FROM json_each(?))", [kind, listed(keys)], "key, at"
        )
        for key, at in sorted(rows):
            found.setdefault(key, []).append(at)
    return found


def add_ticks(cx: sqlite3.Connection, kind: str, rows: Sequence[tuple[str, int, str]], now: int) -> None:
    """(key, period_us, run id) of those let through now. What counts no more goes."""
    if rows:
        periods = {key: period_us for key, period_us, _ in rows}
        execute_values(cx, _old_ticks_text, [(key, kind, now - period_us) for key, period_us in periods.items()])
        execute_values(cx, _ticks_text, [(kind, key, now, run_id, now + period_us) for key, period_us, run_id in rows])


def _old_ticks_text(values: str) -> str:
    return f"""
        WITH v(key, kind, before) AS ({values})
        DELETE FROM ticks WHERE (kind, key, at, run_id) IN (
          SELECT t.kind, t.key, t.at, t.run_id
          FROM v CROSS JOIN ticks t ON t.kind = v.kind AND t.key = v.key AND t.at <= v.before)"""


def _ticks_text(values: str) -> str:
    return (
        f"INSERT OR IGNORE INTO ticks (kind, key, at, run_id, until) SELECT * FROM ({values}) WHERE column1 IS NOT NULL"
    )


def _turns(
    cx: sqlite3.Connection, workflows: Iterable[Workflow]
) -> tuple[dict[tuple[LaneId, int], float], dict[tuple[Workflow, int], float]]:
    rows = fetch_packed(
        cx,
        "json_each(?) w JOIN turns t ON t.workspace = json_extract(w.value, '$[0]')"
        " AND t.workflow = json_extract(w.value, '$[1]')",
        [listed(list(workflows))],
        "t.workspace, t.workflow, t.lane, t.priority, t.start, t.finish",
    )
    finishes: dict[tuple[LaneId, int], float] = {}
    clock: dict[tuple[Workflow, int], float] = {}
    for workspace, workflow, lane, priority, start, finish in rows:
        finishes[(workspace, workflow, lane), priority] = finish
        one = (workspace, workflow), priority
        clock[one] = max(clock.get(one, 0.0), start)
    return finishes, clock


def _write_turns(cx: sqlite3.Connection, taken: Sequence[tuple[Pick, Candidate]], lanes: _Lanes, now: int) -> None:
    if not taken:
        return
    _give_slots(cx, [(key, one.run_id) for one, _ in taken for key in one.takes])
    begins = []
    turns: dict[tuple[str, str, str, int], tuple[float, float]] = {}
    clock: dict[tuple[str, str, int], float] = {}
    for one, _ in taken:
        if one.lane is None:
            continue
        periods = {rule.key: rule.period_us for rule in lanes[one.lane].rules if rule.kind == THROTTLE}
        begins += [(key, periods[key], one.run_id) for key in one.begins]
        turns[*one.lane, one.priority] = (one.start, one.finish)
        clock[*one.lane[:2], one.priority] = one.start
    add_ticks(cx, THROTTLE, begins, now)
    execute_values(cx, _turns_text, [(*lane, *times) for lane, times in turns.items()])
    execute_values(cx, _forget_turns_text, [(*one, at) for one, at in clock.items()])


def _turns_text(values: str) -> str:
    return f"""
        INSERT INTO turns (workspace, workflow, lane, priority, start, finish)
        SELECT * FROM ({values}) WHERE column1 IS NOT NULL
        ON CONFLICT (workspace, workflow, lane, priority) DO UPDATE SET start = excluded.start, finish = excluded.finish"""


def _forget_turns_text(values: str) -> str:
    """What the clock has passed says nothing any more."""
    return f"""
        WITH v(workspace, workflow, priority, clock) AS ({values})
        DELETE FROM turns WHERE (workspace, workflow, lane, priority) IN (
          SELECT t.workspace, t.workflow, t.lane, t.priority FROM v JOIN turns t
            ON t.workspace = v.workspace AND t.workflow = v.workflow
          WHERE t.priority = v.priority AND t.finish <= v.clock)"""


def _give_slots(cx: sqlite3.Connection, wanted: Sequence[tuple[str, str]]) -> None:
    """(key, run id): each gets the lowest number that is free."""
    if not wanted:
        return
    taken: dict[str, set[int]] = {}
    for key, number in fetch_packed(
        cx,
        "slots WHERE key IN (SELECT value FROM json_each(?))",
        [listed(list(dict.fromkeys(key for key, _ in wanted)))],
        "key, number",
    ):
        taken.setdefault(key, set()).add(number)
    rows = []
    for key, run_id in wanted:
        numbers = taken.setdefault(key, set())
        number = next(n for n in range(len(numbers) + 1) if n not in numbers)
        numbers.add(number)
        rows.append((key, number, run_id))
    execute_values(cx, _slots_text, rows)


def _slots_text(values: str) -> str:
    """Held from the epoch on that the run gets by this claim."""
    return f"""
        WITH v(key, number, run_id) AS ({values})
        INSERT INTO slots (key, number, run_id, epoch)
        SELECT v.key, v.number, r.id, r.epoch + 1 FROM v JOIN runs r ON r.id = v.run_id"""


def _take_out(cx: sqlite3.Connection, numbers: Sequence[int]) -> None:
    """These queue no more; next time they stand among those that have begun."""
    if numbers:
        cx.execute(
            f"""
            UPDATE runs SET
              ready = 0,
              standing = CASE WHEN started_at IS NULL THEN standing - {BEGUN} ELSE standing END
            WHERE number IN (SELECT value FROM json_each(?))""",
            [listed(numbers)],
        )


# ------------------------------------------------------------------ blocked runs


def queue_blocked(cx: sqlite3.Connection, routes: str, now: int) -> None:
    """Blocked runs that lack a slot are tried again when their lane lets them."""
    blocked = fetch_packed(
        cx,
        f"runs x INDEXED BY runs_blocked JOIN ({_ROUTES}) routes ON {_ROUTE}"
        " WHERE x.activity = 'blocked' AND x.status = 'active' AND x.owner IS NULL AND x.lane IS NOT NULL",
        [routes],
        "x.number, x.id, x.workspace, x.workflow, x.lane",
    )
    if not blocked:
        return
    lanes = _Lanes(cx)
    lanes.load({(workspace, workflow, lane) for _, _, workspace, workflow, lane in blocked})
    held = _held(cx, [run_id for _, run_id, *_ in blocked])
    queue = [
        number
        for number, run_id, workspace, workflow, lane in blocked
        if lacking(lanes[workspace, workflow, lane].rules, held.get(run_id, ()))
    ]
    if queue:
        cx.execute(
            "UPDATE runs SET activity = 'queued', error = NULL, wake_at = ?, updated_at = ?"
            " WHERE number IN (SELECT value FROM json_each(?))",
            [now, now, listed(queue)],
        )


# ------------------------------------------------------------------ how things stand


def limits(cx: sqlite3.Connection, workspace: str, workflow: str | None, now: int) -> list[LimitState]:
    which = "l.workspace = ? AND (? IS NULL OR l.workflow = ?)"
    parameters = [workspace, workflow, workflow]
    rows = fetch_packed(
        cx,
        f"lanes l WHERE {which}",
        parameters,
        "l.workflow, l.key, l.rules, l.weight, EXISTS (SELECT 1 FROM runs r WHERE r.workspace = l.workspace"
        " AND r.workflow = l.workflow AND r.lane = l.key AND r.lane IS NOT NULL AND r.status = 'active')",
    )
    waiting = _waiting_counts(cx, workspace, workflow, now)
    terms = {(name, key): _Lane(_decode_rules(rules), weight) for name, key, rules, weight, _ in rows}
    inside = {(name, key) for name, key, *_, active in rows if active}
    rules = {(rule.kind, rule.key) for lane in terms.values() for rule in lane.rules}
    slots = used(cx, [key for kind, key in rules if kind == SLOTS])
    begun = ticks(cx, THROTTLE, [key for kind, key in rules if kind == THROTTLE])
    states = []
    for (name, lane), (lane_rules, weight) in sorted(terms.items(), key=lambda one: one[0]):
        due = waiting.get((name, lane), _Count(0, 0, {}))
        for rule in lane_rules:
            if rule.kind == SLOTS:
                count = slots.get(rule.key, 0)
                queued, next_at = due.all - due.holding.get(rule.key, 0), None
            else:
                times = [at for at in begun.get(rule.key, ()) if at > now - rule.period_us]
                count = len(times)
                queued, next_at = due.new, opens_at(rule, times, now)
            if count or (name, lane) in inside:
                state = (rule.key, rule.kind, rule.limit, rule.period_us, count, queued, weight, next_at)
                states.append(LimitState(name, lane, *state))
    return states


class _Count(NamedTuple):
    """Due runs of a lane."""

    all: int
    new: int
    holding: dict[str, int]
    """By slot."""


def _waiting_counts(
    cx: sqlite3.Connection, workspace: str, workflow: str | None, now: int
) -> dict[tuple[str, str], _Count]:
    counts: dict[tuple[str, str], _Count] = {}
    for condition, late in ((LANED_READY, ""), (LANED_LATER, "AND x.wake_at <= ?")):
        due = f"x.workspace = ? AND (? IS NULL OR x.workflow = ?) AND {of('x', condition)} {late}"
        parameters: list[Any] = [workspace, workflow, workflow, *([now] if late else [])]
        rows = fetch_packed(
            cx,
            "(SELECT workflow, lane, count(*) AS runs, sum(started_at IS NULL) AS new"
            f" FROM runs x WHERE {due} GROUP BY workflow, lane)",
            parameters,
            "workflow, lane, runs, new",
        )
        for name, lane, runs, new in rows:
            before = counts.get((name, lane), _Count(0, 0, {}))
            counts[name, lane] = _Count(before.all + runs, before.new + new, before.holding)
        for name, lane, key in fetch_packed(
            cx, f"slots s CROSS JOIN runs x ON x.id = s.run_id WHERE {due}", parameters, "x.workflow, x.lane, s.key"
        ):
            holding = counts[name, lane].holding
            holding[key] = holding.get(key, 0) + 1
    return counts
