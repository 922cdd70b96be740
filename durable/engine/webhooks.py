"""What an engine does for webhooks: addresses for waits, calls to other people's addresses, and what is posted to ours.

Something posted comes as a signal that has the wait's own name, so journal, replay and order are what they are for signals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from durable.core import payload
from durable.core.errors import (
    CallFailed,
    CallRefused,
    ForkRefused,
    NonRetryable,
    PayloadError,
    RetryAfter,
    RunnerError,
)
from durable.core.journal import STEP, Entry
from durable.core.payload import fingerprint
from durable.core.webhooks import Delivered, Delivery, Hook, hook_of, signature, token_of, wait_name
from durable.engine.deps import Deps
from durable.engine.signals import Mail
from durable.protocol.states import TERMINAL
from durable.store.records import Message

MAX_BODY = 1 << 20
"""Bytes of what is posted, sent or answered."""
MAX_WAIT = 3_600.0
"""Seconds a receiver may put us off by `Retry-After`."""
_AGAIN = frozenset({408, 425, 429})


class Answer(Protocol):
    @property
    def status(self) -> int: ...
    @property
    def body(self) -> bytes: ...
    @property
    def headers(self) -> Mapping[str, str]:
        """Names in small letters."""
        ...


class Caller(Protocol):
    """Makes calls to addresses that somebody else has chosen (durable/runners/outgoing.py)."""

    async def request(
        self,
        method: str,
        url: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float = 10.0,
        limit: int = MAX_BODY,
    ) -> Answer:
        """Raises CallRefused, RunnerError."""
        ...


class Hooks:
    """Of one engine."""

    def __init__(self, deps: Deps, mail: Mail, caller: Caller | None = None) -> None:
        self._deps = deps
        self._mail = mail
        self.caller = caller

    def at(self, workspace: str) -> At:
        """For the steps of a workspace's runs."""
        return At(self, workspace)

    @property
    def secret(self) -> str:
        """What addresses bear a MAC of. Raises NonRetryable where there is none."""
        settings = self._deps.settings
        secret = settings.webhook_key or settings.task_key
        if not secret:
            raise NonRetryable(
                "A webhook's address needs a secret: Durable(..., webhook_key=...), the same on all engines."
            )
        return secret

    def url(self, hook: Hook) -> str:
        """The address of a wait."""
        base = self._deps.settings.public_url
        if not base:
            raise NonRetryable(
                "A webhook's address needs to know where this service is reached: Durable(..., public_url='https://…')."
            )
        return f"{base.rstrip('/')}/hooks/{token_of(self.secret, hook)}"

    async def deliver(self, token: str, body: bytes) -> bool:
        """Something was posted. True: it settled its wait, or will; False: it is recorded, and settles nothing, since another was
        first. Raises RunNotFound, RunFinished, PayloadTooLarge."""
        hook = hook_of(self.secret, token)
        data = _json(body)
        message = Message(
            run_id=hook.run_id,
            id=f"webhook:{hook.wait}",
            kind="signal",
            name=wait_name(hook.wait),
            payload=data,
            workspace=hook.workspace,
        )
        if await self._mail.must_send(message):
            return True
        record = (await self._deps.store.get([hook.run_id]))[0]
        if record is None or record.status not in TERMINAL:
            # Told apart by what they say: the same again, sent again since our answer was lost, is recorded once.
            again = msgspec.structs.replace(message, id=f"webhook:{hook.wait}:{fingerprint(data)}")
            await self._mail.send(again)
        return False

    async def call(self, delivery: Delivery) -> Delivered:
        """One attempt, signed."""
        if self.caller is None:
            raise NonRetryable("This engine makes no outgoing calls: pip install 'durable[service]'.")
        if len(delivery.data) > MAX_BODY:
            raise NonRetryable(f"The body is {len(delivery.data):,} bytes, and a call carries {MAX_BODY:,} (1 MiB).")
        try:
            answer = await self.caller.request(
                "POST",
                delivery.url,
                body=delivery.data,
                headers=self._headers(delivery),
                timeout=delivery.timeout,
                limit=MAX_BODY,
            )
        except CallRefused as error:
            raise NonRetryable(str(error)) from error
        except RunnerError as error:
            if error.retryable:
                raise CallFailed(str(error)) from error
            raise NonRetryable(str(error)) from error
        _judge(answer)
        data = msgspec.json.decode(delivery.data)
        body = msgspec.json.decode(_json(answer.body))
        return Delivered(answer.status, body, delivery.id, delivery.url, data, delivery.headers)

    def _headers(self, delivery: Delivery) -> dict[str, str]:
        theirs = {name: value for name, value in delivery.headers.items() if not name.lower().startswith("x-durable-")}
        ours = {"x-durable-delivery": delivery.id, "x-durable-attempt": str(delivery.attempt)}
        key = self._deps.settings.webhook_key or self._deps.settings.task_key
        if key:
            ours["x-durable-signature"] = signature(key, delivery.data)
        return theirs | ours


class At:
    """Webhooks for the steps of one workspace's runs."""

    def __init__(self, hooks: Hooks, workspace: str) -> None:
        self._hooks = hooks
        self._workspace = workspace

    def url(self, run_id: str, wait: str) -> str:
        return self._hooks.url(Hook(self._workspace, run_id, wait))

    async def call(self, delivery: Delivery) -> Delivered:
        return await self._hooks.call(delivery)


def _judge(answer: Answer) -> None:
    status = answer.status
    if 200 <= status < 300:
        return
    message = f"The receiver answered {status}."
    if status not in _AGAIN and status < 500:
        raise NonRetryable(f"{message} It will not take this call however often it is made.")
    wait = answer.headers.get("retry-after", "")
    if wait.isdigit():
        raise RetryAfter(message, seconds=min(float(wait), MAX_WAIT))
    raise CallFailed(message)


def _json(body: bytes) -> bytes:
    """JSON as it is, anything else as text."""
    if not body:
        return b"null"
    try:
        payload.check(body, what="what was posted", limit=MAX_BODY)
    except PayloadError:
        if len(body) > MAX_BODY:
            raise
        text: Any = payload.clean(body.decode(errors="replace"))
        return payload.encode(text, what="what was posted")
    return body


def delivery_of(run_id: str, step: str, entries: Sequence[Entry]) -> Delivery:
    """The call that a step of a run has made. Raises ForkRefused if there is none."""
    for entry in reversed(entries):
        if entry.kind == STEP and entry.key == step and entry.status == "completed" and entry.payload is not None:
            try:
                sent = msgspec.json.decode(entry.payload, type=Delivered)
            except msgspec.ValidationError:
                break
            return Delivery(sent.id, sent.url, msgspec.json.encode(sent.data), sent.headers, entry.attempt + 1)
    raise ForkRefused(f"Step {step!r} of run {run_id!r} has made no call that went out.", run_id=run_id)
