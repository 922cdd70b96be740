"""The only way a run changes: one call of `commit_runs` for a whole batch, which is one statement and one round trip. The
fence is the update itself; refusals are sorted out in the database, a broken commit by halves here."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import psycopg
from msgspec import UNSET

from durable.core.errors import StoreError
from durable.core.journal import Entry
from durable.protocol.states import Status
from durable.store.postgres import journal, runs
from durable.store.postgres.connection import Connection, Database, ask, is_culprit, translate
from durable.store.postgres.events import storable
from durable.store.postgres.packing import (
    NO_BIGINTS,
    NO_BLOBS,
    NO_BOOLS,
    NO_TEXTS,
    Packed,
    bigints,
    blobs,
    bools,
    ints,
    texts,
)
from durable.store.records import (
    AddFire,
    CloseWaiter,
    Commit,
    CommitOutcome,
    CommitStatus,
    DropItem,
    FreeSlots,
    OpenWaiter,
    PutItem,
    PutMessage,
    RunRecord,
    SetAttributes,
    StartRun,
)

_FENCED = CommitOutcome(CommitStatus.FENCED)
_RUN_PARAMETERS = 13
_CALL = ", ".join(["%s"] * (_RUN_PARAMETERS + journal.PARAMETERS))


async def commit(
    db: Database, schema: str, batch: Sequence[Commit], on_freed: Callable[[], None]
) -> list[CommitOutcome]:
    """Each commit done, fenced, or failed by itself: a batch that breaks is tried again in halves. `on_freed`: slots are free."""
    try:
        if len(batch) == 1 and _is_step(batch[0]):
            rows = await db.all(_STEP.format(schema=schema), _step_parameters(batch[0]))
            if rows:
                return [CommitOutcome(CommitStatus.DONE, rows[0][0])]
            # Refused: the long way says why.
        query, parameters = _statement(schema, batch)
        answer = await db.one(query, parameters)
        if _freed(answer):
            on_freed()
        return _outcomes(batch, answer)
    except (psycopg.Error, struct.error, UnicodeEncodeError) as error:  # the driver's: only culprits come out of `db`
        if len(batch) == 1:
            return [CommitOutcome(CommitStatus.FENCED, failure=_failure(error))]
    half = len(batch) // 2
    return await commit(db, schema, batch[:half], on_freed) + await commit(db, schema, batch[half:], on_freed)


# A run on its own that appends one row and changes nothing else: a sequential step. The same fence and the same rows as
# `commit_runs` has, at a third of its cost, for want of arrays.
_STEP = """
WITH changed AS (
  UPDATE {schema}.runs r SET
    seq = r.seq + 1, commit_id = %s, updated_at = {schema}.now_us(), inbox_read = coalesce(%s, r.inbox_read),
    recovery_attempts = CASE WHEN %s THEN 0 ELSE r.recovery_attempts END
  WHERE r.id = %s AND r.epoch = %s AND r.seq = %s AND r.status = 'active' AND r.commit_id IS DISTINCT FROM %s
  RETURNING r.id, r.seq, r.inbox_last),
appended AS (
  INSERT INTO {schema}.journal (
    run_id, seq, at, kind, status, key, ordinal, name, attempt, fingerprint, payload, enqueued_at, started_at, finished_at)
  SELECT c.id, c.seq, %s::bigint, %s::text, %s::text, %s::text, %s::integer, %s::text, %s::integer, %s::text, %s::bytea,
    %s::bigint, %s::bigint, %s::bigint FROM changed c)
