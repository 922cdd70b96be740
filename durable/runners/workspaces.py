"""What a call to an app needs to know of its workspace: where the app is, and what to sign with. Read from the workspace's item
and believed for a moment; who makes and changes workspaces is the server's business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import Struct

from durable.store.interface import Store
from durable.store.items import ItemKey

FRESH = 2.0
"""Seconds for which what was read is believed."""


class WorkspaceKey(Struct, rename="camel"):
    """A key of a workspace. Times are µs by the store's clock."""

    secret: str
    role: Literal["read", "full"] = "full"
    created_at: int = 0
    ends_at: int | None = None


class WorkspaceInfo(Struct, rename="camel"):
    """What its item says, as far as it concerns calls."""

    keys: list[WorkspaceKey] = []
    app_url: str | None = None

    def live_keys(self, now: int) -> list[WorkspaceKey]:
        """Those that count now; read-only ones sign nothing."""
        return [key for key in self.keys if key.role == "full" and (key.ends_at is None or now < key.ends_at)]

    def secrets(self, now: int) -> list[str]:
        """Of those keys: any of them may have signed what an app answers."""
        return [key.secret for key in self.live_keys(now)]

    def signing_key(self, now: int) -> WorkspaceKey | None:
        """The newest; None: this workspace has none, and calls are not signed."""
        return max(self.live_keys(now), key=lambda key: key.created_at, default=None)


class Workspaces:
    """Reads them from a store."""

    def __init__(self, store: Store, now: Callable[[], int], monotonic: Callable[[], float]) -> None:
        self._store = store
        self.now = now
        self._monotonic = monotonic
        self._known: dict[str, tuple[float, WorkspaceInfo | None]] = {}

    async def get(self, workspace: str) -> WorkspaceInfo | None:
        """What is known of a workspace; None: there is no item."""
        known = self._known.get(workspace)
        instant = self._monotonic()
        if known is not None and instant - known[0] < FRESH:
            return known[1]
        item = (await self._store.get_items([ItemKey(workspace, "workspace", workspace)]))[0]
        info = None if item is None else msgspec.json.decode(item.data, type=WorkspaceInfo)
        if len(self._known) > 10_000:
            self._known.clear()
        self._known[workspace] = (instant, info)
        return info
