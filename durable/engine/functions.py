"""The functions that apps have registered, as definitions in this engine's catalog: kept as items, so that every engine loads
them, and drives whichever run comes to it.

An item of kind `function` has every version that was ever registered under a name: a run goes on with the version it began
with, a new one gets the one registered last. What an app no longer registers keeps its versions and loses its triggers.
Engines look for what has changed every `poll_every`, and at once where a hint says so.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from durable.core.commands import Invoke
from durable.core.definition import WorkflowDefinition
from durable.core.errors import DefinitionError, DurableError, StoreError, WrongApp
from durable.core.flow import read_flow, read_triggers
from durable.core.functions import AppFunction, Pass, Reply, function_workflow
from durable.core.names import check_name
from durable.core.registry import Registry
from durable.core.retry import RetryPolicy
from durable.protocol.signature import fingerprint
from durable.runners.connect import Session, Socket
from durable.runners.directory import HEARTBEAT_MS, Directory
from durable.runners.interface import RunnerInfo
from durable.runners.outgoing import Calls, Outgoing, check_url
from durable.runners.registration import FunctionSpec, Registration, read_register, read_sync
from durable.runners.workspaces import Workspaces
from durable.store.items import Item, ItemKey, ItemQuery, NewItem

if TYPE_CHECKING:
    from durable.engine.engine import WorkflowEngine

log = logging.getLogger("durable.functions")

KIND = "function"
MAX_VERSIONS = 200
"""Versions of one function; the oldest are forgotten, and their runs wait for good."""
OVERLAP = 5_000_000
"""µs that a look for changes goes back behind the one before: transactions end in another order than they began."""


class Function(Struct, kw_only=True, omit_defaults=True):
    """A function as its item says."""

    current: str
    """The version registered last."""
    versions: dict[str, FunctionSpec]
    """In order of registration."""
    withdrawn: bool = False
    """Its app no longer registers it: nothing starts it any more but by name."""

    @property
    def spec(self) -> FunctionSpec:
        return self.versions[self.current]


class Functions:
    """Of one engine. Made by whoever serves it, started after the engine, closed before it."""

    def __init__(
        self,
        engine: WorkflowEngine,
        *,
        calls: Calls | None = None,
        call_timeout: float | None = None,
        heartbeat_ms: int = HEARTBEAT_MS,
        retry: RetryPolicy | None = None,
    ) -> None:
        """`call_timeout`: seconds one call to an app may take, by default the lease. `retry`: of functions that say none."""
        self._engine = engine
        self._store = engine.deps.store
        self._catalog = engine.deps.catalog
        self._retry = retry or RetryPolicy()
        self._timeout = call_timeout or engine.deps.settings.lease
        clock = engine.clock
        self.outgoing = Outgoing(calls)
        self.workspaces = Workspaces(self._store, clock.now, clock.monotonic)
        self.directory = Directory(
            self._store,
            self.workspaces,
            self.outgoing,
            now=clock.now,
            monotonic=clock.monotonic,
            timeout=self._timeout,
            heartbeat_ms=heartbeat_ms,
        )
        self.directory.on_came = self._somebody_came
        self._known: dict[str, dict[str, tuple[int, Function]]] = {}
        """By workspace and name: the item's version, and what it says."""
        self._since: int | None = None
        self._wake = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._unlisten: Callable[[], None] = lambda: None

    # ------------------------------------------------------------------ life

    async def start(self, url: str | None = None) -> None:
        """Load what there is, and keep up. `url`: of this engine's internal endpoint, where other engines reach it."""
        await self._look()
        await self.directory.start(url)
        self._unlisten = self._store.listen(self._wake.set)
        self._looking = asyncio.get_running_loop().create_task(self._follow(), name="durable-functions")

    async def close(self) -> None:
        """Close connections to runners, and look no more."""
        self._unlisten()
        task, self._looking = self._looking, None
        if task is not None:
            task.cancel()
        await self.directory.close()
        await self.outgoing.close()

    async def _follow(self) -> None:
        every = self._engine.deps.settings.poll_every
        while True:
            try:
                async with asyncio.timeout(every):
                    await self._wake.wait()
                await asyncio.sleep(0.02)  # hints come in swarms
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._look()
            except StoreError as error:
                log.warning("functions cannot be looked for, trying again: %s", error)
            except Exception:
                log.exception("looking for functions went wrong, trying again")

    async def _look(self) -> None:
        """Take in what has changed since the last look."""
        changed: set[str] = set()
        after: ItemKey | None = None
        since = self._since
        first: int | None = None
        while True:
            page = await self._store.list_items(ItemQuery(KIND, after=after, changed_since=since))
            first = page.now if first is None else first
            for item in page.items:
                if self._take(item):
                    changed.add(item.workspace)
            if len(page.items) < 500:
                break
            last = page.items[-1]
            after = ItemKey(last.workspace, last.kind, last.id)
        self._since = first - OVERLAP if first is not None else None
        for workspace in changed:
            self._put(workspace)

    def _take(self, item: Item) -> bool:
        of_workspace = self._known.setdefault(item.workspace, {})
        known = of_workspace.get(item.id)
        if known is not None and known[0] >= item.version:
            return False
        try:
            of_workspace[item.id] = (item.version, msgspec.json.decode(item.data, type=Function))
        except msgspec.MsgspecError as error:
            log.error("function %s of %s cannot be read, and is left out: %s", item.id, item.workspace, error)
            return False
        return True

    def _put(self, workspace: str) -> None:
        """Have the catalog know the functions of a workspace."""
        own = workspace == self._engine.deps.settings.workspace
        registry = self._engine.deps.registry if own else Registry()
        for name, (_, function) in sorted(self._known.get(workspace, {}).items()):
            try:
                for version, spec in function.versions.items():
                    current = version == function.current and not function.withdrawn and spec.enabled
                    registry.replace(self._definition(workspace, spec, triggered=current))
                registry.prefer(name, function.current)
            except DurableError as error:
                log.error("function %s of %s cannot be loaded: %s", name, workspace, error)
        if own:
            self._catalog.changed()
        else:
            self._catalog.put(workspace, registry)

    def _definition(self, workspace: str, spec: FunctionSpec, *, triggered: bool) -> WorkflowDefinition:
        function = AppFunction(
            spec.name,
            spec.version,
            workspace,
            spec.app,
            spec.dialect,
            self._ask,
            self._call_out,
            spec.retry or self._retry,
            spec.timeout,
            spec.on_failure,
            spec.cap,
            spec.cleans,
            spec.versioned,
        )
        definition = function_workflow(function, priority=spec.priority)
        triggers = read_triggers(spec.triggers) if triggered and spec.triggers else ()
        return dataclasses.replace(definition, triggers=triggers, flow=read_flow(spec.flow))

    def _somebody_came(self, workspace: str) -> None:
        """Passes that are to be tried again because nobody was there are due now."""
        executor = self._engine._executor
        now = executor.clock.now()
        for run in list(executor.residents.values()):
            if run.workspace == workspace and run.retries:
                for key in run.retries.keys() & run.machine.outstanding.keys():
                    if isinstance(run.machine.outstanding[key], Invoke):
                        run.retries[key] = min(now, run.retries[key])
                        executor.wake(run)

    async def _ask(self, call: Pass) -> Reply:
        return await self.directory.ask(call)

    async def _call_out(self, url: str, data: bytes, idempotency_key: str) -> bytes:
        """A webhook's call. What comes back is the step's result: status, and the body where it is JSON or text."""
        headers = {"idempotency-key": idempotency_key}
        answer = await self.outgoing.request("POST", url, body=data, headers=headers, timeout=self._timeout)
        if answer.status == 429 or answer.status >= 500:
            raise DurableError(f"The webhook answered {answer.status}.")
        try:
            body: Any = msgspec.json.decode(answer.body) if answer.body else None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            body = answer.body.decode("utf-8", "replace")
        return msgspec.json.encode({"status": answer.status, "body": body})

    # ------------------------------------------------------------------ registering

    def of(self, workspace: str) -> dict[str, Function]:
        """The functions of a workspace, by name, as this engine knows them."""
        return {name: function for name, (_, function) in self._known.get(workspace, {}).items()}

    async def sync(self, workspace: str, body: bytes) -> tuple[list[FunctionSpec], str | None]:
        """`/fn/sync`: these are all the functions of the app now, but for those of its runners; and its URL where it says one,
        which is the caller's to store. Raises DefinitionError: nothing of it counts then."""
        specs, url = read_sync(body, app_of(workspace))
        await self.register(workspace, specs, whole=True)
        return specs, url

    async def register(self, workspace: str, specs: Sequence[FunctionSpec], *, whole: bool = False) -> None:
        """Keep these functions. `whole`: others that speak as they do are withdrawn. Raises DefinitionError."""
        by_name: dict[str, list[FunctionSpec]] = {}
        for spec in specs:
            check_name(spec.name, "function's name", reserved=False)
            self._definition(workspace, spec, triggered=True)  # bad conditions, crons and rules are refused here
            by_name.setdefault(spec.name, []).append(spec)
        keep = [name for name, function in self.of(workspace).items() if function.spec.dialect == "operation"]
        names = [*by_name, *(name for name in keep if whole and name not in by_name)]
        for name in names:
            if name in by_name or not self.of(workspace)[name].withdrawn:
                await self._keep(workspace, name, by_name.get(name))
        await self._look()

    async def _keep(self, workspace: str, name: str, specs: Sequence[FunctionSpec] | None) -> None:
        """Write one function down. None: it is withdrawn."""
        own = self._engine.deps.settings.workspace
        if specs and workspace == own and _is_code(self._engine.deps.registry, name):
            raise DefinitionError(f"Workflow {name} is this engine's own; a function of an app needs another name.")
        key = ItemKey(workspace, KIND, name)
        for _ in range(20):
            item = (await self._store.get_items([key]))[0]
            before = None if item is None else msgspec.json.decode(item.data, type=Function)
            after = _changed(before, specs)
            if after is None or (before is not None and after == before):
                return
            data = msgspec.json.encode(after)
            new = NewItem(workspace, KIND, name, data, expected=0 if item is None else item.version)
            if (await self._store.put_items([new]))[0].done:
                return
        raise StoreError(f"Function {name} of {workspace} is being registered by many at once; try again.")

    async def connected(
        self, socket: Socket, *, workspace: str | None, key_id: str | None = None, heartbeat_ms: int | None = None
    ) -> None:
        """A runner has dialled in: converse with it until its connection ends. `workspace`: of its credential; None, on a
        loopback that asks for none: the app's in dev."""
        session = Session(
            socket,
            workspace or "",
            key_id=key_id,
            instance=f"connect-{self._engine.deps.ids.unique()}",
            heartbeat_ms=heartbeat_ms or self.directory.heartbeat_ms,
            monotonic=self._engine.clock.monotonic,
        )

        async def register(session: Session, payload: bytes) -> None:
            said = read_register(payload, instance=session.instance)
            if said.info.mode != "connect":
                raise DefinitionError("A runner that dials in has no URL; one that has posts to /register.")
            session.workspace = workspace_of_app(said.info.app, workspace)
            info = await self._checked(session.workspace, said, key_id)
            await self.register(session.workspace, said.functions)
            session.registered = True
            await self.directory.joined(session, info)

        try:
            await session.run(register)
        finally:
            await self.directory.left(session)

    async def check_in(self, workspace: str | None, body: bytes, *, key_id: str | None = None) -> RunnerInfo:
        """`POST /register` of a runner that serves: now, and again every 30 s. Raises DefinitionError, CallRefused."""
        said = read_register(body, instance="")
        if said.info.url is None:
            raise DefinitionError("A runner that serves says its `url`, where its /invoke is.")
        check_url(said.info.url, self.outgoing.calls)
        place = workspace_of_app(said.info.app, workspace)
        said.info = replace(said.info, instance=f"serve-{said.info.url}"[:190])
        info = await self._checked(place, said, key_id)
        await self.register(place, said.functions)
        return await self.directory.check_in(place, info)

    async def _checked(self, workspace: str, said: Registration, key_id: str | None) -> RunnerInfo:
        """With whether its key is a live one of the workspace."""
        claimed = said.info.key_fingerprint or key_id
        if claimed is None:
            return said.info
        of_workspace = await self.workspaces.get(workspace)
        live = [] if of_workspace is None else of_workspace.live_keys(self.workspaces.now())
        matches = claimed in {fingerprint(key.secret) for key in live}
        return replace(said.info, key_fingerprint=claimed, key_matches=matches)


def app_of(workspace: str) -> str:
    """The app of a workspace's token."""
    app, _, environment = workspace.rpartition(".")
    return app if app and environment in ("dev", "acc", "prod") else workspace


def workspace_of_app(app: str, workspace: str | None) -> str:
    """The workspace that a registration for this app is of. The credential says it, and the body may only agree (A10). Raises
    WrongApp."""
    token = app if app != app_of(app) else f"{app}.dev"
    if workspace is None:
        return token
    if app not in (workspace, app_of(workspace)):
        raise WrongApp("The registration names another app than its credential is of.")
    return workspace


def _is_code(registry: Registry, name: str) -> bool:
    return any(one.name == name and not isinstance(one.hosting, AppFunction) for one in registry.workflows())


def _changed(before: Function | None, specs: Sequence[FunctionSpec] | None) -> Function | None:
    """What the item is to say. The last of the versions given is the current one."""
    if specs is None:
        return None if before is None else replace(before, withdrawn=True)
    versions = {} if before is None else dict(before.versions)
    for spec in specs:
        versions[spec.version] = spec
    for old in list(versions)[: max(0, len(versions) - MAX_VERSIONS)]:
        del versions[old]
    return Function(current=specs[-1].version, versions=versions)
