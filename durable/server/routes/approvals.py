"""Approvals: what waits for somebody's decision, and deciding it, once."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from durable.core.errors import RunFinished, RunNotFound
from durable.server.auth import in_reach
from durable.server.errors import ApiError
from durable.server.route import Answer, Call, check_id
from durable.server.views import iso
from durable.store.items import ItemKey, ItemQuery

KIND = "approval"
MOST = 500


class Approval(Struct, frozen=True, rename="camel", omit_defaults=True):
    """What is to be decided: `tool` with `args`, and how risky that is."""

    id: str
    run_id: str
    workflow: str
    app: str
    name: str
    requested_at: str
    args: Raw
    tool: str | UnsetType = UNSET
    risk: str | UnsetType = UNSET
    summary: str | UnsetType = UNSET
    policy: Any = UNSET
    context: Any = UNSET
    escalates_to: Any = UNSET
    expires_at: str | UnsetType = UNSET


class Decision(Struct, frozen=True, rename="camel"):
    """`args`: other ones than were asked for; left out, those that were. Who decides is named by whoever asks on their behalf."""

    status: Literal["approved", "denied"]
    args: Raw | UnsetType = UNSET
    decided_by: str | None = None


class Decided(Struct, frozen=True):
    ok: bool


class _Item(Struct, rename="camel"):
    id: str
    run_id: str
    workflow: str
    app: str
    name: str
    signal: str
    requested_at: int
    args: Raw = Raw(b"null")
    expires_at: int | None = None
    tool: Any = UNSET
    risk: Any = UNSET
    summary: Any = UNSET
    policy: Any = UNSET
    context: Any = UNSET
    escalates_to: Any = UNSET


async def list_approvals(call: Call) -> Answer:
    """What waits for a decision in this workspace."""
    page = await call.engine.deps.store.list_items(ItemQuery(KIND, call.workspace(call.query.app), limit=MOST))
    return Answer([_view(msgspec.json.decode(item.data, type=_Item)) for item in page.items])


async def decide(call: Call) -> Answer:
    """Decide it. The first decision counts: 409 where another has been made."""
    body: Decision = call.body
    approval_id = check_id(call.params["id"])
    run_id = approval_id.rpartition(".approval.")[0]
    record = (await call.engine.deps.store.get([run_id]))[0] if run_id else None
    if record is None or not in_reach(call.principal, record.workspace):
        raise _unknown()
    found = (await call.engine.deps.store.get_items([ItemKey(record.workspace, KIND, approval_id)]))[0]
    if found is None:
        raise _unknown()
    item = msgspec.json.decode(found.data, type=_Item)
    args = item.args if isinstance(body.args, UnsetType) else body.args
    decision = {"status": body.status, "args": args, "decidedBy": body.decided_by}
    try:
        new = await call.engine.signal(
            run_id,
            item.signal,
            msgspec.json.decode(msgspec.json.encode(decision)),
            id=item.id,
            workspace=record.workspace,
        )
    except (RunNotFound, RunFinished):
        raise _unknown() from None
    if not new:
        raise ApiError(409, "conflict", "This has been decided already.")
    return Answer(Decided(True))


def _unknown() -> ApiError:
    return ApiError(404, "not_found", "There is no such approval in this workspace, or it needs no decision any more.")


def _view(item: _Item) -> Approval:
    return Approval(
        id=item.id,
        run_id=item.run_id,
        workflow=item.workflow,
        app=item.app,
        name=item.name,
        requested_at=iso(item.requested_at),
        args=item.args,
        tool=item.tool,
        risk=item.risk,
        summary=item.summary,
        policy=item.policy,
        context=item.context,
        escalates_to=item.escalates_to,
        expires_at=UNSET if item.expires_at is None else iso(item.expires_at),
    )
