"""Reopening what ended badly: a dead or failed run goes on, a blocked one is looked at again. A transaction of its own:
epoch + 1, a journal entry, a fresh recovery budget.

A failed run asks again for what failed it: the entry it writes names the seq from which replay passes over what was
recorded (signals excepted), so that no recorded failure is replayed by accident (B53).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from durable.core.errors import RunFinished, RunNotFound
from durable.core.journal import LOG, RUN, Entry
from durable.engine.deps import Deps
from durable.protocol.states import REOPENABLE, Activity, Status


async def requeue(deps: Deps, now: int, run_id: str, workspace: str | None = None) -> bool:
    """Raises RunNotFound; RunFinished if it completed or was cancelled. False: it is active and well, and left alone."""
    record = (await deps.store.get([run_id]))[0]
    if record is None or record.workspace != (workspace or deps.settings.workspace):
        raise RunNotFound(f"There is no run {run_id!r} here. Is it another workspace's?", run_id=run_id)
    blocked = record.status is Status.ACTIVE and record.activity is Activity.BLOCKED
    if record.status is Status.ACTIVE and not blocked:
        return False
    if record.status not in REOPENABLE and not blocked:
        raise RunFinished(
            f"Run {run_id!r} is {record.status}; only dead, failed and blocked runs can be requeued.", run_id=run_id
        )
    payload = None
    if record.status in (Status.FAILED, Status.DEAD):
        cut = await _cut(deps, run_id)
        payload = None if cut is None else msgspec.json.encode({"from": cut, "logs": await _lines(deps, run_id, cut)})
    status = "unblocked" if blocked else "requeued"
    entry = Entry(0, now, RUN, status, name=record.workflow, payload=payload)
    reopened = await deps.store.requeue(
        run_id, commit_id=deps.ids.unique(), entry=entry, activity=Activity.QUEUED.value
    )
    return reopened is not None


def dropped_lines(entries: Sequence[Entry]) -> int:
    """Log lines of the workflow that replay passes over: those of stretches that were cut."""
    notes = (e.payload for e in entries if e.kind == RUN and e.status == "requeued" and e.payload is not None)
    return sum(int(msgspec.json.decode(note).get("logs", 0)) for note in notes)


async def _lines(deps: Deps, run_id: str, cut: int) -> int:
    """How many lines lie behind the cut and were not dropped by an earlier one."""
    after, lines = cut - 1, 0
    while page := await deps.store.page(run_id, after, 500):
        for entry in page:
            if entry.kind == LOG and entry.key is None:
                lines += 1
            elif entry.kind == RUN and entry.status == "requeued" and entry.payload is not None:
                lines -= int(msgspec.json.decode(entry.payload).get("logs", 0))
        after = page[-1].seq
    return max(lines, 0)


async def _cut(deps: Deps, run_id: str) -> int | None:
    """From where a failed run asks again: the failed step whose error came out, or its timeout; else only what the failure
    itself gave up (waits that nobody waited for any more) is passed over. A dead run: what its death gave up."""
    given_up: int | None = None
    ending = False
    for entry in reversed((await deps.store.load([run_id]))[0].entries):
        if entry.kind == RUN and entry.status in ("failed", "dead") and not ending:
            ending = True
            if entry.payload is not None:
                cut: int = msgspec.json.decode(entry.payload)["cut"]
                return cut
            if entry.status == "dead":
                return None
        elif ending and entry.kind == RUN and entry.status == "timed_out":
            return entry.seq
        elif entry.status != "cancelled" or not ending:
            return given_up
        else:
            given_up = entry.seq
    return given_up
