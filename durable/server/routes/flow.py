"""How full the limits are."""

from __future__ import annotations

from msgspec import Struct

from durable.server.route import Answer, Call
from durable.server.views import iso


class FlowState(Struct, frozen=True, rename="camel", omit_defaults=True):
    """One rule as it stands. `queued`: due runs that wait behind it."""

    workflow: str
    lane: str
    rule: str
    kind: str
    limit: int
    period_ms: float
    used: int
    queued: int
    weight: float
    next_at: str | None = None


async def flow_state(call: Call) -> Answer:
    """Every limit of the workspace that has a run, or had one lately."""
    found = await call.engine.flow_state(workspace=call.workspace(call.query.app))
    return Answer(
        [
            FlowState(
                workflow=one.workflow,
                lane=one.lane,
                rule=one.rule,
                kind=one.kind,
                limit=one.limit,
                period_ms=one.period_us / 1000,
                used=one.used,
                queued=one.queued,
                weight=one.weight,
                next_at=iso(one.next_at) if one.next_at is not None else None,
            )
            for one in found
        ]
    )
