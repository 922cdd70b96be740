"""Our own fast lane over Redis streams."""

from durable.transports.redis.transport import RedisTransport

__all__ = ["RedisTransport"]
