"""Who is alive and whom to ask: runners as items that expire, the sessions that this engine holds, and the links to them.

A runner that says nothing for three of its intervals is gone: its item expires. Of those that have a function the one with the
least under way is asked; a run that is pinned to a runner is asked of that one only, and fails at once where it is away. A
runner whose connection another engine holds is reached through that engine.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable

import msgspec
from msgspec import Struct

from durable.core.errors import CallRefused, RunnerError, RunnerGone, RunnerRefused, RunnerTimeout, StoreError
from durable.core.functions import Pass, Reply
from durable.protocol import signature
from durable.runners.connect import REPLACED, Session
from durable.runners.http import HttpLink
from durable.runners.interface import KIND, NODE, Node, RunnerInfo, RunnerLink
from durable.runners.outgoing import Calls, Outgoing
from durable.runners.serve import ServeLink, request_path
from durable.runners.workspaces import Workspaces
from durable.store.interface import Store
from durable.store.items import Item, ItemKey, ItemQuery, NewItem
from durable.store.records import DEFAULT_WORKSPACE

log = logging.getLogger("durable.runners")

HEARTBEAT_MS = 15_000
"""How often a connected runner is to be heard of, unless the settings say otherwise."""
SERVE_MS = 30_000
"""How often one that serves checks in."""
INTERVALS = 3
"""Without a word for so many, it is gone."""
FRESH = 1.0
"""Seconds for which a list of runners is believed."""
SHUN = 5.0
"""Seconds for which a runner that could not be called is asked last."""
PATIENCE = 2.0
"""Seconds a pass waits here for a runner to come, before it is tried again later."""
NODE_BODY = 4 << 20

_encode = msgspec.json.Encoder().encode


class _Asked(Struct):
    """Of one engine by another."""

    instance: str
    call: Pass
    timeout: float


class _Told(Struct, omit_defaults=True):
    """The answer to that."""

    reply: Reply | None = None
    error: str | None = None
    code: str = ""
    retryable: bool = True


_ERRORS: dict[str, type[RunnerError]] = {kind.code: kind for kind in (RunnerGone, RunnerTimeout, RunnerRefused)}


class Directory:
    """Of one engine. `ask` is what functions are driven with."""

    def __init__(
        self,
        store: Store,
        workspaces: Workspaces,
        outgoing: Outgoing,
        *,
        now: Callable[[], int],
        monotonic: Callable[[], float],
        timeout: float,
        heartbeat_ms: int = HEARTBEAT_MS,
        patience: float = PATIENCE,
    ) -> None:
        """`timeout`: seconds one call may take, the engine's lease."""
        self.heartbeat_ms = heartbeat_ms
        self.sessions: dict[str, Session] = {}
        """Connections held here, by instance."""
        self.on_came: Callable[[str], None] = lambda workspace: None
        """Called when a runner of a workspace has come."""
        self.node_id = secrets.token_hex(8)
        self._store = store
        self._workspaces = workspaces
        self._outgoing = outgoing
        self._between = Outgoing(Calls(loopback=True, private=True))
        self._now = now
        self._monotonic = monotonic
        self._timeout = timeout
        self._patience = patience
        self._node: Node | None = None
        self._http = HttpLink(outgoing, workspaces)
        self._items: dict[str, tuple[str, RunnerInfo, int]] = {}
        """Of own sessions: workspace, what its item says, its version."""
        self._known: dict[str, tuple[float, list[RunnerInfo]]] = {}
        self._nodes: dict[str, tuple[float, Node | None]] = {}
        self._load: Counter[str] = Counter()
        self._used: dict[str, int] = {}
        self._turns = 0
        self._shunned: dict[str, float] = {}
        self._came = asyncio.Event()
        self._nonces = signature.Nonces()
        self._beating: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ life

    async def start(self, url: str | None = None) -> None:
        """Begin to keep the items of what is here. `url`: of this engine's internal endpoint, where others may reach it."""
        if url is not None:
            self._node = Node(url=url, key=secrets.token_hex(32))
            await self._say_node()
        self._beating = asyncio.get_running_loop().create_task(self._beat(), name="durable-runners")

    async def close(self) -> None:
        """Close the connections, and take back what was said of them."""
        task, self._beating = self._beating, None
        if task is not None:
            task.cancel()
        for session in list(self.sessions.values()):
            await session.close(1001, "this engine stops")
            await self.left(session)
        if self._node is not None:
            try:
                await self._store.delete_items([ItemKey(DEFAULT_WORKSPACE, NODE, self.node_id)])
            except StoreError as error:
                log.warning("could not sign off as a node; that ends by itself: %s", error)
        await self._between.close()

    async def _beat(self) -> None:
        interval = self.heartbeat_ms / 1_000
        while True:
            await asyncio.sleep(interval)
            try:
                if self._node is not None:
                    await self._say_node()
                for session in list(self.sessions.values()):
                    await self._refresh(session)
            except StoreError as error:
                log.warning("runners cannot be written down, trying again: %s", error)
            except Exception:
                log.exception("runners cannot be written down, trying again")

    async def _say_node(self) -> None:
        expires = INTERVALS * self.heartbeat_ms * 1_000
        await self._store.put_items(
            [NewItem(DEFAULT_WORKSPACE, NODE, self.node_id, _encode(self._node), expires_in=expires)]
        )

    # ------------------------------------------------------------------ who comes and goes

    async def joined(self, session: Session, info: RunnerInfo) -> None:
        """A runner has dialled in and registered. Of two that call themselves the same, the newer one counts (A29)."""
        now = self._now()
        info = msgspec.structs.replace(info, mode="connect", node=self.node_id, since=now, seen=now, url=None)
        await self._replace_older(session.workspace, info)
        version = await self._put(session.workspace, info, session.heartbeat_ms, None)
        self._items[session.instance] = (session.workspace, info, version)
        self.sessions[session.instance] = session
        self._changed(session.workspace)

    async def left(self, session: Session) -> None:
        """Its connection has ended: it is not asked from here on."""
        if self.sessions.pop(session.instance, None) is None:
            return
        self._items.pop(session.instance, None)
        self._known.pop(session.workspace, None)
        try:
            await self._store.delete_items([ItemKey(session.workspace, KIND, session.instance)])
        except StoreError as error:
            log.warning("a runner that left cannot be forgotten; its item ends by itself: %s", error)

    async def check_in(self, workspace: str, info: RunnerInfo) -> RunnerInfo:
        """A runner that serves says it is alive. Its siblings that have been silent for more than an interval are gone."""
        key = ItemKey(workspace, KIND, info.instance)
        before = (await self._store.get_items([key]))[0]
        now = self._now()
        since = now if before is None else _info(before).since
        interval = info.heartbeat_ms or SERVE_MS
        info = msgspec.structs.replace(
            info, mode="serve", since=since, seen=now, in_flight=self._load[info.instance], heartbeat_ms=interval
        )
        await self._put(workspace, info, interval, None)
        if info.runner is not None:
            stale = [
                ItemKey(workspace, KIND, one.instance)
                for one in await self._list(workspace)
                if one.instance != info.instance
                and (one.app, one.runner, one.mode) == (info.app, info.runner, "serve")
                and now - one.seen > 1_500 * interval
            ]
            if stale:
                await self._store.delete_items(stale)
        self._shunned.pop(info.instance, None)
        self._changed(workspace)
        return info

    async def check_out(self, workspace: str, instance: str) -> None:
        """A runner that serves stops."""
        await self._store.delete_items([ItemKey(workspace, KIND, instance)])
        self._known.pop(workspace, None)

    async def live(self, workspace: str) -> list[RunnerInfo]:
        """The runners of a workspace, as they are known now."""
        known = self._known.get(workspace)
        if known is not None and self._monotonic() - known[0] < FRESH:
            found = known[1]
        else:
            found = await self._list(workspace)
            self._known[workspace] = (self._monotonic(), found)
        return [one for one in found if one.node != self.node_id or one.instance in self.sessions]

    async def _replace_older(self, workspace: str, info: RunnerInfo) -> None:
        if info.runner is None:
            return
        for one in await self._list(workspace):
            if (one.app, one.runner) == (info.app, info.runner) and one.instance != info.instance:
                await self._store.delete_items([ItemKey(workspace, KIND, one.instance)])
                session = self.sessions.get(one.instance)
                if session is not None:
                    await session.close(REPLACED, "a newer runner of this name has connected")
                    await self.left(session)

    async def _refresh(self, session: Session) -> None:
        """Write down that it is alive; if its item is gone, a newer one of its name is connected to another engine."""
        held = self._items.get(session.instance)
        if held is None or not session.alive:
            return
        workspace, info, version = held
        info = msgspec.structs.replace(info, seen=self._now(), in_flight=session.in_flight)
        written = await self._put(workspace, info, session.heartbeat_ms, version)
        if written:
            self._items[session.instance] = (workspace, info, written)
            return
        there = (await self._store.get_items([ItemKey(workspace, KIND, session.instance)]))[0]
        if there is not None:
            self._items[session.instance] = (workspace, info, there.version)
            return
        if info.runner is None or not any(
            (one.app, one.runner) == (info.app, info.runner) for one in await self._list(workspace)
        ):
            again = await self._put(
                workspace, info, session.heartbeat_ms, None
            )  # it had expired while the store was away
            self._items[session.instance] = (workspace, info, again)
            return
        await session.close(REPLACED, "a newer runner of this name has connected")
        await self.left(session)

    async def _put(self, workspace: str, info: RunnerInfo, interval_ms: int, expected: int | None) -> int:
        """The version written; 0: another is there."""
        expires = INTERVALS * interval_ms * 1_000
        item = NewItem(workspace, KIND, info.instance, _encode(info), expires_in=expires, expected=expected)
        outcome = (await self._store.put_items([item]))[0]
        return outcome.version if outcome.done else 0

    async def _list(self, workspace: str) -> list[RunnerInfo]:
        found: list[RunnerInfo] = []
        after: ItemKey | None = None
        while True:
            page = await self._store.list_items(ItemQuery(KIND, workspace, after=after))
            found += [_info(item) for item in page.items]
            if len(page.items) < 500:
                return found
            last = page.items[-1]
            after = ItemKey(last.workspace, last.kind, last.id)

    def _changed(self, workspace: str) -> None:
        self._known.pop(workspace, None)
        self._came.set()
        self._came = asyncio.Event()
        self.on_came(workspace)

    # ------------------------------------------------------------------ whom to ask

    async def ask(self, call: Pass) -> Reply:
        """Ask for a pass, wherever the function lives. Raises RunnerError."""
        if call.dialect == "operation":
            return await self._http.invoke(call, timeout=self._timeout)
        end = self._monotonic() + self._timeout
        patient_until = self._monotonic() + min(self._patience, self._timeout / 2)
        tried: set[str] = set()
        while True:
            came = self._came
            chosen = await self._choose(call, tried)
            if chosen is None:
                if call.runner is not None:
                    raise RunnerGone(
                        f"The run is pinned to runner {call.runner} of app {call.app}, which is not there.",
                        retryable=False,
                    )
                left = patient_until - self._monotonic()
                if left <= 0:
                    raise RunnerGone(f"No live runner of app {call.app} has workflow {call.workflow}. Start one.")
                try:
                    async with asyncio.timeout(min(left, 0.5)):
                        await came.wait()
                except TimeoutError:
                    self._known.pop(call.workspace, None)
                tried.clear()
                continue
            tried.add(chosen.instance)
            try:
                return await self._invoke(chosen, call, end - self._monotonic())
            except RunnerGone as gone:
                log.info("runner %s of app %s could not be asked: %s", chosen.runner, chosen.app, gone)
                self._shunned[chosen.instance] = self._monotonic() + SHUN
                self._known.pop(call.workspace, None)

    async def _choose(self, call: Pass, tried: set[str]) -> RunnerInfo | None:
        candidates = [
            one
            for one in await self.live(call.workspace)
            if one.app == call.app
            and call.workflow in one.workflows
            and one.instance not in tried
            and (call.runner is None or one.runner == call.runner)
        ]
        if not candidates:
            return None
        now = self._monotonic()
        for instance, until in list(self._shunned.items()):
            if until <= now:
                del self._shunned[instance]
        chosen = min(
            candidates,
            key=lambda one: (one.instance in self._shunned, self._busy(one), self._used.get(one.instance, 0)),
        )
        self._turns += 1
        self._used[chosen.instance] = self._turns
        if len(self._used) > 10_000:
            self._used.clear()
        return chosen

    def _busy(self, one: RunnerInfo) -> int:
        session = self.sessions.get(one.instance)
        return session.in_flight if session is not None else max(one.in_flight, self._load[one.instance])

    async def _invoke(self, one: RunnerInfo, call: Pass, timeout: float) -> Reply:
        if timeout <= 0:
            raise RunnerTimeout(f"No runner of app {call.app} took the pass within {self._timeout:g} s.")
        link: RunnerLink | None = self.sessions.get(one.instance)
        if link is None and one.mode == "serve" and one.url is not None:
            link = ServeLink(self._outgoing, self._workspaces, one.url, signs=one.key_fingerprint is not None)
        if link is None and one.node is not None and one.node != self.node_id:
            link = _NodeLink(self, one.node, one.instance)
        if link is None:
            raise RunnerGone("Its connection has just ended.")
        self._load[one.instance] += 1
        try:
            return await link.invoke(call, timeout=timeout)
        finally:
            self._load[one.instance] -= 1
            if not self._load[one.instance]:
                del self._load[one.instance]

    # ------------------------------------------------------------------ engines among themselves

    async def node(self, id: str) -> Node | None:
        """Where another engine can be reached; None: it is gone."""
        known = self._nodes.get(id)
        if known is not None and self._monotonic() - known[0] < FRESH:
            return known[1]
        item = (await self._store.get_items([ItemKey(DEFAULT_WORKSPACE, NODE, id)]))[0]
        found = None if item is None else msgspec.json.decode(item.data, type=Node)
        self._nodes[id] = (self._monotonic(), found)
        return found

    async def forward(self, node: Node, instance: str, call: Pass, timeout: float) -> Reply:
        """Have another engine ask a runner that is connected to it."""
        body = _encode(_Asked(instance, call, timeout))
        ts, nonce = self._now() // 1_000_000, secrets.token_urlsafe(16)
        headers = {signature.HEADER: signature.sign(node.key, "POST", request_path(node.url), body, ts=ts, nonce=nonce)}
        try:
            answer = await self._between.request(
                "POST", node.url, body=body, headers=headers, timeout=timeout + 1.0, limit=NODE_BODY
            )
        except CallRefused as error:
            raise RunnerGone(str(error)) from None
        if answer.status != 200:
            raise RunnerGone(f"The engine that holds the runner's connection answered {answer.status}.")
        told = msgspec.json.decode(answer.body, type=_Told)
        if told.reply is not None:
            return told.reply
        raise _ERRORS.get(told.code, RunnerGone)(told.error or "It gave no reason.", retryable=told.retryable)

    async def answer_node(self, given: list[str], path: str, body: bytes) -> tuple[int, bytes]:
        """What the internal endpoint (POST) answers: status and body. `given`: every value of the signature header; `path`
        as in the request line."""
        if self._node is None:
            return 404, b"{}"
        now = self._now() / 1e6
        try:
            signed = signature.check(given, [self._node.key], "POST", path, body, now=now)
        except signature.BadSignature as error:
            log.warning("a request to the internal endpoint is refused: %s", error)
            return 401, b"{}"
        try:
            self._nonces.use(signed.nonce, now)
        except signature.BadSignature:
            return 409, b"{}"
        try:
            asked = msgspec.json.decode(body, type=_Asked)
        except msgspec.MsgspecError:
            return 400, b"{}"
        session = self.sessions.get(asked.instance)
        try:
            if session is None or session.workspace != asked.call.workspace:
                raise RunnerGone("That runner is not connected here any more.")
            told = _Told(await session.invoke(asked.call, timeout=min(asked.timeout, self._timeout)))
        except RunnerError as error:
            told = _Told(error=str(error), code=error.code, retryable=error.retryable)
        return 200, _encode(told)


class _NodeLink:
    """A runner that is connected to another engine."""

    def __init__(self, directory: Directory, node: str, instance: str) -> None:
        self._directory = directory
        self._node = node
        self._instance = instance

    async def invoke(self, call: Pass, *, timeout: float) -> Reply:
        node = await self._directory.node(self._node)
        if node is None:
            raise RunnerGone("The engine that held the runner's connection is gone.")
        return await self._directory.forward(node, self._instance, call, timeout)


def _info(item: Item) -> RunnerInfo:
    return msgspec.json.decode(item.data, type=RunnerInfo)
