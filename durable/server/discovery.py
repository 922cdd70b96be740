"""Apps that are asked for their functions, instead of saying them: where one is provisioned with its URL, and in development
where the service is told the URL of one (setting `app_url`). An app that syncs its functions itself needs neither."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from durable.core.errors import DurableError, RunnerError
from durable.engine.functions import Functions
from durable.runners.manifest import Manifest, fetch
from durable.server.errors import ApiError
from durable.server.workspaces import Workspaces, check_app, split

log = logging.getLogger("durable.server")

DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before each try after provisioning: an app that has just been given its key may have to begin anew with it."""
LOOK_EVERY = 2.0
"""Seconds between two looks at an app in development."""


class Discovery:
    """Of one service. Begun after the functions, closed before them."""

    def __init__(self, functions: Functions, workspaces: Workspaces) -> None:
        self._functions = functions
        self._workspaces = workspaces
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._following: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Ask no more."""
        tasks = [*self._asking.values(), *([self._following] if self._following else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def provisioned(self, workspace: str, url: str) -> None:
        """Ask this workspace's app for its functions, in a while, and again if it is not there yet. Whatever it says by
        itself meanwhile goes before."""
        self.said(workspace)
        task = asyncio.get_running_loop().create_task(self._ask(workspace, url), name="durable-manifest")
        self._asking[workspace] = task
        task.add_done_callback(lambda done: self._asking.get(workspace) is done and self._asking.pop(workspace))

    def said(self, workspace: str) -> None:
        """The app has synced its functions itself: what it would answer is not asked any more."""
        task = self._asking.pop(workspace, None)
        if task is not None:
            task.cancel()

    def follow(self, url: str) -> None:
        """In development: keep asking the app at this URL, so that it need not say anything itself."""
        self._following = asyncio.get_running_loop().create_task(self._follow(url), name="durable-discovery")

    async def _ask(self, workspace: str, url: str) -> None:
        trouble = ""
        for delay in DELAYS:
            await asyncio.sleep(delay)
            try:
                found = await self._fetch(url, await self._keys(workspace), discover=False)
                specs, _ = await self._functions.sync(workspace, found.sync())
            except (DurableError, ApiError) as error:
                trouble = str(error)
                if isinstance(error, RunnerError) and not error.retryable:
                    break
            else:
                log.info("app %s at %s has %d functions", workspace, url, len(specs))
                return
        log.warning("app %s was not asked for its functions; it may POST /fn/sync them: %s", workspace, trouble)

    async def _follow(self, url: str) -> None:
        told, last = "", b""
        while True:
            try:
                known = [one for one in await self._workspaces.all() if (one.environment, one.app_url) == ("dev", url)]
                workspace = known[0] if known else None
                keys = [] if workspace is None else await self._keys(workspace.token)
                found = await self._fetch(url, keys, discover=True)
                token = workspace.token if workspace else await self._adopt(found, url)
                body = found.sync()
                if body != last:
                    specs, _ = await self._functions.sync(token, body)
                    log.info("app %s at %s has %d functions", token, url, len(specs))
                last, told = body, ""
            except (DurableError, ApiError) as error:
                if str(error) != told:
                    log.warning("the app at %s is looked for again: %s", url, error)
                told = str(error)
            await asyncio.sleep(LOOK_EVERY)

    async def _adopt(self, found: Manifest, url: str) -> str:
        """The workspace, in dev, of an app that was discovered, with the key that it told; without one, calls between the
        two are not signed. Raises ApiError."""
        name = found.app_name or split(found.app_id or "")[0]
        if not name:
            raise ApiError(400, "bad_body", "The app does not say its name. Is it in development, with discovery on?")
        return (await self._workspaces.adopt(check_app(name), url, found.signing_key or None)).token

    async def _keys(self, workspace: str) -> list[str]:
        """The newest first."""
        found = await self._workspaces.find(workspace)
        live = [] if found is None else [key for key in found.live(self._workspaces.now) if key.role == "full"]
        return [key.secret for key in sorted(live, key=lambda key: -key.created_at)]

    async def _fetch(self, url: str, keys: Sequence[str], *, discover: bool) -> Manifest:
        outgoing, now = self._functions.outgoing, self._workspaces.now
        return await fetch(outgoing, url, keys, now_ms=now // 1_000, discover=discover)
