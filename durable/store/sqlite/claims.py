"""Who owns what: heartbeats, claims, releases. The epoch is raised at every claim, so a wrong guess about who is alive
costs a takeover and never a double commit."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from durable.store.records import Beat, Claim, ClaimedRun, ClaimRequest, Route, RunRecord
from durable.store.sqlite import lanes, runs
from durable.store.sqlite.connection import atomic
from durable.store.sqlite.lanes import Candidate, Due
from durable.store.sqlite.schema import DUE, LANED_LATER, LANED_READY, of
from durable.store.sqlite.statements import execute_values, fetch_packed, listed

_NOTHING = Claim([], None)
_ROUTES = (
    "(workspace, workflow, version) IN (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'),"
    " json_extract(value, '$[2]') FROM json_each(?))"
)
_UNPARKED = "activity NOT IN ('paused', 'blocked')"


def _listed(routes: Sequence[Route]) -> str:
    """A parameter for `_ROUTES`, in the order of the due index."""
    return listed([(route.workspace, route.workflow, route.version) for route in routes])


class Taken(Struct, frozen=True):
    """A claim, and the engines it has declared dead."""

    claim: Claim
    dead: list[str]


def beat(cx: sqlite3.Connection, incarnation: str, lease_us: int, now: int) -> Beat:
    changed = cx.execute(
        "INSERT INTO engines VALUES (?, ?, 0) ON CONFLICT (incarnation)"
        " DO UPDATE SET expires_at = excluded.expires_at WHERE NOT dead",
        (incarnation, now + lease_us),
    ).rowcount
    return Beat(now, changed > 0)


def leave(cx: sqlite3.Connection, incarnation: str) -> None:
    with atomic(cx):
        cx.execute("DELETE FROM engines WHERE incarnation = ?", (incarnation,))


def owned(cx: sqlite3.Connection, incarnation: str) -> list[tuple[str, int]]:
    return [(run_id, epoch) for run_id, epoch in fetch_packed(cx, "runs WHERE owner = ?", [incarnation], "id, epoch")]


def release(cx: sqlite3.Connection, held: Sequence[tuple[str, int]], now: int) -> int:
    if not held:
        return 0
    with atomic(cx):
        execute_values(cx, _free_text, list(held))
        return execute_values(cx, _release_text, list(held), now, now)


def _free_text(values: str) -> str:
    return f"""
        WITH v(id, epoch) AS ({values})
        DELETE FROM slots WHERE run_id IN (
          SELECT r.id FROM v JOIN runs r ON r.id = v.id AND r.epoch = v.epoch AND r.owner IS NOT NULL
          WHERE r.lane IS NOT NULL)"""


def _release_text(values: str) -> str:
    return f"""
        WITH v(id, epoch) AS ({values})
        UPDATE runs SET
          owner = NULL,
          updated_at = ?,
          activity = CASE activity WHEN 'executing' THEN 'queued' ELSE activity END,
          wake_at = CASE WHEN {_UNPARKED} THEN ? ELSE wake_at END
        FROM v WHERE runs.id = v.id AND runs.epoch = v.epoch AND runs.owner IS NOT NULL"""


def claim(
    cx: sqlite3.Connection, request: ClaimRequest, now: int, vanished: Callable[[Sequence[str]], Sequence[str]]
) -> Taken:
    """`vanished` says which of these incarnations, leases still running, are known to be gone."""
    routes = _listed(request.routes)
    with atomic(cx):
        gone = _gone_owners(cx, request.incarnation, now, vanished)
        if gone is None:
            return Taken(_NOTHING, [])
        dead = _bury(cx, gone, routes, now)
        if request.blocked:
            return Taken(_claim_blocked(cx, request, routes, now), dead)
        orphans = _orphans(cx, gone, routes, request.limit)
        due = _due(cx, request, routes, now)
        if due.laned or any(orphan.lane is not None for orphan in orphans):
            picked = lanes.pick(cx, orphans, due, routes, request.limit, now)
        else:
            candidates = sorted([*orphans, *due.free])
            more = len(candidates) > request.limit
            picked = lanes.Picked(candidates[: request.limit], now if more else due.next_at)
        taken = _take(cx, [one.number for one in picked.runs], request.incarnation, now)
        claimed = [ClaimedRun(taken[one.number], one.crashed) for one in picked.runs]
        return Taken(Claim(claimed, picked.next_at), dead)


def _gone_owners(
    cx: sqlite3.Connection, claimer: str, now: int, vanished: Callable[[Sequence[str]], Sequence[str]]
) -> list[str] | None:
    """Owners that live no more. None: the claimer itself does not."""
    engines_text, owners_text = cx.execute(
        """
        WITH RECURSIVE owners(owner) AS (
          SELECT min(owner) FROM runs WHERE owner IS NOT NULL
          UNION ALL
          SELECT (SELECT min(r.owner) FROM runs r WHERE r.owner IS NOT NULL AND r.owner > owners.owner)
          FROM owners WHERE owner IS NOT NULL)
        SELECT (SELECT json_group_object(incarnation, expires_at) FROM engines WHERE NOT dead),
               (SELECT json_group_array(owner) FROM owners WHERE owner IS NOT NULL)"""
    ).fetchone()
    expiry: dict[str, int] = json.loads(engines_text)
    if expiry.get(claimer, 0) <= now:
        return None
    others = [owner for owner in json.loads(owners_text) if owner != claimer]
    expired = [owner for owner in others if expiry.get(owner, 0) <= now]
    return expired + list(vanished([owner for owner in others if expiry.get(owner, 0) > now]))


def _bury(cx: sqlite3.Connection, gone: Sequence[str], routes: str, now: int) -> list[str]:
    """Mark dead those who leave runs of these routes behind, and free the parked ones, which nobody takes."""
    if not gone:
        return []
    leaving = [
        row[0]
        for row in fetch_packed(
            cx,
            f"(SELECT DISTINCT owner FROM runs WHERE owner IN (SELECT value FROM json_each(?)) AND {_ROUTES})",
            [listed(gone), routes],
            "owner",
        )
    ]
    if leaving:
        names = listed(leaving)
        cx.execute("UPDATE engines SET dead = 1 WHERE incarnation IN (SELECT value FROM json_each(?))", (names,))
        cx.execute(
            f"DELETE FROM slots WHERE run_id IN (SELECT id FROM runs WHERE owner IN (SELECT value FROM json_each(?))"
            f" AND {_ROUTES} AND NOT ({_UNPARKED}))",
            (names, routes),
        )
        cx.execute(
            f"UPDATE runs SET owner = NULL, epoch = epoch + 1, updated_at = ? WHERE owner IN"
            f" (SELECT value FROM json_each(?)) AND {_ROUTES} AND NOT ({_UNPARKED})",
            (now, names, routes),
        )
    return leaving


def _orphans(cx: sqlite3.Connection, gone: Sequence[str], routes: str, limit: int) -> list[Candidate]:
    if not gone:
        return []
    rows = fetch_packed(
        cx,
        f"(SELECT number, id, priority, wake_at, activity, workspace, workflow, lane FROM runs"
        f" WHERE owner IN (SELECT value FROM json_each(?)) AND {_ROUTES} AND {_UNPARKED}"
        " ORDER BY priority DESC, wake_at LIMIT ?)",
        [listed(gone), routes, limit + 1],
        "priority, wake_at, number, id, activity, workspace, workflow, lane",
    )
    return [
        Candidate(
            -priority,
            wake_at or 0,
            number,
            run_id,
            crashed=activity == "executing",
            lane=None if lane is None else (workspace, workflow, lane),
        )
        for priority, wake_at, number, run_id, activity, workspace, workflow, lane in rows
    ]


def _due(cx: sqlite3.Connection, request: ClaimRequest, routes: str, now: int) -> Due:
    """The best due runs of each route and priority, when the next falls due, and whether any queue in lanes. Each route and
    priority is one seek in the due index, so neither a long backlog nor many sleepers are ever walked through."""
    if not request.routes:
        return Due([], None, False)
    route = "x.workspace = routes.workspace AND x.workflow = routes.workflow AND x.version = routes.version"
    rung = f"{route.replace('routes.', 'rungs.')} AND {of('x', DUE)}"
    text = f"""
        WITH RECURSIVE
        routes AS (
          SELECT DISTINCT json_extract(value, '$[0]') AS workspace, json_extract(value, '$[1]') AS workflow,
            json_extract(value, '$[2]') AS version
          FROM json_each(:routes)),
        rungs(workspace, workflow, version, priority) AS (
          SELECT workspace, workflow, version, (
            SELECT max(x.priority) FROM runs x WHERE {route} AND {of("x", DUE)})
          FROM routes
          UNION ALL
          SELECT workspace, workflow, version, (
            SELECT max(x.priority) FROM runs x WHERE {rung} AND x.priority < rungs.priority)
          FROM rungs WHERE priority IS NOT NULL)
        SELECT
          (SELECT json_group_array(json_array(-priority, wake_at, number)) FROM (
             SELECT r.priority, r.wake_at, r.number
             FROM rungs JOIN runs r ON r.number IN (
               SELECT x.number FROM runs x
               WHERE {rung} AND x.priority = rungs.priority AND x.wake_at <= :now
               ORDER BY x.wake_at LIMIT :most)
             ORDER BY r.priority DESC, r.wake_at LIMIT :most)),
          (SELECT min((
             SELECT min(x.wake_at) FROM runs x
             WHERE {rung} AND x.priority = rungs.priority AND x.wake_at > :now)) FROM rungs),
          EXISTS (SELECT 1 FROM runs INDEXED BY runs_ready WHERE {LANED_READY})
            OR EXISTS (SELECT 1 FROM runs INDEXED BY runs_laned WHERE {LANED_LATER})"""
    parameters = {"routes": routes, "now": now, "most": request.limit + 1}
    found, next_at, any_laned = cx.execute(text, parameters).fetchone()
    free = [Candidate(priority, wake_at, number) for priority, wake_at, number in json.loads(found)]
    if not any_laned:
        return Due(free, next_at, False)
    laned, laned_at = lanes.probe(cx, routes, now)
    return Due(free, min((at for at in (next_at, laned_at) if at is not None), default=None), laned)


def _claim_blocked(cx: sqlite3.Connection, request: ClaimRequest, routes: str, now: int) -> Claim:
    lanes.queue_blocked(cx, routes, now)
    rows = fetch_packed(
        cx,
        f"(SELECT number, id FROM runs WHERE activity = 'blocked' AND status = 'active' AND owner IS NULL AND id > ?"
        f" AND {_ROUTES} ORDER BY id LIMIT ?)",
        [request.after, routes, request.limit],
        "id, number",
    )
    numbers: list[Any] = [number for _, number in sorted(rows)]
    taken = _take(cx, numbers, request.incarnation, now)
    return Claim([ClaimedRun(taken[number], False) for number in numbers], None)


def _take(cx: sqlite3.Connection, numbers: Sequence[int], incarnation: str, now: int) -> dict[int, RunRecord]:
    if not numbers:
        return {}
    cx.execute(
        """
        UPDATE runs SET
          recovery_attempts = recovery_attempts + (owner IS NOT NULL AND activity = 'executing'),
          activity = CASE
            WHEN activity = 'blocked' THEN activity
            WHEN recovery_attempts + (owner IS NOT NULL AND activity = 'executing') > 0 THEN 'queued'
            ELSE 'executing' END,
          owner = :owner, epoch = epoch + 1, started_at = coalesce(started_at, :now), updated_at = :now
        WHERE number IN (SELECT value FROM json_each(:chosen))""",
        {"owner": incarnation, "now": now, "chosen": listed(numbers)},
    )
    return runs.numbered(cx, numbers)