SELECT inbox_last FROM changed"""


def _is_step(one: Commit) -> bool:
    return (
        len(one.entries) == 1 and not one.effects and one.activity is UNSET and one.status is UNSET and not one.suspend
    )


def _step_parameters(one: Commit) -> list[Any]:
    [entry] = one.entries
    return [
        one.commit_id,
        None if one.inbox_read is UNSET else one.inbox_read,
        one.progressed,
        one.run_id,
        one.epoch,
        one.expected_seq,
        one.commit_id,
        entry.at,
        entry.kind,
        entry.status,
        entry.key,
        entry.ordinal,
        entry.name,
        entry.attempt,
        entry.fingerprint,
        entry.payload,
        entry.enqueued_at,
        entry.started_at,
        entry.finished_at,
    ]


def _failure(error: Exception) -> Exception:
    if isinstance(error, struct.error):
        return StoreError(f"a number is above what the column takes ({error})")
    return translate(error)


class _Refused(Exception):
    """The way out of a transaction whose commit is broken."""

    def __init__(self, why: psycopg.Error) -> None:
        super().__init__()
        self.why = why


async def commit_with(
    db: Database,
    schema: str,
    work: Callable[[Any], Awaitable[None]],
    one: Commit,
    on_freed: Callable[[], None],
) -> CommitOutcome:
    """The fence first, so that the author's work begins only where it counts; then both are committed at once."""
    try:
        query, parameters = _statement(schema, [one])
    except (struct.error, UnicodeEncodeError) as error:
        return CommitOutcome(CommitStatus.FENCED, failure=_failure(error))
    async with db.lend() as connection:
        try:
            async with connection.transaction():
                try:
                    [answer] = await ask(connection, query, parameters)
                except psycopg.Error as error:  # ours, not the work's
                    if is_culprit(error):
                        raise _Refused(error) from error
                    raise translate(error, str(db.address)) from error
                [outcome] = _outcomes([one], answer)
                if outcome.status is CommitStatus.DONE and not await _done_before(connection, schema, one):
                    await work(connection)
            if _freed(answer):
                on_freed()
            return outcome
        except _Refused as refused:
            return CommitOutcome(CommitStatus.FENCED, failure=_failure(refused.why))
        except psycopg.Error as error:
            if connection.closed:
                raise translate(error, str(db.address)) from error
            raise


async def _done_before(connection: Connection, schema: str, one: Commit) -> bool:
    """Whether this commit had succeeded, its reply lost: its work is in the same transaction, and done too. A row this
    transaction has written says so in its hidden `xmin`."""
    rows = await ask(
        connection,
        f"SELECT xmin::text = pg_current_xact_id_if_assigned()::xid::text FROM {schema}.runs WHERE id = %s",
        [one.run_id],
    )
    return not rows[0][0]


def _statement(schema: str, batch: Sequence[Commit]) -> tuple[str, list[Any]]:
    ordered = sorted(batch, key=_run_id)  # every writer locks rows in this order
    return (
        f"SELECT places, mail, wake FROM {schema}.commit_runs({_CALL}, %s::jsonb)",
        [*_packed(ordered), *journal.packed(ordered), _effects(ordered)],
    )


def _run_id(one: Commit) -> str:
    return one.run_id


def _packed(batch: Sequence[Commit]) -> tuple[Packed, ...]:
    always = (
        texts([one.run_id for one in batch]),
        ints([one.epoch for one in batch]),
        ints([one.expected_seq for one in batch]),
        texts([one.commit_id for one in batch]),
        ints([one.expected_seq + len(one.entries) for one in batch]),
        ints([None if one.inbox_read is UNSET else one.inbox_read for one in batch]),
        bools([one.progressed for one in batch]),
    )
    if all(one.activity is UNSET and not one.suspend and one.status is UNSET for one in batch):
        return (*always, NO_TEXTS, NO_TEXTS, NO_BOOLS, NO_BIGINTS, NO_BLOBS, NO_BLOBS)
    return (
        *always,
        texts([None if one.status is UNSET or one.status is Status.ACTIVE else one.status for one in batch]),
        texts([None if one.activity is UNSET else one.activity for one in batch]),
        bools([one.suspend for one in batch]),
        bigints([one.wake_at for one in batch]),
        blobs([one.output for one in batch]),
        blobs([one.error for one in batch]),
    )


