"""How an engine reaches the code of an app: hand over a pass, get an answer. One implementation for each way:

    http        the engine posts to the app's URL, one operation per round trip       wire section 4
    serve       the engine posts to a runner's URL                                    section 5
    connect     the engine sends a frame to a runner that has dialled in              section 5
    node        another engine holds that connection, and is asked to                 ours

Every call is bounded in time and in size, either way. What goes wrong is one of core/errors.py:

    RunnerGone      nobody took it: no runner, or it went away; asked again as soon as one is there, but of a pinned run
    RunnerTimeout   it may have been taken; no answer came in time
    RunnerRefused   the app refused it (signature, status), or its answer is refused (size)
    BadAnswer       the answer cannot be understood
"""

from __future__ import annotations

from typing import Literal, Protocol

from msgspec import Struct

from durable.core.functions import Pass, Reply

MAX_BODY = 1 << 20
"""Bytes of a request, a frame and an answer."""
KIND = "runner"
"""Of the items that say who is alive."""
NODE = "node"
"""Of the items that say where an engine can be reached by others."""


class RunnerLink(Protocol):
    """One way to reach an app."""

    async def invoke(self, call: Pass, *, timeout: float) -> Reply:
        """Ask for a pass. Raises RunnerGone, RunnerTimeout, RunnerRefused. Cancelling it lets the answer go."""
        ...


class RunnerInfo(Struct, rename="camel", omit_defaults=True, kw_only=True):
    """A live runner, as its item says. Times are µs."""

    instance: str
    """One process, for as long as it is connected; of one that serves, its URL."""
    app: str
    runner: str | None = None
    """What it calls itself; runs may be pinned to that."""
    mode: Literal["connect", "serve"] = "connect"
    url: str | None = None
    node: str | None = None
    """The engine that holds its connection."""
    runtime: str = ""
    language: str | None = None
    sdk_name: str = ""
    version: str = ""
    framework: str = ""
    region: str | None = None
    key_fingerprint: str | None = None
    key_matches: bool | None = None
    """Whether that is a live key of its workspace; None: it said none."""
    heartbeat_ms: int = 0
    workflows: list[str] = []
    since: int = 0
    seen: int = 0
    in_flight: int = 0
    """As of `seen`."""


class Node(Struct, rename="camel", kw_only=True):
    """An engine that others may reach."""

    url: str
    """Of its internal endpoint."""
    key: str
    """What requests to it are signed with."""
