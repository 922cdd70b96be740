"""Doing one thing to all runs that a filter finds. Each run is asked on its own and answers on its own: one that refuses holds
up no other. Doing it again is safe: a run that has been asked before is unchanged, and a rerun is found by its key.

A call is bounded, by `limit` runs and a few at a time; where more match, it says where to go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
from msgspec import UNSET, Struct

from durable.core.errors import DefinitionError, DurableError, StoreError
from durable.engine.rerun import Again, Rerunner
from durable.protocol.states import TERMINAL, Activity, Status
from durable.store.records import RunPage, RunQuery, RunRecord

if TYPE_CHECKING:
    from durable.engine.engine import WorkflowEngine

Action = Literal["cancel", "pause", "resume", "requeue", "rerun", "replay"]

PAGE = 200
AT_ONCE = 20
COUNTED_MAX = 100_000
"""Runs a dry run counts at most."""
SHOWN = 20
"""Ids a dry run names."""


class Options(Struct, frozen=True, kw_only=True):
    """How. Each is looked at by the actions it concerns."""

    by: str = ""
    """pause, resume."""
    reason: str = ""
    """cancel, pause."""
    children: bool = False
    """cancel: with all that a run has started."""
    timers: Literal["run", "hold"] = "run"
    """resume."""
    from_step: str | None = None
    """rerun."""
    input: Any = UNSET
    """rerun, replay."""
    key: str = ""
    """rerun, replay: the same key again finds the same new runs; another makes others."""


class BulkItem(Struct, frozen=True):
    """What became of one run."""

    run_id: str
    outcome: Literal["done", "unchanged", "refused"]
    """`unchanged`: it had been asked before, or there was nothing to do."""
    new_run_id: str | None = None
    """rerun, replay."""
    code: str = ""
    """refused: the error's code and message."""
    message: str = ""


class BulkResult(Struct, frozen=True):
    """What a filter found, and what was done."""

    action: str
    dry_run: bool
    matched: int
    """Runs found by this call; of a dry run, all there are, up to COUNTED_MAX."""
    run_ids: list[str]
    """The first of them."""
    items: list[BulkItem]
    """One for each run, in the order of the listing; none in a dry run."""
    cursor: str | None
    """Where to go on; None: that was all."""

    def count(self, outcome: str) -> int:
        """How many runs answered so."""
        return sum(item.outcome == outcome for item in self.items)


Do = Callable[[RunRecord], Awaitable[BulkItem]]


def filtered(action: str, query: RunQuery) -> RunQuery:
    """The query, newest first, and of those runs that the action can be meant for where it does not say. Raises
    DefinitionError for an unknown action."""
    if action not in get_args(Action):
        raise DefinitionError(f"There is no bulk action {action!r}; there are {', '.join(get_args(Action))}.")
    # Oldest first would come by the very runs that a rerun makes.
    changes: dict[str, Any] = {"oldest_first": False}
    if query.status is None and query.statuses is None and query.activity is None:
        if action in ("cancel", "pause"):
            changes["status"] = Status.ACTIVE
        elif action == "resume":
            changes |= {"status": Status.ACTIVE, "activity": Activity.PAUSED}
        elif action == "requeue":
            changes["statuses"] = (Status.FAILED, Status.DEAD)
        else:
            changes["statuses"] = tuple(sorted(TERMINAL))
    return msgspec.structs.replace(query, **changes)


async def preview(action: str, query: RunQuery, find: Callable[[RunQuery], Awaitable[RunPage]]) -> BulkResult:
    """What would be done to how many."""
    query = msgspec.structs.replace(filtered(action, query), limit=PAGE)
    matched, first = 0, list[str]()
    while True:
        page = await find(query)
        matched += len(page.runs)
        first += [run.id for run in page.runs[: SHOWN - len(first)]]
        if page.cursor is None or matched >= COUNTED_MAX:
            return BulkResult(action, True, matched, first, [], page.cursor)
        query = msgspec.structs.replace(query, cursor=page.cursor)


async def perform(
    action: str, query: RunQuery, find: Callable[[RunQuery], Awaitable[RunPage]], do: Do, limit: int
) -> BulkResult:
    """Do it to at most `limit` runs. Raises StoreError where the store is away; what was done until then is done."""
    query = filtered(action, query)
    items: list[BulkItem] = []
    while True:
        page = await find(msgspec.structs.replace(query, limit=min(PAGE, limit - len(items))))
        for start in range(0, len(page.runs), AT_ONCE):
            items += await asyncio.gather(*(_one(run, do) for run in page.runs[start : start + AT_ONCE]))
        if page.cursor is None or len(items) >= limit:
            return BulkResult(action, False, len(items), [item.run_id for item in items[:SHOWN]], items, page.cursor)
        query = msgspec.structs.replace(query, cursor=page.cursor)


async def act(
    engine: WorkflowEngine, rerunner: Rerunner, action: str, options: Options, workspace: str, run: RunRecord
) -> BulkItem:
    """Ask one run. Raises what that verb raises."""
    if action in ("rerun", "replay"):
        step = options.from_step if action == "rerun" else None
        wish = Again(kind=action, from_step=step, input=options.input, key=f"bulk:{options.key}")
        new_id, new = await rerunner.again(run.id, wish, workspace)
        return BulkItem(run.id, "done" if new else "unchanged", new_id)
    if action == "cancel":
        done = await engine.cancel(run.id, options.reason, children=options.children, workspace=workspace)
    elif action == "pause":
        done = await engine.pause(run.id, by=options.by, reason=options.reason, workspace=workspace)
    elif action == "resume":
        done = await engine.resume(run.id, by=options.by, timers=options.timers, workspace=workspace)
    else:
        done = await engine.requeue(run.id, workspace=workspace)
    return BulkItem(run.id, "done" if done else "unchanged")


async def _one(run: RunRecord, do: Do) -> BulkItem:
    try:
        return await do(run)
    except StoreError:
        raise
    except DurableError as error:
        return BulkItem(run.id, "refused", code=error.code, message=str(error))
