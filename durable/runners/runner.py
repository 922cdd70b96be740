"""What a runner is, however it is reached: the workflows of an app, what it says of itself, and the answer to an invoke.

`serving.Serving` and `connecting.Connecting` put it on a wire. A runner opens no store and no engine: an `Application` is
prepared (its providers are made and its workflows bound), a `Durable` is only read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from durable.core.clock import Clock, SystemClock
from durable.core.definition import WorkflowDefinition, is_workflow
from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError, DurableError, ErrorData, PayloadTooLarge
from durable.core.flow import write_flow, write_triggers
from durable.core.registry import Registry
from durable.core.step import StepObserver
from durable.protocol.runners import MAX_FRAME, VERSION, InvokeResult, read_invoke
from durable.protocol.signature import fingerprint
from durable.runners.passes import PassHandler, refusal

log = logging.getLogger("durable.runner")

SDK = "durable"
_FRAMEWORKS = ("fastapi", "flask", "django", "litestar", "sanic", "aiohttp", "starlette")
"""In this order: some bring others with them."""
_encode = msgspec.json.Encoder().encode


class Malformed(DurableError):
    """An invoke without its three objects: nobody knows what to run."""

    code = "malformed_invoke"


class Runner:
    """The workflows of an app, at most `concurrency` passes at once."""

    def __init__(
        self,
        things: Any,
        *,
        app: str,
        key: str | None = None,
        runner: str | None = None,
        framework: str | None = None,
        region: str | None = None,
        on_failure: Mapping[Any, Callable[..., Any]] | None = None,
        on_step: StepObserver | None = None,
        concurrency: int = 64,
        drain_timeout: Duration = 15.0,
        threads: int = 32,
        clock: Clock | None = None,
    ) -> None:
        """`things`: a Durable, an Application or root module class, a Registry, or workflows. `app`: the workspace's token,
        `shop.dev`. `key`: its key. `runner`: a name that runs can be pinned to; default one for this process. `on_failure`: by
        workflow, what is called when a run has failed for good, an async function `(ctx, failure)`. `region`: default
        DURABLE_REGION. `framework`: default what the process has imported.

        Raises DefinitionError.
        """
        if not app:
            raise DefinitionError("A runner needs the name of its app: app='shop.dev'.")
        if concurrency < 1:
            raise DefinitionError(f"concurrency is a number from 1, not {concurrency!r}.")
        self.app = app
        self.key = key
        self.name = runner or f"{platform.node() or 'runner'}-{os.getpid()}-{secrets.token_hex(3)}"
        self.framework = framework or _framework()
        self.region = region or os.environ.get("DURABLE_REGION") or None
        self.drain_timeout = seconds(drain_timeout)
        self.clock = clock or SystemClock()
        self._things = things
        self._on_failure = on_failure
        self._on_step = on_step
        self._threads = threads
        self.concurrency = concurrency
        self._prepared: Any = None
        self._handler: PassHandler | None = None
        self._under_way: set[asyncio.Task[Any]] = set()
        if not _waits_for_modules(things):
            self._handler = self._handling(_registry(things))

    # ------------------------------------------------------------------ life

    async def prepare(self) -> None:
        """Make an application's providers, if that is what it was given. Raises what they raise; DefinitionError."""
        if self._handler is None:
            from durable.module.application import Application

            things = self._things
            self._prepared = things if isinstance(things, Application) else Application(things)
            durable = await self._prepared.prepare()
            self._handler = self._handling(durable.registry)

    async def drain(self, timeout: float | None = None) -> None:
        """Wait for the passes under way, and give up what takes longer than `timeout` seconds."""
        under_way = set(self._under_way)
        if under_way:
            await asyncio.wait(under_way, timeout=self.drain_timeout if timeout is None else timeout)
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def release(self) -> None:
        """Let go of threads and of what `prepare` has made."""
        if self._handler is not None:
            self._handler.close()
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            self._handler = None
            await prepared.close()

    @property
    def under_way(self) -> int:
        """Passes under way."""
        return len(self._under_way)

    @property
    def workflows(self) -> list[str]:
        """The names of the workflows it serves."""
        return list(dict.fromkeys(flow.name for flow in self._served()))

    # ------------------------------------------------------------------ what it says of itself

    def registration(self, **more: Any) -> dict[str, Any]:
        """The payload of `runner.register` and of `POST /register`."""
        from durable import __version__

        said: dict[str, Any] = {
            "app": self.app,
            "runner": self.name,
            "runtime": f"{platform.python_implementation().lower()} {platform.python_version()}",
            "language": "python",
            "sdkName": SDK,
            "version": __version__,
            "framework": self.framework,
            "protocolVersion": VERSION,
            "minProtocolVersion": VERSION,
            "maxProtocolVersion": VERSION,
            "workflows": [self._described(flow) for flow in self._newest_first()],
        }
        if self.region is not None:
            said["region"] = self.region
        if self.key is not None:
            said["keyFingerprint"] = fingerprint(self.key)
        return said | more

    def _newest_first(self) -> list[WorkflowDefinition]:
        """By name; of several versions the latest first, which is what an engine without versions goes by."""
        served = self._served()[::-1]
        return [flow for name in self.workflows for flow in served if flow.name == name]

    def _described(self, flow: WorkflowDefinition) -> dict[str, Any]:
        said: dict[str, Any] = {
            "name": flow.name,
            "version": flow.version,
            "triggers": write_triggers(flow.triggers),
            **write_flow(flow.flow),
        }
        if flow.name in self._ready().on_failure:
            said["onFailure"] = True
        if flow.timeout is not None:
            said["timeoutMs"] = round(flow.timeout * 1_000)
        if flow.priority and "priority" not in said:
            said["priority"] = flow.priority
        return said

    # ------------------------------------------------------------------ an invoke

    async def answer(self, data: bytes) -> tuple[int, bytes]:
        """Status and body, at most `MAX_FRAME` bytes. Raises Malformed; CancelledError where it was given up."""
        handler = self._ready()
        try:
            invoke = read_invoke(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Malformed(f"An invoke has event, steps and ctx; this one: {error}") from None
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        try:
            result = await handler(invoke)
        finally:
            self._under_way.discard(task)
        return fitting(result)

    def _ready(self) -> PassHandler:
        if self._handler is None:
            raise DurableError("The runner has not started: its modules are not made yet. Enter it first.")
        return self._handler

    def _served(self) -> list[WorkflowDefinition]:
        # A workflow that is hosted elsewhere has no code here.
        return [flow for flow in self._ready().registry.workflows() if flow.hosting is None]

    def _handling(self, registry: Registry) -> PassHandler:
        handler = PassHandler(registry, self.clock, self._on_step, on_failure=self._on_failure, threads=self._threads)
        if not any(flow.hosting is None for flow in registry.workflows()):
            raise DefinitionError("This runner has no workflow to run: put @workflow on one, and give it or its app.")
        return handler


def fitting(result: InvokeResult, limit: int = MAX_FRAME - 4_096) -> tuple[int, bytes]:
    """Status and body as bytes. One over the limit goes without its log lines; if that does not help it is a failure that says
    so: a frame nobody takes would leave the engine waiting (B59)."""
    body = _encode(result.body)
    if len(body) <= limit:
        return result.status, body
    logs = getattr(result.body, "logs", None)
    if logs:
        bare = _encode(msgspec.structs.replace(result.body, logs=[]))
        if len(bare) <= limit:
            log.warning("an answer of %d bytes goes without its %d log lines", len(body), len(logs))
            return result.status, bare
        body = bare
    error = ErrorData(
        message=f"What this pass came to is {len(body):,} bytes as JSON, and a runner may answer {limit:,}. Store the data "
        "elsewhere (a bucket, a table, a file) and pass its id; or let fewer steps run at once.",
        code=PayloadTooLarge.code,
        type=PayloadTooLarge.__name__,
        retryable=False,
        details={"bytes": len(body), "limit": limit},
    )
    refused = refusal(error)
    return refused.status, _encode(refused.body)


def _waits_for_modules(things: Any) -> bool:
    """An application, or a root module class: what it runs is known once its providers are made."""
    if "__durable_module__" in getattr(things, "__dict__", ()):
        return True
    modules = sys.modules.get("durable.module.application")  # who has not imported it has none
    return modules is not None and isinstance(things, modules.Application)


def _registry(things: Any) -> Registry:
    if isinstance(things, Registry):
        return things
    registry = getattr(things, "registry", None)
    if isinstance(registry, Registry):
        return registry
    if is_workflow(things):
        return Registry([things])
    if isinstance(things, Iterable) and not isinstance(things, str | bytes):
        return Registry(things)
    raise DefinitionError(
        f"{things!r:.100} is no app and no workflow. Give a Durable, an Application, a root module class or workflows."
    )


def _framework() -> str:
    return next((name for name in _FRAMEWORKS if name in sys.modules), "none")
