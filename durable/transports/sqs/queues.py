"""Where the queues are: names to URLs, creating them, and what the service's errors mean in a sentence."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
from aiobotocore.session import get_session  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.loaders import create_loader  # type: ignore[import-untyped]

from durable.core.errors import TransportError
from durable.protocol import names
from durable.transports.sqs.batches import EntryRefused

log = logging.getLogger("durable.transports")

NAME_MAX = 80
"""Characters of a queue's name."""
RETENTION = 14 * 24 * 3600
"""Seconds a message waits before SQS drops it without a word: the most it offers."""
CONNECT_SECONDS = 2.0
CONNECTIONS = 10_000
"""A long poll holds one; there is one for each group."""

_loader = create_loader()
"""What the service's calls look like is read from disk once, not for each transport."""

_ABSENT = {"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"}
_BAD_NAME = {"InvalidParameterValue", "InvalidAddress"}
_TAKEN = {"QueueAlreadyExists", "QueueNameExists"}
_WHO = {
    *("InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch", "InvalidSignatureException"),
    *("ExpiredToken", "ExpiredTokenException", "IncompleteSignature", "MissingAuthenticationToken", "InvalidSecurity"),
}
_MAY = {"AccessDenied", "AccessDeniedException", "AuthorizationError", "KmsAccessDenied"}


class Absent(TransportError):
    """There is no such queue."""


class Queue:
    """One queue as the wire calls it."""

    def __init__(self, name: str, *, url: str | None = None, redrive: bool = False) -> None:
        self.name = name
        self.url = url
        """Given by whoever configures; None: found by its name."""
        self.redrive = redrive
        """What nobody answers goes from here to the dead-letter queue."""


