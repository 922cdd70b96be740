"""Functions over HTTP, the engine's end: one operation per round trip (wire section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from durable.core.errors import CallRefused, RunnerGone, RunnerRefused
from durable.core.functions import Pass, Reply
from durable.protocol import signature
from durable.runners.outgoing import Answered, Outgoing
from durable.runners.workspaces import Workspaces

AWAY = frozenset({429, 502, 503, 504})
"""What a proxy says for an app that is away, or an app that wants to be left alone: it has not done anything."""


class HttpLink:
    """Posts passes to the URL of the app."""

    def __init__(self, outgoing: Outgoing, workspaces: Workspaces) -> None:
        self._outgoing = outgoing
        self._workspaces = workspaces

    async def invoke(self, call: Pass, *, timeout: float) -> Reply:
        workspace = await self._workspaces.get(call.workspace)
        if workspace is None or not workspace.app_url:
            raise RunnerGone(f"App {call.app} has no URL yet. Register it with `appUrl`, or sync with `url`.")
        live = sorted(workspace.live_keys(self._workspaces.now()), key=lambda key: -key.created_at)
        keys = [key.secret for key in live]
        answer = await self._post(workspace.app_url, call.body, keys[0] if keys else None, timeout)
        for older in keys[1:]:
            if answer.status != 401:
                break
            # A key is being replaced, and the app has not been given the new one yet.
            answer = await self._post(workspace.app_url, call.body, older, timeout)
        if answer.status != 200:
            raise refused(answer, call.app)
        if keys:
            with believed(call.app):
                signature.check_body(signatures(answer), keys, answer.body)
        return Reply(200, answer.body)

    async def _post(self, url: str, body: bytes, key: str | None, timeout: float) -> Answered:
        headers = {} if key is None else {signature.HEADER: signature.body_signature(key, body)}
        return await post(self._outgoing, url, body, headers, timeout)


async def post(outgoing: Outgoing, url: str, body: bytes, headers: Mapping[str, str], timeout: float) -> Answered:
    """A signed body to an app. Raises RunnerError; an address that is not called is refused for good."""
    try:
        return await outgoing.request("POST", url, body=body, headers=headers, timeout=timeout)
    except CallRefused as error:
        raise RunnerRefused(str(error), retryable=False) from None


@contextmanager
def believed(app: str) -> Iterator[None]:
    """What is raised of an answer's signature is told as a refusal. Raises RunnerRefused."""
    try:
        yield
    except signature.BadSignature as error:
        raise RunnerRefused(
            f"The answer of app {app} is not believed. {error} Answers bear {signature.HEADER}, made with the workspace's "
            "signing key."
        ) from None


def signatures(answer: Answered) -> list[str]:
    """The values of its signature header."""
    given = answer.headers.get(signature.HEADER)
    return [] if given is None else [given]


def refused(answer: Answered, app: str) -> Exception:
    """What an answer means that is none. What it says is not repeated."""
    status = answer.status
    if status in AWAY:
        return RunnerGone(f"App {app} is away: it answered {status}.")
    if 300 <= status < 400:
        return RunnerRefused(f"App {app} answered {status}, and redirects are not followed. Register the URL it means.")
    if status in (401, 403):
        return RunnerRefused(f"App {app} refused the signature ({status}). Has it the workspace's signing key?")
    return RunnerRefused(f"App {app} answered {status} instead of an operation.")
