"""What is let go."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice

from durable.protocol.states import Status
from durable.store.memory.rows import Rows
from durable.store.memory.tables import Ended
from durable.store.records import PruneRequest, RunRecord


class Retention(Rows):
    async def prune(self, request: PruneRequest) -> int:
        with self._tables.lock:
            now = self._clock.now()
            queues = [
                self._going(ended, request, now)
                for (workspace, workflow), ended in self._tables.ended.items()
                if workspace == request.workspace
                and (workflow not in request.but if request.workflow is None else workflow == request.workflow)
            ]
            going = list(islice(heapq.merge(*queues), max(request.limit, 0)))
            for _, run_id in going:
                self._forget(run_id)
            self._sweep(request, now)
            return len(going)

    def _going(self, ended: list[Ended], request: PruneRequest, now: int) -> Iterator[Ended]:
        """What goes of one workflow's finished runs, oldest first: either bound lets a first part of them go."""
        count = 0
        if request.older_than_us is not None:
            count = bisect_left(ended, (now - request.older_than_us, ""))
        if request.keep is not None:
            count = max(count, len(ended) - request.keep)
        return (one for one in islice(ended, count) if not self._family_active(self._tables.runs[one[1]]))

    def _family_active(self, run: RunRecord) -> bool:
        tables = self._tables
        family = [*tables.children.get(run.id, ()), *([] if run.parent is None else [run.parent.run_id])]
        return any(one in tables.runs and tables.runs[one].status is Status.ACTIVE for one in family)

    def _forget(self, run_id: str) -> None:
        """A finished run, with everything that hangs on it."""
        tables = self._tables
        run = tables.runs.pop(run_id)
        del tables.journals[run_id]
        tables.message_ids -= {(run_id, row.message.id) for row in tables.inboxes.pop(run_id, ())}
        tables.fires -= set(tables.fired.pop(run_id, ()))
        tables.first_due.pop(run_id, None)
        self._free_slots(run_id)
        if run.idempotency_key is not None:
            del tables.keys[run.workspace, run.workflow, run.idempotency_key]
        if run.parent is not None:
            siblings = tables.children[run.parent.run_id]
            siblings.remove(run_id)
            if not siblings:
                del tables.children[run.parent.run_id]
        ended = tables.ended[run.workspace, run.workflow]
        del ended[bisect_left(ended, (run.finished_at or 0, run_id))]

    def _sweep(self, request: PruneRequest, now: int) -> None:
        """What says nothing any more, whoever asks; and old events, where no single workflow is meant."""
        tables = self._tables
        for item in list(tables.items.values()):
            if item.expires_at is not None and item.expires_at <= now:
                del tables.items[item.kind, item.workspace, item.id]
        if request.workflow is None and request.older_than_us is not None:
            oldest = now - request.older_than_us
            for event in list(tables.events.values()):
                if event.workspace == request.workspace and event.settled and event.received_at < oldest:
                    del tables.events[event.id]
                    if event.dedupe_id is not None:
                        del tables.dedupe_ids[event.workspace, event.dedupe_id]
        for key, run_id in list(tables.singletons.items()):
            if run_id not in tables.runs:  # a finished one may be requeued
                del tables.singletons[key]
        for key, window in list(tables.windows.items()):
            if not self._active(window.run_id):
                del tables.windows[key]
        for histories in (tables.begun, tables.rates):
            for key, history in list(histories.items()):
                if not history.since(now):
                    del histories[key]
        used = {(run.workspace, run.workflow, run.lane) for run in tables.runs.values() if run.lane is not None}
        for lane in [lane for lane in tables.lanes if lane not in used]:
            del tables.lanes[lane]
        for turn, finish in list(tables.finish.items()):
            (workspace, workflow, _), priority = turn
            if finish <= tables.clock[(workspace, workflow), priority]:
                del tables.finish[turn]

    def _active(self, run_id: str) -> bool:
        run = self._tables.runs.get(run_id)
        return run is not None and run.status is Status.ACTIVE
