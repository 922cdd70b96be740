"""What a worker has answered lately, so that a task that comes again because its answer got lost is answered, and not run,
again (S11). In this process only: a body may still run twice, and has its idempotency key for that.
"""

from __future__ import annotations

from collections import OrderedDict

from msgspec import Raw

from durable.protocol.messages import Answer, StepResult, Task

BYTES_MAX = 8 << 20
"""Bytes of answers kept, whatever their count. One of more than an eighth of that is not kept at all."""


class Answered:
    """The latest answers by task and attempt, at most `count`."""

    def __init__(self, count: int, size: int = BYTES_MAX) -> None:
        self._count = count
        self._size = size
        self._bytes = 0
        self._kept: OrderedDict[tuple[str, int], tuple[Answer, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, task: Task) -> Answer | None:
        """What was answered to this very attempt."""
        found = self._kept.get((task.id, task.attempt))
        if found is None:
            return None
        self._kept.move_to_end((task.id, task.attempt))
        return found[0]

    def put(self, task: Task, answer: Answer) -> None:
        """Remember it, and forget the oldest for it."""
        size = _size(answer)
        if size > self._size // 8 or not self._count:
            return
        before = self._kept.pop((task.id, task.attempt), None)
        self._bytes += size - (before[1] if before else 0)
        self._kept[task.id, task.attempt] = answer, size
        while len(self._kept) > self._count or self._bytes > self._size:
            _, (_, gone) = self._kept.popitem(last=False)
            self._bytes -= gone


def _size(answer: Answer) -> int:
    """Roughly, what it holds in memory."""
    size = 500 + (len(bytes(answer.output)) if isinstance(answer.output, Raw) else 0)
    if isinstance(answer, StepResult):
        size += sum(400 + len(event.message) for event in answer.events or ())
    else:
        size += 400 * len(answer.commands)
    if answer.error is not None:
        size += len(answer.error.message) + len(answer.error.stack or "")
    return size
