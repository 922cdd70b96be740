"""Proof that a result answers a task that was sent: an HMAC over which attempt of which step it was, under a key that the
engines share. Whoever cannot read the tasks cannot make one up; whoever echoes it says nothing else with it.
"""

from __future__ import annotations

import hashlib
import hmac

from durable.protocol.messages import RemoteTask, StepResult

DIGITS = 32
"""Hex digits of a token: 128 bits."""


def make_token(key: str, run_id: str, seq: int, attempt: int) -> str:
    """The token of an attempt. `key`: the engines' secret."""
    said = f"{run_id}\n{seq}\n{attempt}".encode()
    return hmac.new(key.encode(), said, hashlib.sha256).hexdigest()[:DIGITS]


def task_token(key: str, task: RemoteTask) -> str:
    """The token that goes out with a task."""
    return make_token(key, task.run_id, task.seq, task.attempt)


def proves(key: str, result: StepResult) -> bool:
    """Whether the token of a result is the one its attempt was sent with."""
    if result.token is None or result.attempt is None:
        return False
    expected = make_token(key, result.run_id, result.seq, result.attempt)
    return hmac.compare_digest(expected.encode(), result.token.encode("utf-8", "replace"))
