"""moto's server with its queues locked: a program for tests/servers/sqs.py.

Its requests run in threads, and as it is a message that is sent while another is deleted may be lost, which no SQS does; and a
long poll on a FIFO queue whose group is taken turns without rest.
"""

from __future__ import annotations

import functools
from typing import Any

from moto.server import main
from moto.sqs.models import Queue, SQSBackend


def locked(owner: type, method: str, queue_of: Any) -> None:
    """One call at a time for each queue. A long poll lets go of the lock while it waits."""
    unlocked = getattr(owner, method)

    @functools.wraps(unlocked)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        with queue_of(self, *arguments, **named)._messages_lock:
            return unlocked(self, *arguments, **named)

    setattr(owner, method, call)


def named(self: SQSBackend, queue_name: str, *_: Any, **__: Any) -> Queue:
    return self.get_queue(queue_name)


def wait_for_messages(self: Queue, timeout: float) -> None:
    """Until something was sent, or a little while has passed: what is invisible now comes back by itself."""
    with self._messages_lock:
        self._messages_lock.wait(min(timeout, 0.05))


if __name__ == "__main__":
    for method in ("add_message", "delete_message"):
        locked(Queue, method, lambda self, *_, **__: self)
    for method in ("receive_message", "change_message_visibility"):
        locked(SQSBackend, method, named)
    Queue.wait_for_messages = wait_for_messages
    main()
