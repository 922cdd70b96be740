"""Runners that serve, the engine's end: a pass is posted to their `/invoke` (wire section 5)."""

from __future__ import annotations

import secrets
from urllib.parse import urlsplit

from durable.core.errors import RunnerGone
from durable.core.functions import Pass, Reply
from durable.protocol import signature
from durable.runners.http import AWAY, believed, post, refused, signatures
from durable.runners.outgoing import Answered, Outgoing
from durable.runners.workspaces import Workspaces

_STATUSES = frozenset({200, 206, 400, 500})


class ServeLink:
    """Posts passes to one runner's URL. `signs`: it has said that it has a key, so an answer of its without a signature is
    somebody else's."""

    def __init__(self, outgoing: Outgoing, workspaces: Workspaces, url: str, *, signs: bool) -> None:
        self._outgoing = outgoing
        self._workspaces = workspaces
        self._url = url
        self._signs = signs

    async def invoke(self, call: Pass, *, timeout: float) -> Reply:
        workspace = await self._workspaces.get(call.workspace)
        now = self._workspaces.now()
        key = None if workspace is None else workspace.signing_key(now)
        headers: dict[str, str] = {}
        path, nonce = request_path(self._url), secrets.token_urlsafe(16)
        if key is not None:
            headers[signature.HEADER] = signature.sign(
                key.secret, "POST", path, call.body, ts=now // 1_000_000, nonce=nonce
            )
        answer = await post(self._outgoing, self._url, call.body, headers, timeout)
        if answer.status in AWAY:
            raise RunnerGone(f"A runner of app {call.app} is away: it answered {answer.status}.")
        if answer.status not in _STATUSES:
            raise refused(answer, call.app)
        if workspace is not None and key is not None:
            with believed(call.app):
                self._check(answer, workspace.secrets(now), path, nonce)
        return Reply(answer.status, answer.body)

    def _check(self, answer: Answered, keys: list[str], path: str, nonce: str) -> None:
        """Ours sign with the request's nonce, others perhaps as section 4 has it. What is wrong is refused of anybody."""
        given = signatures(answer)
        if signature.is_plain(given):
            signature.check_body(given, keys, answer.body)
        elif given or self._signs:
            now = self._workspaces.now() / 1e6
            signature.check(given, keys, str(answer.status), path, answer.body, now=now, nonce=nonce)


def request_path(url: str) -> str:
    """A URL's path and query, as they stand in the request line."""
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
