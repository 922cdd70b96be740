"""Starting runs, writing to them, and reading what there is of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

from durable.core.journal import LOG, NOT_REPLAYED, Entry
from durable.store.checks import check_message, check_run
from durable.store.memory.rows import Rows
from durable.store.records import (
    InboxRow,
    Journal,
    Message,
    NewRun,
    RunPage,
    RunQuery,
    RunRecord,
    SendOutcome,
    SendStatus,
    StartOutcome,
    StartStatus,
)


class Runs(Rows):
    async def start(self, runs: Sequence[NewRun]) -> list[StartOutcome]:
        for new in runs:
            check_run(new, self._capabilities.max_payload)
        with self._tables.lock:
            now = self._clock.now()
            outcomes = [self._start(new, now) for new in runs]
        if any(outcome.status is StartStatus.STARTED for outcome in outcomes):
            self._tables.listeners.changed(self)
        return outcomes

    async def get(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        with self._tables.lock:
            runs = self._tables.runs
            return [copy.copy(runs[run_id]) if run_id in runs else None for run_id in run_ids]

    async def find(self, query: RunQuery) -> RunPage:
        with self._tables.lock:
            runs = self._tables.runs
            if query.cursor is not None and query.cursor not in runs:
                return RunPage([], None)
            ordered: Iterator[RunRecord] = iter(runs.values() if query.oldest_first else reversed(runs.values()))
            if query.cursor is not None:
                for run in ordered:
                    if run.id == query.cursor:
                        break
            found: list[RunRecord] = []
            for run in ordered:
                if _matches(run, query):
                    if len(found) == query.limit:
                        return RunPage(found, found[-1].id if found else query.cursor)
                    found.append(copy.copy(run))
            return RunPage(found, None)

    # ------------------------------------------------------------------ inbox

    async def send(self, messages: Sequence[Message]) -> list[SendOutcome]:
        for message in messages:
            check_message(message, self._capabilities.max_payload)
        with self._tables.lock:
            now = self._clock.now()
            outcomes = [self._send(message, now) for message in messages]
        if any(outcome.status is SendStatus.ACCEPTED for outcome in outcomes):
            self._tables.listeners.changed(self)
        return outcomes

    async def unread(self, incarnation: str) -> list[str]:
        with self._tables.lock:
            runs = (self._tables.runs[run_id] for run_id in self._tables.owned.get(incarnation, ()))
            return [run.id for run in runs if run.inbox_last > run.inbox_read]

    async def inbox(self, after: Sequence[tuple[str, int]]) -> list[list[InboxRow]]:
        with self._tables.lock:
            return [self._tables.inboxes.get(run_id, [])[max(number, 0) :] for run_id, number in after]

    # ------------------------------------------------------------------ journal

    async def load(self, run_ids: Sequence[str]) -> list[Journal]:
        with self._tables.lock:
            return [_replayed(self._tables.journals.get(run_id, ())) for run_id in run_ids]

    async def page(self, run_id: str, after_seq: int, limit: int) -> list[Entry]:
        with self._tables.lock:
            after_seq = max(after_seq, 0)
            return self._tables.journals.get(run_id, [])[after_seq : after_seq + limit]

    async def children(self, run_id: str) -> list[RunRecord]:
        with self._tables.lock:
            return [copy.copy(self._tables.runs[child]) for child in self._tables.children.get(run_id, ())]


def _matches(run: RunRecord, query: RunQuery) -> bool:
    return (
        (query.workspace is None or run.workspace == query.workspace)
        and (query.workflow is None or run.workflow == query.workflow)
        and (query.workflows is None or run.workflow in query.workflows)
        and (query.status is None or run.status is query.status)
        and (query.statuses is None or run.status in query.statuses)
        and (query.activity is None or run.activity is query.activity)
        and (query.tag is None or query.tag in run.tags)
        and (query.idempotency_key is None or run.idempotency_key == query.idempotency_key)
        and (query.parent is None or (run.parent is not None and run.parent.run_id == query.parent))
        and (query.since is None or run.created_at >= query.since)
        and (query.until is None or run.created_at < query.until)
        and all(_same(run.attributes.get(name), value) for name, value in query.attributes.items())
        and (query.text is None or _contains(run, query.text.lower()))
    )


def _same(found: object, wanted: object) -> bool:
    return type(found) is type(wanted) and found == wanted


def _contains(run: RunRecord, text: str) -> bool:
    return any(text in one.lower() for one in (run.id, run.workflow, run.idempotency_key or ""))


def _replayed(entries: Iterable[Entry]) -> Journal:
    kept: list[Entry] = []
    logs = 0
    for entry in entries:
        if entry.kind not in NOT_REPLAYED:
            kept.append(entry)
        elif entry.kind == LOG and entry.key is None:
            logs += 1
    return Journal(kept, logs)