class Queues:
    """The client and the queues it knows."""

    def __init__(
        self,
        *,
        region: str | None,
        endpoint_url: str | None,
        prefix: str,
        fifo: bool,
        create: bool,
        task_urls: Mapping[str, str],
        results_url: str | None,
        decisions_url: str | None,
        dead_url: str | None,
        visibility: int,
        max_receives: int,
        read_timeout: float,
    ) -> None:
        self._region = region
        self.endpoint_url = endpoint_url or os.environ.get("SQS_ENDPOINT_URL")
        self._prefix = prefix
        self._fifo = fifo
        self._create = create
        self._task_urls = dict(task_urls)
        self._visibility = visibility
        self._max_receives = max_receives
        self._read_timeout = read_timeout
        self.results = Queue(names.results(prefix), url=results_url)
        self.decisions = Queue(names.decisions(prefix), url=decisions_url)
        self.dead = Queue(names.dead(prefix), url=dead_url)
        self._urls: dict[str, str] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._stack: AsyncExitStack | None = None
        self.client: Any = None

    def tasks(self, group: str) -> Queue:
        """Where tasks of one group wait."""
        return Queue(names.tasks(self._prefix, group), url=self._task_urls.get(group), redrive=True)

    async def open(self) -> None:
        """Build the client; nothing is sent yet. Raises TransportError."""
        session = get_session()
        session.register_component("data_loader", _loader)
        config = AioConfig(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=self._read_timeout,
            retries={"mode": "standard", "total_max_attempts": 2},
            max_pool_connections=CONNECTIONS,
        )
        stack = AsyncExitStack()
        try:
            self.client = await stack.enter_async_context(
                session.create_client("sqs", region_name=self._region, endpoint_url=self.endpoint_url, config=config)
            )
        except (BotoCoreError, ValueError) as error:
            raise TransportError(self.sentence(error)) from error
        self._stack = stack

    async def close(self) -> None:
        """Let go of the connections."""
        stack, self._stack, self.client = self._stack, None, None
        self._urls.clear()
        if stack is not None:
            await stack.aclose()

    async def url(self, queue: Queue) -> str:
        """Where it is; made there and then if it may be. Raises Absent, and what the service says."""
        if queue.url is not None:
            return queue.url
        known = self._urls.get(queue.name)
        if known is None:
            async with self._turns[queue.name]:
                known = self._urls.get(queue.name)
                if known is None:
                    known = self._urls[queue.name] = await self._find(queue)
        return known

    def forget(self, queue: Queue) -> None:
        """It was not where we thought; look again."""
        self._urls.pop(queue.name, None)

    async def _find(self, queue: Queue) -> str:
        spelled = self._spelled(queue)
        found = await self._look_up(spelled)
        if found is not None and queue.redrive:
            await self._warn(queue, found)
        if found is None and self._create:
            found = await self._make(queue, spelled[-1]) or await self._look_up(spelled)
        if found is None:
            raise Absent(
                f"SQS has no queue {' or '.join(spelled)} in region {self._where}: create it, give its URL, check the region, "
                "or let the transport make its queues with create_queues=True."
            )
        return found

    async def _warn(self, queue: Queue, url: str) -> None:
        """It is not ours to change; but what nobody ever gives up on is never heard of."""
        try:
            answer = await self.client.get_queue_attributes(QueueUrl=url, AttributeNames=["RedrivePolicy"])
        except ClientError:
            return  # whoever may not look does without
        if "RedrivePolicy" not in answer.get("Attributes", {}):
            log.warning(
                "queue %s has no redrive policy: a task that kills its worker comes again and again. Give it one that leads "
                "to %s.", queue.name, self.dead.name,
            )  # fmt: skip

    def _spelled(self, queue: Queue) -> list[str]:
        suffix = ".fifo" if self._fifo else ""
        spelled = [name + suffix for name in names.spellings(queue.name)]
        if len(spelled[-1]) > NAME_MAX:
            raise TransportError(
                f"The queue {spelled[-1]} would have a name of {len(spelled[-1])} characters, and SQS allows {NAME_MAX}: "
                "shorten the step's name or the prefix, or give a queue of your own in queue_urls."
            )
        return [name for name in spelled if len(name) <= NAME_MAX]

    async def _look_up(self, spelled: list[str]) -> str | None:
        for name in spelled:
            try:
                answer = await self.client.get_queue_url(QueueName=name)
            except ClientError as error:
                if not _says(error, _ABSENT | (_BAD_NAME if name != spelled[-1] else set())):
                    raise
            else:
                return str(answer["QueueUrl"])
        return None

    async def _make(self, queue: Queue, name: str) -> str | None:
        """None: somebody else makes it at this moment, in another way."""
        attributes = {"VisibilityTimeout": str(self._visibility), "MessageRetentionPeriod": str(RETENTION)}
        if self._fifo:
            attributes["FifoQueue"] = "true"
        if queue.redrive:
            policy = {"deadLetterTargetArn": await self._arn(self.dead), "maxReceiveCount": self._max_receives}
            attributes["RedrivePolicy"] = json.dumps(policy)
        try:
            answer = await self.client.create_queue(QueueName=name, Attributes=attributes)
        except ClientError as error:
            if _says(error, _TAKEN):
                return None
            raise
        return str(answer["QueueUrl"])

    async def _arn(self, queue: Queue) -> str:
        for last in (False, True):
            try:
                answer = await self.client.get_queue_attributes(
                    QueueUrl=await self.url(queue), AttributeNames=["QueueArn"]
                )
            except ClientError as error:
                if last or not self.absent(error):
                    raise
                self.forget(queue)  # somebody deleted it
            else:
                break
        return str(answer["Attributes"]["QueueArn"])

    @property
    def _where(self) -> str:
        region = getattr(getattr(self.client, "meta", None), "region_name", None) or self._region
        return f"{region} at {self.endpoint_url}" if self.endpoint_url else str(region)

    def absent(self, error: BaseException) -> bool:
        """Whether it says that a queue we knew is gone."""
        if isinstance(error, EntryRefused):
            return error.code in _ABSENT
        return isinstance(error, ClientError) and _says(error, _ABSENT)

    def sentence(self, error: BaseException) -> str:
        """What is wrong, and what to do about it."""
        if isinstance(error, TransportError):
            return str(error)
        if isinstance(error, NoRegionError):
            return "SQS needs a region: give region=, or set AWS_DEFAULT_REGION."
        if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError | ProfileNotFound):
            return (
                f"SQS needs credentials ({error}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role. A local "
                "server takes any."
            )
        if isinstance(error, ClientError):
            return self._refusal(error)
        if isinstance(error, ConnectionError | HTTPClientError | TimeoutError):
            return (
                f"SQS does not answer in region {self._where}: {error or type(error).__name__}. Check the network, the region "
                "(AWS_DEFAULT_REGION) and the endpoint (SQS_ENDPOINT_URL)."
            )
        return f"SQS: {error or type(error).__name__}"

    def _refusal(self, error: ClientError) -> str:
        code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
        if _says(error, _WHO):
            return (
                f"SQS does not know these credentials in region {self._where} ({code}): check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_DEFAULT_REGION."
            )
        if _says(error, _MAY):
            return (
                f"SQS refuses {error.operation_name} ({message}): give these credentials the rights that "
                "docs/transports/sqs.md lists."
            )
        return f"SQS refuses {error.operation_name}: {code}: {message}"


def _says(error: ClientError, codes: set[str]) -> bool:
    """The JSON protocol prefixes codes with their namespace, and keeps the old one in a header."""
    said = error.response.get("Error", {})
    return str(said.get("Code", "")).rpartition("#")[2] in codes or str(said.get("QueryErrorCode", "")) in codes
