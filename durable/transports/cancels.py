"""How a worker hears that a body shall stop: a control message about one task, or about a whole run."""

from __future__ import annotations

import time

from durable.protocol.messages import ControlMessage

STEP_CANCEL = "step.cancel"
"""The type of the event that is about one task, a step's or a turn's."""


def cancel_of(task_id: str, *, sender: str) -> ControlMessage:
    """All attempts of one task."""
    run_id = task_id.rpartition(":wf:")[0] or task_id.rpartition(":")[0]
    event = {"type": STEP_CANCEL, "runId": run_id, "stepId": task_id, "at": time.time_ns() // 1_000_000}
    return ControlMessage(sender=sender, kind="event", event=event)