def _freed(answer: tuple[Any, ...]) -> bool:
    """Whether somebody who waits for a slot may have it now: of runs to wake, the one without a name."""
    return answer[2] is not None and "" in answer[2]


def _outcomes(batch: Sequence[Commit], answer: tuple[Any, ...]) -> list[CommitOutcome]:
    places, mail, wake = answer
    ordered = sorted(batch, key=_run_id)
    done = dict(zip(places or (), mail or (), strict=True))
    if wake is None and len(done) == len(batch):
        if len(batch) == 1:
            return [CommitOutcome(CommitStatus.DONE, mail[0])]
        answers = {one.run_id: CommitOutcome(CommitStatus.DONE, done[n]) for n, one in enumerate(ordered, 1)}
    else:
        owners = wake or {}
        answers = {
            one.run_id: CommitOutcome(CommitStatus.DONE, done[n], tuple(owners.get(one.run_id, ())))
            if n in done
            else _FENCED
            for n, one in enumerate(ordered, 1)
        }
    return [answers[one.run_id] for one in batch]


# ------------------------------------------------------------------ effects


def _effects(batch: Sequence[Commit]) -> str | None:
    """What the commits do beside their runs, kind by kind; None where they do nothing."""
    if not any(one.effects for one in batch):
        return None
    kinds: dict[str, list[Any]] = {
        name: [] for name in ("starts", "fires", "messages", "opened", "closed", "attributes", "freed", "items")
    }
    for one in batch:
        waiters: dict[str, OpenWaiter | CloseWaiter] = {}
        for effect in one.effects:
            if isinstance(effect, StartRun):
                kinds["starts"].append({"of": one.run_id, "run": runs.as_json(effect.run)})
            elif isinstance(effect, AddFire):
                fire = {"of": one.run_id, "schedule_id": effect.schedule_id, "occurrence": effect.occurrence}
                kinds["fires"].append({**fire, "run": runs.as_json(effect.run)})
            elif isinstance(effect, PutMessage):
                kinds["messages"].append({"of": one.run_id, "message": effect.message})
            elif isinstance(effect, (OpenWaiter, CloseWaiter)):
                waiters[effect.id] = effect  # the last word counts
            elif isinstance(effect, SetAttributes):
                change = {"of": one.run_id, "attributes": runs.attributes(effect.attributes), "tags": effect.tags}
                kinds["attributes"].append(change)
            elif isinstance(effect, FreeSlots):
                kinds["freed"].append({"of": one.run_id, "keys": effect.keys})
            elif isinstance(effect, PutItem):
                put = {"kind": effect.kind, "id": effect.id, "data": effect.data, "expires_at": effect.expires_at}
                kinds["items"].append({"of": one.run_id, **put})
            elif isinstance(effect, DropItem):
                kinds["items"].append({"of": one.run_id, "kind": effect.kind, "id": effect.id})
        for waiter in waiters.values():
            if isinstance(waiter, CloseWaiter):
                kinds["closed"].append({"of": one.run_id, "id": waiter.id})
            else:
                opened = {
                    "id": waiter.id,
                    "event": waiter.event,
                    "match": waiter.match,
                    "expires_at": waiter.expires_at,
                    "probe": storable(waiter.probe),
                }
                kinds["opened"].append({"of": one.run_id, **opened})
    if not kinds["items"]:
        del kinds["items"]  # rare, and looked for by name
    return runs.json_text(kinds)


# ------------------------------------------------------------------ reopening


async def requeue(
    db: Database, schema: str, run_id: str, commit_id: str, entry: Entry, activity: str
) -> RunRecord | None:
    values = [getattr(entry, name) for name in Entry.__struct_fields__ if name != "seq"]
    marks = ", ".join(["%s"] * (3 + len(values)))
    [done] = await db.one(f"SELECT {schema}.requeue_run({marks})", [run_id, commit_id, activity, *values])
    if not done:
        return None
    [run] = await runs.get(db, schema, [run_id])
    return run
