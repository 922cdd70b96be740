"""Tasks and answers as BullMQ jobs, so that workers of any language that has the package can take part.

`transport.py` is the transport. Below it: `link.py` (connections to one Redis), `jobs.py` (BullMQ's queue, as much as is needed
of it), `intake.py` (taking jobs as there is room), `locks.py` (keeping them), `watch.py` (what BullMQ has given up on, what
Redis has lost), `liveness.py` (who is alive). Beside it, shared with the lane: `redis_link.py` (a connection on which nobody
waits for anybody), `redis_settings.py` (what the server may lose).
"""

from durable.core.errors import DefinitionError

try:
    from durable.transports.bullmq.transport import BullMQTransport
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("durable"):
        raise
    raise DefinitionError("The BullMQ transport needs its drivers: pip install 'durable[redis]'.") from missing

__all__ = ["BullMQTransport"]
