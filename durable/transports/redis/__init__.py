"""Our own fast lane over Redis streams.

`transport.py` is the transport. Below it: `tasks.py` (the worker end), `answers.py` (the engine end), `scripts.py` (what happens
on the server as one step). Beside it, shared with BullMQ's: `redis_link.py` (a connection on which nobody waits for anybody),
`redis_settings.py` (what the server may lose).
"""

from durable.core.errors import DefinitionError

try:
    from durable.transports.redis.transport import RedisTransport
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("durable"):
        raise
    raise DefinitionError("The Redis lane needs its drivers: pip install 'durable[redis]'.") from missing

__all__ = ["RedisTransport"]
