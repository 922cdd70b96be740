"""Journal rows in and out."""

from __future__ import annotations

from collections.abc import Sequence

from durable.core.journal import LOG, Entry
from durable.store.postgres.connection import Database, Row
from durable.store.postgres.packing import (
    NO_BIGINTS,
    NO_BLOBS,
    NO_INTS,
    NO_TEXTS,
    BigInts,
    Blobs,
    Ints,
    Packed,
    Texts,
    bigints,
    blobs,
    ints,
    texts,
)
from durable.store.records import Commit, Journal

COLUMNS = (
    "seq, at, kind, status, key, ordinal, name, attempt, fingerprint, payload, enqueued_at, started_at, finished_at"
)
PARAMETERS = 14


def packed(batch: Sequence[Commit]) -> tuple[Packed, ...]:
    """The entries of all commits as columns, in the order of `commit_runs`. Raises UnicodeEncodeError, struct.error."""
    run_ids = [one.run_id for one in batch for _ in one.entries]
    entries = [entry for one in batch for entry in one.entries]
    return (
        texts(run_ids),
        ints([entry.seq for entry in entries]),
        bigints([entry.at for entry in entries]),
        texts([entry.kind for entry in entries]),
        texts([entry.status for entry in entries]),
        _texts([entry.key for entry in entries]),
        _ints([entry.ordinal for entry in entries]),
        _texts([entry.name for entry in entries]),
        ints([entry.attempt for entry in entries]),
        _texts([entry.fingerprint for entry in entries]),
        _blobs([entry.payload for entry in entries]),
        _bigints([entry.enqueued_at for entry in entries]),
        _bigints([entry.started_at for entry in entries]),
        _bigints([entry.finished_at for entry in entries]),
    )


def _empty(values: Sequence[object]) -> bool:
    return values.count(None) == len(values)


def _texts(values: Sequence[str | None]) -> Texts:
    return NO_TEXTS if _empty(values) else texts(values)


def _ints(values: Sequence[int | None]) -> Ints:
    return NO_INTS if _empty(values) else ints(values)


def _bigints(values: Sequence[int | None]) -> BigInts:
    return NO_BIGINTS if _empty(values) else bigints(values)


def _blobs(values: Sequence[bytes | None]) -> Blobs:
    return NO_BLOBS if _empty(values) else blobs(values)


async def load(db: Database, schema: str, run_ids: Sequence[str]) -> list[Journal]:
    rows = await db.read(
        f"SELECT run_id, {COLUMNS} FROM {schema}.journal WHERE run_id = ANY (%s) AND kind <> '{LOG}' ORDER BY run_id, seq",
        [texts(run_ids)],
    )
    logs = await db.read(
        f"SELECT run_id, count(*) FROM {schema}.journal WHERE run_id = ANY (%s) AND kind = '{LOG}' AND key IS NULL"
        " GROUP BY run_id",
        [texts(run_ids)],
    )
    lines: dict[str, int] = dict(logs)
    entries: dict[str, list[Entry]] = {run_id: [] for run_id in run_ids}
    for row in rows:
        entries[row[0]].append(Entry(*row[1:]))
    return [Journal(entries[run_id], lines.get(run_id, 0)) for run_id in run_ids]


async def page(db: Database, schema: str, run_id: str, after_seq: int, limit: int) -> list[Entry]:
    rows: list[Row] = await db.read(
        f"SELECT {COLUMNS} FROM {schema}.journal WHERE run_id = %s AND seq > %s ORDER BY seq LIMIT %s",
        [run_id, after_seq, limit],
    )
    return [Entry(*row) for row in rows]
