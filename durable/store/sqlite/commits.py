"""The only way a run changes. The fence is the update itself; the usual commit is BEGIN, UPDATE, SELECT of the inbox
counters, INSERT, COMMIT for a whole batch. Refusals and broken commits are sorted out on a slower road."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from msgspec import UNSET

from durable.core.journal import Entry
from durable.protocol.states import Status
from durable.store.records import (
    AddFire,
    CloseWaiter,
    Commit,
    CommitOutcome,
    CommitStatus,
    DropItem,
    Effect,
    FreeSlots,
    NewRun,
    OpenWaiter,
    PutItem,
    PutMessage,
    RunRecord,
    SetAttributes,
    StartRun,
)
from durable.store.sqlite import inbox, items, journal, marks, runs
from durable.store.sqlite.connection import atomic, is_culprit, translate
from durable.store.sqlite.statements import Row, execute_values, fetch_packed, fetch_value, listed

_FENCED = CommitOutcome(CommitStatus.FENCED)


class _Refused(Exception):
    """Not every commit of the batch passed its fence."""


def commit(cx: sqlite3.Connection, batch: Sequence[Commit], now: int) -> list[CommitOutcome]:
    """Each commit done, fenced, or failed by itself: a statement that breaks is tried again in halves."""
    try:
        try:
            with atomic(cx):
                return _apply(cx, batch, now)
        except _Refused:
            with atomic(cx):
                return _apply_passing(cx, batch, now)
    except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
        if not is_culprit(error):
            raise
        if len(batch) == 1:
            return [CommitOutcome(CommitStatus.FENCED, failure=translate(error))]
    half = len(batch) // 2
    return commit(cx, batch[:half], now) + commit(cx, batch[half:], now)


def _apply(cx: sqlite3.Connection, batch: Sequence[Commit], now: int) -> list[CommitOutcome]:
    """All of them, or _Refused."""
    plain = [_plain_row(one) for one in batch if _is_plain(one)]
    full = [_full_row(one) for one in batch if not _is_plain(one)]
    passed = 0
    if plain:
        passed += execute_values(cx, _plain_text, plain, now)
    if full:
        passed += execute_values(cx, _full_text, full, now, now, now)
    if passed != len(batch):
        raise _Refused
    journal.insert(cx, [row for one in batch for row in journal.rows_of(one.run_id, one.entries)])
    wake = _effects(cx, batch, now) if any(one.effects for one in batch) else {}
    ended = [one.run_id for one in batch if _terminal(one)]
    if ended:
        cx.execute("DELETE FROM event_waiters WHERE run_id IN (SELECT value FROM json_each(?))", [listed(ended)])
        cx.execute("DELETE FROM slots WHERE run_id IN (SELECT value FROM json_each(?))", [listed(ended)])
    mail = _mail(cx, [one.run_id for one in batch])
    return [CommitOutcome(CommitStatus.DONE, mail[one.run_id], wake.get(one.run_id, ())) for one in batch]


def _mail(cx: sqlite3.Connection, run_ids: Sequence[str]) -> dict[str, int]:
    """The inbox counters, in one row: with RETURNING each run would be a step of its own."""
    if len(run_ids) == 1:
        return {run_ids[0]: fetch_value(cx, "SELECT inbox_last FROM runs WHERE id = ?", run_ids)}
    answer = fetch_value(
        cx,
        "SELECT json_group_object(id, inbox_last) FROM runs WHERE id IN (SELECT value FROM json_each(?))",
        [listed(run_ids)],
    )
    counters: dict[str, int] = json.loads(answer)
    return counters


def _apply_passing(cx: sqlite3.Connection, batch: Sequence[Commit], now: int) -> list[CommitOutcome]:
    rows = {
        row[0]: row[1:]
        for row in fetch_packed(
            cx,
            "runs WHERE id IN (SELECT value FROM json_each(?))",
            [listed([one.run_id for one in batch])],
            "id, epoch, seq, status, commit_id, inbox_last",
        )
    }
    answers: dict[str, CommitOutcome] = {}
    passing = []
    for one in batch:
        epoch, seq, status, commit_id, inbox_last = rows.get(one.run_id, (0, 0, "", "", 0))
        if commit_id == one.commit_id:
            answers[one.run_id] = CommitOutcome(CommitStatus.DONE, inbox_last)  # it had succeeded before
        elif (epoch, seq, status) == (one.epoch, one.expected_seq, "active"):
            passing.append(one)
        else:
            answers[one.run_id] = _FENCED
    if passing:
        for one, outcome in zip(passing, _apply(cx, passing, now), strict=True):
            answers[one.run_id] = outcome
    return [answers[one.run_id] for one in batch]


# ------------------------------------------------------------------ the two updates

_FENCE = """FROM v
        WHERE runs.id = v.id AND runs.epoch = v.epoch AND runs.seq = v.expected_seq AND runs.status = 'active'
          AND runs.commit_id IS NOT v.commit_id"""


def _terminal(one: Commit) -> bool:
    return one.status is not UNSET and one.status is not Status.ACTIVE


def _is_plain(one: Commit) -> bool:
    """It touches no column of any index."""
    return one.activity is UNSET and not one.suspend and not _terminal(one)


def _plain_row(one: Commit) -> Row:
    return (
        one.run_id,
        one.epoch,
        one.expected_seq,
        one.commit_id,
        one.expected_seq + len(one.entries),
        None if one.inbox_read is UNSET else one.inbox_read,
        one.progressed,
    )


def _plain_text(values: str) -> str:
    return f"""
        WITH v(id, epoch, expected_seq, commit_id, seq, inbox_read, progressed) AS ({values})
        UPDATE runs SET
          seq = v.seq,
          commit_id = v.commit_id,
          updated_at = ?,
          inbox_read = coalesce(v.inbox_read, runs.inbox_read),
          recovery_attempts = CASE WHEN v.progressed THEN 0 ELSE runs.recovery_attempts END
        {_FENCE}"""


def _full_row(one: Commit) -> Row:
    return (
        *_plain_row(one),
        str(one.status) if _terminal(one) else None,
        None if one.activity is UNSET else str(one.activity),
        one.suspend,
        one.wake_at,
        one.output,
        one.error,
    )


def _full_text(values: str) -> str:
    return f"""
        WITH v(id, epoch, expected_seq, commit_id, seq, inbox_read, progressed,
               status, activity, suspend, wake_at, output, error) AS ({values})
        UPDATE runs SET
          seq = v.seq,
          commit_id = v.commit_id,
          updated_at = ?,
          inbox_read = coalesce(v.inbox_read, runs.inbox_read),
          recovery_attempts = CASE WHEN v.progressed THEN 0 ELSE runs.recovery_attempts END,
          status = coalesce(v.status, runs.status),
          activity = coalesce(v.activity, runs.activity),
          finished_at = CASE WHEN v.status IS NULL THEN runs.finished_at ELSE ? END,
          owner = CASE WHEN v.status IS NOT NULL OR v.suspend THEN NULL ELSE runs.owner END,
          output = CASE WHEN v.status IS NULL THEN runs.output ELSE v.output END,
          error = CASE
            WHEN v.status IS NOT NULL OR v.activity = 'blocked' THEN v.error
            WHEN v.activity IS NOT NULL THEN NULL
            ELSE runs.error END,
          wake_at = CASE
            WHEN v.status IS NOT NULL THEN NULL
            WHEN NOT v.suspend THEN runs.wake_at
            WHEN runs.inbox_last > coalesce(v.inbox_read, runs.inbox_read)
              AND coalesce(v.activity, runs.activity) NOT IN ('paused', 'blocked') THEN ?
            ELSE v.wake_at END
        {_FENCE}"""


# ------------------------------------------------------------------ effects


def _effects(cx: sqlite3.Connection, batch: Sequence[Commit], now: int) -> dict[str, tuple[str, ...]]:
    """Everything the batch does beside its runs, kind by kind: starts come before the messages to them."""
    each = [(one.run_id, effect) for one in batch for effect in one.effects]
    born: list[NewRun] = [effect.run for _, effect in each if isinstance(effect, StartRun)]
    fires = [effect for _, effect in each if isinstance(effect, AddFire)]
    if fires:
        born += _add_fires(cx, fires)
    runs.start(cx, born, now)

    wake: dict[str, dict[str, None]] = {}
    puts = [(run_id, effect.message) for run_id, effect in each if isinstance(effect, PutMessage)]
    outcomes = inbox.send(cx, [message for _, message in puts], now)
    for (run_id, _), outcome in zip(puts, outcomes, strict=True):
        if outcome.owner is not None:
            wake.setdefault(run_id, {})[outcome.owner] = None

    _change_waiters(cx, batch)
    for run_id, effect in each:
        if isinstance(effect, SetAttributes):
            _set_attributes(cx, run_id, effect)
    _free_slots(cx, [(run_id, effect) for run_id, effect in each if isinstance(effect, FreeSlots)])
    _change_items(cx, each, now)
    return {run_id: tuple(owners) for run_id, owners in wake.items()}


def _add_fires(cx: sqlite3.Connection, fires: Sequence[AddFire]) -> list[NewRun]:
    """The runs of the occurrences that are new."""
    wanted = {(fire.schedule_id, fire.occurrence): fire.run for fire in reversed(fires)}
    known = fetch_packed(
        cx,
        "json_each(?) w JOIN schedule_fires f ON f.schedule_id = json_extract(w.value, '$[0]')"
        " AND f.occurrence = json_extract(w.value, '$[1]')",
        [listed(list(wanted))],
        "f.schedule_id, f.occurrence",
    )
    for schedule_id, occurrence in known:
        del wanted[schedule_id, occurrence]
    if wanted:
        execute_values(cx, _fires_text, [(*fire, run.id) for fire, run in wanted.items()])
    return list(wanted.values())


def _fires_text(values: str) -> str:
    return f"INSERT INTO schedule_fires SELECT * FROM ({values}) WHERE column1 IS NOT NULL"


def _change_waiters(cx: sqlite3.Connection, batch: Sequence[Commit]) -> None:
    last_word: dict[tuple[str, str], OpenWaiter | CloseWaiter] = {}
    for one in batch:
        for effect in one.effects:
            if isinstance(effect, (OpenWaiter, CloseWaiter)):
                last_word[one.run_id, effect.id] = effect
    rows = [
        (run_id, waiter_id, effect.event, effect.match, effect.expires_at, effect.probe)
        for (run_id, waiter_id), effect in last_word.items()
        if isinstance(effect, OpenWaiter)
    ]
    if rows:
        execute_values(cx, _open_text, rows)
    keys = [key for key, effect in last_word.items() if isinstance(effect, CloseWaiter)]
    if keys:
        execute_values(cx, _close_text, keys)


def _open_text(values: str) -> str:
    return f"""
        WITH v(run_id, id, event, match, expires_at, probe) AS ({values})
        INSERT INTO event_waiters (run_id, id, event, match, expires_at, probe, workspace)
        SELECT v.*, r.workspace FROM v JOIN runs r ON r.id = v.run_id WHERE true
        ON CONFLICT (run_id, id) DO UPDATE SET
          event = excluded.event, match = excluded.match, expires_at = excluded.expires_at, probe = excluded.probe"""


def _close_text(values: str) -> str:
    return f"DELETE FROM event_waiters WHERE (run_id, id) IN ({values})"


def _set_attributes(cx: sqlite3.Connection, run_id: str, effect: SetAttributes) -> None:
    attributes, tags = cx.execute("SELECT attributes, tags FROM runs WHERE id = ?", [run_id]).fetchone()
    merged = {**(json.loads(attributes) if attributes else {}), **effect.attributes}
    kept = {name: value for name, value in merged.items() if value is not None}
    kept_tags = (json.loads(tags) if tags else ()) if effect.tags is None else effect.tags
    cx.execute(
        "UPDATE runs SET attributes = ?, tags = ? WHERE id = ?",
        (runs.attributes_text(kept), runs.tags_text(kept_tags), run_id),
    )
    marks.replace(cx, run_id, kept, kept_tags)


def _free_slots(cx: sqlite3.Connection, effects: Sequence[tuple[str, FreeSlots]]) -> None:
    everything = [run_id for run_id, effect in effects if effect.keys is None]
    if everything:
        cx.execute("DELETE FROM slots WHERE run_id IN (SELECT value FROM json_each(?))", [listed(everything)])
    some = [(run_id, key) for run_id, effect in effects for key in effect.keys or ()]
    if some:
        execute_values(cx, _free_text, some)


def _free_text(values: str) -> str:
    return f"DELETE FROM slots WHERE (run_id, key) IN ({values})"


def _change_items(cx: sqlite3.Connection, effects: Sequence[tuple[str, Effect]], now: int) -> None:
    last_word: dict[tuple[str, str, str], PutItem | DropItem] = {
        (effect.kind, effect.id, run_id): effect
        for run_id, effect in effects
        if isinstance(effect, (PutItem, DropItem))
    }
    if last_word:
        items.apply(cx, last_word, now)


# ------------------------------------------------------------------ reopening


def requeue(
    cx: sqlite3.Connection, run_id: str, commit_id: str, entry: Entry, activity: str, now: int
) -> RunRecord | None:
    with atomic(cx):
        changed = cx.execute(
            """
            UPDATE runs SET
              status = 'active', activity = :activity, epoch = epoch + 1, seq = seq + 1, commit_id = :commit, owner = NULL,
              recovery_attempts = 0, output = NULL, error = NULL, finished_at = NULL, wake_at = :now, updated_at = :now
            WHERE id = :run AND commit_id IS NOT :commit
              AND (status IN ('dead', 'failed') OR (status = 'active' AND activity IN ('blocked', 'paused')))""",
            {"run": run_id, "commit": commit_id, "activity": activity, "now": now},
        ).rowcount
        run = runs.get(cx, [run_id])[0]
        if run is None or run.commit_id != commit_id:
            return None
        if changed:
            cx.execute("DELETE FROM slots WHERE run_id = ?", [run_id])
            row = journal.rows_of(run_id, [entry])[0]
            journal.insert(cx, [(run_id, run.seq, *row[2:])])
        return run
