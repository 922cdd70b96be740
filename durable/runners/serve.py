"""Runners that serve, the engine's end: a pass is posted to their `/invoke` (wire section 5)."""

from __future__ import annotations

from urllib.parse import urlsplit

from durable.core.errors import RunnerGone
from durable.core.functions import Pass, Reply
from durable.runners import signing
from durable.runners.http import AWAY, post, refused
from durable.runners.outgoing import Outgoing
from durable.runners.workspaces import Workspaces

_STATUSES = frozenset({200, 206, 400, 500})


class ServeLink:
    """Posts passes to one runner's URL."""

    def __init__(self, outgoing: Outgoing, workspaces: Workspaces, url: str) -> None:
        self._outgoing = outgoing
        self._workspaces = workspaces
        self._url = url

    async def invoke(self, call: Pass, *, timeout: float) -> Reply:
        workspace = await self._workspaces.get(call.workspace)
        key = None if workspace is None else workspace.signing_key(self._workspaces.now())
        headers: dict[str, str] = {}
        if key is not None:
            now = self._workspaces.now() / 1e6
            headers[signing.HEADER] = signing.sign(key.secret, "POST", request_path(self._url), call.body, now=now)
        answer = await post(self._outgoing, self._url, call.body, headers, timeout)
        if answer.status in AWAY:
            raise RunnerGone(f"A runner of app {call.app} is away: it answered {answer.status}.")
        if answer.status not in _STATUSES:
            raise refused(answer, call.app)
        return Reply(answer.status, answer.body)


def request_path(url: str) -> str:
    """A URL's path and query, as they stand in the request line."""
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
