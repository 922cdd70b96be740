"""W3C trace context of steps. Ids are derived, not drawn: every attempt of a run, on whatever engine, is in the same trace, and
whoever exports spans later finds the ids that workers were told.
"""

from __future__ import annotations

import hashlib
import uuid
from functools import lru_cache


@lru_cache(maxsize=10_000)
def trace_id(run_id: str) -> str:
    """32 hex digits: a run and its children share the trace of the first of them, whose uuid it is where it is one."""
    root = run_id.partition(".")[0]
    try:
        return uuid.UUID(root).hex
    except ValueError:
        return hashlib.sha256(root.encode()).hexdigest()[:32]


def span_id(task_id: str, attempt: int) -> str:
    """16 hex digits, of one attempt."""
    return hashlib.sha256(f"{task_id}/{attempt}".encode()).hexdigest()[:16]


def traceparent(run_id: str, task_id: str, attempt: int) -> str:
    """What a worker continues, as the header of that name has it: sampled."""
    return f"00-{trace_id(run_id)}-{span_id(task_id, attempt)}-01"
