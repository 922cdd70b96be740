"""What an app over HTTP tells of itself when it is asked: `GET` of its URL (wire section 4, protocol/functions.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from durable.core.errors import CallRefused, RunnerGone, RunnerRefused
from durable.protocol import signature
from durable.runners.http import AWAY, believed, refused, signatures
from durable.runners.outgoing import Outgoing

DISCOVERY_HEADER = "x-durable-discovery"


class Manifest(Struct, frozen=True, rename="camel"):
    """`functions` as in `/fn/sync`. The rest an app tells in development, to whoever discovers it."""

    functions: list[dict[str, Any]]
    sdk_version: str | None = None
    app_id: str | None = None
    app_name: str | None = None
    signing_key: str | None = None

    def sync(self) -> bytes:
        """The same as the body of `/fn/sync`."""
        return msgspec.json.encode({"functions": self.functions, "sdkVersion": self.sdk_version})


async def fetch(
    outgoing: Outgoing, url: str, keys: Sequence[str], *, now_ms: int, discover: bool = False, timeout: float = 10.0
) -> Manifest:
    """Ask the app at this URL. `keys`: the workspace's, the one to sign with first; without any the question is not signed,
    and the answer only where the app tells its key. `discover`: development, ask for id and key, too. Raises RunnerError."""
    stamp = str(now_ms)
    headers = {signature.TIMESTAMP_HEADER: stamp}
    if keys:
        headers[signature.HEADER] = signature.body_signature(keys[0], stamp.encode())
    if discover:
        headers[DISCOVERY_HEADER] = "true"
    try:
        answer = await outgoing.request("GET", url, headers=headers, timeout=timeout)
    except CallRefused as error:
        raise RunnerRefused(str(error), retryable=False) from None
    if answer.status in AWAY:
        raise RunnerGone(f"The app at {url} is away: it answered {answer.status}.")
    if answer.status != 200:
        raise refused(answer, f"at {url}")
    if keys:
        with believed(f"at {url}"):
            signature.check_body(signatures(answer), keys, answer.body)
    try:
        manifest = msgspec.json.decode(answer.body, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RunnerRefused(f"What answers at {url} is no app's manifest: {error}", retryable=False) from None
    if not keys and manifest.signing_key is not None and signatures(answer):
        with believed(f"at {url}"):
            signature.check_body(signatures(answer), [manifest.signing_key], answer.body)
    return manifest
