"""Webhooks, both ways: a wait that has a URL, and calls to other people's URLs as steps.

A URL's token says which wait it is for and bears a MAC, so nothing is stored for it and none can be guessed. It is journaled
when it is made: whatever the settings are later, a run goes on with the URL it gave away. A call goes out under the step's
id, the same for every attempt, so the receiver can tell one it has had. Both need what the engine has: a key, an address, a
way to call. Bodies get it through their step's scope.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from asyncio import Future
from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from msgspec import Struct

from durable.core.errors import NonRetryable, RunNotFound
from durable.core.retry import RetryPolicy
from durable.core.step import StepScope, current_step

T = TypeVar("T")

CALL_RETRIES = RetryPolicy(max_attempts=8, initial_delay=1.0, max_delay=300.0)
"""How a call is tried again where the step does not say: over about four minutes."""
CALL_SECONDS = 30.0
"""What a receiver has for its answer."""
_MAC_BYTES = 20


class Hook(Struct, frozen=True, array_like=True):
    """What a token says: which wait of which run."""

    workspace: str
    run_id: str
    wait: str
    """The key of the step that made the URL."""


class Delivered(Struct, frozen=True):
    """What came of a call, and what was sent: enough to send it again."""

    status: int
    body: Any
    """JSON as its value, anything else as text."""
    id: str
    url: str
    data: Any
    headers: Mapping[str, str] = {}


class Delivery(Struct, frozen=True):
    """A call to be made."""

    id: str
    url: str
    data: bytes
    headers: Mapping[str, str] = {}
    attempt: int = 1
    timeout: float = CALL_SECONDS
    """Seconds."""


class Webhooks(Protocol):
    """What an engine does for a step that has to do with webhooks."""

    def url(self, run_id: str, wait: str) -> str:
        """The address that settles this wait. Raises NonRetryable where the settings have none."""
        ...

    async def call(self, delivery: Delivery) -> Delivered:
        """Make one attempt. Raises NonRetryable, RetryAfter, or any error that is worth another attempt."""
        ...


class Webhook(Generic[T]):
    """A wait that has a URL."""

    def __init__(self, url: str, received: Future[T]) -> None:
        self.url = url
        """Give it away. Whoever posts to it first settles the wait; what else is posted is recorded and settles nothing."""
        self.received = received
        """What was posted, once. Awaited, or given to asyncio.wait_for, as any future."""


def token_of(secret: str, hook: Hook) -> str:
    """`<who>.<mac>`, safe in a URL."""
    who = _text(msgspec.json.encode(hook))
    return f"{who}.{_mac(secret, who)}"


def hook_of(secret: str, token: str) -> Hook:
    """Which wait a token is for. Raises RunNotFound for one that was not made with this secret."""
    who, _, mac = token.partition(".")
    if len(token) < 4_000 and hmac.compare_digest(mac.encode(errors="replace"), _mac(secret, who).encode()):
        try:
            return msgspec.json.decode(base64.urlsafe_b64decode(who + "=" * (-len(who) % 4)), type=Hook)
        except (msgspec.MsgspecError, binascii.Error, ValueError):
            pass
    raise RunNotFound("This address is none of ours: its token is not right.")


def signature(secret: str, body: bytes) -> str:
    """Of a body, as the header `x-durable-signature` has it: lowercase hex HMAC-SHA256."""
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def wait_name(wait: str) -> str:
    """The signal that what is posted comes as."""
    return f"webhook:{wait}"


# ------------------------------------------------------------------ bodies of steps


def make_url() -> str:
    """The body of a wait's step: its address."""
    scope = current_step()
    return _webhooks(scope).url(scope.run_id, scope.key)


async def call(url: str, data: Any, headers: dict[str, str], timeout: float) -> Delivered:
    """The body of a call's step: one attempt."""
    scope = current_step()
    body = msgspec.json.encode(data)
    return await _webhooks(scope).call(Delivery(scope.step_id, url, body, headers, scope.attempt, timeout))


def _webhooks(scope: StepScope) -> Webhooks:
    if scope.webhooks is None:
        raise NonRetryable(
            "Webhooks are an engine's business: use ctx.webhook and ctx.call_webhook in a workflow it runs."
        )
    found: Webhooks = scope.webhooks
    return found


def _mac(secret: str, who: str) -> str:
    # The purpose is part of the message: a key may serve others too.
    digest = hmac.new(secret.encode(), b"durable webhook " + who.encode(errors="replace"), hashlib.sha256).digest()
    return _text(digest[:_MAC_BYTES])


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
