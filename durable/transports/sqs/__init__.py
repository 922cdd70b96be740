"""Steps over Amazon SQS, or whatever speaks its protocol.

queues     names to URLs, creating, and what the service's errors mean in a sentence
batches    many small calls become one
leases     messages in our hands stay invisible to others
transport  both ends
"""

from __future__ import annotations

from durable.core.errors import DefinitionError

try:
    import aiobotocore  # type: ignore[import-untyped]  # noqa: F401
except ImportError as error:
    raise DefinitionError(f"The SQS transport needs a driver: pip install 'durable[sqs]'. ({error})") from error

from durable.transports.sqs.transport import SqsTransport

__all__ = ["SqsTransport"]
