"""What every store refuses before it touches its data, so that all of them refuse the same. Called by the adapters;
never looks at stored rows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from durable.core.errors import PayloadTooLarge, StoreError
from durable.core.journal import Entry
from durable.store.admission import EventQuery, NewEvent
from durable.store.items import NewItem
from durable.store.records import (
    AddFire,
    Commit,
    CommitOutcome,
    CommitStatus,
    Message,
    NewRun,
    PutItem,
    PutMessage,
    StartRun,
)


def check_batch(batch: Sequence[Commit], max_batch: int) -> None:
    """Raise for a batch no store takes: a mistake of the caller's, not of one commit."""
    if len(batch) > max_batch:
        raise StoreError(f"a batch of {len(batch)} commits is above this store's {max_batch}; send it in parts")
    if len({commit.run_id for commit in batch}) != len(batch):
        raise StoreError("a batch holds two commits of one run; the second must wait for the first's answer")


async def commit_storable(
    batch: Sequence[Commit],
    max_payload: int,
    commit: Callable[[Sequence[Commit]], Awaitable[list[CommitOutcome]]],
) -> list[CommitOutcome]:
    """`commit` those that can be stored; each of the others is answered with why it never can."""
    refused = {one.run_id: failure for one in batch if (failure := refusal(one, max_payload)) is not None}
    if not refused:
        return await commit(batch) if batch else []
    rest = [one for one in batch if one.run_id not in refused]
    answers = {run_id: CommitOutcome(CommitStatus.FENCED, failure=failure) for run_id, failure in refused.items()}
    if rest:
        answers.update(zip((one.run_id for one in rest), await commit(rest), strict=True))
    return [answers[one.run_id] for one in batch]


def refusal(commit: Commit, max_payload: int) -> Exception | None:
    """Why this commit can never be stored, or None."""
    try:
        check_entries(commit.entries, commit.expected_seq, max_payload)
        if commit.output is not None:
            check_payload(commit.output, max_payload)
        if commit.error is not None:
            check_payload(commit.error, max_payload)
        for effect in commit.effects:
            if isinstance(effect, (StartRun, AddFire)):
                check_run(effect.run, max_payload)
            elif isinstance(effect, PutMessage):
                check_message(effect.message, max_payload)
            elif isinstance(effect, PutItem):
                check_payload(effect.data, max_payload)
    except (StoreError, PayloadTooLarge) as error:
        return error
    return None


def check_run(run: NewRun, max_payload: int) -> None:
    if run.lane is not None and run.owner is not None:
        raise StoreError(f"run {run.id} has a lane, so only a claim may take it: start it without an owner")
    check_payload(run.input, max_payload)
    if run.meta is not None:
        check_payload(run.meta, max_payload)
    check_entries(run.entries, 0, max_payload)


def check_event(event: NewEvent, max_payload: int) -> None:
    check_payload(event.data, max_payload)
    for trigger in event.triggers:
        check_run(trigger.run, max_payload)


def check_events(query: EventQuery) -> None:
    if query.workspace is None and not query.unsettled:
        raise StoreError("events are asked for by workspace; of all workspaces only the unsettled ones may be")


def check_item(item: NewItem, max_payload: int) -> None:
    check_payload(item.data, max_payload)


def check_message(message: Message, max_payload: int) -> None:
    if message.payload is not None:
        check_payload(message.payload, max_payload)


def check_entries(entries: Sequence[Entry], after_seq: int, max_payload: int) -> None:
    """A gap in a journal could never be told from a lost row later, so it is refused now."""
    seq = after_seq
    for entry in entries:
        seq += 1
        if entry.seq != seq:
            raise StoreError(f"journal entry numbered {entry.seq} where {seq} comes next")
        payload = entry.payload
        if payload is not None and len(payload) > max_payload:
            check_payload(payload, max_payload)


def check_payload(payload: bytes, max_payload: int) -> None:
    if len(payload) > max_payload:
        raise PayloadTooLarge(
            f"a payload of {len(payload):,} bytes is above this store's {max_payload:,}; keep large values in object"
            " storage and pass their address"
        )
