"""Steps over RabbitMQ's quorum queues.

transport  both ends, and the control plane
intake     tasks taken, and the room for them
link       connections and channels that come back by themselves
"""

from __future__ import annotations

from durable.core.errors import DefinitionError

try:
    from durable.transports.rabbitmq.transport import RabbitMqTransport
except ModuleNotFoundError as error:
    if (error.name or "").startswith("durable"):
        raise
    raise DefinitionError(f"RabbitMQ needs aio-pika: pip install 'durable[rabbitmq]'. ({error})") from error

__all__ = ["RabbitMqTransport"]
